"""Laws that must hold on a device as they do on a CPU; each is a function that gives an error and its bound.

What a law gives: {"error", "bound", and whatever else tells of it}; it holds where the error is at most the bound.
"""

import functools
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.accelerator_work import Figures, checkpoint_parts, config
from benchmarks.step_time import random_batch
from tests.helpers import DATA, golden_model, tiny_config
from tokenformer_jax.devices.sharding import make_mesh, platform
from tokenformer_jax.growth.grow import grow_state
from tokenformer_jax.growth.verify import LOGIT_BOUND, measure
from tokenformer_jax.nn import row_kernels
from tokenformer_jax.nn.attention import blockwise_attention, causal_attention
from tokenformer_jax.nn.backends import attention_kernel
from tokenformer_jax.nn.language import abstract_model, init_params
from tokenformer_jax.nn.layers import GELUS
from tokenformer_jax.nn.pattention import NORMALIZERS, pattention
from tokenformer_jax.nn.transformer import initial_tau
from tokenformer_jax.storage.checkpoints import Checkpoints
from tokenformer_jax.training.step import make_step, put_batch

Law = Callable[[], Figures]
highest = functools.partial(jax.default_matmul_precision, "highest")


def differences(ours: Any, theirs: Any, atol: float) -> Figures:
    """The largest difference of any array: absolute, relative to its largest entry, and as a part of what is allowed.

    That is atol, the tests' tolerance, or where entries are large 1e-6 of the largest.
    """
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    sizes = [(float(np.max(np.abs(np.asarray(a) - b))), max(float(np.max(np.abs(b))), 1e-30)) for a, b in pairs]
    return {
        "of_tolerance": max(difference / max(atol, 1e-6 * largest) for difference, largest in sizes),
        "absolute": max(difference for difference, _ in sizes),
        "relative_to_largest": max(difference / largest for difference, largest in sizes),
    }


def worst(**parts: Figures) -> Figures:
    return {"error": max(part["of_tolerance"] for part in parts.values()), "bound": 1.0, **parts}


def golden_pattention(normalizer: str) -> Figures:
    """The authors' outputs and gradients, in float32 at the highest precision of products."""
    raw = np.load(DATA / f"pattention_{normalizer}.npz", allow_pickle=False)
    names = ("inputs", "key_param_tokens", "value_param_tokens")
    tau = np.sqrt(raw["key_param_tokens"].shape[0])

    def both(x: jax.Array, k: jax.Array, v: jax.Array, dy: jax.Array) -> Any:
        output, gradients = jax.vjp(lambda x, k, v: pattention(x, k, v, tau, normalizer), x, k, v)
        return output, gradients(dy)

    with highest():
        output, found = jax.jit(both)(*(jnp.asarray(raw[name]) for name in (*names, "cotangent")))
    return worst(
        output=differences(output, raw["output"], 1e-5),
        gradients=differences(found, tuple(raw[f"grad_{name}"] for name in names), 1e-5),
    )


