"""One training step: the loss, its gradient and the update, compiled and sharded for a mesh."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from tokenformer_jax.config import Config, ModelConfig
from tokenformer_jax.data.batches import Batch
from tokenformer_jax.devices.hardware import give_back_memory
from tokenformer_jax.devices.sharding import batch_sharding, constrain, replicated, shardings, with_shardings
from tokenformer_jax.nn.layers import Key, Params, count_params, subkey
from tokenformer_jax.nn.transformer import Tau, initial_tau
from tokenformer_jax.training import nested
from tokenformer_jax.training.learned import alone, check_mesh, learn_alone, learned, part_of, put_back
from tokenformer_jax.training.non_finite import if_finite
from tokenformer_jax.training.schedule import NewTokens, learning_rate, make_optimizer, scale_updates
from tokenformer_jax.training.state import TrainState, new_state
from tokenformer_jax.training.tasks import flops_per_token, task_of

Metrics = dict[str, jax.Array]
Loss = Callable[[Params, Tau, Batch, Key], tuple[jax.Array, jax.Array]]  # sums of losses and of weights
MASKS = 2**31  # folded into the seed for dropout; no step, which the keys of growth fold in, is that large


@dataclasses.dataclass(frozen=True)
class OnMesh:
    """A jitted function that is always called, and lowered, under a mesh."""

    function: Any
    mesh: Mesh

    def __call__(self, *args: Any) -> Any:
        with jax.set_mesh(self.mesh):
            return self.function(*args)

    def lower(self, *args: Any) -> jax.stages.Lowered:
        with jax.set_mesh(self.mesh):
            return self.function.lower(*args)


@dataclasses.dataclass(frozen=True)
class Step:
    """What `make_step` compiles for a config on a mesh. All functions take and give sharded arrays."""

    abstract_state: TrainState  # ShapeDtypeStructs with shardings
    init: Callable[[jax.Array], TrainState]  # PRNG key -> state
    train: OnMesh  # (state, Batch) -> state, metrics; donates the state, and does not learn from what is not finite
    evaluate: Callable[[TrainState, Batch], Metrics]  # the network's `sums`; needs no opt_state
    batch: NamedSharding  # of every array of a Batch
    mesh: Mesh
    new_tokens: NewTokens | None
    learned: Params  # ShapeDtypeStructs of what gets a gradient: the parameters, or new tokens alone
    flops_per_token: float  # of forward and backward

    def compile(self, state: TrainState, batch: Batch) -> None:
        """Compiles `train` before it is called, and gives the memory back that this took."""
        self.train.lower(state, batch).compile()
        give_back_memory()


def make_step(
    cfg: Config, mesh: Mesh, schedule_start: int = 0, schedule_end: int = 0, new_tokens: NewTokens | None = None
) -> Step:
    """Compiles (on first use) the functions that train this config on this mesh.

    Args:
      cfg: the config; only its sizes and rates matter.
      mesh: from `sharding.make_mesh`.
      schedule_start: the step from which the learning-rate schedule counts.
      schedule_end: the step at which it ends; `cfg.steps` where it is 0.
      new_tokens: those of a growth, which learn in a way of their own.
    """
    check_mesh(new_tokens, cfg.model.tokens, cfg.mesh.tensor)
    nested.check_mesh(cfg.model, cfg.mesh.tensor)
    smaller = [] if alone(new_tokens) else nested.sizes(cfg.model)[:-1]  # have none of the new tokens
    task = task_of(cfg)
    graphdef, _, param_axes = task.abstract_model(cfg.model)
    schedule = learning_rate(cfg.optimizer, schedule_end or cfg.steps, schedule_start)
    optimizer = make_optimizer(cfg.optimizer, schedule)

    def init(key: jax.Array) -> TrainState:
        params = task.init_params(cfg.model, key)
        opt_state = optimizer.init(learned(params, new_tokens))
        return new_state(params, opt_state, initial_tau(cfg.model), cfg.optimizer.average > 0)

    def train(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        def loss(learns: Params, tau: Tau, batch: Batch, key: Key) -> tuple[jax.Array, jax.Array]:
            model = nnx.merge(graphdef, state.params if alone(new_tokens) else learns)
            learn_alone(model, learns, new_tokens, list(cfg.model.tokens))
            return model.loss_sums(batch, tau, cfg, key)

        def loss_at(size: ModelConfig, learns: Params, tau: Tau, batch: Batch, key: Key) -> Any:
            return nnx.merge(graphdef, nested.cut(learns, size)).loss_sums(batch, initial_tau(size), cfg, key)

        losses: list[Loss] = [*(functools.partial(loss_at, size) for size in smaller), loss]
        key, batch = masks_key(cfg, state.step), task.augmented(batch, cfg, state.step)
        learns = learned(state.params, new_tokens)
        mean, grads = mean_gradients(losses, state.step, learns, state.tau_now(), batch, key, cfg.accumulation)
        update = functools.partial(clipped_update, optimizer, cfg.optimizer.clip_norm, new_tokens)
        learns, opt_state, metrics = update_state(state, learns, mean, grads, schedule, update)
        params = put_back(state.params, learns, new_tokens)
        average = moved_average(state.average, params, cfg.optimizer.average, metrics)
        return TrainState(state.step + 1, params, opt_state, state.tau, average), metrics

    def evaluate(state: TrainState, batch: Batch) -> Metrics:
        return nnx.merge(graphdef, state.evaluated).sums(batch, state.tau_now(), cfg)

    abstract = jax.eval_shape(init, jax.random.key(0))
    of_state, batch, whole = (
        state_shardings(abstract, mesh, param_axes, optimizer, new_tokens),
        batch_sharding(mesh),
        replicated(mesh),
    )
    jitted_train = jax.jit(train, in_shardings=(of_state, batch), out_shardings=(of_state, whole), donate_argnums=0)
    return Step(
        abstract_state=with_shardings(abstract, of_state),
        init=OnMesh(jax.jit(init, out_shardings=of_state), mesh),
        train=OnMesh(jitted_train, mesh),
        evaluate=OnMesh(jax.jit(evaluate, out_shardings=whole), mesh),
        batch=batch,
        mesh=mesh,
        new_tokens=new_tokens,
        learned=jax.eval_shape(lambda params: learned(params, new_tokens), abstract.params),
        flops_per_token=step_flops_per_token(cfg, new_tokens),
    )


def step_flops_per_token(cfg: Config, new_tokens: NewTokens | None) -> float:
    """Model FLOPs of forward and backward, without those of gradients that nothing learns from."""
    if not alone(new_tokens):
        return flops_per_token(cfg)
    params = task_of(cfg).abstract_model(cfg.model)[1]
    frozen = count_params(params) - count_params(jax.eval_shape(lambda params: learned(params, new_tokens), params))
    return task_of(cfg).train_flops_per_token(cfg.model) - 2.0 * frozen


def state_shardings(
    abstract: TrainState,
    mesh: Mesh,
    param_axes: Any,
    optimizer: optax.GradientTransformation,
    new_tokens: NewTokens | None,
) -> TrainState:
    """Where a state's arrays live: moments as their parameters, all else on every device."""
    of_params, whole = shardings(abstract.params, mesh, param_axes), replicated(mesh)
    of_moments = optax.tree.map_params(
        optimizer,
        lambda _, s: s,
        abstract.opt_state,
        part_of(of_params, new_tokens),
        transform_non_params=lambda _: whole,
    )
    of_average = of_params if abstract.average else ()
    return jax.tree.map(lambda _: whole, abstract)._replace(params=of_params, opt_state=of_moments, average=of_average)


