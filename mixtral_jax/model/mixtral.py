"""The decoder: embedding, scanned layers, final norm and output matrix."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mixtral_jax.config import ModelConfig
from mixtral_jax.kernels.cpu.layers import Stacks, collect
from mixtral_jax.model.attention import Attention
from mixtral_jax.model.layers import RMSNorm, embed, parameter, rotary_tables
from mixtral_jax.model.moe import ExpertWeight, InPlace, MoE, RouterOutput, SelectionBias
from mixtral_jax.precision import FULL
from mixtral_jax.remat import REMAT_POLICIES, keep
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
        x: Array,
        segment_ids: Array,
        attention_ids: Array,
        rotary: tuple[Array, Array],
        place: InPlace | None = None,
    ) -> tuple[Array, RouterOutput, Stacks | None]:
        """Runs the layer; `attention_ids` say who may see whom, `segment_ids` 0 marks padding; `place`: see `MoE`."""
        x = keep(x + constrain(self.attention(self.attention_norm(x), attention_ids, rotary), self.mesh, RESIDUAL))
        y, router, carried = self.moe(self.moe_norm(x), segment_ids > 0, place)
        return constrain(x + y, self.mesh, RESIDUAL), router, carried


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
        memory: Stacks | None = None,
    ) -> tuple[Float[Array, "batch seq d_model"], RouterOutput]:
        """Runs the decoder up to the final norm; columns are in the order of `zigzag` where the mesh splits sequences.

        Args:
            tokens: token ids.
            segment_ids: document of each position, 1 and up; 0 is padding.
            positions: place of each token in its document, for the rotary embedding.
            memory: arrays like the experts', over which their gradients are written where `in_place` holds.

        Returns:
            Final activations, and what every layer's router decided, stacked over layers.
        """
        config, runtime = self.config, self.runtime
        x = embed(self.embedding[...], tokens, runtime)
        rotary = rotary_tables(positions, config.head_dim, config.rope_theta)
        attention_ids = (segment_ids > 0).astype(segment_ids.dtype) if config.attend_across_documents else segment_ids
        split: Any = nnx.split(self.layers, ExpertWeight, ...)
        graph, experts, others = split
        carried, whole = None, None
        if runtime.in_place:  # read the experts where they lie in the stack, see `in_place_ffn`
            moe = self.layers.moe
            carried = (moe.w_gate[...], moe.w_up[...], moe.w_down[...])
            whole, experts = jax.lax.stop_gradient(experts), None

        def body(carry: tuple[Array, Any], inputs: Any) -> tuple[tuple[Array, Any], RouterOutput]:
            x, carried = carry
            number, experts, others = inputs
            layer = nnx.merge(graph, experts if carried is None else whole, others)
            place = None if carried is None else (carried, number)
            x, router, carried = layer(x, segment_ids, attention_ids, rotary, place)
            return (x, carried), router

        # XLA for CPU writes every array that is kept into a stack over layers, even one array three times.
        if runtime.remat != "none" or carried is not None:
            body = jax.checkpoint(body, policy=REMAT_POLICIES[runtime.remat], prevent_cse=False)
        numbers = jnp.arange(config.num_layers, dtype=jnp.int32)
        (x, carried), router = jax.lax.scan(body, (x, carried), (numbers, experts, others))
        if carried is not None and memory is not None:
            x = collect(x, carried, memory)
        return self.final_norm(x), router

    def head(self) -> Float[Array, "d_model vocab"]:
        """Returns the output matrix in the compute type."""
        return self.lm_head[...].astype(self.runtime.precision.compute)

    def logits(self, x: Float[Array, "batch seq d_model"]) -> Float[Array, "batch seq vocab"]:
        """Computes all logits of final activations in float32; for short sequences (losses go by chunks)."""
        return jnp.einsum("bsd,dv->bsv", x, self.head(), preferred_element_type=FULL)


class Architecture:
    """A model without its arrays: shapes, logical axes, and the way from plain arrays to a callable `Mixtral`.

    The arrays live in a plain nested dict {"params": ..., "selection_bias": ...}, which is what is trained, saved,
    sharded, imported and exported.
    """

    def __init__(self, config: ModelConfig, runtime: Runtime):
        self.config = config
        self.runtime = runtime
        abstract = nnx.eval_shape(lambda: Mixtral(config, runtime, rngs=nnx.Rngs(0)))
        split: Any = nnx.split(abstract, nnx.Param, SelectionBias)
        self._graph, self._params, self._bias = split

    def init(self, seed: int) -> dict[str, Any]:
        """Creates the arrays from a seed, each device only its own part; the same numbers on every mesh."""

        def create(key: Array) -> dict[str, Any]:
            model = Mixtral(self.config, self.runtime, rngs=nnx.Rngs(params=key))
            params, bias = nnx.state(model, nnx.Param), nnx.state(model, SelectionBias)
            return {"params": nnx.to_pure_dict(params), "selection_bias": nnx.to_pure_dict(bias)}

        return jax.jit(create, out_shardings=self.shardings())(jax.random.key(seed))

    def abstract(self) -> dict[str, Any]:
        """Returns the tree of shapes, types and shardings."""
        shapes = {"params": nnx.to_pure_dict(self._params), "selection_bias": nnx.to_pure_dict(self._bias)}
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, self.shardings())

    def axes(self) -> dict[str, Any]:
        """Returns the tree of logical axes."""

        def named(path: Any, variable: nnx.Variable) -> Axes:
            own: Axes = variable.get_metadata("axes")
            return ("layers", *own) if getattr(path[0], "key", None) == "layers" else own

        is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
        trees = [
            jax.tree_util.tree_map_with_path(named, state, is_leaf=is_variable) for state in (self._params, self._bias)
        ]
        return {"params": nnx.to_pure_dict(trees[0]), "selection_bias": nnx.to_pure_dict(trees[1])}

    def shardings(self) -> dict[str, Any]:
        """Returns the tree of shardings on the runtime's mesh."""
        mesh = self.runtime.mesh
        return jax.tree.map(
            lambda axes: named_sharding(mesh, axes), self.axes(), is_leaf=lambda x: isinstance(x, tuple)
        )

    def expert_stacks(self, params: dict[str, Any]) -> Any:
        """Picks what `in_place` carries out of a tree like the parameters; None where it does not hold."""
        moe = params["layers"]["moe"]
        return (moe["w_gate"], moe["w_up"], moe["w_down"]) if self.runtime.in_place else None

    def bind(self, arrays: dict[str, Any]) -> Mixtral:
        """Puts arrays into a model that can be called."""
        states = [
            jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(arrays[name]))
            for state, name in ((self._params, "params"), (self._bias, "selection_bias"))
        ]
        return nnx.merge(self._graph, *states)
