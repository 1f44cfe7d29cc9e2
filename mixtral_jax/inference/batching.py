"""Texts join and leave a running batch: each has a row of one cache, and no program is compiled again for them.

A prompt runs in chunks between the draws of the others. What a text gets depends on no other text; what is written
behind the end of one, while others are drawn, is overwritten before it is seen.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from mixtral_jax.config import UserError
from mixtral_jax.inference.decoding import (
    CHUNK,
    LAST,
    SEEN,
    SLOTS,
    Cache,
    State,
    draw_token,
    extend,
    last_of_chunk,
    obstacle,
)
from mixtral_jax.inference.sampling import Sampling, SamplingArrays, stack
from mixtral_jax.model.mixtral import Architecture, Arrays
from mixtral_jax.sharding import axis_size, constrain, named_sharding

STEPS = 4  # tokens that are drawn before texts may join and leave
PROMPTS = 4  # chunks of prompts that run between two draws, at most
MOST_ALTERNATIVES = 20
VIEWS = (256, 1024, 4096, 16384)  # slots that a program reads; it is compiled for each, and for the whole context


class Alternative(NamedTuple):
    """A token that could have been drawn."""

    token: int
    log_prob: float  # under the model, in nats


class Token(NamedTuple):
    """One drawn token."""

    token: int
    log_prob: float  # under the model, in nats
    experts: list[list[int]]  # of each layer those that worked on it, best first
    alternatives: list[Alternative]  # the likeliest tokens in its place, as many as were asked for


@dataclass
class Text:
    """Who has a row."""

    prompt: Int[np.ndarray, " tokens"]
    sampling: Sampling
    alternatives: int  # wanted with each token
    length: int = 0  # tokens in the cache


class RunningBatch:
    """The texts that run together.

    Attributes:
        rows: how many there can be.
        context: tokens of a text with its prompt, at most.
    """

    def __init__(self, architecture: Architecture, arrays: Arrays, *, rows: int, context: int):
        """Makes room and compiles every program.

        Args:
            architecture: of the model.
            arrays: of the model.
            rows: texts that run at once; made a multiple of the devices that share a batch.
            context: tokens of a text with its prompt, at most.

        Raises:
            UserError: the mesh or the model cannot generate token by token.
        """
        if problem := obstacle(architecture):
            raise UserError(problem)
        self._multiple = axis_size(architecture.runtime.mesh, "batch")
        self.rows, self.context = rows + -rows % self._multiple, context
        whole = context + -context % CHUNK + CHUNK  # a chunk behind the end of any text stays inside
        self._views = [*(view for view in VIEWS if view < context), whole]
        self._texts: dict[int, Text] = {}
        self._prefilling: deque[int] = deque()
        self.free = deque(range(self.rows))
        start, prefill, draw = _programs(architecture, self.rows, whole)
        self._state = start()
        self._prefill, self._draw = partial(prefill, arrays), partial(draw, arrays)
        for view in self._views:
            few, all_ = np.zeros(self._multiple, np.int32), np.zeros(self.rows, np.int32)
            rows_ = np.arange(self._multiple, dtype=np.int32)
            self._state = self._prefill(view, self._state, rows_, np.zeros((len(few), CHUNK), np.int32), few, few)
            sampling = stack([Sampling()] * self.rows)
            self._state, _ = self._draw(view, self._state, all_, all_ > 0, sampling, False)

    def join(self, prompt: Sequence[int], sampling: Sampling, alternatives: int = 0) -> int:
        """Gives a text a free row.

        Args:
            prompt: token ids, at least one, and room for a new one in the context.
            sampling: of its tokens.
            alternatives: likeliest tokens wanted with each drawn one, at most `MOST_ALTERNATIVES`.

        Returns:
            The row.
        """
        assert 0 < len(prompt) < self.context, len(prompt)
        row = self.free.popleft()
        self._texts[row] = Text(np.array(prompt, np.int32), sampling, alternatives)
        self._prefilling.append(row)
        return row

    def leave(self, row: int) -> None:
        """Frees a row."""
        del self._texts[row]
        if row in self._prefilling:
            self._prefilling.remove(row)
        self.free.append(row)

    def step(self) -> dict[int, list[Token]]:
        """Runs some chunks of prompts, one text after the other in turn, then draws for those whose prompt has run.

        Returns:
            The next tokens of each row that was drawn; a text that reached the context gets none that count.
        """
        for _ in range(min(PROMPTS, len(self._prefilling))):
            if self._prefilling:
                self._run_chunk()
        drawing = [row for row in self._texts if row not in self._prefilling]
        return self._draw_tokens(drawing) if drawing else {}

    def _run_chunk(self) -> None:
        chosen = [self._prefilling.popleft() for _ in range(min(self._multiple, len(self._prefilling)))]
        others = (row for row in range(self.rows) if row not in chosen)
        rows = [*chosen, *(next(others) for _ in range(self._multiple - len(chosen)))]
        start, count = (np.zeros(len(rows), np.int32) for _ in range(2))
        tokens = np.zeros((len(rows), CHUNK), np.int32)
        for number, row in enumerate(rows):
            text = self._texts.get(row)
            start[number] = text.length if text else 0
            if text and number < len(chosen):
                part = text.prompt[text.length : text.length + CHUNK]
                tokens[number, : len(part)] = part
                count[number] = len(part)
                text.length += len(part)
                if text.length < len(text.prompt):
                    self._prefilling.append(row)
        self._state = self._prefill(
            self._view(int(start.max()) + CHUNK), self._state, np.array(rows, np.int32), tokens, start, count
        )

    def _draw_tokens(self, drawing: list[int]) -> dict[int, list[Token]]:
        lengths, active = np.zeros(self.rows, np.int32), np.zeros(self.rows, bool)
        for row, text in self._texts.items():
            lengths[row] = text.length
        active[drawing] = True
        idle = Sampling()
        sampling = stack([self._texts[row].sampling if active[row] else idle for row in range(self.rows)])
        wanted = any(self._texts[row].alternatives for row in drawing)
        view = self._view(int(lengths.max()) + STEPS)
        self._state, drawn = self._draw(view, self._state, lengths, active, sampling, wanted)
        tokens, log_probs, experts, best, best_log_probs = (np.asarray(x) for x in drawn)
        found = {}
        for row in drawing:
            text = self._texts[row]
            text.length += STEPS
            found[row] = [
                Token(
                    int(tokens[i, row]),
                    float(log_probs[i, row]),
                    experts[i, :, row].tolist(),
                    [
                        Alternative(int(token), float(log_prob))
                        for token, log_prob in zip(best[i, row], best_log_probs[i, row], strict=True)
                    ][: text.alternatives],
                )
                for i in range(STEPS)
            ]
        return found

    def _view(self, slots: int) -> int:
        return next(view for view in self._views if view >= slots)


def _programs(
    architecture: Architecture, rows: int, slots: int
) -> tuple[Callable[[], State], Callable[..., Any], Callable[..., Any]]:
    """Makes what begins, runs a chunk of some texts' prompts, and draws `STEPS` tokens of all.

    Args:
        architecture: of the model.
        rows: of the batch.
        slots: of the cache.
    """
    mesh, config = architecture.runtime.mesh, architecture.config
    shardings = tuple(named_sharding(mesh, axes) for axes in (SLOTS, LAST, SEEN))
    replicated = NamedSharding(mesh, PartitionSpec())

    @partial(jax.jit, out_shardings=shardings)
    def start() -> State:
        last = jnp.zeros((rows, 1, config.d_model), architecture.runtime.precision.compute)
        return Cache.empty(architecture, rows, slots), last, jnp.zeros((rows, config.vocab_size), bool)

    @partial(jax.jit, static_argnums=1, donate_argnums=2, out_shardings=shardings)
    def prefill(arrays: Any, view: int, state: State, rows: Array, tokens: Array, start: Array, count: Array) -> State:
        cache, last, seen = state
        part = Cache(*(constrain(x[:, rows, :, :view], mesh, SLOTS) for x in cache))
        part, x, _ = extend(architecture.bind(arrays), part, tokens, start, count)
        cache = Cache(*(whole.at[:, rows, :, :view].set(new) for whole, new in zip(cache, part, strict=True)))
        before = seen[rows] & ((start > 0) | (count == 0))[:, None]
        valid = jnp.arange(CHUNK) < count[:, None]
        seen = seen.at[rows].set(before.at[jnp.arange(len(rows))[:, None], tokens].max(valid))
        return cache, last.at[rows].set(last_of_chunk(x, count, last[rows])), seen

    @partial(jax.jit, static_argnums=1, donate_argnums=2, out_shardings=(shardings, replicated))
    def draw(
        arrays: Any, view: int, state: State, lengths: Array, active: Array, sampling: SamplingArrays, wanted: Array
    ) -> tuple[State, tuple[Array, ...]]:
        model = architecture.bind(arrays)
        cache, last, seen = state

        def step(state: State, i: Array) -> tuple[State, tuple[Array, ...]]:
            state, drawn = draw_token(model, state, lengths + i, active, sampling)
            best = jax.lax.cond(wanted, _likeliest, _nothing, drawn.logits)
            return state, (drawn.tokens, drawn.log_probs, drawn.experts, *best)

        part = Cache(*(x[:, :, :, :view] for x in cache))
        (part, last, seen), drawn = jax.lax.scan(step, (part, last, seen), jnp.arange(STEPS, dtype=jnp.int32))
        cache = Cache(*(whole.at[:, :, :, :view].set(new) for whole, new in zip(cache, part, strict=True)))
        return (cache, last, seen), drawn

    return start, prefill, draw


def _likeliest(logits: Array) -> tuple[Array, Array]:
    best, tokens = jax.lax.top_k(logits, min(MOST_ALTERNATIVES, logits.shape[-1]))
    return tokens, best - jax.nn.logsumexp(logits, axis=-1, keepdims=True)


def _nothing(logits: Array) -> tuple[Array, Array]:
    shapes = jax.eval_shape(_likeliest, logits)
    return jnp.zeros(shapes[0].shape, shapes[0].dtype), jnp.zeros(shapes[1].shape, shapes[1].dtype)
