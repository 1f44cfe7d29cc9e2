import errno
import io
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mixtral_jax.config import UserError
from mixtral_jax.console import clock
from mixtral_jax.runs import metrics_file
from mixtral_jax.runs.logger import MetricsLogger
from mixtral_jax.runs.metrics_file import read_metrics
from mixtral_jax.runs.tensorboard import load_picture


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(run_dir: Path, steps: range, *, resume_step: int = 0, version: float = 0.0):
    with MetricsLogger(run_dir, 100, resume_step=resume_step) as logger:
        for step in steps:
            scalars = {"loss": step + version, "tokens_per_second": 1234.5, "mfu": 0.5, "epoch/english": step / 8}
            logger.log(step, scalars, {"expert_load": np.full((2, 4), 0.25, np.float32)})


def events(run_dir: Path) -> EventAccumulator:
    return EventAccumulator(str(run_dir / "tensorboard")).Reload()


def strict_lines(run_dir: Path) -> list[dict]:
    def refuse(name: str):
        raise AssertionError(f"{name} is not JSON")

    text = (run_dir / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_a_line_a_step(tmp_path):
    run(tmp_path, range(10, 31, 10))
    lines = strict_lines(tmp_path)
    assert [line["step"] for line in lines] == [10, 20, 30]
    assert lines[1] == {
        "step": 20, "loss": 20.0, "tokens_per_second": 1234.5, "mfu": 0.5, "epoch/english": 2.5,
        "expert_load": [[0.25] * 4] * 2,
    }  # fmt: skip
    assert list(read_metrics(tmp_path / "metrics.jsonl")) == lines


def test_lines_are_there_before_the_next_step(tmp_path):
    with MetricsLogger(tmp_path, 10) as logger:
        logger.log(1, {"loss": 1.0})
        assert [line["step"] for line in strict_lines(tmp_path)] == [1]


def test_numbers_keep_every_bit_and_whole_numbers_stay_whole(tmp_path):
    exact = np.float32(0.1)
    with MetricsLogger(tmp_path, 10) as logger:
        logger.log(1, {"loss": exact, "tokens_seen/english": 2**60 + 1})
    (line,) = strict_lines(tmp_path)
    assert np.float32(line["loss"]) == exact
    assert line["tokens_seen/english"] == 2**60 + 1


def test_what_is_not_finite_is_null(tmp_path, caplog):
    with MetricsLogger(tmp_path, 10) as logger:
        logger.log(1, {"loss": float("nan"), "grad_norm": float("inf")}, {"expert_load": np.array([[np.nan, 1.0]])})
        logger.log(2, {"loss": 1.0, "grad_norm": 2.0})
    first, second = strict_lines(tmp_path)
    assert first == {"step": 1, "loss": None, "grad_norm": None, "expert_load": [[None, 1.0]]}
    assert second["loss"] == 1.0
    assert [event.step for event in events(tmp_path).Scalars("loss/loss")] == [2]
    assert not caplog.records


def test_tensorboard_reads_groups_and_pictures(tmp_path):
    with MetricsLogger(tmp_path, 10, descriptions={"mfu": "peak: made up"}) as logger:
        scalars = {"loss": 2.0, "learning_rate": 1e-3, "mfu": 0.5, "tokens_seen/english": 5, "unheard_of": 1.0}
        logger.log(3, scalars, {"expert_load": np.array([[0.75, 0.25], [0.5, 0.5], [0.0, 1.0]])})
    board = events(tmp_path)
    assert set(board.Tags()["scalars"]) == {
        "loss/loss", "optimizer/learning_rate", "speed/mfu", "tokens_seen/english", "other/unheard_of",
        *(f"expert_load_{end}/layer_0{layer}" for end in ("max", "min") for layer in range(3)),
    }  # fmt: skip
    assert board.Tags()["images"] == ["expert_load"]
    assert [(e.step, e.value) for e in board.Scalars("optimizer/learning_rate")] == [(3, pytest.approx(1e-3))]
    ends = {
        end: [board.Scalars(f"expert_load_{end}/layer_0{layer}")[0].value for layer in range(3)]
        for end in ("max", "min")
    }
    assert ends == {"max": [1.5, 1.0, 2.0], "min": [0.5, 1.0, 0.0]}
    (legend,) = board.Tensors("about/text_summary")
    assert "devices * peak FLOP/s of one); peak: made up |" in legend.tensor_proto.string_val[0].decode()


def test_picture_colours():
    picture = load_picture(np.array([[0.25, 0.0, 0.5, 0.25]]))[8, 8::16].tolist()
    white, black, more = [255, 255, 255], [0, 0, 0], picture[2]
    assert picture == [white, black, more, white]
    assert more[0] > more[2]  # reddish
    less = load_picture(np.array([[0.5, 0.1, 0.2, 0.2]]))[0, 16]
    assert less[0] < less[2]  # bluish
    extremes = load_picture(np.array([[1.0, 1e-9] + [0.0] * 8]))[0, [0, 16]].tolist()
    assert extremes == [[178, 24, 43], [33, 102, 172]]


@pytest.mark.drills
@pytest.mark.parametrize("torn", [b"", b'{"step": 60, "lo'])
def test_resuming_writes_no_step_twice(tmp_path, torn):
    run(tmp_path, range(10, 61, 10))
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    run(tmp_path, range(40, 71, 10), resume_step=30, version=0.5)
    expected = {10: 10.0, 20: 20.0, 30: 30.0, 40: 40.5, 50: 50.5, 60: 60.5, 70: 70.5}
    assert [(line["step"], line["loss"]) for line in strict_lines(tmp_path)] == list(expected.items())
    assert [(event.step, event.value) for event in events(tmp_path).Scalars("loss/loss")] == list(expected.items())


def test_a_run_that_starts_anew_keeps_nothing(tmp_path):
    run(tmp_path, range(0, 31, 10))
    run(tmp_path, range(0, 11, 10), version=0.5)
    assert [(line["step"], line["loss"]) for line in strict_lines(tmp_path)] == [(0, 0.5), (10, 10.5)]
    assert [(event.step, event.value) for event in events(tmp_path).Scalars("loss/loss")] == [(0, 0.5), (10, 10.5)]


@pytest.mark.drills
@pytest.mark.parametrize("line", ["oops", "[1]", '{"loss": 1}', '{"step": "x"}', ""])
def test_a_damaged_line_is_named_and_nothing_is_lost(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    before = '{"step": 1}\n' + line + '\n{"step": 3}\n'
    path.write_text(before)
    with pytest.raises(
        UserError, match=re.escape(f"line 2 of {path} is not a JSON object with a step: remove the line")
    ):
        MetricsLogger(tmp_path, 10, resume_step=3)
    assert path.read_text() == before


@pytest.mark.drills
def test_a_full_disk_is_a_sentence(tmp_path):
    if not Path("/dev/full").exists():
        pytest.fail("this test needs /dev/full, as Linux has it")
    file = metrics_file.MetricsFile(tmp_path / "metrics.jsonl", 0)
    file._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    reason = os.strerror(errno.ENOSPC)
    with pytest.raises(UserError, match=re.escape(f"cannot write {tmp_path / 'metrics.jsonl'}: {reason}; fix that")):
        file.write(1, {"loss": 1.0}, {})
    file.close()


def test_other_processes_write_nothing(tmp_path, capsys):
    with MetricsLogger(tmp_path / "run", 10, is_main=False) as logger:
        logger.log(1, {"loss": 1.0})
        logger.advance(2)
        logger.say("hello")
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


@pytest.mark.drills
def test_plain_lines_without_control_codes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with MetricsLogger(tmp_path, 30) as logger:
        logger.say("saved [checkpoint] at step 5")
        logger.advance(5)
        logger.log(10, {"loss": 2.0, "tokens_per_second": 12345.6, "mfu": 0.342})
        logger.log(20, {"eval/english/perplexity": 3.0})
        logger.log(30, {"loss": float("nan"), "skipped_updates": 2})
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert "\r" not in text
    lines = text.splitlines()
    assert lines[0] == "saved [checkpoint] at step 5"
    assert re.fullmatch(
        r"train 10/30  loss 2\.0000  12,346 tok/s  MFU 34\.2%  elapsed 0:00:00  left 0:00:0\d", lines[1]
    )
    assert lines[2:] == ["train 30/30  loss nan  2 updates skipped  elapsed 0:00:00"]


def test_live_bar_shows_every_logged_step(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "stdout", stream := Terminal())
    logger = MetricsLogger(tmp_path, 250_000)
    for step in (100_000, 200_000):
        logger.log(step, {"loss": step / 1000, "tokens_per_second": 1.2e6, "mfu": 0.5})
        logger._progress._progress.refresh()
        bar = stream.getvalue().splitlines()[-1]
        assert f"{step}/250000" in bar
        assert f"loss {step / 1000:.4f}" in bar
    logger.say("saved [checkpoint]")
    logger.close()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue()).replace("\r", "\n")
    assert all(len(line) <= 80 for line in plain.splitlines() if "━" in line)
    assert plain.count("elapsed") == 1  # a permanent line at the first logged step, the next half a minute later
    assert "saved [checkpoint]" in plain


@pytest.mark.drills
def test_a_dumb_terminal_gets_plain_lines(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys, "stdout", stream := Terminal())
    run(tmp_path, range(1, 3))
    assert "\x1b" not in stream.getvalue()
    assert len(stream.getvalue().splitlines()) == 2


def test_clock():
    assert [clock(seconds) for seconds in (0.4, 61.0, 3599.6, 1e5)] == ["0:00:00", "0:01:01", "1:00:00", "27:46:40"]
