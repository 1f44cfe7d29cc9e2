"""Answers as OpenAI's API writes them, from a text's progress: the pieces of a stream, and the whole."""

import json
import secrets
import string
from dataclasses import dataclass, field
from typing import Any

from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.inference.batching import Token
from mixtral_jax.serving.engine import Progress

Json = dict[str, Any]
LETTERS = string.ascii_letters + string.digits


@dataclass
class Choice:
    """One of a request's texts, as far as it has come."""

    index: int
    tokenizer: Tokenizer
    alternatives: int | None  # log-probabilities wanted, with so many alternatives of each; None: none
    experts: bool  # wanted
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, progress: Progress) -> Json | None:
        """Takes what is new and returns it as a piece of a stream; None: there is nothing to tell yet."""
        before = len(self.tokens)
        self.text += progress.text
        self.tokens += progress.tokens
        self.finish_reason = progress.finish_reason
        told = self._told(progress.text)
        details = self.alternatives is not None or self.experts
        if not told and not self.finish_reason and not (details and progress.tokens):
            return None
        return self._framed(self._piece(told), before)

    def whole(self) -> Json:
        """Returns the text as an answer that is not streamed."""
        return self._framed(self._answer(), 0)

    def _framed(self, content: Json, begin: int) -> Json:
        tokens = self.tokens[begin:]
        logprobs = None if self.alternatives is None else self._log_probs(tokens, begin)
        found = {"index": self.index, **content, "logprobs": logprobs, "finish_reason": self.finish_reason}
        if self.experts:
            found["experts"] = [{**self._entry(token.token), "experts": token.experts} for token in tokens]
        return found

    def _entry(self, token: int) -> Json:
        name, data = self.tokenizer.describe(token)
        return {"token": name, "bytes": list(data)}

    def _told(self, text: str) -> Any:
        return text

    def _piece(self, told: Any) -> Json:
        return {"text": told}

    def _answer(self) -> Json:
        return {"text": self.text}

    def _log_probs(self, tokens: list[Token], begin: int) -> Json:
        """OpenAI's old format: columns."""
        names = [self._entry(token.token)["token"] for token in tokens]
        offset = sum(len(self._entry(token.token)["token"]) for token in self.tokens[:begin])
        offsets = [offset + sum(map(len, names[:i])) for i in range(len(names))]
        best = [{self._entry(a.token)["token"]: a.log_prob for a in token.alternatives} for token in tokens]
        return {
            "tokens": names,
            "token_logprobs": [token.log_prob for token in tokens],
            "top_logprobs": best,
            "text_offset": offsets,
        }


@dataclass
class ChatChoice(Choice):
    """One of the answers to a chat, in which tools may be called."""

    call_token: int | None = None  # what begins a call; None: there are no tools
    forced: bool = False  # the prompt ends with it
    several: bool = True  # calls are wanted
    calls: list[Json] = field(default_factory=list)

    def _told(self, text: str) -> Json:
        """What is said goes out at once, a call when it is complete; what was to be a call and is none is said."""
        if not self._calls:
            return {"content": text} if text else {}
        if not self.finish_reason:
            return {}
        self.calls = read_calls(self.text)[: None if self.several else 1]
        if not self.calls:
            return {"content": self.text}
        self.finish_reason = "tool_calls"
        return {"tool_calls": [{"index": number, **call} for number, call in enumerate(self.calls)]}

    @property
    def _calls(self) -> bool:
        return self.forced or (self.call_token is not None and [t.token for t in self.tokens[:1]] == [self.call_token])

    def _piece(self, told: Json) -> Json:
        return {"delta": told or {"content": ""}}

    def _answer(self) -> Json:
        said = {"content": "", "tool_calls": self.calls} if self.calls else {"content": self.text}
        return {"message": {"role": "assistant", **said}}

    def _log_probs(self, tokens: list[Token], begin: int) -> Json:
        return {
            "content": [
                {
                    **self._entry(token.token),
                    "logprob": token.log_prob,
                    "top_logprobs": [{**self._entry(a.token), "logprob": a.log_prob} for a in token.alternatives],
                }
                for token in tokens
            ]
        }


def read_calls(text: str) -> list[Json]:
    """Reads the calls of an answer: JSON, a list of objects of name and arguments; what is none gives none."""
    try:
        calls = json.loads(text)
        return [
            {
                "id": "".join(secrets.choice(LETTERS) for _ in range(9)),  # as mistral-common wants it back
                "type": "function",
                "function": {"name": str(call["name"]), "arguments": json.dumps(call["arguments"])},
            }
            for call in (calls if isinstance(calls, list) else [])
        ]
    except (ValueError, KeyError, TypeError, RecursionError):
        return []
