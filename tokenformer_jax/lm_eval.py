"""The command of lm-evaluation-harness, `lm_eval`, to which a workdir is a model: `--model tokenformer`.

python -m tokenformer_jax.lm_eval --model tokenformer --model_args workdir=W --batch_size 16 --tasks hellaswag
python -m tokenformer_jax.lm_eval ls tasks

Its flags are the harness' own; `--model_args workdir=W,step=600` names a checkpoint.
"""

import importlib
import sys

from tokenformer_jax.errors import UserError
from tokenformer_jax.evaluation.zero_shot import no_forks, require_harness


def main() -> None:
    try:
        require_harness()
        from lm_eval.__main__ import cli_evaluate

        importlib.import_module("tokenformer_jax.evaluation.harness")  # registers the model
        with no_forks():
            cli_evaluate()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
