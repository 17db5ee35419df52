"""What `evaluate` evaluates: tasks of lm-evaluation-harness, and data sets of text. This file explains every key.

    python -m tokenformer_jax.evaluate --workdir=W --config=configs/zero_shot.py:paper
    python -m tokenformer_jax.evaluate --workdir=W --config=zero_shot:text --config.stride=512
    python -m tokenformer_jax.evaluate --workdir=W --config=zero_shot:data --config.datasets.data.path=books

| variant | tasks | data sets |
|---|---|---|
| none | | the run's own validation split |
| paper | the six of the paper's table 1 | |
| text | wikitext | LAMBADA, WikiText's kin and C4 by their names in tfds, one of them after another |
| python | the three of `python -m benchmarks.python_tasks` | the embedded corpus, Python's standard library |
| data | | `text_files` of yours: the 95 % of documents that training would read |

To expect from the released models (paper, table 1): configs/pile.py. Tasks need the extra `eval`, and download their
data on first use.
"""

from typing import Any

from ml_collections import ConfigDict

PAPER = "lambada_openai,hellaswag,piqa,arc_easy,arc_challenge,winogrande"
PYTHON = "python_last_word,python_next_line,python_name"


def get_config(variant: str = "none") -> ConfigDict:
    config = ConfigDict()
    config.tasks = ""  # names of tasks, groups and tags of the harness, and files of tasks, separated by commas
    config.include_path = ""  # a folder with tasks of one's own, as the harness' --include_path
    config.num_fewshot = -1  # examples before each question; -1: the task's own number, or none
    config.limit = 0.0  # questions of each task, or below 1 a part of them; 0: all
    config.datasets = datasets = ConfigDict()  # by names of one's choice, what `data_set` below explains
    config.context_length = 0  # tokens that a model sees at once; 0: what it was trained on
    config.stride = 0  # data sets: tokens from one window to the next; 0: windows do not overlap
    config.batch_size = 0  # sequences of context_length at once, or as many tokens in shorter ones; 0: as in training
    config.mesh = ""  # [slice,]data,fsdp,tensor; empty: the run's own, or a single device
    config.dtype = ""  # "float32" or "bfloat16"; empty: the run's own
    config.data = ConfigDict({"path": "", "cache_dir": ""})  # where the run's own data and prepared data were moved
    if variant == "paper":
        config.tasks, config.num_fewshot = PAPER, 0
    elif variant == "text":
        config.tasks = "wikitext"
        datasets.lambada = data_set("lambada", "test", "passage")
        datasets.wiki40b = data_set("wiki40b/en", "test")
        datasets.c4 = data_set("c4/en", "validation")
    elif variant == "python":
        config.tasks = PYTHON
        datasets.python = data_set("python_source", "validation")
    elif variant == "data":
        datasets.data = data_set("text_files", "train")
    elif variant != "none":
        raise ValueError(f"variant {variant!r} must be one of none, paper, text, python, data")
    return config


def data_set(dataset: str, split: str, text_key: str = "text") -> dict[str, Any]:
    """A data set as the training config's `data` has it, and its split, such as "test" or "validation[:10%]".

    With `dataset` "" it is the run's own, whose splits are "train" and "validation".
    """
    return {"dataset": dataset, "split": split, "path": "", "text_key": text_key}
