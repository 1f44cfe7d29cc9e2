"""What a user gets wrong in the configuration of prepare, and how it is told."""

import math

import pytest

from mixtral_jax.config import UserError
from mixtral_jax.preparation.report_numbers import balanced_weights
from tests.preparation.inputs import config_for, run

MISTAKES = {
    "no.such_key=1": "there is no key 'no'; the keys are output, sources, ",
    "words=magic": "expected one of",
    "gopher_repetition.duplicate_lines=30": "duplicate_lines is 30.0: it is a share from 0 to 1",
    "gopher_repetition.top_ngrams={2: 3}": "top_ngrams is .* a share from 0 to 1",
    "fineweb.max_duplicate_line_characters=-0.1": "it is a share from 0 to 1",
    "language.keep=[]": "language.keep is empty",
    "temperature=0": "temperature is 0.0: it must be greater than 0",
    "tokenizer=train": "tokenizer=train is not for prepare",
    "executor.kind=slurm": "executor.partition is empty",
    "sources=[{name: a b, path: x}]": "'a b' has other characters",
    "sources=[{name: a, path: x}, {name: a, path: y}]": "names 'a' twice",
    "sources=[{name: a, path: x, language: pl}]": "language.keep drops: add it there",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_mistakes_are_told_in_one_sentence(tmp_path, override):
    with pytest.raises(UserError, match=MISTAKES[override]) as caught:
        config_for(tmp_path, "  - {name: a, path: x}\n", override)
    assert "\n" not in str(caught.value)


def test_missing_files_and_unknown_kinds(tmp_path):
    with pytest.raises(UserError, match=r"cannot find .*nowhere"):
        run(config_for(tmp_path, f"  - {{name: a, path: {tmp_path}/nowhere}}\n"))
    (tmp_path / "a.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"cannot read files such as .*a\.zip"):
        run(config_for(tmp_path, f"  - {{name: a, path: {tmp_path}/a.zip}}\n"))
    with pytest.raises(UserError, match=r"no stop words of 'pl'.*min_stop_words=0"):
        run(config_for(tmp_path, f"  - {{name: a, path: {tmp_path}/a.zip}}\n", "language.keep=[pl]"))


def test_balance_goes_from_natural_shares_to_equal_ones():
    tokens = {"a": 900, "b": 90, "c": 10, "none": 0}
    assert balanced_weights(tokens, 1.0) == pytest.approx({"a": 0.9, "b": 0.09, "c": 0.01})
    assert balanced_weights(tokens, 1e9) == pytest.approx(dict.fromkeys("abc", 1 / 3))
    entropies = []
    for temperature in (1.0, 2.0, 5.0, 50.0):
        weights = balanced_weights(tokens, temperature)
        assert sum(weights.values()) == pytest.approx(1)
        entropies.append(-sum(weight * math.log(weight) for weight in weights.values()))
    assert entropies == sorted(entropies)
