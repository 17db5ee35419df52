"""Prepares the data set of a config (download, tokenizer, tokens) where its data.cache_dir says, and trains nothing.

python -m tokenformer_jax.prepare --config=… --config.data.cache_dir=/mnt/shared/cache …

For a folder that several machines share, before they start: on a mounted bucket they cannot wait for each other. It
uses no accelerator; the keys of `data`, `model.vocab_size` and `model.context_length` must be those of the run.
"""

import jax

from tokenformer_jax.cli import config_flag, run_command
from tokenformer_jax.data.tokens import prepare
from tokenformer_jax.errors import UserError


def main() -> None:
    config = config_flag()

    def prepare_data() -> None:
        if jax.distributed.is_initialized() and jax.process_count() > 1:
            raise UserError("--distributed: one process prepares data; use exec, or a slice of one worker")
        corpus = prepare(config())
        for name, split in (("train", corpus.train), ("validation", corpus.validation)):
            print(f"{name}: {split.num_documents:,} documents, {split.num_tokens:,} tokens")

    run_command(prepare_data, lambda: config().data)  # its mesh is the run's, and may not fit here


if __name__ == "__main__":
    main()
