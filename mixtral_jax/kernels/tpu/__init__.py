"""Engines for TPUs: kernels that JAX brings along."""
