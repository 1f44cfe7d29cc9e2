"""One sampled continuation, by running the whole window again for every token: simple, for short texts."""

import jax
import jax.numpy as jnp
import numpy as np

from mixtral_jax.model.mixtral import Architecture, Arrays
from mixtral_jax.sharding import axis_size
from mixtral_jax.zigzag import column_order, sequence_multiple


def sample(
    architecture: Architecture,
    arrays: Arrays,
    prompt: list[int],
    *,
    new_tokens: int,
    temperature: float,
    seed: int,
    stop: int,
) -> list[int]:
    """Draws tokens after a prompt.

    Args:
        architecture: the model's shapes.
        arrays: its parameters and selection bias.
        prompt: token ids, at least one.
        new_tokens: how many to draw at most.
        temperature: divides the logits; must be above 0.
        seed: of the draws.
        stop: token id that ends the text.

    Returns:
        The drawn ids, without the prompt and the stop.
    """
    mesh = architecture.runtime.mesh
    rows, length = axis_size(mesh, "batch"), len(prompt) + new_tokens
    devices = mesh.shape["context"]
    length += -length % sequence_multiple(devices)
    position_of = column_order(length, devices)  # the model's columns are in this order

    def draw(arrays: Arrays, tokens: jax.Array, key: jax.Array) -> jax.Array:
        model = architecture.bind(arrays)
        index = jnp.asarray(position_of, jnp.int32)
        column_of = jnp.argsort(index)

        def next_token(i: jax.Array, tokens: jax.Array) -> jax.Array:
            row = jnp.broadcast_to(tokens[index], (rows, length))  # every device computes the same row
            positions = jnp.broadcast_to(index, row.shape)
            # Tokens not yet drawn are padding, so that they take no expert's room.
            x, _ = model(row, (positions < i).astype(jnp.int32), positions)
            last = jax.lax.dynamic_slice_in_dim(x, column_of[i - 1], 1, axis=1)
            logits = model.logits(last)[0, 0] / temperature
            return tokens.at[i].set(jax.random.categorical(jax.random.fold_in(key, i), logits))

        return jax.lax.fori_loop(len(prompt), len(prompt) + new_tokens, next_token, tokens)

    padded = np.zeros(length, np.int32)
    padded[: len(prompt)] = prompt
    tokens = np.asarray(jax.jit(draw)(arrays, padded, jax.random.key(seed)))
    drawn = tokens[len(prompt) : len(prompt) + new_tokens].tolist()
    return drawn[: drawn.index(stop)] if stop in drawn else drawn
