"""What each expert is worth: the change of bits per byte when its router may not choose it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from mixtral_jax.config import EvalConfig, ModelConfig, UserError
from mixtral_jax.console import silent
from mixtral_jax.data.splits import Documents
from mixtral_jax.evaluation.perplexity import Difference, Evaluation, difference, measure
from mixtral_jax.evaluation.scoring import Score
from mixtral_jax.model.mixtral import Arrays

Expert = tuple[int, int]  # its layer, and its number there


@dataclass(frozen=True)
class Ablation:
    """The whole model, and what every expert's absence changes."""

    whole: Evaluation
    # Bits per byte without the expert less those with it, of each source and of all (`total`).
    without: Mapping[Expert, Mapping[str, Difference]]


def switch_off(arrays: Arrays, expert: Expert) -> Arrays:
    """Lets no token choose an expert: the next best takes its place, and the kept logits share the weight.

    A selection bias of minus infinity does that, for it decides the choice alone; so tokens that would not have chosen
    the expert keep their choices and their weights to the bit.
    """

    def off(bias: jax.Array) -> jax.Array:
        changed = np.array(bias)
        changed[expert] = -np.inf
        return jax.device_put(changed, bias.sharding)  # as it lay, so that nothing is compiled again

    return {**arrays, "selection_bias": jax.tree.map(off, arrays["selection_bias"])}


def measure_ablation(
    score_of: Callable[[Arrays], Score],
    arrays: Arrays,
    texts: Sequence[Documents],
    eval: EvalConfig,
    seq_len: int,
    model: ModelConfig,
    on_batch: Callable[[str], None] = silent,
) -> Ablation:
    """Measures all texts whole, and once more without each expert of each layer.

    Args:
        score_of: see `make_scorer`.
        arrays: of the model.
        texts: one entry a source.
        eval: how to cut them and how many tokens to take of each.
        seq_len: tokens of a training row.
        model: of which they are.
        on_batch: called after each batch with what is being measured.

    Raises:
        UserError: a token takes all experts, or what `measure` raises.
    """
    if model.num_experts == model.num_experts_per_tok:
        raise UserError(
            f"every token goes to all {model.num_experts} of a layer's experts, so none can be switched off: name a "
            "checkpoint with more"
        )

    def evaluate(arrays: Arrays, what: str) -> Evaluation:
        return measure(score_of(arrays), texts, eval, seq_len, lambda _: on_batch(what))

    whole = evaluate(arrays, "all experts")
    without = {}
    for layer in range(model.num_layers):
        for number in range(model.num_experts):
            found = evaluate(switch_off(arrays, (layer, number)), f"layer {layer}, without {number}")
            changes = {name: difference(whole.sources[name], found.sources[name]) for name in whole.sources}
            without[layer, number] = {**changes, "total": difference(whole.total, found.total)}
    return Ablation(whole, without)
