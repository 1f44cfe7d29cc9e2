"""Attention on matrix units against the whole float64 matrix of scores: forward, gradients, masks, the same bits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.kernels.attention import attention
from mixtral_jax.kernels.backends import available
from tests import oracles
from tests.tiny import host_threads, mesh_of, packed_ids

pytestmark = pytest.mark.skipif(not available("amx"), reason="the processor has no AMX")
# A number as two of bfloat16 is off by up to 2^-17; gradients of scores are differences, which few keys make small.
# Largest errors, and errors of norms, of these where documents are long and where they are short.
LIMIT, OF_NORM, OF_SHORT = 6e-5, 1.4e-5, 4e-5

DOCUMENTS = {
    "one document": [[100], [100]],
    "packed": [[7, 20, 73], [64, 36]],
    "documents that begin and end with a block": [[32, 32, 36], [64, 32, 4]],
    "padding at the end": [[9, 41], [63]],
    "only padding": [[], [100]],
    "single tokens": [[1] * 100, [99, 1]],
}


@jax.jit
def run(q, k, v, segment_ids, d_out):
    out, pull = jax.vjp(lambda *a: attention(*a, segment_ids, mesh=mesh_of(), backend="amx"), q, k, v)
    return out, *pull(d_out)


def normal(batch, seq, heads, kv_heads, head_dim, seed=0):
    """Queries, keys, values and the output's gradient."""
    rng = np.random.default_rng(seed)
    counts = (heads, kv_heads, kv_heads, heads)
    return [rng.standard_normal((batch, seq, n, head_dim)).astype(np.float32) for n in counts]


def compare(documents, heads, kv_heads, head_dim, limit=OF_NORM):
    seq = max(sum(lengths) for lengths in documents)
    segment_ids, _ = packed_ids(documents, seq)
    q, k, v, d_out = normal(len(documents), seq, heads, kv_heads, head_dim)
    expected, pulled = oracles.value_and_pull(lambda *a: oracles.attention(*a, segment_ids), (q, k, v), d_out)
    found = run(q, k, v, segment_ids, d_out)
    for actual, wanted in zip(found, (expected, *pulled), strict=True):
        assert oracles.error(actual, wanted) < LIMIT
        assert np.linalg.norm(actual - wanted) < limit * np.linalg.norm(wanted)


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (4, 1), (6, 1)])
def test_equals_the_reference(documents, heads, kv_heads):
    compare(DOCUMENTS[documents], heads, kv_heads, 16, OF_SHORT if documents == "single tokens" else OF_NORM)


@pytest.mark.parametrize("head_dim", [2, 8, 64, 80, 128, 162, 256])
def test_equals_the_reference_at_every_head_dimension(head_dim):
    compare([[150, 250, 13], [413]], 2, 1, head_dim)


@pytest.mark.parametrize("length", [2, 17, 31, 32, 33, 64, 65, 513, 1100])
def test_equals_the_reference_at_every_length(length):
    compare([[length]], 2, 1, 8, OF_SHORT if length < 10 else OF_NORM)


def test_one_token_gives_its_value():
    q, k, v, d_out = normal(3, 1, 4, 2, 64)
    out, d_q, d_k, d_v = run(q, k, v, np.ones((3, 1), np.int32), d_out)
    assert oracles.error(out, np.repeat(v, 2, axis=2)) < LIMIT
    assert oracles.error(d_v, d_out.reshape(3, 1, 2, 2, 64).sum(axis=3)) < LIMIT
    assert max(np.abs(d_q).max(), np.abs(d_k).max()) < LIMIT * 64


def test_nothing_flows_from_what_is_not_seen():
    """By gradients: those of one output are zero at later positions and in other documents, and nowhere else."""
    segment_ids, _ = packed_ids([[40, 100, 30]], 180)
    for position, begin in ((5, 0), (39, 0), (40, 40), (72, 40), (139, 40), (169, 140), (175, 170)):
        q, k, v, d_out = normal(1, 180, 2, 1, 8)
        d_out[:, np.arange(180) != position] = 0
        _, d_q, d_k, d_v = run(q, k, v, segment_ids, d_out)
        seen = (np.arange(180) >= begin) & (np.arange(180) <= position)
        for grad in (d_k, d_v):
            np.testing.assert_array_equal(np.any(grad[0], axis=(1, 2)), seen)
        np.testing.assert_array_equal(np.any(d_q[0], axis=(1, 2))[np.arange(180) != position], False)


