"""Mixtral-style sparse mixture-of-experts language models in JAX: pretrain, continue, evaluate."""

__version__ = "0.1.0"
