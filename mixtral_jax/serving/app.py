"""The server's endpoints: OpenAI's API over the engine."""

import asyncio
import contextlib
import hmac
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mixtral_jax.serving.engine import Engine
from mixtral_jax.serving.errors import ApiError, refusal, respond
from mixtral_jax.serving.measures import Measures
from mixtral_jax.serving.prompts import Reader
from mixtral_jax.serving.requests import ChatRequest, CompletionRequest
from mixtral_jax.serving.response import PendingResponse, Stream, respond_whole

PAGE = Path(__file__).with_name("page.html")
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; connect-src 'self'"


@dataclass(frozen=True)
class Service:
    """What is served, and to whom."""

    name: str  # of the model
    layers: int
    experts: int
    reader: Reader
    engine: Engine
    api_key: str = field(default="", repr=False)  # empty: for everybody who reaches the server
    body: int = 1 << 20  # bytes of a request, at most


def make_app(service: Service) -> FastAPI:
    """Makes the application; the engine runs while it does."""
    engine, reader, measures = service.engine, service.reader, Measures(service.engine)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.stop)

    app = FastAPI(title="mixtral_jax", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Gate, service=service, measures=measures)

    model = {"id": service.name, "object": "model", "created": int(time.time()), "owned_by": "mixtral_jax",
             "type": "base", "capabilities": {"completion_chat": True},  # as Mistral's client wants it
             "context": reader.context, "layers": service.layers, "experts": service.experts}  # fmt: skip
    page = PAGE.read_text(encoding="utf-8")

    @app.get("/")
    async def chat_page() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": POLICY})

    async def answer(client: Request, request: ChatRequest | CompletionRequest) -> Response:
        if request.model not in (None, service.name):
            text = f"there is no model {request.model}: {service.name} is served"
            raise ApiError(404, text, param="model", code="model_not_found")
        prompts, choices = await asyncio.to_thread(reader.read, request)  # a long text takes a while
        response = PendingResponse(request, service.name, choices)
        response.submit(engine, prompts, choices[0].alternatives or 0)
        return Stream(response, engine) if request.stream else await respond_whole(client, response, engine)

    @app.post("/v1/chat/completions")
    async def chat(client: Request, request: ChatRequest) -> Response:
        return await answer(client, request)

    @app.post("/v1/completions")
    async def completion(client: Request, request: CompletionRequest) -> Response:
        return await answer(client, request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        if name != service.name:
            raise ApiError(404, f"there is no model {name}", param="model", code="model_not_found")
        return model

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "failed" if engine.failed else "ok"}, 503 if engine.failed else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(measures.text(), media_type=measures.content_type)

    @app.exception_handler(RequestValidationError)
    async def refuse(_: Request, error: RequestValidationError) -> Response:
        return respond(refusal(error))

    @app.exception_handler(HTTPException)
    async def tell(_: Request, error: HTTPException) -> Response:
        if error.status_code == 400 and not isinstance(error, ApiError):  # FastAPI's, of a body it cannot parse
            return respond(ApiError(400, "the body cannot be read: send a JSON object in UTF-8"))
        return respond(error)

    @app.exception_handler(Exception)
    async def apologize(_: Request, __: Exception) -> Response:
        return respond(ApiError(500, "the server failed to answer; its log says more"))

    return app


class Gate:
    """Asks for the key, measures bodies and counts answers, around everything else."""

    def __init__(self, app: ASGIApp, service: Service, measures: Measures):
        self._app, self._measures, self._body = app, measures, service.body
        self._expected = f"Bearer {service.api_key}".encode() if service.api_key else b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or not."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        size = 0

        async def bounded() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._body:
                raise ApiError(413, f"the body has more than {self._body:,} bytes", code="body_too_large")
            return message

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._measures.answered(scope["path"], message["status"])
            await send(message)

        if self._admits(scope):
            await self._app(scope, bounded, counted)
        else:
            error = ApiError(401, "the API key is missing or wrong: send it as Authorization: Bearer KEY",
                             code="invalid_api_key")  # fmt: skip
            await respond(error)(scope, receive, counted)

    def _admits(self, scope: Scope) -> bool:
        """Without a key there are the page and whether the server lives."""
        if not self._expected or not (scope["path"].startswith("/v1/") or scope["path"] == "/metrics"):
            return True
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        return hmac.compare_digest(given, self._expected)
