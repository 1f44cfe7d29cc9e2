"""Attention over sequences that the mesh splits: equal to the whole matrix of scores, forward and gradients."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.config import UserError
from mixtral_jax.kernels import blockwise
from mixtral_jax.kernels.attention import attention
from mixtral_jax.zigzag import chunk_starts, column_order, in_order
from tests import oracles
from tests.tiny import mesh_of, packed_ids

MESHES = [{"context": 2}, {"context": 4}, {"context": 8}, {"data": 2, "context": 2, "tensor": 2}]
DOCUMENTS = {
    "one document": [[64], [64]],
    "packed": [[7, 20, 29], [60, 4]],
    "documents that end with a chunk": [[16, 16, 32], [8, 48]],
    "padding": [[9, 11], []],
}


@functools.cache
def compiled(backend: str, mesh: tuple[tuple[str, int], ...], block: int):
    """Output and gradients, compiled; arrays come and go in the order of the columns."""

    @jax.jit
    def run(q, k, v, segment_ids, d_out):
        out, pull = jax.vjp(lambda *a: attention(*a, segment_ids, mesh=mesh_of(**dict(mesh)), backend=backend), q, k, v)
        return out, pull(d_out)

    return run


def compare(backend, mesh, documents, heads, kv_heads, head_dim, seq_len=64):
    segment_ids, _ = packed_ids(documents, seq_len)
    rng = np.random.default_rng(0)
    shapes = [(*segment_ids.shape, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    q, k, v, d_out = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    order = column_order(seq_len, mesh["context"])
    columns = [a[:, order] for a in (q, k, v, segment_ids, d_out)]
    out, grads = compiled(backend, tuple(mesh.items()), blockwise.BLOCK)(*columns)
    expected, expected_grads = oracles.value_and_pull(
        lambda q, k, v: oracles.attention(q, k, v, segment_ids), (q, k, v), d_out
    )
    pairs = zip((out, *grads), (expected, *expected_grads), strict=True)
    return [oracles.error(a, np.asarray(b)[:, order]) for a, b in pairs]


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("block", [3, 16])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_blockwise_equals_the_reference(monkeypatch, mesh, block, documents):
    monkeypatch.setattr(blockwise, "BLOCK", 2 * block)  # 3 divides no chunk; 16 is more than some chunks hold
    assert max(compare("blockwise", mesh, DOCUMENTS[documents], 4, 2, 8)) < 2e-6


def test_splash_equals_the_reference():
    """Pallas interprets the TPU's kernel on CPU; every device has a mask of its own."""
    assert max(compare("splash", {"context": 2}, [[500, 12], [100, 300, 112]], 2, 1, 128, seq_len=512)) < 2e-6


def test_a_length_that_splash_does_not_take_is_refused():
    with pytest.raises(
        UserError, match=r"multiples of 128 tokens a device, and 384 tokens over mesh.context=2 are not: "
    ):
        compare("splash", {"context": 2}, [[384]], 2, 1, 128, seq_len=384)


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
def test_every_device_holds_two_chunks_with_the_same_work(devices):
    seq_len = 48
    order = column_order(seq_len, devices)
    shares = order.reshape(devices, -1)
    np.testing.assert_array_equal(np.sort(order), np.arange(seq_len))
    assert len({share.sum() for share in shares}) == 1  # keys before the queries
    for me, share in enumerate(shares):
        starts = np.asarray(chunk_starts(seq_len, devices, me))
        np.testing.assert_array_equal(
            share.reshape(starts.size, -1), starts[:, None] + np.arange(seq_len // devices // starts.size)
        )
    np.testing.assert_array_equal(in_order(jnp.asarray(order)[None], devices)[0], np.arange(seq_len))


def lowered(seq_len: int, context: int):
    mesh = mesh_of(context=context)
    shapes = [jax.ShapeDtypeStruct((1, seq_len, n, 16), jnp.float32) for n in (4, 1, 1)]
    ids = jax.ShapeDtypeStruct((1, seq_len), jnp.int32)

    def loss(q, k, v, ids):
        return jnp.sum(attention(q, k, v, ids, mesh=mesh, backend="blockwise"))

    return jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes, ids).compile()


def test_memory_is_linear_and_shared_and_queries_stay_where_they_are():
    whole, program, twice = lowered(16384, 1), lowered(16384, 8), lowered(32768, 8)
    size = lambda compiled: compiled.memory_analysis().temp_size_in_bytes  # noqa: E731
    assert size(twice) < 2.2 * size(program)
    assert size(program) < 0.8 * size(whole)
    gathers = re.findall(r"= (\S+) all-gather\(", program.as_text())
    assert gathers
    assert not any("16384,4,16" in shape for shape in gathers), gathers
