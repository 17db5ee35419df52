"""What a checkpoint says of its run, beside the arrays."""

import asyncio
import dataclasses
import os
from collections.abc import Awaitable
from typing import Any

import jax

from tokenformer_jax.buckets import is_bucket
from tokenformer_jax.files import sealed
from tokenformer_jax.storage.fingerprint import as_text, fingerprints


@dataclasses.dataclass
class Record:
    """What a checkpoint says of its run, beside the arrays; stored as JSON."""

    model: dict[str, Any]  # its config
    data: str  # identity of the training tokens and their order
    batch_size: int  # sequences a step, the unit of the data position
    tokens: int = 0  # seen in training, by this model and the smaller ones it grew from
    train_flops: float = 0.0  # spent on them
    schedule_start: int = 0  # step from which the learning-rate schedule counts
    growth: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # step, tokens before and after, checks
    rung: int = 0  # of the ladder: how many growths are done
    plateau: dict[str, Any] = dataclasses.field(default_factory=dict)  # `ladder.Plateau` of this rung
    rollbacks: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # from step, to step, examples, why
    losses: list[float] = dataclasses.field(default_factory=list)  # of the last steps, to tell a spike by


class RecordFile:
    """All that is not an array, in one file. It is written in the background, when the fingerprints are computed."""

    name = "record.json"

    def __init__(self, small: dict[str, Any], arrays: dict[str, jax.Array]):
        self.small = small
        self.kinds = {name: (str(array.dtype), array.shape) for name, array in arrays.items()}
        self.fingerprints = fingerprints(arrays)

    def text(self) -> str:
        arrays = {name: [*kind, as_text(self.fingerprints[name])] for name, kind in self.kinds.items()}
        return sealed(self.small | {"arrays": arrays})

    async def save(self, directory: Any) -> Awaitable[None]:
        """Called by Orbax; what it returns is awaited in a thread of its own."""
        return self._write(directory)

    async def _write(self, directory: Any) -> None:
        text = await asyncio.to_thread(self.text)
        folder = await directory.await_creation()
        if jax.process_index() == 0:
            with (folder / self.name).open("w") as file:
                file.write(text)
                file.flush()
                if not is_bucket(folder):
                    os.fsync(file.fileno())

    async def load(self, directory: Any) -> Awaitable[None]:
        raise NotImplementedError("Checkpoints reads the file itself")
