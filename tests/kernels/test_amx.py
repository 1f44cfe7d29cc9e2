"""Products on the matrix units: every edge of their blocks, how exact they are, and the same bits with any threads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.kernels.backends import available
from tests.tiny import host_threads

pytestmark = pytest.mark.skipif(not available("amx"), reason="the processor has no AMX")
amx = pytest.importorskip("mixtral_jax.kernels.cpu.amx_matmul", reason="Numba is not there, as on every ARM")
matmul = pytest.importorskip("mixtral_jax.kernels.cpu.matmul")
thread_pool = pytest.importorskip("mixtral_jax.kernels.cpu.thread_pool")
SHAPES = [(1, 1, 1), (16, 16, 32), (17, 33, 31), (31, 48, 33), (100, 70, 45), (530, 1040, 1030)]


def factors(rows, columns, inner, turn_a, turn_b):
    """Two factors as they lie in memory, the transposed ones turned, and what is there before."""
    rng = np.random.default_rng(0)
    shapes = ((inner, rows) if turn_a else (rows, inner), (columns, inner) if turn_b else (inner, columns))
    return [rng.standard_normal(shape).astype(np.float32) for shape in (*shapes, (rows, columns))]


def run(a, b, out, turn_a, turn_b, add, stream=False):
    """Computes in the memory of `out`, in this thread."""
    inner = a.shape[0] if turn_a else a.shape[1]
    arrays = (a, b, out)
    table = [*(x.ctypes.data for x in arrays), *(x.strides[0] // 4 for x in arrays), *out.shape, inner]
    workspace, counter = np.zeros(thread_pool.WORKSPACE + 64, np.uint8), np.zeros(1, np.int64)
    place = workspace.ctypes.data + -workspace.ctypes.data % 64
    amx.multiply_blocks(np.array([table]), turn_a, turn_b, add, stream, amx.LEAST, counter.ctypes.data, place)


def multiply(a, b, out, turn_a, turn_b, add):
    out = out.copy()
    run(a, b, out, turn_a, turn_b, add)
    return out


def exactly(a, b, before, turn_a, turn_b, add):
    a, b, before = (x.astype(np.float64) for x in (a, b, before))
    return (a.T if turn_a else a) @ (b.T if turn_b else b) + (before if add else 0)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("turns", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_of_every_size_and_way(shape, turns, add):
    """The error of every element, against the root of its number of terms."""
    arrays = factors(*shape, *turns)
    error = multiply(*arrays, *turns, add) - exactly(*arrays, *turns, add)
    assert np.max(np.abs(error)) < 4e-5 * shape[2] ** 0.5


@pytest.mark.parametrize("columns", [32, 40, 64, 100])
@pytest.mark.parametrize("rows", [16, 32, 100])
@pytest.mark.parametrize("inner", [1, 40, 600])
def test_results_past_the_caches_are_the_same(rows, columns, inner):
    """Lines that begin where memory's do, and others; sums in one part and in some."""
    a, b, _ = factors(rows, columns, inner, True, False)
    memory = np.full(2 * rows * 128 + 16, np.nan, np.float32)
    begin = -memory.ctypes.data % 64 // 4
    for shift in (0, 1):
        found = memory[begin + shift :][: rows * 128].reshape(rows, 128)[:, :columns]
        run(a, b, found, True, False, False, stream=True)
        np.testing.assert_array_equal(found, multiply(a, b, np.empty((rows, columns), np.float32), True, False, False))


@pytest.mark.parametrize("turns", [(False, False), (False, True), (True, False)])
def test_the_error_is_a_few_millionths_of_the_factors_norms(turns):
    """Without any of the three products it would be a thousandth."""
    arrays = factors(512, 512, 512, *turns)
    error = multiply(*arrays, *turns, False) - exactly(*arrays, *turns, False)
    assert 1e-6 < np.sqrt(np.mean(error**2) / 512) < 6e-6


@pytest.mark.parametrize("threads", [1, 2, 3, 50])
def test_the_same_bits_with_any_number_of_threads(threads):
    """Of 50 some come when nothing is left to do, or the call is long over."""
    a, b, out = factors(700, 600, 550, False, True)
    expected = multiply(a, b, out, False, True, False)
    with host_threads(threads):
        for _ in range(10):
            np.testing.assert_array_equal(matmul.multiply(jnp.asarray(a), jnp.asarray(b), "amx", "nt"), expected)


def test_a_call_ends_when_all_of_its_work_is_done():
    """The other thread has the larger product, and what follows reads the result at once."""
    rng = np.random.default_rng(0)
    rows, stack = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((1300, 512), (1, 2, 512, 512)))
    sizes, layer = jnp.array([300, 1000], jnp.int32), jnp.zeros((), jnp.int32)

    @jax.jit
    def work(rows):
        return jax.lax.scan(
            lambda x, _: (matmul.grouped(x, sizes, layer, [stack], "amx")[0] / 30, None), rows, length=20
        )[0]

    with host_threads(1):
        expected = np.asarray(work(rows))
    for _ in range(5):
        np.testing.assert_array_equal(work(rows), expected)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stays_so(value):
    a, b, out = factors(40, 50, 60, False, False)
    a[3, 7] = value
    finite = np.isfinite(multiply(a, b, out, False, False, False))
    assert not finite[3].any()
    assert np.delete(finite, 3, axis=0).all()


def test_nothing_beyond_the_result_is_written():
    a, b, _ = factors(19, 37, 21, False, False)
    wide = np.zeros((21, 64), np.float32)
    view = wide[1:20, 16:53]
    run(a, b, view, False, False, False)
    assert np.all(view != 0)
    view[:] = 0
    assert not wide.any()
