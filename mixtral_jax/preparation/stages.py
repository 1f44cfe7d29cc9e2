"""The stages of a preparation: each is a pipeline of datatrove, run by so many independent tasks."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.decont import NGramsDecontFilter
from datatrove.pipeline.dedup import (
    ExactDedupFilter,
    ExactDedupSignature,
    ExactFindDedups,
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.dedup.exact_dedup import ExactDedupConfig

from mixtral_jax.preparation.config import PrepareConfig
from mixtral_jax.preparation.counting import Meter
from mixtral_jax.preparation.decontamination import ngram_config
from mixtral_jax.preparation.examples import ClusterExamples, Examples
from mixtral_jax.preparation.extraction import Extraction
from mixtral_jax.preparation.language import LanguageFilter
from mixtral_jax.preparation.masking import Masking
from mixtral_jax.preparation.reading import ShardReader, StageReader
from mixtral_jax.preparation.rules import RULES, WebRule
from mixtral_jax.preparation.url_filter import AddressFilter
from mixtral_jax.preparation.words import RegexWords
from mixtral_jax.preparation.writing import CacheBuilder, TokenWriter, final_writer, stage_writer


@dataclass(frozen=True)
class Stage:
    """One pipeline and the number of its tasks; a task is done again from its start when it was interrupted."""

    name: str
    tasks: int
    make: Callable[[], list[PipelineStep]]


class Layout:
    """Where everything lies below the output directory."""

    def __init__(self, config: PrepareConfig):
        """Takes the directory from the configuration."""
        self.output = Path(config.output).resolve()
        self.work = self.output / "work"
        self.pages = self.work / "pages"
        self.examples = self.work / "examples"
        self.contamination = self.work / "contamination"
        self.exact = self.work / "exact"
        self.duplicates = self.exact / "duplicates"
        self.minhash = self.work / "minhash"
        self.similar = self.minhash / "clusters"
        self.token_parts = self.work / "tokens"
        self.clusters = self.work / "clusters"

    def logs(self, stage: str) -> Path:
        """datatrove's directory of a stage: logs, statistics and marks of finished tasks."""
        return self.work / "stages" / stage


def text_of(document: Document) -> str:
    """What exact duplicates have in common."""
    return document.text


EXACT = ExactDedupConfig(content_getter=text_of)


def make_stages(config: PrepareConfig, num_shards: int) -> list[Stage]:
    """Lists the stages in their order."""
    layout = Layout(config)
    stages = [Stage("pages", num_shards, lambda: _pages(config, layout))]
    if config.exact_dedup.enabled:
        prints, copies = str(layout.exact / "signatures"), str(layout.duplicates)
        stages += [
            Stage("exact-signatures", num_shards, lambda: [_read(layout), ExactDedupSignature(prints, EXACT)]),
            Stage("exact-duplicates", 1, lambda: [ExactFindDedups(prints, copies, EXACT)]),
        ]
    if config.minhash.enabled:
        settings = minhash_settings(config)
        hashes, pairs, groups = str(layout.minhash / "signatures"), str(layout.minhash / "pairs"), str(layout.similar)
        known = {"save_cluster_id": True, "save_cluster_size": True}
        words: Any = RegexWords()
        stages += [
            Stage("minhash-signatures", num_shards, lambda: [
                *_without_exact(config, layout, measured=False), MinhashDedupSignature(hashes, settings, words)
            ]),
            Stage("minhash-buckets", settings.num_buckets, lambda: [
                MinhashDedupBuckets(hashes, pairs, config=settings)
            ]),
            Stage("minhash-clusters", 1, lambda: [MinhashDedupCluster(pairs, groups, settings, **known)]),
        ]  # fmt: skip
    caches = (layout.token_parts, layout.output / "tokens", config.language.keep, config.tokenizer)
    return [
        *stages,
        Stage("documents", num_shards, lambda: _documents(config, layout)),
        Stage("token-caches", len(config.language.keep), lambda: [CacheBuilder(*caches)]),
    ]


def minhash_settings(config: PrepareConfig) -> MinhashConfig:
    """datatrove's settings of the comparison."""
    settings = config.minhash
    return MinhashConfig(
        n_grams=settings.ngram, num_buckets=settings.buckets, hashes_per_bucket=settings.hashes_per_bucket
    )


def _read(layout: Layout) -> PipelineStep:
    return StageReader(layout.pages / "documents")


def _pages(config: PrepareConfig, layout: Layout) -> list[PipelineStep]:
    """Everything that looks at one document alone."""

    def out(step: str) -> Examples:
        return Examples(layout.examples / step)

    steps: list[PipelineStep] = [ShardReader(config, layout.pages), Meter("read")]
    if config.url_filter.enabled:
        steps += [AddressFilter(config.url_filter, out("url_filter")), Meter("url_filter")]
    steps += [Extraction(config.extraction, layout.pages), Meter("extraction", config.tokenizer)]
    steps += [LanguageFilter(config.language, out("language")), Meter("language", config.tokenizer)]
    for name in RULES:
        if getattr(config, name).enabled:
            steps += [WebRule(name, config, out(name)), Meter(name, config.tokenizer)]
    if config.decontamination.files:
        against = NGramsDecontFilter(
            str(layout.contamination),
            ngram_config(config.decontamination),
            out("decontamination"),  # type: ignore[arg-type]
            RegexWords(),  # type: ignore[arg-type]
        )
        steps += [against, Meter("decontamination", config.tokenizer)]
    return [*steps, stage_writer(layout.pages / "documents")]


def _without_exact(config: PrepareConfig, layout: Layout, measured: bool) -> list[PipelineStep]:
    """The documents of the first stage that are left after exact deduplication."""
    steps: list[PipelineStep] = [_read(layout)]
    if config.exact_dedup.enabled:
        out = Examples(layout.examples / "exact_dedup", "duplicate") if measured else None
        layout.duplicates.mkdir(parents=True, exist_ok=True)  # there are none where nothing was found
        steps.append(ExactDedupFilter(str(layout.duplicates), EXACT, out))  # type: ignore[arg-type]
        if measured:
            steps.append(Meter("exact_dedup", config.tokenizer))
    return steps


def _documents(config: PrepareConfig, layout: Layout) -> list[PipelineStep]:
    """What is left, masked, as text and as tokens."""
    steps = _without_exact(config, layout, measured=True)
    if config.minhash.enabled:
        out = Examples(layout.examples / "minhash", "similar")
        layout.similar.mkdir(parents=True, exist_ok=True)
        steps += [
            MinhashDedupFilter(str(layout.similar), out, load_cluster_ids=True, load_cluster_sizes=True),  # type: ignore[arg-type]
            ClusterExamples(layout.clusters),
            Meter("minhash", config.tokenizer),
        ]
    if config.pii.enabled:  # after deduplication: the masks differ between copies
        steps.append(Masking(config.pii.emails, config.pii.ips))
        steps.append(Meter("pii", config.tokenizer))
    return [
        *steps,
        final_writer(layout.output / "documents"),
        TokenWriter(layout.token_parts, config.tokenizer),
        Meter("written", config.tokenizer, lengths=True),
    ]
