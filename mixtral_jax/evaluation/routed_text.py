"""A stretch of text, token by token, with the experts that each was sent to."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Integer

from mixtral_jax.data.splits import Documents
from mixtral_jax.evaluation.scoring import Route
from mixtral_jax.evaluation.windows import Window, batch_of

Decode = Callable[[np.ndarray], str]

SAMPLE_TOKENS = 400  # of each source, on the page of coloured text


@dataclass(frozen=True)
class RoutedText:
    """A stretch of text and where each of its tokens went."""

    name: str
    pieces: list[str]  # text of each token; together they are the text
    experts: Integer[np.ndarray, "tokens layers k"]


def route_sample(route: Route, documents: Documents, decode: Decode, length: int) -> RoutedText:
    """Routes the begin of a source's first document that is long enough, or of its longest.

    Args:
        route: see `Route`.
        documents: the source.
        decode: turns tokens into text.
        length: tokens of the row; of them at most `SAMPLE_TOKENS` are shown.
    """
    sizes = [len(documents.tokens(index)) for index in range(min(documents.num_documents, 1000))]
    wanted = min(length, SAMPLE_TOKENS)
    index = next((i for i, size in enumerate(sizes) if size >= wanted), int(np.argmax(sizes)))
    tokens = documents.tokens(index)[:wanted]
    batch = batch_of([[Window(index, tokens, np.zeros(len(tokens), bool), len(tokens))]], 1, length)
    return RoutedText(documents.name, decode_pieces(decode, tokens), route(batch).experts[0, : len(tokens)])


def decode_pieces(decode: Decode, tokens: Integer[np.ndarray, " tokens"]) -> list[str]:
    """Gives each token its part of the decoded text; the last token of a character of several gets all of it."""
    pieces, written = [], 0
    for end in range(1, len(tokens) + 1):
        text = decode(tokens[:end])
        part = text[written:]
        if part.endswith("\N{REPLACEMENT CHARACTER}") and end < len(tokens):  # a character that is not yet whole
            part = ""
        pieces.append(part)
        written += len(part)
    return pieces
