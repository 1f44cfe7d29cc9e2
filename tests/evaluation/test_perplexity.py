import json
import math
import re

import jaxtyping
import numpy as np
import pytest
from rich.console import Console

from mixtral_jax.config import EvalConfig, UserError
from mixtral_jax.evaluation.outputs import write_json
from mixtral_jax.evaluation.perplexity import Result, add_up, measure, uniform_nats, unigram_nats
from mixtral_jax.evaluation.results import results_json, results_table
from mixtral_jax.evaluation.scoring import TokenScores
from mixtral_jax.evaluation.windows import num_batches
from tests.evaluation.corpus import BOS, EOS, Corpus, constant, history_nats, random_corpus, score_by_history

A, B = 3, 4
# p(next | now) of a model of two letters, as powers of two so that the bits can be counted.
BIGRAM_BITS = {(BOS, A): 1, (BOS, B): 1, (A, A): 2, (A, B): 1, (A, EOS): 2, (B, A): 3, (B, B): 1, (B, EOS): 3}
MODES = [EvalConfig("packed", 4, batch_size=2), EvalConfig("document", 3, batch_size=2),
         EvalConfig("strided", 4, 1, batch_size=3), EvalConfig("strided", 100)]  # fmt: skip


def score_by_bigram(batch):
    pairs = np.stack([batch.tokens, batch.targets], axis=-1)
    bits = np.array([[BIGRAM_BITS.get((a, b), np.nan) for a, b in row] for row in pairs.tolist()])
    return TokenScores(bits * math.log(2), bits < 0)


@pytest.mark.parametrize("eval", MODES)
def test_the_same_number_as_by_pencil(eval):
    # `ab`: 1 + 1 + 3 bits over 3 targets. `aabba`: 1 + 2 + 1 + 1 + 3 + 2 = 10 bits over 6.
    corpus = Corpus([[A, B], [A, A, B, B, A]])
    calls = []
    evaluation = measure(score_by_bigram, [corpus], eval, seq_len=8, on_batch=calls.append)
    (result,) = evaluation.sources.values()
    assert (result.tokens, result.bytes) == (9, 14)
    assert result.nats == pytest.approx(15 * math.log(2), rel=1e-15)
    assert result.nats_per_token == pytest.approx(15 * math.log(2) / 9)
    assert result.perplexity == pytest.approx(2 ** (15 / 9))
    assert result.bits_per_byte == pytest.approx(15 / 14)
    assert calls == ["made-up"] * num_batches(corpus, eval, 8)


@pytest.mark.parametrize("seed", range(5))
def test_strided_equals_a_slow_loop_over_tokens(seed):
    rng = np.random.default_rng(seed)
    corpus = random_corpus(rng, documents=6, longest=40)
    context = int(rng.integers(2, 16))
    stride = int(rng.integers(1, context + 1))
    slow = 0.0
    for index in range(corpus.num_documents):
        document = corpus.tokens(index).tolist()
        for target in range(1, len(document)):
            begin = 0
            while begin + context < target:  # the first window that reaches the target
                begin += stride
            slow += history_nats(document[begin:target], document[target])
    evaluation = measure(score_by_history, [corpus], EvalConfig("strided", context, stride, 3), seq_len=99)
    assert evaluation.total.nats == pytest.approx(slow, rel=1e-12)


def test_all_modes_agree_when_the_context_holds_everything():
    corpus = random_corpus(np.random.default_rng(0), documents=6, longest=40)
    nats = {mode: measure(score_by_history, [corpus], EvalConfig(mode, 400), seq_len=99).total.nats
            for mode in ("packed", "document", "strided")}  # fmt: skip
    assert nats["packed"] == pytest.approx(nats["document"]) == pytest.approx(nats["strided"])


def test_sources_are_summed_before_the_division():
    corpora = [Corpus([[A, B]], name="one"), Corpus([[A, A, B, B, A]], [7], name="two")]
    evaluation = measure(score_by_bigram, corpora, EvalConfig("packed"), seq_len=8)
    assert list(evaluation.sources) == ["one", "two"]
    total = evaluation.total
    assert (total.tokens, total.bytes) == (9, 4 + 7)
    assert total.perplexity == pytest.approx(2 ** (15 / 9))
    assert total.bits_per_byte == pytest.approx(15 / 11)


def test_bytes_are_those_of_the_documents_that_were_read():
    corpus = Corpus([[A, B], [A, A, B, B, A]], [11, 13])
    for limit, size in ((0, 24), (3, 11), (4, 24)):
        eval = EvalConfig("document", max_tokens=limit)
        assert measure(score_by_bigram, [corpus], eval, seq_len=8).total.bytes == size


def test_sums_are_exact_where_float32_is_not():
    corpus = Corpus([[A] * 6] * 1000)
    evaluation = measure(constant(0.1), [corpus], EvalConfig("document", 7, 0, 1), 7)
    assert evaluation.total.nats == pytest.approx(700.0, rel=1e-14)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.nan, 1e9])
