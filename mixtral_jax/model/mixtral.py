"""The decoder: embedding, scanned layers, final norm and output matrix."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from mixtral_jax.config import ModelConfig
from mixtral_jax.kernels.expert_ffn import ExpertStack
from mixtral_jax.kernels.stored import EightBitWeights, StoredExperts, matrices
from mixtral_jax.model.attention import Attention
from mixtral_jax.model.layers import RMSNorm, Rotary, embed, parameter, rotary_tables
from mixtral_jax.model.moe import MoE, RouterOutput, SelectionBias
from mixtral_jax.precision import FULL
from mixtral_jax.remat import REMAT_POLICIES, save_for_backward
from mixtral_jax.runtime import Runtime
from mixtral_jax.sharding import Axes, constrain, named_sharding

RESIDUAL = ("batch", "sequence", None)


class DecoderLayer(nnx.Module):
    """x + attention(norm(x)), then + experts(norm(x))."""

    def __init__(self, config: ModelConfig, runtime: Runtime, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps, runtime.precision)
        self.attention = Attention(config, runtime, rngs=rngs)
        self.moe_norm = RMSNorm(config.d_model, config.norm_eps, runtime.precision)
        self.moe = MoE(config, runtime, rngs=rngs)
        self.mesh = runtime.mesh

    def __call__(
        self,
        x: Float[Array, "batch seq d_model"],
        segment_ids: Int[Array, "batch seq"],
        attention_ids: Int[Array, "batch seq"],
        rotary: Rotary,
        stack: ExpertStack | None = None,
    ) -> tuple[Float[Array, "batch seq d_model"], RouterOutput]:
        """Runs the layer; `attention_ids` say who may see whom, `segment_ids` 0 marks padding; `stack`: see `MoE`."""
        attended = self.attention(self.attention_norm(x), attention_ids, rotary)
        x = save_for_backward(x + constrain(attended, self.mesh, RESIDUAL))
        y, router = self.moe(self.moe_norm(x), segment_ids > 0, stack)
        return constrain(x + y, self.mesh, RESIDUAL), router


class Mixtral(nnx.Module):
    """A decoder-only mixture-of-experts language model."""

    def __init__(self, config: ModelConfig, runtime: Runtime, *, rngs: nnx.Rngs):
        d, v = config.d_model, config.vocab_size

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap
        def make_layers(rngs: nnx.Rngs) -> DecoderLayer:
            return DecoderLayer(config, runtime, rngs=rngs)

        self.embedding = parameter(rngs, (v, d), ("vocab", "d_model"), config.init_std, runtime.precision)
        self.layers = make_layers(rngs)  # every parameter has a leading axis `layers`
        self.final_norm = RMSNorm(d, config.norm_eps, runtime.precision)
        self.lm_head = parameter(rngs, (d, v), ("d_model", "vocab"), config.init_std, runtime.precision)
        self.config = config
        self.runtime = runtime

    def __call__(
        self,
        tokens: Int[Array, "batch seq"],
        segment_ids: Int[Array, "batch seq"],
        positions: Int[Array, "batch seq"],
    ) -> tuple[Float[Array, "batch seq d_model"], RouterOutput]:
        """Runs the decoder up to the final norm; columns are in the order of `zigzag` where the mesh splits sequences.

        Args:
            tokens: token ids.
            segment_ids: document of each position, 1 and up; 0 is padding.
            positions: place of each token in its document, for the rotary embedding.

        Returns:
            Final activations, and what every layer's router decided, stacked over layers.
        """
        config, runtime = self.config, self.runtime
        x = embed(self.embedding[...], tokens, runtime)
        rotary = rotary_tables(positions, config)
        attention_ids = (segment_ids > 0).astype(segment_ids.dtype) if config.attend_across_documents else segment_ids
        graph, params = nnx.split(self.layers)
        stack_of = self.expert_stacks()

        def body(x: Array, inputs: Any) -> tuple[Array, RouterOutput]:
            number, params = inputs
            y, router = nnx.merge(graph, params)(x, segment_ids, attention_ids, rotary, stack_of(number))
            return y, router

        if runtime.remat != "none":
            body = jax.checkpoint(body, policy=REMAT_POLICIES[runtime.remat], prevent_cse=False)
        numbers = jnp.arange(config.num_layers, dtype=jnp.int32)
        x, router = jax.lax.scan(body, x, (numbers, params), unroll=runtime.unrolled)
        return self.final_norm(x), router

    def expert_stacks(self, *, decoding: bool = False) -> Callable[[Int[Array, ""]], Any]:
        """Returns where a layer finds its experts among those of all layers, for a backend that reads them there."""
        moe, runtime = self.layers.moe, self.runtime
        experts = [w[...] for w in (moe.w_gate, moe.w_up, moe.w_down)]
        if decoding and runtime.decoding == "stored":
            held: Any = [matrices(w, experts=self.config.num_experts) for w in experts]
            return partial(StoredExperts, *held)
        if not runtime.reads_stack or isinstance(experts[0], EightBitWeights):
            return lambda layer: None
        return partial(ExpertStack, *jax.lax.stop_gradient([w.astype(runtime.precision.compute) for w in experts]))

    def head(self) -> Float[Array, "d_model vocab"]:
        """Returns the output matrix in the compute type."""
        return self.lm_head[...].astype(self.runtime.precision.compute)

    def logits(self, x: Float[Array, "batch seq d_model"]) -> Float[Array, "batch seq vocab"]:
        """Computes all logits of final activations in float32; for short sequences (losses go by chunks)."""
        return jnp.einsum("bsd,dv->bsv", x, self.head(), preferred_element_type=FULL)


class Arrays(TypedDict):
    """Nested dicts of a model's arrays (or of shapes, axes, shardings): what is trained, saved, imported, exported."""

    params: PyTree
    selection_bias: PyTree


