"""The verb `serve`: a model behind OpenAI's API until SIGTERM or an interrupt."""

import signal
import socket
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn

from mixtral_jax.config import UserError
from mixtral_jax.inference.batching import RunningBatch
from mixtral_jax.serving.app import Service, make_app
from mixtral_jax.serving.engine import Engine
from mixtral_jax.serving.opening import open_model
from mixtral_jax.serving.prompts import Reader


@dataclass(frozen=True)
class Serving:
    """Where a model is served, and how much of it."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any that is free
    name: str = ""  # of the model; empty: that of its directory
    api_key: str = field(default="", repr=False)
    concurrency: int = 16  # texts that are written at once
    queue: int = 64  # texts that may wait
    body: int = 1 << 20  # bytes of a request
    drain_seconds: int = 30  # that running answers have after SIGTERM
    weights: str = ""  # type in which matrices are held; empty: the checkpoint's

    def __post_init__(self) -> None:
        """Raises `UserError` for a value out of range."""
        for option, value, least, most in (
            ("--port", self.port, 0, 65535),
            ("--max-concurrency", self.concurrency, 1, 4096),
            ("--max-queue", self.queue, 0, 1 << 20),
            ("--max-body", self.body, 1, 1 << 30),
            ("--drain-seconds", self.drain_seconds, 0, 86400),
        ):
            if not least <= value <= most:
                raise UserError(f"{option} is {value}: it must be from {least} to {most}")


def serve(checkpoint: str, serving: Serving, overrides: list[str]) -> None:
    """Serves until SIGTERM or an interrupt, which let running answers end for a while.

    Args:
        checkpoint: a run, a checkpoint, an import, or a directory of released weights.
        serving: where, and its limits.
        overrides: `section.key=value` on top of the checkpoint's configuration.

    Raises:
        UserError: a bad value or checkpoint, or an address that is not to be had.
    """
    with bind(serving) as listener, open_model(checkpoint, overrides, serving.weights) as loaded:
        batch = RunningBatch(loaded.architecture, loaded.arrays, rows=serving.concurrency, context=loaded.context)
        engine = Engine(batch, loaded.tokenizer, queue=serving.queue)
        model, name = loaded.config.model, serving.name or Path(checkpoint).resolve().name
        reader = Reader(loaded.tokenizer, model.vocab_size, batch.context, batch.rows)
        service = Service(name, model.num_layers, model.num_experts, reader, engine, serving.api_key, serving.body)
        host, port = listener.getsockname()[:2]
        print(f"{name} at http://{f'[{host}]' if ':' in host else host}:{port}: {batch.rows} texts at once, "
              f"context {batch.context:,}", flush=True)  # fmt: skip
        run(service, listener, serving.drain_seconds)
    if engine.failed:
        raise SystemExit(1)


def bind(serving: Serving) -> socket.socket:
    """Takes the address before anything that lasts."""
    try:
        family = socket.AF_INET6 if ":" in serving.host else socket.AF_INET
        return socket.create_server((serving.host, serving.port), family=family, backlog=1024)
    except (OSError, UnicodeError) as error:
        problem = str(getattr(error, "strerror", None) or error).partition(" (")[0]
        raise UserError(
            f"cannot listen at {serving.host}:{serving.port}: {problem}; choose others with --host and --port"
        ) from None


def run(service: Service, listener: socket.socket, drain_seconds: int) -> None:
    """Runs the server; SIGTERM ends it and is no failure."""
    config = uvicorn.Config(
        make_app(service),
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=drain_seconds,
        lifespan="on",
    )
    server = uvicorn.Server(config)
    service.engine.on_failure = lambda: setattr(server, "should_exit", True)
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again at the end
    try:
        server.run(sockets=[listener])
    finally:
        signal.signal(signal.SIGTERM, before)
