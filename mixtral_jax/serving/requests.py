"""What may be asked of the server: OpenAI's requests, with what Mistral's clients add, read strictly.

A parameter that is not understood is refused by name, one that would change nothing as it stands is let pass.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from mixtral_jax.inference.batching import MOST_ALTERNATIVES

# Parameters that only pass with the values at which they change nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "response_format": ({"type": "text"},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "safe_prompt": (False,),
    "prefix": (False,),
    "service_tier": ("auto", "default"),
    "store": (False,),
}


class Strict(BaseModel):
    """Takes no unknown key; null stands for a key that is not there."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_what_says_nothing(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for name, neutral in NEUTRAL.items():
            if name not in cls.model_fields and values.get(name) is not None and values[name] not in neutral:
                raise PydanticCustomError("unsupported", "{name} is not supported: leave it out", {"name": name})
        left_out = {name for name in NEUTRAL if name not in cls.model_fields}
        return {key: value for key, value in values.items() if value is not None and key not in left_out}


class StreamOptions(Strict):
    """How answers are streamed."""

    include_usage: bool = False


class Request(Strict):
    """What completions and chats have in common."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: int | None = Field(None, ge=1, validation_alias=AliasChoices("max_tokens", "max_completion_tokens"))
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = Field(None, validation_alias=AliasChoices("seed", "random_seed"))
    stop: str | Annotated[list[str], Field(max_length=16)] = []
    n: int = Field(1, ge=1)
    user: str = ""
    experts: bool = False  # of this project: say which experts worked on each token

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return tuple(filter(None, [self.stop] if isinstance(self.stop, str) else self.stop))


class CompletionRequest(Request):
    """Texts to continue."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=MOST_ALTERNATIVES)


class TextPart(Strict):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class CalledFunction(Strict):
    """What the assistant wants called."""

    name: str
    arguments: str | dict[str, Any]


class ToolCall(Strict):
    """One call of the assistant."""

    id: str
    type: Literal["function"] = "function"
    index: int = 0
    function: CalledFunction


class Message(Strict):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    def as_openai(self) -> dict[str, Any]:
        """Writes the turn as `Chat` has it."""
        found: dict[str, Any] = {"role": self.role, "content": self.content}
        if isinstance(self.content, list):
            found["content"] = "".join(part.text for part in self.content)
        if self.name:
            found["name"] = self.name
        if self.tool_call_id:
            found["tool_call_id"] = self.tool_call_id
        if self.tool_calls:
            found["tool_calls"] = [
                {"id": call.id, "type": call.type, "function": {"name": call.function.name, "arguments": (
                    call.function.arguments if isinstance(call.function.arguments, str)
                    else json.dumps(call.function.arguments))}}
                for call in self.tool_calls
            ]  # fmt: skip
        return found


class Function(Strict):
    """What the assistant may call."""

    name: str
    description: str = ""
    parameters: dict[str, Any] = {}
    strict: Literal[False] = False


class Tool(Strict):
    """One tool; there are functions alone."""

    type: Literal["function"] = "function"
    function: Function


class ChatRequest(Request):
    """A chat to answer."""

    messages: list[Message] = Field(min_length=1)
    tools: list[Tool] = []
    tool_choice: Literal["auto", "none", "any", "required"] = "auto"
    parallel_tool_calls: bool = True
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MOST_ALTERNATIVES)
