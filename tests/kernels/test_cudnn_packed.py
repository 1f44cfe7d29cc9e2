"""Packed documents for cuDNN: what it is told, by a stand-in that reads the arrays' memory as cuDNN does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.config import UserError
from mixtral_jax.kernels.gpu import cudnn_packed
from mixtral_jax.kernels.gpu.cudnn_packed import find_documents, packed_attention
from tests import oracles
from tests.tiny import packed_ids

HEADS, KV_HEADS, HEAD_DIM, SEQ = 4, 2, 8, 50
DOCUMENTS = {
    "one document": [[50], [50]],
    "packed": [[7, 20, 23], [50]],
    "many in one row": [[5] * 10, [50]],
    "padding at the end": [[9, 11], [33]],
    "only padding": [[], [50]],
    "single tokens": [[1, 1, 47, 1], [49, 1]],
}


def stand_in(target, shapes, *arrays, places, products, deterministic=False):
    """Forward or backward of the sequences that lengths and offsets name, or of whole rows, out of flat memory."""
    scale = HEAD_DIM**-0.5
    if not places:
        rows = jnp.arange(len(arrays[0]), dtype=jnp.int32)
        places = (jnp.full_like(rows, SEQ),) * 2 + tuple(rows * SEQ * heads * HEAD_DIM for heads in (HEADS, KV_HEADS))

    def compute(*arrays):
        arrays = [np.array(a) for a in arrays]
        lengths, kv_lengths, offsets, kv_offsets = (a.reshape(-1) for a in arrays[-4:])
        results = [np.full(shape, np.nan, np.float32) for shape, _ in shapes]
        memory = [r.swapaxes(1, 2).reshape(-1) if r.ndim == 4 else r for r in results]

        def part(x, heads, start, length):
            return x.reshape(-1)[start : start + length * heads * HEAD_DIM].reshape(length, heads, HEAD_DIM)

        for s, length in enumerate(lengths):
            assert kv_lengths[s] == length
            if s < offsets.size - 1:
                assert offsets[s] <= offsets[s + 1]
            q, k, v = (
                part(x, heads, start[s], length)
                for x, heads, start in zip(
                    arrays, (HEADS, KV_HEADS, KV_HEADS), (offsets, kv_offsets, kv_offsets), strict=False
                )
            )
            for h in range(HEADS):
                g = h // (HEADS // KV_HEADS)
                scores = q[:, h] @ k[:, g].T * scale
                scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
                if target.endswith("Softmax"):
                    total = np.log(np.sum(np.exp(scores), axis=1))
                    memory[1][s, h, :length] = total
                    part(memory[0], HEADS, offsets[s], length)[:, h] = np.exp(scores - total[:, None]) @ v[:, g]
                    continue
                stats, d_out, out = (arrays[3], *(part(x, HEADS, offsets[s], length)[:, h] for x in arrays[4:6]))
                p = np.exp(scores - stats[s, h, :length, None])
                d_scores = p * (d_out @ v[:, g].T - np.sum(d_out * out, axis=1, keepdims=True)) * scale
                part(memory[0], HEADS, offsets[s], length)[:, h] = d_scores @ k[:, g]
                for index, gradient in ((1, d_scores.T @ q[:, h]), (2, p.T @ d_out)):
                    place = part(memory[index], KV_HEADS, kv_offsets[s], length)
                    place[:, g] = gradient if h % (HEADS // KV_HEADS) == 0 else place[:, g] + gradient
        return [
            m.reshape(r.swapaxes(1, 2).shape).swapaxes(1, 2) if r.ndim == 4 else r
            for m, r in zip(memory, results, strict=True)
        ]

    return jax.pure_callback(compute, [jax.ShapeDtypeStruct(*shape) for shape in shapes], *arrays, *places)


def differences(documents):
    segment_ids = jnp.asarray(packed_ids(documents, SEQ)[0])
    rng = np.random.default_rng(0)
    shapes = [(*segment_ids.shape, n, HEAD_DIM) for n in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    q, k, v, d_out = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
    out, pull = jax.vjp(lambda *a: packed_attention(*a, segment_ids), q, k, v)
    expected, expected_grads = oracles.value_and_pull(
        lambda q, k, v: oracles.attention(q, k, v, segment_ids), (q, k, v), d_out
    )
    pairs = zip((out, *pull(d_out)), (expected, *expected_grads), strict=True)
    return [oracles.error(a, b) for a, b in pairs]


@pytest.mark.parametrize("documents", DOCUMENTS)
def test_equals_the_reference(monkeypatch, documents):
    monkeypatch.setattr(cudnn_packed, "_call", stand_in)
    monkeypatch.setattr(cudnn_packed, "_portable", lambda ids, q, k, v: jnp.nan * q)  # there is room
    assert max(differences(DOCUMENTS[documents])) < 2e-6


@pytest.mark.parametrize("documents", DOCUMENTS)
def test_the_call_with_the_least_room_that_is_enough_computes(monkeypatch, documents):
    """Documents of two rows: 2, 4, 11, 3, 2, 6; the number of places of a row is counted as the call runs."""
    called = []

    def watched(target, shapes, *arrays, places, products, deterministic=False):
        results = stand_in(target, shapes, *arrays, places=places, products=products)
        jax.debug.callback(lambda: called.append(places[0].shape[1] if places else 1))
        return results

    monkeypatch.setattr(cudnn_packed, "_call", watched)
    monkeypatch.setattr(cudnn_packed, "_portable", lambda ids, q, k, v: jnp.nan * q)
    monkeypatch.setattr(cudnn_packed, "rooms", lambda seq_len: (1, 2, 6))
    assert max(differences(DOCUMENTS[documents])) < 2e-6
    jax.effects_barrier()
    number = sum(max(1, len(row) + (sum(row) < SEQ and len(row) > 0)) for row in DOCUMENTS[documents])
    assert called == [next(room for room in (1, 2, 6) if number <= 2 * room)] * 2


@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients_are_asked_for_in_one_order_where_that_is_wanted(monkeypatch, deterministic):
    """By every call: XLA's own mark does not reach all of them."""
    asked = []

    def watched(target, shapes, *arrays, places, products, deterministic=False):
        if target.endswith("Backward"):
            asked.append(deterministic)
        return [jnp.zeros(shape, dtype) for shape, dtype in shapes]

    monkeypatch.setattr(cudnn_packed, "_call", watched)
    q = jnp.zeros((1, 64, 1, 8))
    run = lambda q: packed_attention(q, q, q, jnp.ones(q.shape[:2], jnp.int32), deterministic)  # noqa: E731
    jax.eval_shape(lambda q: jax.vjp(run, q)[1](q), q)
    assert asked == [deterministic] * len(cudnn_packed.rooms(64))


