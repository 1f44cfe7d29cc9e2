"""The server over an engine without a model."""

import asyncio
import json
from collections.abc import Callable
from functools import cache

import httpx

from mixtral_jax.config import UserError
from mixtral_jax.inference.batching import RunningBatch, Token
from mixtral_jax.inference.text import Continuation, Prompt
from mixtral_jax.serving.app import Service, make_app
from mixtral_jax.serving.engine import Engine, Job, Progress
from mixtral_jax.serving.prompts import Reader
from tests.serving.server import tokenizer


class Answering(Engine):
    """An engine without a model: every text is two words and an end."""

    def __init__(self) -> None:
        super().__init__(object.__new__(RunningBatch), tokenizer(), queue=4)

    def submit(self, prompts: list[Prompt], alternatives: int, deliver: Callable[[int, Progress], None]) -> list[Job]:
        jobs = [Job(Continuation(prompt, self.tokenizer), alternatives, lambda _: None) for prompt in prompts]
        words = [*self.tokenizer.encode("the river"), self.tokenizer.eos_id]
        for number, job in enumerate(jobs):
            drawn = [Token(word, -1.0, [[0, 1]] * 2, []) for word in words]
            while not job.continuation.finish_reason:
                deliver(number, job.take(drawn))
        return jobs


@cache
def served() -> tuple[asyncio.AbstractEventLoop, httpx.AsyncClient]:
    service = Service("tiny", 2, 4, Reader(tokenizer(), tokenizer().vocab_size, 1000, 4), Answering())
    transport = httpx.ASGITransport(make_app(service))
    return asyncio.new_event_loop(), httpx.AsyncClient(transport=transport, base_url="http://tiny")


def body(path: str) -> Callable[[bytes], None]:
    """An answer or a refusal, both JSON; what a reader of the stream would stumble over is raised here."""

    def run(data: bytes) -> None:
        loop, client = served()
        answer = loop.run_until_complete(
            client.post(f"/v1/{path}", content=data, headers={"content-type": "application/json"})
        )
        if answer.status_code in (400, 404):
            raise UserError(answer.json()["error"]["message"])
        assert answer.status_code == 200, answer.text
        streamed = answer.headers["content-type"].startswith("text/event-stream")
        chunks = (
            [line.removeprefix("data: ") for line in answer.text.split("\n") if line] if streamed else [answer.text]
        )
        assert all("error" not in json.loads(chunk) for chunk in chunks if chunk != "[DONE]")

    return run
