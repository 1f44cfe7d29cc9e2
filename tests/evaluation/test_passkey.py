import numpy as np
import pytest

from mixtral_jax.config import UserError
from mixtral_jax.data.tokenizer import Tokenizer, load_tokenizer
from mixtral_jax.evaluation.passkey import PasskeyPlan, measure_passkey, passkey_lengths, passkey_request
from mixtral_jax.evaluation.requests import row_lengths, score_requests
from mixtral_jax.evaluation.scoring import TokenScores
from tests.tiny import tiny_config
from tests.weights.test_bad_sources import make_tokenizer


@pytest.fixture(scope="module")
def released() -> Tokenizer:
    return load_tokenizer(tiny_config("data.tokenizer=mixtral").data, 32000)


def score_that_reads(tokenizer, blind_before=0):
    """Knows a key if its digits stand in the text after the first `blind_before` tokens."""

    def score(batch):
        nats, greedy = np.full(batch.tokens.shape, 9.0), np.zeros(batch.tokens.shape, bool)
        for row, column in zip(*np.nonzero(batch.loss_mask), strict=True):
            here = batch.segment_ids[row] == batch.segment_ids[row, column]
            text = batch.tokens[row, here]
            place = batch.positions[row, column]
            key = tokenizer.decode(np.append(text, batch.targets[row, here][-1])).split()[-1]
            found = key in tokenizer.decode(text[blind_before : max(0, place - 15)])
            greedy[row, column], nats[row, column] = found, 0.0 if found else 9.0
        return TokenScores(nats, greedy)

    return score


def asked(score):
    """Answers requests as a model that scores batches so."""
    return lambda requests: score_requests(score, requests, row_lengths(256), 512)


@pytest.mark.parametrize("depth", [0.0, 0.37, 1.0])
@pytest.mark.parametrize("length", [140, 500])
def test_a_text_has_its_length_its_key_at_its_depth_and_asks_for_it(released, length, depth):
    request = passkey_request(released, length, depth, "40817")
    assert len(request.tokens) == length + 1
    assert request.tokens[0] == released.bos_id
    text = released.decode(request.tokens)
    assert text.startswith("There is a pass key")
    assert text.endswith("The pass key is 40817")
    assert text.count("40817") == 3
    assert released.decode(request.tokens[request.scored_from :]).strip() == "40817"
    before = text.index("The pass key is 40817")
    filler = [place for place in range(len(text)) if text.startswith("grass", place)]
    if length == 500:
        assert np.mean([place < before for place in filler]) == pytest.approx(depth, abs=0.1)


def test_lengths_end_where_no_key_fits(released):
    lengths = passkey_lengths(released, 1024)
    assert lengths == [128, 256, 512, 1024]
    with pytest.raises(UserError, match=r"a context of 64 tokens is too short for a passkey, which takes \d+"):
        passkey_lengths(released, 64)


def test_the_grid_says_where_keys_are_found(released):
    plan = PasskeyPlan([128, 256], 0, (0.0, 0.5, 1.0), 2)
    grid = measure_passkey(asked(score_that_reads(released)), released, plan)
    assert grid.accuracy.shape == (2, 3)
    assert (grid.accuracy == 1).all()
    assert (grid.nats_per_token == 0).all()
    plan = PasskeyPlan([128, 256], 0, (0.0, 1.0), 2)
    blind = measure_passkey(asked(score_that_reads(released, 120)), released, plan)
    assert blind.accuracy.tolist() == [[0, 0], [0, 1]]
    assert blind.nats_per_token.tolist() == [[9, 9], [9, 0]]


def test_a_tokenizer_without_digits_is_refused():
    letters = Tokenizer(make_tokenizer(40))
    with pytest.raises(UserError, match="cannot tell the ten digits apart"):
        measure_passkey(asked(score_that_reads(letters)), letters, PasskeyPlan([128], 0))
