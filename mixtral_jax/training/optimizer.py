"""AdamW with clipping and the learning-rate schedules."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from mixtral_jax.config import OptimizerConfig, UserError
from mixtral_jax.kernels.cpu.adamw import Numbers, update_in_place
from mixtral_jax.precision import Precision
from mixtral_jax.sharding import Axes

Schedule = Callable[[Any], Any]


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
    decay = config.decay_steps or max(1, steps // 5)
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


def decay_mask(axes: Any) -> Any:
    """Says which parameters decay: matrices, never norm scales; `axes` is the tree of logical axes."""

    def is_matrix(entry: Axes) -> bool:
        return len([axis for axis in entry if axis != "layers"]) >= 2

    return jax.tree.map(is_matrix, axes, is_leaf=lambda x: isinstance(x, tuple))


def widen(tree: Any, precision: Precision) -> Any:
    """Casts gradients or parameters to the type in which norms, moments and updates are computed."""
    return jax.tree.map(lambda x: x.astype(precision.full), tree)


def make_optimizer(config: OptimizerConfig, precision: Precision, axes: Any) -> optax.GradientTransformation:
    """Builds clipping, Adam and decoupled decay; the step multiplies by the learning rate itself.

    It takes gradients in `precision.full`, see `widen`.

    Source: arXiv 1711.05101.
    """
    clip = optax.stateless(partial(_clip, limit=config.clip_norm)) if config.clip_norm else optax.identity()
    moments = optax.scale_by_adam(config.beta1, config.beta2, config.eps, mu_dtype=precision.optimizer)
    # optax gives the second moment the type of the parameters; ours is `full` whatever they are.
    adam = optax.GradientTransformation(lambda params: moments.init(widen(params, precision)), moments.update)
    return optax.chain(clip, adam, optax.add_decayed_weights(config.weight_decay, mask=decay_mask(axes)))


def _clip(updates: Any, _: Any, limit: float) -> Any:
    """Scales gradients down to a global norm, by a factor that XLA fuses into what follows.

    What optax's own function computes, a quotient, XLA for CPU writes to memory first: a gradient more.
    """
    factor = _clip_factor(optax.global_norm(updates), limit)
    return jax.tree.map(lambda x: x * factor, updates)


def _clip_factor(norm: Array, limit: float) -> Array:
    return jnp.minimum(1, limit / jnp.maximum(norm, 1e-30))


def update_by_host(
    config: OptimizerConfig,
    axes: Any,
    grads: Any,
    grad_norm: Array,
    rate: Array,
    wanted: Array,
    params: Any,
    state: Any,
) -> tuple[Any, Any]:
    """Computes what `make_optimizer` and the learning rate give, in place and in one pass; for float32 on one CPU.

    Args:
        config: as of `make_optimizer`, whose state `state` is.
        axes: tree of logical axes of the parameters.
        grads: gradients.
        grad_norm: their global norm.
        rate: learning rate.
        wanted: False leaves everything as it is.
        params: parameters.
        state: of the optimizer.

    Returns:
        Parameters and state.
    """
    place, adam = next((i, part) for i, part in enumerate(state) if hasattr(part, "mu"))
    count = adam.count + wanted
    clip = _clip_factor(grad_norm, config.clip_norm) if config.clip_norm else 1.0
    beta1, beta2 = config.beta1, config.beta2
    of_mean, of_square = (1 / (1 - beta**count) for beta in (beta1, beta2))
    numbers = Numbers(
        rate, clip, of_mean, of_square, beta1, beta2, 1 - beta1, 1 - beta2, config.eps, config.weight_decay
    )

    def update(p: Array, g: Array, mean: Array, square: Array, decays: bool) -> tuple[Array, ...]:
        return update_in_place(p, g, mean, square, numbers if decays else numbers._replace(decay=0.0), wanted)

    results = jax.tree.map(update, params, grads, adam.mu, adam.nu, decay_mask(axes))
    params, mean, square = jax.tree.transpose(jax.tree.structure(params), jax.tree.structure((0, 0, 0)), results)
    return params, (*state[:place], adam._replace(count=count, mu=mean, nu=square), *state[place + 1 :])


def optimizer_shardings(optimizer: optax.GradientTransformation, params: Any, replicated: Any) -> Any:
    """Gives every moment its parameter's sharding.

    Args:
        optimizer: as made above.
        params: abstract parameters with shardings.
        replicated: sharding of the rest (counters).
    """
    abstract = jax.eval_shape(optimizer.init, params)
    return optax.tree_map_params(
        optimizer,
        lambda _, param: param.sharding,
        abstract,
        params,
        transform_non_params=lambda _: replicated,
    )
