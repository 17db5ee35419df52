"""The corpus: texts, tokenized once into flat files.

A split is one stream of ids: <eot> document <eot> document <eot> … <eot>, in files of at most 1 GiB. Every 4 KiB of
them have a checksum, which is compared whenever they are read.
"""

import bisect
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from tokenformer_jax.buckets import Lease, is_bucket, remove_folder
from tokenformer_jax.config import Config, DataConfig
from tokenformer_jax.data.encode import (
    Job,
    part_name,
    pieces,
    split_texts,
    token_file,
    token_type,
)
from tokenformer_jax.data.published import open_set
from tokenformer_jax.data.shards import InMemory, RemoteShard, Shard, copy_missing
from tokenformer_jax.data.text import Skipped
from tokenformer_jax.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from tokenformer_jax.data.workers import parts_of, run_units
from tokenformer_jax.devices.distributed import ALONE, Pod, this_pod
from tokenformer_jax.errors import UserError
from tokenformer_jax.files import locked, make_folder, replace_file, run_path, sealed, unsealed

Path = pathlib.Path

_TRAINER_CHARACTERS = 1 << 29  # a BPE of more text than this is no better
_SEEN_AFTER = 90  # seconds, after which a shared file system shows what was written


@dataclasses.dataclass(frozen=True, eq=False)
class TokenSplit:
    """A tokenized split: num_documents documents of num_bytes bytes of UTF-8 in all."""

    shards: Sequence[Shard | RemoteShard | InMemory]  # in their order
    num_bytes: int
    num_documents: int
    end_of_text: int
    fingerprint: str  # of the tokens
    parts: tuple["Part", ...] = ()  # of a mixture, whose streams these are one after the other

    @functools.cached_property
    def _ends(self) -> list[int]:
        return np.cumsum([shard.num_tokens for shard in self.shards]).tolist()

    @property
    def num_tokens(self) -> int:
        return self._ends[-1] if self.shards else 0

    @property
    def tokens(self) -> np.ndarray:
        """All of them [num_tokens], uint16 or uint32: of a split of several files a copy, in memory."""
        if len(self.shards) == 1 and not isinstance(self.shards[0], RemoteShard):
            return self.shards[0].tokens
        return np.concatenate([shard.read(0, shard.num_tokens) for shard in self.shards])

    def read(self, begin: int, end: int) -> np.ndarray:
        """The tokens from `begin` up to `end`.

        Raises:
          UserError: they have changed since they were prepared.
        """
        found = [shard.read(first, last) for shard, first, last in self._places(begin, end)]
        return found[0] if len(found) == 1 else np.concatenate([np.empty(0, np.uint16), *found])

    def prefetch(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Copies what is in a bucket of tokens that will be read, all at once, which is faster."""
        wanted = [place for begin, end in ranges for place in self._places(begin, end)]
        copy_missing([(shard, a, b) for shard, a, b in wanted if isinstance(shard, RemoteShard)])

    def _places(self, begin: int, end: int) -> Iterator[tuple[Any, int, int]]:
        """The files that hold these tokens, and where."""
        first = bisect.bisect_right(self._ends, begin)
        for shard, stop in zip(self.shards[first:], self._ends[first:], strict=False):
            start = stop - shard.num_tokens
            if start >= end:
                return
            yield shard, max(begin, start) - start, min(end, stop) - start


class Part(NamedTuple):
    """A source's share of a mixture."""

    name: str
    weight: float  # all parts' sum to 1
    split: TokenSplit


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    tokenizer: Tokenizer
    train: TokenSplit
    validation: TokenSplit

    @property
    def assets(self) -> dict[str, str]:
        """What a checkpoint holds so that the same tokens can be made again."""
        return {"tokenizer": self.tokenizer.to_json()}


def prepare(cfg: Config, tokenizer: Tokenizer | None = None, pod: Pod = ALONE) -> Corpus:
    """Opens the tokenized data set, after making it if this is the first time on this machine.

    Several processes may call it at once: one works, with all cores, and the others wait. With `pod` all processes of
    it must call it, on a folder that they share, and each does its part. What was made before a kill is not made again.
    The tokenizer is the given one, else the file data.tokenizer, else one trained on the train split.

    Raises:
      UserError: the data, the tokenizer, the vocabulary or the cache directory cannot be used, by the key's name.
    """
    if tokenizer is None and cfg.data.tokenizer:
        tokenizer = load_tokenizer(cfg.data.tokenizer)
    if tokenizer:
        _check_vocabulary(tokenizer, cfg)
    dataset = open_set(cfg.data)
    if not this_pod().index:
        dataset.report_skipped()
    cache = run_path(cfg.data.cache_dir, "data.cache_dir")
    folder = cache / f"{cfg.data.dataset.replace('/', '-')}-{digest(dataset.identity)}"
    try:
        corpus = _open_corpus(folder, cfg, tokenizer)
        if corpus is None or pod.count > 1:
            with contextlib.nullcontext() if pod.index else alone_in(folder):
                corpus = _make_corpus(folder, cfg, dataset, tokenizer, pod)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"data.cache_dir = {cfg.data.cache_dir!r}: cannot be used ({reason}); use --config.data.cache_dir=PLACE"
        ) from error
    for name, split in (("train", corpus.train), ("validation", corpus.validation)):
        check_length(split, f"data.{name}_split = {getattr(cfg.data, f'{name}_split')!r}", cfg.model.context_length)
    return corpus


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Makes a folder, and waits until no other command prepares data there."""
    if is_bucket(folder):
        with contextlib.closing(Lease(folder / "lock", wait=True)):
            yield
    else:
        make_folder(folder)
        with locked(folder / "lock"):
            yield


def _check_vocabulary(tokenizer: Tokenizer, cfg: Config) -> None:
    size = tokenizer.vocab_size
    if size > cfg.model.vocab_size:
        raise UserError(
            f"model.vocab_size = {cfg.model.vocab_size}: the tokenizer has {size} ids; use {-(-size // 128) * 128}"
        )


def check_length(split: TokenSplit, key: str, context_length: int) -> None:
    if split.num_tokens < context_length + 1:
        raise UserError(
            f"{key}: holds {split.num_tokens} tokens, fewer than model.context_length + 1 = {context_length + 1}; "
            "use more text or a shorter context"
        )


def digest(value: Any) -> str:
    return _sha256(value)[:12]


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _tokenizer_file(folder: Path, cfg: Config) -> Path:
    return folder / f"tokenizer-{digest([cfg.data.train_split, cfg.model.vocab_size])}.json"


def _tokens_folder(folder: Path, cfg: Config, tokenizer: Tokenizer) -> Path:
    return folder / f"tokens-{digest([cfg.data.train_split, cfg.data.validation_split, tokenizer.fingerprint])}"


def _open_corpus(folder: Path, cfg: Config, tokenizer: Tokenizer | None) -> Corpus | None:
    """Opens what was prepared; None when it is not there or not whole."""
    if tokenizer is None:
        file = _tokenizer_file(folder, cfg)
        if not file.exists():
            return None
        tokenizer = load_tokenizer(file)
    tokens = _tokens_folder(folder, cfg, tokenizer)
    try:
        meta = unsealed((tokens / "meta.json").read_text())
        splits = {name: _open_split(tokens, name, **meta[name]) for name in ("train", "validation")}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return Corpus(tokenizer, **splits)


def _open_split(
    folder: Path,
    name: str,
    num_tokens: int,
    num_bytes: int,
    num_documents: int,
    end_of_text: int,
    dtype: str,
    fingerprint: str,
    files: list[Any] | None = None,
) -> TokenSplit:
    files = files or [[f"{name}.bin", num_tokens]]  # as it was when there was one of each
    kind = RemoteShard if is_bucket(folder) else Shard
    shards: list[Any] = [kind(folder / file, size, dtype) for file, size in files]
    if sum(shard.num_tokens for shard in shards) != num_tokens:
        raise ValueError("truncated")
    return TokenSplit(shards, num_bytes, num_documents, end_of_text, fingerprint)


def _make_corpus(folder: Path, cfg: Config, dataset: Any, tokenizer: Tokenizer | None, pod: Pod) -> Corpus:
    """Makes what is not there: each process of the pod its part, and the first one the rest."""
    is_first = not pod.index
    there = _open_corpus(folder, cfg, tokenizer) if is_first else None
    plan = "" if there or not is_first else _plan(folder, cfg, dataset, tokenizer).name
    if name := pod.from_first(plan):
        file = folder / name / "job.json"
        wait_for(file, pod)
        job, used = Job.read(file), load_tokenizer(file.with_name("tokenizer.json"))
        doing = f"tokens of {cfg.data.dataset}" + (f", process 0 of {pod.count}" if pod.count > 1 else "")
        mine = range(pod.index, len(job.units), pod.count)
        run_units(file, job, used, mine, pod.on_this_host(), doing, is_shown=is_first)
        pod.wait_for_all()
        if is_first:
            _finish(folder / name, job, used, dataset, pod)
        pod.wait_for_all()
        wait_for(folder / name / "meta.json", pod)
    corpus = there or _open_corpus(folder, cfg, tokenizer)
    assert corpus is not None
    return corpus


def wait_for(file: Path, pod: Pod) -> None:
    """Waits until a network's file system shows what another process wrote."""
    for _ in range(_SEEN_AFTER if pod.count > 1 else 1):
        if file.exists():
            return
        if not is_bucket(file):
            os.scandir(file.parent.parent).close()  # has NFS look again
        time.sleep(1)
    raise UserError(
        f"data.cache_dir: {file}, which another process wrote, is not seen by this one; use a folder that all share"
    )


