"""A stand-in for the collective that XLA lacks on CPU, from its specification in JAX's documentation."""

import jax
import jax.numpy as jnp


def ragged_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """Sees every device's rows and slices, and copies those that are sent here.

    All is NaN where a receiver expects another size than is sent, or a slice leaves its buffer.
    """
    devices, me = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    assert input_offsets.shape == send_sizes.shape == output_offsets.shape == recv_sizes.shape
    each = input_offsets.size // devices
    assert each * devices == input_offsets.size
    rows, offsets, sizes, landing = (
        jax.lax.all_gather(a, axis_name) for a in (operand, input_offsets, send_sizes, output_offsets)
    )
    sound = jnp.array(True)
    for source in range(devices):
        for i in range(each):
            there = me * each + i
            start, size, to = offsets[source, there], sizes[source, there], landing[source, there]
            sound &= (size == recv_sizes[source * each + i]) & (start + size <= operand.shape[0])
            sound &= (to + size <= output.shape[0]) & (start >= 0) & (to >= 0)
            place = jnp.arange(output.shape[0]) - to
            taken = jnp.take(rows[source], jnp.clip(start + place, 0, operand.shape[0] - 1), axis=0)
            output = jnp.where(((place >= 0) & (place < size))[:, None], taken, output)
    return jnp.where(sound, output, jnp.nan)
