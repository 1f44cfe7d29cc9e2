import numpy as np
import pytest

from mixtral_jax.config import UserError
from mixtral_jax.evaluation.requests import Request, plan_rows, row_lengths, score_requests
from mixtral_jax.evaluation.scoring import TokenScores, make_scorer
from tests.evaluation.corpus import history_nats, score_by_history
from tests.tiny import mesh_of, tiny_architecture, tiny_config


def random_requests(rng, count, longest):
    sizes = rng.integers(1, longest + 1, count)
    texts = [rng.integers(3, 50, size + 1).tolist() for size in sizes]
    return [Request(text, int(rng.integers(1, len(text) + 1))) for text in texts]


@pytest.mark.parametrize(("context", "multiple", "lengths"), [
    (32, 1, [32]), (64, 1, [64]), (65, 1, [64, 65]), (4096, 1, [64, 256, 1024, 4096]), (300, 1, [64, 256, 300]),
    (264, 3, [66, 258, 264]),
])  # fmt: skip
def test_row_lengths(context, multiple, lengths):
    assert row_lengths(context, multiple) == lengths


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_rows_hold_every_request_once_and_never_overflow(seed, share):
    sizes = np.random.default_rng(seed).integers(1, 301, 200).tolist()
    lengths = row_lengths(300)
    rows = plan_rows(sizes, lengths, share=share)
    assert sorted(index for row in rows for index in row.requests) == list(range(200))
    assert [row.length for row in rows] == sorted((row.length for row in rows), reverse=True)
    for row in rows:
        used = sum(sizes[index] for index in row.requests)
        longest = max(sizes[index] for index in row.requests)
        assert used <= row.length == min(length for length in lengths if length >= longest)
        assert share or len(row.requests) == 1
    if share:  # of random sizes, little room stays empty
        assert sum(sizes) > 0.85 * sum(row.length for row in rows)


@pytest.mark.parametrize("share", [True, False])
def test_answers_are_those_of_a_slow_loop(share):
    requests = random_requests(np.random.default_rng(0), 60, 70)
    shapes, done = set(), []

    def score(batch):
        shapes.add(batch.tokens.shape)
        return score_by_history(batch)

    answers = score_requests(
        score, requests, row_lengths(70), 140, share_rows=share, on_batch=lambda _, count: done.append(count)
    )
    for request, answer in zip(requests, answers, strict=True):
        text = request.tokens
        slow = sum(history_nats(text[:place], text[place]) for place in range(request.scored_from, len(text)))
        assert answer.nats == pytest.approx(slow)
    assert shapes <= {(2, 64), (2, 70), (1, 70)}
    assert sum(done) == 60
    assert min(done) > 0


def test_greedy_means_every_scored_token():
    def score(batch):  # a model that always says 7
        return TokenScores(np.ones(batch.tokens.shape), batch.targets == 7)

    requests = [Request([1, 7, 7], 1), Request([1, 5, 7], 2), Request([1, 7, 5, 7], 1), Request([1, 2], 1)]
    answers = score_requests(score, requests, [8], 16)
    assert [answer.greedy for answer in answers] == [True, True, False, False]


def test_requests_that_share_a_row_do_not_see_each_other_on_a_mesh():
    config = tiny_config(model={"init_std": 0.3})
    requests = random_requests(np.random.default_rng(1), 30, 60)
    results = []
    for mesh, share in (({}, False), ({"fsdp": 2, "context": 2, "tensor": 2}, True)):
        architecture = tiny_architecture(config, mesh_of(**mesh))
        score = make_scorer(architecture)(architecture.init(0))
        answers = score_requests(score, requests, row_lengths(64), 256, share_rows=share)
        results.append([answer.nats for answer in answers])
    np.testing.assert_allclose(results[1], results[0], rtol=1e-4)
    assert len(set(results[0])) == 30


@pytest.mark.parametrize(("requests", "value", "sentence"), [
    ([Request([1] * 10, 1), Request([1] * 40, 1)], 1.0, "the texts: one is 39 tokens long and the context is 32:"),
    ([Request([1, 2], 1)], np.nan, "the model's score of the texts is nan in batch 1: its parameters have diverged"),
])  # fmt: skip
def test_what_cannot_be_scored_is_one_sentence(requests, value, sentence):
    score = lambda batch: TokenScores(np.full(batch.tokens.shape, value), batch.loss_mask)  # noqa: E731
    with pytest.raises(UserError, match=sentence):
        score_requests(score, requests, [32], 64, what="the texts")


def test_no_requests_no_answers():
    assert score_requests(score_by_history, [], [32], 64) == []
