"""Many clients at once: every answer is the one that is computed alone, some go away, and nothing is left behind."""

import gc
import json
import os
import random
import weakref
from concurrent.futures import ThreadPoolExecutor

import httpx

from benchmarks import serving as benchmark
from mixtral_jax.serving.engine import Job
from tests.serving.server import serving, wait_until
from tests.small_run import WORDS
from tests.tiny import compilations

CLIENTS, REQUESTS = 16, 200


def requests():
    draw = random.Random(5)
    for number in range(REQUESTS):
        body = {"prompt": " ".join(draw.choices(WORDS, k=draw.choice([1, 3, 20]))), "max_tokens": draw.randint(1, 12)}
        if draw.random() < 0.5:
            body |= {"temperature": 0.9, "seed": draw.randrange(9), "top_p": draw.choice([1.0, 0.9])}
        else:
            body["temperature"] = 0.0
        yield number, body


def ask(url, number, body):
    """One answer, streamed or not; None if it is broken off."""
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        if number % 3 == 0:
            return client.post("/v1/completions", json=body).json()["choices"][0]["text"]
        with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
            text = ""
            for line in response.iter_lines():
                if number % 10 == 1:
                    return None
                if line.startswith("data: {"):
                    text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
            return text


def test_two_hundred_requests_of_sixteen_clients(monkeypatch):
    jobs, begun, take_part = weakref.WeakSet(), [], Job.__init__

    def noted(self, *arguments):
        take_part(self, *arguments)
        jobs.add(self)
        begun.append(1)

    monkeypatch.setattr(Job, "__init__", noted)
    with serving(queue=2 * CLIENTS) as served:
        alone = {}
        for number, body in requests():
            if number % 10 == 7:  # a sample, one after the other
                alone[number] = ask(served.url, number, body)
        with compilations() as compiled, ThreadPoolExecutor(CLIENTS) as pool:
            answers = list(pool.map(lambda asked: ask(served.url, *asked), requests()))
        wait_until(lambda: served.engine.running == served.engine.waiting == 0)
        assert compiled == []
        assert {number: answers[number] for number in alone} == alone
        assert [number for number, answer in enumerate(answers) if answer is None] == [
            number for number in range(REQUESTS) if number % 10 == 1 and number % 3
        ]
        assert len(set(answers)) > REQUESTS / 2
        assert len(begun) == REQUESTS + len(alone)
        # In a process full of other tests' objects one collection takes seconds.
        wait_until(lambda: not jobs or (gc.collect() >= 0 and not jobs), seconds=60)


def test_the_benchmark_counts_a_server_s_tokens_and_its_memory():
    with serving() as served:
        before = benchmark.drawn(served.url)
        assert benchmark.stream(served.url, 7) > 0
        assert 0 < benchmark.drawn(served.url) - before <= 7
    assert benchmark.resident_mib(os.getpid()) > 1
