"""What a layer saves for its backward pass where the policy is to save what has a name."""

import jax
import jax.numpy as jnp
import pytest

from tests.tiny import ENGINES, tiny_architecture, tiny_batch, tiny_config

LAYERS = 3


@pytest.mark.parametrize("d_ff", [32, 48])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_layer_saves_once_what_takes_long_to_compute(engine, d_ff):
    """What the experts compute first only where it is no wider than the model."""
    config = tiny_config(model={"num_layers": LAYERS, "d_ff": d_ff}, kernels={"matmul": engine})
    architecture, batch = tiny_architecture(config), tiny_batch(config)
    arrays = architecture.init(0)

    @jax.jit
    def pullback(params):
        model = architecture.bind({**arrays, "params": params})
        inputs = map(jnp.asarray, (batch.tokens, batch.segment_ids, batch.positions))
        return jax.vjp(lambda model: model(*inputs)[0], model)[1]

    shapes = {x.shape for x in jax.tree.leaves(arrays)}
    kept = [x for x in jax.tree.leaves(jax.eval_shape(pullback, arrays["params"])) if x.shape not in shapes]
    stacks = sorted((x.size // LAYERS, x.dtype.name) for x in kept if x.ndim and x.shape[0] == LAYERS)
    m, tokens = config.model, config.train.batch_size * config.data.seq_len
    chosen = tokens * m.num_experts_per_tok
    floats = [
        *[tokens * m.d_model] * 2,  # before attention and after
        chosen * m.d_model,  # results of the experts
        *[tokens * m.num_heads * m.head_dim] * 2,  # queries, what attention gives
        *[tokens * m.num_kv_heads * m.head_dim] * 2,  # keys, values
        tokens * m.num_heads,  # sums of the softmax
        tokens * m.num_experts,  # logits of the router
        chosen,  # weights of the choices
        *[chosen * d_ff] * (2 if d_ff <= m.d_model else 0),  # gate and up
    ]
    integers = [1, *[chosen] * 3]  # number of the layer, choices, rows of choices, choices of rows
    assert stacks == sorted([*((n, "float32") for n in floats), *((n, "int32") for n in integers)])
