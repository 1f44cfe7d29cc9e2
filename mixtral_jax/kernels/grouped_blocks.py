"""SwiGLU experts over rows sorted by expert, in blocks with a dynamic count: no work but for the chosen experts.

An expert's rows are cut into blocks as an amount is paid in coins: as many of the largest size as fit, then of the
next; only the smallest may reach past the expert's rows. There is no padding between experts: what a last block
computes beyond its expert is overwritten by the next expert, which is written after it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mixtral_jax.precision import FULL

BLOCK_SIZES = (512, 128, 32)  # rows; a product needs some 100 of them to run at full speed, a block less is wasted


def choose_block_sizes(num_rows: int, num_experts: int) -> tuple[int, ...]:
    """Picks the sizes of blocks that a mean load can fill, largest first; rows and experts are those of one device."""
    mean = num_rows // num_experts
    return tuple(size for size in BLOCK_SIZES[:-1] if size <= mean) + BLOCK_SIZES[-1:]


def _over_blocks(count: Array, sizes: tuple[int, ...], body: Callable[..., Any], carry: Any) -> Any:
    """Runs `body(first row, size, carry)` for every block of `count` rows, the number of blocks being dynamic."""
    done = jnp.zeros_like(count)
    for size in sizes:
        left = count - done
        blocks = -(-left // size) if size == sizes[-1] else left // size
        carry = jax.lax.fori_loop(
            0, blocks, lambda i, carry, done=done, size=size: body(done + i * size, size, carry), carry
        )
        done = done + blocks * size
    return carry


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def grouped_blocks_ffn(
    rows: Float[Array, "rows d_model"],
    group_sizes: Int[Array, " experts"],
    w_gate: Float[Array, "experts d_model d_ff"],
    w_up: Float[Array, "experts d_model d_ff"],
    w_down: Float[Array, "experts d_ff d_model"],
    sizes: tuple[int, ...],
) -> Float[Array, "rows d_model"]:
    """Computes w_down(silu(w_gate x) * w_up x) with each row's expert; see `expert_ffn`.

    Args:
        rows: sorted by expert.
        group_sizes: rows of each expert.
        w_gate, w_up, w_down: the experts.
        sizes: of blocks, in rows, largest first.
    """
    return _forward(rows, group_sizes, w_gate, w_up, w_down, sizes, keep=False)[0]


def _offsets(group_sizes: Array) -> Array:
    return jnp.cumsum(group_sizes) - group_sizes


def _forward(
    rows: Array,
    group_sizes: Array,
    w_gate: Array,
    w_up: Array,
    w_down: Array,
    sizes: tuple[int, ...],
    *,
    keep: bool,
) -> tuple[Array, ...]:
    num_rows = rows.shape[0]
    padded = jnp.pad(rows, ((0, sizes[-1]), (0, 0)))
    out = jnp.zeros_like(padded)
    kept = tuple(jnp.zeros((padded.shape[0], w_gate.shape[2]), rows.dtype) for _ in range(2 if keep else 0))

    def expert(carry: tuple[Array, ...], weights: tuple[Array, ...]) -> tuple[tuple[Array, ...], None]:
        start, count, gate_e, up_e, down_e = weights

        def block(first: Array, size: int, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            row = start + first
            x = jax.lax.dynamic_slice_in_dim(padded, row, size)
            gate, up = x @ gate_e, x @ up_e
            y = (jax.nn.silu(gate) * up) @ down_e
            values = (y, gate, up) if keep else (y,)
            return tuple(
                jax.lax.dynamic_update_slice_in_dim(old, new, row, axis=0)
                for old, new in zip(carry, values, strict=True)
            )

        return _over_blocks(count, sizes, block, carry), None

    scanned = (_offsets(group_sizes), group_sizes, w_gate, w_up, w_down)
    results, _ = jax.lax.scan(expert, (out, *kept), scanned)
    return (results[0][:num_rows], *results[1:])


def _fwd(
    rows: Array, group_sizes: Array, w_gate: Array, w_up: Array, w_down: Array, sizes: tuple[int, ...]
) -> tuple[Array, tuple[Array, ...]]:
    out, gate, up = _forward(rows, group_sizes, w_gate, w_up, w_down, sizes, keep=True)
    return out, (rows, group_sizes, w_gate, w_up, w_down, gate, up)


def _bwd(sizes: tuple[int, ...], residuals: tuple[Array, ...], d_out: Array) -> tuple[Array | None, ...]:
    rows, group_sizes, w_gate, w_up, w_down, kept_gate, kept_up = residuals
    num_rows, spill = rows.shape[0], sizes[-1]
    padded = jnp.pad(rows, ((0, spill), (0, 0)))
    d_padded = jnp.pad(d_out, ((0, spill), (0, 0)))

    def expert(d_rows: Array, weights: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...]]:
        start, count, gate_e, up_e, down_e = weights
        zeros = tuple(jnp.zeros(w.shape, FULL) for w in (gate_e, up_e, down_e))

        def block(first: Array, size: int, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            d_rows, d_gate_e, d_up_e, d_down_e = carry
            row = start + first
            x, gate, up, d_y = (
                jax.lax.dynamic_slice_in_dim(a, row, size) for a in (padded, kept_gate, kept_up, d_padded)
            )
            if size == sizes[-1]:  # its spill belongs to the next expert: it must not count in this one's weights
                d_y = jnp.where((first + jnp.arange(size) < count)[:, None], d_y, 0)
            activated, pull = jax.vjp(lambda g, u: jax.nn.silu(g) * u, gate, up)
            d_gate, d_up = pull(d_y @ down_e.T)
            d_x = d_gate @ gate_e.T + d_up @ up_e.T
            return (
                jax.lax.dynamic_update_slice_in_dim(d_rows, d_x, row, axis=0),
                d_gate_e + jnp.matmul(x.T, d_gate, preferred_element_type=FULL),
                d_up_e + jnp.matmul(x.T, d_up, preferred_element_type=FULL),
                d_down_e + jnp.matmul(activated.T, d_y, preferred_element_type=FULL),
            )

        d_rows, *d_weights = _over_blocks(count, sizes, block, (d_rows, *zeros))
        return d_rows, tuple(d.astype(w.dtype) for d, w in zip(d_weights, (gate_e, up_e, down_e), strict=True))

    scanned = (_offsets(group_sizes), group_sizes, w_gate, w_up, w_down)
    d_rows, d_weights = jax.lax.scan(expert, jnp.zeros_like(padded), scanned)
    return d_rows[:num_rows], None, *d_weights


grouped_blocks_ffn.defvjp(_fwd, _bwd)
