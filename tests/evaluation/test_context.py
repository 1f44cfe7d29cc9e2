import numpy as np
import pytest

from mixtral_jax.config import UserError
from mixtral_jax.evaluation.context import context_json, context_lengths, context_table, measure_contexts
from tests.evaluation.corpus import Corpus, constant, history_nats, random_corpus, score_by_history


@pytest.mark.parametrize(("context", "multiple", "lengths"), [
    (256, 1, [16, 32, 64, 128, 256]), (32768, 1, [256, 512, 1024, 2048, 4096, 8192, 16384, 32768]),
    (1000, 1, [31, 62, 125, 250, 500, 1000]), (1000, 8, [24, 56, 120, 248, 496, 1000]),
])  # fmt: skip
def test_lengths(context, multiple, lengths):
    assert context_lengths(context, multiple) == lengths


def test_too_short_a_context_is_a_sentence():
    with pytest.raises(UserError, match=r"eval\.context=31 leaves no shorter context to compare: raise it to 32"):
        context_lengths(31)


@pytest.mark.parametrize("batch_tokens", [1, 100, 1000])
def test_the_same_targets_after_every_context_as_a_slow_loop_finds_them(batch_tokens):
    corpus = random_corpus(np.random.default_rng(0), documents=9, longest=150)
    contexts = [4, 10, 32]
    curve = measure_contexts(score_by_history, corpus, contexts, batch_tokens)
    windows = []
    for index in range(corpus.num_documents):
        document = corpus.tokens(index).tolist()
        for begin in range(0, len(document) - 32, 32):
            windows.append(document[begin : begin + 33])
    assert curve.windows == len(windows) > 10
    assert curve.targets == 4
    # Where each target's stretch begins, by context: 4 tokens score two targets, so that takes two stretches.
    begins = [{29: 26, 30: 26, 31: 28, 32: 28}, dict.fromkeys(range(29, 33), 22), dict.fromkeys(range(29, 33), 0)]
    slow = np.array([
        [sum(history_nats(window[begin:place], window[place]) for place, begin in places.items()) for window in windows]
        for places in begins
    ])  # fmt: skip
    np.testing.assert_allclose(curve.nats, slow)
    np.testing.assert_allclose(curve.nats_per_token(), slow.mean(axis=1) / 4)
    by_position = [sum(history_nats(window[:end], window[end]) for window in windows) for end in range(1, 33)]
    np.testing.assert_allclose(curve.nats_by_position, by_position)
    bins = curve.by_position()
    assert [first for first, *_ in bins] == [1, *[last + 1 for _, last, _ in bins[:-1]]]
    assert bins[-1][1] == 32
    total = sum((last - first + 1) * nats for first, last, nats in bins)
    assert total == pytest.approx(sum(by_position) / len(windows))
    for (low, high), value in zip(curve.intervals(), curve.nats_per_token(), strict=True):
        assert low < value < high


def test_a_limit_takes_the_first_windows():
    corpus = Corpus([list(range(10, 110)), list(range(110, 210))])
    done = []
    curve = measure_contexts(
        constant(1.0), corpus, [16, 32], 64, max_tokens=65, on_windows=lambda _, count: done.append(count)
    )
    assert curve.windows == 3
    assert sum(done) == 6
    assert min(done) >= 0


@pytest.mark.parametrize(("context", "contexts"), [(1000, [31, 62, 125, 250, 500, 1000]), (40, [20, 40])])
def test_every_context_scores_the_same_targets(context, contexts):
    corpus = Corpus([list(range(10, 2100))])
    asked = {}

    def score(batch):
        length = batch.tokens.shape[1]
        for row, column in zip(*np.nonzero(batch.loss_mask), strict=True):
            asked.setdefault(length, []).append(int(batch.targets[row, column]))
            assert length == context or column + 1 > length // 2
        return constant(1.0)(batch)

    curve = measure_contexts(score, corpus, contexts, 3000)
    # Token n of the document is n + 9; the longest context also scores all that comes before the last eighth.
    ends = [target for target in asked.pop(context) if (target - 10) % context >= context - context // 8]
    assert len(ends) == curve.windows * curve.targets
    for length, targets in asked.items():
        assert sorted(targets) == sorted(ends), length
    np.testing.assert_allclose(curve.nats_per_token(), 1)


def test_too_short_documents_and_bad_scores_are_sentences():
    corpus = Corpus([[5] * 20, [6] * 40], name="letters")
    with pytest.raises(UserError, match="source 'letters' has no held-out document of 64 tokens, the longest has 41"):
        measure_contexts(constant(1.0), corpus, [32, 64], 64)
    with pytest.raises(UserError, match="score of source 'letters' is nan in a window of 16 tokens"):
        measure_contexts(constant(np.nan), corpus, [16, 32], 64)


def test_table_and_json():
    corpus = random_corpus(np.random.default_rng(1), documents=9, longest=150)
    curves = {"letters": measure_contexts(score_by_history, corpus, [16, 32], 64)}
    source = context_json(curves)["sources"]["letters"]
    assert [entry["context"] for entry in source["by_context"]] == [16, 32]
    assert all(set(e) == {"context", "nats_per_token", "perplexity", "interval"} for e in source["by_context"])
    assert context_table(curves).row_count == 2
