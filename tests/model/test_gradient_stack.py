"""Gradients of experts that a backend writes into a stack of all layers: the same as those of layers alone."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from mixtral_jax.kernels import expert_ffn as experts
from mixtral_jax.kernels.expert_ffn import ExpertOptions, ExpertWeights
from mixtral_jax.model.mixtral import Architecture
from mixtral_jax.runtime import Runtime, make_runtime
from mixtral_jax.training.step import Trainable
from tests.tiny import mesh_of, tiny_batch, tiny_config


@jax.custom_vjp
def in_place(rows, sizes, weights):
    """A backend in plain JAX: reads the stack, and writes a layer's gradients over what the gradient stack holds."""
    return by_expert(rows, sizes, *layer_of(weights.stack)), weights.gradient_stack


def layer_of(stack):
    return [w[stack.layer] for w in stack[:3]]


def by_expert(rows, sizes, gate, up, down):
    return experts.expert_ffn(rows, sizes, ExpertWeights(gate, up, down), ExpertOptions("ragged_dot"))


def in_place_fwd(rows, sizes, weights):
    return in_place(rows, sizes, weights), (rows, sizes, weights.stack)


def in_place_bwd(residuals, cotangents):
    (rows, sizes, stack), (d_out, d_stack) = residuals, cotangents
    _, pull = jax.vjp(lambda rows, *w: by_expert(rows, sizes, *w), rows, *layer_of(stack))
    d_rows, *d_weights = pull(d_out)
    new = tuple(old.at[stack.layer].set(d) for old, d in zip(d_stack, d_weights, strict=True))
    return d_rows, None, ExpertWeights(None, None, None, gradient_stack=new)


in_place.defvjp(in_place_fwd, in_place_bwd)


def backend():
    return SimpleNamespace(hopper_ffn=lambda rows, sizes, weights, row_multiple: in_place(rows, sizes, weights))


def trained(config, runtime):
    trainable = Trainable(Architecture(config.model, runtime), config)
    state = trainable.start(trainable.architecture.init(0))
    return jax.jit(trainable._gradients)(state.arrays, trainable.put(tiny_batch(config)))


def test_the_gradients_are_those_of_layers_alone(monkeypatch):
    config = tiny_config("train.microbatches=2", "model.num_layers=3", "train.batch_size=4")
    plain = make_runtime(config, mesh_of())
    wanted = trained(config, plain)

    load = experts.load
    monkeypatch.setattr(experts, "load", lambda *names: backend() if names[1] == "hopper" else load(*names))
    # Memory that is written nowhere must be seen: on a GPU it holds anything.
    monkeypatch.setattr(jax.lax, "empty", lambda shape, dtype: jnp.full(shape, jnp.nan, dtype))
    monkeypatch.setattr(Runtime, "writes_stack", True)
    monkeypatch.setattr(Runtime, "unrolled", True)
    found = trained(config, dataclasses.replace(plain, experts="hopper"))

    for (path, grad), right in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(grad, right, rtol=1e-5, atol=1e-7, err_msg=jax.tree_util.keystr(path))
