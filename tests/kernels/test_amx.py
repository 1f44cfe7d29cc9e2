"""Products on the matrix units: every edge of their blocks, how exact they are, and the same bits with any threads."""

import numpy as np
import pytest

from mixtral_jax.kernels.host_products import _table, available

pytestmark = pytest.mark.skipif(not available("amx"), reason="the processor has no AMX")
SHAPES = [(1, 1, 1), (16, 16, 32), (17, 33, 31), (31, 48, 33), (100, 70, 45), (530, 1040, 1030)]


def factors(rows, columns, inner, turn_a, turn_b):
    """Two factors as they lie in memory, the transposed ones turned, and what is there before."""
    rng = np.random.default_rng(0)
    shapes = ((inner, rows) if turn_a else (rows, inner), (columns, inner) if turn_b else (inner, columns))
    return [rng.standard_normal(shape).astype(np.float32) for shape in (*shapes, (rows, columns))]


def run(threads, *table):
    from mixtral_jax.kernels import amx, amx_tiles, amx_units

    amx._multiply_all(amx.Units(threads, amx_tiles.WORKSPACE, amx_units.make_configurations()), *table)


def multiply(a, b, out, turn_a, turn_b, add, threads=2):
    out = out.copy()
    inner = a.shape[0] if turn_a else a.shape[1]
    places = [(np.array([x.ctypes.data]), x.shape[1]) for x in (a, b, out)]
    run(threads, _table(*places, *out.shape, inner), turn_a, turn_b, add)
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


@pytest.mark.parametrize("turns", [(False, False), (False, True), (True, False)])
def test_the_error_is_a_few_millionths_of_the_factors_norms(turns):
    """Without any of the three products it would be a thousandth."""
    arrays = factors(512, 512, 512, *turns)
    error = multiply(*arrays, *turns, False) - exactly(*arrays, *turns, False)
    assert 1e-6 < np.sqrt(np.mean(error**2) / 512) < 6e-6


@pytest.mark.parametrize("threads", [1, 3])
def test_the_same_bits_with_any_number_of_threads(threads):
    arrays = factors(700, 600, 550, False, True)
    np.testing.assert_array_equal(
        multiply(*arrays, False, True, True, threads), multiply(*arrays, False, True, True, 2)
    )


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
    places = [(np.array([x.ctypes.data]), x.strides[0] // 4) for x in (a, b, view)]
    run(2, _table(*places, 19, 37, 21), False, False, False)
    assert np.all(view != 0)
    view[:] = 0
    assert not wide.any()
