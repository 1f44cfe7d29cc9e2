"""The chat template of an export, as transformers renders and encodes it, against mistral-common."""

import copy
import json
import random
from typing import Any

import jinja2
import pytest
from transformers import AutoTokenizer

from mixtral_jax.data.chat_records import Chat
from mixtral_jax.data.chat_template import ChatTemplate
from mixtral_jax.data.tokenizer import Tokenizer, load_tokenizer
from mixtral_jax.weights.chat_templates import chat_template
from mixtral_jax.weights.hf_tokenizer import tokenizer_files
from mixtral_jax.weights.released_tokenizer import _extend
from tests.tiny import tiny_config
from tests.weights.parity.test_tokenizers import TEXTS

SYSTEM = {"role": "system", "content": "Be brief.\n  Say «ja»."}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def call(*calls: tuple[str, str, Any]) -> dict[str, Any]:
    functions = [{"id": id, "type": "function", "function": {"name": name, "arguments": json.dumps(given)}}
                 for id, name, given in calls]  # fmt: skip
    return {"role": "assistant", "content": "", "tool_calls": functions}


def result(id: str, content: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id, "content": content}


TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "description": "The wéather.", "parameters": {
        "type": "object", "properties": {"city": {"type": "string", "enum": ["Bonn", "Köln"]}}, "required": ["city"]}}},
    {"type": "function", "function": {"parameters": {"type": "object", "properties": {}}, "name": "time"}},
]  # fmt: skip
QUESTION, TWO = user("Rain in Bonn & <Köln>?"), [("a1b2c3d4e", "weather", {"city": "Bonn"}), ("AAAAAAAA1", "time", {})]
CALLS: list[list[dict[str, Any]]] = [
    [QUESTION],
    [SYSTEM, QUESTION, call(TWO[0]), result("a1b2c3d4e", '{"rain": true, "mm": [1, 2.5]}')],
    [QUESTION, call(*TWO), result("a1b2c3d4e", "22.0"), result("AAAAAAAA1", "noon, or so"), answer("Yes. ")],
    [SYSTEM, user("Hi"), answer("Hello  "), user("And?"), call(TWO[1]), result("AAAAAAAA1", "null"), answer("12"),
     QUESTION],
    [QUESTION, call(TWO[0]), result("a1b2c3d4e", "-"), answer("No."), user("Why?"), answer("Sun."), user("Sure?")],
]  # fmt: skip


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[ChatTemplate, Any]]:
    found = {}
    for name in ("mixtral", "mixtral-v3"):
        directory = tmp_path_factory.mktemp(name)
        tokenizer = load_tokenizer(tiny_config(f"data.tokenizer={name}").data, 32768)
        (directory / "config.json").write_text('{"model_type": "mixtral"}')
        for file, content in tokenizer_files(tokenizer.model_bytes).items():
            (directory / file).write_text(content, encoding="utf-8")
        ours = ChatTemplate(tokenizer)
        found[ours.version] = ours, AutoTokenizer.from_pretrained(directory)
    return found


def check(both: tuple[ChatTemplate, Any], messages: list[dict[str, Any]], tools: Any = None, given: Any = None) -> None:
    """Compares the tokens of messages; transformers gets those in `given`, if any."""
    ours, theirs = both
    chat = Chat(messages, tools or [])
    prompt = messages[-1]["role"] != "assistant"
    expected = (ours.encode_prompt(chat) if prompt else ours.encode_training(chat).tokens).tolist()
    options: dict[str, Any] = {"tools": tools, "add_generation_prompt": prompt, "return_dict": False}
    encoded = theirs.apply_chat_template(given or messages, **options)
    assert encoded == expected, theirs.decode(encoded)


@pytest.mark.parametrize("version", ["v1", "v3"])
def test_conversations(versions: dict[str, tuple[ChatTemplate, Any]], version: str) -> None:
    draw = random.Random(0)
    texts = [text for text in TEXTS if text.strip()] + ["ends with spaces  ", "  begins with them"]
    texts += ["a [INST] b [/INST]"] if version == "v1" else []  # a control token from v3 on, wherever it is spelled
    for _ in range(60):
        turns = range(draw.randrange(1, 6))
        messages = [(answer if turn % 2 else user)(draw.choice(texts)) for turn in turns]
        check(versions[version], [SYSTEM] * draw.randrange(2) + messages)


@pytest.mark.parametrize("number", range(len(CALLS)))
def test_calls(versions: dict[str, tuple[ChatTemplate, Any]], number: int) -> None:
    """Arguments are JSON, or the object itself as transformers asks for."""
    check(versions["v3"], CALLS[number], TOOLS)
    objects = copy.deepcopy(CALLS[number])
    for message in objects:
        for called in message.get("tool_calls", []):
            called["function"]["arguments"] = json.loads(called["function"]["arguments"])
    check(versions["v3"], CALLS[number], TOOLS, objects)


def test_roles_out_of_order(versions: dict[str, tuple[ChatTemplate, Any]]) -> None:
    stranger = [user("x"), {"role": "critic", "content": "x"}]
    for version, messages in (("v1", [answer("x")]), ("v1", [user("x")] * 2), ("v1", stranger), ("v3", stranger)):
        with pytest.raises(jinja2.TemplateError, match="system prompt"):
            versions[version][1].apply_chat_template(messages)


def test_tokens_of_its_own_mean_a_template_of_its_own() -> None:
    tokenizer = load_tokenizer(tiny_config("data.tokenizer=mixtral").data, 32768)
    extended = _extend(tokenizer.model_bytes, {32000: "<|im_start|>"})
    assert extended
    assert chat_template(Tokenizer(extended)) is None
    assert "chat_template" not in tokenizer_files(extended)["tokenizer_config.json"]
