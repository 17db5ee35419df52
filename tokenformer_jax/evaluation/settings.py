"""What `evaluate` is asked for. `configs/zero_shot.py` explains every key; here stand their types and rules."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

from tokenformer_jax.config import Config, check_rules, read_dataclass, validate
from tokenformer_jax.errors import UserError
from tokenformer_jax.files import check_data_path
from tokenformer_jax.rules import NotNegativeFloat, NotNegativeInt, Rule, one_of
from tokenformer_jax.storage.trained import Trained
from tokenformer_jax.training.step import make_step


@dataclasses.dataclass(frozen=True)
class DataSet:
    dataset: str
    split: str
    path: str
    text_key: str


@dataclasses.dataclass(frozen=True)
class Moved:
    path: str
    cache_dir: str


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    tasks: str
    include_path: str
    num_fewshot: Annotated[int, Rule(lambda count: count >= -1, "must be 0 or above, or -1 for the task's own")]
    limit: NotNegativeFloat
    datasets: tuple[dict[str, Any], ...]
    context_length: NotNegativeInt
    stride: NotNegativeInt
    batch_size: NotNegativeInt
    mesh: str
    dtype: Annotated[str, one_of("", "float32", "bfloat16")]
    data: Moved

    @property
    def data_sets(self) -> dict[str, DataSet]:
        """The data sets by name."""
        return {group["name"]: DataSet(**group["data"]) for group in self.datasets}

    @property
    def task_names(self) -> list[str]:
        return [name.strip() for name in self.tasks.split(",") if name.strip()]


def read_eval_config(tree: Mapping[str, Any], source: str = "config") -> EvalConfig:
    """Builds and checks an `EvalConfig`. Raises a UserError that names the key."""
    named = tree.get("datasets")
    if isinstance(named, Mapping):
        groups = {name: read_dataclass(DataSet, group, f"{source}.datasets.{name}") for name, group in named.items()}
        tree = {**tree, "datasets": [{"name": name, "data": vars(group)} for name, group in groups.items()]}
    settings = read_dataclass(EvalConfig, tree, source)
    check_rules(settings, f"{source}.")
    return settings


def applied(run: Trained, settings: EvalConfig) -> Trained:
    """The run with the settings' dtype, batch and places of data.

    Raises:
      UserError: one of them does not fit it.
    """
    cfg = dataclasses.replace(run.cfg, data=_moved(run.cfg, settings.data))
    if settings.batch_size:
        cfg = dataclasses.replace(cfg, batch_size=settings.batch_size, accumulation=1)
    if settings.dtype:
        cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, dtype=settings.dtype))
    validate(cfg)
    longest, length = cfg.model.context_length, settings.context_length
    if length > longest:
        raise UserError(f"config.context_length = {length}: the model was trained on {longest}; use at most that")
    if settings.stride > (length or longest):
        raise UserError(
            f"config.stride = {settings.stride}: would leave out tokens between windows of {length or longest}; use at "
            "most that"
        )
    step = make_step(cfg, run.step.mesh, run.record.schedule_start) if settings.dtype else run.step
    return dataclasses.replace(run, cfg=cfg, step=step)


def _moved(cfg: Config, moved: Moved) -> Any:
    """The data of a run's config, at the place that it was moved to."""
    given: Any = {key: value for key, value in vars(moved).items() if value}
    for key, value in given.items():
        check_data_path(value, f"--config.data.{key}")
    if moved.path and (cfg.data.sources or cfg.data.dataset == "python_source"):
        name = "a mixture" if cfg.data.sources else "python_source"
        raise UserError(f"--config.data.path={moved.path}: {name}, the run's data set, reads no path")
    return dataclasses.replace(cfg.data, **given)
