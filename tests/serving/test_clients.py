"""Mistral's clients as their users write them, against a real server; `openai`'s is that of `test_serve`."""

import json
import os
import subprocess

import httpx
import pytest
from mistralai.client import Mistral
from mistralai.client.errors import SDKError

from tests.serving.server import serving

MESSAGES = [{"role": "user", "content": "What is a river?"}]
WISHES = {"model": "tiny", "messages": MESSAGES, "temperature": 0.7, "max_tokens": 12, "random_seed": 5}
OLD = "MISTRAL_CLIENT_0"  # environment variable: a Python that has mistralai before version 1

# The program that came with the model's announcement.
PROGRAM = """
import json, sys
from mistralai.client import MistralClient
from mistralai.models.chat_completion import ChatMessage

client = MistralClient(api_key="none", endpoint=sys.argv[1])
wishes = json.loads(sys.argv[2])
wishes["messages"] = [ChatMessage(**message) for message in wishes["messages"]]
answer = client.chat(**wishes)
streamed = [chunk.choices[0].delta.content for chunk in client.chat_stream(**wishes)]
print(json.dumps([[m.id for m in client.list_models().data], answer.choices[0].message.content, "".join(streamed)]))
"""


@pytest.fixture(scope="module")
def server():
    with serving() as served:
        yield served


@pytest.fixture(scope="module")
def expected(server):
    answer = server.client.post("/v1/chat/completions", json=WISHES).json()
    return answer["choices"][0]["message"]["content"]


def test_mistralai(server, expected):
    client = Mistral(api_key="none", server_url=server.url, client=httpx.Client(trust_env=False))
    assert client.chat.complete(**WISHES).choices[0].message.content == expected
    assert "".join(event.data.choices[0].delta.content for event in client.chat.stream(**WISHES)) == expected
    assert [model.id for model in client.models.list().data] == ["tiny"]
    with pytest.raises(SDKError, match="there is no model other"):
        client.chat.complete(model="other", messages=MESSAGES)


@pytest.mark.skipif(OLD not in os.environ, reason=f"{OLD} names no Python with mistralai<1, as it does in .ci/run")
def test_mistralai_before_its_first_version(server, expected):
    command = [os.environ[OLD], "-c", PROGRAM, server.url, json.dumps(WISHES)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, env={"NO_PROXY": "127.0.0.1"})
    assert json.loads(result.stdout or result.stderr) == [["tiny"], expected, expected]
