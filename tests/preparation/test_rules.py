"""Every threshold and switch of the rules from both sides: what is just allowed stays, what is just too much goes."""

from dataclasses import replace
from typing import Any

import pytest
from datatrove.data import Document

from mixtral_jax.preparation import rules
from mixtral_jax.preparation.config import (
    C4Config,
    FineWebConfig,
    GopherQualityConfig,
    GopherRepetitionConfig,
    LanguageConfig,
    PrepareConfig,
    PrepareSource,
    UrlFilterConfig,
)
from mixtral_jax.preparation.examples import Examples
from mixtral_jax.preparation.language import LanguageFilter
from mixtral_jax.preparation.stages import make_stages
from mixtral_jax.preparation.url_filter import AddressFilter

# Settings that let everything pass.
OPEN = {
    "gopher_repetition": GopherRepetitionConfig(
        duplicate_lines=1.0, duplicate_paragraphs=1.0, duplicate_line_characters=1.0,
        duplicate_paragraph_characters=1.0, top_ngrams={}, duplicate_ngrams={},
    ),
    "gopher_quality": GopherQualityConfig(
        min_words=0, max_words=10**9, min_mean_word_length=0.0, max_mean_word_length=1e9, max_symbols_per_word=99.0,
        max_bullet_lines=1.0, max_ellipsis_lines=1.0, min_alphabetic_words=0.0, min_stop_words=0,
    ),
    "c4": C4Config(
        min_sentences=0, min_words_per_line=0, max_word_length=10**9, terminal_punctuation=False, lorem_ipsum=False,
        javascript=False, curly_bracket=False, policy=False,
    ),
    "fineweb": FineWebConfig(
        min_punctuated_lines=0.0, max_short_lines=1.0, short_line=0, max_duplicate_line_characters=1.0,
        max_lines_per_word=99.0,
    ),
}  # fmt: skip
TWICE = "ab cd\nef gh\nab cd\nij kl\nmn op"  # one line of five, 5 characters of 29
PARAGRAPHS = TWICE.replace("\n", "\n\n")  # one of five, 5 characters of 33
# Rule and key, a text, the value that just lets it pass and one that does not, and the reason.
LIMITS: list[tuple[str, str, str, Any, Any, str]] = [
    ("gopher_repetition", "duplicate_lines", TWICE, 0.2, 0.19, "dup_line_frac"),
    ("gopher_repetition", "duplicate_line_characters", TWICE, 0.1725, 0.172, "dup_line_char_frac"),
    ("gopher_repetition", "duplicate_paragraphs", PARAGRAPHS, 0.2, 0.19, "dup_para_frac"),
    ("gopher_repetition", "duplicate_paragraph_characters", PARAGRAPHS, 0.152, 0.151, "dup_para_char_frac"),
    ("gopher_repetition", "top_ngrams", "a b c a b d", {2: 0.546}, {2: 0.545}, "top_2_gram"),
    ("gopher_repetition", "top_ngrams", "a b c a b d", {3: 0.455}, {2: 1.0, 3: 0.454}, "top_3_gram"),
    ("gopher_repetition", "duplicate_ngrams", "a b c a b d", {2: 0.182, 3: 0.001}, {2: 0.181}, "duplicated_2_n_grams"),
    ("gopher_quality", "min_words", "one two three four .", 4, 5, "gopher_short_doc"),
    ("gopher_quality", "max_words", "one two three four .", 4, 3, "gopher_long_doc"),
    ("gopher_quality", "min_mean_word_length", "aa bbb .", 2.5, 2.6, "gopher_below_avg_threshold"),
    ("gopher_quality", "max_mean_word_length", "aa bbb .", 2.5, 2.4, "gopher_above_avg_threshold"),
    ("gopher_quality", "max_symbols_per_word", "# aa bb cc", 0.25, 0.24, "gopher_too_many_hashes"),
    ("gopher_quality", "max_symbols_per_word", "aa… bb cc", 0.25, 0.24, "gopher_too_many_ellipsis"),
    ("gopher_quality", "max_bullet_lines", "- a\n- b\n• c\nd", 0.75, 0.74, "gopher_too_many_bullets"),
    ("gopher_quality", "max_ellipsis_lines", "a...\nb\nc\nd", 0.25, 0.24, "gopher_too_many_end_ellipsis"),
    ("gopher_quality", "min_alphabetic_words", "aa bb cc 1", 0.75, 0.76, "gopher_below_alpha_threshold"),
    ("gopher_quality", "min_stop_words", "the of cat of", 2, 3, "gopher_enough_stop_words"),
    ("c4", "min_sentences", "One two. Three four.", 2, 3, "too_few_sentences"),
    ("c4", "lorem_ipsum", "Lorem ipsum dolor.", False, True, "lorem_ipsum"),
    ("c4", "curly_bracket", "if (x) {", False, True, "curly_bracket"),
    ("fineweb", "min_punctuated_lines", "a.\nb\nc\nd", 0.25, 0.26, "line_punct_ratio"),
    ("fineweb", "short_line", "12345\n123456789\n", 4, 5, "short_line_ratio"),
    ("fineweb", "max_duplicate_line_characters", TWICE, 0.2, 0.19, "char_dup_ratio"),
    ("fineweb", "max_lines_per_word", "a b c\nd e\nf", 0.34, 0.33, "list_ratio"),
]
# Rule and key, a text, a value that leaves it alone, one that takes its second line, ...
LINES: list[tuple[str, str, Any, Any]] = [
    ("min_words_per_line", "one two three\none two", 2, 3),
    ("max_word_length", "abc\nabcd", 4, 3),
    ("terminal_punctuation", "It ends.\nIt does not", False, True),
    ("javascript", "We speak.\nPlease enable JavaScript.", False, True),
    ("policy", "We speak.\nThis site uses cookies.", False, True),
]


