"""Mixtral-style sparse mixture-of-experts language models in JAX: pretrain, continue, evaluate."""