def _plan(folder: Path, cfg: Config, dataset: Any, tokenizer: Tokenizer | None) -> Path:
    """Writes what is to be done, with the tokenizer, into a folder that may hold parts of it from before a kill."""
    splits, units = dataset.splits(cfg.data), dataset.units()
    for name, split in splits.items():
        if split.counts and len(units) > 1:
            given = getattr(cfg.data, f"{name}_split")
            raise UserError(f"data.{name}_split = {given!r}: counts documents, of too many; use a part: train[:10%]")
    places = dataset.places()
    if tokenizer is None:
        tokenizer = make_tokenizer(_tokenizer_file(folder, cfg), cfg, [(dataset, cfg.data, 1.0)])
    tokens = _tokens_folder(folder, cfg, tokenizer)
    job, file = json.dumps(dataclasses.asdict(Job.of(dataset.reading, units, splits, places))), tokens / "job.json"
    if (tokens / "meta.json").exists() or not file.exists() or file.read_text() != job:
        if tokens.exists():
            remove_folder(tokens)
        if not is_bucket(tokens):
            tokens.mkdir()
        replace_file(tokens / "tokenizer.json", tokenizer.to_json())
        replace_file(file, job)
    return tokens


def make_tokenizer(file: Path, cfg: Config, sources: list[tuple[Any, DataConfig, float]]) -> Tokenizer:
    """Trains a tokenizer on the train splits of sets, from each as much as its weight says, unless the file is there.

    Raises:
      UserError: there is no text, or the vocabulary does not fit.
    """
    if file.exists():
        return load_tokenizer(file)

    def texts() -> Iterator[str]:
        for dataset, data, weight in sources:
            units, places, split = dataset.units(), dataset.places(), dataset.splits(data)["train"]
            if len(units) > 1:
                print(f"a tokenizer is trained on {dataset.reading.label}", file=sys.stderr)
            characters = int(_TRAINER_CHARACTERS * weight) // len(units)
            for unit in units:
                for text in split_texts(dataset.reading, unit, places, split, characters):
                    yield from (piece for piece, _ in pieces(text))

    tokenizer = train_tokenizer(texts(), cfg.model.vocab_size)
    _check_vocabulary(tokenizer, cfg)
    replace_file(file, tokenizer.to_json())
    return tokenizer


