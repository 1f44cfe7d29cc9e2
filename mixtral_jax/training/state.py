"""What a step of training changes."""

from dataclasses import dataclass

import optax
from jaxtyping import Array, Int32, PyTree

from mixtral_jax.model.mixtral import Arrays
from mixtral_jax.pytree import pytree


@pytree
@dataclass(frozen=True, eq=False)
class TrainState:
    """The model's arrays, the optimizer's, and counters."""

    params: PyTree
    selection_bias: PyTree
    opt_state: optax.OptState
    step: Int32[Array, ""]
    skipped: Int32[Array, ""]  # updates left out so far because the loss or a gradient was not finite
    skipped_in_a_row: Int32[Array, ""]
    base: PyTree = None  # where `params` are adapters: the parameters below, which stay as they are

    @property
    def arrays(self) -> Arrays:
        """The model's arrays alone."""
        if self.base is None:
            return {"params": self.params, "selection_bias": self.selection_bias}
        return {"params": self.base, "selection_bias": self.selection_bias, "adapters": self.params}

    @property
    def parts(self) -> dict[str, PyTree]:
        """What a checkpoint holds, by name: all but what never changes."""
        return {name: part for name, part in vars(self).items() if name != "base"}
