"""Held-out documents: disjoint from training, complete together, near the share, the same each time."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis.strategies import floats, integers, just, lists, one_of

from mixtral_jax.config import SourceConfig
from mixtral_jax.data.cache_files import cache_directory
from mixtral_jax.data.fingerprints import fingerprints
from mixtral_jax.data.record import DocumentRecord, hold_out
from mixtral_jax.data.splits import Split
from mixtral_jax.data.token_cache import open_or_build

MANY = [1 + (7 * number) % 60 for number in range(200)]
FEW = [3000, 40, 5000, 4000]


def opened(folder, write_corpus, mixtral, words):
    (folder / "text").mkdir()
    write_corpus(folder / "text", words)
    source = SourceConfig(name="mine", path=str(folder / "text"))
    return open_or_build(source, mixtral, cache_directory(str(folder / "cache")))


@pytest.fixture
def open_cache(tmp_path, write_corpus, mixtral):
    return lambda words: opened(tmp_path, write_corpus, mixtral, words)


def split_documents(cache, holdout, seed, tokenizer):
    prints = fingerprints(cache, cache.directory.parent)
    record = DocumentRecord.read(hold_out([(cache, prints)], holdout, seed, tokenizer).content)
    split = Split(cache, prints, record, tokenizer)
    return split.training(), split.held_out()


def pieces(view):
    return [view.tokens(index).tolist() for index in range(view.num_documents)]


def assert_whole(cache, holdout, mixtral):
    """Both views together are the source."""
    for seed in range(3):
        training, held_out = split_documents(cache, holdout, seed, mixtral)
        documents = [cache.document(index).tolist() for index in range(cache.num_documents)]
        kept, held = pieces(training), pieces(held_out)
        assert kept, "nothing is left for training"
        assert bool(held) == (holdout > 0)
        cut = len(kept) + len(held) - len(documents)
        assert cut in (0, 1)
        if cut:  # the head of one document and the tail of the same, which got a BOS of its own
            (head,) = [tokens for tokens in kept if tokens[-1] != mixtral.eos_id]
            (tail,) = [tokens for tokens in held if head + tokens[1:] in documents]
            kept.remove(head)
            held.remove(tail)
            documents.remove(head + tail[1:])
        assert sorted(kept + held) == sorted(documents)
        for view in (training, held_out):
            assert all(tokens[0] == mixtral.bos_id for tokens in pieces(view))
            assert [len(tokens) for tokens in pieces(view)] == np.diff(view.offsets).tolist()
            assert view.num_tokens == sum(map(len, pieces(view)))
            assert view.total_bytes == sum(view.num_bytes(index) for index in range(view.num_documents))
        assert training.total_bytes + held_out.total_bytes == cache.document_bytes.sum()


@given(lists(one_of(integers(1, 60), integers(1, 400)), min_size=1, max_size=12),
       one_of(just(0.0), floats(0.001, 0.95)))  # fmt: skip
@example(MANY, 0.01)
@example(FEW, 0.2)
@example([1], 0.9)
@example([1, 5000], 0.01)
def test_both_views_make_the_source_again(write_corpus, mixtral, words, holdout):
    with tempfile.TemporaryDirectory() as held:
        assert_whole(opened(Path(held), write_corpus, mixtral, words), holdout, mixtral)


@pytest.mark.parametrize(("words", "holdout"), [(MANY, 0.01), (MANY, 0.2), (FEW, 0.01), (FEW, 0.3), ([2000], 0.05)])
def test_the_share_is_nearly_met(open_cache, mixtral, words, holdout):
    cache = open_cache(words)
    for seed in range(5):
        share = split_documents(cache, holdout, seed, mixtral)[1].num_tokens / cache.num_tokens
        assert holdout / 1.4 < share < 1.4 * holdout


def test_whole_documents_are_held_out_where_they_fit(open_cache, mixtral):
    cache = open_cache(MANY)
    for seed in range(5):
        training, held_out = split_documents(cache, 0.2, seed, mixtral)
        assert training.num_documents + held_out.num_documents == cache.num_documents
        assert all(tokens[-1] == mixtral.eos_id for tokens in pieces(training))


def test_a_tail_begins_with_a_word_and_its_bytes_are_those_of_its_text(open_cache, mixtral):
    training, held_out = split_documents(open_cache([2000]), 0.1, 0, mixtral)
    tail = held_out.tokens(0)
    assert mixtral.begins_word[tail[1]]
    text = " " + mixtral.decode(tail)  # the space before the first word is text here
    assert held_out.num_bytes(0) == len(text.encode())
    assert training.num_bytes(0) == len(mixtral.decode(training.tokens(0)).encode())


def test_the_seed_decides_and_nothing_else(open_cache, mixtral):
    cache = open_cache(MANY)
    first, again, other = (split_documents(cache, 0.1, seed, mixtral)[1] for seed in (0, 0, 1))
    assert pieces(first) == pieces(again) != pieces(other)
    assert first.fingerprint == again.fingerprint != other.fingerprint
