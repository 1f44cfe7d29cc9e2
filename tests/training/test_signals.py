"""Signals ask for the end of a run, and a second Ctrl-C does not wait for it."""

import signal

import pytest

from mixtral_jax.training.signals import StopRequest

pytestmark = pytest.mark.drills


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_and_the_second_ctrl_c_interrupts(first):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert not stop.reached(1)
        signal.raise_signal(first)
        assert stop.reached(2)
        signal.raise_signal(signal.SIGTERM)  # whoever sends it again has been heard
        assert stop.reached(3)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
