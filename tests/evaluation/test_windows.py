from collections import Counter
from itertools import pairwise

import jax
import numpy as np
import pytest

from mixtral_jax.config import EvalConfig
from mixtral_jax.evaluation.windows import evaluation_batches, num_batches, num_selected, window_sizes
from tests.evaluation.corpus import BOS, Corpus, random_corpus

MODES = ("packed", "document", "strided")


def numbered(rng: np.random.Generator, documents: int, longest: int) -> Corpus:
    """A corpus in which no token but the signs occurs twice."""
    ends = 10 + np.cumsum(rng.integers(0, longest + 1, documents))
    return Corpus([list(range(begin, end)) for begin, end in zip([10, *ends[:-1]], ends, strict=True)])


def cuts():
    for seed in range(12):
        rng = np.random.default_rng(seed)
        context = int(rng.integers(1, 20))
        for mode in MODES:
            stride = int(rng.integers(1, context + 1))
            eval = EvalConfig(mode, context, stride, batch_size=int(rng.integers(1, 5)))
            yield pytest.param(numbered(rng, 9, 3 * context), eval, id=f"{seed}-{mode}")


@pytest.mark.parametrize(("corpus", "eval"), cuts())
def test_every_token_but_the_first_is_a_target_exactly_once(corpus, eval):
    pairs = Counter()
    for batch in evaluation_batches(corpus, eval, seq_len=7):
        mask = batch.loss_mask
        pairs.update(zip(batch.tokens[mask].tolist(), batch.targets[mask].tolist(), strict=True))
    expected = Counter()
    for index in range(corpus.num_documents):
        document = corpus.tokens(index).tolist()
        expected.update(pairwise(document))
    assert pairs == expected
    assert not any(target == BOS for _, target in pairs)


@pytest.mark.parametrize(("corpus", "eval"), cuts())
def test_batches_have_one_shape_and_segments_are_stretches_of_one_document(corpus, eval):
    places = {token: (index, place) for index in range(corpus.num_documents)
              for place, token in enumerate(corpus.tokens(index).tolist()) if token >= 10}  # fmt: skip
    batches = list(evaluation_batches(corpus, eval, seq_len=7))
    assert len(batches) == num_batches(corpus, eval, seq_len=7)
    for batch in batches:
        assert {name: array.dtype.name for name, array in vars(batch).items() if array is not None} == {
            "tokens": "int32", "targets": "int32", "segment_ids": "int32", "positions": "int32", "loss_mask": "bool",
            "documents": "int32",
        }  # fmt: skip
        assert {array.shape for array in vars(batch).values() if array is not None} == {(eval.batch_size, eval.context)}
        for tokens, segments, positions, mask in zip(
            batch.tokens, batch.segment_ids, batch.positions, batch.loss_mask, strict=True
        ):
            used = int((segments > 0).sum())
            assert not segments[used:].any()
            assert not mask[used:].any()
            assert set(segments[:used]) == set(range(1, segments.max() + 1))
            for segment in range(1, segments.max() + 1):
                here = np.nonzero(segments == segment)[0]
                assert (np.diff(here) == 1).all()
                assert positions[here].tolist() == list(range(len(here)))
                assert len({places[int(token)][0] for token in tokens[here] if token >= 10}) <= 1
                steps = [np.subtract(places[int(token)], (0, offset)).tolist()
                         for offset, token in enumerate(tokens[here]) if token >= 10]  # fmt: skip
                assert all(step == steps[0] for step in steps)


@pytest.mark.parametrize(("corpus", "eval"), [cut for cut in cuts() if "strided" in cut.id])
def test_strided_targets_have_their_context(corpus, eval):
    for batch in evaluation_batches(corpus, eval, seq_len=7):
        for row, column in zip(*np.nonzero(batch.loss_mask), strict=True):
            start = column - batch.positions[row, column]
            whole_history = batch.tokens[row, start] == BOS
            assert whole_history or batch.positions[row, column] + 1 > eval.context - eval.stride


def test_packed_rows_are_the_stream_cut_as_in_training():
    corpus = random_corpus(np.random.default_rng(0), documents=20, longest=30)
    stream = np.concatenate([corpus.tokens(index) for index in range(corpus.num_documents)])
    batches = list(evaluation_batches(corpus, EvalConfig("packed", 16, batch_size=3), seq_len=99))
    rows = np.concatenate([batch.tokens for batch in batches]).reshape(-1)
    segments = np.concatenate([batch.segment_ids for batch in batches]).reshape(-1)
    np.testing.assert_array_equal(rows[: len(stream)], stream)
    assert (segments > 0).sum() == len(stream)
    assert len(batches) == -(-len(stream) // (16 * 3))


def test_document_mode_is_strided_mode_whose_stride_is_the_context():
    corpus = random_corpus(np.random.default_rng(1), documents=20, longest=60)
    document = evaluation_batches(corpus, EvalConfig("document", 16), seq_len=99)
    strided = evaluation_batches(corpus, EvalConfig("strided", 16, stride=16), seq_len=99)
    for left, right in zip(document, strided, strict=True):
        jax.tree.map(np.testing.assert_array_equal, left, right)


def test_a_strided_example_by_hand():
    (batch,) = evaluation_batches(Corpus([[10, 11, 12, 13, 14], [20]]), EvalConfig("strided", 4, 2, 3), seq_len=99)
    assert batch.tokens.tolist() == [[1, 10, 11, 12], [11, 12, 13, 14], [1, 20, 0, 0]]
    assert batch.targets.tolist() == [[10, 11, 12, 13], [12, 13, 14, 2], [20, 2, 0, 0]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 0, 0]]
    assert batch.loss_mask.astype(int).tolist() == [[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0]]


@pytest.mark.parametrize(("mode", "stride"), [("packed", 512), ("document", 512), ("strided", 256)])
def test_zeros_are_resolved(mode, stride):
    assert window_sizes(EvalConfig(mode), seq_len=512) == (512, stride)
    assert window_sizes(EvalConfig(mode, context=1), seq_len=512) == (1, 1)


@pytest.mark.parametrize(("max_tokens", "selected"), [(0, 4), (1, 1), (4, 1), (5, 2), (9, 3), (10, 4), (99, 4)])
def test_the_limit_stops_at_whole_documents(max_tokens, selected):
    corpus = Corpus([[10, 11, 12], [], [13, 14, 15], [16]])  # 4, 1, 4 and 2 targets
    assert num_selected(corpus, max_tokens) == selected
    eval = EvalConfig("document", 3, max_tokens=max_tokens)
    targets = sum(int(batch.loss_mask.sum()) for batch in evaluation_batches(corpus, eval, seq_len=3))
    assert targets == sum([4, 1, 4, 2][:selected])
