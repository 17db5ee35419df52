"""The configuration: frozen dataclasses made from an ml_collections file, checked before anything runs.

`configs/base.py` explains every key; here stand their types, and beside each what its value must be.
"""

import dataclasses
import difflib
import pathlib
import typing
from collections.abc import Mapping
from typing import Annotated, Any

from tokenformer_jax.errors import UserError
from tokenformer_jax.files import check_data_path, is_url, sealed
from tokenformer_jax.image_config import UNCHANGED, AugmentConfig, check_image, check_text
from tokenformer_jax.rules import (
    NOT_NEGATIVE,
    RISES_TO_1,
    BelowOne,
    Fraction,
    NotNegativeFloat,
    NotNegativeInt,
    PositiveFloat,
    PositiveInt,
    Rule,
    divisors,
    one_of,
    read_floats,
    read_groups,
    require,
    require_divisible,
)

RECIPE_NAMES = ("zero_keys", "isometric", "split", "random_keys", "released", "zero_padding")
PATHS = ("path", "tokenizer", "cache_dir")  # keys of the data that name files
SIZES = ("qkv_tokens", "out_tokens", "ffn_tokens")  # keys of the model that say counts of parameter tokens
BUDGETS = ("train_tokens", "train_flops", "train_epochs")  # keys that say a run's length in place of `steps`


