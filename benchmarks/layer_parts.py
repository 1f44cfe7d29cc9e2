"""Every part of one layer of Mixtral 8x7B on one device, 16,384 tokens in bfloat16; see `accelerator`."""

import importlib
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from benchmarks.accelerator import Options
from benchmarks.timing import normal, report, time_it, uneven_sizes
from benchmarks.whole_models import wide_config
from mixtral_jax.config import MeshConfig, PrecisionConfig
from mixtral_jax.kernels.attention import attention as attend
from mixtral_jax.kernels.backends import choose
from mixtral_jax.kernels.expert_ffn import ExpertOptions, ExpertWeights, expert_ffn
from mixtral_jax.kernels.grouped_blocks import choose_block_sizes
from mixtral_jax.kernels.permutation import RowMover, combine_rows, dispatch_rows
from mixtral_jax.model.layers import RMSNorm, rotary_tables, rotate
from mixtral_jax.model.routing import choose_experts, dropless_plan
from mixtral_jax.precision import make_precision
from mixtral_jax.runtime import target_of
from mixtral_jax.sharding import make_mesh

BFLOAT16 = jnp.bfloat16
EXPERTS, PER_TOKEN = 8, 2
TILE = 256  # rows; groups that are multiples of it need no padding in any backend
# Backends whose gmm and tgmm can be called alone.
GROUPED = {name: f"mixtral_jax.kernels.gpu.{name}_grouped" for name in ("triton", "hopper")}


def automatic(operation: str, options: Options, *, eight_bit: bool = False) -> str:
    """What `auto` is here for one layer in bfloat16."""
    config = wide_config(options.tiny, f"precision.experts={'fp8' if eight_bit else 'compute'}")
    return choose(operation, "auto", target_of(config, jax.devices()[0], 1, expert=1, tensor=1))


def sizes(tiny: bool) -> tuple[int, int, int, int, int, int]:
    """Rows of the batch, tokens of a row, d_model, d_ff, heads, kv_heads."""
    return (2, 32, 32, 48, 4, 2) if tiny else (4, 4096, 4096, 14336, 32, 8)


def products(options: Options) -> None:
    """Products of the experts, alone and as a whole SwiGLU, each beside the dense product of its shape."""
    batch, seq_len, d, f, *_ = sizes(options.tiny)
    platform = jax.devices()[0].platform
    rows, settings = batch * seq_len * PER_TOKEN, {"interpret": True} if platform == "cpu" else {}
    load, whole = (jnp.asarray(uneven_sizes(rows, EXPERTS, multiple), jnp.int32) for multiple in (1, TILE))
    x, y = normal((rows, d), BFLOAT16, 0), normal((rows, f), BFLOAT16, 1)
    w_gate, w_up, w_down = (
        normal((EXPERTS, *shape), BFLOAT16, seed, shape[0] ** -0.5)
        for seed, shape in ((2, (d, f)), (3, (d, f)), (4, (f, d)))
    )
    flops, product, across = 2 * rows * d * f, jax.jit(jnp.matmul), jax.jit(lambda a, b: a.T @ b)
    up = time_it("dense rows x d_model x d_ff", product, x, w_up[0], flops=flops)
    down = time_it("dense rows x d_ff x d_model", product, y, w_down[0], flops=flops)
    sums = time_it("dense d_model x rows x d_ff", across, x, y, flops=flops)
    backends = options.experts or (automatic("experts", options),)
    for name in [*backends, *["triton"] * options.tiny]:
        if name in GROUPED:
            module = importlib.import_module(GROUPED[name])
            gmm = jax.jit(partial(module.gmm, **settings), static_argnames="transposed")
            result = module.Scaling(BFLOAT16) if name == "hopper" else BFLOAT16
            tgmm = jax.jit(lambda x, y, sizes, run=module.tgmm, result=result: run(x, y, sizes, result, **settings))
            back = partial(gmm, transposed=True)
            time_it(f"{name}, forward up", gmm, [(x, w_up)], whole, flops=flops, dense=up)
            time_it(f"{name}, forward down", gmm, [(y, w_down)], whole, flops=flops, dense=down)
            time_it(f"{name}, rows' gradients of down", back, [(x, w_down)], whole, flops=flops, dense=up)
            time_it(f"{name}, rows' gradients of up", back, [(y, w_up)], whole, flops=flops, dense=down)
            time_it(f"{name}, weights' gradients of up", tgmm, x, y, whole, flops=flops, dense=sums)
            time_it(f"{name}, weights' gradients of down", tgmm, y, x, whole, flops=flops, dense=sums)
    for name in backends:
        swiglu(name, "compute", load, (x, w_gate, w_up, w_down), 3 / (2 / up + 1 / down))


