"""Text to token ids and back: a sentencepiece model, from a file, from a package or trained on the sources."""

import hashlib
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece
from google.protobuf.message import DecodeError
from jaxtyping import Bool, Int32, Int64, Integer
from sentencepiece import sentencepiece_model_pb2

from mixtral_jax.config import TRAINED, DataConfig, UserError
from mixtral_jax.data.cache_files import write_file
from mixtral_jax.data.tokenizer_training import train_model

SPACE = "\u2581"  # how sentencepiece writes a space
# Files inside the wheel of mistral-common.
BUNDLED = {"mixtral": "tokenizer.model.v1", "mixtral-v3": "mistral_instruct_tokenizer_240323.model.v3"}
CHUNK = 1 << 14  # characters of a long document that are encoded at once
GROUP = 256  # chunks whose tokens are Python numbers at the same time
LONE_SPACE = re.compile(rf"(?<=[^\s{SPACE}]) (?=\w)")


class Tokenizer:
    """A sentencepiece model.

    `decode(encode(text)) == text` for every text without U+2581, which sentencepiece takes for a space, if the model
    neither normalizes nor lacks byte fallback (Mixtral's do not, nor do those trained here).

    Tokens that a fine-tune added behind the trained pieces stand for their text wherever it is spelled out, and what
    follows them is encoded like a text of its own, with a space before it, as Hugging Face's libraries do for Mixtral.
    """

    def __init__(self, model_bytes: bytes, where: str = "the tokenizer"):
        """Loads a serialized model.

        Args:
            model_bytes: content of a sentencepiece `.model` file.
            where: what to call it in an error.

        Raises:
            UserError: it is no sentencepiece model, or one without the tokens that begin and end a document.
        """
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model_bytes)
            described = sentencepiece_model_pb2.ModelProto.FromString(model_bytes)  # type: ignore[attr-defined]  # made on import
            pieces: list[str] = [self._processor.id_to_piece(index) for index in range(len(described.pieces))]
        except (RuntimeError, UnicodeDecodeError, DecodeError):
            pieces = []
        if not pieces:
            raise UserError(f"{where} is not a sentencepiece model: set data.tokenizer to a tokenizer.model file")
        self.model_bytes = model_bytes
        self.fingerprint = hashlib.sha256(model_bytes).hexdigest()
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        self.unk_id: int = self._processor.unk_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise UserError(f"{where} has no token for the begin or the end of a document: use one with both")
        ids = range(self.vocab_size)
        silent = [self._processor.is_control(index) for index in ids]
        byte = [self._processor.is_byte(index) or self._processor.is_unknown(index) for index in ids]
        behind = range(described.trainer_spec.vocab_size, self.vocab_size)
        user_defined = described.SentencePiece.USER_DEFINED
        self.added_tokens = {pieces[index]: index for index in behind if described.pieces[index].type == user_defined}
        longest_first = sorted(self.added_tokens, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, longest_first))})").split if longest_first else None
        # UTF-8 bytes of text that a token stands for (an unknown character counts as one), and which begin a word.
        self.token_bytes: Int64[np.ndarray, vocab] = np.array(
            [
                0 if quiet else 1 if single else len(piece.replace(SPACE, " ").encode())
                for piece, quiet, single in zip(pieces, silent, byte, strict=True)
            ],
            dtype=np.int64,
        )
        self.begins_word: Bool[np.ndarray, vocab] = np.array([piece.startswith(SPACE) for piece in pieces])
        # A long text may be cut at a lone space, which the space that the model puts before every text replaces, if no
        # piece reaches over the cut.
        self._cuttable = not any(re.search(f"[^{SPACE}]{SPACE}", piece) for piece in pieces) and (
            self.encode("a b") == self.encode("a") + self.encode("b")
        )

    @classmethod
    def from_file(cls, path: str | Path) -> "Tokenizer":
        """Loads a sentencepiece `.model` file; `UserError` when there is none."""
        try:
            data = Path(path).expanduser().read_bytes()
        except OSError as error:
            choices = ", ".join([*BUNDLED, *TRAINED])
            raise UserError(
                f"cannot read the tokenizer {path}: {error.strerror}; set data.tokenizer to a sentencepiece file or "
                f"one of {choices}"
            ) from None
        return cls(data, f"the tokenizer {path}")

    def has_control(self, piece: str) -> bool:
        """Whether a control token of this name is in the vocabulary."""
        return self.control_id(piece) is not None

    def control_id(self, piece: str) -> int | None:
        """Returns the id of a control token, None where the vocabulary has none of this name."""
        index = self._processor.piece_to_id(piece)
        return index if index != self.unk_id and self._processor.is_control(index) else None

    def describe(self, token: int) -> tuple[str, bytes]:
        """Returns a token as text and the bytes of text that it stands for; a control token stands for none.

        A model may have more tokens than its tokenizer; those stand for nothing.
        """
        if token >= self.vocab_size:
            return f"<{token}>", b""
        piece: str = self._processor.id_to_piece(token)
        if self._processor.is_control(token) or self._processor.is_unknown(token):
            return piece, b""
        if self._processor.is_byte(token):  # <0x41>
            data = bytes([int(piece[1:-1], 16)])
        else:
            data = piece.replace(SPACE, " ").encode()
        return data.decode(errors="replace"), data

    def save(self, path: str | Path) -> None:
        """Writes the model as a sentencepiece file, whole or not at all."""
        write_file(Path(path), self.model_bytes)

    def encode(self, text: str) -> list[int]:
        """Encodes a text without BOS and EOS; control tokens written out in the text stay text."""
        return [
            token
            for part in self._parts(text)
            for token in ([self.added_tokens[part]] if part in self.added_tokens else self._processor.encode(part))
        ]

    def _parts(self, text: str) -> list[str]:
        """Cuts a text before and after every added token."""
        return [part for part in self._split(text) if part] if self._split else [text]

    def encode_batch(self, texts: Sequence[str], threads: int = 0) -> list[Int32[np.ndarray, "_"]]:
        """Encodes texts like `encode`, on so many threads, or on all cores (0).

        The threads are the library's own, so nothing is copied between processes. Long texts are cut where that does
        not change the result: it keeps all cores at work and is faster (merging takes longer than linear time).
        """
        chunks: list[str] = []
        counts: list[int] = []
        for text in texts:
            cut = [
                chunk
                for part in self._parts(text) or [""]
                for chunk in (_cut(part) if self._cuttable and part not in self.added_tokens else [part])
            ]
            chunks += cut
            counts.append(len(cut))
        encoded = self._encode_chunks(chunks, threads or _cores())
        return [np.concatenate([next(encoded) for _ in range(count)]) for count in counts]

    def _encode_chunks(self, chunks: list[str], threads: int) -> Iterator[Int32[np.ndarray, "_"]]:
        for start in range(0, len(chunks), GROUP):
            group = chunks[start : start + GROUP]
            for chunk, ids in zip(group, self._processor.encode(group, num_threads=threads), strict=True):
                yield np.array([self.added_tokens[chunk]] if chunk in self.added_tokens else ids, np.int32)

    def decode(self, ids: Sequence[int] | Integer[np.ndarray, " tokens"]) -> str:
        """Turns tokens into text; control tokens vanish, and those that only the model has."""
        return self._processor.decode([int(token) for token in ids if token < self.vocab_size])


