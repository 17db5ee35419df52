"""Small tasks of every kind of request, as files of lm-evaluation-harness: a .yaml and a .json each."""

import json
import pathlib
import random
from typing import Any

WORDS = "key value query token norm grow train layer head scale attention".split()
ACC = """metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
LAST_WORD = """output_type: loglikelihood
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' '+text.split(' ')[-1]}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
CHOICE = f"""output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "{{{{choices}}}}"
{ACC}  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
ROLLING = """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
"""
ANSWER = """output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n", "key"], do_sample: false, max_gen_toks: 12}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
TASKS = {"last_word": LAST_WORD, "choice": CHOICE, "rolling": ROLLING, "answer": ANSWER}


def sentence(rng: random.Random, count: int) -> str:
    return " ".join(rng.choices(WORDS, k=count))


def write_tasks(folder: pathlib.Path, count: int = 6) -> dict[str, list[dict[str, Any]]]:
    """Writes the tasks of TASKS; returns their documents."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    documents = {name: [{"text": sentence(rng, rng.randrange(2, 9))} for _ in range(count)] for name in TASKS}
    for document in documents["choice"]:
        document |= {"choices": rng.sample(WORDS, 4), "label": rng.randrange(4)}
    for document in documents["rolling"]:
        document["text"] = sentence(rng, rng.randrange(5, 150))
    for document in documents["answer"]:
        document["answer"] = rng.choice(WORDS)
    for name, head in TASKS.items():
        data = folder / f"{name}.json"
        data.write_text("".join(json.dumps(document) + "\n" for document in documents[name]))
        lines = f"task: {name}", "dataset_path: json", f"dataset_kwargs: {{data_files: {{test: '{data}'}}}}"
        more = "test_split: test\nmetadata: {version: 1.0}\n"
        (folder / f"{name}.yaml").write_text("\n".join(lines) + "\n" + more + head)
    return documents
