"""A server under load: tokens a second, time to the first token and memory with 1, 4 and 16 streams.

    python -m benchmarks.serving CHECKPOINT [--streams 1 4 16] [--tokens 64] [--requests 4]

Starts `python -m mixtral_jax serve` on loopback. Every client streams its requests one after the other. Tokens are
those that the server's own /metrics counts, first tokens are timed by the clients, memory is the server's.
"""

import argparse
import contextlib
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from benchmarks.measure import Report

PROMPT = "Once upon a time there was a river, and "


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=64, help="of an answer, at most")
    parser.add_argument("--requests", type=int, default=4, help="of each stream")
    options = parser.parse_args(arguments)
    report = Report(
        f"serving {options.checkpoint}, answers of {options.tokens} tokens",
        "tokens/s over all streams; first token: milliseconds from a request to its first token, median and largest; "
        "memory of the server after the row",
    )
    with serving(options.checkpoint, max(options.streams)) as (url, process):
        stream(url, 4)  # what is made at the first request is not the load's
        for streams in options.streams:
            before, begin = drawn(url), time.perf_counter()
            with ThreadPoolExecutor(streams) as pool:
                firsts = list(pool.map(lambda _: stream(url, options.tokens), range(streams * options.requests)))
            seconds = time.perf_counter() - begin
            report.add(
                streams=streams, requests=len(firsts), tokens_a_second=(drawn(url) - before) / seconds,
                first_token_ms=1e3 * statistics.median(firsts), largest_first_ms=1e3 * max(firsts),
                memory_MiB=resident_mib(process.pid),
            )  # fmt: skip
    report.show()


@contextlib.contextmanager
def serving(checkpoint: str, streams: int) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Runs a server; its address and its process."""
    options = ["--port", "0", "--max-concurrency", str(streams)]
    command = [sys.executable, "-m", "mixtral_jax", "serve", checkpoint, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = next(filter(None, (re.search(r"http://\S+:\d+", line) for line in process.stdout)), None)
            if found is None:
                raise SystemExit("the server did not start")
            yield found[0], process
        finally:
            process.terminate()


def stream(url: str, tokens: int) -> float:
    """Reads one streamed answer and returns the seconds to its first token."""
    wish = {"prompt": PROMPT, "max_tokens": tokens, "temperature": 1.0, "stream": True}
    first, begin = 0.0, time.perf_counter()
    with httpx.stream("POST", f"{url}/v1/completions", json=wish, timeout=600, trust_env=False) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not first and line.startswith("data: {"):
                first = time.perf_counter() - begin
    return first


def drawn(url: str) -> float:
    """Tokens that the server has drawn so far."""
    text = httpx.get(f"{url}/metrics", timeout=60, trust_env=False).text
    found = re.search(r"^mixtral_jax_drawn_tokens_total (\S+)$", text, re.MULTILINE)
    assert found, text
    return float(found[1])


def resident_mib(process: int) -> float:
    """Memory of a process, as Linux counts it."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process}/status").read_text())
    assert found
    return int(found[1]) / 2**10


if __name__ == "__main__":
    main()
