"""What a request asks the engine for: prompts in tokens, and the choices that their texts become."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mixtral_jax.config import UserError
from mixtral_jax.data.chat_records import Chat, RecordError
from mixtral_jax.data.chat_template import ChatTemplate
from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.inference.sampling import Sampling
from mixtral_jax.inference.text import Prompt, begin_text
from mixtral_jax.serving.answers import ChatChoice, Choice
from mixtral_jax.serving.errors import ApiError
from mixtral_jax.serving.requests import ChatRequest, CompletionRequest, Request

TOOL_CALLS = "[TOOL_CALLS]"
COMPLETION_TOKENS = 16  # of a completion that does not say how many, as OpenAI has it; a chat goes on to its end


@dataclass
class Reader:
    """Reads requests for one model."""

    tokenizer: Tokenizer
    vocab_size: int  # of the model
    context: int  # tokens of a text with its prompt, at most
    choices: int  # texts of a request, at most

    def __post_init__(self) -> None:
        """Makes the chat template."""
        self._template = ChatTemplate(self.tokenizer)
        self._call_token = self.tokenizer.control_id(TOOL_CALLS)

    def read(self, request: ChatRequest | CompletionRequest) -> tuple[list[Prompt], Sequence[Choice]]:
        """Reads a request.

        Raises:
            ApiError: no chat for the template, an empty prompt, a token that is none, or no room for what was asked.
        """
        return self._chat(request) if isinstance(request, ChatRequest) else self._completion(request)

    def _chat(self, request: ChatRequest) -> tuple[list[Prompt], Sequence[Choice]]:
        tools = request.tools if request.tool_choice != "none" else []
        forced = request.tool_choice in ("any", "required")
        if request.tools and self._call_token is None:
            raise ApiError(400, "the model's tokenizer has no tokens for tools", param="tools")
        if forced and not tools:
            raise ApiError(400, "a call is required, and there are no tools", param="tool_choice")
        chat = Chat([message.as_openai() for message in request.messages], [tool.model_dump() for tool in tools])
        try:
            tokens = [int(token) for token in self._template.encode_prompt(chat)]
        except RecordError as error:
            raise ApiError(400, f"messages: {error}", param="messages") from None
        if forced and self._call_token is not None:
            tokens.append(self._call_token)
        prompts = self._prompts(request, [tokens], self.context, continues=False)
        wanted = request.top_logprobs if request.logprobs else None
        call_token = self._call_token if tools else None
        return prompts, [
            ChatChoice(number, self.tokenizer, wanted, request.experts, call_token=call_token, forced=forced,
                       several=request.parallel_tool_calls)
            for number in range(len(prompts))
        ]  # fmt: skip

    def _completion(self, request: CompletionRequest) -> tuple[list[Prompt], Sequence[Choice]]:
        prompts = self._prompts(request, self._texts(request), COMPLETION_TOKENS, continues=True)
        return prompts, [
            Choice(number, self.tokenizer, request.logprobs, request.experts) for number in range(len(prompts))
        ]

    def _texts(self, request: CompletionRequest) -> list[list[int]]:
        given = request.prompt
        parts: list[Any] = (
            given if isinstance(given, list) and not all(isinstance(part, int) for part in given) else [given]
        )
        try:
            texts = [begin_text(part, self.tokenizer) if isinstance(part, str) else part for part in parts]
        except UserError as error:
            raise ApiError(400, str(error), param="prompt") from None
        if not all(texts):
            raise ApiError(400, "prompt: a list of tokens may not be empty", param="prompt")
        if any(not 0 <= token < self.vocab_size for text in texts for token in text):
            raise ApiError(400, f"prompt: tokens are from 0 to {self.vocab_size - 1}", param="prompt")
        return texts

    def _prompts(self, request: Request, texts: Sequence[list[int]], default: int, *, continues: bool) -> list[Prompt]:
        if len(texts) * request.n > self.choices:
            raise ApiError(400, f"n: a request may ask for {self.choices} texts at most", param="n")
        longest = max(map(len, texts))
        room = self.context - longest
        new_tokens = request.max_tokens or min(default, room)
        if room < max(new_tokens, 1):
            raise ApiError(
                400,
                f"a prompt of {longest} tokens and {max(new_tokens, 1)} new ones do not fit the context of "
                f"{self.context}: shorten it or lower max_tokens",
                param="max_tokens" if room > 0 else "messages" if isinstance(request, ChatRequest) else "prompt",
                code="context_length_exceeded",
            )
        seed = secrets.randbits(32) if request.seed is None else request.seed
        try:
            samplings = [
                Sampling(request.temperature, request.top_k, request.top_p, request.min_p, request.repetition_penalty,
                         (seed + number) % (1 << 32))
                for number in range(len(texts) * request.n)
            ]  # fmt: skip
        except UserError as error:
            raise ApiError(400, str(error), param=str(error).split()[0]) from None
        repeated = [text for text in texts for _ in range(request.n)]
        return [
            Prompt(text, sampling, new_tokens, request.stops, continues)
            for text, sampling in zip(repeated, samplings, strict=True)
        ]
