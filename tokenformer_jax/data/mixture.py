"""Mixtures: several sources of text, each with its weight, its own splits and its own tokens."""

import dataclasses
import hashlib
import math
import re
from typing import Any

from tokenformer_jax.config import Config, DataConfig, suggest
from tokenformer_jax.data.published import open_set
from tokenformer_jax.data.tokenizer import Tokenizer, load_tokenizer
from tokenformer_jax.data.tokens import Corpus, Part, TokenSplit, alone_in, digest, make_tokenizer, wait_for
from tokenformer_jax.data.tokens import prepare as prepare_one
from tokenformer_jax.devices.distributed import ALONE, Pod
from tokenformer_jax.errors import UserError
from tokenformer_jax.files import run_path

_KEYS = ("dataset", "path", "text_key", "train_split", "validation_split")  # that a source may have of its own


@dataclasses.dataclass(frozen=True)
class Source:
    name: str
    weight: float  # of all weights' sum
    data: DataConfig


def sources(data: DataConfig) -> list[Source]:
    """The sources of a mixture; none where the data are a single set.

    Raises:
      UserError: names the entry of data.sources that cannot be used.
    """
    found: list[Source] = []
    for i, group in enumerate(data.sources):
        where = f"data.sources[{i}]"
        for key in group:
            if key not in ("name", "weight", *_KEYS):
                known = ("name", "weight", *_KEYS)
                raise UserError(f"{where}: unknown key {key!r}{suggest(key, known)}; use {', '.join(known)}")
        name, weight = group.get("name"), group.get("weight", 0)
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w-]*", name):
            raise UserError(f"{where}.name = {name!r}: must be a name of letters, digits, _ and -, such as 'web'")
        if name in [source.name for source in found]:
            raise UserError(f"{where}.name = {name!r}: names another source, too; use another name")
        if type(weight) not in (int, float) or not 0 < weight < math.inf:
            raise UserError(f"{where}.weight = {weight!r}: must be a number above 0")
        own: Any = {key: group[key] for key in _KEYS if key in group}
        for key, value in own.items():
            if not isinstance(value, str):
                raise UserError(f"{where}.{key} = {value!r}: must be text")
        found.append(Source(name, float(weight), dataclasses.replace(data, sources=(), **own)))
    if len(found) == 1:
        raise UserError("data.sources: holds one source alone; use data.dataset and data.path, or another source")
    total = math.fsum(source.weight for source in found)
    return [dataclasses.replace(source, weight=source.weight / total) for source in found]


def prepare(cfg: Config, tokenizer: Tokenizer | None = None, pod: Pod = ALONE) -> Corpus:
    """Opens the tokens of a config, of one source or of each of a mixture, after making what is not there.

    The tokenizer is the given one, else the file data.tokenizer, else one trained on the train split, of a mixture on
    each source's by its weight. See `tokens.prepare` for several processes.

    Raises:
      UserError: as `tokens.prepare`, or data.sources cannot be used.
    """
    mixed = sources(cfg.data)
    if not mixed:
        return prepare_one(cfg, tokenizer, pod)
    if tokenizer is None and not cfg.data.tokenizer:
        tokenizer = _tokenizer(cfg, mixed, pod)
    corpora = [(source, prepare_one(dataclasses.replace(cfg, data=source.data), tokenizer, pod)) for source in mixed]
    return Corpus(
        corpora[0][1].tokenizer,
        joined([Part(source.name, source.weight, corpus.train) for source, corpus in corpora]),
        joined([Part(source.name, source.weight, corpus.validation) for source, corpus in corpora]),
    )


def _tokenizer(cfg: Config, mixed: list[Source], pod: Pod) -> Tokenizer:
    sets = [(open_set(source.data), source.data, source.weight) for source in mixed]
    name = digest([[dataset.identity, data.train_split, weight] for dataset, data, weight in sets])
    folder = run_path(cfg.data.cache_dir, "data.cache_dir") / f"mixture-{name}"
    file = folder / f"tokenizer-{cfg.model.vocab_size}.json"
    if not pod.index:
        with alone_in(folder):
            make_tokenizer(file, cfg, sets)
    pod.wait_for_all()
    wait_for(file, pod)
    return load_tokenizer(file)


def joined(parts: list[Part]) -> TokenSplit:
    """Splits as one: their streams one after the other, and what tells them apart."""
    splits = [part.split for part in parts]
    content = hashlib.sha256(repr([(part.weight, part.split.fingerprint) for part in parts]).encode())
    return TokenSplit(
        [shard for split in splits for shard in split.shards],
        sum(split.num_bytes for split in splits),
        sum(split.num_documents for split in splits),
        splits[0].end_of_text,
        content.hexdigest()[:16],
        tuple(parts),
    )
