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

CLIENTS, REQUESTS, DISTINCT = 16, 200, 25


def make_bodies():
    """Requests that differ in length and sampling."""
    draw = random.Random(5)
    for number in range(DISTINCT):
        body = {"prompt": " ".join(draw.choices(WORDS, k=draw.choice([1, 3, 20, 60]))), "max_tokens": 2 + number % 12}
        if number % 2:
            top_p, penalty = draw.choice([1.0, 0.9]), draw.choice([1.0, 1.3])
            body |= {"temperature": 0.9, "seed": draw.randrange(9), "top_p": top_p, "repetition_penalty": penalty}
        else:
            body["temperature"] = 0.0
        yield body


def ask(client, body, *, stream=True, break_off=False):
    """One answer, streamed or not; None if it is broken off."""
    if not stream:
        return client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        text = ""
        for line in response.iter_lines():
            if break_off:
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
    draw, bodies = random.Random(6), list(make_bodies())
    chosen = [*range(DISTINCT), *draw.choices(range(DISTINCT), k=REQUESTS - DISTINCT)]
    draw.shuffle(chosen)
    streamed = [number % 3 > 0 for number in range(REQUESTS)]
    broken_off = [number % 10 == 1 and streamed[number] for number in range(REQUESTS)]
    with serving(queue=2 * CLIENTS) as served:
        alone = [ask(served.client, body) for body in bodies]  # one after the other
        answers = {}

        def work(first):
            with httpx.Client(base_url=served.url, timeout=60, trust_env=False) as client:
                for number in range(first, REQUESTS, CLIENTS):
                    body = bodies[chosen[number]]
                    answers[number] = ask(client, body, stream=streamed[number], break_off=broken_off[number])

        with compilations() as compiled, ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(work, range(CLIENTS)))
        wait_until(lambda: served.engine.running == served.engine.waiting == 0)
        assert compiled == []
        expected = [None if broken_off[number] else alone[body] for number, body in enumerate(chosen)]
        assert [answers[number] for number in range(REQUESTS)] == expected
        assert len(set(alone)) == DISTINCT
        assert len(begun) == REQUESTS + DISTINCT
        # In a process full of other tests' objects one collection takes seconds.
        wait_until(lambda: not jobs or (gc.collect() >= 0 and not jobs), seconds=60)


def test_the_benchmark_counts_a_server_s_tokens_and_its_memory():
    with serving() as served:
        before = benchmark.drawn(served.url)
        assert benchmark.stream(served.url, 7) > 0
        assert 0 < benchmark.drawn(served.url) - before <= 7
    assert benchmark.resident_mib(os.getpid()) > 1
