"""Byte-level BPE, through the `tokenizers` library."""

import functools
import hashlib
import itertools
import pathlib
import re
import sys
from collections.abc import Iterable, Iterator, Sequence

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from tokenformer_jax.errors import UserError
from tokenformer_jax.files import run_path

END_OF_TEXT = "<|endoftext|>"
_KNOWN_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
_SMALLEST = 257  # END_OF_TEXT and the 256 bytes
_LONGEST_WORD = 1000  # characters; training takes the square of a word's length
# What the BPE sees as a word lies within one of these: letters and numbers, white space, and all else.
_RUN = re.compile(r"[^\W_]+|\s+|(?:[^\w\s]|_)+")


class Tokenizer:
    """Text to ids and back. Text never encodes to a special token, even where it spells one out.

    Raises:
      UserError: none of the vocabulary's tokens is known to end a text.
    """

    def __init__(self, bpe: tokenizers.Tokenizer, source: str = "tokenizer"):
        bpe.no_truncation()  # a tokenizer.json may ask for both; a corpus wants neither
        bpe.no_padding()
        bpe.encode_special_tokens = True  # not saved in the JSON
        self._bpe = bpe
        ends = [bpe.token_to_id(token) for token in _KNOWN_ENDS]
        found = next((end for end in ends if end is not None), None)
        if found is None:
            raise UserError(f"{source}: has no token that ends a text; use one with {' or '.join(_KNOWN_ENDS)}")
        self.end_of_text: int = found

    @functools.cached_property
    def vocab_size(self) -> int:
        """One above the largest id: the rows that an embedding needs at least."""
        return 1 + max(self._bpe.get_vocab(with_added_tokens=True).values())

    @functools.cached_property
    def fingerprint(self) -> str:
        """Names this tokenizer: equal for equal ones, on any machine."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]

    def encode(self, text: str) -> list[int]:
        return self._bpe.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encodes on all cores."""
        return [encoding.ids for encoding in self._bpe.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Special tokens show as they are spelled; bytes that are no UTF-8 show as U+FFFD."""
        return self._bpe.decode(list(ids), skip_special_tokens=False)

    def continuation(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """The text that `ids` add to that of the ids before them.

        Not what they decode to alone: a tokenizer may drop the space in front of a text's first word, and a character's
        bytes may be spread over both.
        """
        first, whole = self.decode(before), self.decode([*before, *ids])
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, whole, strict=False))
        return whole[sum(1 for _ in same) :]

    def to_json(self) -> str:
        """The text of a `tokenizer.json`."""
        return self._bpe.to_str()


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a BPE over all 256 bytes, so that decode(encode(text)) == text for any text; END_OF_TEXT has id 0.

    Deterministic. A small corpus gives fewer than `vocab_size` tokens. Words of more than 1,000 characters are cut
    beforehand, and a line on stderr says how many.

    Raises:
      UserError: `vocab_size` has no room for the bytes.
    """
    if vocab_size < _SMALLEST:
        raise UserError(f"model.vocab_size = {vocab_size}: must be at least {_SMALLEST}, the bytes and {END_OF_TEXT}")
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    cut_words = 0

    def parts() -> Iterator[str]:
        nonlocal cut_words
        for text in texts:
            cuts, words = _cuts(text)
            cut_words += words
            yield from (text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)]))

    bpe.train_from_iterator(parts(), trainer)
    if cut_words:
        words = f"{cut_words:,} word{'s' * (cut_words > 1)} of more than {_LONGEST_WORD:,} characters"
        print(f"tokenizer: cut {words} to train on", file=sys.stderr)
    return Tokenizer(bpe)


def _cuts(text: str) -> tuple[list[int], int]:
    """Where to cut a text so that no word in it is too long, and how many words that cuts."""
    half = _LONGEST_WORD // 2  # a long run goes from one multiple of this to the next, at least
    ends = (_RUN.match(text, start, start + half + 1) for start in range(0, len(text), half))
    if not any(run and run.end() - run.start() > half for run in ends):
        return [], 0
    long = [run.span() for run in _RUN.finditer(text) if run.end() - run.start() > _LONGEST_WORD]
    return [cut for start, end in long for cut in range(start + _LONGEST_WORD, end, _LONGEST_WORD)], len(long)


def load_tokenizer(path: str | pathlib.Path) -> Tokenizer:
    """Reads a `tokenizer.json` of Hugging Face's `tokenizers`, such as GPT-NeoX-20B's.

    Raises:
      UserError: the file is missing, unreadable or no tokenizer.
    """
    source = f"data.tokenizer = {str(path)!r}"
    try:
        text = run_path(path, "data.tokenizer").read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UserError(f"{source}: cannot be read ({reason}); use a tokenizer.json") from None
    return tokenizer_from_json(text, source)


def tokenizer_from_json(text: str, source: str = "tokenizer") -> Tokenizer:
    """The inverse of `Tokenizer.to_json`; `source` is what an error names.

    Raises:
      UserError: the text is no tokenizer.
    """
    try:
        bpe = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{source}: not a tokenizer ({error}); use a tokenizer.json") from None
    return Tokenizer(bpe, source)
