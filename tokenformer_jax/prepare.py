"""Prepares the data set of a config (download, tokenizer, tokens) where its data.cache_dir says, and trains nothing.

python -m tokenformer_jax.prepare --config=… --config.data.cache_dir=gs://BUCKET/cache …

All cores of the machine work on it and, with --distributed under a launcher, those of all hosts; data.cache_dir must
then be a folder that they share, or in a bucket. Stopped or killed, the same command goes on. It uses no accelerator;
the keys of `data`, `model.vocab_size` and `model.context_length` must be those of the run.
"""

from tokenformer_jax.cli import config_flag, run_command
from tokenformer_jax.data.mixture import prepare
from tokenformer_jax.devices.distributed import this_pod
from tokenformer_jax.training.tasks import task_of


def main() -> None:
    config = config_flag()

    def prepare_data() -> None:
        pod, cfg = this_pod(), config()
        if cfg.task != "language":  # a set of tfds is downloaded; all else is read as it is
            print(task_of(cfg).describe_data(task_of(cfg).prepare(cfg)))
            return
        corpus = prepare(cfg, pod=pod)
        for name, split in (("train", corpus.train), ("validation", corpus.validation)) if not pod.index else ():
            print(f"{name}: {split.num_documents:,} documents, {split.num_tokens:,} tokens")

    run_command(prepare_data, lambda: config().data)  # its mesh is the run's, and may not fit here


if __name__ == "__main__":
    main()
