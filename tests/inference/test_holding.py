"""Weights held in fewer bits give what float32 gives of the same rounded numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.inference.decoding import make_generator
from mixtral_jax.inference.holding import OTHERS, SUMMED, hold_weights, size_of
from mixtral_jax.inference.sampling import Sampling
from mixtral_jax.kernels.stored import EightBitWeights
from tests.tiny import mesh_of, tiny_architecture, tiny_config

PROMPTS = [[1, 5, 9], [1, *range(3, 60), *range(3, 40)]]
CONFIG = tiny_config(model={"init_std": 0.3})


def is_held(leaf):
    return isinstance(leaf, EightBitWeights)


def draw(architecture, arrays):
    steps = make_generator(architecture)(arrays)(PROMPTS, [Sampling()] * 2, rows=2, slots=128)
    return [(drawn.tokens, drawn.log_probs) for drawn in next(steps)]


@pytest.mark.parametrize(
    ("kind", "mesh"),
    [("bfloat16", {}), ("bfloat16", {"data": 2, "expert": 2, "tensor": 2}),
     ("int8", {}), ("int8", {"fsdp": 2, "expert": 2, "tensor": 2})],
)  # fmt: skip
def test_texts_are_those_of_the_rounded_numbers(kind, mesh):
    held = hold_weights(tiny_architecture(CONFIG, mesh_of(**mesh)).init(1), kind)
    plain = jax.tree.map(lambda leaf: np.asarray(leaf.astype(jnp.float32)), held, is_leaf=is_held)
    one = tiny_architecture(CONFIG)
    for found, expected in zip(draw(tiny_architecture(CONFIG, mesh_of(**mesh)), held), draw(one, plain), strict=True):
        assert found[0] == expected[0]
        np.testing.assert_allclose(found[1], expected[1], atol=1e-5)


@pytest.mark.parametrize(("kind", "bound"), [("bfloat16", 1 / 256), ("int8", 1 / 254)])
def test_matrices_are_rounded_little_and_the_rest_not_at_all(kind, bound):
    arrays = tiny_architecture(CONFIG).init(1)
    before, size = jax.tree.map(np.asarray, arrays), size_of(arrays)
    held = hold_weights(arrays, kind)
    assert size_of(held) < size * (0.52 if kind == "bfloat16" else 0.45)
    names = SUMMED if kind == "int8" else (*SUMMED, *OTHERS)

    def compare(path, old, given, new):
        found, name = np.asarray(new.astype(jnp.float32)), path[-1].key
        assert given.is_deleted() == (name in names) == (np.abs(found - old).max() > 0)
        largest = np.abs(old).max(axis=SUMMED[name] if is_held(new) else (), keepdims=True)
        assert (np.abs(found - old) <= bound * largest * 1.01).all()

    jax.tree_util.tree_map_with_path(compare, before, arrays, held)


def test_a_column_of_zeros_stays_so():
    assert not np.asarray(EightBitWeights.quantize(jnp.zeros((1, 4, 3)), (1,)).astype(jnp.float32)).any()
