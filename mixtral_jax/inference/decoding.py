"""Continues many texts at once with a cache of keys and values: every token runs through the model once.

The slot of a token in the cache is its position. A query sees the slots up to its own, and each of those was written by
the text's own tokens before the query came: what a shorter text leaves in later slots is never seen.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from mixtral_jax.config import UserError
from mixtral_jax.inference.sampling import Sampling, SamplingArrays, choose_tokens, stack
from mixtral_jax.kernels.expert_ffn import SharedExperts
from mixtral_jax.kernels.stored import matrices, multiply_stored
from mixtral_jax.model.attention import Attention
from mixtral_jax.model.layers import embed, rotary_tables, rotate
from mixtral_jax.model.mixtral import Architecture, Arrays, Mixtral
from mixtral_jax.precision import FULL
from mixtral_jax.sharding import axis_size, constrain, named_sharding

CHUNK = 64  # tokens of a prompt that run at once
SHORT = 16  # of prompts that are all as short as this
STEPS = 16  # tokens that are drawn before the host looks at them
MASKED = -1e30
SLOTS = (None, "batch", "kv_heads", None, None)
LAYER_SLOTS = SLOTS[1:]
LAST = ("batch", None, None)
SEEN = ("batch", None)


class Cache(NamedTuple):
    """Keys and values of every layer; slots are positions."""

    keys: Float[Array, "layers batch kv_heads slots head_dim"]
    values: Float[Array, "layers batch kv_heads slots head_dim"]

    @classmethod
    def empty(cls, architecture: Architecture, rows: int, slots: int) -> "Cache":
        """Makes room for so many texts of so many tokens."""
        config, compute = architecture.config, architecture.runtime.precision.compute
        shape = (config.num_layers, rows, config.num_kv_heads, slots, config.head_dim)
        return cls(jnp.zeros(shape, compute), jnp.zeros(shape, compute))


class Drawn(NamedTuple):
    """What was drawn after one prompt since the last look."""

    tokens: list[int]
    log_probs: list[float]  # of each under the model, in nats


State = tuple[Cache, Array, Array]  # cache, final activation of each text's last token, tokens that each has


class Step(NamedTuple):
    """One token of every text."""

    tokens: Int[Array, " batch"]
    log_probs: Float[Array, " batch"]  # of each under the model, in nats
    logits: Float[Array, "batch vocab"]  # that it was drawn from
    experts: Int[Array, "layers batch k"]  # that worked on it, best first


Generate = Callable[..., Iterator[list[Drawn]]]


def extend(
    model: Mixtral,
    cache: Cache,
    tokens: Int[Array, "batch seq"],
    start: Int[Array, " batch"],
    count: Int[Array, " batch"],
) -> tuple[Cache, Float[Array, "batch seq d_model"], Int[Array, "layers batch seq k"]]:
    """Runs the next tokens of each text.

    Args:
        model: the decoder.
        cache: of all tokens before these.
        tokens: the next ones of each text, then padding.
        start: position of the first of them.
        count: how many of them there are.

    Returns:
        The cache with them, final activations, and the experts that each token chose.
    """
    assert not model.adapters, "to write text, adapters are merged first"
    config, runtime = model.config, model.runtime
    offsets = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    positions = start[:, None] + offsets
    valid = offsets < count[:, None]
    rotary = rotary_tables(positions, config)
    visible = jnp.arange(cache.keys.shape[3]) <= positions[..., None]
    graph, stacked = nnx.split(model.layers)
    stack_of, project = model.expert_stacks(tokens.size), _projections(model)

    def body(carry: tuple[Array, Cache], inputs: tuple[Any, Array]) -> tuple[tuple[Array, Cache], Array]:
        (x, cache), (state, number) = carry, inputs
        layer = nnx.merge(graph, state)
        q, k, v = project(layer.attention_norm(x), ("wq", "wk", "wv"), layer.attention, number)
        new = Cache(rotate(k, *rotary), v)
        cache = Cache(*(_write(old, entries, number, start) for old, entries in zip(cache, new, strict=True)))
        keys, values = (constrain(all_[number], runtime.mesh, LAYER_SLOTS) for all_ in cache)
        out = attend(rotate(q, *rotary), keys, values, visible, runtime.platform)
        x = x + project(out, ("wo",), layer.attention, number)[0]
        y, router, _ = layer.moe(layer.moe_norm(x), valid, SharedExperts(stack_of(number)))
        return (x + y, cache), router.expert_indices

    x, numbers = embed(model.embedding[...], tokens, runtime), jnp.arange(config.num_layers, dtype=jnp.int32)
    (x, cache), experts = jax.lax.scan(body, (x, cache), (stacked, numbers))
    return cache, model.final_norm(x), experts


def _projections(model: Mixtral) -> Callable[[Array, Sequence[str], Attention, Array], list[Array]]:
    """Makes a function that multiplies with some of a layer's attention matrices."""
    runtime = model.runtime

    def sliced(x: Array, names: Sequence[str], layer: Attention, number: Array) -> list[Array]:
        weights = [getattr(layer, name)[...].astype(runtime.precision.compute) for name in names]
        return [jnp.tensordot(x, w, x.ndim - 2) for w in weights]

    def stored(x: Array, names: Sequence[str], layer: Attention, number: Array) -> list[Array]:
        rows = x.reshape(-1, math.prod(x.shape[2:]))
        held = [getattr(model.layers.attention, name)[...] for name in names]
        products = multiply_stored(rows, number, *(matrices(w, experts=1, inner=rows.shape[1]) for w in held))
        outer = [jax.tree.leaves(w)[0].shape[x.ndim - 1 :] for w in held]
        return [out.reshape(*x.shape[:2], *shape) for out, shape in zip(products, outer, strict=True)]

    return stored if runtime.reads_held else sliced


