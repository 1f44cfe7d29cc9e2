"""Decoding with a cache against running the whole text again for every token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.config import UserError
from mixtral_jax.inference.decoding import CHUNK, STEPS, make_generator
from tests.tiny import mesh_of, tiny_architecture, tiny_config

PROMPTS = [[1, 5, 9], [1], [1, *range(3, 60), *range(3, 40)], [1, 7, 7, 7, 8, 8]]
CONFIG = tiny_config(model={"init_std": 0.3})


def greedy_by_whole_texts(architecture, arrays, prompt, new_tokens):
    length = len(prompt) + new_tokens

    @jax.jit
    def logits(tokens):
        model = architecture.bind(arrays)
        positions = jnp.arange(length)[None]
        return model.logits(model(tokens, jnp.ones_like(tokens), positions)[0])[0]

    tokens = np.zeros((1, length), np.int32)
    tokens[0, : len(prompt)] = prompt
    for place in range(len(prompt), length):
        tokens[0, place] = np.asarray(logits(tokens))[place - 1].argmax()
    return tokens[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def expected():
    architecture = tiny_architecture(CONFIG)
    arrays = architecture.init(1)
    return [greedy_by_whole_texts(architecture, arrays, prompt, 21) for prompt in PROMPTS]


@pytest.mark.parametrize("mesh", [{}, {"fsdp": 2, "expert": 2, "tensor": 2}], ids=["one device", "all kinds"])
def test_greedy_equals_running_everything_again(expected, mesh):
    assert len(PROMPTS[2]) > CHUNK
    assert len({token for drawn in expected for token in drawn}) > 10
    architecture = tiny_architecture(CONFIG, mesh_of(**mesh))
    generate = make_generator(architecture)(architecture.init(1))
    drawn = generate(PROMPTS, rows=4, slots=len(PROMPTS[2]) + 21, new_tokens=21)
    assert drawn == expected


def test_it_stops_when_every_text_is_done(expected):
    architecture = tiny_architecture(CONFIG)
    generate = make_generator(architecture)(architecture.init(1))
    drawn = generate(PROMPTS[:2], rows=4, slots=64, new_tokens=60, stopped=lambda tokens: len(tokens) >= 3)
    assert [len(tokens) for tokens in drawn] == [STEPS, STEPS]
    assert drawn == [tokens[:STEPS] for tokens in expected[:2]]


def test_sampling_follows_the_seed_and_the_temperature(expected):
    architecture = tiny_architecture(CONFIG)
    generate = make_generator(architecture)(architecture.init(1))

    def draw(temperature, seed):
        return generate([[1]] * 4, rows=4, slots=40, new_tokens=20, temperature=temperature, seed=seed)

    assert draw(1.0, 0) == draw(1.0, 0) != draw(1.0, 1)
    assert len({tuple(tokens) for tokens in draw(1.0, 0)}) == 4
    assert draw(1e-6, 0) == [expected[1][:20]] * 4


def test_what_decoding_cannot_do_is_said():
    capacity = tiny_config(model={"dispatch": "capacity"})
    with pytest.raises(UserError, match="set it to dropless"):
        make_generator(tiny_architecture(capacity))
    with pytest.raises(UserError, match=r"set mesh\.context=1"):
        make_generator(tiny_architecture(tiny_config(), mesh_of(context=2)))