def test_what_is_not_seen_changes_no_bit():
    segment_ids, _ = packed_ids([[40, 100]], 140)
    q, k, v, d_out = normal(1, 140, 2, 1, 8)
    first = run(q, k, v, segment_ids, d_out)[0]
    for x in (k, v):
        x[:, :40] = 1e4
        x[:, 100:] = -1e4
    np.testing.assert_array_equal(run(q, k, v, segment_ids, d_out)[0][:, 40:100], first[:, 40:100])


def test_large_scores_do_not_overflow():
    q = np.full((1, 50, 1, 8), 1e4, np.float32)
    out, *grads = run(q, q, np.ones_like(q), np.ones((1, 50), np.int32), np.ones_like(q))
    np.testing.assert_allclose(out, 1, rtol=1e-5)
    assert all(np.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_not_finite_stays_so(which, value):
    arrays = normal(1, 70, 2, 1, 8)
    arrays[which][0, 33, 0, 3] = value
    out, *_ = run(*arrays[:3], np.ones((1, 70), np.int32), arrays[3])
    assert not np.isfinite(out[0, 33, 0]).all()
    assert np.isfinite(out[0, :32]).all()


def test_the_same_bits_with_any_number_of_threads():
    """Three tasks of the backward pass add to the same gradients of queries."""
    segment_ids, _ = packed_ids([[1000, 500, 30], [1530]], 1536)
    arrays = normal(2, 1536, 4, 1, 8)
    first = run(*arrays[:3], segment_ids, arrays[3])
    for threads in (1, 2, 3, 7, 7, 7):
        with host_threads(threads):
            again = jax.block_until_ready(run(*(jnp.array(x) for x in arrays[:3]), segment_ids, arrays[3]))
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_long_row():
    """Queries of zero see all keys alike, so cumulative sums give the results."""
    length, head_dim = 32768, 8
    _, k, v, d_out = normal(1, length, 1, 1, head_dim)
    out, d_q, d_k, d_v = run(np.zeros_like(k), k, v, np.ones((1, length), np.int32), d_out)
    k, v, d_out = (x[0, :, 0].astype(np.float64) for x in (k, v, d_out))
    count = np.arange(1, length + 1)[:, None]
    mean = np.cumsum(v, axis=0) / count
    assert oracles.error(out[0, :, 0], mean) < LIMIT
    assert oracles.error(d_v[0, :, 0], np.cumsum((d_out / count)[::-1], axis=0)[::-1]) < LIMIT
    products = np.cumsum(v[:, :, None] * k[:, None, :], axis=0) / count[..., None]
    centred = products - mean[:, :, None] * (np.cumsum(k, axis=0) / count)[:, None, :]
    assert oracles.error(d_q[0, :, 0], np.einsum("sv,svk->sk", d_out, centred) / head_dim**0.5) < LIMIT
    np.testing.assert_array_equal(d_k, 0)


@pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.nothing_saveable], ids=["kept", "recomputed"])
def test_a_scan_of_layers(policy):
    segment_ids, _ = packed_ids([[20, 25]], 45)
    q, k, v, d_out = normal(1, 45, 2, 2, 8)

    def layers(attend, q, k, v):
        body = lambda x, _: (attend(x, k, v, jnp.asarray(segment_ids)) + x, None)  # noqa: E731
        body = jax.checkpoint(body, policy=policy, prevent_cse=False) if policy else body
        return jax.lax.scan(body, q, None, length=3)[0]

    ours = functools.partial(layers, functools.partial(attention, mesh=mesh_of(), backend="amx"))
    out, pull = jax.vjp(jax.jit(ours), q, k, v)
    expected, pulled = oracles.value_and_pull(functools.partial(layers, oracles.attention), (q, k, v), d_out)
    errors = [oracles.error(a, b) for a, b in zip((out, *pull(d_out)), (expected, *pulled), strict=True)]
    assert max(errors) < LIMIT
