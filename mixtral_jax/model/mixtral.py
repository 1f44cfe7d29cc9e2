"""The decoder: embedding, scanned layers, final norm and output matrix."""

import operator
from collections.abc import Callable
from functools import partial
from typing import Any, NotRequired, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from mixtral_jax.config import ModelConfig, ObjectiveConfig
from mixtral_jax.kernels.expert_ffn import ExpertStack, GradientStack, SharedExperts, begin_gradient_stack
from mixtral_jax.kernels.stored import EightBitWeights, StoredExperts, matrices
from mixtral_jax.model import adapters
from mixtral_jax.model.attention import Attention
from mixtral_jax.model.layers import RMSNorm, Rotary, embed, parameter, rotary_tables
from mixtral_jax.model.moe import MoE, RouterOutput, SelectionBias
from mixtral_jax.precision import FULL
from mixtral_jax.remat import REMAT_POLICIES, save_for_backward
from mixtral_jax.runtime import Runtime
from mixtral_jax.sharding import Axes, constrain, named_sharding

RESIDUAL = ("batch", "sequence", None)
EXPERTS = "w_gate", "w_up", "w_down"


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
        shared: SharedExperts,
    ) -> tuple[Float[Array, "batch seq d_model"], RouterOutput, GradientStack | None]:
        """Runs the layer; `attention_ids` say who may see whom, `segment_ids` 0 marks padding; the rest: see `MoE`."""
        attended = self.attention(self.attention_norm(x), attention_ids, rotary)
        x = save_for_backward(x + constrain(attended, self.mesh, RESIDUAL))
        y, router, gradient_stack = self.moe(self.moe_norm(x), segment_ids > 0, shared)
        return constrain(x + y, self.mesh, RESIDUAL), router, gradient_stack


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
        self.adapters: adapters.Adapters = nnx.data({})  # what the layers' matrices are increased by, and how much
        self.adapters_scale = 0.0
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
        stack_of, gradient_stack = self.expert_stacks(), self._gradient_stack()
        if gradient_stack is not None:
            moe: Any = params["moe"]
            for name in EXPERTS:  # their gradients come back by that stack
                moe[name] = moe[name].replace(jax.lax.stop_gradient(moe[name][...]))

        def body(carry: Any, inputs: Any) -> tuple[Any, RouterOutput]:
            x, gradient_stack = carry
            number, params, factors = inputs
            layer = nnx.merge(graph, params)
            for path, pair in factors.items():
                weight = operator.attrgetter(path.replace("/", "."))(layer)
                weight.set_value(adapters.add(weight[...], pair, path, self.adapters_scale))
            shared = SharedExperts(stack_of(number), gradient_stack)
            y, router, gradient_stack = layer(x, segment_ids, attention_ids, rotary, shared)
            return (y, gradient_stack), router

        remat = "named" if self.adapters and runtime.remat != "full" else runtime.remat  # others keep the sums
        if remat != "none":
            body = jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=False)
        numbers = jnp.arange(config.num_layers, dtype=jnp.int32)
        unroll = runtime.unrolled and not self.adapters
        inputs = numbers, params, dict(self.adapters)
        (x, gradient_stack), router = jax.lax.scan(body, (x, gradient_stack), inputs, unroll=unroll)
        x = x if gradient_stack is None else begin_gradient_stack(x, gradient_stack)
        return self.final_norm(x), router

    def _gradient_stack(self) -> GradientStack | None:
        """The experts of all layers, where the layers are to write their gradients there."""
        if not self.runtime.writes_stack or self.adapters:
            return None
        w_gate, w_up, w_down = (w.astype(self.runtime.precision.compute) for w in self._experts())
        return w_gate, w_up, w_down

    def _experts(self) -> list[Any]:
        return [getattr(self.layers.moe, name)[...] for name in EXPERTS]

    def expert_stacks(self, decoding: int = 0) -> Callable[[Int[Array, ""]], Any]:
        """Returns where a layer finds its experts among those of all layers, for a backend that reads them there.

        Args:
            decoding: tokens that run, without gradients; 0: this is no decoding.
        """
        runtime, config, experts = self.runtime, self.config, self._experts()
        assignments = decoding * config.num_experts_per_tok // runtime.mesh.shape["data"]
        if decoding and runtime.chooses_experts(assignments, config.num_experts):
            held: Any = [matrices(w, experts=config.num_experts) for w in experts]
            return partial(StoredExperts, *held)
        if not runtime.reads_stack or self.adapters or isinstance(experts[0], EightBitWeights):
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
    adapters: NotRequired[adapters.Adapters]


