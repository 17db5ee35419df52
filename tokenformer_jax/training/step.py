"""One training step: the state, the loss, the optimizer and their compiled, sharded functions."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from tokenformer_jax.config import Config, ModelConfig, OptimizerConfig
from tokenformer_jax.data import Batch
from tokenformer_jax.loss import cross_entropy
from tokenformer_jax.metrics import give_back_memory
from tokenformer_jax.sharding import batch_sharding, constrain, platform, replicated, shardings, with_shardings
from tokenformer_jax.transformer import Key, Params, Tau, abstract_model, init_params, initial_tau, subkey

Metrics = dict[str, jax.Array]
MASKS = 2**31  # folded into the seed for dropout; no step, which the keys of growth fold in, is that large


class TauRamp(NamedTuple):
    """A layer's τ over time: `start` up to step `begin`, then linearly to `target` at step `end`."""

    start: jax.Array  # float32
    target: jax.Array  # float32
    begin: jax.Array  # int32
    end: jax.Array  # int32

    @classmethod
    def constant(cls, tau: float) -> "TauRamp":
        return cls(jnp.float32(tau), jnp.float32(tau), jnp.int32(0), jnp.int32(0))

    def at(self, step: jax.Array) -> jax.Array:
        done = (step - self.begin).astype(jnp.float32) / jnp.maximum(self.end - self.begin, 1)
        ramped = self.start + (self.target - self.start) * jnp.clip(done, 0.0, 1.0)
        return jnp.where(step >= self.end, self.target, jnp.where(step <= self.begin, self.start, ramped))


class TrainState(NamedTuple):
    """Everything that training changes; what a checkpoint holds."""

    step: jax.Array  # int32, optimizer steps taken since the model's birth
    params: Params
    opt_state: optax.OptState
    tau: dict[str, TauRamp]  # per projection; the same in every layer

    def without_moments(self) -> dict[str, Any]:
        """The parts that a model needs: all but opt_state."""
        return {name: part for name, part in self._asdict().items() if name != "opt_state"}

    def tau_now(self) -> Tau:
        return {name: ramp.at(self.step) for name, ramp in self.tau.items()}


class Frozen(NamedTuple):
    """The former tokens of projections that grew, which do not learn for a while."""

    tokens: dict[str, int]  # projection -> how many of its first tokens
    until: int  # the last step without learning


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
    evaluate: Callable[[TrainState, Batch], Metrics]  # sums of nll (nats) and weights; needs no opt_state
    batch: NamedSharding  # of every array of a Batch
    mesh: Mesh

    def compile(self, state: TrainState, batch: Batch) -> None:
        """Compiles `train` before it is called, and gives the memory back that this took."""
        self.train.lower(state, batch).compile()
        give_back_memory()


def learning_rate(cfg: OptimizerConfig, steps: int, start: int = 0) -> optax.Schedule:
    """Linear warm-up from 0, then a cosine that reaches the final rate at `steps`; counted from step `start`."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, cfg.peak_learning_rate, cfg.warmup_steps, max(steps - start, cfg.warmup_steps + 1), cfg.final_learning_rate
    )
    return lambda step: schedule(step - start)


def decayed(params: Params) -> Any:
    """True where weight decay applies: all but the final norm."""
    return {name: jax.tree.map(lambda _, n=name: not n.startswith("norm"), tree) for name, tree in params.items()}


def make_optimizer(cfg: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(schedule, cfg.beta1, cfg.beta2, cfg.epsilon, weight_decay=cfg.weight_decay, mask=decayed)


def init_state(cfg: ModelConfig, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    params = init_params(cfg, key)
    tau = {name: TauRamp.constant(value) for name, value in initial_tau(cfg).items()}
    return TrainState(jnp.int32(0), params, optimizer.init(params), tau)


def loss_sums(model: Any, tau: Tau, batch: Batch, mask_documents: bool, key: Key = None) -> tuple[jax.Array, jax.Array]:
    """The weighted sum of next-token losses in nats over the padded vocabulary, and the sum of weights.

    With a key the model drops out; without, it is deterministic.
    """
    segments_BL = batch.segments_BL if mask_documents else None
    x_BLD, _ = model.features(batch.tokens_BL, tau, segments_BL=segments_BL, key=key)
    with jax.named_scope("loss"):
        nll = cross_entropy(model.final_norm(x_BLD, key), model.embed[...], batch.targets_BL, batch.weights_BL)
    return nll, jnp.sum(batch.weights_BL)


def sum_losses(logits_BLV: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The weighted sum of the losses that logits have, in nats, and the sum of weights."""
    loss_BL = optax.softmax_cross_entropy_with_integer_labels(logits_BLV, batch.targets_BL)
    return jnp.sum(loss_BL * batch.weights_BL), jnp.sum(batch.weights_BL)


def masks_key(cfg: Config, step: jax.Array | int) -> Key:
    """The key of a step's dropout, a function of the seed and the step alone; None where nothing is dropped."""
    if cfg.model.dropout == cfg.model.stochastic_depth == 0:
        return None
    return subkey(subkey(jax.random.key(cfg.seed), MASKS), step)


def freeze(updates: Params, step: jax.Array, frozen: Frozen) -> Params:
    """The updates with those of frozen tokens set to zero."""

    def masked(name: str, update_LND: jax.Array) -> jax.Array:
        is_new_N1 = jnp.arange(update_LND.shape[1])[:, None] >= frozen.tokens[name]
        return jnp.where(is_new_N1 | (step >= frozen.until), update_LND, 0.0)

    blocks = updates["blocks"]
    grown = {name: jax.tree.map(lambda u, n=name: masked(n, u), blocks[name]) for name in frozen.tokens}
    return updates | {"blocks": blocks | grown}


