"""The order of rows as arithmetic: which source gives row n of a run, and which of its rows that is.

Both answers take constant time and memory for any n, on any host, and depend on nothing but the arguments.
"""

import numpy as np
from jaxtyping import Int64, UInt64

SHARES = 1 << 24  # parts of a whole in which weights are counted
ROUNDS = 8


def choose_sources(
    rows: Int64[np.ndarray, "rows"], weights: list[float]
) -> tuple[Int64[np.ndarray, "rows"], Int64[np.ndarray, "rows"]]:
    """Deals rows out to sources in proportion to their weights, evenly from the first row on.

    The first source takes every row at which its share of the rows so far passes a whole number; the next one takes its
    share of what is left, and so on. The counts of any stretch of rows are right to about a row a source.

    Args:
        rows: numbers of rows in the run, 0 to below 2**39.
        weights: of the sources, above 0.

    Returns:
        Which source gives each row, and how many rows that source gave before it.
    """
    source = np.full_like(rows, len(weights) - 1)
    left = rows.copy()  # number of the row among those that no source has taken yet
    open_rows = np.ones(len(rows), bool)
    for index in range(len(weights) - 1):
        share = _share(weights[index:])
        # Half a row of phase, so that no source waits for all others.
        before, after = (((left + step) * share + SHARES // 2) // SHARES for step in (0, 1))
        taken = open_rows & (after > before)
        source[taken] = index
        left = np.where(taken, before, np.where(open_rows, left - before, left))
        open_rows &= ~taken
    return source, left


def rows_dealt(rows: int, weights: list[float]) -> list[int]:
    """Counts how many of the first so many rows of a run each source gives; see `choose_sources`."""
    counts = []
    for index in range(len(weights) - 1):
        share = _share(weights[index:])
        counts.append((rows * share + SHARES // 2) // SHARES)
        rows -= counts[-1]
    return [*counts, rows]


def _share(weights: list[float]) -> int:
    """The first one's part of a whole, which leaves something for the others."""
    return min(max(1, round(SHARES * weights[0] / sum(weights))), SHARES - 1)


def shuffled_rows(rows: Int64[np.ndarray, "rows"], size: int, seed: int, source: int) -> Int64[np.ndarray, "rows"]:
    """Shuffles the rows of a source anew in every epoch.

    A keyed Feistel network permutes the smallest domain of an even number of bits that holds `size`; what falls outside
    is sent through again until it falls inside, which leaves a permutation of 0 to size - 1.

    Args:
        rows: how many rows of the source came before, over all epochs.
        size: rows of an epoch.
        seed: of the run.
        source: number of the source, so that two sources of one size are shuffled differently.

    Returns:
        The row of the source, 0 to below `size`; within an epoch each comes once.
    """
    half, mask, keys = _network(rows // size, size, seed, source)
    values = (rows % size).astype(np.uint64)
    todo = np.arange(len(rows))
    while len(todo):
        left, right = values[todo] >> half, values[todo] & mask
        for key in keys:
            left, right = right, left ^ (mix(right + key[todo]) & mask)
        values[todo] = left << half | right
        todo = todo[values[todo] >= size]
    return values.astype(np.int64)


def place_of_row(row: int, epoch: int, size: int, seed: int, source: int) -> int:
    """Says how many rows come before a source's row in an epoch: the way back through `shuffled_rows`."""
    half, mask, keys = _network(np.array([epoch]), size, seed, source)
    value = np.array([row], np.uint64)
    while True:
        left, right = value >> half, value & mask
        for key in reversed(keys):
            left, right = right ^ (mix(left + key) & mask), left
        value = left << half | right
        if value < size:
            return int(value[0])


@np.errstate(over="ignore")
def _network(
    epochs: Int64[np.ndarray, " n"], size: int, seed: int, source: int
) -> tuple[np.uint64, np.uint64, list[UInt64[np.ndarray, " n"]]]:
    """Bits of half a number of the domain, their mask, and the keys of every round."""
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    first = mix(np.uint64(seed & (2**64 - 1))) + np.uint64(source * ROUNDS)
    keys = [mix(mix(first + np.uint64(turn)) + epochs.astype(np.uint64)) for turn in range(ROUNDS)]
    return half, np.uint64((1 << int(half)) - 1), keys


@np.errstate(over="ignore")
def mix(value: UInt64[np.ndarray, "..."] | np.uint64) -> UInt64[np.ndarray, "..."]:
    """Scatters 64 bits. Source: the finalizer of splitmix64 (Steele, Lea, Flood 2014)."""
    mixed = np.asarray(value) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ mixed >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ mixed >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return np.asarray(mixed ^ mixed >> np.uint64(31))
