"""The SwiGLU experts over rows that are sorted by expert: work for the chosen experts only.

Backends: `blocked` loops over each expert's active blocks with a dynamic trip count and runs anywhere XLA runs;
`ragged_dot` is XLA's grouped product, dense on CPU and a grouped kernel on TPU. `equal` serves buffers of one size.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mixtral_jax.precision import FULL

ExpertsKernel = Literal["blocked", "ragged_dot", "equal"]


def expert_ffn(
    rows: Float[Array, "rows d_model"],
    group_sizes: Int[Array, " experts"],
    w_gate: Float[Array, "experts d_model d_ff"],
    w_up: Float[Array, "experts d_model d_ff"],
    w_down: Float[Array, "experts d_ff d_model"],
    *,
    backend: ExpertsKernel,
    block_size: int = 0,
) -> Float[Array, "rows d_model"]:
    """Computes w_down(silu(w_gate x) * w_up x) with each row's expert.

    Args:
        rows: sorted by expert; those beyond the sum of `group_sizes` belong to nobody.
        group_sizes: rows of each expert.
        w_gate, w_up, w_down: the experts.
        backend: see the module; `equal` requires every group to be rows / experts long.
        block_size: rows of a block of `blocked`; 0 chooses one from the mean load.

    Returns:
        One output a row; rows of nobody are finite and otherwise unspecified.
    """
    if backend == "equal":
        return _equal(rows, w_gate, w_up, w_down)
    if backend == "ragged_dot":
        return _ragged(rows, group_sizes, w_gate, w_up, w_down)
    size = block_size or choose_block_size(rows.shape[0], group_sizes.shape[0])
    return _blocked(rows, group_sizes, w_gate, w_up, w_down, size)


def choose_block_size(num_rows: int, num_experts: int) -> int:
    """Picks a power of two from 16 to 128 near half of the mean load, so that little of the last block is wasted."""
    mean = max(1, num_rows // num_experts)
    return max(16, min(128, 1 << ((mean // 2).bit_length() - 1 if mean > 1 else 0)))


def _equal(rows: Array, w_gate: Array, w_up: Array, w_down: Array) -> Array:
    x = rows.reshape(w_gate.shape[0], -1, rows.shape[1])
    gate, up = jnp.einsum("ecd,edf->ecf", x, w_gate), jnp.einsum("ecd,edf->ecf", x, w_up)
    return jnp.einsum("ecf,efd->ecd", jax.nn.silu(gate) * up, w_down).reshape(rows.shape)


def _ragged(rows: Array, group_sizes: Array, w_gate: Array, w_up: Array, w_down: Array) -> Array:
    sizes = group_sizes.astype(jnp.int32)
    gate, up = jax.lax.ragged_dot(rows, w_gate, sizes), jax.lax.ragged_dot(rows, w_up, sizes)
    return jax.lax.ragged_dot(jax.nn.silu(gate) * up, w_down, sizes)


# The blocked backend. Blocks start at their expert's first row, without padding between experts: the last block of an
# expert spills over into the next expert's rows, which are written after it and so overwrite the spill.


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _blocked(rows: Array, group_sizes: Array, w_gate: Array, w_up: Array, w_down: Array, size: int) -> Array:
    return _blocked_forward(rows, group_sizes, w_gate, w_up, w_down, size, keep=False)[0]


def _offsets(group_sizes: Array) -> Array:
    return jnp.cumsum(group_sizes) - group_sizes


def _blocked_forward(
    rows: Array, group_sizes: Array, w_gate: Array, w_up: Array, w_down: Array, size: int, *, keep: bool
) -> tuple[Array, ...]:
    num_rows = rows.shape[0]
    padded = jnp.pad(rows, ((0, size), (0, 0)))
    out = jnp.zeros_like(padded)
    kept = tuple(jnp.zeros((num_rows + size, w_gate.shape[2]), rows.dtype) for _ in range(2 if keep else 0))

    def expert(carry: tuple[Array, ...], weights: tuple[Array, ...]) -> tuple[tuple[Array, ...], None]:
        start, count, gate_e, up_e, down_e = weights

        def block(i: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            row = start + i * size
            x = jax.lax.dynamic_slice_in_dim(padded, row, size)
            gate, up = x @ gate_e, x @ up_e
            y = (jax.nn.silu(gate) * up) @ down_e
            values = (y, gate, up) if keep else (y,)
            return tuple(
                jax.lax.dynamic_update_slice_in_dim(old, new, row, axis=0)
                for old, new in zip(carry, values, strict=True)
            )

        return jax.lax.fori_loop(0, -(-count // size), block, carry), None

    scanned = (_offsets(group_sizes), group_sizes, w_gate, w_up, w_down)
    results, _ = jax.lax.scan(expert, (out, *kept), scanned)
    return (results[0][:num_rows], *results[1:])


def _blocked_fwd(
    rows: Array, group_sizes: Array, w_gate: Array, w_up: Array, w_down: Array, size: int
) -> tuple[Array, tuple[Array, ...]]:
    out, gate, up = _blocked_forward(rows, group_sizes, w_gate, w_up, w_down, size, keep=True)
    return out, (rows, group_sizes, w_gate, w_up, w_down, gate, up)


def _blocked_bwd(size: int, residuals: tuple[Array, ...], d_out: Array) -> tuple[Array | None, ...]:
    rows, group_sizes, w_gate, w_up, w_down, kept_gate, kept_up = residuals
    num_rows = rows.shape[0]
    padded = jnp.pad(rows, ((0, size), (0, 0)))
    d_padded = jnp.pad(d_out, ((0, size), (0, 0)))

    def expert(d_rows: Array, weights: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...]]:
        start, count, gate_e, up_e, down_e = weights
        zeros = tuple(jnp.zeros(w.shape, FULL) for w in (gate_e, up_e, down_e))

        def block(i: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            d_rows, d_gate_e, d_up_e, d_down_e = carry
            row = start + i * size
            x, gate, up, d_y = (
                jax.lax.dynamic_slice_in_dim(a, row, size) for a in (padded, kept_gate, kept_up, d_padded)
            )
            # The spill belongs to the next expert: it must not count in this one's weights.
            d_y = jnp.where((i * size + jnp.arange(size) < count)[:, None], d_y, 0)
            activated, pull = jax.vjp(lambda g, u: jax.nn.silu(g) * u, gate, up)
            d_gate, d_up = pull(d_y @ down_e.T)
            d_x = d_gate @ gate_e.T + d_up @ up_e.T
            return (
                jax.lax.dynamic_update_slice_in_dim(d_rows, d_x, row, axis=0),
                d_gate_e + jnp.matmul(x.T, d_gate, preferred_element_type=FULL),
                d_up_e + jnp.matmul(x.T, d_up, preferred_element_type=FULL),
                d_down_e + jnp.matmul(activated.T, d_y, preferred_element_type=FULL),
            )

        d_rows, *d_weights = jax.lax.fori_loop(0, -(-count // size), block, (d_rows, *zeros))
        return d_rows, tuple(d.astype(w.dtype) for d, w in zip(d_weights, (gate_e, up_e, down_e), strict=True))

    scanned = (_offsets(group_sizes), group_sizes, w_gate, w_up, w_down)
    d_rows, d_weights = jax.lax.scan(expert, jnp.zeros_like(padded), scanned)
    return d_rows[:num_rows], None, *d_weights


_blocked.defvjp(_blocked_fwd, _blocked_bwd)
