"""The rules that keep or drop a page: datatrove's filters with the configured thresholds, one for each language."""

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

# By section of the configuration: datatrove's filter, and its name of each threshold.
RULES: dict[str, tuple[type[BaseFilter], dict[str, str]]] = {
    "gopher_repetition": (GopherRepetitionFilter, {
        "duplicate_lines": "dup_line_frac",
        "duplicate_paragraphs": "dup_para_frac",
        "duplicate_line_characters": "dup_line_char_frac",
        "duplicate_paragraph_characters": "dup_para_char_frac",
        "top_ngrams": "top_n_grams",
        "duplicate_ngrams": "dup_n_grams",
    }),
    "gopher_quality": (GopherQualityFilter, {
        "min_words": "min_doc_words",
        "max_words": "max_doc_words",
        "min_mean_word_length": "min_avg_word_length",
        "max_mean_word_length": "max_avg_word_length",
        "max_symbols_per_word": "max_symbol_word_ratio",
        "max_bullet_lines": "max_bullet_lines_ratio",
        "max_ellipsis_lines": "max_ellipsis_lines_ratio",
        "min_alphabetic_words": "max_non_alpha_words_ratio",  # which says the opposite of what it does
        "min_stop_words": "min_stop_words",
    }),
    "c4": (C4QualityFilter, {  # which drops lines, too
        "terminal_punctuation": "filter_no_terminal_punct",
        "min_sentences": "min_num_sentences",
        "min_words_per_line": "min_words_per_line",
        "max_word_length": "max_word_length",
        "lorem_ipsum": "filter_lorem_ipsum",
        "javascript": "filter_javascript",
        "curly_bracket": "filter_curly_bracket",
        "policy": "filter_policy",
    }),
    "fineweb": (FineWebQualityFilter, {
        "min_punctuated_lines": "line_punct_thr",
        "max_short_lines": "short_line_thr",
        "short_line": "short_line_length",
        "max_duplicate_line_characters": "char_duplicates_ratio",
        "max_lines_per_word": "new_line_ratio",
    }),
}  # fmt: skip


class WebRule(BaseFilter):
    """Applies a rule to documents that are not curated, with the settings of each one's language."""

    def __init__(self, name: str, config: PrepareConfig, out: Examples):
        """Names the rule, which the step is called after."""
        super().__init__(out)  # type: ignore[arg-type]
        self.name = name
        self.stats.name = str(self)
        self._config = config
        self._rules: dict[str, BaseFilter] = {}

    def filter(self, document: Document) -> bool | tuple[bool, str]:
        """Whether to keep a document, and why not."""
        if document.metadata["curated"]:
            return True
        self.stat_update("handled", value=len(document.text.encode()))
        language = document.metadata["language"]
        if language not in self._rules:
            self._rules[language] = make_rule(self.name, self._config, language)
        try:
            return self._rules[language].filter(document)
        except (ZeroDivisionError, IndexError, ValueError):  # no words or no lines at all
            return False, "nothing_to_measure"


def make_rule(name: str, config: PrepareConfig, language: str) -> BaseFilter:
    """Makes the rule of a name for a language."""
    limits, (make, names) = getattr(config, name), RULES[name]
    values = {theirs: getattr(limits, ours) for ours, theirs in names.items()}
    settings = {key: tuple(sorted(x.items())) if isinstance(x, dict) else x for key, x in values.items()}
    if name == "gopher_quality":
        settings["stop_words"] = STOP_WORDS[language].split() if limits.min_stop_words else []
    return make(language=word_tokenizer(config, language), **settings)
