"""An alarm for routers: experts fall idle, or a router stops learning, while the loss still looks well."""

from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

import numpy as np
from jaxtyping import Shaped

from mixtral_jax.config import ModelConfig

LASTS, LOOKS = 40, 3  # steps, and looks at them, through which trouble lasts before it is named: one batch is chance
EARLY = 100  # steps in which single experts may be idle: fresh routers were seen to find some of theirs after 70
IDLE = 0.02  # of an equal share, below which an expert is idle
FEW = 0.1  # of what the other experts get at balance, below which a layer routes to as few as it can


class RouterFault(NamedTuple):
    """What is wrong with a router at one look."""

    layer: int
    kind: str  # idle, few, frozen or not finite
    expert: int = -1


class RouterWatch:
    """Looks at what is logged of the routers; names what lasts, once until it is over."""

    def __init__(self, model: ModelConfig):
        """Starts with nothing seen."""
        self._experts, self._chosen = model.num_experts, model.num_experts_per_tok
        self._seen: dict[RouterFault, tuple[int, int]] = {}  # first step and number of looks
        self._named: set[RouterFault] = set()

    def look(
        self, step: int, load: Shaped[np.ndarray, "layers experts"], gradients: Shaped[np.ndarray, " layers"] | None
    ) -> list[str]:
        """Takes what a step did; returns a sentence for each layer and kind of trouble that has lasted.

        Args:
            step: its number.
            load: each expert's share of its layer's assignments.
            gradients: norms of the routers' gradients; None: routers are not trained.
        """
        if self._experts == self._chosen:
            return []  # nothing to choose
        found = sorted(self._find(load, gradients))
        before, self._seen = self._seen, {}
        for trouble in found:
            first, looks = before.get(trouble, (step, 0))
            self._seen[trouble] = first, looks + 1
        lasting = [
            trouble
            for trouble, (first, looks) in self._seen.items()
            if looks >= LOOKS and step - first >= LASTS and (trouble.kind != "idle" or step >= EARLY)
            if trouble not in self._named
        ]
        self._named = (self._named & set(found)) | set(lasting)
        return [
            f"{self._sentence(*key, [each.expert for each in group])} for {LASTS} steps and more"
            for key, group in groupby(lasting, lambda trouble: (trouble.layer, trouble.kind))
        ]

    def _find(self, load: np.ndarray, gradients: np.ndarray | None) -> Iterator[RouterFault]:
        for layer, shares in enumerate(load):
            if np.sort(shares)[-self._chosen :].sum() > 1 - FEW * (1 - self._chosen / self._experts):
                yield RouterFault(layer, "few")
            elif shares.any():  # else nothing was routed
                yield from (RouterFault(layer, "idle", int(e)) for e in np.flatnonzero(shares * self._experts < IDLE))
        for layer, norm in enumerate([] if gradients is None else gradients):
            if norm == 0:
                yield RouterFault(layer, "frozen")
            elif not np.isfinite(norm):
                yield RouterFault(layer, "not finite")

    def _sentence(self, layer: int, kind: str, experts: list[int]) -> str:
        if kind == "frozen":
            return f"ROUTER of layer {layer}: no gradient reaches it"
        if kind == "not finite":
            return f"ROUTER of layer {layer}: its gradient is not finite, so that no step learns,"
        if kind == "few":
            return f"ROUTER of layer {layer}: {self._chosen} of {self._experts} experts take most of the tokens"
        return f"ROUTER of layer {layer}: hardly a token has gone to expert {', '.join(map(str, experts))}"


def name_not_finite(loss: float, gradients: Shaped[np.ndarray, " layers"] | None) -> str:
    """Says what of a step was not finite: the loss, a router's gradient, the one nearest to the loss, or another."""
    if not np.isfinite(loss):
        return "the loss"
    layers = np.flatnonzero(~np.isfinite(np.ones(0) if gradients is None else gradients))
    return f"the gradient of the router of layer {layers[-1]}" if len(layers) else "a gradient"
