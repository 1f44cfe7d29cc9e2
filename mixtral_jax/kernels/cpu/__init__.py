"""The engine for CPUs: functions of this process, compiled by Numba, that XLA calls."""
