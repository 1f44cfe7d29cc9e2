"""Near duplicates are found in every script, also in those that write no spaces between words."""

import random

import numpy as np
import pytest
from datatrove.pipeline.dedup import MinhashDedupSignature

from mixtral_jax.preparation.stages import minhash_settings
from mixtral_jax.preparation.words import RegexWords
from tests.preparation.inputs import config_for
from tests.preparation.pages import TEXTS

SCRIPTS = {
    "zh": "".join(map(chr, range(0x4E00, 0x4E40))),
    "ja": "".join(map(chr, range(0x3042, 0x3093))),
    "th": "".join(map(chr, range(0x0E01, 0x0E2F))),
    "en": "",
    "ru": "",
}


def documents(script: str, draw: random.Random) -> tuple[str, str]:
    """A text of 400 words, or characters, and the same with two others in it."""
    letters = SCRIPTS[script]
    words = list(letters or [word + str(number) for word in TEXTS[script][0].split() for number in range(9)])
    text = draw.choices(words, k=400)
    near = [draw.choice(words) if place in (100, 300) else word for place, word in enumerate(text)]
    join = "" if letters else " "
    return join.join(text), join.join(near)


@pytest.mark.parametrize("script", SCRIPTS)
def test_similar_documents_share_a_bucket_and_others_do_not(tmp_path, script):
    config = config_for(tmp_path, "  - {name: a, path: x}\n")
    step = MinhashDedupSignature(str(tmp_path / "signatures"), minhash_settings(config), RegexWords())
    draw = random.Random(script)
    pairs = [documents(script, draw) for _ in range(20)]
    signed = [[step.get_signature(step.get_shingles(text)) for text in pair] for pair in pairs]

    def share(left: list, right: list) -> bool:
        return any(np.array_equal(*buckets) for buckets in zip(left, right, strict=True))

    assert all(share(*pair) for pair in signed)
    assert not any(share(left, right) for left, _ in signed for right, _ in signed if left is not right)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The boy's well-known dog, 3.5!", ["The", "boy's", "well-known", "dog", ",", "3", ".", "5", "!"]),
        ("我们去。", ["我", "们", "去", "。"]),
        ("Windows用の本", ["Windows", "用", "の", "本"]),
        ("ไปไหน ok", ["ไ", "ป", "ไ", "ห", "น", "ok"]),
        ("가는 날", ["가는", "날"]),
    ],
)
def test_words(text, words):
    assert RegexWords().word_tokenize(text) == words
