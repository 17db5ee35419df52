"""What is different about checkpoints in a bucket: when one is whole, copying it, and waiting for a save."""

import pathlib
import threading

from orbax.checkpoint import v1 as ocp

from tokenformer_jax.buckets import copy_folder, is_bucket, patiently

_COMMITTED = "commit_success.txt"


def is_finished(checkpoint: pathlib.Path) -> bool:
    """Whether it is whole: on a file system it gets its name then, and in a bucket Orbax' last object."""
    return (checkpoint / _COMMITTED).exists() if is_bucket(checkpoint) else checkpoint.is_dir()


def copy_checkpoint(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies a checkpoint, from and to buckets as well."""
    copy_folder(source, target, last=_COMMITTED)
    if is_bucket(target):
        for folder in [*(path for path in target.iterdir() if path.is_dir()), target]:
            (folder / _COMMITTED).write_text("")


def settle(saver: ocp.training.Checkpointer, directory: pathlib.Path) -> None:
    """Waits for the save in flight, and raises its error.

    In a bucket that is out of reach TensorStore tries for a quarter of an hour; this ends after our `patience`.
    """
    if not is_bucket(directory):
        return saver.wait()
    done = threading.Event()
    faults: list[BaseException] = []

    def wait() -> None:
        try:
            saver.wait()
        except BaseException as error:
            faults.append(error)
        done.set()

    threading.Thread(target=wait, daemon=True).start()
    while not done.wait(10):
        patiently(directory, directory.exists)
    for fault in faults:
        raise fault
