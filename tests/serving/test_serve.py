"""What clients of the server get: the texts that the model writes alone, in OpenAI's format."""

import json

import httpx
import openai
import pytest

from mixtral_jax.data.chat_records import Chat
from mixtral_jax.data.chat_template import ChatTemplate
from mixtral_jax.inference.decoding import make_generator
from mixtral_jax.inference.sampling import Sampling
from mixtral_jax.inference.text import Prompt, complete_texts
from tests.serving.server import CONFIG, CONTEXT, serving, slowly, tokenizer, wait_until
from tests.tiny import tiny_architecture

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a river?"}]


@pytest.fixture(scope="module")
def server():
    with serving() as served:
        yield served


@pytest.fixture(scope="module")
def client(server):
    http = httpx.Client(trust_env=False)
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, http_client=http)


@pytest.fixture(scope="module")
def alone():
    """What the model writes for one prompt, by the generator of the command line."""
    architecture = tiny_architecture(CONFIG)
    generate = make_generator(architecture)(architecture.init(1))

    def write(tokens, new_tokens, *stops, continues=False, **wishes):
        prompt = Prompt(list(tokens), Sampling(**wishes), new_tokens, stops, continues)
        (text,) = complete_texts(generate, tokenizer(), [prompt], rows=1, context=CONTEXT)
        return text

    return write


def chat_prompt(messages=MESSAGES, tools=()):
    return [int(token) for token in ChatTemplate(tokenizer()).encode_prompt(Chat(list(messages), list(tools)))]


def events(response):
    """The data of server-sent events."""
    return [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]


@pytest.mark.parametrize("wishes", [{"temperature": 0.0}, {"temperature": 0.9, "top_p": 0.9, "seed": 7}])
def test_a_chat_is_answered_as_the_model_does_alone(client, alone, wishes):
    expected = alone(chat_prompt(), 20, **wishes)
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=20, **wishes)
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].finish_reason == expected.finish_reason
    assert answer.usage.prompt_tokens == len(expected.prompt.tokens)
    assert answer.usage.completion_tokens == len(expected.tokens)
    streamed = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=20, stream=True, **wishes)
    chunks = list(streamed)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected.text
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == expected.finish_reason
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len(chunks) > 3


def test_texts_are_continued(client, alone):
    prompts = ["The river", "Old trees"]
    expected = [alone([1, *tokenizer().encode(text)], 9, continues=True).text for text in prompts]
    answer = client.completions.create(model="tiny", prompt=prompts, max_tokens=9, temperature=0)
    assert [choice.text for choice in answer.choices] == expected
    as_tokens = [[1, *tokenizer().encode(text)] for text in prompts]
    answer = client.completions.create(model="tiny", prompt=as_tokens, max_tokens=9, temperature=0)
    assert [choice.text for choice in answer.choices] == expected
    streamed = ["", ""]
    for chunk in client.completions.create(model="tiny", prompt=prompts, max_tokens=9, temperature=0, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == expected


def test_several_answers_have_seeds_that_follow_each_other(client, alone):
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=6, n=3, seed=(1 << 32) - 1)
    expected = [alone(chat_prompt(), 6, temperature=1.0, seed=seed).text for seed in ((1 << 32) - 1, 0, 1)]
    assert [choice.message.content for choice in answer.choices] == expected
    assert answer.usage.prompt_tokens == len(chat_prompt())


def test_a_stop_string_ends_the_answer(client, alone):
    whole = alone(chat_prompt(), 20).text
    stop = whole[len(whole) // 2 :][:3]
    for stream in (False, True):
        answer = client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=20, temperature=0, stop=stop, stream=stream
        )
        if stream:
            text = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
        else:
            text = answer.choices[0].message.content
            assert answer.choices[0].finish_reason == "stop"
        assert text == whole[: whole.index(stop)]


