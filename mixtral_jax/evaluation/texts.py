"""What to measure a model on, and what the model knows of it: told by the record in its checkpoint, not by names."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from mixtral_jax.config import UserError
from mixtral_jax.data.cache_files import cache_directory
from mixtral_jax.data.fingerprints import fingerprints, make_fingerprints
from mixtral_jax.data.record import NOTHING, DocumentRecord
from mixtral_jax.data.sources import check_sources
from mixtral_jax.data.splits import MeasuredText, Split
from mixtral_jax.data.token_cache import open_or_build, token_dtype
from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.distributed.processes import main_first
from mixtral_jax.evaluation.loading import LoadedModel


def evaluation_texts(loaded: LoadedModel) -> list[MeasuredText]:
    """Opens the texts to measure, one of each source; see `Split.to_measure`.

    Of several processes the main one goes first and builds the caches.

    Raises:
        UserError: a source that cannot be read.
    """
    return main_first(lambda: _open_texts(loaded))


def _open_texts(loaded: LoadedModel) -> list[MeasuredText]:
    config, record = loaded.config, loaded.record
    if config.objective.name == "preference":
        raise UserError(
            "the run learnt preferences, which are neither texts nor chats: name chats with "
            "objective={name: sft, losses: []} and data.sources, or texts with objective={name: pretrain, losses: []}"
        )
    check_sources(config.data.sources)
    directory = cache_directory(config.data.cache_dir)
    texts = []
    for source in config.data.sources:
        cache = open_or_build(source, loaded.tokenizer, directory, config.objective.name)
        text = Split(cache, fingerprints(cache, directory), record or NOTHING, loaded.tokenizer).to_measure()
        texts.append(text if record else MeasuredText(text.documents, "unknown", None))
    return texts


def describe(text: MeasuredText) -> str:
    """Says in some words what a text is to the model that is measured on it; nothing of held-out text."""
    if text.kind == "unknown":
        return "may have been trained on"
    if text.kind == "other text" and text.trained_share:
        return f"other text; {text.trained_share:.1%} of it was trained on and is left out"
    return "" if text.kind == "held-out" else text.kind


def notes(texts: Sequence[MeasuredText], record: DocumentRecord | None) -> list[str]:
    """Says what a table of numbers leaves unsaid about its texts."""
    if record is None:
        return [
            "this checkpoint keeps no record of what it was trained on (it is an import, or an earlier version's): "
            "texts are measured whole, and it may know them"
        ]
    found = [f"{text.documents.name}: {said}" for text in texts if (said := describe(text))]
    if not record.complete:
        found.append("the run began from parameters of which nothing is known: they may have seen any of this")
    return found


def add_facts(numbers: dict[str, Any], texts: Sequence[MeasuredText]) -> dict[str, Any]:
    """Adds `text` (its kind) and `trained_share` to what `sources` says of each, and gives the numbers back."""
    for text in texts:
        numbers["sources"][text.documents.name] |= {"text": text.kind, "trained_share": text.trained_share}
    return numbers


def were_trained_on(texts: Sequence[str], record: DocumentRecord, tokenizer: Tokenizer) -> Bool[np.ndarray, " texts"]:
    """Says which texts are documents that a model was trained on, or changed copies of long ones."""
    encoded = tokenizer.encode_batch(texts)
    parts = [part for ids in encoded for part in ([tokenizer.bos_id], ids, [tokenizer.eos_id])]
    lengths = np.array([len(ids) + 2 for ids in encoded])
    prints = make_fingerprints(np.concatenate(parts).astype(token_dtype(tokenizer)), np.append(0, np.cumsum(lengths)))
    return record.trained_until(prints, lengths) > 0
