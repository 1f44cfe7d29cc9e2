"""The data of a run: documents of every source, and batch n as a pure function of configuration, seed and n."""

import hashlib
import json

import numpy as np
from jaxtyping import Int64

from mixtral_jax.config import Config, UserError
from mixtral_jax.data.batch import HostBatch, padding
from mixtral_jax.data.cache_files import cache_directory
from mixtral_jax.data.packing import num_rows, pack_rows
from mixtral_jax.data.row_order import choose_sources, rows_dealt, shuffled_rows
from mixtral_jax.data.sources import check_sources
from mixtral_jax.data.splits import Documents, split_documents
from mixtral_jax.data.token_cache import open_or_build
from mixtral_jax.data.tokenizer import Tokenizer, load_tokenizer


def open_documents(config: Config) -> tuple[Tokenizer, list[Documents], list[Documents]]:
    """Opens everything that training and evaluation read; what can be wrong is checked before anything slow.

    Args:
        config: `data` names sources, tokenizer, held-out share and cache; `model.vocab_size` bounds the tokenizer.

    Returns:
        The tokenizer, and for each source the documents for training and those held out.

    Raises:
        UserError: whatever is wrong with sources, tokenizer or cache.
    """
    if not config.data.sources:
        raise UserError("data.sources is empty: name at least one source of text")
    check_sources(config.data.sources)
    tokenizer = load_tokenizer(config.data, config.model.vocab_size)
    directory = cache_directory(config.data.cache_dir)
    pairs = [
        split_documents(open_or_build(source, tokenizer, directory), config.data.holdout, config.seed, tokenizer)
        for source in config.data.sources
    ]
    return tokenizer, [training for training, _ in pairs], [held_out for _, held_out in pairs]


class TrainingData:
    """Batches of packed rows, mixed by the weights of the sources and shuffled within each source and epoch."""

    def __init__(self, config: Config, documents: list[Documents]):
        """Lays out the rows; nothing is read.

        Args:
            config: `data.sources` (weights), `data.seq_len`, `train.batch_size` and `seed`.
            documents: those for training, one view for each of `data.sources`.

        Raises:
            UserError: a source without a row, or less data than one batch.
        """
        self._documents = documents
        self._seq_len = config.data.seq_len
        self._batch_size = config.train.batch_size
        self._seed = config.seed
        self._weights = [source.weight for source in config.data.sources]
        self._rows = [num_rows(view, self._seq_len) for view in documents]
        self.source_names = [view.name for view in documents]
        # Targets of an epoch, by source: every token but the first of each document.
        self.tokens_per_epoch = {view.name: view.num_tokens - view.num_documents for view in documents}
        for view, rows in zip(documents, self._rows, strict=True):
            if not rows:
                raise UserError(f"source '{view.name}' has nothing left to train on: add text or lower data.holdout")
        if sum(self._rows) < self._batch_size:
            tokens = sum(view.num_tokens for view in documents)
            raise UserError(
                f"the training data is smaller than one batch: {tokens} tokens make {sum(self._rows)} rows of "
                f"data.seq_len={self._seq_len}, but train.batch_size={self._batch_size}: add text or lower either"
            )
        facts = [[view.fingerprint for view in documents], self._weights, self._seq_len, self._seed]
        # Tells whether a run that goes on would see the same rows.
        self.fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def sources(self, step: int, rows: slice | None = None) -> tuple[Int64[np.ndarray, "rows"], ...]:
        """Finds, for the rows of `batch`, the number of each row's source and its place in that source's order."""
        chosen = np.arange(self._batch_size, dtype=np.int64)[rows or slice(None)] + step * self._batch_size
        return choose_sources(chosen, self._weights)

    def batch(self, step: int, rows: slice | None = None) -> HostBatch:
        """Builds the batch of a step, or the part of it that one host feeds.

        Args:
            step: number of the step, from 0 on.
            rows: which rows of the batch; all of them if None.
        """
        sources, places = self.sources(step, rows)
        batch = padding(len(sources), self._seq_len)
        for source in np.unique(sources):
            here = sources == source
            numbers = shuffled_rows(places[here], self._rows[source], self._seed, int(source))
            for name, part in vars(pack_rows(self._documents[source], numbers, self._seq_len)).items():
                getattr(batch, name)[here] = part
        return batch

    def progress(self, steps: int) -> dict[str, int | float]:
        """Says what the first so many steps take of each source: `tokens_seen/NAME`, `share/NAME`, `epoch/NAME`."""
        seen: dict[str, int | float] = {}
        dealt = rows_dealt(steps * self._batch_size, self._weights)
        for name, rows, size in zip(self.source_names, dealt, self._rows, strict=True):
            seen |= {
                f"tokens_seen/{name}": rows * self._seq_len,
                f"share/{name}": rows / max(1, steps * self._batch_size),
                f"epoch/{name}": rows / size,
            }
        return seen
