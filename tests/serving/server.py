"""A real server on loopback, in a thread, over a model small enough to answer at once."""

import contextlib
import dataclasses
import io
import threading
import time
from collections.abc import Iterator
from functools import cache

import httpx
import sentencepiece
import uvicorn

from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.inference.batching import RunningBatch
from mixtral_jax.serving.app import Service, make_app
from mixtral_jax.serving.engine import Engine
from mixtral_jax.serving.prompts import Reader
from mixtral_jax.serving.serve import Serving, bind
from tests.small_run import WORDS
from tests.tiny import tiny_architecture, tiny_config

CONTEXT = 192
CONTROL = [f"[{name}]" for name in ("INST", "/INST", "AVAILABLE_TOOLS", "/AVAILABLE_TOOLS", "TOOL_RESULTS",
                                    "/TOOL_RESULTS", "TOOL_CALLS", "PREFIX", "SUFFIX", "MIDDLE")]  # fmt: skip
CONFIG = tiny_config(model={"init_std": 0.3, "vocab_size": 384})


@dataclasses.dataclass(frozen=True)
class Served:
    """A running server and a client of it."""

    url: str
    client: httpx.Client
    engine: Engine


@cache
def tokenizer() -> Tokenizer:
    """A small one with the control tokens of Mixtral's version 3."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS * 9), model_writer=written, model_type="bpe", vocab_size=CONFIG.model.vocab_size,
        control_symbols=CONTROL, byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return Tokenizer(written.getvalue())


@cache
def batch(rows: int = 4) -> RunningBatch:
    """Compiled once for all servers, which follow each other."""
    architecture = tiny_architecture(CONFIG)
    return RunningBatch(architecture, architecture.init(1), rows=rows, context=CONTEXT)


def service(
    *, queue: int = 64, api_key: str = "", body: int = 1 << 20, choices: int = 4, context: int = CONTEXT
) -> Service:
    engine = Engine(batch(), tokenizer(), queue=queue)
    reader = Reader(tokenizer(), CONFIG.model.vocab_size, context, choices)
    return Service("tiny", CONFIG.model.num_layers, CONFIG.model.num_experts, reader, engine, api_key, body)


@contextlib.contextmanager
def serving(**options: object) -> Iterator[Served]:
    """Runs a server while the block does."""
    served = service(**options)
    listener = bind(Serving(port=0))
    server = uvicorn.Server(uvicorn.Config(make_app(served), log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
        yield Served(url, client, served.engine)
    server.should_exit = True
    thread.join(10)
    assert not thread.is_alive()
    assert sorted(batch().free) == list(range(batch().rows))


def wait_until(condition, seconds: float = 5.0) -> float:
    """Waits for a condition and returns how long it took."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < seconds
        time.sleep(0.01)
    return time.monotonic() - begin


def slowly(step):
    """Lets every step take a twentieth of a second."""
    return lambda: (time.sleep(0.05), step())[1]
