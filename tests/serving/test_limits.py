"""What the server refuses, and how: the API's own error, never a stack, and nobody else is held up."""

import json
import os
import signal
import socket
import threading
import time

import httpx
import pytest

from mixtral_jax import verbs
from mixtral_jax.config import UserError
from mixtral_jax.serving import serve as serve_module
from mixtral_jax.serving.serve import Serving, bind, run
from tests.serving.server import CONTEXT, service, serving, slowly, wait_until

CHAT = {"messages": [{"role": "user", "content": "the river"}], "max_tokens": 4}
TEXT = {"prompt": "the river", "max_tokens": 4}


@pytest.fixture(scope="module")
def server():
    with serving(queue=2, body=5000) as served:
        yield served


BAD = [
    ({**CHAT, "temperature": -1}, "temperature", "must be 0 or from"),
    ({**CHAT, "temperature": "warm"}, "temperature", "valid number"),
    ({**CHAT, "temperature": 1e300}, "temperature", "from 1e-6 to 1e6"),
    ({**CHAT, "repetition_penalty": 1e-30}, "repetition_penalty", "from 0.001 to 1000"),
    ({**CHAT, "top_k": 1 << 70}, "top_k", "from 0 (all) to 2^31 - 1"),
    ({**CHAT, "top_p": 0}, "top_p", "above 0"),
    ({**CHAT, "max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    ({**CHAT, "max_tokens": CONTEXT}, "max_tokens", f"do not fit the context of {CONTEXT}"),
    ({"messages": [{"role": "user", "content": "the river " * 99}]}, "messages", "do not fit the context"),
    ({**CHAT, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
    ({**CHAT, "n": 5}, "n", "4 texts at most"),
    ({**CHAT, "colour": "red"}, "colour", "unknown parameter"),
    ({**CHAT, "response_format": {"type": "json_object"}}, "response_format", "response_format is not supported"),
    ({**CHAT, "logit_bias": {"5": 1}}, "logit_bias", "not supported"),
    ({**CHAT, "messages": []}, "messages", "at least 1"),
    ({**CHAT, "messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role", "'user'"),
    ({**CHAT, "messages": [{"role": "user", "content": "x", "colour": 1}]}, "messages.0.colour", "unknown parameter"),
    ({**CHAT, "messages": [{"role": "assistant", "content": "x"}]}, "messages", "messages: "),
    ({**CHAT, "messages": [{"role": "user"}]}, "messages", "messages: "),
    ({**CHAT, "messages": [{"role": "tool", "content": "x", "tool_call_id": "y"}]}, "messages", "messages: "),
    ({**CHAT, "tool_choice": "any"}, "tool_choice", "there are no tools"),
    ({**CHAT, "tools": [{"function": {"name": "not a name", "parameters": {}}}]}, "messages", "name"),
    ({**CHAT, "messages": [CHAT["messages"][0], {"role": "tool", "content": "x"}]}, "messages", "lacks 'tool_call_id'"),
    ({**CHAT, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type", "text"),
    ({**CHAT, "stop": ["a"] * 17}, "stop", "at most 16"),
    ({**TEXT, "prompt": 5}, "prompt", "valid string, or Input should be a valid list"),
    ({**TEXT, "prompt": []}, "prompt", "may not be empty"),
    ({**TEXT, "prompt": [[]]}, "prompt", "may not be empty"),
    ({**TEXT, "prompt": [5, 384]}, "prompt", "from 0 to 383"),
    ({**TEXT, "echo": True}, "echo", "not supported"),
    ([], None, "JSON object"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "param", "sentence"), BAD)
def test_a_bad_request_is_told_what_is_wrong(server, body, param, sentence):
    path = "completions" if "prompt" in body else "chat/completions"
    response = server.client.post(f"/v1/{path}", json=body)
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["type"] == "invalid_request_error"
    assert (error["param"] or "").startswith(param or "")
    assert sentence in error["message"]
    assert "\n" not in error["message"]


@pytest.mark.parametrize(
    "body", [b"\xff\xfe{", b"{", b"", b"[" * 4000, b'{"prompt": NaN}', b'"text"', b"{}", b'{"prompt": "\\ud800"}']
)
def test_what_is_no_json_is_refused(server, body):
    response = server.client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert any(word in response.json()["error"]["message"] for word in ("JSON", "prompt"))


def test_other_mistakes_have_the_same_format(server):
    for response, status in (
        (server.client.get("/nowhere"), 404),
        (server.client.get("/v1/completions"), 405),
        (server.client.get("/v1/models/other"), 404),
        (server.client.post("/v1/chat/completions", json={**CHAT, "model": "other"}), 404),
        (server.client.post("/v1/completions", content=json.dumps(TEXT), headers={"content-type": "text/plain"}), 400),
        (server.client.post("/v1/completions", json={**TEXT, "prompt": "x" * 5001}), 413),
        (server.client.post("/v1/completions", content=iter([b"x" * 3000] * 2),
                            headers={"content-type": "application/json"}), 413),
    ):  # fmt: skip
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_who_finds_the_queue_full_is_told_to_come_again(server, monkeypatch):
    monkeypatch.setattr(server.engine.batch, "step", slowly(server.engine.batch.step))
    # With this seed no text ends by itself.
    rows, long = server.engine.batch.rows, {**TEXT, "max_tokens": 100, "temperature": 0.9, "seed": 6}
    threads = [
        threading.Thread(
            target=httpx.post, args=(f"{server.url}/v1/completions",), kwargs={"json": long, "timeout": 30}
        )
        for _ in range(rows + 2)
    ]
    for thread in threads:
        thread.start()
    wait_until(lambda: (server.engine.running, server.engine.waiting) == (rows, 2))
    response = server.client.post("/v1/completions", json=TEXT)
    assert (response.status_code, response.headers["retry-after"]) == (429, "1")
    assert response.json()["error"]["code"] == "queue_full"
    monkeypatch.undo()
    for thread in threads:
        thread.join()
    assert server.client.post("/v1/completions", json=TEXT).status_code == 200


def test_a_reader_who_does_not_read_stops_nobody(server):
    """Its text is written to the end, and its row is free, while it reads nothing."""
    lazy = []
    body = json.dumps(
        {**CHAT, "max_tokens": 150, "stream": True, "experts": True, "logprobs": True, "top_logprobs": 20}
    )
    for _ in range(server.engine.batch.rows):
        reader = socket.socket()
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        reader.connect(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
        reader.sendall(
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        lazy.append(reader)
    wait_until(lambda: server.engine.running > 0)
    assert server.client.post("/v1/completions", json=TEXT).status_code == 200
    wait_until(lambda: server.engine.running == 0)
    for reader in lazy:
        reader.close()


def test_a_failure_of_the_model_is_an_answer_and_ends_the_server(capsys, monkeypatch):
    with serving() as served:

        def fail():
            raise RuntimeError("out of memory")

        monkeypatch.setattr(served.engine.batch, "step", fail)
        response = served.client.post("/v1/completions", json=TEXT)
        assert (response.status_code, response.json()["error"]["type"]) == (500, "server_error")
        assert "memory" not in response.text
        assert served.client.post("/v1/completions", json=TEXT).status_code == 503
        assert served.client.get("/health").status_code == 503
        for row in list(served.engine.batch._texts):
            served.engine.batch.leave(row)
    assert "out of memory" in capsys.readouterr().err


def test_without_the_key_there_is_only_health(caplog):
    with serving(api_key="secret") as served:
        assert served.client.get("/health").status_code == 200
        for path in ("/v1/models", "/metrics", "/v1/nowhere"):
            assert served.client.get(path).json()["error"]["code"] == "invalid_api_key"
            assert served.client.get(path, headers={"Authorization": "Bearer secre"}).status_code == 401
        assert served.client.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
        body = {"content": b"{", "headers": {"content-type": "application/json"}}
        assert served.client.post("/v1/completions", **body).status_code == 401
    assert "secret" not in caplog.text + repr(service(api_key="secret")) + repr(Serving(api_key="secret"))


@pytest.mark.parametrize("drain", [10, 0])
def test_sigterm_lets_answers_end_within_the_bound(drain):
    """Pytest's main thread is the server's, which hears of signals."""
    served, listener, found = service(), bind(Serving(port=0)), []
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    served.engine.batch.step = slowly(type(served.engine.batch).step.__get__(served.engine.batch))

    def ask():
        body = {**TEXT, "max_tokens": 60, "stream": True, "ignore": None, "temperature": 0.9, "seed": 3}
        try:
            with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as response:
                lines = response.iter_lines()
                next(lines)
                os.kill(os.getpid(), signal.SIGTERM)
                found.extend(lines)
        except httpx.RemoteProtocolError:
            found.append("cut off")

    thread = threading.Thread(target=ask)
    thread.start()
    begin = time.monotonic()
    run(served, listener, drain)
    thread.join(10)
    del served.engine.batch.step
    assert ("data: [DONE]" in found) == bool(drain)
    assert drain or time.monotonic() - begin < 3
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--port", "70000"], "--port is 70000: it must be from 0 to 65535"),
        (["--max-concurrency", "0"], "--max-concurrency is 0"),
        (["--host", "nowhere.invalid"], "cannot listen at nowhere.invalid:8000"),
        (["--api-key-file", "nowhere"], "cannot read the API key in"),
        (["--port", "0"], "there is no"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, monkeypatch, options, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        verbs.serve([str(tmp_path / "run"), *options])
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_an_address_in_use_is_said():
    said = "127.*: Address already in use; choose others with"
    with bind(Serving(port=0)) as taken, pytest.raises(UserError, match=said):
        bind(Serving(port=taken.getsockname()[1]))


def test_the_verb_hands_its_options_on(monkeypatch, tmp_path):
    called = []
    monkeypatch.setattr(serve_module, "serve", lambda *given: called.append(given))
    (tmp_path / "key").write_text("abc\n")
    verbs.serve(
        ["runs/x", "eval.context=64", "--port", "1", "--max-queue", "3", "--api-key-file", str(tmp_path / "key")]
    )
    monkeypatch.setenv(verbs.API_KEY, "from outside")
    verbs.serve(["runs/x"])
    expected = Serving(port=1, queue=3, api_key="abc")
    assert called == [("runs/x", expected, ["eval.context=64"]), ("runs/x", Serving(api_key="from outside"), [])]
