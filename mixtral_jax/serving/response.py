"""A request between the engine, which writes its texts, and the client, who may go away."""

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Sequence

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from sse_starlette import EventSourceResponse
from sse_starlette.sse import AppStatus, SendTimeoutError
from starlette.types import Receive, Scope, Send

from mixtral_jax.inference.text import Prompt
from mixtral_jax.serving import requests
from mixtral_jax.serving.answers import Choice, Json
from mixtral_jax.serving.engine import BusyError, Engine, Job, Progress, StoppedError
from mixtral_jax.serving.errors import ApiError

SEND_SECONDS = 60.0  # a client that takes nothing for so long is gone

AppStatus.disable_automatic_graceful_drain()  # SIGTERM lets streams end; uvicorn knows how long


class PendingResponse:
    """The texts that a request asked for, while the engine writes them."""

    def __init__(self, request: requests.Request, model: str, choices: Sequence[Choice]):
        """Names the answer.

        Args:
            request: the request.
            model: its name.
            choices: one for each text.
        """
        self.request, self.choices = request, choices
        self._chat = isinstance(request, requests.ChatRequest)
        self._kind = "chat.completion" if self._chat else "text_completion"
        name = f"{'chatcmpl' if self._chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._head = {"id": name, "created": int(time.time()), "model": model}
        self._jobs: list[Job] = []
        self._news: asyncio.Queue[tuple[int, Progress]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def submit(self, engine: Engine, prompts: list[Prompt], alternatives: int) -> None:
        """Gets in line."""

        def deliver(number: int, progress: Progress) -> None:
            self._loop.call_soon_threadsafe(self._news.put_nowait, (number, progress))

        try:
            self._jobs = engine.submit(prompts, alternatives, deliver)
        except BusyError:
            raise ApiError(429, "as many requests wait as may: try again later", code="queue_full") from None
        except StoppedError:
            raise ApiError(503, "the server is about to stop") from None

    async def pieces(self) -> AsyncIterator[Json]:
        """Takes what the engine delivers, and yields the choices of a stream's chunks, until all texts have ended."""
        while any(choice.finish_reason is None for choice in self.choices):
            number, progress = await self._news.get()
            if progress.finish_reason == "error":
                raise ApiError(500, "the server failed while it wrote this text")
            if piece := self.choices[number].add(progress):
                yield piece

    async def whole(self) -> Json:
        """Waits for all texts."""
        async for _ in self.pieces():
            pass
        choices = [choice.whole() for choice in self.choices]
        return {**self._head, "object": self._kind, "choices": choices, "usage": self.usage()}

    async def events(self) -> AsyncIterator[str]:
        """Yields the data of server-sent events."""
        if self._chat:
            begin = {"delta": {"role": "assistant", "content": ""}, "finish_reason": None}
            yield self._chunk([{"index": choice.index, **begin} for choice in self.choices])
        try:
            async for piece in self.pieces():
                yield self._chunk([piece])
        except ApiError as error:
            yield _written(error.body())
            return
        if self.request.stream_options.include_usage:
            yield self._chunk([], usage=self.usage())
        yield "[DONE]"

    def _chunk(self, choices: list[Json], **more: Json) -> str:
        kind = "chat.completion.chunk" if self._chat else self._kind
        return _written({**self._head, "object": kind, "choices": choices, **more})

    def usage(self) -> Json:
        """Counts tokens; a prompt of which several continuations were asked counts once."""
        prompt = sum(len(job.continuation.prompt.tokens) for job in self._jobs[:: self.request.n])
        drawn = sum(len(choice.tokens) for choice in self.choices)
        return {"prompt_tokens": prompt, "completion_tokens": drawn, "total_tokens": prompt + drawn}

    def cancel(self, engine: Engine) -> None:
        """Frees what the texts hold."""
        for job in self._jobs:
            engine.cancel(job)


class Stream(EventSourceResponse):
    """Server-sent events; whatever ends them ends the writing, too."""

    def __init__(self, pending: PendingResponse, engine: Engine):
        """Takes a request that is in line.

        Args:
            pending: the request.
            engine: that writes its texts.
        """
        super().__init__(pending.events(), sep="\n", send_timeout=SEND_SECONDS)
        self._pending, self._engine = pending, engine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends them."""
        try:
            with contextlib.suppress(SendTimeoutError):
                await super().__call__(scope, receive, send)
        finally:
            self._pending.cancel(self._engine)


async def respond_whole(client: Request, pending: PendingResponse, engine: Engine) -> Response:
    """Answers at once with all texts, unless the client goes away before.

    Args:
        client: what it is known by; its body has been read.
        pending: the request, in line.
        engine: that writes its texts.
    """
    try:
        return JSONResponse(await _unless_gone(client, pending.whole()))
    finally:
        pending.cancel(engine)


async def _unless_gone(client: Request, work: Coroutine[None, None, Json]) -> Json | None:
    """Waits for work, or until the client has gone."""

    async def gone() -> None:
        while (await client.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()


def _written(data: Json) -> str:
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"))
