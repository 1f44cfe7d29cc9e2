"""The edge to the shell: streams that end, encodings, names with brackets, platforms, and what is told at once."""

import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from rich.progress import Progress, TextColumn
from rich.table import Table

from mixtral_jax import cli
from mixtral_jax.config import DistributedConfig, UserError
from mixtral_jax.console import ProgressLine, make_console, two_lines
from mixtral_jax.kernels.cpu import intrinsics
from mixtral_jax.verbs import VERBS
from tests.processes import fork
from tests.small_run import ROOT, environment, run, write_config

NAMES = ["wiki[en]", "wiki[/en]", "[bold]", "[/]", ":smile:", "[link=x]y[/link]"]
PRINTS = """
from pathlib import Path
from rich.table import Table
from mixtral_jax import cli
from mixtral_jax.config import DistributedConfig
from mixtral_jax.console import ProgressLine, make_console

def main(arguments):
    console, table = make_console(), Table(caption="Übung")
    table.add_column("漢字")
    table.add_row("😀 — naïve")
    console.print(table)
    with ProgressLine("Straße", 3000) as line:
        for step in range(3000):
            line.update(step, "…")
    Path(arguments[0]).write_text("done")

cli.run(main)
"""


def printing(done: Path, stdout: int | None, **variables: str) -> tuple[subprocess.Popen[bytes], Path]:
    closing = None if stdout is not None else lambda: os.close(1)
    command, env = [sys.executable, "-c", PRINTS, str(done)], environment(**variables)
    return subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE, env=env, preexec_fn=closing), done


def ended(process: subprocess.Popen[bytes]) -> str:
    assert process.stderr
    err = process.stderr.read().decode()
    assert process.wait(60) == 0, err
    return err


@pytest.mark.drills
def test_a_reader_that_has_seen_enough_ends_nothing(tmp_path: Path) -> None:
    process, done = printing(tmp_path / "done", subprocess.PIPE)
    assert process.stdout
    process.stdout.readline()
    process.stdout.close()
    assert ended(process) == "standard output is lost (Broken pipe): going on without it\n"
    assert done.read_text() == "done"


