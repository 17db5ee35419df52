"""The configuration: frozen dataclasses made from an ml_collections file, checked before anything runs.

`configs/base.py` explains every key; this file says their types and what values would do.
"""

import dataclasses
import difflib
import json
import pathlib
import typing
from collections.abc import Callable, Mapping
from typing import Any

from tokenformer_jax.errors import UserError
from tokenformer_jax.files import local_path, sealed

PATHS = ("path", "tokenizer", "cache_dir")  # keys of the data that name files
SIZES = ("qkv_tokens", "out_tokens", "ffn_tokens")  # keys of the model that say counts of parameter tokens


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    projection: str
    normalizer: str
    gelu: str
    tau_tokens: int
    vocab_size: int
    context_length: int
    num_layers: int
    num_heads: int
    embed_dim: int
    qkv_tokens: int
    out_tokens: int
    ffn_tokens: int
    rotary_fraction: float
    dropout: float
    stochastic_depth: float
    dtype: str
    remat: str
    pad_tokens_to: int = 0

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def tokens(self) -> dict[str, int]:
        """Parameter tokens of each projection in a block, with padding; empty for a plain Transformer."""
        return self.padding_counted().unpadded_tokens

    @property
    def unpadded_tokens(self) -> dict[str, int]:
        """The same without padding: what the keys say, and what τ at birth depends on."""
        if self.projection == "linear":
            return {}
        qkv = dict.fromkeys(("query", "key", "value"), self.qkv_tokens)
        return qkv | {"out": self.out_tokens, "ffn": self.ffn_tokens}

    def padding_counted(self) -> "ModelConfig":
        """A model with arrays of the same shapes, whose padding tokens are tokens like any others."""
        multiple = self.pad_tokens_to or 1
        sizes: Any = {size: -(-getattr(self, size) // multiple) * multiple for size in SIZES}
        return dataclasses.replace(self, pad_tokens_to=0, **sizes)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    dataset: str
    path: str
    text_key: str
    train_split: str
    validation_split: str
    tokenizer: str
    mask_documents: bool
    cache_dir: str


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    peak_learning_rate: float
    final_learning_rate: float
    warmup_steps: int
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    clip_norm: float


@dataclasses.dataclass(frozen=True)
class GrowConfig:
    recipe: str
    tau_ramp: float
    restart_schedule: bool
    freeze_steps: int
    patience: int
    min_improvement: float


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    slice: int = dataclasses.field(default=1, kw_only=True)
    data: int
    fsdp: int
    tensor: int

    @property
    def batch_shards(self) -> int:
        """How many parts the batch is split into."""
        return self.slice * self.data * self.fsdp


@dataclasses.dataclass(frozen=True)
class Config:
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    grow: GrowConfig
    mesh: MeshConfig
    seed: int
    steps: int
    batch_size: int
    accumulation: int
    log_every: int
    eval_every: int
    eval_batches: int
    checkpoint_every: int
    checkpoints_kept: int
    profile_at: int
    rungs: tuple[dict[str, Any], ...]  # `ladder.stages` reads them
    non_finite: str = "raise"
    non_finite_limit: int = 10
    loss_spike: float = 0.0

    def to_json(self) -> str:
        """The text of a `config.json`, with a checksum. Its paths hold wherever it is read."""
        paths: Any = {key: _absolute(getattr(self.data, key)) for key in PATHS}
        return sealed(dataclasses.asdict(dataclasses.replace(self, data=dataclasses.replace(self.data, **paths))))


def _absolute(path: str) -> str:
    return str(pathlib.Path(path).absolute()) if path and not path.startswith("~") else path


def read_config(tree: Mapping[str, Any], source: str = "config") -> Config:
    """Builds and validates a `Config` from nested mappings (a ConfigDict, or parsed JSON).

    Raises:
      UserError: names the first key that is unknown, missing, of another type or out of range.
    """
    cfg = _read_dataclass(Config, tree, source)
    validate(cfg)
    return cfg


def read_model(tree: Mapping[str, Any], source: str) -> ModelConfig:
    """The model's part of a config, as a checkpoint's record holds it."""
    return _read_dataclass(ModelConfig, tree, source)


def _read_dataclass(cls: Any, tree: Any, where: str) -> Any:
    if not isinstance(tree, Mapping):
        raise UserError(f"{where}: expected a group of keys, got {tree!r}")
    types = typing.get_type_hints(cls)
    # Keys that came later have a default, so that runs from before can still be read.
    later = {f.name: f.default for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}
    tree = later | dict(tree)
    for key in tree:
        if key not in types:
            raise UserError(f"{where}: unknown key {key!r}{suggest(key, types)}")
    values = {}
    for key, kind in types.items():
        if key not in tree:
            raise UserError(f"{where}: key {key!r} is missing; configs/base.py lists them all")
        value, name = tree[key], f"{where}.{key}"
        if dataclasses.is_dataclass(kind):
            values[key] = _read_dataclass(kind, value, name)
        elif typing.get_origin(kind) is tuple:
            values[key] = _read_groups(value, name)
        elif kind is float and type(value) is int:
            values[key] = float(value)
        elif type(value) is kind:
            values[key] = value
        else:
            raise UserError(f"{name} = {value!r}: must be of type {kind.__name__}, not {type(value).__name__}")
    return cls(**values)


def _read_groups(value: Any, name: str) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(group, Mapping) for group in value):
        raise UserError(f"{name} = {value!r}: must be a list of groups of keys")
    return tuple(json.loads(json.dumps(group, default=dict)) for group in value)  # plain dicts all through


def suggest(key: str, known: Any) -> str:
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _require(ok: bool, key: str, value: Any, need: str) -> None:
    if not ok:
        raise UserError(f"{key} = {value!r}: {need}")


def _divisors(n: int, near: int) -> str:
    """The divisors of n around `near`, in words."""
    divisors = sorted((d for d in range(1, n + 1) if n % d == 0), key=lambda d: abs(d - near))
    return " or ".join(map(str, sorted(divisors[:2])))


# How to compute and to train, not what: they may change from run to run.
FREE_MODEL_KEYS = ("dropout", "stochastic_depth", "dtype", "remat")

CHOICES = {
    "model.projection": ("pattention", "linear"),
    "non_finite": ("raise", "skip", "rollback"),
    "model.normalizer": ("l2_norm_gelu", "gelu_l2_norm", "softmax"),
    "model.gelu": ("erf", "tanh"),
    "model.dtype": ("float32", "bfloat16"),
    "model.remat": ("none", "dots", "projections", "full"),
    "grow.recipe": ("zero_keys", "isometric", "split", "random_keys", "released", "zero_padding"),
}
POSITIVE = (
    "model.vocab_size model.context_length model.num_layers model.num_heads model.embed_dim model.ffn_tokens "
    "optimizer.peak_learning_rate optimizer.epsilon optimizer.clip_norm mesh.slice mesh.data mesh.fsdp "
    "mesh.tensor steps batch_size accumulation log_every checkpoints_kept non_finite_limit"
).split()
NOT_NEGATIVE = (
    "optimizer.final_learning_rate optimizer.warmup_steps optimizer.weight_decay seed eval_every eval_batches "
    "checkpoint_every profile_at model.qkv_tokens model.out_tokens model.tau_tokens model.pad_tokens_to "
    "grow.freeze_steps grow.patience grow.min_improvement loss_spike"
).split()
FRACTIONS = "model.rotary_fraction grow.tau_ramp".split()
BELOW_ONE = "model.dropout model.stochastic_depth optimizer.beta1 optimizer.beta2".split()


def validate(cfg: Config) -> None:
    """Checks every value; raises a UserError that names the key, its value and what would do."""

    def get(key: str) -> Any:
        value: Any = cfg
        for part in key.split("."):
            value = getattr(value, part)
        return value

    for key, choices in CHOICES.items():
        _require(get(key) in choices, key, get(key), f"must be one of {', '.join(choices)}")
    for key in POSITIVE:
        _require(0 < get(key) < float("inf"), key, get(key), "must be above 0")
    for key in NOT_NEGATIVE:
        _require(0 <= get(key) < float("inf"), key, get(key), "must be 0 or above")
    for key in FRACTIONS:
        _require(0 <= get(key) <= 1, key, get(key), "must lie between 0 and 1")
    _require(cfg.seed < 2**63, "seed", cfg.seed, "must be below 2**63")
    for key in BELOW_ONE:
        _require(0 <= get(key) < 1, key, get(key), "must be 0 or above, and below 1")
    if cfg.loss_spike and cfg.non_finite == "skip":
        raise UserError(
            f"loss_spike = {cfg.loss_spike}: is seen once its step has learnt, too late for non_finite = 'skip'; "
            "'rollback' would do"
        )
    for key in PATHS:
        local_path(getattr(cfg.data, key), f"data.{key}", any_bytes=key == "path")
    validate_model(cfg.model)
    mesh = cfg.mesh
    model, padded = cfg.model, cfg.model.padding_counted()
    for size in SIZES:
        if model.pad_tokens_to > 1 and getattr(padded, size) % mesh.tensor:
            _require_divisible("model.pad_tokens_to", model.pad_tokens_to, "mesh.tensor", mesh.tensor)
        way_out = f", or model.pad_tokens_to = {mesh.tensor}" if can_pad(model) else ""
        _require_divisible(f"model.{size}", getattr(padded, size), "mesh.tensor", mesh.tensor, way_out=way_out)
    _require_divisible("model.vocab_size", model.vocab_size, "mesh.tensor", mesh.tensor)
    dim, heads = model.embed_dim, model.num_heads
    _require_divisible("model.num_heads", heads, "mesh.tensor", mesh.tensor, lambda n: n <= dim and dim % n == 0)
    _require_divisible("model.embed_dim", dim, "mesh.fsdp", mesh.fsdp, lambda n: n % heads == 0)
    _require_divisible("batch_size", cfg.batch_size, "accumulation", cfg.accumulation)
    rows = cfg.batch_size // cfg.accumulation
    _require_divisible("batch_size / accumulation", rows, "mesh.slice * mesh.data * mesh.fsdp", mesh.batch_shards)
    _require(
        cfg.optimizer.warmup_steps < cfg.steps,
        "optimizer.warmup_steps",
        cfg.optimizer.warmup_steps,
        f"must be below steps = {cfg.steps}",
    )


def validate_model(model: ModelConfig) -> None:
    """Checks that the sizes of a model fit each other, as `validate` does."""
    _require(model.num_heads > 0, "model.num_heads", model.num_heads, "must be above 0")
    _require(
        model.embed_dim % model.num_heads == 0,
        "model.num_heads",
        model.num_heads,
        f"must divide model.embed_dim = {model.embed_dim}; {_divisors(model.embed_dim, model.num_heads)} would do",
    )
    rotary_dims = int(model.rotary_fraction * model.head_dim)
    _require(
        rotary_dims % 2 == 0,
        "model.rotary_fraction",
        model.rotary_fraction,
        f"rotates {rotary_dims} of {model.head_dim} dims a head; it must be an even number",
    )
    if model.projection == "linear":
        _require(
            model.tau_tokens == 0, "model.tau_tokens", model.tau_tokens, "a linear projection has no τ; set it to 0"
        )
    if model.pad_tokens_to > 1 and not can_pad(model):
        key, value = ("projection", "linear") if model.projection == "linear" else ("normalizer", model.normalizer)
        raise UserError(
            f"model.pad_tokens_to = {model.pad_tokens_to}: there is no padding with "
            f"model.{key} = {value!r}; set it to 0"
        )
    for name in ("qkv_tokens", "out_tokens"):
        count = getattr(model, name)
        if model.projection == "linear":
            _require(count == 0, f"model.{name}", count, "a linear projection has no parameter tokens; set it to 0")
        else:
            _require(count > 0, f"model.{name}", count, "must be above 0")


def can_pad(model: ModelConfig) -> bool:
    """Whether parameter tokens with zero keys add nothing: of softmax they get a share."""
    return model.projection == "pattention" and model.normalizer != "softmax"


def _require_divisible(
    key: str,
    value: int,
    divisor_key: str,
    divisor: int,
    fits: Callable[[int], bool] = lambda n: True,
    way_out: str = "",
) -> None:
    """Raises a UserError with the nearest values above and below that would do; of those only such that `fits`."""
    if value % divisor == 0:
        return
    down = value // divisor * divisor
    below = next((n for n in range(down, 0, -divisor) if fits(n)), 0)
    above = next((n for n in range(down + divisor, divisor * (value + 2), divisor) if fits(n)), 0)
    near = " or ".join(str(n) for n in (below, above) if n)
    would = f"{near} would do{way_out}" if near else f"a {divisor_key} that divides it would do"
    raise UserError(f"{key} = {value!r}: must divide by {divisor_key} = {divisor}; {would}")
