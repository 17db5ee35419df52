"""Trains a config, or goes on with what the workdir holds.

python -m tokenformer_jax.train --config=quickstart:small --workdir=W
"""

from tokenformer_jax.cli import config_flag, run_command, workdir_flag
from tokenformer_jax.running.loop import train


def main() -> None:
    config, workdir = config_flag(), workdir_flag()
    run_command(lambda: train(config(), workdir()))


if __name__ == "__main__":
    main()