def _write(cache: Array, new: Array, layer: Array, start: Array) -> Array:
    """Puts entries [batch, seq, ...] into one layer's slots from `start` on."""
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2, 3),
        inserted_window_dims=(0,),
        scatter_dims_to_operand_dims=(0, 3),
        operand_batching_dims=(1,),
        scatter_indices_batching_dims=(0,),
    )
    places = jnp.stack([jnp.full_like(start, layer), start], axis=1)
    mode = jax.lax.GatherScatterMode.CLIP
    return jax.lax.scatter(cache, places, new.swapaxes(1, 2), numbers, unique_indices=True, mode=mode)


def last_of_chunk(
    x: Float[Array, "batch seq d_model"], count: Int[Array, " batch"], last: Float[Array, "batch 1 d_model"]
) -> Float[Array, "batch 1 d_model"]:
    """Takes the activation of the last token of each text; of a text without tokens here the one before."""
    ends = jnp.take_along_axis(x, jnp.maximum(count - 1, 0)[:, None, None], axis=1)
    return jnp.where(count[:, None, None] > 0, ends, last)


def _logits(model: Mixtral, last: Float[Array, "batch d_model"]) -> Float[Array, "batch vocab"]:
    if not model.runtime.reads_held:
        return model.logits(last[:, None])[:, 0]
    head = matrices(model.lm_head[...][None], experts=1, inner=last.shape[1])
    return multiply_stored(last.astype(FULL), 0, head)[0]


def draw_token(
    model: Mixtral,
    state: State,
    lengths: Int[Array, " batch"],
    active: Bool[Array, " batch"],
    sampling: SamplingArrays,
) -> tuple[State, Step]:
    """Draws a token after each text and runs it.

    Args:
        model: the decoder.
        state: of the texts so far.
        lengths: tokens of each.
        active: texts that want one; the others keep what they have, and a slot behind them is scratched.
        sampling: how each is drawn.

    Returns:
        The state with it, and the token.
    """
    cache, last, seen = state
    logits = _logits(model, last[:, 0])
    token, log_prob = choose_tokens(logits, seen, lengths, sampling)
    cache, last, experts = extend(model, cache, token[:, None], lengths, active.astype(jnp.int32))
    seen = constrain(seen.at[jnp.arange(len(lengths)), token].max(active), model.runtime.mesh, SEEN)
    return (cache, last, seen), Step(token, log_prob, logits, experts[:, :, 0])


def attend(
    q: Float[Array, "batch seq heads head_dim"],
    keys: Float[Array, "batch kv_heads slots head_dim"],
    values: Float[Array, "batch kv_heads slots head_dim"],
    visible: Bool[Array, "batch seq slots"],
    platform: str,
) -> Float[Array, "batch seq heads head_dim"]:
    """Attends from some tokens to the visible slots."""
    batch, seq, heads, head_dim = q.shape
    kv_heads = keys.shape[1]
    q = q.reshape(batch, seq, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("bskgh,bkth->bkgst", q, keys, preferred_element_type=FULL) * head_dim**-0.5
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, MASKED), axis=-1)
    if platform == "cpu":  # XLA lacks some products of two-byte types there, and ends in the middle of a run
        values = values.astype(FULL)
    out = jnp.einsum("bkgst,bkth->bskgh", weights.astype(values.dtype), values, preferred_element_type=FULL)
    return out.reshape(batch, seq, heads, head_dim).astype(q.dtype)


