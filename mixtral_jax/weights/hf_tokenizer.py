"""A sentencepiece model in the form that Hugging Face's libraries read without a conversion of their own.

They would convert a bare `tokenizer.model` by the class that they guess, which encodes some texts differently.
"""

import json
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.weights.chat_templates import chat_template

SPACE = "\u2581"  # how sentencepiece writes a space


def is_exact(model_bytes: bytes) -> bool:
    """Whether other libraries encode with a sentencepiece model's pieces and scores what sentencepiece does.

    They do for byte pairs merged in the order of scores, without normalization and with bytes for unknown characters.
    """
    described = sentencepiece_model_pb2.ModelProto.FromString(model_bytes)  # type: ignore[attr-defined]  # made on import
    trained, normal = described.trainer_spec, described.normalizer_spec
    return bool(
        trained.model_type == trained.BPE
        and trained.byte_fallback
        and not trained.treat_whitespace_as_suffix
        and normal.name == "identity"
        and normal.add_dummy_prefix
        and normal.escape_whitespaces
        and not normal.remove_extra_whitespaces
    )


def tokenizer_files(model_bytes: bytes) -> dict[str, str]:
    """Writes `tokenizer.json`, and `tokenizer_config.json` with the chat template.

    The same tokens come out for every text that does not spell a control token. BOS stands before a text, as with the
    released models.

    Args:
        model_bytes: a sentencepiece model.

    Returns:
        The files' content by name; nothing for a kind of model that has no exact counterpart.
    """
    if not is_exact(model_bytes):
        return {}
    processor, tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model_bytes), Tokenizer(model_bytes)
    bos, eos, unk = (
        processor.id_to_piece(index) for index in (processor.bos_id(), processor.eos_id(), processor.unk_id())
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "unk_token": unk,
        "pad_token": unk,  # no text has it; EOS for padding would be left out of the loss of those who train further
        "clean_up_tokenization_spaces": False,
        "chat_template": chat_template(tokenizer),
    }
    written = {
        "tokenizer.json": _tokenizer(processor, set(tokenizer.added_tokens.values()), bos, unk),
        "tokenizer_config.json": {key: value for key, value in config.items() if value is not None},
    }
    return {name: json.dumps(content, ensure_ascii=False, indent=1) + "\n" for name, content in written.items()}


def _tokenizer(processor: sentencepiece.SentencePieceProcessor, added: set[int], bos: str, unk: str) -> dict[str, Any]:
    ids = range(processor.vocab_size())
    pieces: list[str] = [processor.id_to_piece(index) for index in ids]
    special = [index for index in ids if processor.is_control(index) or processor.is_unknown(index) or index in added]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    begin = {"SpecialToken": {"id": bos, "type_id": 0}}
    texts = [{"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB")]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": pieces[index], **flags} for index in special],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, texts[0]],
            "pair": [begin, texts[0], begin, texts[1]],
            "special_tokens": {bos: {"id": bos, "ids": [processor.bos_id()], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unk,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: index for index, piece in enumerate(pieces)},
            "merges": _merges(processor, pieces, set(special)),
        },
    }


def _merges(
    processor: sentencepiece.SentencePieceProcessor, pieces: list[str], special: set[int]
) -> list[tuple[str, str]]:
    """Lists every pair that makes a piece, the best piece first: sentencepiece merges by the score of the result."""
    ordinary = {
        piece: index
        for index, piece in enumerate(pieces)
        if index not in special and not processor.is_byte(index) and not processor.is_unused(index)
    }
    merges = []
    for piece in sorted(ordinary, key=lambda piece: -processor.get_score(ordinary[piece])):
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [pair for pair in splits if pair[0] in ordinary and pair[1] in ordinary]
        merges += sorted(known, key=lambda pair: (ordinary[pair[0]], ordinary[pair[1]]))
    return merges
