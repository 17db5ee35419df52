"""A checkpoint as a folder that transformers loads, code included, and that `--from_hub` makes a workdir of again."""

import dataclasses
import json
import pathlib
from typing import Any

import jax

from tokenformer_jax.config import FREE_MODEL_KEYS
from tokenformer_jax.errors import UserError
from tokenformer_jax.storage.card import model_card
from tokenformer_jax.storage.hub import MODEL_TYPE
from tokenformer_jax.storage.official import official_arrays
from tokenformer_jax.storage.state_dicts import write_state_dict
from tokenformer_jax.storage.trained import Trained, load_trained
from tokenformer_jax.storage.workdir import LOCK, load_config, new_workdir, require_empty

PACKAGE = pathlib.Path(__file__).parents[1]
CODE = "modeling_tokenformer"
IMPORT = "from tokenformer_jax.pytorch import Layers\n"


def export_hub(workdir: pathlib.Path, folder: pathlib.Path, step_number: int | None = None) -> tuple[int, int]:
    """Writes the newest (or given) checkpoint of a workdir to a new folder, bit for bit, with τ as it is.

    Returns:
      The step, and the number of parameters.

    Raises:
      UserError: the model is a plain Transformer or broken, or the folder is taken or cannot be written.
    """
    require_empty(folder, "holds something already", "--to_hub_format")
    if load_config(workdir / "config.json").model.projection == "linear":
        raise UserError(f"{workdir}: model.projection = 'linear': the modelling file holds no plain Transformer")
    run = load_trained(workdir, step_number)
    arrays = official_arrays(run, workdir)
    with new_workdir(folder) as partial:
        if jax.process_index() == 0:
            write_state_dict(partial / "model.safetensors", arrays)
            for name, text in _texts(folder.resolve().name, run, workdir).items():
                (partial / name).write_text(text)
    if jax.process_index() == 0:
        (folder / LOCK).unlink(missing_ok=True)
    return run.step_number, run.num_params


def _texts(name: str, run: Trained, workdir: pathlib.Path) -> dict[str, str]:
    model, tokenizer = run.cfg.model, run.tokenizer
    end = tokenizer.end_of_text
    ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    config = {
        "architectures": ["TokenFormerForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{CODE}.TokenFormerConfig",
            "AutoModelForCausalLM": f"{CODE}.TokenFormerForCausalLM",
        },
        "model_type": MODEL_TYPE,
        **{key: value for key, value in dataclasses.asdict(model).items() if key not in FREE_MODEL_KEYS},
        "tau": run.state.tau_values(),
        "tie_word_embeddings": True,
        "dtype": "float32",
        **ids,
    }
    no_ids = list(range(tokenizer.vocab_size, model.vocab_size))  # rows of the embedding that are never drawn
    generation = ids | ({"suppress_tokens": no_ids} if no_ids else {})
    texts = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), tokenizer.decode([end])),
        "model_max_length": model.context_length,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # text never encodes to a special token, as here
    }
    return {
        "config.json": _json(config),
        "generation_config.json": _json(generation),
        "tokenizer.json": tokenizer.to_json(),
        "tokenizer_config.json": _json(texts),
        f"{CODE}.py": modelling_code(),
        "README.md": model_card(name, run, workdir),
    }


def in_transformers(folder: pathlib.Path, workdir: pathlib.Path) -> str:
    """A line on how transformers loads it."""
    return f"\nin transformers: AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)"


def _json(tree: dict[str, Any]) -> str:
    return json.dumps(tree, indent=2) + "\n"


def modelling_code() -> str:
    """`modeling_tokenformer.py` with `pytorch.py` in the place of its import: one file that needs no other of ours."""
    code, model = ((PACKAGE / f"{name}.py").read_text() for name in (CODE, "pytorch"))
    return code.replace(IMPORT, model.split('"""', 2)[2].strip() + "\n")
