"""The configuration of `python -m mixtral_jax prepare`; every key is documented where it is declared."""

import dataclasses
import re
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Literal

from omegaconf import MISSING

from mixtral_jax.config import TRAINED
from mixtral_jax.config_checks import require
from mixtral_jax.config_loading import parse_structured, read_config_file


@dataclass(frozen=True)
class PrepareSource:
    """One source of documents."""

    name: str = MISSING  # appears in the report; letters, digits, dot, dash and underscore
    # File, directory or glob, local or a URL that fsspec opens (s3://, https://): warc, wet, html, jsonl, parquet, txt,
    # md; all but parquet also compressed, which their first bytes tell.
    path: str = MISSING
    text_field: str = "text"  # field of a record (jsonl, parquet) that holds the text
    language: str = ""  # of all its documents; empty: identified for each document
    curated: bool = False  # good text, such as books: spared the URL and quality rules
    lines: bool = False  # every line of a text file is a document; else the file is one


@dataclass(frozen=True)
class ExtractionConfig:
    """HTML to readable text."""

    extractor: Literal["resiliparse", "trafilatura"] = "resiliparse"  # fast, or slower and choosier
    max_megabytes: int = 10  # of one page or record; larger ones are skipped and counted
    # Seconds for one page, after which it is skipped and counted. Generous, for what a clock decides is not the same
    # on every machine.
    timeout: float = 60.0


@dataclass(frozen=True)
class UrlFilterConfig:
    """Drops pages by their address."""

    enabled: bool = True  # switches the step
    bundled_lists: bool = True  # datatrove's lists of 4.6 million adult and malicious domains, and of words
    domains: list[str] = field(default_factory=list)  # further domains
    words: list[str] = field(default_factory=list)  # further words, one of which in an address is enough
    max_soft_words: int = 1  # words of datatrove's list of doubtful ones that an address may hold


@dataclass(frozen=True)
class LanguageConfig:
    """Identifies the language of a document."""

    keep: list[str] = field(default_factory=lambda: ["en", "fr", "de", "es", "it"])  # ISO 639-1; the others are dropped
    min_probability: float = 0.65  # of the identified language


@dataclass(frozen=True)
class GopherRepetitionConfig:
    """Drops repetitive documents (arXiv 2112.11446, table A1); a share is the most that is allowed; 0: not checked."""

    enabled: bool = True  # switches the step
    duplicate_lines: float = 0.3  # share of the lines that came before
    duplicate_paragraphs: float = 0.3  # the same of paragraphs
    duplicate_line_characters: float = 0.2  # share of the characters that is in lines that came before
    duplicate_paragraph_characters: float = 0.2  # the same of paragraphs
    # By n: share of the characters in the most frequent n-gram.
    top_ngrams: dict[int, float] = field(default_factory=lambda: {2: 0.2, 3: 0.18, 4: 0.16})
    # By n: share of the characters in n-grams that came before.
    duplicate_ngrams: dict[int, float] = field(
        default_factory=lambda: {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.1}
    )


@dataclass(frozen=True)
class GopherQualityConfig:
    """Drops what does not look like prose (arXiv 2112.11446, section A.1.1); a limit of 0 is not checked."""

    enabled: bool = True  # switches the step
    min_words: int = 50  # of a document
    max_words: int = 100000  # of a document
    min_mean_word_length: float = 3.0  # characters
    max_mean_word_length: float = 10.0  # characters
    max_symbols_per_word: float = 0.1  # of # and of ellipses
    max_bullet_lines: float = 0.9  # share of the lines
    max_ellipsis_lines: float = 0.3  # share of the lines
    min_alphabetic_words: float = 0.8  # share of the words with a letter
    min_stop_words: int = 2  # different ones of the language


