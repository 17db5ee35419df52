import random
import subprocess
import sys

import pytest

from tokenformer_jax.data.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer, tokenizer_from_json, train_tokenizer
from tokenformer_jax.errors import UserError

TEXTS = ["the cat sat on the mat\n" * 3, "def f(x):\n    return x\n", "naïve café, 東京, 🙂"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 300)


def random_text(rng: random.Random) -> str:
    planes = [(0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]
    return "".join(chr(rng.randint(*rng.choice(planes))) for _ in range(rng.randint(0, 60)))


def test_decode_inverts_encode_on_any_text(tokenizer):
    rng = random.Random(0)
    texts = ["", " ", "\n\n  \t", "\x00", f"a{END_OF_TEXT}b", *TEXTS, *(random_text(rng) for _ in range(300))]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert tokenizer.decode(ids) == text
        assert ids == tokenizer.encode(text)


def test_text_that_spells_the_special_token_is_text(tokenizer):
    assert tokenizer.end_of_text == 0
    for same in (tokenizer, tokenizer_from_json(tokenizer.to_json())):
        assert same.end_of_text not in same.encode(f"see {END_OF_TEXT} here")
    assert tokenizer.decode([0]) == END_OF_TEXT


def test_training_is_deterministic_over_processes(tokenizer):
    code = (
        "from tests.test_tokenizer import TEXTS; from tokenformer_jax.data.tokenizer import train_tokenizer; "
        "print(train_tokenizer(TEXTS, 300).fingerprint)"
    )
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert again.stdout.strip() == tokenizer.fingerprint == train_tokenizer(iter(TEXTS), 300).fingerprint
    assert tokenizer.fingerprint != train_tokenizer(TEXTS, 290).fingerprint


def test_json_keeps_everything(tokenizer, tmp_path):
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.vocab_size == tokenizer.vocab_size <= 300
    assert loaded.encode(TEXTS[2]) == tokenizer.encode(TEXTS[2])


def test_a_small_corpus_gives_the_bytes_at_least():
    assert train_tokenizer([], 1000).vocab_size == 257


def test_every_id_lies_below_vocab_size(tokenizer):
    ids = tokenizer.encode_batch([*(chr(i) for i in range(256)), *TEXTS])
    assert max(max(row) for row in ids if row) < tokenizer.vocab_size


def test_another_known_end_of_text_is_found(tokenizer):
    assert tokenizer_from_json(tokenizer.to_json().replace(END_OF_TEXT, "</s>")).end_of_text == 0
    with pytest.raises(UserError, match="ends a text"):
        tokenizer_from_json(tokenizer.to_json().replace(END_OF_TEXT, "<other>"))


def test_wrong_input_names_the_key_and_the_file(tmp_path):
    with pytest.raises(UserError, match=r"model\.vocab_size = 256"):
        train_tokenizer(TEXTS, 256)
    (tmp_path / "bad.json").write_text('{"model": 1}')
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    for name in ("missing.json", "bad.json", "binary.json", ""):
        with pytest.raises(UserError, match=r"data\.tokenizer = .*" + name) as error:
            load_tokenizer(tmp_path / name)
        assert "\n" not in str(error.value)
