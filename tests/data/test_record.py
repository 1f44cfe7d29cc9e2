"""What was held out stays held out: whatever the files are called, whoever asks, and however the split is asked for."""

import json
from pathlib import Path

import numpy as np
import pytest

from mixtral_jax.config import Config, DataConfig, ModelConfig, SourceConfig, TrainConfig
from mixtral_jax.data.fingerprints import WINDOW, fingerprints, make_fingerprints
from mixtral_jax.data.pipeline import RunText, open_documents
from mixtral_jax.data.record import NOTHING, DocumentRecord
from mixtral_jax.data.splits import Split
from mixtral_jax.data.token_cache import open_or_build

NAMES = ["ada", "bob", "cyd", "dan", "eve", "fay", "gus", "hal", "ivy", "jon", "kim", "lee"]


def document(number: int, words: int = 40) -> str:
    rng = np.random.default_rng(number)
    return f"{number} " + " ".join(rng.choice(NAMES, words))


def write(path: Path, documents: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".txt":
        path.write_text("".join(documents))
    else:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A directory with a source of 200 documents, in which paths may be relative."""
    write(tmp_path / "notes.jsonl", [document(number) for number in range(200)])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(*paths: str, before: DocumentRecord = NOTHING, holdout: float = 0.1, seed: int = 0, **source) -> RunText:
    """Opens what a run on these sources reads; the record goes through its file."""
    sources = [SourceConfig(name=f"s{number}", path=path, **source) for number, path in enumerate(paths)]
    data = DataConfig(sources=sources, seq_len=32, holdout=holdout, cache_dir="cache", tokenizer="mixtral")
    config = Config(seed=seed, data=data, model=ModelConfig(vocab_size=32000), train=TrainConfig(batch_size=1, steps=1))
    text = open_documents(config, before=before)
    return text._replace(record=DocumentRecord.read(text.record.content))


def texts(run: RunText, view) -> list[str]:
    return [run.tokenizer.decode(view.tokens(index)).strip() for index in range(view.num_documents)]


def measured(run: RunText, path: str | Path) -> tuple[str, list[str], float]:
    """What `eval.py` measures of a source, by the run's record: its kind, its documents and the share of training."""
    cache = open_or_build(SourceConfig(name="x", path=str(path)), run.tokenizer, Path("cache"))
    text = Split(cache, fingerprints(cache, Path("cache")), run.record, run.tokenizer).to_measure()
    return text.kind, texts(run, text.documents), text.trained_share


@pytest.fixture
def run(work):
    return train("notes.jsonl")


def test_the_runs_own_source_gives_what_it_held_out(run):
    held_out = texts(run, run.held_out[0])
    assert 15 <= len(held_out) <= 25
    kind, found, share = measured(run, "notes.jsonl")
    assert (kind, found) == ("held-out", held_out)
    assert 0.85 < share < 0.95


@pytest.mark.parametrize("change", ["spelling", "move", "rename", "touch", "order", "split", "format", "field"])
def test_no_change_of_files_alone_changes_what_was_held_out(run, work, change):
    held_out, documents = texts(run, run.held_out[0]), [document(number) for number in range(200)]
    notes, path = work / "notes.jsonl", {
        "spelling": "./notes.jsonl", "move": "far/notes.jsonl", "rename": "a.jsonl", "split": "parts", "format": "txt",
    }.get(change, "notes.jsonl")  # fmt: skip
    if change in ("move", "rename"):
        (work / "far").mkdir()
        notes.rename(path)
    elif change in ("touch", "order"):
        write(notes, documents if change == "touch" else documents[::-1])
    elif change == "field":
        notes.write_text(notes.read_text().replace("{", '{"a": 1, '))
    for number in range(3) if change == "split" else ():
        write(work / path / f"{number}.jsonl", documents[number::3])
    for number, text in enumerate(documents) if change == "format" else ():
        write(work / path / f"{number:03}.txt", [text])
    kind, found, _ = measured(run, path)
    assert (kind, sorted(found)) == ("held-out", sorted(held_out))


def test_lines_added_or_taken_away_change_nothing_for_the_others(run, work):
    held_out = texts(run, run.held_out[0])
    documents = [document(number) for number in range(200)]
    write(work / "notes.jsonl", [*documents, *map(document, range(900, 903))])
    assert measured(run, "notes.jsonl")[:2] == ("held-out", held_out)
    write(work / "notes.jsonl", documents[:100])
    assert measured(run, "notes.jsonl")[:2] == ("held-out", [text for text in held_out if text in documents[:100]])


def test_what_is_not_the_runs_is_measured_whole(run, work):
    other = [document(number) for number in range(500, 700)]
    assert measured(run, write(work / "far" / "notes.jsonl", other)) == ("other text", other, 0.0)


def test_what_overlaps_training_is_told_with_its_share(run, work):
    training, held_out = texts(run, run.training[0]), texts(run, run.held_out[0])
    other = [document(number) for number in range(500, 510)]
    kind, found, share = measured(run, write(work / "half.jsonl", [*training[:10], *other]))
    assert (kind, found) == ("other text", other)
    assert share == pytest.approx(0.5, abs=0.02)
    kind, found, share = measured(run, write(work / "mostly.jsonl", [*training[:30], *held_out[:1], *other * 4]))
    assert (kind, found) == ("other text", [*held_out[:1], *other * 4])
    assert measured(run, write(work / "all.jsonl", training)) == ("training text", training, 1.0)


def test_copies_are_never_on_both_sides(work):
    documents = [document(number) for number in range(50)]
    write(work / "copies.jsonl", [*documents, *documents[::-1], *documents[10:20]])
    for seed in range(3):
        run = train("copies.jsonl", "notes.jsonl", seed=seed, holdout=0.2)
        training = {text for view in run.training for text in texts(run, view)}
        held_out = {text for view in run.held_out for text in texts(run, view)}
        assert not training & held_out
        assert training | held_out == {document(number) for number in range(200)}
        for number, name in enumerate(("copies.jsonl", "notes.jsonl")):
            assert measured(run, name)[:2] == ("held-out", texts(run, run.held_out[number]))


def test_the_share_counts_all_copies(work):
    write(work / "copies.jsonl", [document(number // 7) for number in range(700)])
    run = train("copies.jsonl", holdout=0.2)
    assert 0.16 < run.held_out[0].num_tokens / (run.held_out[0].num_tokens + run.training[0].num_tokens) < 0.25


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("holdout", [0.02, 0.1, 0.5])
def test_a_run_that_begins_from_another_holds_out_nothing_that_was_trained_on(run, seed, holdout, caplog):
    child = train("notes.jsonl", before=run.record, seed=seed, holdout=holdout)
    parent_held_out = set(texts(run, run.held_out[0]))
    held_out = set(texts(child, child.held_out[0]))
    assert held_out
    assert held_out <= parent_held_out
    assert len(held_out) >= len(parent_held_out) - 1 or holdout < 0.1
    assert set(texts(child, child.training[0])) == {document(number) for number in range(200)} - held_out
    assert ("of it is held out, not data.holdout=0.5: the rest was trained on before" in caplog.text) == (
        holdout == 0.5
    )
    grandchild = train("notes.jsonl", before=child.record, seed=seed + 1, holdout=holdout)
    assert set(texts(grandchild, grandchild.held_out[0])) <= held_out


def test_what_comes_new_to_a_later_run_is_split_and_the_rest_remembered(run, work):
    write(work / "more.jsonl", [document(number) for number in range(150, 400)])
    child = train("more.jsonl", before=run.record, seed=5)
    held_out = set(texts(child, child.held_out[0]))
    assert not held_out & set(texts(run, run.training[0]))
    assert held_out & {document(number) for number in range(200, 400)}
    # The parent's other documents are training text of the child's parameters too.
    assert measured(child, write(work / "old.jsonl", texts(run, run.training[0])[:20]))[0] == ("training text")


def test_a_run_that_holds_nothing_out_trains_on_all(run):
    child = train("notes.jsonl", before=run.record, holdout=0.0)
    assert not child.held_out[0].num_documents
    assert len(texts(child, child.training[0])) == 200


@pytest.fixture
def book(work):
    """A source of one long document, of which the tail is held out."""
    write(work / "book.txt", [document(0, 20_000)])
    return train("book.txt", holdout=0.05)


def test_a_tail_stays_held_out_wherever_the_document_lies(book, work):
    (head,), (tail,) = texts(book, book.training[0]), texts(book, book.held_out[0])
    assert document(0, 20_000) == f"{head} {tail}"
    assert 0.04 < len(tail) / len(head + tail) < 0.06
    assert measured(book, write(work / "far" / "b.txt", [document(0, 20_000)]))[:2] == ("held-out", [tail])
    many = train("book.txt", "far/b.txt", "notes.jsonl", holdout=0.05)
    assert [texts(many, view) for view in many.held_out[:2]] == [[tail], [tail]]
    for holdout, seed in ((0.05, 1), (0.01, 1), (0.5, 0)):
        child = train("book.txt", before=book.record, seed=seed, holdout=holdout)
        assert texts(child, child.held_out[0]) == [tail]
    child = train("book.txt", before=book.record, holdout=0.0)
    assert texts(child, child.training[0]) == [document(0, 20_000)]
    assert measured(child, "book.txt")[0] == "training text"


@pytest.mark.parametrize("change", ["appended", "shortened", "edited"])
def test_a_long_document_that_was_changed_is_no_other_text(book, work, change):
    text = document(0, 20_000)
    changed = {
        "appended": text + " and so on",
        "shortened": text[: len(text) // 2],
        "edited": text.replace("ada", "ann", 50),
    }
    kind, _, share = measured(book, write(work / "book.txt", [changed[change]]))
    assert kind == "training text"
    assert share == 1.0
    other = document(1, 20_000)
    assert measured(book, write(work / "book.txt", [other])) == ("other text", [other], 0.0)


def test_windows_are_chosen_by_what_they_hold(mixtral):
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 32000, 300_000).astype("<u2")
    whole = make_fingerprints(tokens, np.array([0, 200_000, 300_000]))
    assert len(whole.windows) == pytest.approx(300_000 / 1024, rel=0.25)
    assert ((whole.window_ends >= WINDOW) & (whole.window_ends <= 200_000)).all()
    assert set(whole.window_documents) == {0, 1}
    shifted = make_fingerprints(np.concatenate([tokens[200_000:], tokens[:200_000]]), np.array([0, 100_000, 300_000]))
    assert sorted(shifted.windows) == sorted(whole.windows)
    assert shifted.documents.tolist() == whole.documents.tolist()[::-1]
    short = make_fingerprints(tokens[:20], np.array([0, 8, 20]))  # no document as long as a window
    assert not len(short.windows)


def test_a_damaged_file_of_fingerprints_is_made_again(run, work, caplog):
    (file,) = (work / "cache").glob("fingerprints*.npz")
    good = file.read_bytes()
    for bad in (good[:-10], good.replace(good[200:208], bytes(8), 1), b""):
        file.write_bytes(bad)
        caplog.clear()
        assert measured(run, "notes.jsonl")[1] == texts(run, run.held_out[0])
        assert "is damaged" in caplog.text
        assert file.read_bytes() == good
