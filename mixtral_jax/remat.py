"""What a layer saves for its backward pass; the rest is computed again there."""

from typing import TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

T = TypeVar("T")
SAVED, DENSE_PRODUCT = "saved", "dense_product"


def save_for_backward(tree: T) -> T:
    """Names arrays that take long to compute again, for the policy `named`."""
    return jax.tree.map(lambda x: checkpoint_name(x, SAVED), tree)


def name_dense_product(x: Float[jax.Array, "..."]) -> Float[jax.Array, "..."]:
    """Names a product that is no operation of XLA's, for the policy `dots`."""
    return checkpoint_name(x, DENSE_PRODUCT)


# By `Runtime.remat`; `none` leaves the choice to XLA.
REMAT_POLICIES = {
    "named": jax.checkpoint_policies.save_only_these_names(SAVED),
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(DENSE_PRODUCT),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}