def test_log_probabilities_come_with_alternatives(client, alone):
    expected = alone(chat_prompt(), 6)
    wish = {"model": "tiny", "messages": MESSAGES, "max_tokens": 6, "temperature": 0, "logprobs": True}
    answer = client.chat.completions.create(**wish, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert [entry.logprob for entry in content] == pytest.approx(expected.log_probs, abs=1e-5)
    assert b"".join(bytes(entry.bytes) for entry in content).decode().strip() == expected.text.strip()
    for entry in content:
        assert [best.logprob for best in entry.top_logprobs] == sorted(b.logprob for b in entry.top_logprobs)[::-1]
        assert (entry.top_logprobs[0].token, len(entry.top_logprobs)) == (entry.token, 3)
    chunks = list(client.chat.completions.create(**wish, stream=True))
    streamed = [e for chunk in chunks if chunk.choices[0].logprobs for e in chunk.choices[0].logprobs.content]
    assert [(e.token, e.top_logprobs) for e in streamed] == [(e.token, []) for e in content]
    old = client.completions.create(model="tiny", prompt=chat_prompt(), max_tokens=6, temperature=0, logprobs=2)
    columns = old.choices[0].logprobs
    assert columns.token_logprobs == pytest.approx(expected.log_probs, abs=1e-5)
    assert columns.tokens == [entry.token for entry in content]
    assert columns.text_offset[1:] == [sum(map(len, columns.tokens[:i])) for i in range(1, len(columns.tokens))]
    assert all(len(best) == 2 for best in columns.top_logprobs)


def test_the_experts_of_every_token_are_told(server):
    wish = {"messages": MESSAGES, "max_tokens": 6, "temperature": 0, "experts": True}
    whole = server.client.post("/v1/chat/completions", json=wish).json()
    told = whole["choices"][0]["experts"]
    assert len(told) == whole["usage"]["completion_tokens"]
    config = CONFIG.model
    for token in told:
        assert len(token["experts"]) == config.num_layers
        for chosen in token["experts"]:
            assert len(set(chosen)) == config.num_experts_per_tok
            assert set(chosen) <= set(range(config.num_experts))
    with server.client.stream("POST", "/v1/chat/completions", json={**wish, "stream": True}) as response:
        *chunks, end = events(response)
    streamed = [token for chunk in chunks for token in json.loads(chunk)["choices"][0].get("experts", [])]
    assert (streamed, end) == (told, "[DONE]")


def test_usage_is_streamed_if_asked_for(client):
    wish = {"model": "tiny", "messages": MESSAGES, "max_tokens": 5, "stream": True}
    *_, last = client.chat.completions.create(**wish, stream_options={"include_usage": True})
    assert last.choices == []
    assert last.usage.total_tokens == len(chat_prompt()) + last.usage.completion_tokens


def test_models_health_and_metrics(server, client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "mixtral_jax"
    assert server.client.get("/health").json() == {"status": "ok"}
    metrics = server.client.get("/metrics").text
    lines = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if not line.startswith("#"))
    assert float(lines["mixtral_jax_drawn_tokens_total"]) > 0
    assert float(lines["mixtral_jax_running"]) == 0
    assert float(lines['mixtral_jax_requests_total{path="/v1/models",status="200"}']) >= 1
    assert float(lines["mixtral_jax_first_token_seconds_count"]) > 0


def test_who_goes_away_frees_the_row(server, monkeypatch):
    # With this seed no text ends by itself.
    wish = {"messages": MESSAGES, "max_tokens": CONTEXT - len(chat_prompt()), "temperature": 0.9, "seed": 6}
    steps, step = [], slowly(server.engine.batch.step)
    monkeypatch.setattr(server.engine.batch, "step", lambda: (steps.append(1), step())[1])
    answer = server.client.post("/v1/chat/completions", json=wish, timeout=60).json()
    assert answer["usage"]["completion_tokens"] == wish["max_tokens"]
    whole = len(steps)
    steps.clear()
    with server.client.stream("POST", "/v1/chat/completions", json={**wish, "stream": True}) as response:
        next(response.iter_lines())
        assert server.engine.running == 1
    wait_until(lambda: server.engine.running == 0, seconds=60)
    with pytest.raises(httpx.ReadTimeout):
        server.client.post("/v1/chat/completions", json=wish, timeout=0.3)
    wait_until(lambda: server.engine.running == 0, seconds=60)
    assert len(steps) < whole
