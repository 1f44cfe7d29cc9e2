"""Every attention backend against the whole float64 matrix of scores: forward and the three gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.kernels import blockwise
from mixtral_jax.kernels.attention import attention
from tests import oracles
from tests.tiny import mesh_of, packed_ids

DOCUMENTS = {
    "one document": [[50], [50]],
    "packed": [[7, 20, 23], [50]],
    "documents over several blocks": [[3, 45, 2], [40, 10]],
    "documents that end with a block": [[16, 16, 18], [32, 16, 2]],
    "padding at the end": [[9, 11], [33]],
    "only padding": [[], [50]],
    "single tokens": [[1] * 50, [49, 1]],
}


@functools.cache
def compiled(backend: str, block: int):
    """Output and gradients as one compiled function; `block` separates what is compiled under another BLOCK."""

    @jax.jit
    def run(q, k, v, segment_ids, d_out):
        out, pull = jax.vjp(lambda *a: attention(*a, segment_ids, mesh=mesh_of(), backend=backend), q, k, v)
        return out, pull(d_out)

    return run


def compare(backend, segment_ids, heads, kv_heads, head_dim, dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = [(*segment_ids.shape, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    q, k, v, d_out = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    out, grads = compiled(backend, blockwise.BLOCK)(q, k, v, segment_ids, d_out)
    expected, expected_grads = oracles.value_and_pull(
        lambda q, k, v: oracles.attention(q, k, v, segment_ids), (q, k, v), d_out
    )
    return [oracles.error(a, b) for a, b in zip((out, *grads), (expected, *expected_grads), strict=True)]


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 3), (4, 1)])
def test_blockwise_equals_the_reference(monkeypatch, documents, heads, kv_heads):
    monkeypatch.setattr(blockwise, "BLOCK", 32)  # 50 positions: three blocks and a bit
    segment_ids, _ = packed_ids(DOCUMENTS[documents], 50)
    assert max(compare("blockwise", segment_ids, heads, kv_heads, 8)) < 2e-6


def test_blockwise_at_its_own_block_size():
    segment_ids, _ = packed_ids([[400, 121], [200, 300]], 521)
    assert max(compare("blockwise", segment_ids, 2, 1, 8)) < 2e-6


def test_blockwise_in_bfloat16_accumulates_in_float32(monkeypatch):
    monkeypatch.setattr(blockwise, "BLOCK", 32)
    segment_ids, _ = packed_ids(DOCUMENTS["packed"], 50)
    assert max(compare("blockwise", segment_ids, 4, 2, 8, jnp.bfloat16)) < 2e-2


def test_large_scores_do_not_overflow(monkeypatch):
    monkeypatch.setattr(blockwise, "BLOCK", 32)
    q = jnp.full((1, 50, 1, 8), 1e4)
    segment_ids = jnp.ones((1, 50), int)
    out, grads = compiled("blockwise", 16)(q, q, jnp.ones_like(q), segment_ids, jnp.ones_like(q))
    np.testing.assert_allclose(out, 1, rtol=1e-6)
    assert all(np.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("documents", [[[256], [256]], [[100, 56, 100], [200]]], ids=["whole", "packed"])
def test_splash_equals_the_reference(documents):
    """Pallas interprets the TPU's kernel on CPU."""
    segment_ids, _ = packed_ids(documents, 256)
    assert max(compare("splash", segment_ids, 2, 1, 128)) < 2e-6


@pytest.mark.parametrize("part", ["forward", "gradients"])
def test_memory_grows_with_the_length_not_its_square(part):
    def forward(q, k, v, segment_ids):
        return attention(q, k, v, segment_ids, mesh=mesh_of(), backend="blockwise")

    def gradients(*arrays):
        return jax.grad(lambda *a: jnp.sum(forward(*a)), (0, 1, 2))(*arrays)

    def temporaries(length):
        shapes = [jax.ShapeDtypeStruct((1, length, n, 16), jnp.float32) for n in (2, 1, 1)]
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
        function = forward if part == "forward" else gradients
        return jax.jit(function).lower(*shapes, ids).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(32768) < 2.2 * temporaries(16384)
    assert temporaries(32768) < 0.01 * (2 * 32768**2 * 4)
