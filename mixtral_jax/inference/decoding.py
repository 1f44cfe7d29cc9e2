"""Continues many texts at once with a cache of keys and values: every token runs through the model once.

The slot of a token in the cache is its position. A query sees the slots up to its own, and each of those was written by
the text's own tokens before the query came: what a shorter text leaves in later slots is never seen.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from mixtral_jax.config import UserError
from mixtral_jax.model.attention import KV_HEADS
from mixtral_jax.model.layers import embed, rotary_tables, rotate
from mixtral_jax.model.mixtral import Architecture, Arrays, Mixtral
from mixtral_jax.precision import FULL
from mixtral_jax.sharding import axis_size, constrain, named_sharding

CHUNK = 64  # tokens of a prompt that run at once
STEPS = 16  # tokens that are drawn before the host looks at them
MASKED = -1e30
SLOTS = (None, "batch", None, "kv_heads", None)
LAST = ("batch", None, None)


class Cache(NamedTuple):
    """Keys and values of every layer; slots are positions."""

    keys: Float[Array, "layers batch slots kv_heads head_dim"]
    values: Float[Array, "layers batch slots kv_heads head_dim"]


Generate = Callable[..., list[list[int]]]


def extend(
    model: Mixtral,
    cache: Cache,
    tokens: Int[Array, "batch seq"],
    start: Int[Array, " batch"],
    count: Int[Array, " batch"],
) -> tuple[Cache, Float[Array, "batch seq d_model"]]:
    """Runs the next tokens of each text.

    Args:
        model: the decoder.
        cache: of all tokens before these.
        tokens: the next ones of each text, then padding.
        start: position of the first of them.
        count: how many of them there are.

    Returns:
        The cache with them, and final activations.
    """
    config, runtime = model.config, model.runtime
    compute = runtime.precision.compute
    offsets = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    positions = start[:, None] + offsets
    valid = offsets < count[:, None]
    rotary = rotary_tables(positions, config)
    visible = jnp.arange(cache.keys.shape[2]) <= positions[..., None]
    graph, stacked = nnx.split(model.layers)
    write = jax.vmap(partial(jax.lax.dynamic_update_slice_in_dim, axis=0))

    def body(x: Array, inputs: tuple[Any, Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        state, keys, values = inputs
        layer = nnx.merge(graph, state)
        attention, normed = layer.attention, layer.attention_norm(x)
        project = lambda w: jnp.einsum("bsd,dhk->bshk", normed, w[...].astype(compute))  # noqa: E731
        keys = constrain(write(keys, rotate(project(attention.wk), *rotary), start), runtime.mesh, KV_HEADS)
        values = constrain(write(values, project(attention.wv), start), runtime.mesh, KV_HEADS)
        out = _attend(rotate(project(attention.wq), *rotary), keys, values, visible)
        x = x + jnp.einsum("bshk,hkd->bsd", out, attention.wo[...].astype(compute))
        y, *_ = layer.moe(layer.moe_norm(x), valid)
        return x + y, (keys, values)

    x = embed(model.embedding[...], tokens, runtime)
    x, (keys, values) = jax.lax.scan(body, x, (stacked, cache.keys, cache.values))
    return Cache(keys, values), model.final_norm(x)


def _attend(q: Array, keys: Array, values: Array, visible: Array) -> Array:
    """Attends from [batch, seq, heads, head_dim] to the visible slots."""
    batch, seq, heads, head_dim = q.shape
    kv_heads = keys.shape[2]
    q = q.reshape(batch, seq, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("bskgh,btkh->bkgst", q, keys, preferred_element_type=FULL) * head_dim**-0.5
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, MASKED), axis=-1)
    out = jnp.einsum("bkgst,btkh->bskgh", weights.astype(values.dtype), values, preferred_element_type=FULL)
    return out.reshape(batch, seq, heads, head_dim).astype(q.dtype)


def make_generator(architecture: Architecture) -> Callable[[Arrays], Generate]:
    """Compiles decoding once a shape and returns a function from a model's arrays to a generator; see `_generate`.

    Raises:
        UserError: the mesh splits sequences, or experts drop tokens by whole sequences.
    """
    if architecture.runtime.mesh.shape["context"] > 1:
        raise UserError("text is generated token by token, which mesh.context cannot split: set mesh.context=1")
    if architecture.config.dispatch == "capacity":
        raise UserError("model.dispatch=capacity drops tokens by whole sequences: to generate, set it to dropless")

    mesh = architecture.runtime.mesh
    replicated = NamedSharding(mesh, PartitionSpec())

    @partial(jax.jit, static_argnums=(0, 1), out_shardings=(named_sharding(mesh, SLOTS), named_sharding(mesh, LAST)))
    def start(rows: int, slots: int) -> tuple[Any, Array]:
        config, compute = architecture.config, architecture.runtime.precision.compute
        shape = (config.num_layers, rows, slots, config.num_kv_heads, config.head_dim)
        cache = Cache(jnp.zeros(shape, compute), jnp.zeros(shape, compute))
        return cache, jnp.zeros((rows, 1, config.d_model), compute)

    @partial(jax.jit, donate_argnums=1)
    def prefill(arrays: Any, cache: Cache, last: Array, tokens: Array, start: Array, count: Array) -> Any:
        model = architecture.bind(arrays)
        cache, x = extend(model, cache, tokens, start, count)
        ends = jnp.take_along_axis(x, jnp.maximum(count - 1, 0)[:, None, None], axis=1)
        return cache, jnp.where(count[:, None, None] > 0, ends, last)

    @partial(jax.jit, donate_argnums=1)
    def draw(arrays: Any, cache: Cache, last: Array, lengths: Array, temperature: Array, key: Array) -> Any:
        model = architecture.bind(arrays)

        def step(carry: tuple[Cache, Array], i: Array) -> tuple[tuple[Cache, Array], Array]:
            cache, last = carry
            logits = model.logits(last)[:, 0]
            warm = logits / jnp.maximum(temperature, jnp.finfo(FULL).tiny)
            drawn = jax.random.categorical(jax.random.fold_in(key, lengths[0] + i), warm)
            token = jnp.where(temperature > 0, drawn, jnp.argmax(logits, axis=-1)).astype(jnp.int32)
            return extend(model, cache, token[:, None], lengths + i, jnp.ones_like(lengths)), token

        (cache, last), tokens = jax.lax.scan(step, (cache, last), jnp.arange(STEPS, dtype=jnp.int32))
        return cache, last, jax.lax.with_sharding_constraint(tokens.T, replicated)

    def with_arrays(arrays: Arrays) -> Generate:
        multiple = axis_size(mesh, "batch")
        return partial(_generate, multiple, start, partial(prefill, arrays), partial(draw, arrays))

    return with_arrays


def _generate(
    multiple: int,
    start: Callable[[int, int], Any],
    prefill: Callable[..., Any],
    draw: Callable[..., Any],
    prompts: Sequence[Sequence[int]],
    *,
    rows: int,
    slots: int,
    new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    stopped: Callable[[list[int]], bool] = lambda tokens: False,
) -> list[list[int]]:
    """Draws tokens after each prompt.

    Args:
        multiple: of rows, so that every device gets some.
        start, prefill, draw: see `make_generator`.
        prompts: token ids, each at least one.
        rows: texts that run at once, at least as many as prompts; one program is compiled for each number.
        slots: tokens of the longest text with what is drawn, at least; the same.
        new_tokens: how many to draw at most.
        temperature: divides the logits; 0 takes the likeliest token.
        seed: of the draws.
        stopped: told of the tokens drawn after one prompt so far; whether no more are needed.

    Returns:
        The drawn ids of each prompt: at most `new_tokens`, a few more than `stopped` asked for.
    """
    rows += -rows % multiple
    lengths = np.array([len(prompt) for prompt in prompts] + [1] * (rows - len(prompts)), np.int32)
    slots += -slots % CHUNK + STEPS  # what is written beyond a text must not be moved back into it
    cache, last = start(rows, slots)
    padded = np.zeros((rows, slots), np.int32)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = prompt
    for place in range(0, int(lengths.max()), CHUNK):
        count = np.clip(lengths - place, 0, CHUNK).astype(np.int32)
        chunk = padded[:, place : place + CHUNK]
        cache, last = prefill(cache, last, chunk, np.full(rows, place, np.int32), count)
    drawn: list[list[int]] = [[] for _ in prompts]
    for _ in range(0, new_tokens, STEPS):
        cache, last, tokens = draw(cache, last, lengths, jnp.asarray(temperature, FULL), jax.random.key(seed))
        lengths = lengths + STEPS
        for mine, more in zip(drawn, np.asarray(tokens).tolist(), strict=False):
            mine += more
        if all(stopped(mine) for mine in drawn):
            break
    return [mine[:new_tokens] for mine in drawn]
