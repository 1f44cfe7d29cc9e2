"""The rules that keep or drop a page: datatrove's filters with the configured thresholds, one for each language."""

from collections.abc import Callable

from datatrove.data import Document
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.pipeline.filters.base_filter import BaseFilter

from mixtral_jax.preparation.config import PrepareConfig
from mixtral_jax.preparation.examples import Examples
from mixtral_jax.preparation.words import STOP_WORDS, word_tokenizer


class WebRule(BaseFilter):
    """Applies a rule to documents that are not curated, with the settings of each one's language."""

    def __init__(
        self, name: str, make: Callable[[PrepareConfig, str], BaseFilter], config: PrepareConfig, out: Examples
    ):
        """Names the step and the function that makes the rule for a language."""
        super().__init__(out)  # type: ignore[arg-type]
        self.name = name
        self.stats.name = str(self)
        self._make = make
        self._config = config
        self._rules: dict[str, BaseFilter] = {}

    def filter(self, document: Document) -> bool | tuple[bool, str]:
        """Whether to keep a document, and why not."""
        if document.metadata["curated"]:
            return True
        self.stat_update("handled", value=len(document.text.encode()))
        language = document.metadata["language"]
        if language not in self._rules:
            self._rules[language] = self._make(self._config, language)
        try:
            return self._rules[language].filter(document)
        except (ZeroDivisionError, IndexError, ValueError):  # no words or no lines at all
            return False, "nothing_to_measure"


def gopher_repetition(config: PrepareConfig, language: str) -> BaseFilter:
    """The rule of Gopher's repetition for a language."""
    limits = config.gopher_repetition
    return GopherRepetitionFilter(
        dup_line_frac=limits.duplicate_lines,
        dup_para_frac=limits.duplicate_paragraphs,
        dup_line_char_frac=limits.duplicate_line_characters,
        dup_para_char_frac=limits.duplicate_paragraph_characters,
        top_n_grams=tuple(sorted(limits.top_ngrams.items())),
        dup_n_grams=tuple(sorted(limits.duplicate_ngrams.items())),
        language=word_tokenizer(config, language),
    )


def gopher_quality(config: PrepareConfig, language: str) -> BaseFilter:
    """The rule of Gopher's quality for a language."""
    limits = config.gopher_quality
    return GopherQualityFilter(
        min_doc_words=limits.min_words,
        max_doc_words=limits.max_words,
        min_avg_word_length=limits.min_mean_word_length,
        max_avg_word_length=limits.max_mean_word_length,
        max_symbol_word_ratio=limits.max_symbols_per_word,
        max_bullet_lines_ratio=limits.max_bullet_lines,
        max_ellipsis_lines_ratio=limits.max_ellipsis_lines,
        max_non_alpha_words_ratio=limits.min_alphabetic_words,  # datatrove's name says the opposite of what it does
        min_stop_words=limits.min_stop_words,
        stop_words=STOP_WORDS[language].split() if limits.min_stop_words else [],
        language=word_tokenizer(config, language),
    )


def c4(config: PrepareConfig, language: str) -> BaseFilter:
    """The rule of C4 for a language; it also drops lines."""
    limits = config.c4
    return C4QualityFilter(
        filter_no_terminal_punct=limits.terminal_punctuation,
        min_num_sentences=limits.min_sentences,
        min_words_per_line=limits.min_words_per_line,
        max_word_length=limits.max_word_length,
        filter_lorem_ipsum=limits.lorem_ipsum,
        filter_javascript=limits.javascript,
        filter_curly_bracket=limits.curly_bracket,
        filter_policy=limits.policy,
        language=word_tokenizer(config, language),
    )


def fineweb(config: PrepareConfig, language: str) -> BaseFilter:
    """The rule of FineWeb for a language."""
    limits = config.fineweb
    return FineWebQualityFilter(
        line_punct_thr=limits.min_punctuated_lines,
        short_line_thr=limits.max_short_lines,
        short_line_length=limits.short_line,
        char_duplicates_ratio=limits.max_duplicate_line_characters,
        new_line_ratio=limits.max_lines_per_word,
        language=word_tokenizer(config, language),
    )
