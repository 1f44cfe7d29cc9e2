"""Attention forward and backward on matrix units, for Numba: which blocks meet, in which order, on which thread.

The online softmax and the recomputing backward pass are those of FlashAttention-2 (arXiv 2307.08691). All is in blocks
of 32 positions, see `amx_softmax`; scores have keys in rows and queries in columns. Threads take tasks off a counter.
The bits of the results do not depend on how many they are: every sum is in one order.
"""

from typing import no_type_check

import numpy as np

from mixtral_jax.kernels.cpu.amx_blocks import multiply_block, pack_along_head, pack_along_rows, write_block
from mixtral_jax.kernels.cpu.amx_softmax import (
    ALL,
    begin_peak,
    clear_memory,
    differentiate,
    exponentiate,
    finish_total,
    hide,
    raise_peak,
    shrink_block,
)
from mixtral_jax.kernels.cpu.amx_tiles import STEP, configure, release
from mixtral_jax.kernels.cpu.intrinsics import CONFIGURATIONS, add_to_counter, compiled, read_state
from mixtral_jax.kernels.cpu.simd import dot_row
from mixtral_jax.kernels.cpu.thread_pool import take_next, wait

GROUP = 4  # blocks of keys whose scores exist at once in the forward pass
HEADS, QUERIES = 4, 4  # heads of one of keys and values, and blocks of queries, that a task of the forward pass has
PACKED = 16  # blocks of keys and values that a task turns into factors
SQUARE = 2  # blocks of queries, and of keys, that meet at once in the backward pass
LARGEST = 8  # blocks of the largest head dimension
WORKSPACE = (2 * HEADS * QUERIES * LARGEST + 32) * STEP  # bytes of a thread; the backward pass takes less