@dataclass(frozen=True)
class C4Config:
    """Drops lines and pages as C4 did (arXiv 1910.10683)."""

    enabled: bool = True  # switches the step
    min_sentences: int = 5  # of a page
    min_words_per_line: int = 3  # shorter lines go
    max_word_length: int = 1000  # characters; a line with a longer word goes
    terminal_punctuation: bool = False  # lines that do not end a sentence go: C4 did so, FineWeb does not
    lorem_ipsum: bool = True  # pages with it go
    javascript: bool = True  # lines that mention it go
    curly_bracket: bool = True  # pages with one go
    policy: bool = True  # lines about cookies and terms of use go


@dataclass(frozen=True)
class FineWebConfig:
    """Drops lists and boilerplate (arXiv 2406.17557)."""

    enabled: bool = True  # switches the step
    min_punctuated_lines: float = 0.12  # share of the lines that end with punctuation
    max_short_lines: float = 0.67  # share of the lines
    short_line: int = 30  # characters of a line that counts as short
    max_duplicate_line_characters: float = 0.01  # share of the characters in lines that came before
    max_lines_per_word: float = 0.3  # more: a list


@dataclass(frozen=True)
class DecontaminationConfig:
    """Drops documents that share words in a row with evaluation sets."""

    # Files or globs: each line of a text file, and each string in a record of a jsonl file, is protected.
    files: list[str] = field(default_factory=list)
    ngram: int = 12  # words in a row that are too many


@dataclass(frozen=True)
class ExactDedupConfig:
    """Keeps one of several documents with the same text."""

    enabled: bool = True  # switches the step


@dataclass(frozen=True)
class MinhashConfig:
    """Keeps one of several similar documents: they share all hashes of some bucket."""

    enabled: bool = True  # switches the step
    ngram: int = 5  # words of a shingle; characters where a script writes no spaces
    buckets: int = 14  # more find more pairs; similarity of a pair found every second time: (1/buckets)^(1/hashes)
    hashes_per_bucket: int = 8  # more ask for more similarity


@dataclass(frozen=True)
class PiiConfig:
    """Replaces what may identify a person."""

    enabled: bool = True  # switches the step
    emails: bool = True  # by addresses at example.com
    ips: bool = True  # public ones, by addresses that belong to nobody


@dataclass(frozen=True)
class ExecutorConfig:
    """Where the work runs; none of it changes the result."""

    kind: Literal["local", "slurm", "ray"] = "local"  # this machine, or datatrove's executors for a cluster
    workers: int = 0  # tasks at a time; 0: one a core (local), no limit (slurm, ray)
    memory_gb: int = 4  # of a task; slurm and ray
    partition: str = ""  # slurm
    time: str = "24:00:00"  # slurm: limit of a task
    setup: str = ""  # slurm: shell command before each task, such as `source venv/bin/activate`


