"""A run in progress: how it is opened, taken up again, rolled back and brought to its next rung."""

import collections
import contextlib
import dataclasses
import pathlib
import sys
from typing import Any

import grain
import jax

from tokenformer_jax.config import FREE_MODEL_KEYS, Config, ModelConfig, read_model
from tokenformer_jax.data.batches import keep_position
from tokenformer_jax.devices.hardware import environment
from tokenformer_jax.devices.sharding import make_mesh
from tokenformer_jax.errors import UserError
from tokenformer_jax.files import json_text, replace_file
from tokenformer_jax.growth.figures import describe_growth
from tokenformer_jax.growth.grow import Growing
from tokenformer_jax.growth.ladder import Plateau, schedule_end, shifted, stages, with_budget
from tokenformer_jax.growth.recipes import check_growth
from tokenformer_jax.growth.resize import InMemory, Resize
from tokenformer_jax.growth.shrink import check_shrinking
from tokenformer_jax.nn.layers import count_params
from tokenformer_jax.storage.checkpoints import Checkpoints
from tokenformer_jax.storage.metrics_file import Row
from tokenformer_jax.storage.record import Record
from tokenformer_jax.storage.workdir import load_config, require_empty, require_whole
from tokenformer_jax.training.non_finite import SPIKE_WINDOW, BadStep
from tokenformer_jax.training.schedule import grown_tokens, new_tokens
from tokenformer_jax.training.state import TrainState
from tokenformer_jax.training.step import Step, make_step
from tokenformer_jax.training.tasks import Prepared, task_of


def check_workdir(cfg: Config, workdir: pathlib.Path) -> None:
    """Raises a UserError where the workdir holds a run of another model, or something else."""
    path = workdir / "config.json"
    require_whole(workdir)
    if path.exists():
        try:
            theirs = load_config(path)
        except UserError as error:
            if not (workdir / "checkpoints").is_dir():
                raise
            if jax.process_index() == 0:
                print(f"warning: {error}", file=sys.stderr)
            return  # each checkpoint holds its model, too
        if differ := differences(cfg.model, theirs.model):
            ours = ", ".join(f"model.{key} = {value!r}" for key, (value, _) in differ.items())
            flags = " ".join(f"--config.model.{key}={value}" for key, (_, value) in differ.items())
            raise UserError(
                f"{ours}: {workdir} holds a run of another model; use {flags}, or another --workdir"
                f"{successor_advice(cfg, theirs, workdir)}"
            )
    else:
        require_empty(workdir, "holds other files and no run")


def differences(ours: ModelConfig, theirs: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """What makes two models different ones: key -> both values."""
    pairs = {key: (value, getattr(theirs, key)) for key, value in dataclasses.asdict(ours).items()}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1] and key not in FREE_MODEL_KEYS}


def successor_advice(cfg: Config, theirs: Config, workdir: pathlib.Path) -> str:
    """How the run of a workdir becomes one of this config, where it can."""
    old, new = stages(theirs)[-1].model, cfg.model
    ways = {"": lambda: check_growth(old, new, cfg.grow.recipe), " --shrink": lambda: check_shrinking(old, new)}
    for flag, check in ways.items():
        with contextlib.suppress(UserError):
            check()
            command = f"python -m tokenformer_jax.grow{flag} --source={workdir} --workdir=NEW"
            return f"; {command}, with this --config, makes a new one of it"
    return ""


