"""The tokenizer of a release: a sentencepiece model, and the tokens that a fine-tune put behind its pieces."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from mixtral_jax.config import UserError
from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.weights.released_keys import read_object

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.model.v3", "tokenizer.model.v2", "tokenizer.model.v1")


def read_tokenizer(directory: Path, rows: int, named: Tokenizer | None = None) -> Tokenizer:
    """Reads a release's tokenizer, with its added tokens.

    Args:
        directory: of the release.
        rows: of the embedding; there may be more than tokens, not fewer.
        named: the user's choice instead of the directory's; the added tokens join it where they follow on its pieces.

    Raises:
        UserError: no tokenizer, one that does not fit, or added tokens that cannot be read.
    """
    added = _added_tokens(directory)
    if named is not None and named.vocab_size > rows:
        raise UserError(
            f"the tokenizer that data.tokenizer names has {named.vocab_size} tokens, but the vocabulary of {directory} "
            f"{rows}: name the model's own"
        )
    if named is not None:
        longer = _extend(named.model_bytes, added)
        return Tokenizer(longer) if longer and Tokenizer(longer).vocab_size <= rows else named
    sizes: dict[str, str] = {}
    for name in TOKENIZER_FILES:
        if (directory / name).is_file():
            tokenizer = Tokenizer((directory / name).read_bytes(), str(directory / name))
            longer = _extend(tokenizer.model_bytes, added)
            fitting = Tokenizer(longer) if longer else tokenizer
            if fitting.vocab_size == rows or (fitting.added_tokens and fitting.vocab_size < rows):
                return fitting
            more = f" and {len(fitting.added_tokens)} added tokens" if fitting.added_tokens else ""
            sizes[name] = f"{tokenizer.vocab_size} pieces{more}"
    choices = "name one with data.tokenizer=, a sentencepiece file, mixtral or mixtral-v3"
    if not sizes:
        raise UserError(f"{directory} has no tokenizer.model: {choices}")
    name, size = next(iter(sizes.items()))
    raise UserError(
        f"{directory / name} has {size} but the model's vocabulary {rows}: replace it by the model's own, or {choices}"
    )


def _extend(model_bytes: bytes, added: dict[int, str]) -> bytes | None:
    """Appends tokens to a sentencepiece model; None when they do not follow on its pieces, or call them otherwise."""
    described = sentencepiece_model_pb2.ModelProto.FromString(model_bytes)  # type: ignore[attr-defined]  # made on import
    size = len(described.pieces)
    new = sorted(number for number in added if number >= size)
    texts = [piece.piece for piece in described.pieces] + [added[number] for number in new]
    follow_on = len(texts) == max([size - 1, *new]) + 1 and len({*texts}) == len(texts)
    if not follow_on or any(texts[number] != text for number, text in added.items()):
        return None
    described.trainer_spec.vocab_size = size  # what lies behind was added, see `Tokenizer`
    for number in new:
        described.pieces.add(piece=added[number], score=0.0, type=described.SentencePiece.USER_DEFINED)
    return bytes(described.SerializeToString()) if new else model_bytes


def _added_tokens(directory: Path) -> dict[int, str]:
    """Reads the added tokens of a release by id out of those files that are there, which must agree."""
    found: dict[int, str] = {}
    for name in ("added_tokens.json", "tokenizer.json", "tokenizer_config.json"):
        file = directory / name
        try:
            listed = list(_entries(name, read_object(file))) if file.exists() else []
            "".join(text for _, text, _ in listed).encode()  # half of a surrogate pair is no text
        except (KeyError, TypeError, ValueError, AttributeError):
            listed = [(None, None, {})]
        for number, text, flags in listed:
            if type(number) is not int or number < 0 or not isinstance(text, str) or not text:
                raise UserError(f"{file} does not list its added tokens as texts with numbers: copy it again")
            if found.setdefault(number, text) != text:
                raise UserError(
                    f"{file} calls token {number} {text!r:.60}, not {found[number]!r:.60}: copy all files again"
                )
            if number > 2 and (wide := [flag for flag in ("lstrip", "rstrip", "single_word") if flags.get(flag)]):
                raise UserError(f"{file} gives token {text!r:.60} {wide[0]}=true, which is not read: set it to false")
    return found


def _entries(name: str, content: dict[str, Any]) -> Iterator[tuple[Any, Any, dict[str, Any]]]:
    """Lists number, text and flags of the added tokens in a file of this name."""
    if name == "added_tokens.json":
        yield from ((number, text, {}) for text, number in content.items())
    elif name == "tokenizer.json":
        yield from ((token["id"], token["content"], token) for token in content.get("added_tokens") or [])
    else:
        decoder = content.get("added_tokens_decoder") or {}
        yield from ((int(number), token["content"], token) for number, token in decoder.items())
