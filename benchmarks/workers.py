"""Contenders in processes of their own, which work in turn: one machine, one run, separate memory."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import median_ratio

HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # as train.py asks for; contenders gain by it too


def race(module: str, contenders: Sequence[Sequence[str]], rounds: int) -> list[dict[str, Any]]:
    """Starts one process for each contender and lets them work in turn.

    Args:
        module: run as `python -m MODULE --worker ARGUMENTS`; it calls `serve`.
        contenders: arguments of each.
        rounds: how often each works; a first time, uncounted, compiles.

    Returns:
        For each contender: the `seconds` of its rounds, `first_seconds` of the uncounted one, `peak_gib` of the
        process, and what it said about itself; or `failed`, its last line.
    """
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, "--worker", *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **HUGE_PAGES},
        )
        for arguments in contenders
    ]  # fmt: skip
    results: list[dict[str, Any]] = [{"seconds": []} for _ in processes]
    for number in range(rounds + 1):
        for process, result in zip(processes, results, strict=True):
            if "failed" in result:
                continue
            answer = _ask(process)
            if answer is None:
                result["failed"] = (process.communicate()[1].strip().splitlines() or ["no word"])[-1]
            elif number:
                result["seconds"].append(answer["seconds"])
            else:
                result["first_seconds"] = answer["first"]
    for process, result in zip(processes, results, strict=True):
        if "failed" not in result:
            out, _ = process.communicate()
            result.update(json.loads(out.strip().splitlines()[-1]))
    return results


def _ask(process: subprocess.Popen[str]) -> dict[str, Any] | None:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write("go\n")
        process.stdin.flush()
    except BrokenPipeError:
        return None
    for line in process.stdout:
        if line.startswith("{"):
            return json.loads(line)
    return None


def serve(work: Callable[[], Any], about: Callable[[], dict[str, Any]]) -> None:
    """A contender's side: works for every line of its standard input, then tells about itself.

    A turn is three times the work, of which the first does not count: it takes back memory and caches from those whose
    turn it was, which work without pauses never has to.

    Args:
        work: has finished, on the device too, when it returns.
        about: facts for the table, asked for at the end.
    """
    for _ in sys.stdin:
        seconds = []
        for _ in range(3):
            begin = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - begin)
        print(json.dumps({"seconds": statistics.mean(seconds[1:]), "first": seconds[0]}), flush=True)
    print(json.dumps({"peak_gib": peak_gib(), **about()}), flush=True)


def peak_gib() -> float:
    """Highest resident size of this process so far, as Linux counts it."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields["VmHWM"].split()[0]) / 2**20


def ratio_to_first(results: list[dict[str, Any]]) -> list[float | None]:
    """Speed of each contender as a multiple of the first one's, by rounds."""
    return [
        None if "failed" in result else median_ratio(results[0]["seconds"], result["seconds"]) for result in results
    ]


def median_seconds(result: dict[str, Any]) -> float:
    """Median over the rounds."""
    return statistics.median(result["seconds"])