def golden_language_model(name: str) -> Figures:
    """The same of a whole model: logits, loss and every gradient."""
    cfg, params, expected, raw = golden_model(name)
    graphdef, _, _ = abstract_model(cfg.model)

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        logits, _ = nnx.merge(graphdef, params)(jnp.asarray(raw["tokens"]), initial_tau(cfg.model))
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(raw["labels"])).mean(), logits

    with highest():
        (value, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(jax.tree.map(jnp.asarray, params))
    return worst(
        logits=differences(logits, raw["logits"], 2e-5),
        loss=differences(value, raw["loss"], 1e-5),
        gradients=differences(gradients, expected, 5e-6),
    )


def growth() -> Figures:
    """A model's logits before and after growth, float32; its new keys must have a gradient."""
    small = tiny_config()
    large = tiny_config(model__qkv_tokens=48, model__out_tokens=56, model__ffn_tokens=200, steps=16)
    step = make_step(small, make_mesh(small.mesh))
    state = step.init(jax.random.key(0))
    state = state._replace(params=jax.tree.map(lambda x: 5 * x, state.params))  # larger weights: the law bites
    larger = make_step(large, step.mesh)
    pad = jax.jit(lambda s: grow_state(s, larger.abstract_state, large.model, jax.random.key(5), "zero_keys", 4))
    figures = measure(state, pad(state), small, large, larger, [random_batch(small)])
    learns = min(norms["keys"] for norms in figures["gradient_norms"].values())
    difference = figures["max_logit_difference"] / max(figures["max_logit"], 1.0)
    return {
        "error": difference if learns > 0 else float("inf"),
        "bound": LOGIT_BOUND,
        "max_logit": figures["max_logit"],
        "loss_before": figures["loss_before"],
        "loss_after": figures["loss_after"],
        "least_gradient_norm_of_new_keys": learns,
    }


def resume(bound: float | None) -> Figures:
    """Three steps, a save, a restore and three more, against six at once, in bfloat16: which bits differ.

    Some of a GPU's sums are in whatever order they come, unless XLA is told not to: two runs differ without any save.
    With no `bound`, that difference (a few times) is the bound.
    """
    cfg = config("tiny", overrides={"model.dtype": "bfloat16"})
    step = make_step(cfg, make_mesh(cfg.mesh))
    batches = [put_batch(step, random_batch(cfg)) for _ in range(6)]

    def run(state: Any, some: list[Any]) -> Any:
        for batch in some:
            state, _ = step.train(state, batch)
        return state

    def start() -> Any:
        return step.init(jax.random.key(0))

    whole, again = (jax.device_get(run(start(), batches)) for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(pathlib.Path(folder) / "checkpoints", keep=1)
        half = run(start(), batches[:3])
        saved = jax.device_get(half)
        checkpoints.save(3, half, *checkpoint_parts(cfg))
        checkpoints.wait()
        restored = checkpoints.restore(3, step.abstract_state)
        same = unequal(saved, jax.device_get(restored))
        continued = jax.device_get(run(restored, batches[3:]))
        checkpoints.close()
    found = {name: {"numbers": unequal(whole, other), "largest": largest(whole, other)} for name, other in
             (("continued", continued), ("run_again", again))}  # fmt: skip
    difference = found["continued"]["largest"]
    return {
        "error": float("inf") if same else difference,
        "bound": 10 * found["run_again"]["largest"] if bound is None else bound,
        "restored_numbers_that_differ": same,
        "differ": found,
    }


def unequal(a: Any, b: Any) -> int:
    return sum(int(np.sum(x != y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def largest(a: Any, b: Any) -> float:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.max(np.abs(np.float64(x) - np.float64(y)))) for x, y in pairs)


def bfloat16_against_float32(size: str, batch: int) -> Figures:
    """The loss of two layers at birth, in nats a token, and its gradient's direction, in both."""
    found = {}
    for dtype in ("bfloat16", "float32"):
        cfg = config(size, batch=batch, overrides={"model.dtype": dtype, "model.num_layers": 2})
        graphdef, _, _ = abstract_model(cfg.model)
        params = jax.jit(functools.partial(init_params, cfg.model))(jax.random.key(0))
        data = jax.tree.map(jnp.asarray, random_batch(cfg))

        def loss(params: Any, graphdef: Any = graphdef, cfg: Any = cfg, data: Any = data) -> jax.Array:
            nll, weights = nnx.merge(graphdef, params).loss_sums(data, initial_tau(cfg.model), cfg)
            return nll / weights

        with highest():
            found[dtype] = jax.jit(jax.value_and_grad(loss))(params)
    (low, low_gradients), (high, high_gradients) = found["bfloat16"], found["float32"]
    vdot = lambda a, b: float(jax.jit(optax.tree.vdot)(a, b))  # noqa: E731
    norms = [vdot(g, g) ** 0.5 for g in (low_gradients, high_gradients)]
    cosine = vdot(low_gradients, high_gradients) / (norms[0] * norms[1])
    return {
        "error": max(abs(float(low - high)) / 0.02, (1 - cosine) / 0.01),
        "bound": 1.0,
        "loss_bfloat16": float(low),
        "loss_float32": float(high),
        "cosine_of_gradients": cosine,
        "gradient_norms": norms,
    }


def attention(length: int) -> Figures:
    """The kernel that this device uses for bfloat16, forward and gradients, against the plain one in float32."""
    shape = (2, length, 4, 64)
    rng = np.random.default_rng(0)
    q, k, v, dy = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for _ in range(4))

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def both(attend: Any, dtype: str, *arrays: jax.Array) -> Any:
        q, k, v, dy = (x.astype(dtype) for x in arrays)
        output, gradients = jax.vjp(attend, q, k, v)
        return jax.tree.map(lambda x: x.astype(jnp.float32), (output, *gradients(dy.reshape(output.shape))))

    ours = both(causal_attention, "bfloat16", q, k, v, dy)
    with highest():
        theirs = both(blockwise_attention, "float32", q, k, v, dy)
    found = differences(ours, jax.device_get(theirs), 1.0)
    which = attention_kernel(platform(), shape, q.dtype)
    return {"error": found["relative_to_largest"], "bound": 2e-2, "kernel": which, "absolute": found["absolute"]}


def row_weights(num_tokens: int, dtype: str) -> Figures:
    """Equation 5 and its gradient between the contractions, by the GPU's kernels, against the plain ones in float32."""
    rng = np.random.default_rng(0)
    scores, dweights = (jnp.asarray(rng.normal(size=(64, num_tokens)), dtype) for _ in range(2))
    tau, interpret = jnp.float32(num_tokens**0.5), platform() == "cpu"

    def plain(scores: jax.Array) -> jax.Array:
        return NORMALIZERS["l2_norm_gelu"](scores, tau, GELUS["erf"])

    weights, squares = jax.jit(lambda s: row_kernels.weights(s, tau, "erf", interpret))(scores)
    again, dscores = jax.jit(lambda s, d, r: row_kernels.weights_gradient(s, d, r, tau, "erf", interpret))(
        scores, dweights, squares
    )
    expected, backward = jax.vjp(plain, scores.astype(jnp.float32))
    (dexpected,) = backward(dweights.astype(jnp.float32))
    pairs = (weights, expected), (again, expected), (dscores, dexpected)
    return {"error": max(relative(*pair) for pair in pairs), "bound": 1e-5 if dtype == "float32" else 1e-2}


def row_loss(num_logits: int) -> Figures:
    rng = np.random.default_rng(0)
    logits = jnp.asarray(3 * rng.normal(size=(64, num_logits)), jnp.float32)
    targets, weights = jnp.asarray(rng.integers(0, num_logits, 64), jnp.int32), jnp.asarray(rng.uniform(size=64), "f4")

    def plain(logits: jax.Array) -> jax.Array:
        return jnp.sum(weights * optax.softmax_cross_entropy_with_integer_labels(logits, targets))

    interpret = platform() == "cpu"
    losses, dlogits = jax.jit(lambda x, t, w: row_kernels.softmax_loss(x, t, w, "float32", interpret))(
        logits, targets, weights
    )
    expected, dexpected = jax.value_and_grad(plain)(logits)
    error = max(relative(jnp.sum(losses * weights), expected), relative(dlogits, dexpected))
    return {"error": error, "bound": 1e-5}


def relative(ours: jax.Array, theirs: jax.Array) -> float:
    return float(jnp.linalg.norm(ours.astype(jnp.float32) - theirs) / jnp.linalg.norm(theirs))


# Kernels against their plain versions. One that cannot run here raises, which is recorded.
KERNELS: list[tuple[str, Law]] = [
    *(
        (f"row_weights_{num_tokens}_{dtype}", functools.partial(row_weights, num_tokens, dtype))
        for num_tokens in (576, 2140, 8620, 34816)
        for dtype in ("float32", "bfloat16")
    ),
    ("row_loss_50304", functools.partial(row_loss, 50304)),
]


def registered(tiny: bool) -> list[tuple[str, Law]]:
    """All laws, in order; `resume_exactly` is run where XLA was told to be deterministic."""
    plain: list[tuple[str, Law]] = [
        *((f"golden_pattention_{name}", functools.partial(golden_pattention, name)) for name in sorted(NORMALIZERS)),
        *(
            (f"golden_{name}", functools.partial(golden_language_model, f"{name}.npz"))
            for name in ("lm_2layer", "lm_rot8")
        ),
        ("growth", growth),
        ("attention", functools.partial(attention, 128 if tiny else 1024)),
        ("resume", functools.partial(resume, None)),
        ("bfloat16_against_float32", functools.partial(bfloat16_against_float32, "tiny" if tiny else "124m", 2)),
    ]
    return [*plain, *KERNELS, ("resume_exactly", functools.partial(resume, 0.0))]


def check(names: list[str] | None, known: list[str], tiny: bool, say: Callable[..., None]) -> Figures:
    """Tries the named laws, by default all but `resume_exactly`, and none that is known.

    One that raises does not keep the next ones from being tried.
    """
    found: Figures = {}
    for name, law in registered(tiny):
        if name in known or (name not in names if names else name == "resume_exactly"):
            continue
        began = time.perf_counter()
        try:
            figures = law()
            figures["seconds"] = time.perf_counter() - began
            found[name] = {"holds": bool(figures["error"] <= figures["bound"]), **figures}
        except Exception as error:
            found[name] = {"holds": False, "raised": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        found[name] = finite(found[name])
        say(**found)
    return found


def finite(tree: Any) -> Any:
    """JSON has no infinity: it becomes a text."""
    if isinstance(tree, dict):
        return {key: finite(value) for key, value in tree.items()}
    return str(tree) if isinstance(tree, float) and not np.isfinite(tree) else tree
