"""The tokenizer of an export, as transformers reads it, against sentencepiece."""

import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from mixtral_jax.data.tokenizer import Tokenizer, load_tokenizer
from mixtral_jax.weights.hf_tokenizer import tokenizer_files
from tests.tiny import tiny_config
from tests.weights.test_bad_sources import make_tokenizer

TEXTS = [
    "", " ", "  two  spaces ", "\n\n\ttabs\nand lines\n", "The quick brown fox, 1,234.5 kg!", "aaaaaaa baaab",
    "Voilà l'été, ça commence; où êtes-vous? «Bien sûr»", "Über größere Straßen", "¿Qué pasó, señor?", "perché no",
    "漢字かな交じり文 한국어 ไทย עברית", "😀👩‍👩‍👧 e\u0301 \u00a0 nbsp \ufeff",
    "def f(x):\n    return x**2  # done", "▁ mark",
]  # fmt: skip


@pytest.mark.parametrize("name", ["mixtral", "mixtral-v3"])
def test_transformers_encodes_the_same(name: str, tmp_path: Path) -> None:
    ours = load_tokenizer(tiny_config(f"data.tokenizer={name}").data, 32768)
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    ours.save(tmp_path / "tokenizer.model")
    for file, content in tokenizer_files(ours.model_bytes).items():
        (tmp_path / file).write_text(content, encoding="utf-8")
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    draw = random.Random(0)
    alphabet = "".join(TEXTS) + " " * 30 + "etaoinshrdlu" * 5
    texts = TEXTS + ["".join(draw.choices(alphabet, k=draw.randrange(1, 80))) for _ in range(500)]
    for text in texts:
        assert theirs.encode(text) == [ours.bos_id, *ours.encode(text)] or not text, repr(text)
        assert theirs.decode(ours.encode(text)) == ours.decode(ours.encode(text)), repr(text)


def test_a_model_of_another_kind_is_left_to_others() -> None:
    unigram = make_tokenizer(40)
    assert Tokenizer(unigram).vocab_size == 40
    assert tokenizer_files(unigram) == {}
