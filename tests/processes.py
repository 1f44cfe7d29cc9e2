"""Processes on this machine: an entry script's, as a launcher starts them, or a function's, with a life of its own.

Python's fork server has imported what all of them would import first. `test_runs` and the script for SLURM start
programs as a person does.
"""

import multiprocessing
import os
import re
import runpy
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.small_run import environment, flags

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.processes", "mixtral_jax.training.trainer", "mixtral_jax.training.summary"])
PATIENCE = 300  # seconds, for what takes a few on an idle machine
HEARTBEAT = 6  # seconds


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Ended:
    code: int
    out: str
    err: str


def on_devices(devices: int = 1, **more: str) -> dict[str, Any]:
    """The environment of a process with so many simulated devices."""
    return environment(XLA_FLAGS=flags(devices), **more)


def fork(target: Callable[..., Any], *arguments: Any, **variables: str | None) -> Any:
    """Starts a function in a process of its own, with these environment variables; it is killed with this one.

    Returns:
        The process, as `multiprocessing` knows it.
    """
    process = SERVER.Process(target=_run, args=(target, arguments, environment(**variables)), daemon=True)
    process.start()
    return process


def _run(target: Callable[..., Any], arguments: tuple[Any, ...], variables: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(variables)
    multiprocessing.process.current_process()._config["daemon"] = False  # which would forbid it children
    target(*arguments)


def run_script(out: Path, err: Path, command: list[str]) -> None:
    """Runs a script with its arguments as `python SCRIPT ...` does, with its output in files."""
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


class Processes:
    """Processes on loopback, numbered from 0; their output goes to files in a directory."""

    def __init__(self, directory: Path, count: int, *command: object, devices: int = 1, each: dict | None = None):
        """Starts them.

        Args:
            directory: gets the output.
            count: how many; 1 is alone.
            command: script and arguments; the keys of `distributed` are added.
            devices: simulated devices of each process.
            each: more arguments by number of the process.
        """
        self.directory = directory / f"processes-{time.monotonic_ns()}"
        self.directory.mkdir(parents=True)
        port = free_port()
        self.all = []
        for number in range(count):
            keys = {"coordinator": f"127.0.0.1:{port}", "num_processes": count, "process_id": number}
            keys["heartbeat_timeout"] = HEARTBEAT
            joining = [f"distributed.{key}={value}" for key, value in keys.items()] if count > 1 else []
            arguments = [*map(str, command), *joining, *(each or {}).get(number, [])]
            files = (self.file(number, "out"), self.file(number, "err"))
            self.all.append(fork(run_script, *files, arguments, **on_devices(devices)))

    def file(self, number: int, name: str) -> Path:
        return self.directory / f"{number}.{name}"

    def report(self) -> str:
        return "\n".join(f"{path.name}: {path.read_text()[-2000:]}" for path in sorted(self.directory.iterdir()))

    def wait_for(self, sign: Callable[[], object], pause: float = 0.05) -> None:
        """Waits until `sign()` is true while all processes live."""
        deadline = time.monotonic() + PATIENCE
        while not sign():
            assert all(process.exitcode is None for process in self.all), self.report()
            assert time.monotonic() < deadline, self.report()
            time.sleep(pause)

    def end(self, within: float = PATIENCE) -> list[Ended]:
        """Waits for the end of all; kills and fails when one takes longer than so many seconds."""
        deadline = time.monotonic() + within
        for process in self.all:
            process.join(max(0.1, deadline - time.monotonic()))
        late = [process for process in self.all if process.exitcode is None]
        for process in late:
            process.kill()
            process.join()
        assert not late, f"a process goes on after {within} seconds:\n{self.report()}"
        texts = [[self.file(number, name).read_text() for name in ("out", "err")] for number in range(len(self.all))]
        return [Ended(process.exitcode, *text) for process, text in zip(self.all, texts, strict=True)]


def without_noise(text: str) -> str:
    """Output without what the C++ under JAX prints about connections and signals."""
    noise = re.compile(r"\[Gloo\]|preemption_notifier\.cc|peer ranks|^[ \d]*$")  # the latter: pieces, where threads met
    return "".join(line for line in text.splitlines(keepends=True) if not noise.search(line.rstrip("\n")))