def eight_bit(options: Options) -> None:
    """Products of factors of 8 bits alone, where the platform has some, and the experts' SwiGLU with them."""
    batch, seq_len, d, f, *_ = sizes(options.tiny)
    rows = batch * seq_len * PER_TOKEN
    load = jnp.asarray(uneven_sizes(rows, EXPERTS), jnp.int32)
    x, shapes = normal((rows, d), BFLOAT16, 0), ((d, f), (d, f), (f, d))
    weights = [normal((EXPERTS, *shape), BFLOAT16, n, shape[0] ** -0.5) for n, shape in enumerate(shapes, 1)]
    product = jax.jit(jnp.matmul)
    dense = time_it("dense rows x d_model x d_ff", product, x, weights[0][0], flops=2 * rows * d * f)
    backend = automatic("experts", options, eight_bit=True)
    for factors in ("fp8", "int8"):
        if backend == "hopper":
            eight_bit_products(factors, x, weights[0], 2 * rows * d * f)
        swiglu(backend, factors, load, (x, *weights), dense)


def eight_bit_products(factors: str, x: Array, w: Array, flops: int) -> None:
    """Measures Hopper's products of factors that are rounded already."""
    engine = importlib.import_module("mixtral_jax.kernels.gpu.hopper_ffn")
    (rows, d), f = x.shape, w.shape[2]
    kind = make_precision(PrecisionConfig(experts=factors)).experts
    y, turned = normal((rows, f), BFLOAT16, 5), normal((EXPERTS, f, d), BFLOAT16, 6)
    x, y, w, turned = ((32 * a).astype(kind) for a in (x, y, w, turned))
    sizes, ones = jnp.asarray(uneven_sizes(rows, EXPERTS, TILE), jnp.int32), partial(jnp.ones, dtype=jnp.float32)
    of_rows, columns = ones((rows, 1)), ones((EXPERTS, 1, f))
    # The transposition is that of the call, so the compiler takes it away.
    across = jax.jit(lambda x, w: engine.multiply_8_bits(x, w.swapaxes(1, 2), sizes, (of_rows, columns), BFLOAT16))
    back = jax.jit(lambda y, w: engine.multiply_8_bits(y, w.swapaxes(1, 2), sizes, (of_rows, None), BFLOAT16))
    sums = jax.jit(lambda x, y: engine.outer_products_8_bits(x.T, y.T, sizes, columns[0], None, BFLOAT16))
    time_it(f"hopper {factors}, forward up", across, x, turned, flops=flops)
    time_it(f"hopper {factors}, rows' gradients of up", back, y, w, flops=flops)
    time_it(f"hopper {factors}, weights' gradients of up", sums, x.T + 0, y.T + 0, flops=flops)


def swiglu(name: str, factors: str, load: Array, arrays: tuple[Array, ...], dense: float) -> None:
    """Measures the experts' SwiGLU, forward and with all gradients, in a backend."""
    x, w_gate = arrays[:2]
    options = ExpertOptions(
        name,
        block_sizes=choose_block_sizes(len(x), EXPERTS),
        interpret=jax.devices()[0].platform == "cpu",
        eight_bit=make_precision(PrecisionConfig(experts=factors)).experts,
    )
    layer = lambda x, *w: expert_ffn(x, load, ExpertWeights(*w), options)  # noqa: E731

    @jax.jit
    def gradients(d_out, *a):
        out, pull = jax.vjp(layer, *a)
        return out, pull(d_out)  # without the output its product would not be computed, and counted all the same

    forward = jax.jit(layer)
    title = f"{name if factors == 'compute' else f'{name} {factors}'}, SwiGLU forward"
    flops = 6 * x.size * w_gate.shape[2]
    time_it(title, forward, *arrays, flops=flops, dense=dense)
    time_it(f"{title} and gradients", gradients, x, *arrays, flops=3 * flops, dense=dense)


