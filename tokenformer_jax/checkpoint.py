"""Lists the checkpoints of a run, and reads every array of each: what is damaged is named.

python -m tokenformer_jax.checkpoint --workdir=W
"""

from tokenformer_jax.cli import run_command, workdir_flag
from tokenformer_jax.errors import UserError, listed
from tokenformer_jax.storage.checkpoints import Checkpoints, describe


def main() -> None:
    workdir = workdir_flag()

    def check() -> None:
        checkpoints = Checkpoints(workdir() / "checkpoints")
        checkpoints.choose(None)
        damaged: dict[int, list[str]] = {}
        for step in checkpoints.steps:
            text, faults = describe(checkpoints, step)
            print(text, flush=True)
            damaged |= {step: list(faults)} if faults else {}
        if damaged:
            which = "; ".join(f"step {step}: {listed(names)}" for step, names in damaged.items())
            raise UserError(f"{checkpoints.directory}: damaged are {which}")

    run_command(check, workdir)


if __name__ == "__main__":
    main()
