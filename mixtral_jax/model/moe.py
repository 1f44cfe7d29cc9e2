"""The sparse mixture of experts: a float32 router, two dispatch strategies and portable expert parallelism."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from mixtral_jax.config import ModelConfig
from mixtral_jax.kernels.expert_ffn import ExpertsKernel, expert_ffn
from mixtral_jax.kernels.permutation import combine_rows, dispatch_rows
from mixtral_jax.model.layers import parameter
from mixtral_jax.model.routing import capacity_plan, choose_experts, dropless_plan, expert_capacity
from mixtral_jax.precision import EXACT_PRODUCT, FULL
from mixtral_jax.runtime import Runtime
from mixtral_jax.sharding import spec


class RouterOutput(NamedTuple):
    """What the router of one layer (or, stacked, of all) decided."""

    router_logits: Float[Array, "*layers batch seq experts"]
    expert_indices: Int[Array, "*layers batch seq k"]
    dropped: Float[Array, "*layers"]  # assignments that found no room


class SelectionBias(nnx.Variable):
    """State of auxiliary-loss-free balancing: moved by the load, never by a gradient."""


class MoE(nnx.Module):
    """y = sum over the top k experts e of softmax_k(router)_e * SwiGLU_e(x). Source: arXiv 2401.04088, equation 2."""

    def __init__(self, config: ModelConfig, runtime: Runtime, *, rngs: nnx.Rngs):
        d, f, e = config.d_model, config.d_ff, config.num_experts
        std, out_std = config.init_std, config.init_std / math.sqrt(2 * config.num_layers)
        precision = runtime.precision
        self.router = parameter(rngs, (d, e), (None, None), std, precision)
        self.selection_bias = SelectionBias(jnp.zeros((e,), FULL), axes=(None,))
        self.w_gate = parameter(rngs, (e, d, f), ("experts", "d_model", "d_ff"), std, precision)
        self.w_up = parameter(rngs, (e, d, f), ("experts", "d_model", "d_ff"), std, precision)
        self.w_down = parameter(rngs, (e, f, d), ("experts", "d_ff", "d_model"), out_std, precision)
        self.config = config
        self.runtime = runtime

    def __call__(
        self, x: Float[Array, "batch seq d_model"], valid: Bool[Array, "batch seq"]
    ) -> tuple[Float[Array, "batch seq d_model"], RouterOutput]:
        """Routes and computes; positions that are not `valid` (padding) reach no expert and return zero."""
        config, compute = self.config, self.runtime.precision.compute
        logits = jnp.einsum("bsd,de->bse", x.astype(FULL), self.router[...].astype(FULL), precision=EXACT_PRODUCT)
        indices, weights = choose_experts(logits, self.selection_bias[...], config.num_experts_per_tok)
        experts = jnp.where(valid[..., None], indices, config.num_experts)
        weights = jnp.where(valid[..., None], weights, 0)

        tokens = spec(("batch", "sequence", None))
        w_in, w_out = spec(("experts", None, "d_ff")), spec(("experts", "d_ff", None))
        y, dropped = jax.shard_map(
            self._local,
            mesh=self.runtime.mesh,
            in_specs=(tokens, tokens, tokens, w_in, w_in, w_out),
            out_specs=(tokens, PartitionSpec()),
            check_vma=False,
        )(x, experts, weights, *(w[...].astype(compute) for w in (self.w_gate, self.w_up, self.w_down)))
        return y, RouterOutput(logits, indices, dropped)

    def _local(
        self, x: Array, experts: Array, weights: Array, w_gate: Array, w_up: Array, w_down: Array
    ) -> tuple[Array, Array]:
        """Computes one device's part: all tokens of its expert group against its own experts.

        Expert parallelism by all-gather and reduce-scatter: every device of the group sees the group's tokens, computes
        the assignments to its experts, and the sums return to the tokens' owners.
        """
        config, mesh = self.config, self.runtime.mesh
        ways, local_experts = mesh.shape["expert"], w_gate.shape[0]
        if ways > 1:
            x, experts, weights = (jax.lax.all_gather(a, "expert", axis=0, tiled=True) for a in (x, experts, weights))
        mine = experts - jax.lax.axis_index("expert") * local_experts
        mine = jnp.where((mine >= 0) & (mine < local_experts), mine, local_experts)
        batch, seq_len, k = mine.shape
        flat_x, flat_weights = x.reshape(-1, x.shape[-1]), weights.reshape(-1, k)
        if config.dispatch == "capacity":
            capacity = expert_capacity(seq_len, k, config.num_experts, config.capacity_factor)
            plan = capacity_plan(mine, local_experts, capacity)
            backend: ExpertsKernel = "equal"
        else:
            rows = batch * seq_len * min(k, local_experts)
            plan = dropless_plan(mine.reshape(-1, k), local_experts, rows)
            backend = self.runtime.experts
        expert_rows = expert_ffn(
            dispatch_rows(flat_x, plan.source, plan.row_of),
            plan.group_sizes,
            w_gate,
            w_up,
            w_down,
            backend=backend,
            block_size=self.runtime.block_size,
        )
        y = combine_rows(expert_rows, flat_weights, plan.source, plan.row_of).reshape(x.shape)
        y = jax.lax.psum(y, "tensor")
        if ways > 1:
            y = jax.lax.psum_scatter(y, "expert", scatter_dimension=0, tiled=True)
        dropped = jnp.sum((mine < local_experts).reshape(-1, k) & (plan.row_of >= plan.source.size), dtype=FULL)
        return y, jax.lax.psum(dropped, ("data", "fsdp", "expert", "context"))
