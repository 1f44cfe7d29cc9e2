"""Decontamination: documents that share words in a row with evaluation sets go.

datatrove's own index builder needs lighteval and its downloads; this one reads files, and datatrove's filter does the
rest.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.pipeline.decont import NGramsDecontConfig
from datatrove.utils.hashing import create_hash_func
from datatrove.utils.text import ngrams, simplify_text

from mixtral_jax.config import UserError
from mixtral_jax.preparation.config import DecontaminationConfig, PrepareSource
from mixtral_jax.preparation.plan import RECORDS, file_kind, list_files
from mixtral_jax.preparation.words import RegexWords


def ngram_config(config: DecontaminationConfig) -> NGramsDecontConfig:
    """datatrove's settings of the comparison."""
    return NGramsDecontConfig(n_grams=config.ngram)


def build_index(config: DecontaminationConfig, folder: Path) -> dict[str, dict[str, int]]:
    """Writes the index that datatrove's filter reads, one file for each evaluation file.

    Args:
        config: the files and the length of n-grams.
        folder: where to write.

    Returns:
        For each file the number of `texts`, and of those `too_short` to hold an n-gram, which are not protected.

    Raises:
        UserError: there are no files where the configuration says so, or one cannot be read.
    """
    settings = ngram_config(config)
    hash_text = create_hash_func(settings.hash_config)
    folder.mkdir(parents=True, exist_ok=True)
    counts: dict[str, dict[str, int]] = {}
    sources = [PrepareSource(name=f"decontamination.files: {path}", path=path) for path in config.files]
    for file in (file for source in sources for file in list_files(source)):
        hashes: set[int] = set()
        count = counts[file.name] = {"texts": 0, "too_short": 0}
        for text in _texts(Path(file.path)):
            words = RegexWords().word_tokenize(simplify_text(text, settings.norm_config))
            count["texts"] += 1
            count["too_short"] += len(words) < config.ngram
            hashes.update(hash_text(" ".join(ngram)) for ngram in ngrams(words, config.ngram))
        name = file.name.replace("/", "_").replace(" ", "_")
        np.array(sorted(hashes), np.uint64).tofile(folder / f"{name}.index.hashes")
    return counts


def _texts(path: Path) -> Iterator[str]:
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                if file_kind(path.name) in RECORDS:
                    yield from _strings(json.loads(line))
                elif line.strip():
                    yield line
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise UserError(f"decontamination.files: cannot read {path} ({error}): fix or leave out the file") from None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for member in value.values() if isinstance(value, dict) else value:
            yield from _strings(member)
