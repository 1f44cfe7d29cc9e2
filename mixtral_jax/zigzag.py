"""The order of a batch's columns when the mesh axis `context` splits sequences: every device does the same causal work.

A sequence is cut into 2n chunks for n devices; device i holds chunk i and chunk 2n - 1 - i, so that the few keys before
one of them and the many before the other add up to the same for all. What a model computes is position by position
outside of attention, so a batch takes this order once, on its way to the devices (`data.batch.put_batch`).
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped


def column_order(seq_len: int, devices: int) -> Int[np.ndarray, " seq"]:
    """Returns the position that each column holds; with one device, all in order.

    Args:
        seq_len: a multiple of 2 * devices, unless devices is 1.
        devices: devices that share a sequence.
    """
    if devices == 1:
        return np.arange(seq_len)
    chunks = np.arange(seq_len).reshape(2 * devices, -1)
    return np.stack([chunks[:devices], chunks[::-1][:devices]], axis=1).reshape(-1)


def chunk_starts(seq_len: int, devices: int, me: Int[Array, ""] | int) -> Int[Array, " chunks"]:
    """Returns the first positions of the runs of positions that device `me` holds, ascending."""
    if devices == 1:
        return jnp.zeros(1, jnp.int32)
    return jnp.stack([jnp.asarray(me), 2 * devices - 1 - me]).astype(jnp.int32) * (seq_len // (2 * devices))


def in_order(x: Shaped[Array, "batch seq *rest"], devices: int) -> Shaped[Array, "batch seq *rest"]:
    """Puts whole sequences from the order of the columns into that of the positions."""
    if devices == 1:
        return x
    chunks = x.reshape(x.shape[0], devices, 2, -1, *x.shape[2:])
    # Halves and a reversal, not indices, whose gradient would be a scatter.
    return jnp.concatenate([chunks[:, :, 0], jnp.flip(chunks[:, :, 1], axis=1)], axis=1).reshape(x.shape)


def sequence_multiple(devices: int) -> int:
    """Returns what the length of a sequence is a multiple of."""
    return 2 * devices if devices > 1 else 1
