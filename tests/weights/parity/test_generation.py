"""Texts of uneven prompts, decoded together with a cache: those of transformers' `generate` on the same weights."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from mixtral_jax.config import DataConfig
from mixtral_jax.data.chat_records import Chat
from mixtral_jax.data.chat_template import ChatTemplate
from mixtral_jax.data.tokenizer import load_tokenizer
from mixtral_jax.inference.decoding import CHUNK, make_generator
from mixtral_jax.inference.sampling import Sampling
from mixtral_jax.model.mixtral import Architecture
from mixtral_jax.weights.exporting import About, export_weights
from tests.weights.models import runtime, small
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


def test_chats_with_an_export(tmp_path: Path) -> None:
    """As a person does it: the tokenizer's template, a padded batch, and `generate` as the export configures it."""
    config, tokenizer = small(vocab_size=32000, init_std=0.3), load_tokenizer(DataConfig(tokenizer="mixtral"), 32000)
    architecture = Architecture(config, runtime(config))
    arrays = architecture.init(3)
    about = About(context=256, load_balance=0.0, tokenizer=tokenizer.model_bytes)
    export_weights(arrays, config, tmp_path / "out", "hf", about)
    chats = [[{"role": "user", "content": text}] for text in ("Hello there", "What is a mixture of experts, and why?")]
    reader = AutoTokenizer.from_pretrained(tmp_path / "out", padding_side="left")
    batch = reader.apply_chat_template(chats, padding=True, return_tensors="pt", return_dict=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    found = model.generate(**batch, max_new_tokens=16, do_sample=False)[:, batch["input_ids"].shape[1] :].tolist()
    known = model.generation_config
    assert (known.bos_token_id, known.eos_token_id, known.pad_token_id) == (1, 2, 0)
    template = ChatTemplate(tokenizer)
    prompts = [template.encode_prompt(Chat(chat)).tolist() for chat in chats]
    (drawn,) = islice(make_generator(architecture)(arrays)(prompts, [Sampling()] * 2, rows=2, slots=64), 1)
    assert [text.tokens for text in drawn] == found
