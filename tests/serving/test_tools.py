"""Tools go into the prompt, and calls come out of the answer, as mistral-common writes them."""

import json

import pytest
from mistral_common.protocol.instruct.messages import AssistantMessage
from mistral_common.protocol.instruct.tool_calls import FunctionCall, ToolCall
from mistral_common.tokens.tokenizers.instruct import InstructTokenizerV3
from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer

from mixtral_jax.config import DataConfig
from mixtral_jax.data.tokenizer import load_tokenizer
from mixtral_jax.inference.batching import RunningBatch, Token
from mixtral_jax.serving.answers import read_calls
from mixtral_jax.serving.errors import ApiError
from mixtral_jax.serving.prompts import Reader
from mixtral_jax.serving.requests import ChatRequest
from tests.serving.server import serving, tokenizer

CALLS = [("weather", {"city": "Köln", "days": 2}), ("time", {})]
TOOLS = [{"type": "function", "function": {"name": name, "description": "says it", "parameters": {"type": "object"}}}
         for name, _ in CALLS]  # fmt: skip
QUESTION = {"role": "user", "content": "How is the weather?"}


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    """mistral-common's own encoder for the same tokenizer."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model.v3"
    tokenizer().save(path)
    return InstructTokenizerV3(SentencePieceTokenizer(path))


def call_tokens(mistral):
    calls = [ToolCall(id="abcdefghi", function=FunctionCall(name=name, arguments=json.dumps(arguments)))
             for name, arguments in CALLS]  # fmt: skip
    return mistral.encode_assistant_message(AssistantMessage(tool_calls=calls), False)


class Writing(RunningBatch):
    """A batch without a model that writes what it is told for every prompt."""

    def __init__(self, tokens, rows=2):
        self.tokens, self.rows, self.free, self.prompts = tokens, rows, list(range(rows)), []
        self._at = {}

    def join(self, prompt, sampling, alternatives):
        row = self.free.pop()
        self._at[row] = 0
        self.prompts.append(list(prompt))
        return row

    def leave(self, row):
        del self._at[row]
        self.free.append(row)

    def step(self):
        found = {row: [Token(token, -1.0, [[0]], []) for token in self.tokens[at : at + 3]]
                 for row, at in self._at.items()}  # fmt: skip
        for row in self._at:
            self._at[row] += 3
        return found


@pytest.fixture
def answer(monkeypatch):
    """Asks a server whose model writes these tokens; returns the message, why it ended, and the prompt."""

    def ask(tokens, **wishes):
        writing = Writing(tokens)
        monkeypatch.setattr("tests.serving.server.batch", lambda: writing)
        with serving(context=2000) as served:
            body = {"messages": [QUESTION], "tools": TOOLS, "max_tokens": 500, **wishes}
            response = served.client.post("/v1/chat/completions", json=body)
            assert response.status_code == 200, response.text
            if not wishes.get("stream"):
                (choice,) = response.json()["choices"]
                return choice["message"], choice["finish_reason"], writing.prompts[0]
        chunks = [
            json.loads(line[6:])["choices"][0] for line in response.text.splitlines() if line.startswith("data: {")
        ]
        message = {"content": "".join(chunk["delta"].get("content") or "" for chunk in chunks)}
        if calls := [call for chunk in chunks for call in chunk["delta"].get("tool_calls", [])]:
            message["tool_calls"] = calls
        return message, chunks[-1]["finish_reason"], writing.prompts[0]

    return ask


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_is_read_as_mistral_common_wrote_it(answer, mistral, stream):
    message, reason, prompt = answer(call_tokens(mistral), stream=stream)
    assert reason == "tool_calls"
    assert message["content"] == ""
    found = [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in message["tool_calls"]]
    assert found == CALLS
    assert {len(call["id"]) for call in message["tool_calls"]} == {9}
    assert [call.get("index", 0) for call in message["tool_calls"]] == ([0, 1] if stream else [0, 0])
    assert tokenizer().control_id("[AVAILABLE_TOOLS]") in prompt


def test_its_result_goes_back(answer, mistral):
    message, *_ = answer(call_tokens(mistral))
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "fine"} for call in message["tool_calls"]]
    words = [*tokenizer().encode("It is fine."), tokenizer().eos_id]
    said, reason, prompt = answer(words, messages=[QUESTION, message, *results])
    assert (said, reason) == ({"role": "assistant", "content": "It is fine."}, "stop")
    assert prompt.count(tokenizer().control_id("[TOOL_RESULTS]")) == 2


def test_a_call_can_be_required_forbidden_or_alone(answer, mistral):
    call, *rest = call_tokens(mistral)
    message, reason, prompt = answer(rest, tool_choice="any", parallel_tool_calls=False)
    assert (reason, prompt[-1], len(message["tool_calls"])) == ("tool_calls", call, 1)
    message, reason, prompt = answer([call, *rest], tool_choice="none")
    assert (reason, message.get("tool_calls")) == ("stop", None)
    assert tokenizer().control_id("[AVAILABLE_TOOLS]") not in prompt


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_no_call_is_said(answer, mistral, stream):
    message, reason, _ = answer(call_tokens(mistral)[:9], max_tokens=9, stream=stream)
    assert (reason, message["content"][:2], "tool_calls" in message) == ("length", "[{", False)


@pytest.mark.parametrize("text", ["", "x", "{}", "[1]", '[{"name": "x"}]', "[" * 9999, "null", '[{"arguments": {}}]'])
def test_no_call_is_made_of_anything_else(text):
    assert read_calls(text) == []


def test_a_tokenizer_without_tokens_for_tools_says_so():
    reader = Reader(load_tokenizer(DataConfig(tokenizer="mixtral"), 32000), 32000, 64, 4)
    with pytest.raises(ApiError, match="no tokens for tools"):
        reader.read(ChatRequest(messages=[QUESTION], tools=TOOLS))
