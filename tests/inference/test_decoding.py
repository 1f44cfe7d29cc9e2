"""Decoding with a cache against running the whole text again for every token."""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.config import UserError
from mixtral_jax.inference.decoding import CHUNK, STEPS, Cache, _generate, attend, extend, make_generator
from mixtral_jax.inference.sampling import Sampling
from mixtral_jax.kernels.backends import on_x86
from tests import oracles
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


def draw(architecture, prompts, samplings, *, slots, new_tokens, rows=4):
    """All tokens and log-probabilities that `new_tokens` take."""
    generate = make_generator(architecture)(architecture.init(1))
    found = [([], []) for _ in prompts]
    for step in generate(prompts, samplings, rows=rows, slots=slots):
        for (tokens, log_probs), drawn in zip(found, step, strict=True):
            tokens += drawn.tokens
            log_probs += drawn.log_probs
        if len(found[0][0]) >= new_tokens:
            break
    return [tokens[:new_tokens] for tokens, _ in found], [log_probs[:new_tokens] for _, log_probs in found]


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
    drawn, _ = draw(architecture, PROMPTS, [Sampling()] * 4, slots=len(PROMPTS[2]) + 21, new_tokens=21)
    assert drawn == expected


def test_log_probabilities_are_those_of_the_whole_text(expected):
    architecture = tiny_architecture(CONFIG)
    _, log_probs = draw(architecture, PROMPTS[:1], [Sampling()], slots=40, new_tokens=21)
    tokens = jnp.array([PROMPTS[0] + expected[0]])
    model = architecture.bind(architecture.init(1))
    logits = model.logits(model(tokens, jnp.ones_like(tokens), jnp.arange(tokens.size)[None])[0])[0]
    places = np.arange(len(PROMPTS[0]) - 1, tokens.size - 1)
    np.testing.assert_allclose(log_probs[0], jax.nn.log_softmax(logits)[places, tokens[0, places + 1]], atol=1e-5)


def test_there_is_room_for_what_was_asked(expected):
    architecture = tiny_architecture(CONFIG)
    generate = make_generator(architecture)(architecture.init(1))
    drawn = [step[0].tokens for step in generate(PROMPTS[:1], [Sampling()], rows=1, slots=64)]
    assert len(drawn) * STEPS >= 64 - len(PROMPTS[0])
    assert [token for tokens in drawn for token in tokens][:21] == expected[0]


def test_a_text_depends_on_its_seed_and_on_no_companion():
    architecture = tiny_architecture(CONFIG)
    warm = [Sampling(temperature=1.0, seed=seed) for seed in (0, 1, 2, 0)]
    together, _ = draw(architecture, [[1]] * 4, warm, slots=40, new_tokens=20)
    assert together[0] == together[3]
    assert len({tuple(tokens) for tokens in together}) == 3
    mixed = [Sampling(), warm[1], Sampling(temperature=0.7, top_k=3, repetition_penalty=1.3), warm[0]]
    others, _ = draw(architecture, [PROMPTS[2], [1], [1, 5, 9], [1]], mixed, slots=120, new_tokens=20)
    assert [others[1], others[3]] == [together[1], together[0]]


def test_cold_is_greedy(expected):
    architecture = tiny_architecture(CONFIG)
    cold = [Sampling(temperature=1e-6, seed=seed) for seed in range(4)]
    drawn, _ = draw(architecture, [[1]] * 4, cold, slots=40, new_tokens=20)
    assert drawn == [expected[1][:20]] * 4


MESH = {"data": 2, "expert": 2, "tensor": 2}
MESHES = [
    pytest.param({}, id="one device", marks=pytest.mark.skipif(not on_x86(), reason="the engine is for x86")),
    pytest.param(MESH, id="mesh"),
]


@functools.cache
def one_token(**mesh):
    """A program for final activations and chosen experts of a text's first token, beside rows without a text."""
    architecture = tiny_architecture(CONFIG, mesh_of(**mesh))

    @jax.jit
    def step(arrays):
        token, start = jnp.full((4, 1), 7), jnp.zeros(4, jnp.int32)
        cache = Cache.empty(architecture, 4, 16)
        _, x, experts = extend(architecture.bind(arrays), cache, token, start, jnp.array([1, 0, 0, 0]))
        return x[0, 0], experts[:, 0, 0]

    arrays = architecture.init(1)
    return architecture, arrays, step.lower(arrays).compile()


