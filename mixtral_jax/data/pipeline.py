"""The data of a run: documents of every source, and batch n as a pure function of configuration, seed and n."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from mixtral_jax.config import Config, DataConfig, UserError
from mixtral_jax.data.batch import HostBatch, fill, padding
from mixtral_jax.data.cache_files import cache_directory
from mixtral_jax.data.fingerprints import fingerprints
from mixtral_jax.data.packing import TextRows
from mixtral_jax.data.record import NOTHING, DocumentRecord, hold_out
from mixtral_jax.data.record_rows import RecordRows
from mixtral_jax.data.row_order import choose_sources, rows_dealt, shuffled_rows
from mixtral_jax.data.sources import check_sources
from mixtral_jax.data.splits import Documents, Split
from mixtral_jax.data.token_cache import open_or_build
from mixtral_jax.data.tokenizer import Tokenizer, load_tokenizer


class RunText(NamedTuple):
    """Everything that a run reads."""

    tokenizer: Tokenizer
    training: list[Documents]  # of each source
    held_out: list[Documents]  # of each source
    record: DocumentRecord  # of both

    def summary(self, config: DataConfig) -> list[dict[str, str | int]]:
        """Says in figures, for people who look into a checkpoint, what each source gave and where it lay."""
        return [
            {
                "name": source.name,
                "format": training.format,
                "place": str(Path(path).expanduser().resolve()) if path else source.hub or f"builtin {source.builtin}",
                "training_documents": training.num_documents,
                "training_tokens": training.num_tokens,
                "heldout_documents": held_out.num_documents,
                "heldout_tokens": held_out.num_tokens,
            }
            for source, training, held_out in zip(config.sources, self.training, self.held_out, strict=True)
            for path in (source.path or source.prepared,)
        ]


def open_documents(
    config: Config,
    *,
    own: DocumentRecord | None = None,
    before: DocumentRecord = NOTHING,
    tokenizer: Tokenizer | None = None,
) -> RunText:
    """Opens everything that training and evaluation read; what can be wrong is checked before anything slow.

    Args:
        config: `data` names sources, tokenizer, held-out share and cache; `model.vocab_size` bounds the tokenizer.
        own: what the run recorded when it began, if it goes on.
        before: the record of the run that a new one takes its parameters from.
        tokenizer: the one to use in place of the configured one.

    Raises:
        UserError: whatever is wrong with sources, tokenizer or cache.
    """
    check_sources(config.data.sources)
    tokenizer = tokenizer or load_tokenizer(config.data, config.model.vocab_size)
    directory = cache_directory(config.data.cache_dir)
    kind = config.objective.name
    caches = [open_or_build(source, tokenizer, directory, kind) for source in config.data.sources]
    sources = [(cache, fingerprints(cache, directory)) for cache in caches]
    record = own or hold_out(sources, config.data.holdout, config.seed, tokenizer, before)
    splits = [Split(cache, prints, record, tokenizer) for cache, prints in sources]
    return RunText(tokenizer, [split.training() for split in splits], [split.held_out() for split in splits], record)


def data_fingerprint(config: Config, documents: list[Documents]) -> str:
    """Tells whether a run that goes on would see the same rows; for the arguments see `TrainingData`."""
    weights = [source.weight for source in config.data.sources]
    facts = [[view.fingerprint for view in documents], weights, config.data.seq_len, config.seed]
    if config.objective.name != "pretrain":
        facts += [[source.too_long for source in config.data.sources]]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def rows_of(config: Config, documents: list[Documents]) -> Sequence[TextRows | RecordRows]:
    """Lays out the rows of each source as the objective has them: texts cut anywhere, records whole."""
    if config.objective.name == "pretrain":
        return [TextRows(view, config.data.seq_len) for view in documents]
    return [
        RecordRows(view, config.data.seq_len, source.too_long, mismatched=config.objective.needs_mismatched)
        for view, source in zip(documents, config.data.sources, strict=True)
    ]


class TrainingData:
    """Batches of packed rows, mixed by the weights of the sources and shuffled within each source and epoch.

    The weights hold in tokens: a source gives the more rows the more of them is padding. A source shorter than a row is
    repeated to fill one.
    """

    def __init__(self, config: Config, documents: list[Documents]):
        """Lays out the rows; nothing is read.

        Args:
            config: `data.sources` (weights), `data.seq_len`, `train.batch_size` and `seed`.
            documents: those for training, one view for each of `data.sources`.

        Raises:
            UserError: a source without a row, or less data than one batch.
        """
        self._seq_len = config.data.seq_len
        self._batch_size = config.train.batch_size
        self._seed = config.seed
        self._objective = config.objective
        self._rows = rows_of(config, documents)
        self._checks = [view.check_unchanged for view in documents]
        self.source_names = [view.name for view in documents]
        for view, rows in zip(documents, self._rows, strict=True):
            if not rows.count:
                why = "add text or lower data.holdout" if view.format == "text" or not view.num_documents else (
                    f"all {view.num_documents} records are longer than data.seq_len={self._seq_len}: raise it or set "
                    "too_long: cut for the source"
                )  # fmt: skip
                raise UserError(f"source '{view.name}' has nothing left to train on: {why}")
        total = sum(rows.count for rows in self._rows)
        if total < self._batch_size:
            tokens = sum(view.num_tokens for view in documents)
            raise UserError(
                f"the training data is smaller than one batch: {tokens} tokens make {total} rows of "
                f"data.seq_len={self._seq_len}, but train.batch_size={self._batch_size}: add text or lower either"
            )
        self._weights = [
            source.weight / (1 - rows.empty / (rows.count * self._seq_len))
            for source, rows in zip(config.data.sources, self._rows, strict=True)
        ]
        self.fingerprint = data_fingerprint(config, documents)
        self.skipped: list[tuple[int, int]] = []  # first batch, and the one after the last, of stretches left out

    def number_of(self, step: int) -> int:
        """Finds which batch of the order a step takes: the next one that is not left out."""
        for begin, end in self.skipped:
            if step >= begin:
                step += end - begin
        return step

    def skip(self, begin: int, end: int) -> None:
        """Leaves batches out, by their numbers in the order; whatever was left out after the first of them is in there.

        Args:
            begin: the first one.
            end: the one after the last.
        """
        self.skipped = [stretch for stretch in self.skipped if stretch[1] <= begin] + [(begin, end)]

    def sources(self, step: int, rows: slice | None = None) -> tuple[Int64[np.ndarray, "rows"], ...]:
        """Finds, for the rows of `batch`, the number of each row's source and its place in that source's order."""
        chosen = np.arange(self._batch_size, dtype=np.int64)[rows or slice(None)]
        chosen += self.number_of(step) * self._batch_size
        return choose_sources(chosen, self._weights)

    def batch(self, step: int, rows: slice | None = None) -> HostBatch:
        """Builds the batch of a step, or the part of it that one host feeds.

        Args:
            step: number of the step, from 0 on.
            rows: which rows of the batch; all of them if None.

        Raises:
            UserError: a file that is mapped was written to.
        """
        for check in self._checks:
            check()
        sources, places = self.sources(step, rows)
        batch = padding(len(sources), self._seq_len, self._objective)
        for source in np.unique(sources):
            here, own = sources == source, self._rows[source]
            numbers = shuffled_rows(places[here], own.count, self._seed, int(source))
            fill(batch, here, own.pack(numbers))
        return batch

    def tokens_seen(self, steps: int) -> int:
        """Counts the tokens of the first so many steps, as `progress` does, of all sources."""
        return sum(self._dealt(steps)[1])

    def _dealt(self, steps: int) -> tuple[list[int], list[int]]:
        """How far each source is dealt out by the first so many steps, in rows, and what they take of it, in tokens."""
        batches = self.number_of(steps - 1) + 1
        dealt, tokens = self._before(batches)
        for stretch in self.skipped:
            if stretch[1] <= batches:
                begin, end = (self._before(batch)[1] for batch in stretch)
                tokens = [taken + before - after for taken, before, after in zip(tokens, begin, end, strict=True)]
        return dealt, tokens

    def _before(self, batch: int) -> tuple[list[int], list[int]]:
        """Rows and tokens of each source that lie before a batch of the order."""
        dealt = rows_dealt(batch * self._batch_size, self._weights)
        each = enumerate(zip(self._rows, dealt, strict=True))
        return dealt, [rows.tokens_of(count, self._seed, source) for source, (rows, count) in each]

    def notes(self) -> list[str]:
        """Says what a person should know of the sources that hold records."""
        return [
            f"source '{name}': records of the format {rows.format}, {rows.targets:,} tokens of answers in "
            f"{rows.count:,} rows that are {1 - rows.empty / (rows.count * self._seq_len):.0%} full"
            + (f"; longer than data.seq_len: {rows.dropped} dropped, {rows.cut} cut" if rows.dropped + rows.cut else "")
            for name, rows in zip(self.source_names, self._rows, strict=True)
            if isinstance(rows, RecordRows)
        ]

    def progress(self, steps: int) -> dict[str, int | float]:
        """Says what the first so many steps take of each source: `tokens_seen/NAME`, `share/NAME`, `epoch/NAME`.

        Where answers are learnt there is also `num_tokens`, of all sources. Tokens are those that the model reads, BOS
        and EOS among them; padding is none. Batches that were left out (`skipped_batches`) count for the epoch alone.
        """
        dealt, tokens = self._dealt(steps)
        seen: dict[str, int | float] = {}
        for source, name in enumerate(self.source_names):
            seen |= {
                f"tokens_seen/{name}": tokens[source],
                f"share/{name}": tokens[source] / max(1, sum(tokens)),
                f"epoch/{name}": dealt[source] * self._rows[source].copies / self._rows[source].count,
            }
        if left_out := self.number_of(steps - 1) + 1 - steps:
            seen["skipped_batches"] = left_out
        return seen | ({"num_tokens": sum(tokens)} if self._objective.name != "pretrain" else {})


def held_out_batches(config: Config, documents: list[Documents]) -> list[HostBatch]:
    """Packs held-out records into batches of the size of training's, up to `train.eval_batches` a source."""
    batches = []
    size = config.train.batch_size
    for rows in rows_of(config, documents):
        for first in range(0, min(rows.count, config.train.eval_batches * size), size):
            batch = padding(size, config.data.seq_len, config.objective)
            numbers = np.arange(first, min(first + size, rows.count))
            fill(batch, slice(len(numbers)), rows.pack(numbers))
            batches.append(batch)
    return batches
