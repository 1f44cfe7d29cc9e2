"""Timings and memory, one command each: `python -m benchmarks.NAME`."""

from mixtral_jax.cli import choose_platform

choose_platform()