def test_a_score_that_is_not_finite_is_never_averaged_away(bad):
    corpora = [Corpus([[A]], name="good"), Corpus([[A, B]] * 3, name="english")]
    scores = iter([constant(1.0), constant(1.0), constant(bad), constant(1.0)])
    with pytest.raises(UserError, match=r"source 'english' is \S+ in batch 2 of 3: .* evaluate an earlier checkpoint"):
        measure(lambda batch: next(scores)(batch), corpora, EvalConfig("document", 3, 0, 1), 3)


@pytest.mark.parametrize("corpus", [Corpus([], name="english"), Corpus([[]], name="english")])
def test_a_source_without_text_is_named(corpus):
    sentence = "source 'english' has no held-out text: raise data.holdout or give the source more documents"
    with pytest.raises(UserError, match=re.escape(sentence)):
        measure(score_by_bigram, [corpus], EvalConfig(), seq_len=8)


def test_scores_of_another_shape_are_refused():
    scores = TokenScores(np.ones((1, 3)), np.ones((1, 3)) > 0)
    with pytest.raises(jaxtyping.TypeCheckError, match=r"checking parameter 'mask'"):
        measure(lambda batch: scores, [Corpus([[A, B]])], EvalConfig(batch_size=1), 8)


def test_unigram_by_pencil():
    train, heldout = Corpus([[A, A, A], [B]]), Corpus([[A, B], [5]])
    # Counts: a 3, b 1, end 2; with one more of each of 6 tokens, of 12: a 4, b 2, end 3, the unseen 5: 1.
    expected = -sum(math.log(count / 12) for count in (4, 2, 3, 1, 3))
    assert unigram_nats(train, heldout, vocab_size=6) == pytest.approx(expected)
    assert unigram_nats(train, heldout, vocab_size=6, max_tokens=2) == pytest.approx(
        -sum(math.log(count / 12) for count in (4, 2, 3))
    )


def test_unigram_counts_a_part_of_a_huge_training_set():
    train, heldout = Corpus([[A], [B]] * 50), Corpus([[A, B]])
    assert train.num_tokens == 300
    every_second = Corpus([[A]] * 50)
    assert unigram_nats(train, heldout, 6, max_train_tokens=299) == unigram_nats(every_second, heldout, 6)
    assert unigram_nats(train, heldout, 6, max_train_tokens=300) != unigram_nats(every_second, heldout, 6)


def test_unigram_without_training_text_is_uniform():
    heldout = Corpus([[A, B], [A]])
    assert uniform_nats(heldout, 7) == pytest.approx(5 * math.log(7))
    assert unigram_nats(Corpus([]), heldout, 7) == pytest.approx(uniform_nats(heldout, 7))
    assert uniform_nats(heldout, 7, max_tokens=1) == pytest.approx(3 * math.log(7))


@pytest.fixture
def evaluation():
    corpora = [Corpus([[A, B]], name="one"), Corpus([[A, A, B, B, A]], [7], name="two")]
    return measure(score_by_bigram, corpora, EvalConfig("strided", 4), seq_len=8)


def test_json_holds_what_scripts_rely_on(evaluation, tmp_path):
    path = tmp_path / "out.json"
    write_json(path, results_json(evaluation))
    read = json.loads(path.read_text())
    assert list(read["sources"]) == ["one", "two"]
    for entry in (*read["sources"].values(), read["total"]):
        promised = {"tokens", "bytes", "nats_per_token", "perplexity", "bits_per_byte"}
        assert set(entry) == promised | {"documents", "intervals"}
    assert read["total"]["perplexity"] == pytest.approx(2 ** (15 / 9))
    assert {key: read[key] for key in ("mode", "context", "stride")} == {"mode": "strided", "context": 4, "stride": 2}
    assert list(tmp_path.iterdir()) == [path]


def test_json_that_cannot_be_written_is_a_sentence(evaluation, tmp_path):
    path = tmp_path / "nowhere" / "out.json"
    with pytest.raises(
        UserError, match=re.escape(f"cannot write {path}: No such file or directory; give another file")
    ):
        write_json(path, results_json(evaluation))


def test_table_shows_every_number(evaluation):
    console = Console(width=100)
    with console.capture() as capture:
        console.print(results_table(evaluation, {"uniform": Result(9, 11, 9 * math.log(6))}))
    text = capture.get()
    for name in ("one", "two", "total", "uniform model"):
        assert name in text
    assert re.search(r"total +│ +9 │ +11 │ +1\.1552 │ +3\.17 │ +1\.3636", text)
    assert "strided mode, context 4 tokens, stride 2" in text


@pytest.mark.parametrize(("eval", "said"), [
    (EvalConfig("document", 4), "1 of 2 documents are longer"), (EvalConfig("document", 6), ""),
    (EvalConfig("strided", 4), ""),
])  # fmt: skip
def test_documents_longer_than_the_context_are_said(eval, said):
    evaluation = measure(score_by_bigram, [Corpus([[A, B], [A, A, B, B, A]])], eval, seq_len=8)
    caption = str(results_table(evaluation).caption)
    assert ("documents are longer" in caption) == bool(said)
    assert said in caption


def test_adding_up_nothing_lost():
    parts = [Result(1, 2, 1e16), Result(3, 4, 1.0), Result(5, 6, -1e16)]
    assert add_up(parts) == Result(9, 12, 1.0)