def config(**sections: Any) -> PrepareConfig:
    settings = OPEN | sections
    return PrepareConfig(output="out", sources=[PrepareSource(name="a", path="x")], words="regex", **settings)


def verdict(section: str, text: str, **settings: Any) -> tuple[bool | tuple[bool, str], str]:
    """What a rule says to a text, and the text after it."""
    document = Document(text=text, id="x", metadata={"curated": False, "language": "en"})
    rule = rules.make_rule(section, config(**{section: replace(OPEN[section], **settings)}), "en")
    return rule.filter(document), document.text


@pytest.mark.parametrize(("section", "key", "text", "allowed", "refused", "reason"), LIMITS)
def test_limits_of_documents(section, key, text, allowed, refused, reason):
    more = {"max_short_lines": 0.4} if key == "short_line" else {}
    assert verdict(section, text, **more, **{key: allowed})[0] is True
    assert verdict(section, text, **more, **{key: refused})[0] == (False, reason)


def test_limit_of_short_lines():
    text = "123\n123\n123\n123456789"
    assert verdict("fineweb", text, short_line=3, max_short_lines=0.75)[0] is True
    assert verdict("fineweb", text, short_line=3, max_short_lines=0.74)[0] == (False, "short_line_ratio")


@pytest.mark.parametrize(("key", "text", "allowed", "refused"), LINES)
def test_limits_of_lines(key, text, allowed, refused):
    assert verdict("c4", text, **{key: allowed}) == (True, text)
    assert verdict("c4", text, **{key: refused}) == (True, text.split("\n")[0])


def steps(settings: PrepareConfig) -> list[Any]:
    return [step for stage in make_stages(settings, 1) for step in stage.make()]


def test_each_step_runs_its_own_rule(tmp_path):
    """With the defaults of one rule and the others open, a text that this one refuses is refused for its reason."""
    bad = {
        "gopher_repetition": ("the same words again and again. " * 20, "top_2_gram"),
        "gopher_quality": ("Too short.", "gopher_short_doc"),
        "c4": ("One sentence.", "too_few_sentences"),
        "fineweb": ("no end of a line here\n" * 3, "line_punct_ratio"),
    }
    for section, (text, reason) in bad.items():
        settings = config(**{section: type(OPEN[section])()})
        found = [step for step in steps(replace(settings, output=str(tmp_path))) if isinstance(step, rules.WebRule)]
        assert [rule.name for rule in found] == list(bad)
        for rule in found:
            document = Document(text=text, id="x", metadata={"curated": False, "language": "en"})
            assert rule.filter(document) == ((False, reason) if rule.name == section else True)
            document.metadata["curated"] = True
            assert rule.filter(document) is True


SWITCHES = ("url_filter", "gopher_repetition", "gopher_quality", "c4", "fineweb", "exact_dedup", "minhash", "pii")


@pytest.mark.parametrize("section", SWITCHES)
def test_each_step_has_a_switch(section, tmp_path):
    settings = replace(config(url_filter=UrlFilterConfig(bundled_lists=False)), output=str(tmp_path))
    off = replace(settings, **{section: replace(getattr(settings, section), enabled=False)})
    without = {step.name for step in steps(settings)} - {step.name for step in steps(off)}
    assert section in without
    assert not set(SWITCHES) & without - {section}


def test_addresses(tmp_path):
    def verdict(url: str, **settings: Any) -> bool | tuple[bool, str]:
        rule = AddressFilter(UrlFilterConfig(bundled_lists=False, **settings), Examples(tmp_path))
        rule.soft_banned_words = {"one", "two"}
        return rule.filter(Document(text="x", id="x", metadata={"url": url, "curated": False}))

    both = "http://example.org/one-two"
    assert verdict(both, max_soft_words=2) is True
    assert verdict(both, max_soft_words=1) == (False, "soft_blacklisted")
    assert verdict("http://example.org/one-three", max_soft_words=1) is True
    assert verdict("http://a.example.org/x", domains=["example.org"]) == (False, "own_domain")
    assert verdict("http://a.example.org/x", domains=["a.example.org"]) == (False, "own_domain")
    assert verdict("http://b.example.org/x", domains=["a.example.org"]) is True


def test_least_probability_of_a_language(tmp_path):
    def verdict(least: float) -> bool | tuple[bool, str]:
        document = Document(text="Haus und the house", id="x", metadata={"language": ""})
        return LanguageFilter(LanguageConfig(min_probability=least, keep=["en", "de"]), Examples(tmp_path)).filter(
            document
        )

    below, above = 0.0, 1.0
    for _ in range(40):
        middle = (below + above) / 2
        below, above = (middle, above) if verdict(middle) is True else (below, middle)
    assert 0.5 < below < 0.999
    assert verdict(above) == (False, "uncertain")
