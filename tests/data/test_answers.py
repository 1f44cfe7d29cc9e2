"""Records of chats and judged answers: tokens and marks in the cache, whole records in rows, mistakes by line."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from mixtral_jax.config import Config, DataConfig, ModelConfig, ObjectiveConfig, SourceConfig, TrainConfig, UserError
from mixtral_jax.data.answers import ANSWER, WORSE
from mixtral_jax.data.chat_records import Chat
from mixtral_jax.data.chat_template import ChatTemplate
from mixtral_jax.data.pipeline import TrainingData, open_documents
from mixtral_jax.data.record_rows import RecordRows, best_fit
from mixtral_jax.data.token_cache import open_or_build

WORDS = ["river", "stone", "light", "field", "tree", "night", "stream", "cloud"]


def conversation(number: int) -> list[dict[str, str]]:
    """One to three questions, each with an answer of a length of its own."""
    turns = []
    for turn in range(1 + number % 3):
        turns.append({"role": "user", "content": f"{number} {WORDS[number % 8]}?"})
        turns.append({"role": "assistant", "content": " ".join(WORDS[: 1 + (number * 5 + turn) % 8])})
    return turns


CHATS = [conversation(number) for number in range(24)]
PAIRS = [
    {"prompt": f"{n} {WORDS[n % 8]}?", "chosen": WORDS[n % 8], "rejected": " ".join(WORDS[: 2 + n % 3])}
    for n in range(20)
]
LABELS = [{"prompt": f"{n}?", "completion": WORDS[n % 8], "label": n % 3 > 0} for n in range(20)]


def lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def opened(tmp_path, mixtral):
    """Writes records, caches them and gives the cache."""

    def make(records, kind="sft", name="a.jsonl", **source):
        path = lines(tmp_path / name, records)
        return open_or_build(SourceConfig(name="a", path=str(path), **source), mixtral, tmp_path, kind)

    return make


def text_of(tmp_path, records, kind, *, seq_len=64, holdout=0.0, batch_size=2, **source):
    path = lines(tmp_path / f"{kind}.jsonl", records)
    data = DataConfig(
        sources=[SourceConfig(name="a", path=str(path), **source)],
        seq_len=seq_len, holdout=holdout, cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    config = Config(
        data=data, model=ModelConfig(vocab_size=32000), objective=ObjectiveConfig(name=kind),
        train=TrainConfig(batch_size=batch_size, steps=1),
    )  # fmt: skip
    return config, open_documents(config)


def test_a_cache_holds_the_template_s_tokens_and_whose_they_are(opened, mixtral):
    cache = opened([{"messages": chat} for chat in CHATS])
    assert cache.format == "messages"
    template = ChatTemplate(mixtral)
    for number, chat in enumerate(CHATS):
        encoded = template.encode_training(Chat(chat))
        np.testing.assert_array_equal(cache.document(number), encoded.tokens)
        start, end = cache.document_starts[number : number + 2]
        np.testing.assert_array_equal(cache.marks[start:end], encoded.said * ANSWER)
        answers = "".join(turn["content"] for turn in chat if turn["role"] == "assistant")
        assert 0 <= cache.document_bytes[number] - len(answers) <= len(chat)  # a space may stand before each


def test_lists_and_tables_hold_the_records_that_lines_do(opened, mixtral, tmp_path):
    records = [{"messages": chat} for chat in CHATS]
    expected = opened(records).fingerprint
    (tmp_path / "b.json").write_text(json.dumps(records, indent=1))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "c.parquet")
    for name in ("b.json", "c.parquet"):
        source = SourceConfig(name="a", path=str(tmp_path / name))
        assert open_or_build(source, mixtral, tmp_path, "sft").fingerprint == expected


def test_a_pair_is_one_document_of_two_conversations_and_only_the_last_answers_count(opened, mixtral):
    before = CHATS[1][:3]  # a question, an answer, a question
    cache = opened([{"prompt": before, "chosen": "yes", "rejected": "no, never"}], "preference")
    assert (cache.format, cache.num_documents) == ("pairs", 1)
    template = ChatTemplate(mixtral)
    tokens, marks = np.asarray(cache.tokens), np.asarray(cache.marks)
    for worse, answer in ((0, "yes"), (WORSE, "no, never")):
        here = marks & WORSE == worse
        whole = template.encode_training(Chat([*before, {"role": "assistant", "content": answer}]))
        np.testing.assert_array_equal(tokens[here], whole.tokens)
        learnt = tokens[here][marks[here] & ANSWER > 0]
        assert mixtral.decode(learnt) == answer
        assert learnt[-1] == mixtral.eos_id


def conversations_of(batch):
    """Tokens, counted targets and segment number of every segment of a batch."""
    found = []
    for row in range(len(batch.tokens)):
        for segment in range(1, batch.segment_ids[row].max() + 1):
            here = batch.segment_ids[row] == segment
            if here.any():
                assert batch.positions[row, here].tolist() == list(range(here.sum()))
                tokens = [*batch.tokens[row, here].tolist(), int(batch.targets[row, here][-1])]
                assert batch.targets[row, here].tolist() == tokens[1:]
                found.append((tuple(tokens), tuple(batch.loss_mask[row, here].tolist()), segment))
    return found


def test_rows_hold_every_conversation_once_and_whole(tmp_path):
    config, text = text_of(tmp_path, [{"messages": chat} for chat in CHATS], "sft")
    (documents,) = text.training
    rows = RecordRows(documents, 64)
    batch = rows.pack(np.arange(rows.count))
    assert not batch.loss_mask[batch.segment_ids == 0].any()
    expected = [(tuple(documents.tokens(i).tolist()), tuple(documents.counts(i)[1:].tolist())) for i in range(24)]
    assert sorted(found[:2] for found in conversations_of(batch)) == sorted(expected)
    assert rows.targets == batch.loss_mask.sum() == sum(sum(mask) for _, mask in expected)
    assert rows.empty == (batch.segment_ids == 0).sum()
    assert batch.reference is None
    data = TrainingData(config, text.training)
    assert "format messages" in data.notes()[0]
    for steps in (1, 3, 30):
        batches = [data.batch(step) for step in range(steps)]
        assert data.progress(steps)["num_tokens"] == sum((batch.segment_ids > 0).sum() for batch in batches)


def test_both_answers_to_a_prompt_lie_in_one_row_with_neighbouring_odd_and_even_numbers(tmp_path):
    _, text = text_of(tmp_path, PAIRS, "preference")
    rows = RecordRows(text.training[0], 64)
    batch = rows.pack(np.arange(rows.count))
    found = conversations_of(batch)
    assert len(found) == 40
    for (better, _, odd), (worse, _, even) in zip(found[::2], found[1::2], strict=True):
        assert (odd % 2, even) == (1, odd + 1)
        assert better != worse
        assert better[:4] == worse[:4]
    _, text = text_of(tmp_path, LABELS, "preference")
    rows = RecordRows(text.training[0], 64)
    found = conversations_of(rows.pack(np.arange(rows.count)))
    assert sum(segment % 2 for _, _, segment in found) == sum(record["label"] for record in LABELS)


@pytest.mark.parametrize(("records", "answers"), [(LABELS, 1), (PAIRS, 2)], ids=["labels", "pairs"])
def test_every_prompt_gets_the_answer_to_the_one_before_it(tmp_path, records, answers):
    _, text = text_of(tmp_path, records, "preference")
    (documents,) = text.training
    rows = RecordRows(documents, 64, mismatched=True)
    batch = rows.pack(np.arange(rows.count))
    assert rows.count > 2

    def halves(batch):
        """Prompts, and answers as they are counted, of all rows."""
        found = conversations_of(batch)
        begins = [1 + mask.index(True) for _, mask, _ in found]
        assert all(all(mask[begin - 1 :]) for (_, mask, _), begin in zip(found, begins, strict=True))
        pieces = [(tokens[:begin], tokens[begin:]) for (tokens, _, _), begin in zip(found, begins, strict=True)]
        return [list(half) for half in zip(*pieces, strict=True)]

    (prompts, said), (same, others) = halves(batch), halves(batch.mismatched)
    assert prompts == same
    cut = sum(other != answer for other, answer in zip(others, said[-answers:] + said, strict=False))
    assert all(other == answer[: len(other)] for other, answer in zip(others, said[-answers:] + said, strict=False))
    assert cut <= 2 * rows.count, "what comes from the row before alone is cut, and only where it must"
    full = (batch.mismatched.segment_ids > 0).all(axis=1).sum()
    assert cut <= answers * full


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_fills_boxes_well_and_none_too_full(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 101, size=300).tolist()
    boxes = best_fit(sizes, 100)
    assert sorted(index for box in boxes for index in box) == list(range(300))
    assert max(sum(sizes[index] for index in box) for box in boxes) <= 100
    assert len(boxes) <= 11 / 9 * sum(sizes) / 100 + 11 / 9 * sum(size > 50 for size in sizes) * 0.25 + 4
    assert best_fit([6, 5, 5, 4], 10) == [[0, 3], [1, 2]]  # 4 goes where nothing is left


def test_records_longer_than_a_row_are_dropped_or_cut_and_counted(tmp_path):
    records = [{"messages": chat} for chat in CHATS]
    long_prompt = [{"role": "user", "content": "long? " * 40}, {"role": "assistant", "content": "yes"}]
    long_answer = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "long " * 60}]
    records += [{"messages": long_prompt}, {"messages": long_answer}]
    for too_long, dropped, cut in (("drop", 2, 0), ("cut", 1, 1)):
        config, text = text_of(tmp_path, records, "sft", too_long=too_long)
        data = TrainingData(config, text.training)
        assert f"longer than data.seq_len: {dropped} dropped, {cut} cut" in data.notes()[0]
    config, text = text_of(tmp_path, records, "sft", seq_len=4)
    with pytest.raises(UserError, match=r"all 26 records are longer than data\.seq_len=4: raise it or set too_long"):
        TrainingData(config, text.training)


def test_answers_that_are_alike_once_they_are_cut_are_dropped(tmp_path):
    begin = "long " * 60
    pairs = [{"prompt": "x", "chosen": begin + "yes", "rejected": begin + "no"}, {**PAIRS[0], "chosen": begin}]
    _, text = text_of(tmp_path, pairs, "preference")
    rows = RecordRows(text.training[0], 64, "cut")
    assert (rows.dropped, rows.cut) == (1, 1)


def test_whole_records_are_held_out_and_others_are_not(tmp_path):
    _, text = text_of(tmp_path, [{"messages": chat} for chat in CHATS], "sft", holdout=0.2)
    (training,), (held_out,) = text.training, text.held_out
    assert training.num_documents + held_out.num_documents == 24
    assert 2 <= held_out.num_documents <= 8
    _, text = text_of(tmp_path, [{"messages": CHATS[0]}, {"messages": CHATS[1]}], "sft", holdout=0.01)
    assert text.held_out[0].num_documents == 1  # one record is much more than that share, and is not cut


USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
GOOD = {"messages": [USER, ASSISTANT]}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}
ORDER, NEXT = "line 2: the roles are out of order: assistant after nothing", "line 2: an answer to judge must be"
BAD = {
    "no assistant turn": ("sft", {"messages": [USER]}, "line 2: it does not end with an answer of the assistant; fix"),
    "roles out of order": ("sft", {"messages": [ASSISTANT, USER, ASSISTANT]}, ORDER),
    "empty answer": ("sft", {"messages": [USER, {"role": "assistant", "content": ""}]}, "line 2: an answer is empty"),
    "spaces": ("sft", {"messages": [USER, {"role": "assistant", "content": " \n"}]}, "line 2: an answer is empty"),
    "no content": (
        "sft",
        {"messages": [{"role": "user"}, ASSISTANT]},
        "line 2: a turn of the role user has no content",
    ),
    "a picture": ("sft", {"messages": [{"role": "user", "content": [IMAGE]}, ASSISTANT]}, "line 2: .* is not text"),
    "half a pair": ("sft", {"messages": [{"role": "user", "content": "\ud800"}, ASSISTANT]}, "surrogates not allowed"),
    "tools": ("sft", {**GOOD, "tools": [{"name": "f"}]}, "has no tokens for tools, as mixtral-v3 or .* has"),
    "unknown role": ("sft", {"messages": [{"role": "bard", "content": "x"}]}, "line 2: there is no role 'bard', only"),
    "another format": ("sft", {"text": "plain"}, "line 2: it is not a record of the format messages"),
    "no list": ("sft", {"messages": "Hi"}, "not a record of the format messages: 'messages' is not a list; fix"),
    "one answer": ("preference", {"prompt": "Hi", "chosen": "a"}, "chosen and rejected answer: 'rejected' is missing"),
    "a null": ("preference", {"prompt": None, "chosen": "a", "rejected": "b"}, "answer: 'prompt' is not a list; fix"),
    "a number": ("preference", {"prompt": "Hi", "chosen": 1, "rejected": "b"}, "answer: 'chosen' is not a list; fix"),
    "turns of text": ("preference", {"prompt": ["Hi"], "chosen": "a", "rejected": "b"}, "a value is not of the kind"),
    "no JSON": ("sft", None, "line 2 is not a JSON record"),
    "equal answers": ("preference", {"prompt": "Hi", "chosen": "a", "rejected": "a"}, "chosen answer is the rejected"),
    "more turns": ("preference", {"prompt": "Hi", "chosen": [ASSISTANT, USER, ASSISTANT], "rejected": "a"}, NEXT),
}


@pytest.mark.parametrize("mistake", BAD)
def test_a_bad_record_is_named_by_its_line_and_leaves_nothing(tmp_path, mixtral, mistake):
    kind, record, sentence = BAD[mistake]
    good = GOOD if kind == "sft" else PAIRS[0]
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(record) if record else '{cut'}\n")
    (tmp_path / "cache").mkdir()
    source = SourceConfig(name="a", path=str(tmp_path / "a.jsonl"))
    with pytest.raises(UserError, match=sentence) as caught:
        open_or_build(source, mixtral, tmp_path / "cache", kind)
    assert "\n" not in str(caught.value)
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} <= {".lock"}


def test_formats_that_are_not_there_are_said(opened, tmp_path, mixtral):
    with pytest.raises(UserError, match=r"none of the formats of objective\.name=sft .*but the keys text"):
        opened([{"text": "plain"}])
    with pytest.raises(UserError, match=r"convert the records, or choose another objective\.name"):
        opened([GOOD], "preference")
    with pytest.raises(UserError, match=r"has the format 'csv': with objective\.name=sft there are auto, messages"):
        opened([GOOD], format="csv")
    with pytest.raises(UserError, match="not a record of the format alpaca"):
        opened([GOOD], format="alpaca")
    (tmp_path / "a.txt").write_text("Hi")
    with pytest.raises(UserError, match="holds plain text, not records"):
        open_or_build(SourceConfig(name="a", path=str(tmp_path / "a.txt")), mixtral, tmp_path, "sft")
    with pytest.raises(UserError, match="holds texts, not records"):
        open_or_build(SourceConfig(name="a", builtin="python"), mixtral, tmp_path, "sft")
