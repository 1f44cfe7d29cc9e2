"""Passkey retrieval: a number hidden at some depth of a long text, asked for at its end.

Source: arXiv 2305.16300, appendix B (the task); arXiv 2401.04088, figure 4 (lengths and positions).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64
from rich.table import Table

from mixtral_jax.config import UserError
from mixtral_jax.console import make_table
from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.evaluation.requests import Answer, Request

TASK = "There is a pass key hidden in the text below. Find it and remember it, for you will be asked for it.\n"
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
HIDDEN = "The pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "What is the pass key? The pass key is"
DIGITS = 5
DEPTHS = tuple(np.linspace(0, 1, 9).tolist())
MOST_LENGTHS = 6


@dataclass(frozen=True)
class PasskeyPlan:
    """Which keys are hidden where."""

    lengths: Sequence[int]  # of the texts, tokens, ascending; see `passkey_lengths`
    seed: int  # of the keys
    depths: Sequence[float] = DEPTHS  # share of the filler that stands before the key
    trials: int = 5  # keys for each length and depth


@dataclass(frozen=True)
class PasskeyGrid:
    """How well keys were found, by length (rows) and depth (columns)."""

    plan: PasskeyPlan
    accuracy: Float64[np.ndarray, "lengths depths"]  # share of keys that greedy decoding writes whole
    nats_per_token: Float64[np.ndarray, "lengths depths"]  # of the key


def passkey_request(tokenizer: Tokenizer, length: int, depth: float, key: str) -> Request:
    """Writes one text of exactly `length` input tokens, whose scored end is the key.

    Args:
        tokenizer: any that can write digits.
        length: tokens before the last one.
        depth: share of the filler that stands before the key, 0 to 1.
        key: digits.

    Raises:
        UserError: the length has no room for task, key and question.
    """
    begin = [tokenizer.bos_id, *tokenizer.encode(TASK)]
    hidden = tokenizer.encode(HIDDEN.format(key=key))
    question, end = tokenizer.encode(QUESTION), tokenizer.encode(f"{QUESTION} {key}")
    kept = next((i for i, pair in enumerate(zip(question, end, strict=False)) if pair[0] != pair[1]), len(question))
    room = length + 1 - len(begin) - len(hidden) - len(end)
    if room < 0:
        raise UserError(
            f"a context of {length} tokens is too short for a passkey, which takes {length - room} with this "
            f"tokenizer: raise eval.context to that or more"
        )
    line = tokenizer.encode(FILLER)
    filler = (line * (room // len(line) + 1))[:room]
    cut = round(depth * room)
    tokens = [*begin, *filler[:cut], *hidden, *filler[cut:], *end]
    return Request(tokens, len(tokens) - len(end) + kept)


def passkey_lengths(tokenizer: Tokenizer, context: int) -> list[int]:
    """Lists the lengths to try, ascending: the context, its half and so on, as long as a passkey fits."""
    lengths = [context]
    passkey_request(tokenizer, context, 0.0, "0" * DIGITS)  # raises, if not even this fits
    while len(lengths) < MOST_LENGTHS:
        try:
            passkey_request(tokenizer, lengths[-1] // 2, 0.0, "0" * DIGITS)
        except UserError:
            break
        lengths.append(lengths[-1] // 2)
    return lengths[::-1]


def measure_passkey(
    answer: Callable[[list[Request]], list[Answer]], tokenizer: Tokenizer, plan: PasskeyPlan
) -> PasskeyGrid:
    """Asks for keys at every length and depth.

    The key's digits are scored in one pass: greedy decoding would write them all if each, after those before it, is the
    likeliest token.

    Args:
        answer: gives the model's answers to requests, in their order.
        tokenizer: the model's.
        plan: the keys and their places.

    Raises:
        UserError: no passkey fits, the tokenizer cannot write digits, or a score is not finite.
    """
    codes = {tuple(tokenizer.encode(digit)) for digit in "0123456789"}
    if len(codes) < 10:
        raise UserError("the tokenizer cannot tell the ten digits apart: a passkey needs one that can")
    rng = np.random.default_rng(plan.seed)
    keys = rng.integers(10 ** (DIGITS - 1), 10**DIGITS, (len(plan.lengths), len(plan.depths), plan.trials))
    requests = [
        passkey_request(tokenizer, length, depth, str(key))
        for length, by_depth in zip(plan.lengths, keys, strict=True)
        for depth, by_trial in zip(plan.depths, by_depth, strict=True)
        for key in by_trial
    ]
    answers = answer(requests)
    shape = keys.shape
    tokens = np.array([len(request.tokens) - request.scored_from for request in requests], np.float64).reshape(shape)
    nats = np.array([each.nats for each in answers]).reshape(shape)
    greedy = np.array([each.greedy for each in answers], np.float64).reshape(shape)
    return PasskeyGrid(plan, greedy.mean(axis=-1), nats.sum(axis=-1) / tokens.sum(axis=-1))


def passkey_table(grid: PasskeyGrid) -> Table:
    """Makes a table of the accuracy: a row for each length, a column for each depth."""
    caption = f"share of {grid.plan.trials} keys that greedy decoding writes, by length and depth of the key"
    table = make_table((), ["tokens", *(f"{depth:.0%}" for depth in grid.plan.depths)], caption)
    table.add_column("nats/token", justify="right", style="dim")
    for length, accuracy, nats in zip(grid.plan.lengths, grid.accuracy, grid.nats_per_token, strict=True):
        table.add_row(f"{length:,}", *[f"{value:.0%}" for value in accuracy], f"{nats.mean():.3f}")
    return table


def passkey_json(grid: PasskeyGrid) -> dict[str, Any]:
    """Makes `lengths`, `depths`, `trials`, and by length and depth `accuracy` and `nats_per_token`."""
    return {
        "evaluation": "passkey",
        "lengths": list(grid.plan.lengths),
        "depths": list(grid.plan.depths),
        "trials": grid.plan.trials,
        "accuracy": grid.accuracy,
        "nats_per_token": grid.nats_per_token,
        "total": {"accuracy": float(grid.accuracy.mean()), "nats_per_token": float(grid.nats_per_token.mean())},
    }