class Architecture:
    """A model without its arrays: shapes, logical axes, and the way from plain arrays to a callable `Mixtral`."""

    def __init__(self, config: ModelConfig, runtime: Runtime):
        self.config = config
        self.runtime = runtime
        abstract = nnx.eval_shape(lambda: Mixtral(config, runtime, rngs=nnx.Rngs(0)))
        split: Any = nnx.split(abstract, nnx.Param, SelectionBias)
        self._graph, self._params, self._bias = split

    def init(self, seed: int) -> Arrays:
        """Creates the arrays from a seed, each device only its own part; the same numbers on every mesh."""

        def create(key: Array) -> Arrays:
            model = Mixtral(self.config, self.runtime, rngs=nnx.Rngs(params=key))
            params, bias = nnx.state(model, nnx.Param), nnx.state(model, SelectionBias)
            return {"params": nnx.to_pure_dict(params), "selection_bias": nnx.to_pure_dict(bias)}

        return jax.jit(create, out_shardings=self.shardings())(jax.random.key(seed))

    def abstract(self) -> Arrays:
        """Returns the tree of shapes, types and shardings."""
        shapes = {"params": nnx.to_pure_dict(self._params), "selection_bias": nnx.to_pure_dict(self._bias)}
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, self.shardings())

    def axes(self) -> Arrays:
        """Returns the tree of logical axes."""

        def named(path: Any, variable: nnx.Variable) -> Axes:
            own: Axes = variable.get_metadata("axes")
            return ("layers", *own) if getattr(path[0], "key", None) == "layers" else own

        is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
        trees = [
            jax.tree_util.tree_map_with_path(named, state, is_leaf=is_variable) for state in (self._params, self._bias)
        ]
        return {"params": nnx.to_pure_dict(trees[0]), "selection_bias": nnx.to_pure_dict(trees[1])}

    def shardings(self) -> Arrays:
        """Returns the tree of shardings on the runtime's mesh."""
        mesh = self.runtime.mesh
        return jax.tree.map(
            lambda axes: named_sharding(mesh, axes), self.axes(), is_leaf=lambda x: isinstance(x, tuple)
        )

    def bind(self, arrays: Arrays) -> Mixtral:
        """Puts arrays into a model that can be called."""
        leaves = partial(jax.tree.leaves, is_leaf=lambda leaf: isinstance(leaf, EightBitWeights))
        states = [
            jax.tree.unflatten(jax.tree.structure(state), leaves(tree))
            for state, tree in ((self._params, arrays["params"]), (self._bias, arrays["selection_bias"]))
        ]
        return nnx.merge(self._graph, *states)
