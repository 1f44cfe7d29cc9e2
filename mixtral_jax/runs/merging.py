"""Adapters merged into the parameters below them, block by block, without the devices: for files of all kinds."""

import itertools
import re
from functools import partial

import jax
import numpy as np
from jaxtyping import Array, Shaped

from mixtral_jax.model.adapters import PRODUCTS, add
from mixtral_jax.runs.sources import Parts, Source, host
from mixtral_jax.runs.streaming import Start, place


class MergedArrays:
    """The sums of parameters and adapters, in the parameters' type, and the adapters' selection bias."""

    def __init__(self, base: Source, own: Source, scale: float):
        """Reads nothing yet.

        Args:
            base: of the parameters.
            own: of what a checkpoint of adapters holds: these in the place of the parameters, and selection bias.
            scale: of the adapters.
        """
        self.parts: Parts = {**own.parts, "params": base.parts["params"]}
        self._base, self._own, self._scale = base, own, scale

    def block(self, part: str, name: str, start: Start, shape: tuple[int, ...]) -> Shaped[np.ndarray, "..."]:
        """Reads a block of each and adds them up, a matrix at a time: the bits are the same whatever is asked for."""
        if part != "params":
            return self._own.block(part, name, start, shape)
        values = self._base.block(part, name, start, shape)
        path = name.removeprefix("layers/")
        if f"{path}/a" not in self._own.parts[part]:
            return values
        leads = 2 if PRODUCTS[path].startswith("e") else 1
        merged = np.empty(shape, values.dtype)
        for offset in itertools.product(*map(range, shape[:leads])):
            at = place(offset, (1,) * leads)
            first = (*np.add(start[:leads], offset).tolist(), *start[leads:])
            factors = self._factors(path, first, merged[at].shape)
            merged[at] = _add(*jax.device_put((values[at], factors), host()), path, self._scale)
        return merged

    def _factors(self, path: str, start: Start, shape: tuple[int, ...]) -> dict[str, Shaped[np.ndarray, "..."]]:
        """Reads of A and B what a block of the matrix needs."""
        left, right, product = re.split(",|->", PRODUCTS[path])
        cut = dict(zip("l" + product, zip(start, shape, strict=True), strict=True))
        factors = {}
        for which, letters in (("a", left), ("b", right)):
            key = f"{path}/{which}"
            sizes = zip("l" + letters, self._own.parts["params"][key].shape, strict=True)
            begins, lengths = zip(*(cut.get(letter, (0, size)) for letter, size in sizes), strict=True)
            factors[which] = self._own.block("params", key, begins, lengths)
        return factors


@partial(jax.jit, static_argnames=("path", "scale"))
def _add(values: Shaped[Array, "..."], factors: dict[str, Array], path: str, scale: float) -> Shaped[Array, "..."]:
    layer = jax.tree.map(lambda x: x[0], factors)
    return add(values[0], layer, path, scale)[None].astype(values.dtype)
