"""A dense model becomes a mixture that computes the same."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.model.mixtral import Architecture
from mixtral_jax.weights.released import Upcycling, open_released
from tests.weights.models import import_arrays, runtime, small
from tests.weights.synthetic import classic, write

SHARDED = {"fsdp": 2, "expert": 2, "tensor": 2}


@pytest.fixture
def source(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    name, config = getattr(request, "param", "hf-dense"), small()
    rng = np.random.default_rng(0)
    tensors = {
        key: (rng.standard_normal(value.shape) * 0.3).astype(np.float32)
        for key, value in classic(config, "float32").items()
    }
    return write(tmp_path / "dense", name, tensors, config, "float32")


def upcycle(source: Path, upcycling: Upcycling, mesh: dict[str, int]) -> tuple[Architecture, dict[str, Any]]:
    released = open_released(source, upcycling)
    here = runtime(released.config, **mesh)
    return Architecture(released.config, here), import_arrays(released, here, upcycling)


def outputs(architecture: Architecture, arrays: dict[str, Any]) -> np.ndarray:
    tokens = jnp.arange(8 * 16).reshape(8, 16) % architecture.config.vocab_size
    positions = jnp.broadcast_to(jnp.arange(16), (8, 16))

    def forward(arrays: dict[str, Any]) -> jax.Array:
        model = architecture.bind(arrays)
        return model.logits(model(tokens, jnp.ones_like(tokens), positions)[0])

    return np.asarray(jax.jit(forward)(arrays))


@pytest.mark.parametrize("source", ["hf-dense", "mistral-dense"], indirect=True)
def test_the_mixture_computes_what_one_expert_does(source: Path) -> None:
    dense = outputs(*upcycle(source, Upcycling(1, 1), {}))
    architecture, arrays = upcycle(source, Upcycling(8, 2, seed=3), SHARDED)
    assert architecture.config == small(num_experts=8, num_experts_per_tok=2)
    moe = arrays["params"]["layers"]["moe"]
    for name in ("w_gate", "w_up", "w_down"):
        np.testing.assert_array_equal(moe[name], np.broadcast_to(moe[name][:, :1], moe[name].shape))
    assert 0.01 < np.std(moe["router"]) < 0.03
    np.testing.assert_allclose(outputs(architecture, arrays), dense, atol=2e-5)


def test_noise_is_a_share_of_the_spread_and_the_same_on_every_mesh(source: Path) -> None:
    plain = upcycle(source, Upcycling(4), {})[1]["params"]
    one = upcycle(source, Upcycling(4, noise=0.1, seed=5), {})[1]["params"]
    many = upcycle(source, Upcycling(4, noise=0.1, seed=5), SHARDED)[1]["params"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), one, many)
    for name in ("w_gate", "w_up", "w_down"):
        before, after = (np.asarray(tree["layers"]["moe"][name]) for tree in (plain, one))
        noise = after - before
        np.testing.assert_allclose(noise.std((2, 3)), 0.1 * before.std((2, 3)), rtol=0.1)
        flat = noise.reshape(8, -1)
        assert np.abs(np.corrcoef(flat) - np.eye(8)).max() < 0.15  # every expert of every layer has its own
        del one["layers"]["moe"][name], plain["layers"]["moe"][name]
    one["layers"]["moe"].pop("router"), plain["layers"]["moe"].pop("router")
    jax.tree.map(np.testing.assert_array_equal, one, plain)


def test_seeds(source: Path) -> None:
    routers = [
        upcycle(source, Upcycling(4, seed=seed), {})[1]["params"]["layers"]["moe"]["router"] for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(routers[0], routers[1])
    assert not np.array_equal(routers[0], routers[2])
