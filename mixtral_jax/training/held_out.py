"""What training measures on a bounded part of the held-out text, and the sentence about it."""

import dataclasses
from collections.abc import Callable

from mixtral_jax.data.pipeline import held_out_batches
from mixtral_jax.data.splits import Documents
from mixtral_jax.distributed import processes
from mixtral_jax.evaluation.perplexity import measure
from mixtral_jax.evaluation.scoring import Score
from mixtral_jax.model.mixtral import Arrays
from mixtral_jax.training.step import Trainable


def measure_held_out(
    trainable: Trainable, score_of: Callable[[Arrays], Score], documents: list[Documents], arrays: Arrays
) -> tuple[dict[str, float], str]:
    """Measures a model as its objective has it, text packed as in training.

    Args:
        trainable: the step of training, and the configuration.
        score_of: see `make_scorer`.
        documents: those held out of each source.
        arrays: the model's.

    Returns:
        What was measured, by name, and a sentence about it; nothing where nothing is held out.
    """
    config = trainable.config
    if config.objective.name == "preference":
        return _judge(trainable, documents, arrays)
    tokens = config.train.eval_batches * config.eval.batch_size * config.data.seq_len
    settings = dataclasses.replace(config.eval, mode="packed", context=0, stride=0, max_tokens=tokens)
    texts = [text for text in documents if text.num_documents]
    if not texts:
        return {}, ""
    progress = lambda *_: processes.progress()  # noqa: E731
    evaluation = measure(score_of(arrays), texts, settings, config.data.seq_len, progress)
    named = {**evaluation.sources, "total": evaluation.total}
    nats = {f"heldout/{name}": result.nats_per_token for name, result in named.items()}
    bits = {f"bits_per_byte/{name}": result.bits_per_byte for name, result in named.items()}
    total = evaluation.total
    return nats | bits, f"held-out perplexity {total.perplexity:,.2f}, {total.bits_per_byte:.4f} bits per byte"


def _judge(trainable: Trainable, documents: list[Documents], arrays: Arrays) -> tuple[dict[str, float], str]:
    """Measures answers that were judged."""
    batches = held_out_batches(trainable.config, documents)
    if not batches:
        return {}, ""
    found = trainable.judge(arrays, batches)
    sentence = (
        f"held-out loss {found['loss']:.4f}, reward accuracy {found['rewards/accuracies']:.1%}, "
        f"margin {found['rewards/margins']:.4f}"
    )
    return {f"heldout/{name}": value for name, value in found.items()}, sentence
