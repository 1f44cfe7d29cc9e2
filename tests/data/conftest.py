"""What several tests of the data use: the real Mixtral tokenizer, and documents without files."""

import random

import numpy as np
import pytest

from mixtral_jax.config import DataConfig
from mixtral_jax.data.splits import Documents
from mixtral_jax.data.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def mixtral():
    return load_tokenizer(DataConfig(tokenizer="mixtral"), 32000)


@pytest.fixture(scope="session")
def make_documents():
    """Builds documents of given lengths: tokens count up from 100 over the buffer, with a gap before each document."""

    def make(lengths, name="made"):
        lengths = np.array(lengths, np.int64)
        starts = np.cumsum(lengths + 3) - lengths
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        buffer = np.arange(100, 100 + int(lengths.sum()) + 3 * len(lengths) + 3)
        return Documents(name, buffer, starts, offsets, 2 * lengths, 1, f"{name} {lengths}")

    return make


@pytest.fixture(scope="session")
def write_corpus():
    """Writes text files of random words and returns their texts in order."""

    def write(directory, words_per_file, seed=0):
        rng = random.Random(seed)
        texts = []
        for number, count in enumerate(words_per_file):
            words = ["".join(rng.choices("abcdefghijklmno é😀", k=rng.randint(1, 9))) for _ in range(count)]
            texts.append(f"doc{number} " + " ".join(words))
            (directory / f"{number:05}.txt").write_text(texts[-1])
        return texts

    return write