def obstacle(architecture: Architecture) -> str | None:
    """Says what keeps a model from generating token by token, and the remedy."""
    if architecture.runtime.mesh.shape["context"] > 1:
        return "text is generated token by token, which mesh.context cannot split: set mesh.context=1"
    if architecture.config.dispatch == "capacity":
        return "model.dispatch=capacity drops tokens by whole sequences: to generate, set it to dropless"
    return None


def make_generator(architecture: Architecture) -> Callable[[Arrays], Generate]:
    """Compiles decoding once a shape and returns a function from a model's arrays to a generator; see `_generate`.

    Raises:
        UserError: see `obstacle`.
    """
    if problem := obstacle(architecture):
        raise UserError(problem)
    mesh = architecture.runtime.mesh
    replicated = NamedSharding(mesh, PartitionSpec())

    @partial(
        jax.jit, static_argnums=(0, 1), out_shardings=tuple(named_sharding(mesh, axes) for axes in (SLOTS, LAST, SEEN))
    )
    def start(rows: int, slots: int, seen: Array) -> tuple[Cache, Array, Array]:
        last = jnp.zeros((rows, 1, architecture.config.d_model), architecture.runtime.precision.compute)
        return Cache.empty(architecture, rows, slots), last, seen

    @partial(jax.jit, donate_argnums=1)
    def prefill(arrays: Any, cache: Cache, last: Array, tokens: Array, start: Array, count: Array) -> Any:
        model = architecture.bind(arrays)
        cache, x, _ = extend(model, cache, tokens, start, count)
        return cache, last_of_chunk(x, count, last)

    @partial(jax.jit, donate_argnums=(1, 3))
    def draw(
        arrays: Any, cache: Cache, last: Array, seen: Array, lengths: Array, sampling: SamplingArrays
    ) -> tuple[Any, ...]:
        model = architecture.bind(arrays)
        active = lengths > 0  # others, which make up the number of rows, reach no expert

        def step(state: State, i: Array) -> tuple[State, tuple[Array, Array]]:
            state, drawn = draw_token(model, state, lengths + i, active, sampling)
            return state, (drawn.tokens, drawn.log_probs)

        carry, drawn = jax.lax.scan(step, (cache, last, seen), jnp.arange(STEPS, dtype=jnp.int32))
        return *carry, *(jax.lax.with_sharding_constraint(x.T, replicated) for x in drawn)

    def with_arrays(arrays: Arrays) -> Generate:
        programs = (start, partial(prefill, arrays), partial(draw, arrays))
        return partial(_generate, axis_size(mesh, "batch"), architecture.config.vocab_size, programs)

    return with_arrays


def _generate(
    multiple: int,
    vocab_size: int,
    programs: tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]],
    prompts: Sequence[Sequence[int]],
    samplings: Sequence[Sampling],
    *,
    rows: int,
    slots: int,
) -> Iterator[list[Drawn]]:
    """Draws tokens after each prompt, some at a time, for as long as there is room and the caller asks for more.

    What a text gets depends on no other text.

    Args:
        multiple: of rows, so that every device gets some.
        vocab_size: of the model.
        programs: start, prefill and draw of `make_generator`.
        prompts: token ids, each at least one.
        samplings: one for each prompt.
        rows: texts that run at once, at least as many as prompts; one program is compiled for each number.
        slots: tokens of the longest text with what is drawn, at least; the same.

    Yields:
        The next tokens of every prompt.
    """
    start, prefill, draw = programs
    rows += -rows % multiple
    idle = rows - len(prompts)
    lengths = np.array([len(prompt) for prompt in prompts] + [0] * idle, np.int32)
    chunk = SHORT if lengths.max() <= SHORT else CHUNK
    slots += -slots % chunk + STEPS  # what is written beyond a text must not be moved back into it
    padded = np.zeros((rows, slots), np.int32)
    seen = np.zeros((rows, vocab_size), bool)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = prompt
        seen[row, list(prompt)] = True
    cache, last, seen = start(rows, slots, seen)
    for place in range(0, int(lengths.max()), chunk):
        count = np.clip(lengths - place, 0, chunk).astype(np.int32)
        tokens = padded[:, place : place + chunk]
        cache, last = prefill(cache, last, tokens, np.full(rows, place, np.int32), count)
    sampling = stack([*samplings, *[Sampling()] * idle])
    while lengths.max() + STEPS <= slots:
        cache, last, seen, tokens, log_probs = draw(cache, last, seen, lengths, sampling)
        lengths = np.where(lengths > 0, lengths + STEPS, 0)
        found = zip(np.asarray(tokens).tolist(), np.asarray(log_probs).tolist(), strict=True)
        yield [Drawn(*pair) for pair, _ in zip(found, prompts, strict=False)]
