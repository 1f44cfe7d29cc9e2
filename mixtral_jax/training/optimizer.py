"""AdamW with clipping and the learning-rate schedules."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from mixtral_jax.config import OptimizerConfig, UserError
from mixtral_jax.kernels import adamw
from mixtral_jax.kernels.adamw import AdamW, Moments
from mixtral_jax.precision import Precision
from mixtral_jax.sharding import Axes

Schedule = Callable[[int | Int[Array, ""]], float | Float[Array, ""]]


def make_schedule(config: OptimizerConfig, steps: int) -> Schedule:
    """Builds learning rate as a function of the step.

    Args:
        config: peak, warm-up and shape: `cosine` falls to the final ratio at the last step; `wsd` stays and falls
            linearly over the last decay_steps; `constant` stays. Warm-up ends with one step at the peak.
        steps: of the whole run; the last one is steps - 1.

    Raises:
        UserError: warm-up and decay that do not fit in the run.
    """
    peak, final = config.learning_rate, config.learning_rate * config.final_learning_rate_ratio
    warmup = config.warmup_steps
    if warmup is None:
        warmup = max(0, min(100, steps // 10, steps - config.decay_steps))
    decay = config.decay_steps or max(1, min(steps // 5, steps - warmup))
    if warmup >= steps:
        raise UserError(f"optimizer.warmup_steps={warmup} leaves nothing of train.steps={steps}: lower it")
    peak_step = max(0, warmup - 1)
    length = max(1, steps - 1 - peak_step)
    start = optax.linear_schedule(peak / max(1, warmup), peak, max(1, peak_step))
    if config.schedule == "cosine":
        rest = optax.cosine_decay_schedule(peak, length, config.final_learning_rate_ratio)
    elif config.schedule == "constant":
        rest = optax.constant_schedule(peak)
    else:
        if warmup + decay > steps:
            raise UserError(
                f"optimizer.warmup_steps={warmup} + optimizer.decay_steps={decay} exceed train.steps={steps}: lower one"
            )
        falling = optax.linear_schedule(peak, final, decay)
        rest = optax.join_schedules([optax.constant_schedule(peak), falling], [length - decay])
    return optax.join_schedules([start, rest], [peak_step])


def decay_mask(axes: PyTree) -> PyTree:
    """Says which parameters decay: matrices, never norm scales; `axes` is the tree of logical axes."""

    def is_matrix(entry: Axes) -> bool:
        return len([axis for axis in entry if axis != "layers"]) >= 2

    return jax.tree.map(is_matrix, axes, is_leaf=lambda x: isinstance(x, tuple))


def widen(tree: PyTree, precision: Precision) -> PyTree:
    """Casts gradients or parameters to the type in which norms, moments and updates are computed."""
    return jax.tree.map(lambda x: x.astype(precision.full), tree)


def make_optimizer(config: OptimizerConfig, precision: Precision, axes: PyTree) -> optax.GradientTransformation:
    """Builds what makes the state of `update`: Adam's moments, in the places where optax's chains have them."""
    moments = optax.scale_by_adam(config.beta1, config.beta2, config.eps, mu_dtype=precision.optimizer)
    # optax gives the second moment the type of the parameters; ours is `full` whatever they are.
    adam = optax.GradientTransformation(lambda params: moments.init(widen(params, precision)), moments.update)
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, adam, optax.add_decayed_weights(config.weight_decay, mask=decay_mask(axes)))


class Gradients(NamedTuple):
    """What a step has to apply."""

    grads: PyTree  # a tree like the parameters', in `precision.full`, see `widen`
    norm: Float[Array, ""]  # over all of them
    finite: Bool[Array, ""]  # False leaves everything as it is


def update(
    config: OptimizerConfig,
    axes: PyTree,
    learning_rate: Float[Array, ""],
    gradients: Gradients,
    params: PyTree,
    state: PyTree,
    backend: str,
) -> tuple[PyTree, PyTree]:
    """Computes parameters and state after a step of AdamW with clipping and decoupled decay.

    Args:
        config: of the optimizer.
        axes: tree of the parameters' logical axes, which says what decays.
        learning_rate: of this step.
        gradients: of this step.
        params: parameters.
        state: as `make_optimizer` makes it.
        backend: of `adamw`.

    Source: arXiv 1711.05101.
    """
    place, adam = next((i, part) for i, part in enumerate(state) if hasattr(part, "mu"))
    count = adam.count + gradients.finite
    beta1, beta2 = config.beta1, config.beta2
    # A factor, and no quotient: XLA for CPU writes that to memory first, a gradient more.
    clip = jnp.minimum(1, config.clip_norm / jnp.maximum(gradients.norm, 1e-30)) if config.clip_norm else 1.0
    mean_correction, square_correction = (1 / (1 - beta**count) for beta in (beta1, beta2))
    factors = AdamW(
        learning_rate, clip, mean_correction, square_correction, beta1, beta2, 1 - beta1, 1 - beta2,
        config.eps, config.weight_decay,
    )  # fmt: skip

    def of_array(path: Any, p: Array, grad: Array, mean: Array, square: Array, decays: bool) -> Moments:
        own = factors if decays else factors._replace(weight_decay=0.0)
        if path[-1].key == "router" and config.router_width:
            own = own._replace(learning_rate=learning_rate * min(1, config.router_width / p.shape[-2]))
        return adamw.update(Moments(p, mean, square), grad, own, gradients.finite, backend=backend)

    results = jax.tree.map_with_path(of_array, params, gradients.grads, adam.mu, adam.nu, decay_mask(axes))
    one = jax.tree.structure(Moments(learning_rate, learning_rate, learning_rate))
    new: Any = jax.tree.transpose(jax.tree.structure(params), one, results)
    return new.params, (*state[:place], adam._replace(count=count, mu=new.mean, nu=new.square), *state[place + 1 :])
