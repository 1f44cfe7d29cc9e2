"""What a layer keeps for its backward pass; the rest is computed again there."""

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from mixtral_jax.kernels.cpu.matmul import is_multiply

KEPT = "kept"


def keep(tree: Any) -> Any:
    """Marks arrays that take long to compute again; a layer keeps them where XLA itself does not choose."""
    return jax.tree.map(lambda x: checkpoint_name(x, KEPT), tree)


def _is_dense_product(primitive: Any, *arguments: Any, **parameters: Any) -> bool:
    if primitive.name == "ffi_call":
        return is_multiply(parameters["target_name"])
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *arguments, **parameters)


# By `train.remat`; `none` where products are the host's.
REMAT_POLICIES = {
    "none": jax.checkpoint_policies.save_only_these_names(KEPT),
    "dots": _is_dense_product,
    "full": jax.checkpoint_policies.nothing_saveable,
}
