"""Prefetching: the same batches in the same order, errors where they are asked for, no thread left."""

import threading

import numpy as np
import pytest

from mixtral_jax.data.prefetch import prefetch


def make(step):
    return np.array([step])


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_batches_come_in_order_and_the_thread_ends():
    with prefetch(make, 3, 40) as batches:
        assert [int(batch[0]) for batch in batches] == list(range(3, 40))
        assert list(batches) == []
    assert not threads()


def test_only_a_few_are_made_ahead():
    made = []
    enough = threading.Event()

    def count(step):
        made.append(step)
        if len(made) == 4:
            enough.set()
        return make(step)

    with prefetch(count, 0, 1000) as batches:
        next(iter(batches))
        enough.wait(10)
    assert len(made) == 4  # one taken, two waiting, one in hand


def test_an_error_reaches_the_consumer_after_the_batches_before_it():
    def fail(step):
        if step == 2:
            raise ValueError("step two")
        return make(step)

    seen = []
    with prefetch(fail, 0, 10) as batches, pytest.raises(ValueError, match="step two"):
        seen.extend(int(batch[0]) for batch in batches)
    assert seen == [0, 1]
    assert not threads()


def test_leaving_early_ends_the_thread():
    with prefetch(make, 0, 10**9) as batches:
        assert int(next(iter(batches))[0]) == 0
    assert not threads()
