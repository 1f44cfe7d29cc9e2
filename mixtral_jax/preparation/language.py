"""Language identification by py3langid, whose model comes with the package."""

from functools import lru_cache

from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter
from py3langid.langid import MODEL_FILE, LanguageIdentifier

from mixtral_jax.preparation.config import LanguageConfig
from mixtral_jax.preparation.examples import Examples

CHARACTERS = 20_000  # of a document that are looked at


@lru_cache
def _identifier() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


class LanguageFilter(BaseFilter):
    """Notes the language of each document and drops those in others than the ones to keep."""

    name = "language"

    def __init__(self, config: LanguageConfig, out: Examples):
        """Takes the languages to keep and the least probability."""
        super().__init__(out)  # type: ignore[arg-type]
        self._config = config

    def filter(self, document: Document) -> bool | tuple[bool, str]:
        """Whether to keep a document; a language that its source declares is believed."""
        if document.metadata["language"]:
            return True
        language, probability = _identifier().classify(document.text[:CHARACTERS])
        if probability < self._config.min_probability:
            return False, "uncertain"
        if language not in self._config.keep:
            return False, f"language_{language}"
        document.metadata["language"] = language
        return True