# How to compute and to train, not what: they may change from run to run.
FREE_MODEL_KEYS = ("dropout", "stochastic_depth", "stochastic_depth_rises", "dtype", "remat")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    projection: Annotated[str, one_of("pattention", "linear")]
    normalizer: Annotated[str, one_of("l2_norm_gelu", "gelu_l2_norm", "softmax")]
    gelu: Annotated[str, one_of("erf", "tanh")]
    tau_tokens: NotNegativeInt
    vocab_size: NotNegativeInt
    context_length: NotNegativeInt
    num_layers: PositiveInt
    num_heads: PositiveInt
    embed_dim: PositiveInt
    qkv_tokens: NotNegativeInt
    out_tokens: NotNegativeInt
    ffn_tokens: PositiveInt
    rotary_fraction: Fraction
    dropout: BelowOne
    stochastic_depth: BelowOne
    dtype: Annotated[str, one_of("float32", "bfloat16")]
    remat: Annotated[str, one_of("none", "dots", "projections", "full")]
    pad_tokens_to: NotNegativeInt = 0
    nested: Annotated[tuple[float, ...], RISES_TO_1] = ()
    stochastic_depth_rises: bool = False
    image_size: NotNegativeInt = 0
    patch_size: NotNegativeInt = 0
    image_channels: NotNegativeInt = 0
    num_classes: NotNegativeInt = 0
    pooling: Annotated[str, one_of("class_token", "mean")] = "class_token"

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def num_patches(self) -> int:
        """Of an image; 0 for text."""
        return (self.image_size // self.patch_size) ** 2 if self.image_size else 0

    @property
    def is_causal(self) -> bool:
        """Whether a position sees those before it alone."""
        return not self.image_size

    @property
    def positions(self) -> int:
        """Of an example, at most: tokens of a text, or patches and class token of an image."""
        return self.num_patches + (self.pooling == "class_token") if self.image_size else self.context_length

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
    sources: tuple[dict[str, Any], ...] = ()  # `mixture.sources` reads them
    train_examples: NotNegativeInt = 0


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    peak_learning_rate: PositiveFloat
    final_learning_rate: NotNegativeFloat
    warmup_steps: NotNegativeInt
    beta1: BelowOne
    beta2: BelowOne
    epsilon: PositiveFloat
    weight_decay: NotNegativeFloat
    clip_norm: PositiveFloat
    schedule: Annotated[str, one_of("cosine", "wsd", "constant")] = "cosine"
    decay_fraction: Fraction = 0.2
    decay: Annotated[str, one_of("linear", "sqrt")] = "linear"
    average: BelowOne = 0.0


@dataclasses.dataclass(frozen=True)
class GrowConfig:
    recipe: Annotated[str, one_of(*RECIPE_NAMES)]
    tau_ramp: Fraction
    restart_schedule: bool
    freeze_steps: NotNegativeInt
    patience: NotNegativeInt
    min_improvement: NotNegativeFloat
    slope: NotNegativeFloat = 0.0
    new_tokens_rate: PositiveFloat = 1.0
    new_tokens_warmup: NotNegativeInt = 0
    train: Annotated[str, one_of("all", "new")] = "all"

    @property
    def may_begin_early(self) -> bool:
        return bool(self.patience or self.slope)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    slice: PositiveInt = dataclasses.field(default=1, kw_only=True)
    data: PositiveInt
    fsdp: PositiveInt
    tensor: PositiveInt

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
    seed: Annotated[int, NOT_NEGATIVE, Rule(lambda seed: seed < 2**63, "must be below 2**63")]
    steps: PositiveInt
    batch_size: PositiveInt
    accumulation: PositiveInt
    log_every: PositiveInt
    eval_every: NotNegativeInt
    eval_batches: NotNegativeInt
    checkpoint_every: NotNegativeInt
    checkpoints_kept: PositiveInt
    profile_at: NotNegativeInt
    rungs: tuple[dict[str, Any], ...]  # `ladder.stages` reads them
    task: Annotated[str, one_of("language", "image_classification")] = "language"
    augment: AugmentConfig = UNCHANGED
    non_finite: Annotated[str, one_of("raise", "skip", "rollback")] = "raise"
    non_finite_limit: PositiveInt = 10
    loss_spike: NotNegativeFloat = 0.0
    max_minutes: NotNegativeFloat = 0.0
    train_tokens: NotNegativeFloat = 0.0
    train_flops: NotNegativeFloat = 0.0
    train_epochs: NotNegativeFloat = 0.0
    track: Annotated[str, one_of("none", "wandb")] = "none"

    @property
    def budget(self) -> str:
        """The key that says where the run ends, if it is not `steps`."""
        return next((key for key in BUDGETS if getattr(self, key)), "")

    @property
    def length(self) -> str:
        """Where the run ends, in words."""
        steps = f"steps = {self.steps}"
        return f"{self.budget} = {getattr(self, self.budget):.15g} ({steps})" if self.budget else steps

    def to_json(self) -> str:
        """The text of a `config.json`, with a checksum. Its paths hold wherever it is read."""
        paths: Any = {key: _absolute(getattr(self.data, key)) for key in PATHS}
        own = ({"path": _absolute(source["path"])} if "path" in source else {} for source in self.data.sources)
        paths["sources"] = tuple(source | path for source, path in zip(self.data.sources, own, strict=True))
        return sealed(dataclasses.asdict(dataclasses.replace(self, data=dataclasses.replace(self.data, **paths))))


class IndivisibleBatch(UserError):
    """The batch of a config that has no other fault, or of a rung of it."""

    def __init__(self, text: str, cfg: Config, rung: int = 0) -> None:
        super().__init__(text)
        self.cfg, self.rung = cfg, rung


def _absolute(path: str) -> str:
    return path if not path or path.startswith("~") or is_url(path) else str(pathlib.Path(path).absolute())


def read_config(tree: Mapping[str, Any], source: str = "config") -> Config:
    """Builds and validates a `Config` from nested mappings (a ConfigDict, or parsed JSON).

    Raises:
      UserError: names the first key that is unknown, missing, of another type or out of range.
    """
    cfg = read_dataclass(Config, tree, source)
    validate(cfg)
    return cfg


def read_model(tree: Mapping[str, Any], source: str) -> ModelConfig:
    """The model's part of a config, as a checkpoint's record holds it."""
    return read_dataclass(ModelConfig, tree, source)


def read_dataclass(cls: Any, tree: Any, where: str) -> Any:
    """A frozen dataclass from mappings; a UserError names the first key that is unknown, missing or of another type."""
    if not isinstance(tree, Mapping):
        raise UserError(f"{where}: expected a group of keys, got {tree!r}")
    types = typing.get_type_hints(cls)
    # Keys that came later have a default, so that runs from before can still be read.
    later = {f.name: f.default for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}
    later = {key: dataclasses.asdict(v) if dataclasses.is_dataclass(v) else v for key, v in later.items()}  # type: ignore
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
            values[key] = read_dataclass(kind, value, name)
        elif typing.get_origin(kind) is tuple:
            values[key] = read_floats(value, name) if kind == tuple[float, ...] else read_groups(value, name)
        elif kind is float and type(value) is int:
            values[key] = float(value)
        elif type(value) is kind:
            values[key] = value
        else:
            raise UserError(f"{name} = {value!r}: must be of type {kind.__name__}, not {type(value).__name__}")
    return cls(**values)


def suggest(key: str, known: Any) -> str:
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def check_rules(group: Any, prefix: str = "") -> None:
    """Checks each value of a dataclass by the rules that stand beside its field."""
    for key, kind in typing.get_type_hints(type(group), include_extras=True).items():
        value = getattr(group, key)
        if dataclasses.is_dataclass(value):
            check_rules(value, f"{prefix}{key}.")
        for rule in getattr(kind, "__metadata__", ()):
            require(rule.holds(value), prefix + key, value, rule.need)


def validate(cfg: Config) -> None:
    """Checks every value; raises a UserError that names the key, its value and what to use."""

    check_rules(cfg)
    if cfg.loss_spike and cfg.non_finite == "skip":
        raise UserError(
            f"loss_spike = {cfg.loss_spike}: is seen once its step has learnt, too late for non_finite = 'skip'; "
            "use 'rollback'"
        )
    for key in PATHS:
        check_data_path(getattr(cfg.data, key), f"data.{key}")
    is_image = cfg.task == "image_classification"
    require(
        is_image == bool(cfg.model.image_size),
        "model.image_size",
        cfg.model.image_size,
        f"task = {cfg.task!r} {'needs the pixels of an image side' if is_image else 'has no images; set it to 0'}",
    )
    validate_model(cfg.model)
    mesh = cfg.mesh
    model, padded = cfg.model, cfg.model.padding_counted()
    for size in SIZES:
        if model.pad_tokens_to > 1 and getattr(padded, size) % mesh.tensor:
            require_divisible("model.pad_tokens_to", model.pad_tokens_to, "mesh.tensor", mesh.tensor)
        way_out = f", or model.pad_tokens_to = {mesh.tensor}" if can_pad(model) else ""
        require_divisible(f"model.{size}", getattr(padded, size), "mesh.tensor", mesh.tensor, way_out=way_out)
    require_divisible("model.vocab_size", model.vocab_size, "mesh.tensor", mesh.tensor)
    dim, heads = model.embed_dim, model.num_heads
    require_divisible("model.num_heads", heads, "mesh.tensor", mesh.tensor, lambda n: n <= dim and dim % n == 0)
    require_divisible("model.embed_dim", dim, "mesh.fsdp", mesh.fsdp, lambda n: n % heads == 0)
    budgets = [f"{key} = {getattr(cfg, key):g}" for key in BUDGETS if getattr(cfg, key)]
    if len(budgets) > 1:
        raise UserError(f"{' and '.join(budgets)}: each says where the run ends; use one, and 0 for the other")
    if cfg.train_epochs and not cfg.data.train_examples:
        raise UserError(
            f"train_epochs = {cfg.train_epochs:g}: counts in data.train_examples; use the number of training examples"
        )
    require(
        cfg.optimizer.warmup_steps < cfg.steps or bool(cfg.budget),  # whose steps `ladder.with_budget` checks
        "optimizer.warmup_steps",
        cfg.optimizer.warmup_steps,
        f"must be below steps = {cfg.steps}",
    )
    _check_batch(cfg)  # last: `plan` looks for a mesh for what has no other fault


def _check_batch(cfg: Config) -> None:
    mesh, parts = cfg.mesh, cfg.accumulation
    rows = parts * mesh.batch_shards
    if cfg.batch_size % rows == 0:
        return
    down = cfg.batch_size // rows * rows
    use = f"config.batch_size = {f'{down} or ' if down else ''}{down + rows}"
    if cfg.batch_size % mesh.batch_shards == 0:
        of_a_shard = cfg.batch_size // mesh.batch_shards
        use += f", or config.accumulation = {divisors(of_a_shard, parts)}"
    raise IndivisibleBatch(
        f"config.batch_size = {cfg.batch_size}: must divide by config.accumulation * config.mesh.slice * "
        f"config.mesh.data * config.mesh.fsdp = {parts} * {mesh.slice} * {mesh.data} * {mesh.fsdp} = {rows}; "
        f"use {use}",
        cfg,
    )


def validate_model(model: ModelConfig) -> None:
    """Checks that the sizes of a model fit each other, as `validate` does."""
    require(model.num_heads > 0, "model.num_heads", model.num_heads, "must be above 0")
    check_image(model) if model.image_size else check_text(model)
    require(
        model.embed_dim % model.num_heads == 0,
        "model.num_heads",
        model.num_heads,
        f"must divide model.embed_dim = {model.embed_dim}; use {divisors(model.embed_dim, model.num_heads)}",
    )
    rotary_dims = int(model.rotary_fraction * model.head_dim)
    require(
        rotary_dims % 2 == 0,
        "model.rotary_fraction",
        model.rotary_fraction,
        f"rotates {rotary_dims} of {model.head_dim} dims a head; it must be an even number",
    )
    if model.projection == "linear":
        require(not model.nested, "model.nested", model.nested, "a linear projection has no tokens; set it to ()")
        require(
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
            require(count == 0, f"model.{name}", count, "a linear projection has no parameter tokens; set it to 0")
        else:
            require(count > 0, f"model.{name}", count, "must be above 0")


def can_pad(model: ModelConfig) -> bool:
    """Whether parameter tokens with zero keys add nothing: of softmax they get a share."""
    return model.projection == "pattention" and model.normalizer != "softmax"
