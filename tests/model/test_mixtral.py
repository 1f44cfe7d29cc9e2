"""The whole decoder: who can see whom, what packing, depth and recomputation may not change, and sizes."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.config_loading import load_config, replace
from mixtral_jax.model.layers import RMSNorm, embed, rotary_tables, rotate
from mixtral_jax.model.mixtral import Architecture
from mixtral_jax.precision import make_precision
from mixtral_jax.runtime import make_runtime
from tests import oracles
from tests.tiny import mesh_of, packed_ids, tiny_architecture, tiny_batch, tiny_config, tiny_trainable

SEQ = 32
DISPATCH = {"dropless": {"dispatch": "dropless"}, "tight": {"dispatch": "capacity", "capacity_factor": 0.5}}


@functools.cache
def architecture(**model) -> Architecture:
    return tiny_architecture(tiny_config(model={"init_std": 0.3, **model}))


@functools.cache
def initial():
    return architecture().init(0)


@functools.cache
def compiled_model(**model):
    """(arrays, tokens, segment_ids, positions) -> final activations and logits, compiled."""

    @jax.jit
    def run(arrays, tokens, segment_ids, positions):
        bound = architecture(**model).bind(arrays)
        x, _ = bound(tokens, segment_ids, positions)
        return x, bound.logits(x)

    return run


def one_row(documents: list[int]):
    return [jnp.asarray(ids) for ids in packed_ids([documents], SEQ)]


@pytest.mark.parametrize("across", [False, True], ids=["documents apart", "across documents"])
@pytest.mark.parametrize("dispatch", DISPATCH)
def test_a_gradient_reaches_the_earlier_tokens_of_the_document_and_no_other(dispatch, across):
    """Every token is its own word, so the embedding's rows are the positions."""
    model = DISPATCH[dispatch] | {"attend_across_documents": across}
    arrays, tokens = initial(), jnp.arange(SEQ, dtype=jnp.int32)[None]
    segment_ids, positions = one_row([9, 14, 5])  # and four of padding

    def activations(embedding):
        changed = {**arrays, "params": {**arrays["params"], "embedding": embedding}}
        return compiled_model(**model)(changed, tokens, segment_ids, positions)[0]

    pull = jax.jit(lambda embedding, d: jax.vjp(activations, embedding)[1](d)[0])
    direction = jax.random.normal(jax.random.key(1), (SEQ, 32))
    reach = np.zeros((SEQ, SEQ), bool)
    for t in range(SEQ):
        d_out = jnp.zeros((1, SEQ, 32)).at[0, t].set(direction[t])
        reach[t] = np.any(np.asarray(pull(arrays["params"]["embedding"], d_out))[:SEQ] != 0, axis=-1)
    ids = np.asarray(segment_ids[0]) > 0 if across else np.asarray(segment_ids[0])
    expected = np.tril(ids[:, None] == ids[None, :])
    np.testing.assert_array_equal(reach, expected)