def load_tokenizer(data: DataConfig, vocab_size: int) -> Tokenizer:
    """Loads, or trains, the tokenizer that the configuration names.

    Args:
        data: `tokenizer` is a file, `mixtral`, `mixtral-v3`, `train` or `train-v3`; the last two use `sources`.
        vocab_size: rows of the model's embedding.

    Returns:
        The tokenizer; its vocabulary fits the model.

    Raises:
        UserError: not there, no sentencepiece model, larger than the model's vocabulary, too little text to train on.
    """
    if data.tokenizer in TRAINED:
        return Tokenizer(train_model(data, vocab_size))
    if data.tokenizer in BUNDLED:
        spec = importlib.util.find_spec("mistral_common")
        if spec is None or not spec.submodule_search_locations:
            raise UserError(
                f"data.tokenizer={data.tokenizer} comes with mistral-common, which is not installed: install it or "
                "name a sentencepiece file"
            )
        tokenizer = Tokenizer.from_file(Path(spec.submodule_search_locations[0]) / "data" / BUNDLED[data.tokenizer])
    else:
        tokenizer = Tokenizer.from_file(data.tokenizer)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"data.tokenizer={data.tokenizer} has {tokenizer.vocab_size} tokens but model.vocab_size is {vocab_size}: "
            f"set model.vocab_size={tokenizer.vocab_size} or choose a smaller tokenizer (data.tokenizer=train)"
        )
    return tokenizer


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cut(text: str) -> list[str]:
    """Cuts a text at lone spaces, which are dropped, into chunks a little longer than `CHUNK`."""
    chunks = []
    start = 0
    while len(text) - start > CHUNK and (space := LONE_SPACE.search(text, start + CHUNK)):
        chunks.append(text[start : space.start()])
        start = space.end()
    return [*chunks, text[start:]]