@compiled
@no_type_check
def keys_of_task(parts: int) -> int:
    """Blocks of keys that a task of the backward pass has, for a head of so many blocks: they fit the L2 cache."""
    return min(16, 32 // parts // SQUARE * SQUARE)


@compiled
@no_type_check
def attend_blocks(
    q: int,
    k: int,
    v: int,
    spans: np.ndarray,
    out: int,
    log_totals: int,
    packed: int,
    shape: tuple[int, int, int, int, int],
    factors: int,
    counters: int,
    workspace: int,
) -> None:
    """Computes attention and the binary logarithm of each query's sum of exponentials.

    Args:
        q, k, v, out: addresses of [batch, seq, heads or kv_heads, head_dim].
        spans: int32 [batch, seq in whole blocks], how many positions a query sees, its own the last.
        log_totals: address of [batch, heads, seq in whole blocks].
        packed: address of memory for keys and values as factors, see `packed_size`.
        shape: batch, seq, heads, kv_heads, head_dim.
        factors: address of lanes of head_dim**-0.5 / log(2), of head_dim**-0.5 and of 1.
        counters: address of three int64 that begin at zero.
        workspace: address of WORKSPACE bytes of this thread's own, a multiple of 64.
    """
    batch, seq, heads, kv_heads, head_dim = shape
    group = heads // kv_heads
    parts, blocks = (head_dim + 31) // 32, (seq + 31) // 32
    size, q_stride, kv_stride = parts * STEP, 4 * heads * head_dim, 4 * kv_heads * head_dim
    packed_values = packed + batch * kv_heads * blocks * size
    scores, edge = workspace, workspace + GROUP * STEP
    states, state_size = edge + STEP, 2 * size + 3 * ALL
    configure(read_state(CONFIGURATIONS) + 32 * 64)

    runs = (blocks + PACKED - 1) // PACKED
    while True:
        task = take_next(counters)
        if task >= batch * kv_heads * runs:
            break
        pair, run = task // runs, task % runs
        for block in range(run * PACKED, min(blocks, (run + 1) * PACKED)):
            start = ((pair // kv_heads * seq + 32 * block) * kv_heads + pair % kv_heads) * 4 * head_dim
            place, rows = (pair * blocks + block) * size, min(32, seq - 32 * block)
            pack_along_head(k + start, kv_stride, rows, head_dim, False, packed + place, edge)
            pack_along_rows(v + start, kv_stride, rows, head_dim, False, packed_values + place, edge)
        add_to_counter(counters + 8, 1)
    wait(counters + 8, batch * kv_heads * runs)

    shares = (group + HEADS - 1) // HEADS  # of the heads that have the same keys
    rows_of_queries = (blocks + QUERIES - 1) // QUERIES
    while True:
        task = take_next(counters + 16)
        if task >= rows_of_queries * batch * kv_heads * shares:
            break
        first = (rows_of_queries - 1 - task // (batch * kv_heads * shares)) * QUERIES  # long tasks are begun early
        pair, share = task % (batch * kv_heads * shares) // shares, task % shares
        row, head = pair // kv_heads, pair % kv_heads * group + share * HEADS
        tall, wide = min(QUERIES, blocks - first), min(HEADS, group - share * HEADS)
        for i in range(tall * wide):
            query, state = first + i // wide, states + i * state_size
            start = ((row * seq + 32 * query) * heads + head + i % wide) * 4 * head_dim
            pack_along_head(q + start, q_stride, min(32, seq - 32 * query), head_dim, True, state, edge)
            begin_peak(state + 2 * size, state + 2 * size + ALL)
        lowest = (32 * first + 1 - spans[row, 32 * first]) // 32
        for keys in range(lowest, first + tall, GROUP):
            for i in range(tall * wide):
                query, state = first + i // wide, states + i * state_size
                total, peak, product = state + 2 * size + ALL, state + 2 * size, state + size
                last = min(32 * query + 31, seq - 1)
                begin = (32 * query + 1 - spans[row, 32 * query]) // 32
                low, high = max(keys, begin), min(keys + GROUP, query + 1)
                if low >= high:
                    continue
                all_seen = last + 1 - spans[row, last]  # from here on every query of the block sees keys
                for block in range(low, high):
                    place = scores + (block - low) * STEP
                    multiply_block(packed + (pair * blocks + block) * size, STEP, state, STEP, place, parts, True)
                    if block == query or 32 * block < all_seen:
                        hide(place, 32 * (query - block), spans.ctypes.data + (row * blocks + query) * ALL)
                factor = total + ALL
                shrinks = raise_peak(scores, high - low, factors, peak, total, factor)
                for block in range(high - low):
                    exponentiate(scores + block * STEP, factors, peak, total)
                fresh = low == begin
                values = packed_values + (pair * blocks + low) * size
                for part in range(parts):
                    place = product + part * STEP
                    if shrinks and not fresh:
                        shrink_block(place, factor)
                    multiply_block(values + part * STEP, size, scores, STEP, place, high - low, fresh)
        for i in range(tall * wide):
            query, state = first + i // wide, states + i * state_size
            total, peak, product = state + 2 * size + ALL, state + 2 * size, state + size
            place = ((row * heads + head + i % wide) * blocks + query) * ALL
            finish_total(peak, total, log_totals + place)
            start = ((row * seq + 32 * query) * heads + head + i % wide) * 4 * head_dim
            for part in range(parts):
                write_block(
                    product + part * STEP, total, out + start + 128 * part, q_stride,
                    min(32, seq - 32 * query), head_dim - 32 * part, True, edge,
                )  # fmt: skip
    release()


@compiled
@no_type_check
def _differentiate_square(
    q: int,
    spans: np.ndarray,
    out: int,
    log_totals: int,
    d_out: int,
    d_queries: int,
    shape: tuple[int, int, int, int, int],
    factors: int,
    row: int,
    head: int,
    first: int,
    low: int,
    high: int,
    begin: int,
    keys: int,
    values: int,
    turned_keys: int,
    d_keys: int,
    d_values: int,
    own: int,
    edge: int,
) -> None:
    """Adds to the gradients what some blocks of queries, from `first` on, of a head and the keys from `low` on give."""
    _, seq, heads, _, head_dim = shape
    parts, blocks = (head_dim + 31) // 32, (seq + 31) // 32
    size, stride = parts * STEP, 4 * heads * head_dim
    queries, turned_queries = own, own + SQUARE * size
    d_outs, turned_d_outs = own + 2 * SQUARE * size, own + 3 * SQUARE * size
    scores = own + 4 * SQUARE * size
    d_scores, turned_scores = scores + SQUARE * SQUARE * STEP, scores + 2 * SQUARE * SQUARE * STEP
    deltas = scores + 3 * SQUARE * SQUARE * STEP
    tall = min(SQUARE, blocks - first)
    logs = log_totals + ((row * heads + head) * blocks + first) * ALL
    clear_memory(deltas, SQUARE * ALL)
    for i in range(tall):
        start = ((row * seq + 32 * (first + i)) * heads + head) * 4 * head_dim
        rows, place = min(32, seq - 32 * (first + i)), i * size
        pack_along_head(q + start, stride, rows, head_dim, True, queries + place, edge)
        pack_along_rows(q + start, stride, rows, head_dim, True, turned_queries + place, edge)
        pack_along_head(d_out + start, stride, rows, head_dim, True, d_outs + place, edge)
        pack_along_rows(d_out + start, stride, rows, head_dim, True, turned_d_outs + place, edge)
        for j in range(rows):
            here = start + j * stride
            dot_row(deltas + i * ALL + 4 * j, d_out + here, out + here, head_dim)
    for key in range(max(low, begin // SQUARE * SQUARE), min(high, first + tall), SQUARE):
        wide = min(SQUARE, high - key)
        for b in range(wide):
            block, place = key + b, (key + b - low) * size
            top, bottom = tall, 0  # of the queries that see keys of the block
            for i in range(max(0, block - first), tall):
                query, last = first + i, min(32 * (first + i) + 31, seq - 1)
                if 32 * block + 31 < 32 * query + 1 - spans[row, 32 * query]:
                    break
                top, bottom = min(top, i), i + 1
                here = (b * SQUARE + i) * STEP
                multiply_block(keys + place, STEP, queries + i * size, STEP, scores + here, parts, True)
                multiply_block(values + place, STEP, d_outs + i * size, STEP, d_scores + here, parts, True)
                if block == query or 32 * block < last + 1 - spans[row, last]:
                    hide(scores + here, 32 * (query - block), spans.ctypes.data + (row * blocks + query) * ALL)
                there = (i * SQUARE + b) * STEP
                differentiate(
                    scores + here, d_scores + here, turned_scores + there, factors, logs + i * ALL, deltas + i * ALL
                )
            if top < bottom:
                here = (b * SQUARE + top) * STEP
                for part in range(parts):
                    there, factor = place + part * STEP, top * size + part * STEP
                    steps = bottom - top
                    multiply_block(scores + here, STEP, turned_d_outs + factor, size, d_values + there, steps, False)
                    multiply_block(d_scores + here, STEP, turned_queries + factor, size, d_keys + there, steps, False)
        for i in range(tall):
            query = first + i
            left = max(key, (32 * query + 1 - spans[row, 32 * query]) // 32)
            right = min(key + wide, query + 1)
            if left < right:
                here = (i * SQUARE + left - key) * STEP
                for part in range(parts):
                    there = i * size + part * STEP
                    factor = (left - low) * size + part * STEP
                    multiply_block(
                        turned_keys + factor, size, turned_scores + here, STEP, d_queries + there, right - left, False
                    )


@compiled
@no_type_check
def differentiate_attention(
    q: int,
    k: int,
    v: int,
    spans: np.ndarray,
    out: int,
    log_totals: int,
    d_out: int,
    d_q: int,
    d_k: int,
    d_v: int,
    sums: int,
    shape: tuple[int, int, int, int, int],
    factors: int,
    progress: np.ndarray,
    counter: int,
    workspace: int,
) -> None:
    """Computes the gradients of attention.

    A task has some blocks of keys and adds to the gradients of all queries that see them; for each block of queries the
    tasks take their turns by rising keys. Tasks are begun in that order, so one waits for running ones only.

    Args:
        q, k, v, spans, out, log_totals, shape, factors, workspace: see `attend_blocks`.
        d_out, d_q, d_k, d_v: addresses of gradients.
        sums: address of memory for d_q in blocks.
        progress: int64 zeros, [batch * kv_heads, seq in squares]: tasks that have added theirs.
        counter: address of an int64 that begins at zero.
    """
    batch, seq, heads, kv_heads, head_dim = shape
    group = heads // kv_heads
    parts, blocks = (head_dim + 31) // 32, (seq + 31) // 32
    size, q_stride, kv_stride = parts * STEP, 4 * heads * head_dim, 4 * kv_heads * head_dim
    most, squares = keys_of_task(parts), (blocks + SQUARE - 1) // SQUARE
    keys, values, turned_keys = workspace, workspace + most * size, workspace + 2 * most * size
    d_keys, d_values, own = workspace + 3 * most * size, workspace + 4 * most * size, workspace + 5 * most * size
    edge = own + 4 * SQUARE * size + 3 * SQUARE * SQUARE * STEP + SQUARE * ALL
    configure(read_state(CONFIGURATIONS) + 32 * 64)
    while True:
        task = take_next(counter)
        run, pair = task // (batch * kv_heads), task % (batch * kv_heads)
        low, high = run * most, min(blocks, (run + 1) * most)
        if low >= blocks:
            break
        row = pair // kv_heads
        start = ((row * seq + 32 * low) * kv_heads + pair % kv_heads) * 4 * head_dim
        for block in range(high - low):
            place, source, rows = block * size, start + 32 * block * kv_stride, min(32, seq - 32 * (low + block))
            pack_along_head(k + source, kv_stride, rows, head_dim, False, keys + place, edge)
            pack_along_head(v + source, kv_stride, rows, head_dim, False, values + place, edge)
            pack_along_rows(k + source, kv_stride, rows, head_dim, False, turned_keys + place, edge)
        clear_memory(d_keys, 2 * most * size)
        for square in range(low // SQUARE, squares):
            first = square * SQUARE
            begin = (32 * first + 1 - spans[row, 32 * first]) // 32
            if begin >= high:
                break
            turn, others = progress.ctypes.data + (pair * squares + square) * 8, run - begin // most
            wait(turn, others)
            for i in range(group):
                head = pair % kv_heads * group + i
                d_queries = sums + ((row * heads + head) * blocks + first) * size
                if others == 0:
                    clear_memory(d_queries, min(SQUARE, blocks - first) * size)
                _differentiate_square(
                    q, spans, out, log_totals, d_out, d_queries, shape, factors, row, head, first, low, high, begin,
                    keys, values, turned_keys, d_keys, d_values, own, edge,
                )  # fmt: skip
                if first < high:  # nobody adds more
                    for query in range(first, min(first + SQUARE, blocks)):
                        place = ((row * seq + 32 * query) * heads + head) * 4 * head_dim
                        for part in range(parts):
                            write_block(
                                d_queries + (query - first) * size + part * STEP, factors + ALL,
                                d_q + place + 128 * part, q_stride, min(32, seq - 32 * query),
                                head_dim - 32 * part, True, edge,
                            )  # fmt: skip
            add_to_counter(turn, 1)
        for block in range(high - low):
            place, target, rows = block * size, start + 32 * block * kv_stride, min(32, seq - 32 * (low + block))
            for part in range(parts):
                here, there, columns = place + part * STEP, target + 128 * part, head_dim - 32 * part
                write_block(d_keys + here, factors + ALL, d_k + there, kv_stride, rows, columns, False, edge)
                write_block(d_values + here, factors + 2 * ALL, d_v + there, kv_stride, rows, columns, False, edge)
    release()