@dataclasses.dataclass
class Run:
    """A run in progress, on one rung of its ladder. Below `record` is what changes, with `state` and `data`."""

    plan: list[Config]  # of all stages
    cfg: Config  # of this one
    start: int  # steps that were done before
    step: Step
    state: TrainState
    data: grain.DatasetIterator
    corpus: Prepared
    checkpoints: Checkpoints
    record: Record  # as of `start`
    plateau: Plateau = dataclasses.field(default_factory=Plateau)
    skipped: int = 0  # steps in a row that were not finite

    def __post_init__(self) -> None:
        self.losses = collections.deque(self.record.losses, SPIKE_WINDOW)
        self.first_batch = self.data.get_state()["next_index"]

    def examples(self, n: int) -> tuple[int, int]:
        """The batch of step n: its first example in the order of training, and the one after its last."""
        batch = self.first_batch + n - self.start - 1
        return batch * self.cfg.batch_size, (batch + 1) * self.cfg.batch_size

    @property
    def is_last(self) -> bool:
        return self.record.rung + 1 == len(self.plan)

    @property
    def is_past_its_end(self) -> bool:
        """Whether more was trained, by a config with more steps, than this one asks for."""
        return self.is_last and self.start > self.cfg.steps

    def use_of_all(self, devices: int) -> str:
        """The settings with which this stage uses so many devices."""
        cfg, mesh = self.cfg, self.cfg.mesh
        data, over = divmod(devices, mesh.slice * mesh.fsdp * mesh.tensor)
        if over:
            return f"a config.mesh whose sizes multiply to {devices}"
        rows = cfg.accumulation * data * mesh.slice * mesh.fsdp
        batch_size = -(-cfg.batch_size // rows) * rows
        settings = {"mesh.data": data} | ({"batch_size": batch_size} if batch_size != cfg.batch_size else {})
        if len(self.plan) > 1:
            return " and ".join(f"{key} = {value}" for key, value in settings.items()) + " on this rung"
        return " ".join(f"--config.{key}={value}" for key, value in settings.items()) + " for all"

    def figures(self, n: int) -> Row:
        """Where the run stands after step n."""
        tokens = (n - self.start) * task_of(self.cfg).tokens_per_step(self.cfg)
        return {
            "step": n,
            "tokens": self.record.tokens + tokens,
            "params": count_params(self.step.abstract_state.params),
            "train_flops": self.record.train_flops + tokens * self.step.flops_per_token,
        }

    def record_at(self, n: int) -> Record:
        now = self.figures(n)
        return dataclasses.replace(
            self.record,
            tokens=now["tokens"],
            train_flops=now["train_flops"],
            plateau=dataclasses.asdict(self.plateau),
            losses=list(self.losses) if self.cfg.loss_spike else [],
        )

    def save(self, n: int) -> None:
        self.checkpoints.save(n, self.state, self.data, self.corpus.assets, self.record_at(n))

    def save_at_last(self, n: int) -> None:
        """Saves, unless step n was saved, and returns once that is safe."""
        self.checkpoints.save_at_last(lambda: self.save(n))


def open_run(cfg: Config, workdir: pathlib.Path) -> Run:
    """Starts a run in an empty workdir, or takes it up where its newest checkpoint left it."""
    plan = stages(cfg)
    for stage in plan:
        make_mesh(stage.mesh)  # now, rather than in days: a rung's mesh may not be
    checkpoints = Checkpoints(workdir / "checkpoints", keep=cfg.checkpoints_kept)
    run = resume(plan, workdir, checkpoints) if checkpoints.steps else begin(plan, checkpoints)
    if jax.process_index() == 0 and not run.is_past_its_end:
        cfg = dataclasses.replace(cfg, steps=run.plan[-1].steps)  # what a budget comes to
        replace_file(workdir / "config.json", cfg.to_json())
        replace_file(workdir / "environment.json", json_text(environment(), indent=2) + "\n")
    return run


def begin(plan: list[Config], checkpoints: Checkpoints) -> Run:
    plan = with_budget(plan)
    cfg = plan[0]
    step = make_step(cfg, make_mesh(cfg.mesh), 0, schedule_end(plan, 0))
    task = task_of(cfg)
    corpus = task.prepare(cfg)
    record = Record(dataclasses.asdict(cfg.model), task.identity(corpus, cfg), cfg.batch_size)
    state = step.init(jax.random.key(cfg.seed))
    data = task.train_batches(corpus, cfg, step.mesh)
    return Run(plan, cfg, 0, step, state, data, corpus, checkpoints, record)


def resume(plan: list[Config], workdir: pathlib.Path, checkpoints: Checkpoints) -> Run:
    """Takes a run up at its newest good checkpoint; damaged ones are set aside, which is said."""
    run = checkpoints.newest_good(None, lambda step: resume_at(step, plan, workdir, checkpoints))
    for step in checkpoints.steps:
        if step > run.start or not checkpoints.is_listed(step):
            aside = checkpoints.set_aside(step)
            if jax.process_index() == 0:
                print(f"warning: the damaged checkpoint of step {step} was moved to {aside}", file=sys.stderr)
    checkpoints.kept_for_good |= {growth["step"] for growth in run.record.growth}
    return run


def resume_at(start: int, plan: list[Config], workdir: pathlib.Path, checkpoints: Checkpoints) -> Run:
    """Takes a run up at a checkpoint."""
    record = checkpoints.record(start)
    plan, cfg = stage_of(plan, record, start, workdir)
    last = record.growth[-1] if record.growth else None
    new = new_tokens(cfg, last) if last else None
    step = make_step(cfg, make_mesh(cfg.mesh), record.schedule_start, end_of_schedule(plan, record.rung, cfg), new)
    task = task_of(cfg)
    corpus = task.prepare(cfg, checkpoints.assets(start))
    identity = task.identity(corpus, cfg)
    if record.data != identity:
        raise UserError(
            f"config.data or config.seed: {workdir} was trained on {record.data}, and this is {identity}; "
            f"use those, or python -m tokenformer_jax.grow --source={workdir} --workdir=NEW, with this --config, and "
            "train goes on there with these data, from their beginning"
        )
    data = task.train_batches(corpus, cfg, step.mesh)
    state = checkpoints.restore(start, step.abstract_state)
    checkpoints.restore_data(start, data)
    keep_position(data, record.batch_size, cfg.batch_size)
    record = dataclasses.replace(record, batch_size=cfg.batch_size)
    return Run(plan, cfg, start, step, state, data, corpus, checkpoints, record, Plateau(**record.plateau))


def stage_of(plan: list[Config], record: Record, start: int, workdir: pathlib.Path) -> tuple[list[Config], Config]:
    """The stages with what a checkpoint has spent, and the one that it belongs to.

    Raises a UserError where the config has another model there.
    """
    rung = record.rung
    if rung >= len(plan):
        raise UserError(
            f"config.rungs: lists {len(plan) - 1} rungs, but {workdir} has grown to rung {rung} already; "
            "use the rungs of its config.json, or another --workdir"
        )
    stage = plan[rung]
    grown = read_model(record.model, str(workdir))
    for key, (ours, theirs) in differences(stage.model, grown).items():
        where = f"rungs[{rung - 1}].model.{key}" if rung else f"model.{key}"
        raise UserError(f"{where} = {ours!r}: {workdir} has grown to {theirs!r} there; use {theirs!r}")
    planned, began = (plan[rung - 1].steps, record.growth[-1]["step"]) if rung else (0, 0)
    plan = with_budget(plan, rung, start + planned - began, record.tokens, record.train_flops)
    return plan, shifted(plan[rung], planned, began)


def end_of_schedule(plan: list[Config], rung: int, cfg: Config) -> int:
    """Where the learning-rate schedule of a stage ends, `cfg`, which may have begun earlier than planned."""
    return schedule_end(plan, rung) + cfg.steps - plan[rung].steps


def roll_back(run: Run, workdir: pathlib.Path, bad: BadStep) -> Run:
    """Goes on from the newest checkpoint, with the examples after the bad step's.

    Raises the BadStep where the config does not want it, or too often was not enough. A run that is stopped before
    its next checkpoint comes by the same bad step again, and goes the same way.
    """
    rollbacks = [*run.record.rollbacks, {"from": bad.step, "examples": bad.examples, "why": bad.why}]
    if run.cfg.non_finite != "rollback" or len(rollbacks) > run.cfg.non_finite_limit:
        raise bad
    run.checkpoints.wait()
    checkpoints, plan = run.checkpoints, run.plan
    run.state = None  # type: ignore[assignment]  # before another is read
    run = resume(plan, workdir, checkpoints) if checkpoints.steps else begin(plan, checkpoints)
    rollbacks[-1]["to"] = run.start
    run.data.set_state({"next_index": -(-bad.examples[1] // run.cfg.batch_size)})
    return dataclasses.replace(run, record=dataclasses.replace(run.record, rollbacks=rollbacks))


def next_rung(run: Run) -> Run:
    """Grows the model to the next rung, on that one's mesh, and goes on from the same example.

    Nothing is saved: a run that is stopped before its next checkpoint starts from the former rung's last one, which is
    kept for good, and grows again to the same state.
    """
    n, rung = int(run.state.step), run.record.rung + 1
    planned, now = run.plan[rung - 1].steps, run.figures(n)
    plan = with_budget(run.plan, rung, planned, now["tokens"], now["train_flops"])
    cfg = shifted(plan[rung], planned, n)
    old_cfg = dataclasses.replace(cfg, model=run.cfg.model)
    record = run.record_at(n)
    if cfg.grow.restart_schedule:
        record = dataclasses.replace(record, schedule_start=n)
    new = grown_tokens(cfg, old_cfg.model, n)
    step = make_step(cfg, make_mesh(cfg.mesh), record.schedule_start, end_of_schedule(plan, rung, cfg), new)
    old_step = make_step(old_cfg, step.mesh, new_tokens=run.step.new_tokens)
    resize = Resize(Growing(cfg.grow.recipe), n, cfg, old_cfg, step, old_step)
    source = InMemory(run.state)
    run.state = None  # type: ignore[assignment]  # so that its arrays can go as the larger ones come
    state, figures = resize.apply(source, run.corpus)
    if jax.process_index() == 0:
        print(describe_growth(figures), file=sys.stderr)
    record = dataclasses.replace(resize.record(record, figures), rung=rung)
    data = task_of(cfg).train_batches(run.corpus, cfg, step.mesh)
    data.set_state(run.data.get_state())
    keep_position(data, run.cfg.batch_size, cfg.batch_size)
    run.checkpoints.kept_for_good.add(n)
    return Run(plan, cfg, n, step, state, data, run.corpus, run.checkpoints, record)