def attention(options: Options) -> None:
    """Packed attention with one and with four documents a row, beside cuDNN's own causal call."""
    batch, seq_len, d, _, heads, kv_heads = sizes(options.tiny)
    head_dim, platform = d // heads, jax.devices()[0].platform
    q, k, v, d_out = (normal((batch, seq_len, n, head_dim), BFLOAT16, n) for n in (heads, kv_heads, kv_heads, heads))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    useful = 4 * batch * seq_len * (seq_len / 2) * heads * head_dim

    def measure(title, run, flops, *others):
        forward = jax.jit(run)
        gradients = jax.jit(lambda q, k, v, d, *others: jax.vjp(lambda *a: run(*a, *others), q, k, v)[1](d))
        time_it(f"{title}, forward", forward, q, k, v, *others, flops=flops)
        time_it(f"{title}, forward and gradients", gradients, q, k, v, d_out, *others, flops=3 * flops)

    backend = automatic("attention", options)
    for documents in (1, 4):
        ids = jnp.tile(jnp.arange(seq_len) * documents // seq_len + 1, (batch, 1)).astype(jnp.int32)
        # Given when it runs, as in training: of documents that it knew, the compiler would choose the call itself.
        measure(f"{backend}, {documents} a row", partial(attend, mesh=mesh, backend=backend), useful / documents, ids)
    peer = partial(jax.nn.dot_product_attention, is_causal=True)
    if platform == "gpu":
        peer = partial(peer, implementation="cudnn")
    measure("jax.nn causal", peer, useful)


def rest(options: Options) -> None:
    """What is neither attention nor the experts' products: rows moved, elementwise work, projections, routing."""
    batch, seq_len, d, f, heads, kv_heads = sizes(options.tiny)
    tokens, head_dim, interpret = batch * seq_len, d // heads, jax.devices()[0].platform == "cpu"
    rows = tokens * PER_TOKEN
    load = jnp.asarray(uneven_sizes(rows, EXPERTS), jnp.int32)
    wide, x, out = normal((rows, f), BFLOAT16, 0), normal((tokens, d), BFLOAT16, 1), normal((rows, d), BFLOAT16, 2)
    one = 2 * wide.size
    time_it("device copy", jax.jit(jnp.copy), wide, moved=2 * one)
    if "triton" in (options.experts or ("triton",)):  # others have it in their products
        module = importlib.import_module(GROUPED["triton"])
        swiglu = jax.jit(partial(module.swiglu, sizes=load, interpret=interpret))
        time_it("triton, swiglu", swiglu, wide, wide, None, moved=3 * one)
        kept = [wide + 0, wide + 0, wide + 0]
        back = jax.jit(partial(module.swiglu, sizes=load, interpret=interpret), donate_argnums=(0, 1, 2))

        def backward() -> Array:
            kept[2], kept[0], kept[1] = back(*kept)
            return kept[2]

        time_it("triton, swiglu's gradients in place", backward, moved=6 * one)
        kept.clear()
    logits = normal((tokens, EXPERTS), jnp.float32, 3)

    @jax.jit
    def route(logits):
        chosen, shares = choose_experts(logits, jnp.zeros(EXPERTS), PER_TOKEN)
        return dropless_plan(chosen, EXPERTS, rows), shares

    time_it("choice and plan of rows", route, logits)
    plan, shares = route(logits)
    report("rows of the busiest expert", share=float(jnp.max(plan.group_sizes)) / rows)
    # Every token and every row once; gradients of combine read the experts' results, too.
    moved = 2 * (out.size + x.size)
    for name in dict.fromkeys(["xla", automatic("rows", options), *["triton"] * options.tiny]):
        maps = plan.source, plan.row_of, RowMover(name, interpret)
        dispatch = jax.jit(lambda x, maps=maps: dispatch_rows(x, *maps))
        combine = jax.jit(lambda out, shares, maps=maps: combine_rows(out, shares, *maps))
        time_it(f"{name}, dispatch", dispatch, x, moved=moved)
        pull = jax.jit(lambda out, shares, d, combine=combine: jax.vjp(combine, out, shares)[1](d))
        time_it(f"{name}, combine's gradients", pull, out, shares, x, moved=moved + 2 * out.size)
    pull = jax.jit(lambda x, d: jax.vjp(dispatch, x)[1](d))
    time_it("xla, dispatch's gradients", pull, x, out, moved=moved)
    time_it("xla, combine", combine, out, shares, moved=moved)

    norm = RMSNorm(d, 1e-5, make_precision(PrecisionConfig(compute="bfloat16")))
    graph, state = nnx.split(norm)
    normalize = jax.jit(lambda x: nnx.merge(graph, state)(x))
    time_it("norm", normalize, x, moved=4 * x.size)
    pull_norm = jax.jit(lambda x, d: jax.vjp(lambda x: nnx.merge(graph, state)(x), x)[1](d))
    time_it("norm, gradients", pull_norm, x, x, moved=6 * x.size)
    q = x.reshape(batch, seq_len, heads, head_dim)
    positions = jnp.tile(jnp.arange(seq_len), (batch, 1))
    model = wide_config(options.tiny).model
    turn = jax.jit(lambda q: rotate(q, *rotary_tables(positions, model)))
    time_it("rotary embedding of queries", turn, q, moved=4 * x.size)
    w = normal((d, d + 2 * kv_heads * head_dim + d), BFLOAT16, 4, d**-0.5)
    project = jax.jit(lambda x, w: x @ w)
    time_it("projections q, k, v, o as one", project, x, w, flops=2 * tokens * d * w.shape[1])
