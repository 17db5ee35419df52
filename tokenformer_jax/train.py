"""Trains a config, or goes on with what the workdir holds.

python -m tokenformer_jax.train --config=quickstart:small --workdir=W

On SIGINT or SIGTERM, or after config.max_minutes, it saves and ends with exit code 85: the same command goes on.
"""

from tokenformer_jax.cli import STOPPED, config_flag, run_command, workdir_flag
from tokenformer_jax.running.loop import train


def main() -> None:
    config, workdir = config_flag(), workdir_flag()
    run_command(lambda: None if train(config(), workdir()) else STOPPED, config, workdir)


if __name__ == "__main__":
    main()
