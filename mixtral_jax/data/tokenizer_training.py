"""Trains a sentencepiece model on a bounded sample of the sources."""

import hashlib
import io
import json
import re
from collections.abc import Iterator

import sentencepiece

from mixtral_jax.config import DataConfig, SourceConfig, UserError
from mixtral_jax.console import make_console
from mixtral_jax.data.cache_files import cache_directory, locked, write_file
from mixtral_jax.data.sources import document_parts, no_text, source_files, source_fingerprint

RECIPE = 1  # raise it when the sample or the settings below change
SAMPLE = 24 << 20  # characters of all sources together; trains in about ten seconds
PIECE = 1 << 12  # characters that the trainer sees as one sentence
# Tokens 3 to 9 of Mixtral's third tokenizer, which its template for chats with tools needs.
V3_CONTROLS = ("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
               "[/TOOL_RESULTS]")  # fmt: skip
RESERVED = re.compile("[\0\u2585]+")  # the trainer drops a whole sentence that holds its own mark, U+2585


def train_model(data: DataConfig, vocab_size: int) -> bytes:
    """Trains a byte-pair model like Mixtral's on the sources, or takes it from the cache.

    Bytes stand in for rare characters, digits are single, white space is kept as it is: decoding gives the text back.
    Training is deterministic.

    Args:
        data: the sources, the cache's directory, and `tokenizer`: with `train-v3` it has Mixtral's control tokens.
        vocab_size: tokens of the model, exactly.

    Returns:
        The serialized sentencepiece model.

    Raises:
        UserError: too little text for so many tokens, or too small a vocabulary for the text.
    """
    controls = V3_CONTROLS if data.tokenizer == "train-v3" else ()
    facts = [RECIPE, vocab_size, [(source_fingerprint(source), source.weight) for source in data.sources], *controls]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]
    target = cache_directory(data.cache_dir) / f"tokenizer-{key}.model"
    with locked(target):
        if not target.exists():
            with make_console().status(f"training a tokenizer of {vocab_size} tokens on the sources"):
                write_file(target, _train(data, vocab_size, controls))
        return target.read_bytes()


def _train(data: DataConfig, vocab_size: int, controls: tuple[str, ...]) -> bytes:
    total = sum(source.weight for source in data.sources)
    # A list, for an error inside of an iterator would reach us as the trainer's.
    sample = [piece for source in data.sources for piece in _sample(source, int(SAMPLE * source.weight / total))]
    if not any(map(str.strip, sample)):
        raise no_text(data.sources[0])
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample), model_writer=model, model_type="bpe", vocab_size=vocab_size,
            unk_id=0, bos_id=1, eos_id=2, pad_id=-1, control_symbols=list(controls), byte_fallback=True,
            split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True, character_coverage=0.9999, max_sentence_length=8 * PIECE,
            num_threads=2,  # stands in the model, so a fixed number keeps its bytes the same everywhere
            minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        found = re.search(r"(too high).* <= (\d+)|(smaller than).* vs (\d+)", str(error))
        if found is None:
            raise
        few, limit = bool(found[1]), found[2] or found[4]
        wrong = (
            f"the sources hold text for {limit} tokens, not model.vocab_size={vocab_size}: lower model.vocab_size to "
            f"{limit} or add text"
            if few
            else f"model.vocab_size={vocab_size} is too small for the characters of the sources: raise it to at least "
            f"{limit}"
        )
        raise UserError(f"data.tokenizer={data.tokenizer}: {wrong}") from None
    return model.getvalue()


def _sample(source: SourceConfig, budget: int) -> Iterator[str]:
    """The first characters of every file of a source: the same number of each as far as they go."""
    files_left = max(1, len(source_files(source))) if source.path else 1
    for documents in document_parts(source):
        share = left = budget // files_left
        for document in documents:
            for start in range(0, min(len(document), left), PIECE):
                yield from filter(None, RESERVED.split(document[start : min(start + PIECE, left)]))
            left -= min(len(document), left)
            if not left:
                break
        budget -= share - left
        files_left -= 1
