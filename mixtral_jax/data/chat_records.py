"""Records of chats in the formats that people publish, turned into one: OpenAI's messages."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Record = Mapping[str, Any]
Message = dict[str, Any]  # role, content and, for calls and their results, tool_calls or tool_call_id

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "function_call": "call",
    "observation": "tool",
    "tool": "tool",
}


class RecordError(Exception):
    """Why a record is not a chat; it is counted, and one of a kind is shown."""


@dataclass(frozen=True)
class Chat:
    """A conversation as OpenAI's API writes it."""

    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)  # {"type": "function", "function": {...}}


@dataclass(frozen=True)
class Preference:
    """Two answers to the same conversation, of which the first is preferred."""

    prompt: Chat
    chosen: list[Message]
    rejected: list[Message]


@dataclass(frozen=True)
class Judgement:
    """One answer that was found good or not. Source: KTO, arXiv 2402.01306."""

    chat: Chat
    good: bool


def _messages(record: Record) -> Iterator[Chat]:
    yield Chat([_message(message) for message in _list(record, "messages")], _tools(record.get("tools")))


def _sharegpt(record: Record) -> Iterator[Chat]:
    yield Chat(_system(record) + _turns(_list(record, "conversations")), _tools(record.get("tools")))


def _alpaca(record: Record) -> Iterator[Chat]:
    question = _text(record, "instruction")
    for answer in record.get("instances") or [record]:
        extra = answer.get("input") or ""
        content = f"{question}\n\n{extra}" if extra else question
        yield Chat([*_system(record), _user(content), _assistant(_text(answer, "output"))])


def _prompt_completion(record: Record) -> Iterator[Chat]:
    yield Chat(_prompt(record) + _answer(record, "completion"), _tools(record.get("tools")))


# Name of a format -> the keys that a record of it has, and what reads it; the first that fits is taken.
CHAT_FORMATS: dict[str, tuple[frozenset[str], Callable[[Record], Iterator[Chat]]]] = {
    "messages": (frozenset({"messages"}), _messages),
    "sharegpt": (frozenset({"conversations"}), _sharegpt),
    "alpaca": (frozenset({"instruction"}), _alpaca),
    "prompt_completion": (frozenset({"prompt", "completion"}), _prompt_completion),
}


def recognize(record: Record) -> str | None:
    """Names the format of a record of chat, or None."""
    return next((name for name, (keys, _) in CHAT_FORMATS.items() if keys <= record.keys()), None)


def read_chats(record: Record, format: str) -> list[Chat]:
    """Reads the conversations of a record.

    Args:
        record: an object of a JSON file.
        format: a key of `CHAT_FORMATS`.

    Raises:
        RecordError: it is not of the format.
    """
    try:
        return list(CHAT_FORMATS[format][1](record))
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise RecordError(f"it is not a record of the format {format}: {_reason(error)}") from None


def read_preference(record: Record) -> Preference:
    """Reads two answers: after `prompt` or `conversations`, or each with the conversation before it.

    Raises:
        RecordError: there are no two answers, or they are equal.
    """
    try:
        chosen, rejected = _answer(record, "chosen"), _answer(record, "rejected")
        if "conversations" in record:
            prompt = _system(record) + _turns(_list(record, "conversations"))
        elif "prompt" in record:
            prompt = _prompt(record)
        else:  # what both begin with
            shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), 0)
            prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        chat = Chat(prompt, _tools(record.get("tools")))
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise RecordError(f"it has no chosen and rejected answer: {_reason(error)}") from None
    if chosen == rejected:
        raise RecordError("the chosen answer is the rejected one")
    return Preference(chat, chosen, rejected)


def read_judgement(record: Record) -> Judgement:
    """Reads an answer and its `label`, true or false.

    Raises:
        RecordError: there is no conversation or no label.
    """
    format, label = recognize(record), record.get("label")
    if format is None or not isinstance(label, bool):
        raise RecordError("it has no conversation with a label that is true or false")
    return Judgement(read_chats(record, format)[0], label)


def _reason(error: Exception) -> str:
    """What is wrong with a record whose reading ended in an error, in words of records."""
    if isinstance(error, KeyError):
        return f"'{error.args[0]}' is missing"
    return str(error) if isinstance(error, ValueError) else "a value is not of the kind that this key has"


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _system(record: Record) -> list[Message]:
    return [{"role": "system", "content": record["system"]}] if record.get("system") else []


def _message(message: Record) -> Message:
    if not isinstance(message["role"], str):
        raise ValueError("a role that is not text")
    return dict(message)


def _text(record: Record, key: str) -> str:
    if not isinstance(record[key], str):
        raise ValueError(f"'{key}' is not text")
    return record[key]


def _list(record: Record, key: str) -> Sequence[Record]:
    if not isinstance(record[key], list):
        raise ValueError(f"'{key}' is not a list")
    return record[key]


def _prompt(record: Record) -> list[Message]:
    prompt = record["prompt"]
    return [_user(prompt)] if isinstance(prompt, str) else [_message(message) for message in _list(record, "prompt")]


def _answer(record: Record, key: str) -> list[Message]:
    answer = record[key]
    if isinstance(answer, str):
        return [_assistant(answer)]
    turns = [answer] if isinstance(answer, Mapping) else _list(record, key)
    return _turns(turns) if all("from" in turn for turn in turns) else [_message(turn) for turn in turns]


def _turns(turns: Sequence[Record]) -> list[Message]:
    """ShareGPT's turns; the n-th call gets an id that its result repeats, as mistral-common asks for."""
    messages: list[Message] = []
    pending: list[str] = []
    for number, turn in enumerate(turns):
        speaker = turn["from"]
        if speaker not in SHAREGPT_ROLES:
            raise ValueError(f"an unknown role '{speaker}'")
        role, value = SHAREGPT_ROLES[speaker], _text(turn, "value")
        if role == "call":
            calls = json.loads(value)
            functions = [_function(call) for call in (calls if isinstance(calls, list) else [calls])]
            pending = [f"{number:05d}{index:04d}" for index in range(len(functions))]
            called = [
                {"id": id, "type": "function", "function": function}
                for id, function in zip(pending, functions, strict=True)
            ]
            messages.append({"role": "assistant", "content": None, "tool_calls": called})
        elif role == "tool":
            if not pending:
                raise ValueError("the result of a call that nobody made")
            messages.append({"role": "tool", "content": value, "tool_call_id": pending.pop(0)})
        else:
            messages.append({"role": role, "content": value})
    return messages


def _function(call: Record) -> dict[str, str]:
    arguments = call.get("arguments", {})
    return {"name": call["name"], "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments)}


def _tools(tools: str | Sequence[Record] | None) -> list[dict[str, Any]]:
    """Tools as a list or as JSON of one, wrapped as OpenAI has them or bare."""
    parsed: Sequence[Record] = json.loads(tools or "[]") if isinstance(tools, str) else tools or []
    return [dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)} for tool in parsed]