@pytest.mark.drills
@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="the system has no /dev/full")
def test_a_full_disk_under_standard_output_ends_nothing(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        process, done = printing(tmp_path / "done", full.fileno())
        assert ended(process) == "standard output is lost (No space left on device): going on without it\n"
    assert done.read_text() == "done"


@pytest.mark.drills
def test_a_closed_standard_output_ends_nothing(tmp_path: Path) -> None:
    process, done = printing(tmp_path / "done", None)
    assert ended(process) == ""
    assert done.read_text() == "done"


@pytest.mark.parametrize(
    "variables", [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"}, {"TERM": "dumb"}, {"LC_ALL": "C"}]
)
def test_every_text_prints_in_every_encoding(tmp_path: Path, variables: dict[str, str]) -> None:
    with (tmp_path / "out").open("w") as out:
        process, done = printing(tmp_path / "done", out.fileno(), **variables)
        assert ended(process) == ""
    assert done.read_text() == "done"
    text = (tmp_path / "out").read_bytes()
    assert text.count(b"2999/3000") == 1
    if variables.get("PYTHONIOENCODING") == "ascii":
        assert text.isascii()


def test_names_are_printed_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    console = make_console(file=io.StringIO(), width=200)
    table = Table(caption=NAMES[0], title=NAMES[1])
    for name in NAMES:
        table.add_column(name)
    table.add_row(*NAMES)
    table.add_row(*[two_lines(name, name) for name in NAMES])
    console.print(table)
    for name in NAMES:
        console.print(name)
        assert console.file.getvalue().count(name) >= 4  # type: ignore[attr-defined]
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with ProgressLine(NAMES[1], 1) as line:
        line.update(1, NAMES[0])
    assert f"{NAMES[1]} 1/1  {NAMES[0]}" in sys.stdout.getvalue()  # type: ignore[attr-defined]


def test_names_in_a_live_bar_are_as_they_are() -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    for name in NAMES:
        before, sys.stdout = sys.stdout, Screen()
        try:
            with ProgressLine(name, 2) as line:
                line.update(1, name)
            columns = [column for column in line._progress.columns if isinstance(column, TextColumn)]
        finally:
            sys.stdout = before
        assert columns
        assert not any(column.markup for column in columns)
        assert isinstance(line._progress, Progress)


PLATFORM = """
import os, sys
from mixtral_jax import cli
cli.ACCELERATORS = {}
{}
assert 'jax' not in sys.modules
print(os.getenv('JAX_PLATFORMS'))
"""
STARTS = ("cli.run(lambda _: None)", "import benchmarks")


def test_a_log_gets_one_last_line_however_often_the_end_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressLine("pages", 8, plain_line_seconds=60.0) as line:
        for done in (1, 4, 8, 8, 8):
            line.update(done, "")
    assert [text.split("  ")[0] for text in capsys.readouterr().out.splitlines()] == ["pages 1/8", "pages 8/8"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux shows its devices as files")
@pytest.mark.parametrize(
    ("devices", "given", "platform"),
    [((), None, "cpu"), (("/dev/null",), None, "None"), ((), "cuda", "cuda"), (("/dev/null",), "tpu", "tpu")],
)
def test_the_platform_is_chosen_where_there_is_nothing_to_choose(
    devices: tuple[str, ...], given: str | None, platform: str
) -> None:
    for start in STARTS:
        code = PLATFORM.format(devices, start)
        command = [sys.executable, "-c", code]
        out = subprocess.run(command, env=environment(JAX_PLATFORMS=given), capture_output=True, text=True)
        assert (out.stdout.strip(), out.stderr) == (platform, "")


WATCHED = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print(sorted({"jax", "orbax", "numba", "datasets"} & {*sys.modules}))
"""


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["train.py", "--help"], 0), (["train.py", "-h"], 0), (["train.py", "train.setps=3"], 2),
        (["train.py", "none.yaml"], 2), (["train.py", "seed=-1"], 2), (["train.py", "data.sources=[]"], 2),
        (["train.py", "data.sources=[{name: a, path: nowhere.txt}]"], 2),
        (["eval.py", "--help"], 0), (["eval.py", "no-run"], 2), (["eval.py", ".", "mood"], 2),
        (["mixtral_jax/__main__.py", "--help"], 0), (["mixtral_jax/__main__.py", "import", "--help"], 0),
        (["mixtral_jax/__main__.py", "exprot"], 2), (["mixtral_jax/__main__.py", "import", "nothing", "new"], 2),
        (["mixtral_jax/__main__.py", "import", "configs", "tests"], 2),
        (["mixtral_jax/__main__.py", "export", "nothing", "new", "--format", "hf"], 2),
        (["mixtral_jax/__main__.py", "compare", "configs", "nothing"], 2),
    ],
    ids=str,
)  # fmt: skip
def test_help_and_mistakes_are_told_before_anything_heavy_is_loaded(words: list[str], code: int) -> None:
    out = subprocess.run(
        [sys.executable, "-c", WATCHED, *words], env=environment(), capture_output=True, cwd=ROOT, text=True
    )
    assert (out.returncode, out.stderr.count("\n")) == (code, bool(code)), out.stderr
    assert out.stdout.splitlines()[-1] == "[]"
    if words[0] == "train.py" and not code:
        assert "python train.py [CONFIG.yaml] [key=value ...]" in out.stdout
        assert "\n  optimizer.warmup_steps=null\n" in out.stdout


def test_compiled_functions_find_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for read-only code and a user without a home: a file stands where the directory would have to be."""
    (tmp_path / "file").touch()
    find = intrinsics._cache.__wrapped__
    monkeypatch.setattr(intrinsics.settings, "CACHE_DIR", str(tmp_path / "own"))
    assert Path(find()).parent == tmp_path / "own"
    monkeypatch.setattr(intrinsics.settings, "CACHE_DIR", str(tmp_path / "file"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert Path(find()).parent == tmp_path / "xdg" / "mixtral_jax"
    monkeypatch.setenv(intrinsics.CACHES, "")  # so that it goes back
    several = DistributedConfig(num_processes=2)  # which do not start themselves once more
    cli.prepare(several, "")
    assert not os.environ[intrinsics.CACHES]
    cli.prepare(several, str(tmp_path / "data"))
    assert Path(find()).parent == tmp_path / "data"
    monkeypatch.setenv(intrinsics.CACHES, str(tmp_path / "file"))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    last = Path(find())
    assert last.is_dir()
    assert Path("~") not in last.parents
    assert not Path("~").exists()


@pytest.mark.slow
def test_a_platform_that_is_not_there(tmp_path: Path) -> None:
    result = run("train.py", write_config(tmp_path), JAX_PLATFORMS="cuda")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert "no devices of cuda: there are none" in result.stderr
    assert "unset JAX_PLATFORMS" in result.stderr


@pytest.mark.slow
def test_a_config_with_an_equals_sign_in_its_name(tmp_path: Path) -> None:
    config = write_config(tmp_path).rename(tmp_path / "lr=1.yaml")
    result = run("train.py", config, "train.steps=0")
    assert result.stderr == "error: train.steps is 0: it must be greater than 0\n"


LOSES = """
import gc, os, signal, time
from mixtral_jax import cli

def lose(phase, info):
    if not lost:
        lost.append(phase)
        os.kill(os.getpid(), signal.SIGINT)
        [None for _ in range(9)]

def main(arguments):
    gc.callbacks.append(lose)
    gc.collect()
    time.sleep(20)

lost = []
signal.signal(signal.SIGINT, signal.default_int_handler)
cli.run(main)
"""


def test_ctrl_c_is_not_lost_in_a_callback() -> None:
    result = subprocess.run([sys.executable, "-c", LOSES], env=environment(), capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (130, "interrupted\n")


MAKES_ANOTHER = """
from mixtral_jax import cli

def main(arguments):
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt as error:
        raise SystemError("initialization failed") from error

cli.run(main)
"""


def test_ctrl_c_of_which_a_library_made_another_error() -> None:
    result = subprocess.run([sys.executable, "-c", MAKES_ANOTHER], env=environment(), capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (130, "interrupted\n")


def fail_with_a_thread_that_waits(error: BaseException, out: Path) -> None:
    def main(arguments: list[str]) -> None:
        threading.Thread(target=threading.Event().wait).start()
        print("before")
        raise error

    cli.PATIENCE = 0.1
    os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT), 1)
    cli.run(main)


@pytest.mark.drills
def test_a_failed_program_ends_whatever_its_libraries_wait_for(tmp_path: Path) -> None:
    """Orbax's threads wait ten minutes for one that could not be started."""
    errors = {2: UserError("a mistake"), 1: ValueError("a fault"), 130: KeyboardInterrupt()}
    started = {code: fork(fail_with_a_thread_that_waits, error, tmp_path / str(code)) for code, error in errors.items()}
    for code, process in started.items():
        process.join(60)
        assert process.exitcode == code
        assert (tmp_path / str(code)).read_text() == "before\n"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["export", "run", "there"],
         "the following arguments are required: --format; see python -m mixtral_jax export --help"),
        (["compare", "run"], "the following arguments are required: RUN_OR_CHECKPOINT; see"),
        (["plan"], "the following arguments are required: --topology; see"),
        (["generate", "run", "--top-k", "x"], "argument --top-k: invalid int value: 'x'; see"),
        (["serve", "run", "--prot", "1"], "unrecognized arguments: --prot 1; see"),
    ],
)  # fmt: skip
def test_a_mistaken_command_line_is_one_sentence(words: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        VERBS[words[0]](words[1:])
    assert str(error.value).startswith(sentence)
    assert "\n" not in str(error.value)