def _finish(tokens: Path, job: Job, tokenizer: Tokenizer, dataset: Any, pod: Pod) -> None:
    """Makes one corpus of the parts, once all are there: with meta.json, which is written last, it is whole."""
    skipped, parts = Skipped(), []
    for unit in range(len(job.units)):
        records = parts_of(tokens, unit)
        if not records:
            wait_for(tokens / f"{part_name(unit, 0)}.json", pod)
            records = parts_of(tokens, unit)
        for part, record in enumerate(records):
            skipped.add(Skipped(**record["skipped"]))
            parts.append((unit, part, record["splits"]))
    skipped.report(dataset.reading.label)
    meta = {}
    for name in job.splits:
        found = [(token_file(Path(), name, unit, part).name, splits[name]) for unit, part, splits in parts]
        prints = [figures["fingerprint"] for _, figures in found]
        one = prints[0] if len(prints) == 1 else _sha256(prints)
        total = {key: sum(figures[key] for _, figures in found) for key in ("num_tokens", "num_bytes", "num_documents")}
        files = [[file, figures["num_tokens"]] for file, figures in found if figures["num_tokens"]]
        meta[name] = total | {"fingerprint": one[:16], "files": files}
        meta[name] |= {"dtype": token_type(tokenizer), "end_of_text": tokenizer.end_of_text}
    replace_file(tokens / "meta.json", sealed(meta))
    for file in [*tokens.glob("*-*.json"), tokens / "job.json"]:
        file.unlink()
