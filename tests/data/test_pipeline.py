"""Batches as a function of the step: order, weights, hosts, epochs, and the one entry to all of it."""

import os
from collections import Counter

import jax
import numpy as np
import pytest

from mixtral_jax.config import Config, DataConfig, ModelConfig, SourceConfig, TrainConfig, UserError
from mixtral_jax.config_loading import replace
from mixtral_jax.data import pipeline
from mixtral_jax.data.pipeline import TrainingData, open_documents
from mixtral_jax.data.row_order import choose_sources, place_of_row, rows_dealt, shuffled_rows


def config(weights=(1.0,), batch_size=8, seq_len=16, seed=0):
    sources = [SourceConfig(name=f"s{index}", path="x", weight=float(w)) for index, w in enumerate(weights)]
    return Config(
        seed=seed, data=DataConfig(sources=sources, seq_len=seq_len), train=TrainConfig(batch_size=batch_size, steps=1)
    )


@pytest.fixture
def three(make_documents):
    lengths = [[40] * 20, [7] * 304, [992]]  # whole rows of 16
    return [make_documents(each, f"s{number}") for number, each in enumerate(lengths)]


def equal(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_an_epoch_shows_every_target_once_and_the_next_one_in_another_order(make_documents):
    documents = make_documents([5, 30, 17, 200, 9])
    data = TrainingData(config(batch_size=4), [documents])
    rows = -(-(documents.num_tokens - 1) // 16)
    assert rows % 4 == 1  # epochs end inside of batches
    stream = np.concatenate([np.where(b.loss_mask, b.targets, 0) for b in map(data.batch, range(rows))])
    expected = Counter(token for index in range(5) for token in documents.tokens(index)[1:].tolist())
    epochs = [stream[number * rows : (number + 1) * rows] for number in range(4)]
    for epoch in epochs:
        assert Counter(epoch[epoch > 0].tolist()) == expected
    assert len({epoch.tobytes() for epoch in epochs}) == 4


def tokens_of(data, steps):
    """Counts what is no padding, by source."""
    counts = np.zeros(len(data.source_names), int)
    for step in range(steps):
        np.add.at(counts, data.sources(step)[0], (data.batch(step).segment_ids > 0).sum(axis=1))
    return counts


@pytest.mark.parametrize("seed", range(3))
def test_progress_says_what_the_batches_held_without_padding(make_documents, seed):
    lengths = [[40] * 20, [7] * 30, [5], [18], [15, 3]]
    documents = [make_documents(length, f"s{number}") for number, length in enumerate(lengths)]
    data = TrainingData(config((3, 2, 1, 1, 0.5), seed=seed), documents)
    for steps in (1, 2, 7, 40):
        tokens = tokens_of(data, steps)
        said = data.progress(steps)
        assert "skipped_batches" not in said
        for number, count in enumerate(tokens):
            assert said[f"tokens_seen/s{number}"] == count
            assert said[f"share/s{number}"] == count / tokens.sum()
            # An epoch is a time through the text, also where a row holds it several times.
            total = sum(lengths[number])
            assert said[f"epoch/s{number}"] == pytest.approx(count / total, abs=16 / total)


def test_batches_that_are_left_out_are_neither_taken_nor_counted(make_documents):
    documents = [make_documents([40] * 20, "a"), make_documents([7] * 30, "b")]
    data, whole = (TrainingData(config((3, 2)), documents) for _ in range(2))
    data.skip(2, 4)
    data.skip(data.number_of(2), data.number_of(2) + 1)  # from where the last ones end
    data.skip(data.number_of(6), data.number_of(8))
    taken = [0, 1, 5, 6, 7, 8, 11, 12, 13]
    for step, number in enumerate(taken):
        equal(data.batch(step), whole.batch(number))
        said = data.progress(step + 1)
        for source, count in enumerate(tokens_of(data, step + 1)):
            assert said[f"tokens_seen/{'ab'[source]}"] == count
        assert said["epoch/a"] == whole.progress(number + 1)["epoch/a"]
        assert said.get("skipped_batches", 0) == number - step
    assert data.progress(0)["tokens_seen/a"] == 0
    data.skip(1, 15)  # from before all of them, as after a checkpoint that was lost
    assert [data.number_of(step) for step in range(3)] == [0, 15, 16]


@pytest.mark.parametrize("short", [[6], [6, 5], [300], [513], [700]])
def test_a_weight_is_a_share_of_the_tokens_and_padding_is_none(make_documents, short):
    documents = [make_documents([5000] * 20, "long"), make_documents(short, "short")]
    data = TrainingData(config((1, 1), seq_len=512), documents)
    long, little = tokens_of(data, 200)
    assert little / (long + little) == pytest.approx(0.5, abs=0.01)
    mean = (long + little) / (200 * 8 * 512)  # of all places
    assert mean > 0.5, "most of a batch is padding"


def test_a_source_shorter_than_a_row_fills_it(make_documents):
    data = TrainingData(config(batch_size=1, seq_len=64), [make_documents([6, 5])])
    batch = data.batch(0)
    assert batch.segment_ids.max() == 10  # five times two documents of eleven tokens
    targets = Counter(batch.targets[batch.loss_mask].tolist())
    assert set(targets.values()) == {5}
    assert len(targets) == 9


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_make_the_parts_of_the_same_batch(three, hosts):
    data = TrainingData(config((3, 2, 1)), three)
    share = 8 // hosts
    for step in (0, 1, 1000):
        whole = data.batch(step)
        parts = [data.batch(step, slice(host * share, (host + 1) * share)) for host in range(hosts)]
        equal(whole, jax.tree.map(lambda *pieces: np.concatenate(pieces), *parts))


def test_a_batch_depends_on_nothing_but_config_seed_and_step(three):
    first, second = (TrainingData(config((3, 2, 1)), three) for _ in range(2))
    for step in (5, 0, 3):
        expected = first.batch(step)
        equal(second.batch(step), expected)
    assert first.fingerprint == second.fingerprint
    other = TrainingData(config((3, 2, 1), seed=1), three)
    assert not np.array_equal(other.batch(0).tokens, first.batch(0).tokens)


def test_the_fingerprint_tells_other_data(three, make_documents):
    variants = [
        TrainingData(config((3, 2, 1)), three),
        TrainingData(config((3, 2, 2)), three),
        TrainingData(config((3, 2, 1), seed=1), three),
        TrainingData(config((3, 2, 1), seq_len=8), three),
        TrainingData(config((3, 2, 1)), [*three[:2], make_documents([991])]),
    ]
    assert len({data.fingerprint for data in variants}) == len(variants)


def test_sources_are_named_counted_and_shuffled(three):
    data = TrainingData(config((5, 3, 2), batch_size=10), three)
    assert data.source_names == ["s0", "s1", "s2"]
    for step in range(20):
        assert np.bincount(data.sources(step)[0]).tolist() == [5, 3, 2]


@pytest.mark.parametrize(
    "weights", [[1.0], [1.0, 1.0], [0.7, 0.2, 0.1], [1e-3, 5.0, 2.0, 0.3], [1.0, 1e-9], [1e-9, 1.0]]
)
def test_weights_hold_from_the_first_row_on(weights):
    rows = np.arange(20_000)
    source, place = choose_sources(rows, weights)
    shares = np.array(weights) / sum(weights)
    for index, share in enumerate(shares):
        counts = np.cumsum(source == index)
        assert np.abs(counts - share * (rows + 1)).max() <= len(weights)
        np.testing.assert_array_equal(place[source == index], np.arange(counts[-1]))  # no row left out or twice
    far = rows + 10**10
    source, _ = choose_sources(far, weights)
    assert np.abs(np.bincount(source, minlength=len(weights)) - shares * len(far)).max() <= len(weights) + 0.01


@pytest.mark.parametrize(
    "weights", [[1.0], [1.0, 1.0], [0.7, 0.2, 0.1], [1e-3, 5.0, 2.0, 0.3], [1.0, 1e-9], [1e-9, 1.0], [1.0, 1e-9, 1e-9]]
)
def test_rows_that_are_said_to_be_dealt_are_those_that_are(weights):
    source, place = choose_sources(np.arange(3000), weights)
    for rows in (0, 1, 2, 3, 7, 100, 1001, 2999):
        assert rows_dealt(rows, weights) == np.bincount(source[:rows], minlength=len(weights)).tolist()
    assert min(rows_dealt(1 << 25, weights)) > 0  # however small its weight, no source is left out for ever
    for far in (20_000_000, 10**10 + 3):
        source, place = choose_sources(np.arange(far, far + 50), weights)
        before = {int(number): int(place[source == number][0]) for number in set(source)}
        assert {number: rows_dealt(far, weights)[number] for number in before} == before


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_the_place_of_a_row_is_the_way_back_through_the_shuffle(size):
    for epoch in (0, 3):
        rows = shuffled_rows(np.arange(size) + epoch * size, size, 7, 2)
        for place in range(0, size, 1 + size // 20):
            assert place_of_row(int(rows[place]), epoch, size, 7, 2) == place


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 1000, 4097])
def test_every_epoch_is_a_permutation_of_its_own(size):
    for seed in (0, 7, 2**63):
        epochs = [shuffled_rows(np.arange(size) + epoch * size, size, seed, 0) for epoch in range(5)]
        for epoch in epochs:
            np.testing.assert_array_equal(np.sort(epoch), np.arange(size))
        if size >= 16:
            others = [*epochs[1:], shuffled_rows(np.arange(size), size, seed, 1), np.arange(size)]
            assert all((epochs[0] == other).mean() < 0.4 for other in others)


def test_shuffling_is_fair():
    """Each of six rows comes at each place about equally often, and pairs of places look independent."""
    size, epochs = 6, 6000
    table = shuffled_rows(np.arange(size * epochs), size, 3, 0).reshape(epochs, size)
    for place in range(size):
        counts = np.bincount(table[:, place], minlength=size)
        assert ((counts - 1000) ** 2 / 1000).sum() < 25  # chi-squared, 5 degrees of freedom: beyond 20.5 once in 1000
    pairs = np.bincount(table[:, 0] * size + table[:, 1], minlength=size * size).reshape(size, size)
    expected = epochs / 30
    assert ((pairs - expected) ** 2 / expected * (1 - np.eye(size))).sum() < 65  # 29 degrees of freedom: 58.3


def test_shuffled_places_are_spread_over_a_large_source():
    rows = shuffled_rows(np.arange(4096), 10**9, 0, 0)
    assert len(set(rows.tolist())) == 4096
    counts = np.bincount(rows * 16 // 10**9, minlength=16)
    assert ((counts - 256) ** 2 / 256).sum() < 45  # 15 degrees of freedom: beyond 37.7 once in 1000


def test_too_little_data_is_one_sentence(make_documents):
    with pytest.raises(UserError) as caught:
        TrainingData(config(batch_size=8), [make_documents([50, 30])])
    assert str(caught.value) == (
        "the training data is smaller than one batch: 80 tokens make 5 rows of data.seq_len=16, but "
        "train.batch_size=8: add text or lower either"
    )
    with pytest.raises(UserError, match=r"source 's1' has nothing left to train on: add text or lower data\.holdout"):
        TrainingData(config((1, 1)), [make_documents([900]), make_documents([], "s1")])


@pytest.fixture
def real(tmp_path, write_corpus):
    (tmp_path / "a").mkdir()
    write_corpus(tmp_path / "a", [50] * 40)
    (tmp_path / "b.txt").write_text("One long document. " * 2000)
    sources = [
        SourceConfig(name="a", path=str(tmp_path / "a" / "*.txt")),
        SourceConfig(name="b", path=str(tmp_path / "b.txt"), weight=3.0),
    ]
    data = DataConfig(sources=sources, seq_len=32, holdout=0.1, cache_dir=str(tmp_path / "cache"), tokenizer="train")
    return Config(data=data, model=ModelConfig(vocab_size=350), train=TrainConfig(batch_size=8, steps=1))


def test_from_files_to_batches(real, tmp_path):
    tokenizer, training, held_out, record = open_documents(real)
    assert record.fingerprint == open_documents(real).record.fingerprint
    assert tokenizer.vocab_size == 350
    assert [view.name for view in training] == [view.name for view in held_out] == ["a", "b"]
    data = TrainingData(real, training)
    again = TrainingData(real, open_documents(real)[1])
    assert data.fingerprint == again.fingerprint
    sources, _ = data.sources(0)
    assert np.bincount(sources).tolist() == [2, 6]
    row = data.batch(0).tokens[sources == 1][0]
    assert tokenizer.decode(row).strip()[:8] in "One long document. " * 3
    for cache in (tmp_path / "cache").glob("tokens-*/tokens"):
        os.utime(cache, (1, 1))
    with pytest.raises(UserError, match="was changed while the run reads it"):
        data.batch(0)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sources": []}, "data.sources is empty: name at least one source of text"),
        ({"sources": [SourceConfig(name="a", path="/nowhere/*.txt")]}, "nothing matches the path"),
        ({"tokenizer": "mixtral"}, "data.tokenizer=mixtral has 32000 tokens but model.vocab_size is 350"),
    ],
)
def test_what_is_wrong_is_said_before_anything_slow(real, monkeypatch, changes, sentence):
    monkeypatch.setattr(pipeline, "open_or_build", lambda *args: pytest.fail("tokenizes first"))
    with pytest.raises(UserError, match=sentence.replace("*", r"\*")):
        open_documents(replace(real, data=changes))
