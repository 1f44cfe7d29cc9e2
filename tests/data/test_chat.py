"""Chats of published formats become mistral-common's tokens, and the loss knows whose they are."""

import json
from pathlib import Path

import numpy as np
import pytest
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from mixtral_jax.config import DataConfig
from mixtral_jax.data.chat_records import (
    Chat,
    RecordError,
    read_chats,
    read_judgement,
    read_preference,
    recognize,
)
from mixtral_jax.data.chat_template import ChatTemplate
from mixtral_jax.data.tokenizer import Tokenizer, load_tokenizer

SHARED = Path(__file__).parents[3] / "shared" / "data"
PLAIN = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "Goodbye."},
]
CALL = {"id": "123456789", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "", "parameters": {"type": "object"}}}
CALLING = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Rain in Bonn?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": '{"rain": true}', "tool_call_id": "123456789"},
    {"role": "assistant", "content": "Yes."},
]


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    return {
        "v1": load_tokenizer(DataConfig(tokenizer="mixtral"), 32000),
        "v3": load_tokenizer(DataConfig(tokenizer="mixtral-v3"), 32768),
    }


def reference(version: str, chat: Chat, mode: ValidationMode) -> list[int]:
    tokenizer = getattr(MistralTokenizer, version)()
    known = MistralTokenizer.from_file(tokenizer.instruct_tokenizer.tokenizer.file_path, mode=mode)
    return known.encode_chat_completion(ChatCompletionRequest.from_openai(chat.messages, chat.tools or None)).tokens


@pytest.mark.parametrize("version", ["v1", "v3"])
@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be brief."}]])
def test_tokens_are_those_of_mistral_common(tokenizers, version, system):
    template = ChatTemplate(tokenizers[version])
    assert template.version == version
    chat = Chat(system + PLAIN)
    assert template.encode_training(chat).tokens.tolist() == reference(version, chat, ValidationMode.finetuning)
    prompt = Chat(system + PLAIN[:3])
    assert template.encode_prompt(prompt).tolist() == reference(version, prompt, ValidationMode.test)


def test_calls_and_their_results_are_those_of_mistral_common(tokenizers):
    chat = Chat(CALLING, [TOOL])
    encoded = ChatTemplate(tokenizers["v3"]).encode_training(chat)
    assert encoded.tokens.tolist() == reference("v3", chat, ValidationMode.finetuning)


@pytest.mark.parametrize("version", ["v1", "v3"])
def test_only_answers_and_their_ends_are_said(tokenizers, version):
    tokenizer = tokenizers[version]
    encoded = ChatTemplate(tokenizer).encode_training(Chat(PLAIN))
    parts = np.split(encoded.tokens, np.flatnonzero(np.diff(encoded.said)) + 1)
    assert [tokenizer.decode(part) for part in parts[1::2]] == ["Hello.", "Goodbye."]
    assert [part[-1] for part in parts[1::2]] == [tokenizer.eos_id] * 2
    assert not any("Hello" in tokenizer.decode(part) or "Goodbye" in tokenizer.decode(part) for part in parts[::2])


def test_formats_mean_the_same_chat():
    question, answer = "Add one.\n\n41", "42"
    same = {
        "messages": {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]},
        "sharegpt": {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]},
        "alpaca": {"instruction": "Add one.", "input": "41", "output": answer},
        "prompt_completion": {"prompt": question, "completion": answer},
    }
    for name, record in same.items():
        assert recognize(record) == name
        assert read_chats(record, name) == [Chat(same["messages"]["messages"])]
    several = {"instruction": "Add one.", "instances": [{"input": "41", "output": "42"}, {"input": "", "output": "?"}]}
    assert [chat.messages[0]["content"] for chat in read_chats(several, "alpaca")] == [question, "Add one."]
    assert recognize({"text": "plain"}) is None


def test_sharegpt_calls_get_the_ids_of_their_results():
    record = {
        "conversations": [
            {"from": "human", "value": "Rain in Bonn?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Bonn"}}'},
            {"from": "observation", "value": '{"rain": true}'},
            {"from": "gpt", "value": "Yes."},
        ],
        "tools": json.dumps([TOOL["function"]]),
    }
    (chat,) = read_chats(record, "sharegpt")
    (call,) = chat.messages[1]["tool_calls"]
    assert call["function"] == CALL["function"]
    assert chat.messages[2]["tool_call_id"] == call["id"]
    assert chat.tools == [TOOL]


def test_two_answers_to_one_conversation():
    shared = [{"role": "user", "content": "Hi"}]
    good, bad = [{"role": "assistant", "content": "Hello."}], [{"role": "assistant", "content": "No."}]
    turn = {"from": "human", "value": "Hi"}
    for record in (
        {"prompt": "Hi", "chosen": "Hello.", "rejected": "No."},
        {"prompt": shared, "chosen": good, "rejected": bad},
        {"chosen": shared + good, "rejected": shared + bad},
        {"conversations": [turn], "chosen": {"from": "gpt", "value": "Hello."},
         "rejected": {"from": "gpt", "value": "No."}},
    ):  # fmt: skip
        pair = read_preference(record)
        assert (pair.prompt.messages, pair.chosen, pair.rejected) == (shared, good, bad)
    with pytest.raises(RecordError, match="chosen answer is the rejected"):
        read_preference({"prompt": "Hi", "chosen": "No.", "rejected": "No."})


def test_a_judgement_has_a_label():
    assert read_judgement({"prompt": "Hi", "completion": "No.", "label": False}).good is False
    with pytest.raises(RecordError, match="label"):
        read_judgement({"prompt": "Hi", "completion": "No.", "label": "bad"})


@pytest.mark.parametrize(
    "messages",
    [
        [],
        PLAIN[:1],  # no answer
        [PLAIN[0], {"role": "assistant", "content": ""}],
        [PLAIN[0], {"role": "narrator", "content": "Meanwhile"}, PLAIN[1]],
        [PLAIN[0], {"role": "tool", "content": "1", "tool_call_id": "123456789"}, PLAIN[1]],
    ],
)
def test_what_is_no_chat_is_named(tokenizers, messages):
    with pytest.raises(RecordError, match=r"\w"):
        ChatTemplate(tokenizers["v3"]).encode_training(Chat(messages))


@pytest.mark.parametrize(
    ("record", "format"),
    [
        ({"messages": "text"}, "messages"),
        ({"conversations": [{"from": "bard", "value": "x"}]}, "sharegpt"),
        ({"conversations": [{"from": "observation", "value": "x"}]}, "sharegpt"),
        ({"conversations": [{"from": "function_call", "value": "no JSON"}]}, "sharegpt"),
        ({"instruction": 3, "output": "x"}, "alpaca"),
        ({"prompt": "x"}, "prompt_completion"),
    ],
)
def test_a_record_of_another_shape_is_named(record, format):
    with pytest.raises(RecordError, match=f"not a record of the format {format}"):
        read_chats(record, format)


@pytest.mark.skipif(not SHARED.is_dir(), reason="real records lie beside the project")
def test_real_records(tokenizers):
    template = ChatTemplate(tokenizers["v3"])
    calls = json.loads((SHARED / "chat" / "glaive_toolcall_en_000-149.json").read_text())
    encoded = [template.encode_training(chat) for record in calls for chat in read_chats(record, recognize(record))]
    assert len(encoded) == 150
    assert all(one.said.any() for one in encoded)
    pairs = [read_preference(r) for r in json.loads((SHARED / "preference" / "dpo_en_demo.json").read_text())]
    assert len(pairs) == 300
    for pair in pairs:
        template.encode_training(Chat(pair.prompt.messages + pair.chosen))
