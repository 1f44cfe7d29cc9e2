"""Several processes of an entry script on this machine, as a launcher starts them."""

import re
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.small_run import environment

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


def on_devices(devices: int = 1, **more: str) -> dict[str, str]:
    """The environment of a process with so many simulated devices."""
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    return environment(XLA_FLAGS=flags, **more)


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
            with self.file(number, "out").open("w") as out, self.file(number, "err").open("w") as err:
                process = subprocess.Popen(
                    [sys.executable, *arguments], stdout=out, stderr=err, env=on_devices(devices)
                )
            self.all.append(process)

    def file(self, number: int, name: str) -> Path:
        return self.directory / f"{number}.{name}"

    def report(self) -> str:
        return "\n".join(f"{path.name}: {path.read_text()[-2000:]}" for path in sorted(self.directory.iterdir()))

    def wait_for(self, sign) -> None:
        """Waits until `sign()` is true while all processes live."""
        deadline = time.monotonic() + PATIENCE
        while not sign():
            assert all(process.poll() is None for process in self.all), self.report()
            assert time.monotonic() < deadline, self.report()
            time.sleep(0.05)

    def end(self, within: float = PATIENCE) -> list[Ended]:
        """Waits for the end of all; kills and fails when one takes longer than so many seconds."""
        deadline = time.monotonic() + within
        try:
            for process in self.all:
                process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise AssertionError(f"a process goes on after {within} seconds:\n{self.report()}") from None
        finally:
            for process in self.all:
                process.kill()
                process.wait()
        texts = [[self.file(number, name).read_text() for name in ("out", "err")] for number in range(len(self.all))]
        return [Ended(process.returncode, *text) for process, text in zip(self.all, texts, strict=True)]


def without_noise(text: str) -> str:
    """Output without what the C++ under JAX prints about connections and signals."""
    noise = re.compile(r"\[Gloo\]|preemption_notifier\.cc|peer ranks|^[ \d]*$")  # the latter: pieces, where threads met
    return "".join(line for line in text.splitlines(keepends=True) if not noise.search(line.rstrip("\n")))
