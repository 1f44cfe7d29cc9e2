"""The SwiGLU experts over rows that are sorted by expert: work for the chosen experts only; see `backends`."""

from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mixtral_jax.kernels.backends import find, load
from mixtral_jax.kernels.permutation import in_padded_groups
from mixtral_jax.kernels.quantized import EightBitProduct, quantized_ffn
from mixtral_jax.kernels.stored import StoredExperts

T = TypeVar("T")


class ExpertStack(NamedTuple):
    """The experts of all layers, constant for differentiation, and which layer is meant."""

    w_gate: Float[Array, "layers experts d_model d_ff"]
    w_up: Float[Array, "layers experts d_model d_ff"]
    w_down: Float[Array, "layers experts d_ff d_model"]
    layer: Int[Array, ""]


GradientStack = tuple[
    Float[Array, "layers experts d_model d_ff"],
    Float[Array, "layers experts d_model d_ff"],
    Float[Array, "layers experts d_ff d_model"],
]


class SharedExperts(NamedTuple):
    """What a layer's experts are beside its own arrays, where a backend would have those of all layers.

    A backend that reads the same numbers in the stack leaves the layer's arrays alone: then XLA never cuts them out of
    the stack. A gradient stack is gate, up and down of all layers, which every layer hands to the next: their gradients
    come back the other way, and each layer writes its own part where it lies. Otherwise every layer's would be copied
    into a stack afterwards.
    """

    stack: ExpertStack | StoredExperts | None = None
    gradient_stack: GradientStack | None = None


ALONE = SharedExperts()


class ExpertWeights(NamedTuple):
    """The experts of one layer; gradients flow to these arrays, or to the gradient stack; see `SharedExperts`."""

    w_gate: Float[Array, "experts d_model d_ff"]
    w_up: Float[Array, "experts d_model d_ff"]
    w_down: Float[Array, "experts d_ff d_model"]
    stack: ExpertStack | StoredExperts | None = None
    gradient_stack: GradientStack | None = None

    def in_stack(self) -> ExpertStack:
        """Returns where to read them: in the stack, or in one of this layer alone."""
        w_gate, w_up, w_down, stack, _ = self
        assert not isinstance(stack, StoredExperts)
        return stack or ExpertStack(w_gate[None], w_up[None], w_down[None], jnp.zeros((), jnp.int32))


class ExpertOptions(NamedTuple):
    """How experts are computed."""

    backend: str  # of the table, but for `StoredExperts`; or `equal`, which requires groups of rows / experts each
    block_sizes: tuple[int, ...] = ()  # rows of the blocks of `grouped_blocks`, largest first
    interpret: Any = False  # run a kernel of the platform step by step, on a CPU
    eight_bit: DTypeLike | None = None  # type that the products' factors are rounded to, see `quantized`
    decoding: str = "stored"  # backend for `StoredExperts`
    row_multiple: int = 1  # what divides all group sizes; their padding rows are zero


def expert_ffn(
    rows: Float[Array, "rows d_model"],
    group_sizes: Int[Array, " experts"],
    weights: ExpertWeights,
    options: ExpertOptions,
) -> Float[Array, "rows d_model"]:
    """Computes w_down(silu(w_gate x) * w_up x) with each row's expert.

    Args:
        rows: sorted by expert; those beyond the sum of `group_sizes` are padding.
        group_sizes: rows of each expert.
        weights: the experts.
        options: who computes, and how.

    Returns:
        One output a row; padding rows are finite and otherwise unspecified.
    """
    return stacked_ffn(rows, group_sizes, weights, options)[0]


def stacked_ffn(
    rows: Float[Array, "rows d_model"],
    group_sizes: Int[Array, " experts"],
    weights: ExpertWeights,
    options: ExpertOptions,
) -> tuple[Float[Array, "rows d_model"], GradientStack | None]:
    """Computes `expert_ffn`, and hands on the gradient stack where the backend writes to one."""
    sizes = group_sizes.astype(jnp.int32)
    w_gate, w_up, w_down, stack, _ = weights
    backend, block_sizes, interpret, eight_bit, decoding, row_multiple = options
    if isinstance(stack, StoredExperts):
        return load("decoding", decoding).stored_ffn(rows, sizes, stack), None
    if eight_bit is not None:
        return _eight_bit_ffn(rows, sizes, weights, options)
    if backend == "hopper":
        return load("experts", backend).hopper_ffn(rows, sizes, weights, row_multiple=row_multiple)  # type: ignore[no-any-return]
    if backend == "equal":
        x = rows.reshape(w_gate.shape[0], -1, rows.shape[1])
        gate, up = jnp.einsum("ecd,edf->ecf", x, w_gate), jnp.einsum("ecd,edf->ecf", x, w_up)
        return jnp.einsum("ecf,efd->ecd", jax.nn.silu(gate) * up, w_down).reshape(rows.shape), None
    if backend == "ragged_dot":
        gate, up = jax.lax.ragged_dot(rows, w_gate, sizes), jax.lax.ragged_dot(rows, w_up, sizes)
        return jax.lax.ragged_dot(jax.nn.silu(gate) * up, w_down, sizes), None
    engine = load("experts", backend)
    if backend == "grouped_blocks":
        return engine.grouped_blocks_ffn(rows, sizes, w_gate, w_up, w_down, block_sizes), None
    if backend == "triton":
        return engine.grouped_ffn(rows, sizes, w_gate, w_up, w_down, interpret), None
    if backend == "megablox":
        return engine.megablox_ffn(rows, sizes, w_gate, w_up, w_down, interpret), None
    return engine.engine_ffn(rows, sizes, weights, backend), None


def _eight_bit_ffn(rows: Array, sizes: Array, weights: ExpertWeights, options: ExpertOptions) -> tuple[Array, Any]:
    """Pads groups of rows as the backend would have them, and computes in 8 bits."""
    block_size = options.block_sizes[0] if options.block_sizes else 0
    assert options.eight_bit is not None
    product = EightBitProduct(options.eight_bit, options.backend, block_size, options.interpret)
    layer = weights.stack.layer if isinstance(weights.stack, ExpertStack) else None
    run = partial(
        quantized_ffn, weights=weights[:3], product=product, gradient_stack=weights.gradient_stack, layer=layer
    )
    multiple = 1 if options.backend == "equal" else find("experts", options.backend).row_multiple
    if options.row_multiple % multiple == 0:
        return run(rows, sizes)
    return in_padded_groups(run, rows, sizes, multiple)


@jax.custom_vjp
def begin_gradient_stack(x: T, gradient_stack: GradientStack) -> T:
    """Says that no layer follows: the memory for the gradients begins here, with any content."""
    return x


def _begin_fwd(x: T, gradient_stack: GradientStack) -> tuple[T, GradientStack]:
    return x, gradient_stack


def _begin_bwd(gradient_stack: GradientStack, d_x: T) -> tuple[T, GradientStack]:
    return d_x, jax.tree.map(lambda w: jax.lax.empty(w.shape, w.dtype), gradient_stack)


begin_gradient_stack.defvjp(_begin_fwd, _begin_bwd)
