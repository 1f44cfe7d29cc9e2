"""What is shown of a text while it grows is always the begin of the whole text."""

import pytest

from mixtral_jax.config import DataConfig, UserError
from mixtral_jax.data.tokenizer import load_tokenizer
from mixtral_jax.inference.decoding import Drawn
from mixtral_jax.inference.text import Prompt, complete_texts, continue_texts

TEXT = "Grüße, 漢字 and 🙂 to you all. The end comes here."


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(DataConfig(tokenizer="mixtral"), 32000)


def written(tokens, size):
    """A generator that writes the same tokens for every prompt, so many at a time."""

    def generate(prompts, samplings, *, rows, slots):
        for start in range(0, len(tokens), size):
            part = tokens[start : start + size]
            yield [Drawn(part, [-1.0] * len(part)) for _ in prompts]

    return generate


def shown(tokenizer, tokens, size, prompt):
    steps = [step[0] for step in continue_texts(written(tokens, size), tokenizer, [prompt], rows=1, context=200)]
    return [new for _, new in steps], steps[-1][0]


@pytest.mark.parametrize("size", [1, 2, 7])
def test_pieces_join_to_the_text_whatever_their_size(tokenizer, size):
    tokens = [*tokenizer.encode(TEXT), tokenizer.eos_id, *tokenizer.encode("never seen")]
    parts, text = shown(tokenizer, tokens, size, Prompt([tokenizer.bos_id], new_tokens=100))
    assert "".join(parts) == text.text == TEXT
    assert not any("\ufffd" in part for part in parts)
    assert (text.finish_reason, text.tokens) == ("stop", tokenizer.encode(TEXT))
    assert len(text.log_probs) == len(text.tokens)


@pytest.mark.parametrize("size", [1, 3])
def test_nothing_of_a_stop_string_is_shown(tokenizer, size):
    prompt = Prompt([tokenizer.bos_id], new_tokens=100, stops=("all. The", "here"))
    parts, text = shown(tokenizer, tokenizer.encode(TEXT), size, prompt)
    assert "".join(parts) == text.text == TEXT[: TEXT.index("all. The")]
    assert text.finish_reason == "stop"
    assert all(text.text.startswith("".join(parts[:n])) for n in range(len(parts)))


def test_a_continuation_keeps_its_space_and_an_answer_has_none(tokenizer):
    head, tokens = [tokenizer.bos_id, *tokenizer.encode("Hello")], tokenizer.encode("world")
    assert shown(tokenizer, tokens, 1, Prompt(head, new_tokens=1))[1].text == " world"
    assert shown(tokenizer, tokens, 1, Prompt(head, new_tokens=1, continues=False))[1].text == "world"


def test_the_longest_answer_is_as_long_as_asked(tokenizer):
    prompts = [Prompt([1], new_tokens=n) for n in (1, 5, 9)]
    texts = complete_texts(written(tokenizer.encode(TEXT), 4), tokenizer, prompts, rows=4, context=64)
    assert [(len(text.tokens), text.finish_reason) for text in texts] == [(n, "length") for n in (1, 5, 9)]


def test_a_prompt_without_room_is_refused(tokenizer):
    with pytest.raises(UserError, match="do not fit the context of 64"):
        complete_texts(written([5], 1), tokenizer, [Prompt([1] * 60, new_tokens=5)], rows=1, context=64)


def test_a_long_text_is_decoded_token_by_token(tokenizer, monkeypatch):
    """What a token costs does not grow with the text."""
    tokens, sizes = tokenizer.encode(TEXT * 20), []
    whole = tokenizer.decode(tokens)
    decode = type(tokenizer).decode
    monkeypatch.setattr(type(tokenizer), "decode", lambda self, ids: (sizes.append(len(ids)), decode(self, ids))[1])
    prompt = Prompt([tokenizer.bos_id, *tokenizer.encode("Hello there")], new_tokens=len(tokens), stops=("nowhere",))
    steps = [step[0] for step in continue_texts(written(tokens, 3), tokenizer, [prompt], rows=1, context=2000)]
    assert "".join(new for _, new in steps) == " " + whole
    assert max(sizes) < 20
