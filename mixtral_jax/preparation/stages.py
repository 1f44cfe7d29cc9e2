"""The stages of a preparation: each is a pipeline of datatrove, run by so many independent tasks."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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

from mixtral_jax.preparation.caches import CacheBuilder
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
from mixtral_jax.preparation.writing import TokenWriter, final_writer, stage_writer


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
        self.minhash = self.work / "minhash"
        self.token_parts = self.work / "tokens"
        self.clusters = self.work / "clusters"

    def logs(self, stage: str) -> Path:
        """datatrove's directory of a stage: logs, statistics and marks of finished tasks."""
        return self.work / "stages" / stage


def text_of(document: Document) -> str:
    """What exact duplicates have in common."""
    return document.text


def make_stages(config: PrepareConfig, num_shards: int) -> list[Stage]:
    """Lists the stages in their order."""
    exact, minhash = config.exact_dedup.enabled, config.minhash.enabled
    stages = [Stage("pages", num_shards, lambda: _pages(config))]
    if exact:
        stages.append(Stage("exact-signatures", num_shards, lambda: _exact_signatures(config)))
        stages.append(Stage("exact-duplicates", 1, lambda: _exact_duplicates(config)))
    if minhash:
        stages.append(Stage("minhash-signatures", num_shards, lambda: _minhash_signatures(config)))
        stages.append(Stage("minhash-buckets", config.minhash.buckets, lambda: _minhash_buckets(config)))
        stages.append(Stage("minhash-clusters", 1, lambda: _minhash_clusters(config)))
    stages.append(Stage("documents", num_shards, lambda: _documents(config)))
    stages.append(Stage("token-caches", len(config.language.keep), lambda: _token_caches(config)))
    return stages


def _pages(config: PrepareConfig) -> list[PipelineStep]:
    """Everything that looks at one document alone."""
    layout = Layout(config)

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


def _exact_signatures(config: PrepareConfig) -> list[PipelineStep]:
    layout = Layout(config)
    settings = ExactDedupConfig(content_getter=text_of)
    return [StageReader(layout.pages / "documents"), ExactDedupSignature(str(layout.exact / "signatures"), settings)]


def _exact_duplicates(config: PrepareConfig) -> list[PipelineStep]:
    layout = Layout(config)
    settings = ExactDedupConfig(content_getter=text_of)
    return [ExactFindDedups(str(layout.exact / "signatures"), str(layout.exact / "duplicates"), settings)]


def _without_exact(config: PrepareConfig, measured: bool) -> list[PipelineStep]:
    """The documents of the first stage that are left after exact deduplication."""
    layout = Layout(config)
    steps: list[PipelineStep] = [StageReader(layout.pages / "documents")]
    if config.exact_dedup.enabled:
        out = Examples(layout.examples / "exact_dedup", "duplicate") if measured else None
        settings = ExactDedupConfig(content_getter=text_of)
        duplicates = layout.exact / "duplicates"
        duplicates.mkdir(parents=True, exist_ok=True)  # there are none where nothing was found
        steps.append(ExactDedupFilter(str(duplicates), settings, out))  # type: ignore[arg-type]
        if measured:
            steps.append(Meter("exact_dedup", config.tokenizer))
    return steps


def minhash_settings(config: PrepareConfig) -> MinhashConfig:
    """datatrove's settings of the comparison."""
    settings = config.minhash
    return MinhashConfig(
        n_grams=settings.ngram, num_buckets=settings.buckets, hashes_per_bucket=settings.hashes_per_bucket
    )


def _minhash_signatures(config: PrepareConfig) -> list[PipelineStep]:
    signatures = MinhashDedupSignature(
        str(Layout(config).minhash / "signatures"),
        minhash_settings(config),
        RegexWords(),  # type: ignore[arg-type]
    )
    return [*_without_exact(config, measured=False), signatures]


def _minhash_buckets(config: PrepareConfig) -> list[PipelineStep]:
    folder = Layout(config).minhash
    settings = minhash_settings(config)
    return [MinhashDedupBuckets(str(folder / "signatures"), str(folder / "pairs"), None, settings)]


def _minhash_clusters(config: PrepareConfig) -> list[PipelineStep]:
    folder = Layout(config).minhash
    settings = minhash_settings(config)
    return [
        MinhashDedupCluster(
            str(folder / "pairs"), str(folder / "clusters"), settings, save_cluster_id=True, save_cluster_size=True
        )
    ]


def _documents(config: PrepareConfig) -> list[PipelineStep]:
    """What is left, masked, as text and as tokens."""
    layout = Layout(config)
    steps = _without_exact(config, measured=True)
    if config.minhash.enabled:
        out = Examples(layout.examples / "minhash", "similar")
        clusters = layout.minhash / "clusters"
        clusters.mkdir(parents=True, exist_ok=True)
        steps += [
            MinhashDedupFilter(str(clusters), out, load_cluster_ids=True, load_cluster_sizes=True),  # type: ignore[arg-type]
            ClusterExamples(layout.clusters),
            Meter("minhash", config.tokenizer),
        ]
    if config.pii.enabled:  # after deduplication: the masks differ between copies
        steps.append(Masking(config.pii.emails, config.pii.ips))
        steps.append(Meter("pii", config.tokenizer))
    steps += [
        final_writer(layout.output / "documents"),
        TokenWriter(layout.token_parts, config.tokenizer),
        Meter("written", config.tokenizer, lengths=True),
    ]
    return steps


def _token_caches(config: PrepareConfig) -> list[PipelineStep]:
    layout = Layout(config)
    return [CacheBuilder(layout.token_parts, layout.output / "tokens", config.language.keep, config.tokenizer)]
