"""What tells a document, wherever it lies and whatever its file is called: a hash of it, and of a few stretches of it.

The hash of a document tells exact copies. A long document that was changed a little is told by stretches of `WINDOW`
tokens, of which one in 2**RARE is kept; which ones depends on their own tokens alone, so an edit moves no other.
"""

import hashlib
import io
import logging
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from jaxtyping import Int64, Integer, UInt64

from mixtral_jax.data.cache_files import locked, write_file
from mixtral_jax.data.token_cache import TokenCache

FORMAT = 1  # raise it when the hashes below change; records of older runs then know no document any more
WINDOW = 16  # tokens, a power of two
RARE = 10
BLOCK = 1 << 20  # tokens that are looked at together
FACTORS = np.array([0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1, 0xD3A2646D], np.uint32)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fingerprints:
    """Of the documents of one token cache."""

    documents: UInt64[np.ndarray, " documents"]
    windows: UInt64[np.ndarray, " windows"]
    window_documents: Int64[np.ndarray, " windows"]  # which document each lies in
    window_ends: Int64[np.ndarray, " windows"]  # tokens of that document up to the window's end


def hash_tokens(tokens: Integer[np.ndarray, " length"]) -> int:
    """Hashes tokens to 64 bits.

    Args:
        tokens: of the type that caches of their tokenizer have; a document's with BOS and EOS.
    """
    return int.from_bytes(hashlib.blake2b(tokens.tobytes(), digest_size=8).digest(), "little")


def fingerprints(cache: TokenCache, cache_dir: Path) -> Fingerprints:
    """Takes the fingerprints of a cache's documents, which are made once and kept in the directory of caches."""
    target = cache_dir / f"fingerprints{FORMAT}-{cache.fingerprint[:24]}.npz"
    with locked(target):
        if target.exists():
            try:
                with np.load(target) as stored:
                    return Fingerprints(**stored)
            except Exception as error:  # what zipfile and numpy raise of damaged files is no short list
                log.warning("%s is damaged (%s): making it again", target, error)
        found = make_fingerprints(cache.tokens, np.asarray(cache.document_starts))
        content = io.BytesIO()
        np.savez(content, **vars(found))
        write_file(target, content.getvalue())
    return found


def make_fingerprints(tokens: Integer[np.ndarray, " tokens"], starts: Int64[np.ndarray, " _"]) -> Fingerprints:
    """Reads documents through; about a second for 100 million tokens.

    Args:
        tokens: of one document after the other, BOS and EOS included, of the type that caches have.
        starts: where each begins, and where the last ends.
    """
    hashes = (hash_tokens(tokens[start:end]) for start, end in pairwise(starts))
    documents = np.fromiter(hashes, np.uint64, len(starts) - 1)
    blocks = range(0, len(tokens), BLOCK)
    ends = np.concatenate([_rare(tokens[place : place + BLOCK + WINDOW - 1]) + place for place in blocks])
    owners = np.searchsorted(starts, ends, side="left") - 1  # of the window's last token
    inside = ends - WINDOW >= starts[owners]
    ends, owners = ends[inside], owners[inside]
    windows = np.fromiter((hash_tokens(tokens[end - WINDOW : end]) for end in ends), np.uint64, len(ends))
    return Fingerprints(documents, windows, owners, ends - starts[owners])


def _rare(tokens: Integer[np.ndarray, " tokens"]) -> Int64[np.ndarray, " windows"]:
    """Ends of the windows to keep: those whose rolling hash begins with `RARE` zeros."""
    value = tokens.astype(np.uint32) * FACTORS[0]
    value ^= value >> 15
    width = 1
    while width < WINDOW and len(value) > width:
        value = value[:-width] * FACTORS[width.bit_length()] + value[width:]
        width *= 2
    if width < WINDOW:
        return np.zeros(0, np.int64)
    value ^= value >> 16
    return np.flatnonzero(value * FACTORS[5] >> np.uint32(32 - RARE) == 0) + WINDOW
