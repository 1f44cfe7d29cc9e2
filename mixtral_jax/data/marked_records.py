"""Records of chats and of judged answers as tokens, each token with a mark that says whose it is."""

from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Int32, UInt8

from mixtral_jax.config import SourceConfig, UserError
from mixtral_jax.data.answers import ANSWER, WORSE, Piece
from mixtral_jax.data.chat_records import (
    Chat,
    Message,
    Record,
    RecordError,
    read_chats,
    read_judgement,
    read_preference,
)
from mixtral_jax.data.chat_template import ChatTemplate, Encoded
from mixtral_jax.data.sources import iter_records
from mixtral_jax.data.tokenizer import Tokenizer

# What a turn of each role may follow; nothing is "", an assistant's call of tools is "call".
AFTER = {
    "system": ("",),
    "user": ("", "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("call", "tool"),
}


def marked_records(
    source: SourceConfig, format: str, tokenizer: Tokenizer, on_bytes: Callable[[int], None]
) -> Iterator[Piece]:
    """Encodes the records of a source with the chat template of a tokenizer.

    Args:
        source: where they lie.
        format: of the records, see `format_of`.
        tokenizer: decides the version of the template.
        on_bytes: see `iter_documents`.

    Raises:
        UserError: a record that is no chat, by its place, with what is wrong.
    """
    template = ChatTemplate(tokenizer)
    for where, record in iter_records(source, on_bytes):
        try:
            for tokens, marks in _marked(template, record, format):
                answers = tokens[marks & ANSWER > 0]
                yield Piece(tokens, [len(tokens)], [int(tokenizer.token_bytes[answers].sum())], marks)
        except RecordError as error:
            raise UserError(f"{where}: {str(error).rstrip('.')}; fix the record or leave it out") from None


def _marked(
    template: ChatTemplate, record: Record, format: str
) -> Iterator[tuple[Int32[np.ndarray, " tokens"], UInt8[np.ndarray, " tokens"]]]:
    if format == "pairs":
        pair = read_preference(record)
        better, worse = (_answered(template, pair.prompt, answer) for answer in (pair.chosen, pair.rejected))
        if np.array_equal(better.tokens, worse.tokens):
            raise RecordError("the chosen answer is the rejected one in tokens")
        marks = np.concatenate([better.said * ANSWER, worse.said * ANSWER + WORSE])
        yield np.concatenate([better.tokens, worse.tokens]), marks.astype(np.uint8)
    elif format == "labels":
        judged = read_judgement(record)
        one = _answered(template, Chat(judged.chat.messages[:-1], judged.chat.tools), judged.chat.messages[-1:])
        yield one.tokens, (one.said * ANSWER + (0 if judged.good else WORSE)).astype(np.uint8)
    else:
        for chat in read_chats(record, format):
            encoded = _encoded(template, chat)
            yield encoded.tokens, encoded.said.astype(np.uint8)


def _encoded(template: ChatTemplate, chat: Chat) -> Encoded:
    """Encodes a conversation whose turns come in order; the template alone would join or invent some."""
    before = ""
    for message in chat.messages:
        role = message["role"]
        if role not in AFTER:
            raise RecordError(f"there is no role '{role}', only {', '.join(AFTER)}")
        if before not in AFTER[role]:
            raise RecordError(f"the roles are out of order: {role} after {before or 'nothing'}")
        before = "call" if message.get("tool_calls") else role
        text = _text_of(message)
        if before == "assistant" and not text.strip():
            raise RecordError("an answer is empty")
    if before != "assistant":
        raise RecordError("it does not end with an answer of the assistant")
    return template.encode_training(chat)


def _text_of(message: Message) -> str:
    """The words of a turn, which may come in parts; nothing of one that only calls."""
    content = message.get("content")
    parts = [{"text": content}] if isinstance(content, str) else content or []
    if content is None and not message.get("tool_calls"):
        raise RecordError(f"a turn of the role {message['role']} has no content")
    if not isinstance(parts, list) or not all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in parts):
        raise RecordError(
            f"the content of a turn of the role {message['role']} is not text, which is all the model reads"
        )
    return "".join(part["text"] for part in parts)


def _answered(template: ChatTemplate, prompt: Chat, answer: list[Message]) -> Encoded:
    """Encodes a conversation of which the last answer alone counts."""
    if len(answer) != 1:
        raise RecordError("an answer to judge must be the assistant's next words and nothing more")
    whole = _encoded(template, Chat(prompt.messages + answer, prompt.tools))
    before = template.encode_prompt(prompt)
    assert np.array_equal(whole.tokens[: len(before)], before), "the template puts answers last"
    return Encoded(whole.tokens, whole.said & (np.arange(len(whole.tokens)) >= len(before)))