@pytest.mark.parametrize("dispatch", DISPATCH)
def test_another_later_token_changes_no_earlier_logit(dispatch):
    """Routing is a choice without a gradient: a later token must not take an earlier one's place in an expert."""
    model = DISPATCH[dispatch]
    arrays, run = initial(), compiled_model(**model)
    tokens = jax.random.randint(jax.random.key(2), (1, SEQ), 0, 64)
    ids = one_row([SEQ])
    before = run(arrays, tokens, *ids)[1]
    after = run(arrays, tokens.at[:, SEQ // 2 :].set(63 - tokens[:, SEQ // 2 :]), *ids)[1]
    np.testing.assert_allclose(before[:, : SEQ // 2], after[:, : SEQ // 2], rtol=0, atol=1e-5)
    assert np.abs(np.asarray(before - after)[:, SEQ // 2 :]).max() > 0.1


def test_a_document_gives_the_same_logits_alone_and_packed():
    arrays, run = initial(), compiled_model()
    tokens = jax.random.randint(jax.random.key(3), (1, SEQ), 0, 64)
    packed = run(arrays, tokens, *one_row([6, 15, 8]))[1]
    for start, length in ((0, 6), (6, 15), (21, 8)):
        alone = run(arrays, jnp.roll(tokens, -start, axis=1), *one_row([length]))[1]
        assert oracles.error(alone[:, :length], packed[:, start : start + length]) < 1e-5


def test_the_program_does_not_grow_with_depth():
    def lines(num_layers):
        trainable = tiny_trainable(tiny_config(model={"num_layers": num_layers}))
        state, batch = trainable.abstract(), jax.eval_shape(lambda: tiny_batch(trainable.config))
        return len(trainable.step.lower(state, batch).as_text().splitlines())

    assert lines(2) == lines(8)


def test_recomputation_changes_memory_and_no_gradient():
    gradients, programs = {}, {}
    for remat in ("none", "dots", "full"):
        config = tiny_config(train={"remat": remat})
        arch = tiny_architecture(config)
        batch = jax.tree.map(jnp.asarray, tiny_batch(config))

        def loss(arrays, arch=arch, batch=batch):
            model = arch.bind(arrays)
            x, _ = model(batch.tokens, batch.segment_ids, batch.positions)
            return jnp.mean(jnp.square(model.logits(x)))

        program = jax.jit(jax.grad(loss)).lower(initial()).compile()
        gradients[remat] = program(initial())
        programs[remat] = program.memory_analysis().temp_size_in_bytes
    for remat in ("dots", "full"):
        errors = jax.tree.map(oracles.error, gradients[remat]["params"], gradients["none"]["params"])
        assert max(jax.tree.leaves(errors)) < 1e-5, remat
    assert programs["full"] < programs["dots"] < programs["none"]


@pytest.mark.parametrize(
    ("name", "total"), [("small", 214_213_120), ("mixtral_8x7b", 46_702_792_704), ("mixtral_8x22b", 140_620_634_112)]
)
def test_shipped_configs_have_the_parameters_of_the_released_models(name, total):
    config = load_config(Path(__file__).parents[2] / "configs" / f"{name}.yaml")
    runtime = make_runtime(replace(config, mesh={"fsdp": 1, "expert": 1}), mesh_of())
    params = Architecture(config.model, runtime).abstract()["params"]
    assert sum(x.size for x in jax.tree.leaves(params)) == total


@pytest.mark.parametrize("width", [32, 1024])
def test_initial_values_have_the_declared_spread(width):
    config = tiny_config(model={"num_layers": 8, "d_model": width, "head_dim": width // 4})
    params = tiny_architecture(config).init(0)["params"]
    narrow = 0.02 / (2 * 8) ** 0.5
    expected = {"wo": narrow, "w_down": narrow, "router": 0.02 if width == 32 else 0.005}
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        name = path[-1].key
        if name == "scale":
            assert np.all(x == 1)
            continue
        assert abs(np.std(x) / expected.get(name, 0.02) - 1) < 0.1, path
        assert path[0].key != "layers" or np.std(np.asarray(x)[0] - np.asarray(x)[1]) > 0, "layers share their values"


def test_rotary_embedding_turns_the_halves_against_each_other():
    head_dim, theta = tiny_config().model.head_dim, tiny_config().model.rope_theta
    positions = np.array([[0, 1, 2, 30000]])
    x = np.random.default_rng(0).standard_normal((1, 4, 3, head_dim))
    angle = positions[..., None] * theta ** (-np.arange(4) * 2 / head_dim)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angle)[:, :, None]
    actual = rotate(jnp.asarray(x, jnp.float32), *rotary_tables(jnp.asarray(positions), tiny_config().model))
    np.testing.assert_allclose(actual[:, :3], np.concatenate([turned.real, turned.imag], -1)[:, :3], atol=1e-6)
    # Angles near 30000 have steps of 0.002 in float32.
    np.testing.assert_allclose(actual, np.concatenate([turned.real, turned.imag], -1), atol=5e-3)


def test_rotary_scores_depend_on_distance_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    at = lambda x, p: rotate(x, *rotary_tables(jnp.array([[p]]), tiny_config().model))  # noqa: E731
    scores = [jnp.sum(at(q, start + 5) * at(k, start)) for start in (0, 3, 100)]
    np.testing.assert_allclose(scores, scores[0], atol=1e-4)
    assert abs(jnp.sum(at(q, 4) * at(k, 0)) - scores[0]) > 1e-2


def test_rms_norm_divides_by_the_root_mean_square():
    config = tiny_config()
    norm = RMSNorm(32, 1e-5, make_precision(config.precision))
    scale = np.linspace(0.5, 2, 32, dtype=np.float32)
    norm.scale[...] = scale
    x = np.random.default_rng(0).standard_normal((5, 32)) * [[1], [1e-3], [1e3], [0], [1]]
    expected = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5) * scale
    np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32)), expected, rtol=2e-6, atol=1e-7)


def test_rms_norm_measures_in_float32_and_returns_the_compute_type():
    norm = RMSNorm(4096, 1e-5, make_precision(tiny_config(precision={"compute": "bfloat16"}).precision))
    y = norm(jnp.full((1, 4096), 3, jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(y, np.float32), 1)


def test_a_word_seen_often_keeps_its_whole_gradient_in_bfloat16():
    """A sum of a thousand equal terms stalls at 256 of them when it is kept in bfloat16."""
    config = tiny_config(precision={"compute": "bfloat16"}, data={"seq_len": 1024})
    runtime = make_runtime(config, mesh_of())
    tokens = jnp.full((1, 1024), 3, jnp.int32)
    slope = jax.grad(lambda table: jnp.sum(embed(table, tokens, runtime).astype(jnp.float32)))(jnp.zeros((64, 32)))
    np.testing.assert_array_equal(slope[3], 1024)
