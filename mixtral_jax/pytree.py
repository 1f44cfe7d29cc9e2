"""Dataclasses of arrays that JAX maps over."""

import dataclasses
from typing import Any, TypeVar

import jax
from jax.tree_util import GetAttrKey

T = TypeVar("T")


def pytree(kind: type[T]) -> type[T]:
    """Registers a dataclass with JAX; decorates it.

    What JAX's own `register_dataclass` rebuilds goes through `__init__`, which refuses shardings and the like where
    shapes are checked.
    """
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    jax.tree_util.register_pytree_with_keys(
        kind,
        lambda value: ([(GetAttrKey(name), getattr(value, name)) for name in names], None),
        lambda _, parts: build(kind, **dict(zip(names, parts, strict=True))),
        lambda value: ([getattr(value, name) for name in names], None),
    )
    return kind


def build(kind: type[T], **fields: Any) -> T:
    """Makes a dataclass of other things than arrays, such as shardings."""
    value = object.__new__(kind)
    for name, field in fields.items():
        object.__setattr__(value, name, field)
    return value
