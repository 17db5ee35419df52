"""Trains a config, or goes on with what the workdir holds.

python -m tokenformer_jax.train --config=quickstart:small --workdir=W
python -m tokenformer_jax.train --decay_from=STEP --source=W --workdir=W2

On SIGINT or SIGTERM, or after config.max_minutes, it saves and ends with exit code 85: the same command goes on.

With --decay_from it makes a finished model of a run whose learning rate stays at its peak (config.optimizer.schedule =
"constant" or "wsd"): W2 leaves W at the checkpoint of that step, and its rate decays.
"""

import pathlib

from absl import flags

from tokenformer_jax.cli import STOPPED, config_flag, run_command, workdir_flag
from tokenformer_jax.config import Config
from tokenformer_jax.errors import UserError
from tokenformer_jax.running.branch import branch
from tokenformer_jax.running.loop import train


def main() -> None:
    config, workdir = config_flag(), workdir_flag()
    source = workdir_flag("source", "with --decay_from: the directory of the run to leave")
    decay_from = flags.DEFINE_integer("decay_from", None, "the step of a checkpoint of --source")
    fraction = flags.DEFINE_float("decay_fraction", None, "with --decay_from; by default optimizer.decay_fraction")

    def what() -> Config | pathlib.Path:
        """The config, or the run to leave."""
        if decay_from.value is None:
            for name in ("source", "decay_fraction"):
                if flags.FLAGS[name].present:
                    raise UserError(f"--{name}: goes with --decay_from, which names the step to leave the source at")
            return config()
        if flags.FLAGS["config"].present:
            raise UserError("--config: a run that leaves another has its config; leave it out, or --decay_from")
        return source()

    def start() -> int | None:
        given = what()
        cfg = given if isinstance(given, Config) else branch(given, decay_from.value or 0, workdir(), fraction.value)
        return None if train(cfg, workdir()) else STOPPED

    run_command(start, what, workdir)


if __name__ == "__main__":
    main()