def if_finite(finite: jax.Array, learn: Callable, params: Params, opt_state: optax.OptState, grads: Params) -> Any:
    """learn(params, opt_state, grads) if the step was finite, else params and opt_state as they were.

    Integers, which count steps, go on. A CPU branches: to select between all old and new arrays takes it as long again
    as to learn.
    """

    def skip(params: Params, opt_state: optax.OptState, grads: Params) -> tuple[Params, optax.OptState]:
        return params, jax.tree.map(lambda x: x + jnp.issubdtype(x.dtype, jnp.integer), opt_state)

    if platform() == "cpu":
        return jax.lax.cond(finite, learn, skip, params, opt_state, grads)
    new, old = (function(params, opt_state, grads) for function in (learn, skip))
    return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)


def make_step(cfg: Config, mesh: Mesh, schedule_start: int = 0, frozen: Frozen | None = None) -> Step:
    """Compiles (on first use) the functions that train this config on this mesh.

    Args:
      cfg: the config; only its sizes and rates matter.
      mesh: from `sharding.make_mesh`.
      schedule_start: the step from which the learning-rate schedule counts.
      frozen: tokens that do not learn up to some step.
    """
    graphdef, _, param_axes = abstract_model(cfg.model)
    schedule = learning_rate(cfg.optimizer, cfg.steps, schedule_start)
    optimizer = make_optimizer(cfg.optimizer, schedule)

    def init(key: jax.Array) -> TrainState:
        return init_state(cfg.model, optimizer, key)

    def loss(params: Params, tau: Tau, batch: Batch, key: Key = None) -> tuple[jax.Array, jax.Array]:
        return loss_sums(nnx.merge(graphdef, params), tau, batch, cfg.data.mask_documents, key)

    def gradients(params: Params, tau: Tau, batch: Batch, key: Key) -> tuple[jax.Array, Params]:
        """Mean loss over the batch's real tokens and its gradient, worked through in `accumulation` parts."""
        total = jnp.maximum(jnp.sum(batch.weights_BL), 1.0)
        mean_part = jax.value_and_grad(lambda params, part, key: loss(params, tau, part, key)[0] / total)
        if cfg.accumulation == 1:
            return mean_part(params, batch, subkey(key, 0))
        parts = jax.tree.map(lambda x: split_rows(x, cfg.accumulation), batch)

        def add(sums: Any, inputs: tuple[Batch, Any]) -> tuple[Any, None]:
            part, number = inputs
            return jax.tree.map(jnp.add, sums, mean_part(params, part, subkey(key, number))), None

        zeros = (jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
        numbers = None if key is None else jnp.arange(cfg.accumulation)
        return jax.lax.scan(add, zeros, (parts, numbers))[0]

    def train(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        mean, grads = gradients(state.params, state.tau_now(), batch, masks_key(cfg, state.step))
        squares = jnp.stack([jnp.sum(jnp.square(grad)) for grad in jax.tree.leaves(grads)])
        norm = jnp.sqrt(jnp.sum(squares))
        metrics = {
            "loss": mean,
            "grad_norm": norm,
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "grad_norms": jnp.sqrt(squares),
        }

        def learn(params: Params, opt_state: optax.OptState, grads: Params) -> tuple[Params, optax.OptState]:
            scale = cfg.optimizer.clip_norm / jnp.maximum(norm, cfg.optimizer.clip_norm)
            updates, opt_state = optimizer.update(jax.tree.map(lambda g: g * scale, grads), opt_state, params)
            if frozen is not None:
                updates = freeze(updates, state.step, frozen)
            return optax.apply_updates(params, updates), opt_state

        with jax.named_scope("optimizer"):
            finite = jnp.isfinite(mean) & jnp.isfinite(norm)
            params, opt_state = if_finite(finite, learn, state.params, state.opt_state, grads)
        return TrainState(state.step + 1, params, opt_state, state.tau), metrics

    def evaluate(state: TrainState, batch: Batch) -> Metrics:
        nll, weights = loss(state.params, state.tau_now(), batch)
        return {"nll": nll, "weights": weights}

    abstract = jax.eval_shape(init, jax.random.key(0))
    param_shardings = shardings(abstract.params, mesh, param_axes)
    whole = replicated(mesh)
    state_shardings = jax.tree.map(lambda _: whole, abstract)._replace(
        params=param_shardings,
        opt_state=optax.tree.map_params(
            optimizer, lambda _, s: s, abstract.opt_state, param_shardings, transform_non_params=lambda _: whole
        ),
    )
    batch = batch_sharding(mesh)

    return Step(
        abstract_state=with_shardings(abstract, state_shardings),
        init=OnMesh(jax.jit(init, out_shardings=state_shardings), mesh),
        train=OnMesh(
            jax.jit(
                train,
                in_shardings=(state_shardings, batch),
                out_shardings=(state_shardings, whole),
                donate_argnums=0,
            ),
            mesh,
        ),
        evaluate=OnMesh(jax.jit(evaluate, out_shardings=whole), mesh),
        batch=batch,
        mesh=mesh,
    )


def split_rows(x_BL: jax.Array, parts: int) -> jax.Array:
    """[B, L] -> [parts, B / parts, L]; strided, so that each device splits its own rows."""
    x = x_BL.reshape(x_BL.shape[0] // parts, parts, *x_BL.shape[1:]).swapaxes(0, 1)
    return constrain(x, None, "batch", None)


def put_batch(step: Step, batch: Batch) -> Batch:
    """This process's rows of a global batch -> arrays sharded over the mesh."""
    with jax.transfer_guard_host_to_device("allow"):  # the one transfer of a step that is meant
        return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(step.batch, rows), batch)
