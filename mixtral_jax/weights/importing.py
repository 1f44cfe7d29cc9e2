"""A released checkpoint as the source of one of this package's, block by block, without the devices."""

import itertools
from typing import Any

import numpy as np
from jaxtyping import Shaped

from mixtral_jax.config import UserError
from mixtral_jax.model.mixtral import Arrays
from mixtral_jax.runs.sources import Parts
from mixtral_jax.runs.streaming import Start, named_leaves, place
from mixtral_jax.weights.blocks import BlockLayout, all_finite, block_layout, converted, host_view, turned
from mixtral_jax.weights.names import Row
from mixtral_jax.weights.released import Released, Upcycling
from mixtral_jax.weights.stored import FILE_TYPES
from mixtral_jax.weights.upcycling import add_noise, draw_router

ROUTER = "layers/moe/router"


class ReleasedArrays:
    """The parameters of a release, and selection biases of zero."""

    def __init__(self, released: Released, abstract: Arrays, upcycling: Upcycling | None = None):
        """Reads nothing yet.

        Args:
            released: as opened and checked.
            abstract: {"params": ..., "selection_bias": ...}, shapes and types.
            upcycling: as given to `open_released`.
        """
        self.parts: Parts = {part: named_leaves(tree) for part, tree in abstract.items()}
        self._released, self._upcycling = released, upcycling
        self._rows = {row.path: row for row in released.layout.rows}
        self._drawn: Any = None
        if upcycling:
            router = self.parts["params"][ROUTER]
            self._drawn = np.asarray(draw_router(router.shape, released.config, upcycling.seed).astype(router.dtype))

    def block(self, part: str, name: str, start: Start, shape: tuple[int, ...]) -> Shaped[np.ndarray, "..."]:
        """Reads a block; `UserError` where it has NaN or infinite values."""
        dtype = self.parts[part][name].dtype
        if part == "selection_bias":
            return np.zeros(shape, dtype)
        if self._drawn is not None and name == ROUTER:
            return self._drawn[place(start, shape)]
        row = self._rows[name]
        layout = block_layout(row, self._released.config)
        leads = layout.num_leads
        within: tuple[Any, ...] = (..., *place(start, shape)[leads:])
        if all(size == 1 for size in shape[:leads]):
            return self._read(row, layout, *layout.lead_of(start), dtype)[within]
        values = np.empty(shape, dtype)
        for offset in itertools.product(*map(range, shape[:leads])):
            lead = tuple(np.add(start[:leads], offset).tolist())
            values[offset] = self._read(row, layout, *layout.lead_of(lead), dtype)[within].reshape(shape[leads:])
        return values

    def _read(self, row: Row, layout: BlockLayout, layer: int, expert: int, dtype: Any) -> Shaped[np.ndarray, "..."]:
        """Reads one layer, and one expert, of a parameter into the order and type that it has here."""
        released, upcycling = self._released, self._upcycling
        stored = released.tensors[row.key.format(layer=layer, expert=expert)]
        view = host_view(stored.open(), row, released.config, layout, expert)
        values = converted(turned(view).view(FILE_TYPES[stored.dtype]), dtype)
        if upcycling and upcycling.noise and layout.num_experts:
            values = np.asarray(add_noise(values, row.path, layer, expert, upcycling))
        if not all_finite(values):
            where = f"tensor '{stored.key}' of {stored.file}"
            raise UserError(f"{where} holds NaN, or values too large for precision.params: copy the file again")
        return values.reshape(layout.ours_shape)
