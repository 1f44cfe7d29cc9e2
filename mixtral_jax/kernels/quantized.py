"""SwiGLU experts whose products have 8-bit factors, forward and in both gradients, rounded by qwix.

A factor is divided by scales and rounded to whole numbers or short floats: a scale for each row of activations, for
each column of an expert's weights. A gradient passes the rounding as if it were not there (straight through), is
divided by scales along what its own product sums, and is rounded in its turn. Sums are float32, or exact. Megablox
multiplies 8-bit numbers in bfloat16, which holds them all: on a TPU nothing is faster for it.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

from mixtral_jax.kernels.backends import load
from mixtral_jax.precision import EIGHT_BIT_CARRIER, FULL

WEIGHT_GRADIENTS = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


@dataclass(frozen=True)
class EightBitProduct:
    """Products of 8-bit factors by one backend of `expert_ffn`: numbers without their scales in, float32 sums out."""

    dtype: DTypeLike  # of the factors
    backend: str  # grouped_blocks, ragged_dot, megablox or equal
    block_size: int  # rows of a block of `grouped_blocks`
    interpret: bool

    def quantize(self, x: Float[Array, "..."], axes: tuple[int, ...]) -> Any:
        """Rounds to 8 bits; every index along `axes` has a scale of its own."""
        import qwix  # takes a second, which only who needs it shall wait for

        # To the end of the type: by itself qwix puts the largest at 127.5, where its sign decides how it is rounded.
        method = f"absmax,{127.5 / 127}" if self._whole() else "absmax"
        return qwix.quantize(x.astype(FULL), self.dtype, channelwise_axes=axes, calibration_method=method)

    def rows(
        self, x: Num[Array, "rows k"], weights: Num[Array, "experts k n"], sizes: Int[Array, " experts"]
    ) -> Float[Array, "rows n"]:
        """[rows, k] and [experts, k, n] to [rows, n], each row with its expert."""
        if self.backend == "equal":
            by_expert = self._dot(x.reshape(weights.shape[0], -1, x.shape[1]), weights, ((2,), (1,)), True)
            return by_expert.reshape(x.shape[0], -1)
        if self.backend == "ragged_dot":
            return jax.lax.ragged_dot(x, weights, sizes, preferred_element_type=self._sums()).astype(FULL)
        if self.backend == "megablox":
            x, weights = x.astype(EIGHT_BIT_CARRIER), weights.astype(EIGHT_BIT_CARRIER)
            out: Array = load("experts", self.backend).multiply(x, weights, sizes, FULL, self.interpret)
            return out

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

    def weights(
        self, x: Num[Array, "rows k"], y: Num[Array, "rows n"], sizes: Int[Array, " experts"]
    ) -> Float[Array, "experts k n"]:
        """[rows, k] and [rows, n] to [experts, k, n], summed over each expert's rows."""
        experts = sizes.shape[0]
        if self.backend == "equal":
            x, y = (a.reshape(experts, -1, a.shape[1]) for a in (x, y))
            return self._dot(x, y, ((1,), (1,)), True)
        if self.backend == "ragged_dot":
            sums = jax.lax.ragged_dot_general(x, y, sizes, WEIGHT_GRADIENTS, preferred_element_type=self._sums())
            return sums.astype(FULL)
        if self.backend == "megablox":
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
    w_gate: Float[Array, "experts d_model d_ff"],
    w_up: Float[Array, "experts d_model d_ff"],
    w_down: Float[Array, "experts d_ff d_model"],
    product: EightBitProduct,
) -> Float[Array, "rows d_model"]:
    """Computes w_down(silu(w_gate x) * w_up x) with each row's expert in products of 8-bit factors; see `expert_ffn`.

    Returns:
        One output a row; zero for padding rows.
    """
    if product.backend == "equal":
        group_sizes = jnp.full(w_gate.shape[0], rows.shape[0] // w_gate.shape[0], jnp.int32)
    gate, up = _multiply(rows, w_gate, group_sizes, product), _multiply(rows, w_up, group_sizes, product)
    return _multiply(jax.nn.silu(gate) * up, w_down, group_sizes, product)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _multiply(rows: Array, weights: Array, sizes: Array, product: EightBitProduct) -> Array:
    return _forward(rows, weights, sizes, product)[0]


def _forward(rows: Array, weights: Array, sizes: Array, product: EightBitProduct) -> tuple[Array, tuple[Any, ...]]:
    x, w = product.quantize(_used(rows, sizes), (0,)), product.quantize(weights, (0, 2))
    out = product.rows(x.qvalue, w.qvalue, sizes) * x.scale * _of_rows(w.scale, sizes, rows.shape[0])
    return _used(out, sizes).astype(rows.dtype), (x, w, sizes)


def _backward(product: EightBitProduct, residuals: tuple[Any, ...], d_out: Array) -> tuple[Array | None, ...]:
    x, w, sizes = residuals
    d_used = _used(d_out.astype(FULL), sizes)
    by_row = product.quantize(d_used * _of_rows(w.scale, sizes, d_out.shape[0]), (0,))
    d_rows = product.rows(by_row.qvalue, w.qvalue.swapaxes(1, 2), sizes) * by_row.scale
    by_column = product.quantize(d_used * x.scale, (1,))
    d_weights = product.weights(x.qvalue, by_column.qvalue, sizes) * by_column.scale
    return _used(d_rows, sizes).astype(d_out.dtype), d_weights.astype(d_out.dtype), None


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
