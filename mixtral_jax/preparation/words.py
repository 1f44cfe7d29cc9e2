"""Words of a text: a regular expression that serves every language, spaCy's rules, and frequent words by language."""

import re

from datatrove.utils.word_tokenizers import WordTokenizer, load_word_tokenizer

from mixtral_jax.config import UserError
from mixtral_jax.preparation.config import PrepareConfig

# Characters of scripts that write no spaces between words: Thai, Lao, Tibetan, Burmese, Khmer, kana, Chinese.
UNSPACED = (
    "\u0e01-\u0e5b\u0e81-\u0edf\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3041-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
LETTERS = rf"[^\W{UNSPACED}]+"
WORD = re.compile(rf"[{UNSPACED}]|{LETTERS}(?:['\u2019-]{LETTERS})*|[^\w\s]")
SENTENCE = re.compile(r"[^.!?…]+[.!?…]*")

# Words that nearly every text of a language holds; what Gopher did for English.
STOP_WORDS = {
    "en": "the be to of and that have with",
    "fr": "le la les de et que est dans une pour",
    "de": "der die das und ist zu den mit von nicht",
    "es": "el la los de que y en una por con",
    "it": "il la di che e un per non con della",
    "nl": "de het een van en is dat niet met op",
    "pt": "o a de que e do da em para com",
}


class RegexWords(WordTokenizer):
    """Splits at white space and around punctuation; where a script writes no spaces, each character is a word."""

    def word_tokenize(self, text: str) -> list[str]:
        """The words and marks of a text."""
        return WORD.findall(text)

    def sent_tokenize(self, text: str) -> list[str]:
        """The sentences of a text."""
        return [found.strip() for found in SENTENCE.findall(text) if found.strip()]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """Begin and end of each sentence."""
        return [found.span() for found in SENTENCE.finditer(text)]

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self)

    def __hash__(self) -> int:
        return hash(type(self))


def word_tokenizer(config: PrepareConfig, language: str) -> str | WordTokenizer:
    """What datatrove's rules take for a language: its name for spaCy's rules, or the regular expression."""
    return language if config.words == "spacy" else RegexWords()


def check_languages(config: PrepareConfig) -> None:
    """Raises `UserError` for a language that the enabled rules cannot serve."""
    for language in config.language.keep:
        if config.words == "spacy":
            try:
                load_word_tokenizer(language).word_tokenize("a")
            except Exception as error:  # unknown, or it needs a package that is not there
                raise UserError(
                    f"words=spacy does not serve language.keep's '{language}' ({str(error).splitlines()[0]}): set "
                    "words=regex or leave the language out"
                ) from None
        if config.gopher_quality.enabled and config.gopher_quality.min_stop_words and language not in STOP_WORDS:
            raise UserError(
                f"gopher_quality knows no stop words of '{language}': set gopher_quality.min_stop_words=0 or leave the "
                "language out of language.keep"
            )
