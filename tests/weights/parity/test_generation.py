"""Texts of uneven prompts, decoded together with a cache: those of transformers' `generate` on the same weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from mixtral_jax.inference.decoding import CHUNK, make_generator
from mixtral_jax.inference.sampling import Sampling
from tests.weights.models import small
from tests.weights.parity.oracle import make_oracle, save
from tests.weights.parity.test_against_transformers import ALL_KINDS, ONE_DEVICE, imported

CONFIG = small(num_experts=8, num_experts_per_tok=2, num_layers=3)
LENGTHS, NEW = (5, 1, CHUNK + 9, 17, 2, CHUNK, 33, 8), 64


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]], list[list[int]]]:
    """A release, prompts, and the tokens that follow them; the others are padding on the left."""
    oracle, directory = make_oracle(CONFIG), tmp_path_factory.mktemp("oracle") / "hf"
    save(oracle, directory)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, CONFIG.vocab_size, length).tolist() for length in LENGTHS]
    longest = max(LENGTHS)
    tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - length) + [1] * length for length in LENGTHS])
    greedy = GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=None, max_new_tokens=NEW)
    found = oracle.generate(tokens, attention_mask=mask, generation_config=greedy)[:, longest:].tolist()
    assert len({token for text in found for token in text}) > 40
    return directory, prompts, found


@pytest.mark.parametrize("mesh", [ONE_DEVICE, ALL_KINDS], ids=["one device", "eight devices"])
def test_texts(expected: tuple[Path, list[list[int]], list[list[int]]], mesh: dict[str, int]) -> None:
    directory, prompts, found = expected
    architecture, arrays = imported(directory, mesh, len(prompts), 16)
    steps = make_generator(architecture)(arrays)(prompts, [Sampling()] * len(prompts), rows=8, slots=max(LENGTHS) + NEW)
    texts: list[list[int]] = [[] for _ in prompts]
    while len(texts[0]) < NEW:
        texts = [text + drawn.tokens for text, drawn in zip(texts, next(steps), strict=True)]
    assert texts == found
