import math

import numpy as np
import pytest

from mixtral_jax.config import EvalConfig
from mixtral_jax.evaluation.intervals import MOST_UNITS, bootstrap_sums, interval
from mixtral_jax.evaluation.perplexity import Result, add_up, measure
from tests.evaluation.corpus import Corpus, constant, random_corpus, score_by_history


def test_draws_are_whole_documents_of_each_source():
    strata = [np.array([[1.0, 10.0], [1.0, 20.0], [1.0, 40.0]]), np.array([[1.0, 1000.0], [1.0, 2000.0]])]
    sums = bootstrap_sums(strata, replicates=200)
    assert (sums[:, 0] == 5).all()
    first = {a + b + c for a in (10, 20, 40) for b in (10, 20, 40) for c in (10, 20, 40)}
    assert {value % 1000 for value in sums[:, 1]} <= first
    assert {value // 1000 for value in sums[:, 1]} == {2, 3, 4}
    np.testing.assert_array_equal(sums, bootstrap_sums(strata, replicates=200))


@pytest.mark.parametrize("documents", [400, MOST_UNITS * 3 + 7])
def test_the_spread_is_that_of_the_mean(documents):
    """The standard error of a mean is known; more documents than units are drawn in blocks and give the same."""
    values = np.random.default_rng(0).exponential(size=(documents, 1))
    sums = bootstrap_sums([values], replicates=400)
    assert sums.std() / math.sqrt(documents) == pytest.approx(values.std(), rel=0.15)
    low, high = interval(sums[:, 0] / documents)
    assert low < values.mean() < high


def test_an_interval_leaves_the_same_share_out_at_both_ends():
    values = np.random.default_rng(0).permutation(np.arange(1001.0))
    assert interval(values) == pytest.approx((25, 975))
    assert interval(values, coverage=0.5) == pytest.approx((250, 750))


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        sample = rng.normal(3.0, 1.0, size=(40, 1))
        low, high = interval(bootstrap_sums([sample], replicates=200, seed=trial)[:, 0] / 40)
        hits += low <= 3.0 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_a_result_has_intervals_of_its_three_numbers():
    corpora = [random_corpus(np.random.default_rng(seed), documents=12, longest=30) for seed in range(2)]
    evaluation = measure(score_by_history, [Corpus(c.texts, name=str(n)) for n, c in enumerate(corpora)],
                         EvalConfig("document", 8), 8)  # fmt: skip
    for result in (*evaluation.sources.values(), evaluation.total):
        for stratum in result.documents:
            assert stratum.shape == (12, 3)
        np.testing.assert_allclose(sum(stratum.sum(0) for stratum in result.documents),
                                   [result.tokens, result.bytes, result.nats])  # fmt: skip
        intervals = result.intervals()
        for name, (low, high) in intervals._asdict().items():
            assert low < getattr(result, name) < high
        assert intervals.perplexity == pytest.approx(tuple(math.exp(bound) for bound in intervals.nats_per_token))
        assert intervals == result.intervals()


def test_each_document_gets_its_own_sums():
    corpus = Corpus([[5, 6, 7], [8], [9, 10, 11, 12, 13]])
    whole = measure(score_by_history, [corpus], EvalConfig("packed", 4, batch_size=2), 4).total.documents[0]
    assert whole[:, 0].tolist() == [4, 2, 6]
    assert whole[:, 1].tolist() == [6, 2, 10]
    document = measure(score_by_history, [corpus], EvalConfig("document", 4, batch_size=2), 4).total.documents[0]
    for index, text in enumerate(corpus.texts):
        alone = measure(score_by_history, [Corpus([text])], EvalConfig("document", 4), 4).total
        assert document[index, 2] == pytest.approx(alone.nats)


def test_equal_documents_have_no_spread_and_a_lone_one_no_interval():
    alike = measure(constant(0.5), [Corpus([[5, 6]] * 4)], EvalConfig("document", 4), 4).total
    assert alike.intervals().nats_per_token == pytest.approx((0.5, 0.5))
    lone = measure(constant(0.5), [Corpus([[5, 6]], name="lone")], EvalConfig("document", 4), 4).total
    assert lone.intervals() is None
    assert add_up([alike, lone]).intervals() is None
    assert Result(3, 6, 1.0).intervals() is None
