"""Drawn tokens become text as they come: whole characters, nothing of a stop string, and why it ended."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from mixtral_jax.config import UserError
from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.inference.decoding import Drawn, Generate
from mixtral_jax.inference.sampling import Sampling

BROKEN = "\ufffd"  # what decoding shows of a character whose bytes have not all come
SLOTS = (64, 256, 1024)  # tokens of a text; a program is compiled for each, and for the model's context


@dataclass(frozen=True)
class Prompt:
    """What to continue, and how."""

    tokens: list[int]  # at least one
    sampling: Sampling = field(default_factory=Sampling)
    new_tokens: int = 128  # at most
    stops: tuple[str, ...] = ()  # the text ends before any of these
    continues: bool = True  # the text goes on where the prompt ends; False: it is an answer of its own


def begin_text(text: str, tokenizer: Tokenizer) -> list[int]:
    """Encodes a text that is to be continued.

    Raises:
        UserError: half of a surrogate pair in it, which JSON and terminals can bring and no text has.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"prompt: character {error.start + 1} is not valid Unicode: give the text in UTF-8") from None
    return [tokenizer.bos_id, *tokenizer.encode(text)]


@dataclass
class Continuation:
    """One text as far as it has come."""

    prompt: Prompt
    tokenizer: Tokenizer
    tokens: list[int] = field(default_factory=list)  # the end sign is none of them
    log_probs: list[float] = field(default_factory=list)  # nats
    text: str = ""  # what is certain of it
    finish_reason: Literal["stop", "length"] | None = None

    def __post_init__(self) -> None:
        """Begins behind the prompt: a tokenizer's first piece loses its space when it is decoded alone."""
        self._whole = ""  # all characters that have come as a whole, beyond `text` what may begin a stop string
        self._before = list(self.prompt.tokens) if self.prompt.continues else []  # next tokens are decoded with
        self._open: list[int] = []  # tokens that have not become characters

    def extend(self, drawn: Drawn) -> str:
        """Takes tokens until the text ends, and returns what is new and certain of it."""
        before = len(self.text)
        for token, log_prob in zip(drawn.tokens, drawn.log_probs, strict=True):
            if self.finish_reason:
                break
            if token == self.tokenizer.eos_id:
                self._end("stop")
                break
            self.tokens.append(token)
            self.log_probs.append(log_prob)
            self._decode(token)
            if not self.finish_reason and len(self.tokens) == self.prompt.new_tokens:
                self._end("length")
        if not self.finish_reason:
            self.text = self._whole[: len(self._whole) - self._held()]
        return self.text[before:]

    def _decode(self, token: int) -> None:
        """Adds the characters that a token completes, or ends the text before a stop string."""
        if token != self.tokenizer.unk_id:
            self._open.append(token)
        new = self._opened()
        if not new or new.endswith(BROKEN):
            return
        begin = len(self._whole)
        self._whole += new
        self._before, self._open = self._open, []
        places = [self._whole.find(stop, max(0, begin - len(stop) + 1)) for stop in self.prompt.stops]
        if found := [place for place in places if place >= 0]:
            self.text, self.finish_reason = self._whole[: min(found)], "stop"

    def _opened(self) -> str:
        head = self.tokenizer.decode(self._before)
        return self.tokenizer.decode([*self._before, *self._open])[len(head) :]

    def _end(self, reason: Literal["stop", "length"]) -> None:
        self.text, self.finish_reason = self._whole + self._opened(), reason

    def _held(self) -> int:
        """Counts the last characters that a stop string may begin with."""
        return max(
            (size for stop in self.prompt.stops for size in range(1, len(stop)) if self._whole.endswith(stop[:size])),
            default=0,
        )


def continue_texts(
    generate: Generate, tokenizer: Tokenizer, prompts: Sequence[Prompt], *, rows: int, context: int
) -> Iterator[list[tuple[Continuation, str]]]:
    """Continues prompts together until all have ended.

    Args:
        generate: of the model.
        tokenizer: of the model.
        prompts: at most `rows`.
        rows: texts that run at once.
        context: tokens of a text with its prompt, at most.

    Yields:
        Every text, and what is new of it since the last time.

    Raises:
        UserError: a prompt that leaves no room for a new token.
    """
    check_room(prompts, context)
    texts = [Continuation(prompt, tokenizer) for prompt in prompts]
    longest = max(len(prompt.tokens) + prompt.new_tokens for prompt in prompts)
    slots = next(size for size in (*(size for size in SLOTS if size < context), context) if size >= longest)
    wishes = [prompt.sampling for prompt in prompts]
    for drawn in generate([prompt.tokens for prompt in prompts], wishes, rows=rows, slots=slots):
        yield [(text, text.extend(more)) for text, more in zip(texts, drawn, strict=True)]
        if all(text.finish_reason for text in texts):
            return


def check_room(prompts: Sequence[Prompt], context: int) -> None:
    """Raises `UserError` for a prompt that leaves no room in the context for what is asked."""
    for prompt in prompts:
        if len(prompt.tokens) + prompt.new_tokens > context:
            raise UserError(
                f"a prompt of {len(prompt.tokens):,} tokens and {prompt.new_tokens:,} new ones do not fit the context "
                f"of {context:,}: shorten it, ask for fewer new tokens or raise eval.context"
            )


def complete_texts(
    generate: Generate, tokenizer: Tokenizer, prompts: Sequence[Prompt], *, rows: int, context: int
) -> list[Continuation]:
    """Continues prompts to their ends; see `continue_texts`."""
    (step,) = deque(continue_texts(generate, tokenizer, prompts, rows=rows, context=context), maxlen=1)
    return [text for text, _ in step]
