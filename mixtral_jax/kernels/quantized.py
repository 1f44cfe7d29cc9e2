"""SwiGLU experts whose products have 8-bit factors, forward and in both gradients, rounded by qwix.

A factor is divided by scales and rounded to whole numbers or short floats: a scale for each row of activations, for
each column of an expert's weights. A gradient passes the rounding as if it were not there (straight through), is
divided by scales along what its own product sums, and is rounded in its turn. Sums are float32, or exact. Hopper's
kernels and portable blocks multiply in 8 bits; Triton's and megablox multiply in bfloat16, which holds them all.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

from mixtral_jax.kernels.backends import load
from mixtral_jax.precision import EIGHT_BIT_CARRIER, FULL

ExpertMatrices = tuple[  # gate, up and down, of a layer or of all
    Float[Array, "... experts d_model d_ff"],
    Float[Array, "... experts d_model d_ff"],
    Float[Array, "... experts d_ff d_model"],
]
IN_CARRIER = ("triton", "megablox")  # multiply in `EIGHT_BIT_CARRIER`


@dataclass(frozen=True)
class EightBitProduct:
    """Products of 8-bit factors by one backend of `expert_ffn`, multiplied with their scales."""

    dtype: DTypeLike  # of the factors
    backend: str  # grouped_blocks, triton, hopper, megablox or equal
    block_size: int  # rows of a block of `grouped_blocks`
    interpret: Any  # run a kernel of the platform step by step, on a CPU: a flag, for `hopper` how

    def quantize(self, x: Float[Array, "..."], axes: tuple[int, ...]) -> Any:
        """Rounds to 8 bits; every index along `axes` has a scale of its own."""
        import qwix  # takes a second, which only who needs it shall wait for

        # To the end of the type: by itself qwix puts the largest at 127.5, where its sign decides how it is rounded.
        method = f"absmax,{127.5 / 127}" if self._whole() else "absmax"
        found = qwix.quantize(
            self._as_it_lies(x).astype(FULL), self.dtype, channelwise_axes=axes, calibration_method=method
        )
        return replace(found, qvalue=self._as_it_lies(found.qvalue))

    def _as_it_lies(self, x: Array) -> Array:
        """Keeps XLA from transposing all that leads to one of Hopper's factors, which are transposed themselves."""
        return with_layout_constraint(x, Layout(tuple(range(x.ndim)))) if self.backend == "hopper" else x

    def rows(
        self,
        x: Num[Array, "rows k"],
        weights: Num[Array, "experts k n"],
        sizes: Int[Array, " experts"],
        row_scales: Float[Array, "rows 1"],
        column_scales: Float[Array, "experts 1 n"] | None,
        dtype: DTypeLike,
    ) -> Float[Array, "rows n"]:
        """[rows, k] and [experts, k, n] to [rows, n] of that type, each row with its expert; zeros in padding rows."""
        if self.backend == "hopper":
            scales = row_scales, column_scales
            out: Array = load("experts", "hopper").multiply_8_bits(x, weights, sizes, scales, dtype, self.interpret)
            return out
        sums = self._row_sums(x, weights, sizes) * row_scales
        sums = sums if column_scales is None else sums * _of_rows(column_scales, sizes, sums.shape[0])
        return _used(sums, sizes).astype(dtype)

    def weights(
        self,
        x: Num[Array, "rows k"],
        y: Num[Array, "rows n"],
        sizes: Int[Array, " experts"],
        column_scales: Float[Array, "1 n"],
        into: tuple[Float[Array, "matrices k n"], Int[Array, ""]] | None,
        dtype: DTypeLike,
    ) -> Float[Array, "matrices k n"]:
        """[rows, k] and [rows, n] to [experts, k, n] of that type, summed over each expert's rows.

        `into`, which `hopper` knows, are matrices to write over, and the place of the first expert's.
        """
        if self.backend == "hopper":
            engine = load("experts", "hopper")
            out: Array = engine.outer_products_8_bits(x, y, sizes, column_scales, into, dtype, self.interpret)
            return out
        assert into is None
        return (self._weight_sums(x, y, sizes) * column_scales).astype(dtype)

    def _row_sums(self, x: Array, weights: Array, sizes: Array) -> Array:
        if self.backend == "equal":
            by_expert = self._dot(x.reshape(weights.shape[0], -1, x.shape[1]), weights, ((2,), (1,)), True)
            return by_expert.reshape(x.shape[0], -1)
        if self.backend in IN_CARRIER:
            x, weights = x.astype(EIGHT_BIT_CARRIER), weights.astype(EIGHT_BIT_CARRIER)
            sums: Array = load("experts", self.backend).multiply(x, weights, sizes, FULL, self.interpret)
            return sums

        spilling = jnp.pad(x, ((0, self.block_size), (0, 0)))

        def expert(out: Array, expert: tuple[Array, ...]) -> tuple[Array, None]:
            start, count, w = expert

            def block(i: Array, out: Array) -> Array:
                row = start + i * self.block_size  # what a last block computes too much, the next expert overwrites
                part = jax.lax.dynamic_slice_in_dim(spilling, row, self.block_size)
                return jax.lax.dynamic_update_slice_in_dim(out, self._dot(part, w, ((1,), (0,))), row, axis=0)

            return jax.lax.fori_loop(0, -(-count // self.block_size), block, out), None

        zeros = jnp.zeros((spilling.shape[0], weights.shape[2]), FULL)
        return jax.lax.scan(expert, zeros, (_starts(sizes), sizes, weights))[0][: x.shape[0]]

    def _weight_sums(self, x: Array, y: Array, sizes: Array) -> Array:
        experts = sizes.shape[0]
        if self.backend == "equal":
            x, y = (a.reshape(experts, -1, a.shape[1]) for a in (x, y))
            return self._dot(x, y, ((1,), (1,)), True)
        if self.backend in IN_CARRIER:
            x, y = x.astype(EIGHT_BIT_CARRIER), y.astype(EIGHT_BIT_CARRIER)
            sums = load("experts", self.backend).outer_products(x, y, sizes, FULL, self.interpret)
            return sums

        spilling = [jnp.pad(a, ((0, self.block_size), (0, 0))) for a in (x, y)]

        def expert(_: None, expert: tuple[Array, Array]) -> tuple[None, Array]:
            start, count = expert

            def block(i: Array, total: Array) -> Array:
                first = i * self.block_size
                a, b = (jax.lax.dynamic_slice_in_dim(s, start + first, self.block_size) for s in spilling)
                own = (first + jnp.arange(self.block_size) < count)[:, None]
                return total + self._dot(a, jnp.where(own, b, jnp.zeros_like(b)), ((0,), (0,)))

            zeros = jnp.zeros((x.shape[1], y.shape[1]), FULL)
            return None, jax.lax.fori_loop(0, -(-count // self.block_size), block, zeros)

        return jax.lax.scan(expert, None, (_starts(sizes), sizes))[1]

    def _dot(self, a: Array, b: Array, contracted: Any, by_expert: bool = False) -> Array:
        batch = ((0,), (0,)) if by_expert else ((), ())
        if not self._whole():  # a CPU has no products of short floats
            a, b = a.astype(EIGHT_BIT_CARRIER), b.astype(EIGHT_BIT_CARRIER)
        return jax.lax.dot_general(a, b, (contracted, batch), preferred_element_type=self._sums()).astype(FULL)

    def _sums(self) -> DTypeLike:
        return jnp.int32 if self._whole() else FULL

    def _whole(self) -> bool:
        return jnp.issubdtype(self.dtype, jnp.integer)


def quantized_ffn(
    rows: Float[Array, "rows d_model"],
    group_sizes: Int[Array, " experts"],
    weights: ExpertMatrices,
    product: EightBitProduct,
    gradient_stack: ExpertMatrices | None = None,
    layer: Int[Array, ""] | None = None,
) -> tuple[Float[Array, "rows d_model"], Any]:
    """Computes w_down(silu(w_gate x) * w_up x) with each row's expert in products of 8-bit factors; see `expert_ffn`.

    Args:
        rows: sorted by expert.
        group_sizes: rows of each expert.
        weights: of this layer.
        product: who multiplies, and in which type.
        gradient_stack: the same of all layers, where gradients are to be written; see `SharedExperts`.
        layer: this one's number.

    Returns:
        One output a row, zero for padding rows; and the gradient stack.
    """
    if product.backend == "equal":
        group_sizes = jnp.full(weights[0].shape[0], rows.shape[0] // weights[0].shape[0], jnp.int32)
    stacks = gradient_stack or (None, None, None)
    multiply = partial(_multiply, product)
    gate, next_gate = multiply(rows, weights[0], group_sizes, stacks[0], layer)
    up, next_up = multiply(rows, weights[1], group_sizes, stacks[1], layer)
    out, next_down = multiply(jax.nn.silu(gate) * up, weights[2], group_sizes, stacks[2], layer)
    return out, gradient_stack and (next_gate, next_up, next_down)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(
    product: EightBitProduct, rows: Array, weights: Array, sizes: Array, stack: Array | None, layer: Array | None
) -> tuple[Array, Array | None]:
    return _forward(product, rows, weights, sizes, stack, layer)[0]


def _forward(
    product: EightBitProduct, rows: Array, weights: Array, sizes: Array, stack: Array | None, layer: Array | None
) -> tuple[tuple[Array, Array | None], tuple[Any, ...]]:
    x, w = product.quantize(_used(rows, sizes), (0,)), product.quantize(weights, (0, 2))
    out = product.rows(x.qvalue, w.qvalue, sizes, x.scale, w.scale, rows.dtype)
    return (out, stack), (x, w, sizes, layer)


def _backward(
    product: EightBitProduct, residuals: tuple[Any, ...], cotangents: tuple[Array, Array | None]
) -> tuple[Array | None, ...]:
    x, w, sizes, layer = residuals
    d_out, d_stack = cotangents
    d_used, dtype = _used(d_out.astype(FULL), sizes), d_out.dtype
    by_row = product.quantize(d_used * _of_rows(w.scale, sizes, d_out.shape[0]), (0,))
    d_rows = product.rows(by_row.qvalue, w.qvalue.swapaxes(1, 2), sizes, by_row.scale, None, dtype)
    by_column = product.quantize(d_used * x.scale, (1,))
    into = None if d_stack is None else (d_stack.reshape(-1, *d_stack.shape[2:]), layer * sizes.size)
    d_weights = product.weights(x.qvalue, by_column.qvalue, sizes, by_column.scale, into, dtype)
    if d_stack is None:
        return d_rows, d_weights, None, None, None
    return d_rows, None, None, d_weights.reshape(d_stack.shape), None


_multiply.defvjp(_forward, _backward)


def _used(rows: Array, sizes: Array) -> Array:
    """Zeros for padding rows, whatever they hold."""
    return jnp.where((jnp.arange(rows.shape[0]) < jnp.sum(sizes))[:, None], rows, 0)


def _of_rows(scale: Array, sizes: Array, num_rows: int) -> Array:
    """[experts, 1, n] to [rows, n]: the scales of each row's expert."""
    expert = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(num_rows), side="right")
    return jnp.take(scale[:, 0], expert, axis=0, mode="clip")


def _starts(sizes: Array) -> Array:
    return jnp.cumsum(sizes) - sizes
