"""Time of calls on a device, each row a line as soon as it is known; arrays are made where they are needed."""

import json
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.typing import DTypeLike
from jaxtyping import Array

TURN = 0.12  # seconds of calls in one turn


def seconds_of(call: Callable[..., Any], *arguments: Any) -> float:
    """Median over 3 turns of a call's time, where calls follow each other without a pause; a first one compiles."""
    jax.block_until_ready(call(*arguments))
    begin = time.perf_counter()
    jax.block_until_ready(call(*arguments))
    calls = max(1, min(50, int(TURN / (time.perf_counter() - begin))))
    turns = []
    for _ in range(3):
        begin = time.perf_counter()
        for _ in range(calls):
            out = call(*arguments)
        jax.block_until_ready(out)
        turns.append((time.perf_counter() - begin) / calls)
    return statistics.median(turns)


def report(what: str, **figures: Any) -> None:
    """Tells the parent of one result."""
    print(json.dumps({"what": what, **figures}), flush=True)


def time_it(
    what: str,
    call: Callable[..., Any],
    *arguments: Any,
    flops: float = 0,
    moved: float = 0,
    dense: float = 0,
    peak: float = 0,
) -> float:
    """Measures and reports a call.

    Args:
        what: its name.
        call: the work.
        arguments: of the call.
        flops: useful ones.
        moved: bytes that must be read and written.
        dense: FLOP/s of a dense product of the same shape, in this process.
        peak: FLOP/s of the device.

    Returns:
        FLOP/s, or bytes/s where there are no FLOPs; 0 where the device refuses the work, which is reported.
    """
    try:
        seconds = seconds_of(call, *arguments)
    except Exception as error:  # a kernel that this device refuses; the next ones still count
        report(what, failed=f"{type(error).__name__}: {str(error).splitlines()[0][:160]}")
        return 0.0
    figures: dict[str, float] = {"ms": 1e3 * seconds}
    if flops:
        figures["TFLOP_a_s"] = flops / seconds / 1e12
    if moved:
        figures["TB_a_s"] = moved / seconds / 1e12
    if dense:
        figures["of_dense"] = flops / seconds / dense
    if peak:
        figures["mfu"] = flops / seconds / peak
    report(what, **figures)
    return (flops or moved) / seconds


def normal(shape: tuple[int, ...], dtype: DTypeLike, seed: int, scale: float = 1.0) -> Array:
    """Random numbers, made on the device."""
    make = jax.jit(lambda key: (scale * jax.random.normal(key, shape, dtype)).astype(dtype))
    return make(jax.random.key(seed))


def uneven_sizes(rows: int, experts: int, multiple: int = 1) -> list[int]:
    """Rows of each expert, the busiest with about 1.5 times the mean load; of all but that, multiples of a number."""
    popularity = [1 + 0.5 * math.cos(math.pi * expert / max(1, experts - 1)) for expert in range(experts)]
    sizes = [int(rows * p / sum(popularity)) // multiple * multiple for p in popularity]
    sizes[0] += rows - sum(sizes)
    return sizes