def masks_key(cfg: Config, step: jax.Array | int) -> Key:
    """The key of a step's dropout, a function of the seed and the step alone; None where nothing is dropped."""
    if cfg.model.dropout == cfg.model.stochastic_depth == 0:
        return None
    return subkey(subkey(jax.random.key(cfg.seed), MASKS), step)


def mean_gradients(
    losses: Sequence[Loss], turn: jax.Array | int, params: Params, tau: Tau, batch: Batch, key: Key, parts: int
) -> tuple[jax.Array, Params]:
    """The mean loss over the batch's real tokens and its gradient, worked through in so many parts.

    Of several losses one, by turn.
    """
    total = jnp.maximum(jnp.sum(batch.weights_BL), 1.0)
    each = [jax.value_and_grad(lambda p, part, key, f=loss: f(p, tau, part, key)[0] / total) for loss in losses]

    def of_part(*args: Any) -> tuple[jax.Array, Params]:
        return jax.lax.switch(turn % len(each), each, *args) if len(each) > 1 else each[0](*args)

    if parts == 1:
        return of_part(params, batch, subkey(key, 0))

    def add(sums: Any, inputs: tuple[Batch, Any]) -> tuple[Any, None]:
        part, number = inputs
        return jax.tree.map(jnp.add, sums, of_part(params, part, subkey(key, number))), None

    zeros = (jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
    numbers = None if key is None else jnp.arange(parts)
    return jax.lax.scan(add, zeros, (jax.tree.map(lambda x: split_rows(x, parts), batch), numbers))[0]


def split_rows(x_BL: jax.Array, parts: int) -> jax.Array:
    """[B, L] -> [parts, B / parts, L]; strided, so that each device splits its own rows."""
    x = x_BL.reshape(x_BL.shape[0] // parts, parts, *x_BL.shape[1:]).swapaxes(0, 1)
    return constrain(x, None, "batch", None)


def update_state(
    state: TrainState,
    params: Params,
    mean: jax.Array,
    grads: Params,
    schedule: optax.Schedule,
    update: Callable[..., Any],
) -> tuple[Params, optax.OptState, Metrics]:
    """What learns after a step with this mean loss and gradient, where both are finite, its moments, and metrics."""
    squares = jnp.stack([jnp.sum(jnp.square(grad)) for grad in jax.tree.leaves(grads)])
    norm = jnp.sqrt(jnp.sum(squares))
    with jax.named_scope("optimizer"):
        finite = jnp.isfinite(mean) & jnp.isfinite(norm)
        learn = functools.partial(update, norm, state.step)
        params, opt_state = if_finite(finite, learn, params, state.opt_state, grads)
    metrics = {
        "loss": mean,
        "grad_norm": norm,
        "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        "grad_norms": jnp.sqrt(squares),
    }
    return params, opt_state, metrics


def moved_average(average: Any, params: Params, kept: float, metrics: Metrics) -> Any:
    """The exponential mean of the parameters after a step, which keeps this share of itself; empty if there is none."""
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
    move = jnp.where(finite, 1 - kept, 0.0)
    return jax.tree.map(lambda mean, now: mean + move * (now - mean), average, params if kept else ())


def clipped_update(
    optimizer: optax.GradientTransformation,
    clip_norm: float,
    new_tokens: NewTokens | None,
    norm: jax.Array,
    step: jax.Array,
    params: Params,
    opt_state: optax.OptState,
    grads: Params,
) -> tuple[Params, optax.OptState]:
    """The optimizer's step with the gradient, of this norm, clipped to `clip_norm`."""
    scale = clip_norm / jnp.maximum(norm, clip_norm)
    updates, opt_state = optimizer.update(jax.tree.map(lambda g: g * scale, grads), opt_state, params)
    if new_tokens is not None:
        updates = scale_updates(updates, step, new_tokens)
    return optax.apply_updates(params, updates), opt_state


def put_batch(step: Step, batch: Any) -> Any:
    """This process's rows of a global batch -> arrays sharded over the mesh."""
    with jax.transfer_guard_host_to_device("allow"):  # the one transfer of a step that is meant
        return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(step.batch, rows), batch)
