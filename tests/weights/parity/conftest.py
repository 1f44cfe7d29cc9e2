"""Tests against PyTorch: collected where requirements-parity.txt is installed, and said so where it is not."""

import importlib.util

if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
    collect_ignore_glob = ["test_*.py"]
