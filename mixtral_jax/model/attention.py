"""Grouped-query attention with rotary positions."""

import math

from flax import nnx
from jaxtyping import Array, Float, Int

from mixtral_jax.config import ModelConfig
from mixtral_jax.kernels.attention import attention
from mixtral_jax.kernels.matmul import contract
from mixtral_jax.model.layers import Rotary, parameter, rotate
from mixtral_jax.remat import save_for_backward
from mixtral_jax.runtime import Runtime
from mixtral_jax.sharding import constrain

HEADS = ("batch", "sequence", "heads", None)
KV_HEADS = ("batch", "sequence", "kv_heads", None)


class Attention(nnx.Module):
    """Causal self-attention inside each document; num_heads / num_kv_heads query heads share a key/value head."""

    def __init__(self, config: ModelConfig, runtime: Runtime, *, rngs: nnx.Rngs):
        d, h, k, hd = config.d_model, config.num_heads, config.num_kv_heads, config.head_dim
        std, out_std = config.init_std, config.init_std / math.sqrt(2 * config.num_layers)
        precision = runtime.precision
        self.wq = parameter(rngs, (d, h, hd), ("d_model", "heads", None), std, precision)
        self.wk = parameter(rngs, (d, k, hd), ("d_model", "kv_heads", None), std, precision)
        self.wv = parameter(rngs, (d, k, hd), ("d_model", "kv_heads", None), std, precision)
        self.wo = parameter(rngs, (h, hd, d), ("heads", None, "d_model"), out_std, precision)
        self.runtime = runtime

    def __call__(
        self,
        x: Float[Array, "batch seq d_model"],
        segment_ids: Int[Array, "batch seq"],
        rotary: Rotary,
    ) -> Float[Array, "batch seq d_model"]:
        """Attends; `segment_ids` 0 is padding."""
        mesh, compute, matmul = self.runtime.mesh, self.runtime.precision.compute, self.runtime.matmul
        project = lambda w, axes: constrain(contract(x, w[...].astype(compute), 1, backend=matmul), mesh, axes)  # noqa: E731
        q = rotate(project(self.wq, HEADS), *rotary)
        k = rotate(project(self.wk, KV_HEADS), *rotary)
        v = project(self.wv, KV_HEADS)
        q, k, v = save_for_backward((q, k, v))
        backend, deterministic = self.runtime.attention, self.runtime.deterministic
        out = attention(q, k, v, segment_ids, mesh=mesh, backend=backend, deterministic=deterministic)
        return contract(out, self.wo[...].astype(compute), 2, backend=matmul)
