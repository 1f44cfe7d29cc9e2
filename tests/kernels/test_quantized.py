"""Expert products of 8-bit factors: the scheme written out in numpy, and how far it may be from exact products."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mixtral_jax.kernels.expert_ffn import ExpertOptions, ExpertWeights, expert_ffn
from mixtral_jax.precision import make_precision
from tests import oracles
from tests.kernels.test_expert_ffn import D_FF, D_MODEL, EXPERTS, GROUPS, ROWS
from tests.tiny import mesh_of, tiny_config, tiny_trainable, train

KINDS = {name: make_precision(tiny_config(f"precision.experts={name}").precision).experts for name in ("int8", "fp8")}
BACKENDS = [("grouped_blocks", (8, 4)), ("grouped_blocks", (64,)), ("megablox", ()),
            ("triton", ())]  # fmt: skip


def rounded(x, kind, axes):
    """To 8 bits and back, with the largest number along the other axes at the type's end."""
    x = np.asarray(x, np.float32)
    largest = np.max(np.abs(x), axis=tuple(set(range(x.ndim)) - set(axes)), keepdims=True)
    scale = largest / np.float32(127 if kind == "int8" else 448)
    scale = np.where(scale == 0, np.float32(1), scale)
    steps = x / scale
    if kind == "int8":
        return np.rint(steps).astype(np.float64) * scale
    return np.clip(steps, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale


class Scheme:
    """One product of rows with their experts' weights and, from the result's gradient, both gradients."""

    def __init__(self, x, w, expert, kind):
        self.x, self.w, self.expert, self.kind = rounded(x, kind, (0,)), rounded(w, kind, (0, 2)), expert, kind
        self.given = x, w
        self.y = np.einsum("rk,rkn->rn", self.x, self.w[expert])

    def scales(self):
        """The scales that a gradient takes over before it is rounded."""
        top = np.float32(127 if self.kind == "int8" else 448)
        largest = [np.max(np.abs(np.asarray(a, np.float32)), axis=1, keepdims=True) for a in self.given]
        return [np.where(a == 0, np.float32(1), a / top) for a in largest]

    def pull(self, d_y):
        x_scale, w_scale = self.scales()
        d_y = np.asarray(d_y, np.float32)
        weights = np.divide(self.w, w_scale)[self.expert]
        d_x = np.einsum("rn,rkn->rk", rounded(d_y * w_scale[self.expert, 0], self.kind, (0,)), weights)
        by_row = np.einsum("rk,rn->rkn", np.divide(self.x, x_scale), rounded(d_y * x_scale, self.kind, (1,)))
        return d_x, np.stack([by_row[self.expert == e].sum(axis=0) for e in range(len(self.w))])


def silu(x):
    return x / (1 + np.exp(-x))


def scheme(rows, gate, up, down, d_out, expert, kind):
    """Output, and gradients of rows and weights."""
    g, u = Scheme(rows, gate, expert, kind), Scheme(rows, up, expert, kind)
    d = Scheme(silu(g.y) * u.y, down, expert, kind)
    d_inner, d_down = d.pull(d_out)
    sigmoid = 1 / (1 + np.exp(-g.y))
    d_rows_g, d_gate = g.pull(d_inner * u.y * sigmoid * (1 + g.y * (1 - sigmoid)))
    d_rows_u, d_up = u.pull(d_inner * silu(g.y))
    return d.y, [d_rows_g + d_rows_u, d_gate, d_up, d_down]


def arrays_of(sizes, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(ROWS, D_MODEL), *[(EXPERTS, D_MODEL, D_FF)] * 2, (EXPERTS, D_FF, D_MODEL), (ROWS, D_MODEL)]
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    used = sum(sizes)
    arrays[0][used:], arrays[-1][used:] = np.nan, np.nan  # padding: must touch nothing
    if used:
        arrays[0][used // 2] = 0  # scales of zeros
        arrays[1][int(np.argmax(sizes)), :, 3] = 0
    return arrays


@functools.cache
def compiled(backend, kind, block_sizes):
    """Output and gradients of (arrays, sizes, gradient of the output)."""

    @jax.jit
    def both(arrays, sizes, d_out):
        def run(rows, *weights):
            weights = ExpertWeights(*weights)
            return expert_ffn(rows, sizes, weights, ExpertOptions(backend, block_sizes, True, KINDS[kind]))

        out, pull = jax.vjp(run, *arrays)
        return out, pull(d_out)

    return both


def run_and_pull(arrays, sizes, backend, kind, block_sizes=()):
    *arrays, d_out = arrays
    out, grads = compiled(backend, kind, block_sizes)(arrays, jnp.asarray(sizes, jnp.int32), d_out)
    return np.asarray(out), [np.asarray(grad) for grad in grads]


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize(("backend", "block_sizes"), BACKENDS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_computes_the_scheme(kind, backend, block_sizes, groups):
    sizes = GROUPS[groups]
    used = sum(sizes)
    arrays = arrays_of(sizes)
    out, grads = run_and_pull(arrays, sizes, backend, kind, block_sizes)
    assert not np.any(out[used:])
    assert not np.any(grads[0][used:])
    if not used:
        assert not any(np.any(grad) for grad in grads)
        return
    expert = np.repeat(np.arange(EXPERTS), sizes)
    expected, expected_grads = scheme(arrays[0][:used], *arrays[1:4], arrays[4][:used], expert, kind)
    assert oracles.error(out[:used], expected) < 1e-5
    for grad, reference in zip([grads[0][:used], *grads[1:]], expected_grads, strict=True):
        assert oracles.error(grad, reference) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_buffers_of_one_size_compute_the_scheme(kind):
    arrays = arrays_of([12] * EXPERTS)
    arrays = [np.pad(np.nan_to_num(a), ((0, 1), (0, 0))) if a.ndim == 2 else a for a in arrays]
    out, grads = run_and_pull(arrays, [5, 12, 0, 9], "equal", kind)
    expected, expected_grads = scheme(*arrays, np.repeat(np.arange(EXPERTS), 12), kind)
    assert oracles.error(out, expected) < 1e-5
    for grad, reference in zip(grads, expected_grads, strict=True):
        assert oracles.error(grad, reference) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_is_as_far_from_exact_products_as_rounding_makes_it(kind):
    """A product's error is a sum over x f + w e + e f, where e and f are the errors of rounding x and w."""
    rng = np.random.default_rng(1)
    rows, inner, outer = 256, 192, 64
    x, w = rng.standard_normal((rows, inner)), rng.standard_normal((1, inner, outer))
    product = Scheme(x, w, np.zeros(rows, int), kind)
    error = product.y - x @ w[0]
    if kind == "int8":
        e, f = (np.max(np.abs(a), axis=1, keepdims=True) / 254 for a in (x, w))
    else:  # three bits after the first, or a step of 2^-9 near zero
        e, f = (np.maximum(np.abs(a) / 16, np.max(np.abs(a), axis=1, keepdims=True) / 448 / 1024) for a in (x, w))
    e, f = np.broadcast_to(e, x.shape), np.broadcast_to(f, w.shape)[0]
    bound = np.abs(x) @ f + e @ np.abs(w[0]) + e @ f
    assert np.all(np.abs(error) <= bound)
    assert np.median(np.abs(product.y)) > np.median(bound) / 3  # so the bound says something
    if kind == "int8":  # errors are spread evenly over a step
        predicted = np.sqrt((x**2 @ f**2 + e**2 @ w[0] ** 2) / 3)
        assert 0.9 < np.sqrt(np.mean((error / predicted) ** 2)) < 1.1


def test_products_are_of_whole_numbers():
    arrays = arrays_of(GROUPS["uneven"])

    def run(*a):
        options = ExpertOptions("grouped_blocks", (8,), eight_bit=KINDS["int8"])
        return expert_ffn(a[0], jnp.asarray(GROUPS["uneven"]), ExpertWeights(*a[1:]), options)

    program = jax.jit(lambda a: jax.vjp(run, *a[:-1])[1](a[-1])).lower(arrays).as_text()
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert len(products) == 8  # two forward: the third one's result is not needed
    assert all("xi8>" in line and "xi32>" in line for line in products), products


@functools.cache
def trained(kind):
    return train(tiny_trainable(tiny_config(f"precision.experts={kind}")), 20)


def test_training_learns_and_keeps_its_parameters_as_they_were():
    last = {}
    for kind in ("compute", "int8", "fp8"):
        state, history = trained(kind)
        last[kind] = np.mean([step["cross_entropy"] for step in history[-4:]])
        assert last[kind] < history[0]["cross_entropy"] - 0.3
        if kind == "compute":
            types = [x.dtype for x in jax.tree.leaves(state)]
        assert [x.dtype for x in jax.tree.leaves(state)] == types
    assert last["int8"] != last["compute"]
    assert last["int8"] == pytest.approx(last["compute"], rel=0.02)
    assert last["fp8"] == pytest.approx(last["compute"], rel=0.02)


def test_devices_round_their_own_parts_to_nearly_the_same():
    mesh = mesh_of(expert=2, tensor=2, fsdp=2)
    _, history = train(tiny_trainable(tiny_config("precision.experts=int8"), mesh), 3)
    alone = [step["loss"] for step in trained("int8")[1][:3]]
    np.testing.assert_allclose([step["loss"] for step in history], alone, rtol=2e-3)
