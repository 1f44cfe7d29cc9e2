"""The sparse mixture of experts: a float32 router, two dispatch strategies, on any mesh."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from mixtral_jax.config import ModelConfig
from mixtral_jax.kernels.blocked import choose_block_sizes
from mixtral_jax.kernels.cpu.layers import Stacks, exact_matmul, in_place_ffn
from mixtral_jax.kernels.expert_ffn import expert_ffn
from mixtral_jax.model.expert_parallel import compute_capacity, compute_dropless, drop_beyond_capacity
from mixtral_jax.model.layers import parameter
from mixtral_jax.model.routing import choose_experts, device_quota, drop_beyond_quota, expert_capacity
from mixtral_jax.precision import EXACT_PRODUCT, FULL
from mixtral_jax.remat import keep
from mixtral_jax.runtime import Runtime
from mixtral_jax.sharding import ONE_DEVICE, RULES, add_up, axis_size, by_device, gather, spec


class RouterOutput(NamedTuple):
    """What the router of one layer (or, stacked, of all) decided."""

    router_logits: Float[Array, "*layers batch seq experts"]
    expert_indices: Int[Array, "*layers batch seq k"]
    dropped: Float[Array, "*layers"]  # assignments that found no room


class SelectionBias(nnx.Variable):
    """State of auxiliary-loss-free balancing: moved by the load, never by a gradient."""


class ExpertWeight(nnx.Param):
    """A matrix of every expert."""


# For `in_place_ffn`: the experts of all layers, carried through them, and the number of the layer.
InPlace = tuple[Stacks, Int[Array, ""]]


class MoE(nnx.Module):
    """y = sum over the top k experts e of softmax_k(router)_e * SwiGLU_e(x). Source: arXiv 2401.04088, equation 2."""

    def __init__(self, config: ModelConfig, runtime: Runtime, *, rngs: nnx.Rngs):
        d, f, e = config.d_model, config.d_ff, config.num_experts
        std, out_std = config.init_std, config.init_std / math.sqrt(2 * config.num_layers)
        precision = runtime.precision
        self.router = parameter(rngs, (d, e), (None, None), std, precision)
        self.selection_bias = SelectionBias(jnp.zeros((e,), FULL), axes=(None,))
        self.w_gate = parameter(rngs, (e, d, f), ("experts", "expert_d_model", "d_ff"), std, precision, ExpertWeight)
        self.w_up = parameter(rngs, (e, d, f), ("experts", "expert_d_model", "d_ff"), std, precision, ExpertWeight)
        self.w_down = parameter(
            rngs, (e, f, d), ("experts", "d_ff", "expert_d_model"), out_std, precision, ExpertWeight
        )
        self.config = config
        self.runtime = runtime

    def __call__(
        self, x: Float[Array, "batch seq d_model"], valid: Bool[Array, "batch seq"], place: InPlace | None = None
    ) -> tuple[Float[Array, "batch seq d_model"], RouterOutput, Stacks | None]:
        """Routes and computes; positions that are not `valid` (padding) reach no expert and return zero.

        Args:
            x: normalised activations.
            valid: not padding.
            place: the experts of this module are those of all layers, and this is where to look.

        Returns:
            The result, what the router decided, and the stacks of `place` for the next layer.
        """
        compute = self.runtime.precision.compute
        logits = self._router_logits(x.astype(FULL), self.router[...].astype(FULL))
        tokens = spec(("batch", "sequence", None))
        w_in, w_out = spec(("experts", "expert_d_model", "d_ff")), spec(("experts", "d_ff", "expert_d_model"))
        weights = (w[...].astype(compute) for w in (self.w_gate, self.w_up, self.w_down))
        split = axis_size(self.runtime.mesh, "expert_d_model") > 1
        held: Any = PartitionSpec()
        if place:
            held = (ONE_DEVICE, PartitionSpec())
        local: Any = self._local
        y, indices, dropped, carried = by_device(
            jax.checkpoint(local, policy=_all_but_whole_weights, prevent_cse=False) if split else local,
            self.runtime.mesh,
            (tokens, tokens, spec(("batch", "sequence")), PartitionSpec(), w_in, w_in, w_out, held),
            (tokens, tokens, PartitionSpec(), ONE_DEVICE),
        )(x, logits, valid, self.selection_bias[...], *weights, place)
        return y, RouterOutput(logits, indices, dropped), carried

    def _router_logits(self, x: Array, router: Array) -> Array:
        if self.runtime.products == "xla":
            return jnp.einsum("bsd,de->bse", x, router, precision=EXACT_PRODUCT)
        logits = exact_matmul(x.reshape(-1, x.shape[-1]), router, self.runtime.products)
        return logits.reshape(*x.shape[:2], -1)

    def _local(
        self,
        x: Array,
        logits: Array,
        valid: Array,
        bias: Array,
        w_gate: Array,
        w_up: Array,
        w_down: Array,
        place: InPlace | None,
    ) -> tuple[Array, Array, Array, Stacks | None]:
        """Computes one device's part: its tokens with the experts of its group, whoever holds them."""
        config, runtime = self.config, self.runtime
        indices, weights = choose_experts(keep(logits), bias, config.num_experts_per_tok)
        weights = keep(weights)
        experts = jnp.where(valid[..., None], indices, config.num_experts)
        weights = jnp.where(valid[..., None], weights, 0)
        w_gate, w_up, w_down = (
            gather(w, runtime.mesh, "expert_d_model", axis) for w, axis in ((w_gate, 1), (w_up, 1), (w_down, 2))
        )
        (batch, seq_len, k), local_experts = experts.shape, w_gate.shape[-3]
        mesh = runtime.mesh
        ways, shares = mesh.shape["expert"], mesh.shape["context"]
        capacity = expert_capacity(seq_len * shares, k, config.num_experts, config.capacity_factor)
        equal = config.dispatch == "capacity" and shares == 1
        carried = None

        def run(rows: Array, group_sizes: Array, of_rows: Array | None = None) -> Array:
            nonlocal carried
            if place:
                stacks, layer = place
                weights = (w_gate, w_up, w_down)
                rows, carried = in_place_ffn(rows, group_sizes, of_rows, weights, layer, stacks, runtime.experts)
                return rows
            return expert_ffn(
                rows,
                group_sizes,
                w_gate,
                w_up,
                w_down,
                backend="equal" if equal else runtime.experts,
                block_sizes=runtime.block_sizes or choose_block_sizes(batch * seq_len * k, local_experts),
                interpret=runtime.platform == "cpu",
                eight_bit=runtime.precision.experts,
            )

        group = {"num_experts": config.num_experts, "ways": ways, "exchange": runtime.exchange}
        group["weighted"] = place is not None
        if equal:
            y, dropped = compute_capacity(x, experts, weights, run, capacity=capacity, **group)
        else:
            quota = device_quota(batch * seq_len, k, config.num_experts, ways, config.buffer_factor)
            kept = experts
            if config.dispatch == "capacity":
                kept = drop_beyond_capacity(experts, config.num_experts, shares, capacity)
            elif config.buffer_factor:
                kept = drop_beyond_quota(experts, config.num_experts, ways, quota)
            dropped = jnp.sum((kept == config.num_experts) & (experts < config.num_experts), dtype=FULL)
            flat_x, flat_kept, flat_weights = (a.reshape(-1, a.shape[-1]) for a in (x, kept, weights))
            y = compute_dropless(flat_x, flat_kept, flat_weights, run, quota=quota, **group).reshape(x.shape)
        y, dropped = add_up(y, mesh, "tensor"), add_up(dropped, mesh, "data", "fsdp", "expert", "context")
        return y, indices, dropped, carried


def _all_but_whole_weights(primitive: Any, *_: Any, **parameters: Any) -> bool:
    """Says what is kept for the backward pass: whole weights would be those of all layers at once."""
    return primitive is not jax.lax.all_gather_p or parameters["axis_name"] != RULES["expert_d_model"]