@pytest.mark.parametrize("mesh", MESHES)
def test_weights_of_chosen_experts_alone_are_read(mesh):
    """An instruction whose result is as large as a layer's experts would read all of them."""
    architecture, arrays, step = one_token(**mesh)
    config, shape = architecture.config, architecture.runtime.mesh.shape
    experts = config.num_experts * config.d_model * config.d_ff // (shape["expert"] * shape["tensor"])
    made = re.findall(r"= f32\[([\d,]+)\]\S* ([\w-]+)\(", step.as_text())
    large = {name for size, name in made if math.prod(map(int, size.split(","))) >= experts}
    assert large <= {"parameter", "get-tuple-element", "bitcast"}

    expected, chosen = step(arrays)
    assert np.isfinite(expected).all()
    moe = dict(arrays["params"]["layers"]["moe"])
    others = np.ones((config.num_layers, config.num_experts), bool)
    np.put_along_axis(others, np.asarray(chosen), values=False, axis=1)
    for name in ("w_gate", "w_up", "w_down"):
        moe[name] = jax.device_put(jnp.where(others[..., None, None], jnp.nan, moe[name]), moe[name].sharding)
    params = arrays["params"]
    broken = {**arrays, "params": {**params, "layers": {**params["layers"], "moe": moe}}}
    np.testing.assert_array_equal(step(broken)[0], expected)


def test_chosen_experts_on_a_mesh_give_what_one_device_gives():
    (_, arrays, one), (_, on_mesh, several) = one_token(), one_token(**MESH)
    np.testing.assert_allclose(one(arrays)[0], several(on_mesh)[0], atol=1e-5)
    np.testing.assert_array_equal(one(arrays)[1], several(on_mesh)[1])


def test_rows_without_a_text_stay_empty():
    """An empty row is active in no program, so that it reaches no expert."""
    seen = []

    def draw(cache, last, seen_tokens, lengths, sampling):
        seen.append(lengths.tolist())
        return cache, last, seen_tokens, np.zeros((4, STEPS), np.int32), np.zeros((4, STEPS), np.float32)

    programs = (lambda rows, slots, seen: (None, None, seen)), (lambda cache, last, *_: (cache, last)), draw
    steps = list(_generate(4, 64, programs, [[1, 5], [1]], [Sampling()] * 2, rows=2, slots=40))
    assert seen == [[2 + STEPS * i, 1 + STEPS * i, 0, 0] for i in range(len(steps))]


def test_what_decoding_cannot_do_is_said():
    capacity = tiny_config(model={"dispatch": "capacity"})
    with pytest.raises(UserError, match="set it to dropless"):
        make_generator(tiny_architecture(capacity))
    with pytest.raises(UserError, match=r"set mesh\.context=1"):
        make_generator(tiny_architecture(tiny_config(), mesh_of(context=2)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_over_slots_equals_float64_for_any_batch_and_heads(dtype):
    """In two-byte types XLA for CPU ended at batches of two: their products had no implementation."""
    for batch, seq, kv_heads, slots in itertools.product((1, 2, 3), (1, 5), (1, 2, 4), (8, 24)):
        rng = np.random.default_rng(batch)
        shapes = (batch, seq, 4, 8), (batch, kv_heads, slots, 8), (batch, kv_heads, slots, 8)
        q, keys, values = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
        visible = np.arange(slots) <= np.arange(seq)[:, None] + np.arange(batch)[:, None, None]
        found = jax.jit(attend, static_argnums=4)(q, keys, values, jnp.asarray(visible), "cpu")
        exact = [np.asarray(x, np.float64) for x in (q, keys, values)]
        k, v = (np.repeat(x, 4 // kv_heads, axis=1) for x in exact[1:])
        scores = np.einsum("bshd,bhtd->bhst", exact[0], k) / np.sqrt(8)
        weights = np.where(visible[:, None], np.exp(scores), 0)
        expected = np.einsum("bhst,bhtd->bshd", weights / weights.sum(axis=-1, keepdims=True), v)
        assert oracles.error(found, expected) < (1e-6 if dtype == "float32" else 0.005)