def without_adapters(arrays: Arrays) -> Arrays:
    """Leaves out the adapters."""
    return {"params": arrays["params"], "selection_bias": arrays["selection_bias"]}


class Architecture:
    """A model without its arrays: shapes, logical axes, and the way from plain arrays to a callable `Mixtral`."""

    def __init__(self, config: ModelConfig, runtime: Runtime, objective: ObjectiveConfig | None = None):
        """Makes no array.

        Args:
            config: sizes.
            runtime: devices and kernels.
            objective: says which adapters lie on the matrices; None: there are none.
        """
        self.config = config
        self.runtime = runtime
        self.objective = objective or ObjectiveConfig()
        self.adapters_scale = self.objective.lora_alpha / (self.objective.lora_rank or 1)
        abstract = nnx.eval_shape(lambda: Mixtral(config, runtime, rngs=nnx.Rngs(0)))
        split: Any = nnx.split(abstract, nnx.Param, SelectionBias)
        self._graph, self._params, self._bias = split

    def init(self, seed: int) -> Arrays:
        """Creates the arrays from a seed, each device only its own part; the same numbers on every mesh."""

        def create(key: Array) -> Arrays:
            model = Mixtral(self.config, self.runtime, rngs=nnx.Rngs(params=key))
            params, bias = nnx.state(model, nnx.Param), nnx.state(model, SelectionBias)
            return {"params": nnx.to_pure_dict(params), "selection_bias": nnx.to_pure_dict(bias)}

        return jax.jit(create, out_shardings=without_adapters(self.shardings()))(jax.random.key(seed))

    def init_adapters(self, seed: int) -> adapters.Adapters:
        """Creates adapters that change nothing yet; the same numbers on every mesh."""
        draw = np.random.default_rng(seed)
        abstract = self.abstract()["adapters"].items()
        return jax.device_put(
            {path: adapters.initial(draw, pair, path) for path, pair in abstract}, self.shardings()["adapters"]
        )

    def abstract(self) -> Arrays:
        """Returns the tree of shapes, types and shardings."""
        shapes: Any = {"params": nnx.to_pure_dict(self._params), "selection_bias": nnx.to_pure_dict(self._bias)}
        if self.objective.lora_rank:
            layers, rank = shapes["params"]["layers"], self.objective.lora_rank
            factors = adapters.factors(self.objective, layers, lambda x: x.shape, rank)
            is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
            shapes["adapters"] = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x, FULL), factors, is_leaf=is_shape)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, self.shardings())

    def stored(self) -> dict[str, PyTree]:
        """Returns of `abstract` what the checkpoints of a run hold: with adapters, these take the parameters' place."""
        arrays = self.abstract()
        return {"params": arrays.get("adapters", arrays["params"]), "selection_bias": arrays["selection_bias"]}

    def axes(self) -> Arrays:
        """Returns the tree of logical axes."""

        def named(path: Any, variable: nnx.Variable) -> Axes:
            own: Axes = variable.get_metadata("axes")
            return ("layers", *own) if getattr(path[0], "key", None) == "layers" else own

        is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
        trees = [
            jax.tree_util.tree_map_with_path(named, state, is_leaf=is_variable) for state in (self._params, self._bias)
        ]
        axes: Any = {"params": nnx.to_pure_dict(trees[0]), "selection_bias": nnx.to_pure_dict(trees[1])}
        if self.objective.lora_rank:
            axes["adapters"] = adapters.factors(self.objective, axes["params"]["layers"], lambda x: x, None)
        return axes

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
        model: Mixtral = nnx.merge(self._graph, *states)
        model.adapters, model.adapters_scale = nnx.data(arrays.get("adapters", {})), self.adapters_scale
        return model

    def merge(self, arrays: Arrays) -> Arrays:
        """Adds adapters, if there are any, to the parameters, which are taken over; rounds to the type of these."""
        merged = jax.tree.map(lambda x: x, arrays["params"])
        axes = self.axes()["params"]["layers"]

        @partial(jax.jit, static_argnums=3, donate_argnums=0)
        def add(weights: Array, pair: dict[str, Array], layer: Array, path: str) -> Array:
            own, factors = jax.tree.map(lambda x: x[layer], (weights, pair))
            new = weights.at[layer].set(adapters.add(own, factors, path, self.adapters_scale).astype(weights.dtype))
            return constrain(new, self.runtime.mesh, adapters.at(axes, path))

        for path, pair in arrays.get("adapters", {}).items():
            module, name = path.split("/")
            for layer in range(self.config.num_layers):
                merged["layers"][module][name] = add(merged["layers"][module][name], pair, jnp.int32(layer), path)
        return {"params": merged, "selection_bias": arrays["selection_bias"]}