@dataclass(frozen=True)
class PrepareConfig:
    """A whole preparation."""

    output: str = MISSING  # directory of everything that is written
    sources: list[PrepareSource] = field(default_factory=list)  # what to read, see sources[]
    tokenizer: str = "mixtral"  # a sentencepiece file, `mixtral` (v1, 32000) or `mixtral-v3` (32768)
    # Of the mixture that sources.yaml proposes: a language's weight is its tokens to the power of 1 / temperature.
    temperature: float = 1.0
    # Input of one task, in files of one source; what is finished by the task is not done again after an interruption.
    shard_megabytes: int = 256
    # How the quality rules find words: spaCy as in the published thresholds, or a regular expression, 2 to 40 times
    # faster by the rule, which shifts a few decisions.
    words: Literal["spacy", "regex"] = "spacy"
    extraction: ExtractionConfig = field(default_factory=ExtractionConfig)
    url_filter: UrlFilterConfig = field(default_factory=UrlFilterConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    gopher_repetition: GopherRepetitionConfig = field(default_factory=GopherRepetitionConfig)
    gopher_quality: GopherQualityConfig = field(default_factory=GopherQualityConfig)
    c4: C4Config = field(default_factory=C4Config)
    fineweb: FineWebConfig = field(default_factory=FineWebConfig)
    decontamination: DecontaminationConfig = field(default_factory=DecontaminationConfig)
    exact_dedup: ExactDedupConfig = field(default_factory=ExactDedupConfig)
    minhash: MinhashConfig = field(default_factory=MinhashConfig)
    pii: PiiConfig = field(default_factory=PiiConfig)
    executor: ExecutorConfig = field(default_factory=ExecutorConfig)


SHARES = (
    "language.min_probability", "gopher_repetition.duplicate_lines", "gopher_repetition.duplicate_paragraphs",
    "gopher_repetition.duplicate_line_characters", "gopher_repetition.duplicate_paragraph_characters",
    "gopher_repetition.top_ngrams", "gopher_repetition.duplicate_ngrams", "gopher_quality.max_bullet_lines",
    "gopher_quality.max_ellipsis_lines", "gopher_quality.min_alphabetic_words", "fineweb.min_punctuated_lines",
    "fineweb.max_short_lines", "fineweb.max_duplicate_line_characters",
)  # fmt: skip
# A preparation may go on with other values of these: they do not change what is written.
RESUMABLE_KEYS = ("output", "temperature", "executor")


def load_prepare_config(path: str | Path, overrides: list[str] | None = None) -> PrepareConfig:
    """Reads a YAML file, applies dotted overrides and validates the result.

    Args:
        path: the YAML file; it says only what differs from the defaults.
        overrides: `section.key=value`, the value in YAML syntax.

    Returns:
        The validated configuration.

    Raises:
        UserError: unreadable file, unknown key, wrong type, missing value or contradiction.
    """
    config = parse_structured(PrepareConfig, read_config_file(path), overrides, where=str(path))
    validate(config)
    return config


def validate(config: PrepareConfig) -> None:
    """Raises `UserError` for values that contradict each other or cannot be."""
    require(bool(config.output), "output is empty: name the directory to write")
    require(bool(config.sources), "sources is empty: name at least one source of documents")
    require(bool(config.language.keep), "language.keep is empty: name at least one language, such as en")
    names = [source.name for source in config.sources]
    for source in config.sources:
        require(
            bool(re.fullmatch(r"[\w.-]+", source.name)),
            f"the source name '{source.name}' has other characters than letters, digits, dot, dash and underscore: "
            "change it",
        )
        require(names.count(source.name) == 1, f"sources names '{source.name}' twice: give each source its own name")
        require(
            not source.language or source.language in config.language.keep,
            f"source '{source.name}' is in '{source.language}', which language.keep drops: add it there",
        )
    for name in ("shard_megabytes", "extraction.max_megabytes", "extraction.timeout", "decontamination.ngram",
                 "temperature", "minhash.ngram", "minhash.buckets", "minhash.hashes_per_bucket", "executor.memory_gb",
                 "c4.max_word_length", "gopher_quality.max_words"):  # fmt: skip
        value = attrgetter(name)(config)
        require(0 < value < float("inf"), f"{name} is {value}: it must be greater than 0")
    for name in SHARES:
        value = attrgetter(name)(config)
        for share in value.values() if isinstance(value, dict) else [value]:
            require(0 <= share <= 1, f"{name} is {value}: it is a share from 0 to 1")
    require(config.executor.workers >= 0, f"executor.workers is {config.executor.workers}: it must be 0 or more")
    require(
        config.tokenizer not in TRAINED,
        f"tokenizer={config.tokenizer} is not for prepare: it names mixtral, mixtral-v3 or a file",
    )
    if config.executor.kind == "slurm":
        require(bool(config.executor.partition), "executor.partition is empty: name a partition of the cluster")


def result_settings(config: PrepareConfig) -> dict[str, object]:
    """The settings that decide what is written."""
    return {key: value for key, value in dataclasses.asdict(config).items() if key not in RESUMABLE_KEYS}
