"""The sparse mixture of experts: a float32 router, two dispatch strategies, on any mesh."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from mixtral_jax.config import ModelConfig
from mixtral_jax.kernels.backends import find
from mixtral_jax.kernels.expert_ffn import (
    ALONE,
    ExpertOptions,
    ExpertWeights,
    GradientStack,
    SharedExperts,
    stacked_ffn,
)
from mixtral_jax.kernels.grouped_blocks import choose_block_sizes
from mixtral_jax.kernels.matmul import exact_contract
from mixtral_jax.kernels.permutation import RowMover
from mixtral_jax.kernels.stored import StoredExperts
from mixtral_jax.model.expert_parallel import (
    ExpertGroup,
    RoutedRows,
    RoutedTokens,
    combine,
    count_dropped,
    dispatch,
    drop_beyond_capacity,
    exchange,
    exchange_back,
    gather_tokens,
    scatter_sums,
)
from mixtral_jax.model.layers import parameter
from mixtral_jax.model.routing import (
    choose_experts,
    device_quota,
    drop_beyond_quota,
    expert_capacity,
    router_init_std,
)
from mixtral_jax.precision import FULL
from mixtral_jax.remat import save_for_backward
from mixtral_jax.runtime import Runtime
from mixtral_jax.sharding import ONE_DEVICE, RULES, add_up, axis_size, by_device, gather, spec


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
        self.router = parameter(rngs, (d, e), (None, None), router_init_std(config), precision)
        self.selection_bias = SelectionBias(jnp.zeros((e,), FULL), axes=(None,))
        self.w_gate = parameter(rngs, (e, d, f), ("experts", "expert_d_model", "d_ff"), std, precision)
        self.w_up = parameter(rngs, (e, d, f), ("experts", "expert_d_model", "d_ff"), std, precision)
        self.w_down = parameter(rngs, (e, f, d), ("experts", "d_ff", "expert_d_model"), out_std, precision)
        self.config = config
        self.runtime = runtime

    def __call__(
        self,
        x: Float[Array, "batch seq d_model"],
        valid: Bool[Array, "batch seq"],
        shared: SharedExperts = ALONE,
    ) -> tuple[Float[Array, "batch seq d_model"], RouterOutput, GradientStack | None]:
        """Routes and computes; positions that are not `valid` (padding) reach no expert and return zero.

        Args:
            x: normalised activations.
            valid: not padding.
            shared: the same experts among those of all layers, for a backend that wants them.

        Returns:
            Sums of the experts' outputs, the router's decisions, and the gradient stack for the next layer.
        """
        compute, mesh = self.runtime.precision.compute, self.runtime.mesh
        logits = exact_contract(x.astype(FULL), self.router[...].astype(FULL), backend=self.runtime.matmul)
        w_gate, w_up, w_down = (w[...].astype(compute) for w in (self.w_gate, self.w_up, self.w_down))
        tokens = spec(("batch", "sequence", None))
        w_in, w_out = spec(("experts", "expert_d_model", "d_ff")), spec(("experts", "d_ff", "expert_d_model"))
        split = axis_size(mesh, "expert_d_model") > 1
        local: Any = self._local
        splits = _in_stack(shared)
        y, indices, dropped, gradient_stack = by_device(
            jax.checkpoint(local, policy=_all_but_whole_weights, prevent_cse=False) if split else local,
            mesh,
            (
                tokens,
                tokens,
                spec(("batch", "sequence")),
                PartitionSpec(),
                (w_in, w_in, w_out),
                splits,
            ),
            (tokens, tokens, PartitionSpec(), splits.gradient_stack),
        )(x, logits, valid, self.selection_bias[...], (w_gate, w_up, w_down), shared)
        return y, RouterOutput(logits, indices, dropped), gradient_stack

    def _local(
        self,
        x: Array,
        logits: Array,
        valid: Array,
        bias: Array,
        weights: tuple[Array, ...],
        shared: SharedExperts,
    ) -> tuple[Array, Array, Array, GradientStack | None]:
        """Computes one device's part: its tokens with the experts of its group, whoever holds them."""
        mesh, group = self.runtime.mesh, self._group(valid.shape, decodes=isinstance(shared.stack, StoredExperts))
        w_gate, w_up, w_down = (
            gather(w, mesh, "expert_d_model", axis) for w, axis in zip(weights, (1, 1, 2), strict=True)
        )
        indices, tokens, dropped = self._route(x, logits, valid, bias, group)
        tokens = gather_tokens(tokens, group)
        rows = dispatch(tokens, group)
        if group.capacity is not None:
            dropped = count_dropped(tokens, rows, group)
        rows = exchange(rows, group)
        experts = ExpertWeights(w_gate, w_up, w_down, *shared)
        rows, gradient_stack = self._run_experts(rows, experts, group, valid.size)
        rows = exchange_back(rows, group)
        y = scatter_sums(combine(rows, group), group).reshape(x.shape)
        dropped = add_up(dropped, mesh, "data", "fsdp", "expert", "context")
        return add_up(y, mesh, "tensor"), indices, dropped, gradient_stack

    def _group(self, shape: tuple[int, ...], *, decodes: bool) -> ExpertGroup:
        """Says how much room this device's tokens have; buffers of one size need whole sequences."""
        config, mesh, (batch, seq_len) = self.config, self.runtime.mesh, shape
        devices, k = mesh.shape["expert"], config.num_experts_per_tok
        quota = device_quota(batch * seq_len, k, config.num_experts, devices, config.buffer_factor)
        equal = config.dispatch == "capacity" and mesh.shape["context"] == 1
        capacity = expert_capacity(seq_len, k, config.num_experts, config.capacity_factor) if equal else None
        as_they_come = devices > 1 or capacity is not None or decodes
        multiple = 1 if as_they_come else find("experts", self.runtime.experts).row_multiple
        mover = RowMover(self.runtime.rows, self.runtime.interpret)
        return ExpertGroup(config.num_experts, devices, self.runtime.exchange, quota, multiple, capacity, mover)

    def _route(
        self, x: Array, logits: Array, valid: Array, bias: Array, group: ExpertGroup
    ) -> tuple[Array, RoutedTokens, Array]:
        """Chooses experts; returns all choices, those that are computed, and how many of the others are no padding."""
        config, shares = self.config, self.runtime.mesh.shape["context"]
        indices, weights = choose_experts(save_for_backward(logits), bias, config.num_experts_per_tok)
        weights = jnp.where(valid[..., None], save_for_backward(weights), 0)
        experts = kept = jnp.where(valid[..., None], indices, config.num_experts)
        if config.dispatch == "capacity" and group.capacity is None:
            _, seq_len, k = experts.shape
            capacity = expert_capacity(seq_len * shares, k, config.num_experts, config.capacity_factor)
            kept = drop_beyond_capacity(experts, config.num_experts, shares, capacity)
        elif config.buffer_factor:
            kept = drop_beyond_quota(experts, config.num_experts, group.devices, group.quota)
        dropped = jnp.sum((kept == config.num_experts) & (experts < config.num_experts), dtype=FULL)
        return indices, RoutedTokens(x, kept, weights), dropped

    def _run_experts(
        self, routed: RoutedRows, weights: ExpertWeights, group: ExpertGroup, tokens: int
    ) -> tuple[RoutedRows, GradientStack | None]:
        """Computes the experts that this device holds; `tokens` are its own, from which their load is expected."""
        runtime, load = self.runtime, tokens * self.config.num_experts_per_tok
        options = ExpertOptions(
            "equal" if group.capacity is not None and weights.stack is None else runtime.experts,
            block_sizes=runtime.block_sizes or choose_block_sizes(load, group.local_experts),
            interpret=runtime.interpret,
            eight_bit=runtime.precision.experts,
            decoding=runtime.decoding,
            row_multiple=group.row_multiple,
        )
        rows, gradient_stack = stacked_ffn(routed.rows, routed.group_sizes, weights, options)
        return routed._replace(rows=rows), gradient_stack


def _in_stack(shared: SharedExperts) -> SharedExperts:
    """Says how the experts of all layers are split: those that one device reads not at all."""
    stack = shared.stack
    if not isinstance(stack, StoredExperts):
        return jax.tree.map(lambda part: ONE_DEVICE if part.ndim else PartitionSpec(), shared)
    wide = spec((None, "experts", None, "d_ff"))
    deep, scale = spec((None, "experts", "d_ff")), spec((None, "experts"))
    down = jax.tree.map(lambda part: scale if part.shape[2] == 1 else deep, stack.w_down)
    gate, up = (jax.tree.map(lambda _: wide, w) for w in (stack.w_gate, stack.w_up))
    whole: Any = PartitionSpec()
    return SharedExperts(StoredExperts(gate, up, down, whole))


def _all_but_whole_weights(primitive: Any, *_: Any, **parameters: Any) -> bool:
    """Says what is saved for the backward pass: whole weights would be those of all layers at once."""
    return primitive is not jax.lax.all_gather_p or parameters["axis_name"] != RULES["expert_d_model"]
