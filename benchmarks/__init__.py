"""Timings and memory, one command each: `python -m benchmarks.NAME`."""
