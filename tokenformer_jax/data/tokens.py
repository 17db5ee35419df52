"""The corpus: a tfds data set, tokenized once into flat files.

A split is one stream of ids: <eot> document <eot> document <eot> … <eot>. Every 4 KiB of it have a checksum, which is
compared whenever they are read.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from tokenformer_jax.config import Config
from tokenformer_jax.data.text import (
    LOCAL_SETS,
    Path,
    PublishedSet,
    cause,
)
from tokenformer_jax.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from tokenformer_jax.errors import UserError
from tokenformer_jax.files import local_path, locked, sealed, unsealed

_PIECE = 1 << 20  # characters encoded at once; the encoder takes about 100 bytes of memory a token
_TRAINER_CHARACTERS = 1 << 29  # a BPE of more text than this is no better
_BLOCK = 4096  # bytes of tokens that share a checksum


@dataclasses.dataclass(frozen=True, eq=False)
class TokenSplit:
    """A tokenized split: num_documents documents of num_bytes bytes of UTF-8 in all."""

    tokens: np.ndarray  # [num_tokens] uint16 or uint32, mapped read-only
    num_bytes: int
    num_documents: int
    end_of_text: int
    fingerprint: str  # of the tokens
    checksums: np.ndarray | None = None  # uint32, the CRC-32 of each _BLOCK bytes of tokens

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def read(self, begin: int, end: int) -> np.ndarray:
        """The tokens from `begin` up to `end`.

        Raises:
          UserError: they have changed since they were prepared.
        """
        if self.checksums is not None and begin < end:
            size = _BLOCK // self.tokens.itemsize
            for block in range(begin // size, -(-end // size)):
                if zlib.crc32(self.tokens[block * size : (block + 1) * size].data) != self.checksums[block]:
                    path = getattr(self.tokens, "filename", "tokens")
                    raise UserError(
                        f"{path}: bytes {block * _BLOCK} to {(block + 1) * _BLOCK} have changed since they were "
                        "prepared; delete its folder, and they are prepared anew"
                    )
        return np.asarray(self.tokens[begin:end])


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    tokenizer: Tokenizer
    train: TokenSplit
    validation: TokenSplit

    @property
    def assets(self) -> dict[str, str]:
        """What a checkpoint holds so that the same tokens can be made again."""
        return {"tokenizer": self.tokenizer.to_json()}


def prepare(cfg: Config, tokenizer: Tokenizer | None = None) -> Corpus:
    """Opens the tokenized data set, after making it if this is the first time on this machine.

    Several processes may call it at once: one works, the others wait. The tokenizer is the given one, else the file
    data.tokenizer, else one trained on the train split.

    Raises:
      UserError: the data, the tokenizer, the vocabulary or the cache directory cannot be used, by the key's name.
    """
    if tokenizer is None and cfg.data.tokenizer:
        tokenizer = load_tokenizer(cfg.data.tokenizer)
    if tokenizer:
        _check_vocabulary(tokenizer, cfg)
    dataset = LOCAL_SETS.get(cfg.data.dataset, PublishedSet)(cfg.data)
    if not (jax.distributed.is_initialized() and jax.process_index()):
        dataset.report_skipped()
    cache = local_path(cfg.data.cache_dir, "data.cache_dir")
    folder = cache / f"{cfg.data.dataset.replace('/', '-')}-{_digest(dataset.identity)}"
    try:
        corpus = _open_corpus(folder, cfg, tokenizer)
        if corpus is None:
            folder.mkdir(parents=True, exist_ok=True)
            with locked(folder / "lock"):
                corpus = _open_corpus(folder, cfg, tokenizer) or _make_corpus(folder, cfg, dataset, tokenizer)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"data.cache_dir = {cfg.data.cache_dir!r}: cannot be used ({reason}); use --config.data.cache_dir=PLACE"
        ) from error
    for name, split in (("train", corpus.train), ("validation", corpus.validation)):
        check_length(split, f"data.{name}_split = {getattr(cfg.data, f'{name}_split')!r}", cfg.model.context_length)
    return corpus


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


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def _tokenizer_file(folder: Path, cfg: Config) -> Path:
    return folder / f"tokenizer-{_digest([cfg.data.train_split, cfg.model.vocab_size])}.json"


def _tokens_folder(folder: Path, cfg: Config, tokenizer: Tokenizer) -> Path:
    return folder / f"tokens-{_digest([cfg.data.train_split, cfg.data.validation_split, tokenizer.fingerprint])}"


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
) -> TokenSplit:
    tokens = np.memmap(folder / f"{name}.bin", dtype=dtype, mode="r")
    if len(tokens) != num_tokens:
        raise ValueError("truncated")
    checksums = np.fromfile(_checksum_file(folder, name), np.uint32)
    if len(checksums) != -(-tokens.nbytes // _BLOCK):
        raise ValueError("truncated")
    return TokenSplit(tokens, num_bytes, num_documents, end_of_text, fingerprint, checksums)


def _checksum_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.crc32"


def _make_corpus(folder: Path, cfg: Config, dataset: Any, tokenizer: Tokenizer | None) -> Corpus:
    builder = dataset.build(folder)
    sources = {name: _open_source(builder, cfg, name) for name in ("train", "validation")}

    def texts(name: str, doing: str) -> Iterator[str]:
        return _read_source(sources[name], dataset.text_feature, f"{doing} {cfg.data.dataset} {name}")

    if tokenizer is None:
        tokenizer = train_tokenizer(_sample(texts("train", "tokenizer from")), cfg.model.vocab_size)
        _check_vocabulary(tokenizer, cfg)
        with _atomically(_tokenizer_file(folder, cfg)) as temporary:
            temporary.write_text(tokenizer.to_json(), encoding="utf-8")
    with _atomically(_tokens_folder(folder, cfg, tokenizer)) as temporary:
        temporary.mkdir()
        meta = {name: _write_split(temporary, name, texts(name, "tokens of"), tokenizer) for name in sources}
        (temporary / "meta.json").write_text(sealed(meta))
    corpus = _open_corpus(folder, cfg, tokenizer)
    assert corpus is not None
    return corpus


@contextlib.contextmanager
def _atomically(path: Path) -> Iterator[Path]:
    """Gives a path to write a file or folder at, which takes its name once it is whole. Needs the lock."""
    temporary = path.with_name(f"{path.name}.tmp")
    for leftover in (temporary, path):
        shutil.rmtree(leftover, ignore_errors=True)
    yield temporary
    os.replace(temporary, path)


def _open_source(builder: Any, cfg: Config, name: str) -> Any:
    split = getattr(cfg.data, f"{name}_split")
    try:
        return builder.as_data_source(split)
    except NotImplementedError as error:
        raise UserError(f"data.dataset = {cfg.data.dataset!r}: {cause(error)}; use array_record") from None
    except Exception as error:  # tfds raises ValueError and AssertionError, array_record its own
        raise UserError(
            f"data.{name}_split = {split!r}: cannot be read ({cause(error)}); "
            f"use {' or '.join(builder.info.splits) or 'another data.dataset'}"
        ) from None


def _read_source(source: Any, feature: str, description: str) -> Iterator[str]:
    """The texts of a split, read several at once as long as they are short."""
    start, count = 0, 1
    with tqdm(total=len(source), desc=description, unit="doc", disable=None) as progress:
        while start < len(source):
            texts = [record[feature] for record in source.__getitems__(range(start, min(start + count, len(source))))]
            start += len(texts)
            count = min(64, 2 * count) if sum(map(len, texts)) < 4 * _PIECE else max(1, count // 4)
            progress.update(len(texts))
            for text in texts:
                yield text.decode(errors="replace")


class Piece(NamedTuple):
    text: str
    is_last: bool  # of its document


def _pieces(text: str) -> Iterator[Piece]:
    """Cuts a long text after line ends, where cutting changes next to no token."""
    start = 0
    while start < len(text):
        stop = start + _PIECE
        if stop < len(text):
            stop = text.rfind("\n", start, stop) + 1 or stop
        yield Piece(text[start:stop], stop >= len(text))
        start = stop


def _sample(texts: Iterable[str]) -> Iterator[str]:
    left = _TRAINER_CHARACTERS  # tfds stores documents in random order, so the first are a fair sample
    for text in texts:
        yield from (piece.text for piece in _pieces(text[:left]))
        left -= len(text)
        if left <= 0:
            return


def _write_split(folder: Path, name: str, texts: Iterable[str], tokenizer: Tokenizer) -> dict[str, Any]:
    """Writes the stream of a split's ids, and its checksums. Returns its entry in meta.json."""
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    eot = tokenizer.end_of_text
    num_tokens, num_bytes, num_documents = 1, 0, 0
    content, rest = hashlib.sha256(), b""
    with (folder / f"{name}.bin").open("wb") as stream, _checksum_file(folder, name).open("wb") as checksums:

        def write(ids: list[int]) -> None:
            nonlocal rest
            raw = np.array(ids, dtype).tobytes()
            stream.write(raw)
            content.update(raw)
            rest += raw
            whole = len(rest) // _BLOCK * _BLOCK
            write_checksums(rest[:whole])
            rest = rest[whole:]

        def write_checksums(raw: bytes) -> None:
            sums = [zlib.crc32(raw[start : start + _BLOCK]) for start in range(0, len(raw), _BLOCK)]
            checksums.write(np.array(sums, np.uint32).tobytes())

        write([eot])
        for chunk in _chunks(texts):
            encoded = tokenizer.encode_batch([piece.text for piece in chunk])
            for piece, ids in zip(chunk, encoded, strict=True):
                if piece.is_last:
                    ids.append(eot)
                write(ids)
                num_tokens += len(ids)
                num_bytes += len(piece.text.encode())
                num_documents += piece.is_last
        write_checksums(rest)
    return {
        "dtype": dtype,
        "end_of_text": eot,
        "num_tokens": num_tokens,
        "num_bytes": num_bytes,
        "num_documents": num_documents,
        "fingerprint": content.hexdigest()[:16],
    }


def _chunks(texts: Iterable[str]) -> Iterator[list[Piece]]:
    """Gathers a few MB of pieces: work for all cores in little memory."""
    chunk: list[Piece] = []
    size = 0
    for text in texts:
        for piece in _pieces(text):
            chunk.append(piece)
            size += len(piece.text) + _PIECE // 4096  # so that there are not too many, however short they are
            if size >= 4 * _PIECE:
                yield chunk
                chunk, size = [], 0
    if chunk:
        yield chunk
