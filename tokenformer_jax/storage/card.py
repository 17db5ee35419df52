"""The model card of an exported model, README.md on the hub: what its workdir knows, and nothing else."""

import pathlib
from typing import Any

import numpy as np

from tokenformer_jax.files import parse_json
from tokenformer_jax.nn.transformer import initial_tau
from tokenformer_jax.storage.trained import Trained

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- tokenformer
---

# {name}

A [TokenFormer](https://arxiv.org/abs/2410.23168) language model, trained with tokenformer_jax.

{model}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
ids = tokenizer("a text", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=40)[0]))
```

`trust_remote_code=True` runs `modeling_tokenformer.py`, which is in this folder: read it first. Texts of training began
after `{end}`, and were seen with at most {context:,} tokens of context. In a text, the tokenizer takes `{end}` for the
characters that it is made of. `python -m tokenformer_jax.convert --from_hub=FOLDER --workdir=W` makes a workdir of it.

## Training

{training}

## Evaluation

{evaluation}
"""


def model_card(name: str, run: Trained, workdir: pathlib.Path) -> str:
    """The text of a card, in Markdown."""
    end = run.tokenizer.decode([run.tokenizer.end_of_text])
    return CARD.format(
        name=name,
        model=_table(_model(run)),
        end=end,
        context=run.cfg.model.context_length,
        training=_training(run),
        evaluation=_evaluation(run, workdir),
    )


def _table(rows: dict[str, str]) -> str:
    return _lines([["", ""], *([name, value] for name, value in rows.items())])


def _counts(counts: dict[str, Any]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _model(run: Trained) -> dict[str, str]:
    model, new = run.cfg.model, initial_tau(run.cfg.model)
    now = {name: float(run.state.tau_now()[name]) for name in new}
    tau = ", ".join(f"{name} {value:.6g}" for name, value in now.items())
    if any(np.float32(now[name]) != np.float32(new[name]) for name in new):
        values = ", ".join(f"{value:.6g}" for value in new.values())
        tau += f"; those of a new model are {values}: a growth holds them, or ramps them still"
    return {
        "parameters": f"{run.num_params:,}, of them {model.vocab_size * model.embed_dim:,} of the embedding",
        "layers, width, heads": f"{model.num_layers}, {model.embed_dim}, {model.num_heads}",
        "parameter tokens in a layer": _counts(model.tokens),
        "τ": tau,
        "normalizer": f"{model.normalizer}, {model.gelu} gelu",
        "context": f"{model.context_length:,} tokens",
        "vocabulary": f"{run.tokenizer.vocab_size:,} ids, {model.vocab_size:,} rows of the embedding",
    }


def _training(run: Trained) -> str:
    record, data = run.record, run.cfg.data
    if not record.tokens:
        return "None that the workdir knows of: its weights were imported, or are those of the beginning."
    name = f"{data.dataset} ({pathlib.Path(data.path).name})" if data.path else data.dataset
    rows = {
        "data": f"{name}, split {data.train_split}; the last, where it was trained on several",
        "steps": f"{run.step_number:,}, the last of {record.batch_size:,} x {run.cfg.model.context_length:,} tokens",
        "tokens": f"{record.tokens:,}, with those of the smaller models that it grew from",
        "FLOPs": f"{record.train_flops:.4g}, with theirs",
    }
    if not record.growth:
        return f"{_table(rows)}\n\nIt never grew."
    lines = [["grown at step", "parameter tokens before", "after", "recipe", "loss before", "after"]]
    for growth in record.growth:
        cells = [f"{growth['step']:,}", _counts(growth["from"]), _counts(growth["to"]), growth.get("recipe", "")]
        cells += [f"{growth[key]:.4f}" if key in growth else "" for key in ("loss_before", "loss_after")]
        lines.append(cells)
    return f"{_table(rows)}\n\n{_lines(lines)}"


def _evaluation(run: Trained, workdir: pathlib.Path) -> str:
    """What `eval.json` holds of this checkpoint."""
    try:
        found = parse_json((workdir / "eval.json").read_text())
        shown = _figures(found) if found["step"] == run.step_number else ""
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # there is none, or it is no such file
        shown = ""
    return shown or "None of this checkpoint."


def _figures(found: dict[str, Any]) -> str:
    """Those of a split, of data sets, and of tasks, as tables."""
    names = ("loss", "perplexity", "bits_per_byte", "tokens")
    splits = {f"{found.get('split')} split": found} if "loss" in found else {}
    splits |= found.get("datasets", {})
    rows = [[name, *(_shown(figures.get(key)) for key in names)] for name, figures in splits.items()]
    parts = [_lines([["data", *names], *rows])] if rows else []
    if found.get("tasks"):
        rows = [["task", "version", "shots", "questions", "metric", "value", "standard error"]]
        for name, task in found["tasks"].items():
            about = [task["version"], task["num_fewshot"], task["samples"]]
            for metric, got in task["metrics"].items():
                rows.append([name, *map(str, about), metric, *map(_shown, (got["value"], got["stderr"]))])
        parts.append(_lines(rows))
    return "\n\n".join(parts)


def _lines(rows: list[list[str]]) -> str:
    """A table whose first row is its head."""
    head, *others = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *others])


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, int | float) else ""