@pytest.mark.parametrize("documents", DOCUMENTS)
def test_more_documents_than_there_is_room_for_are_computed_in_blocks(monkeypatch, documents):
    def wrong(target, shapes, *arrays, places, products, deterministic=False):
        return [jnp.full(shape, jnp.nan, dtype) for shape, dtype in shapes]

    monkeypatch.setattr(cudnn_packed, "_call", wrong)
    monkeypatch.setattr(cudnn_packed, "rooms", lambda seq_len: (1,))
    found = differences(DOCUMENTS[documents])
    if documents in ("one document", "only padding"):
        assert np.all(np.isnan(found))  # there is room for these two
    else:
        assert max(found) < 2e-6


def test_rooms_grow_up_to_a_document_of_512_tokens():
    assert cudnn_packed.rooms(512) == cudnn_packed.rooms(8192) == (1, 4, 16)
    assert cudnn_packed.rooms(32768) == (1, 4, 16, 64)
    assert cudnn_packed.rooms(20480) == (1, 4, 16, 40)


@pytest.mark.parametrize("room", [1, 2, 16])
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_documents_are_found_in_order(documents, room):
    segment_ids, _ = packed_ids(DOCUMENTS[documents], SEQ)
    begins = [
        row * SEQ + i for row, ids in enumerate(segment_ids) for i in range(SEQ) if i == 0 or ids[i] != ids[i - 1]
    ]
    lengths, first, number = (np.asarray(a) for a in find_documents(jnp.asarray(segment_ids), room))
    assert lengths.shape == (2 * room,)
    assert number == len(begins)
    ends = [*begins, *[2 * SEQ] * first.size]
    np.testing.assert_array_equal(first, ends[: first.size])
    np.testing.assert_array_equal(lengths, np.diff(ends[: 2 * room + 1]))


@pytest.mark.parametrize(
    ("head_dim", "sentence"),
    [
        (128, r"reaches 2,147,483,647 elements, .* 16 x 32768 x 32 x 128: raise train.microbatches"),
        (20, "takes a model.head_dim of 8 to 256 in steps of 8, not 20: use kernels.attention=blockwise"),
        (264, "not 264: use kernels.attention=blockwise"),
    ],
)
def test_what_cudnn_does_not_take_is_refused(head_dim, sentence):
    shapes = [jax.ShapeDtypeStruct((16, 32768, n, head_dim), jnp.bfloat16) for n in (32, 8, 8)]
    with pytest.raises(UserError, match=sentence):
        jax.eval_shape(packed_attention, *shapes, jax.ShapeDtypeStruct((16, 32768), jnp.int32))
