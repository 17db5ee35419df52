"""Trains a config, or goes on with what the workdir holds.

python -m tokenformer_jax.train --config=quickstart:small --workdir=W
python -m tokenformer_jax.train --decay_from=STEP --source=W --workdir=W2

On SIGINT or SIGTERM, or after config.max_minutes, it saves and ends with exit code 85: the same command goes on.

With --decay_from it makes a finished model of a run whose learning rate stays at its peak (config.optimizer.schedule =
"constant" or "wsd"): W2 leaves W at the checkpoint of that step, and its rate decays.
"""

from absl import flags

from tokenformer_jax.buckets import is_bucket
from tokenformer_jax.cli import STOPPED, config_flag, print_once, run_command, workdir_flag
from tokenformer_jax.config import Config
from tokenformer_jax.errors import UserError
from tokenformer_jax.running.branch import branch, branch_config, check_fraction
from tokenformer_jax.running.loop import train


def main() -> None:
    config, workdir = config_flag(), workdir_flag()
    source = workdir_flag("source", "with --decay_from: the directory of the run to leave")
    decay_from = flags.DEFINE_integer("decay_from", None, "the step of a checkpoint of --source")
    fraction = flags.DEFINE_float("decay_fraction", None, "with --decay_from; by default optimizer.decay_fraction")

    def planned() -> Config | None:
        """The config that will be trained; None where the run to leave is elsewhere."""
        if decay_from.value is None:
            for name in ("source", "decay_fraction"):
                if flags.FLAGS[name].present:
                    raise UserError(f"--{name}: goes with --decay_from, which names the step to leave the source at")
            return config()
        if flags.FLAGS["config"].present:
            raise UserError("--config: a run that leaves another has its config; leave it out, or --decay_from")
        if fraction.value is not None:
            check_fraction(fraction.value)
        elsewhere = is_bucket(source()) or not source().exists()
        return None if elsewhere else branch_config(source(), decay_from.value, fraction.value)

    def start() -> int | None:
        if decay_from.value is None or flags.FLAGS["config"].present:
            cfg = planned()
        else:
            cfg = branch(source(), decay_from.value, workdir(), fraction.value)
            print_once(f"leaves {source()} at step {decay_from.value}; the rate decays until step {cfg.steps}")
        assert cfg is not None
        return None if train(cfg, workdir()) else STOPPED

    run_command(start, planned, workdir)


if __name__ == "__main__":
    main()
