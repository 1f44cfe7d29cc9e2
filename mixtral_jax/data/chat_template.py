"""Mixtral Instruct's template: conversations to tokens by mistral-common, and which of them the assistant said."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int32
from mistral_common.exceptions import MistralCommonException
from mistral_common.protocol.instruct.messages import AssistantMessage, ToolMessage
from mistral_common.protocol.instruct.normalize import get_normalizer
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode, get_validator
from mistral_common.tokens.tokenizers.instruct import InstructTokenizerV1, InstructTokenizerV3
from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer
from pydantic import ValidationError

from mixtral_jax.data.chat_records import Chat, RecordError
from mixtral_jax.data.tokenizer import Tokenizer

INST = "[INST]"  # a control token from version 3 on, text before


@dataclass(frozen=True)
class Encoded:
    """A conversation in tokens, from BOS on."""

    tokens: Int32[np.ndarray, " tokens"]
    said: Bool[np.ndarray, " tokens"]  # by the assistant, the EOS that ends its answers included


class ChatTemplate:
    """Encodes conversations for one tokenizer: v3 where it has Mixtral's control tokens, v1 where it has not."""

    def __init__(self, tokenizer: Tokenizer):
        """Loads mistral-common's own tokenizer from the same model."""
        self.version = "v3" if tokenizer.has_control(INST) else "v1"
        with tempfile.TemporaryDirectory() as directory:  # the library reads files alone
            path = Path(directory) / f"tokenizer.model.{self.version}"
            tokenizer.save(path)
            pieces = SentencePieceTokenizer(path)
        self._encoder: InstructTokenizerV1 = (InstructTokenizerV3 if self.version == "v3" else InstructTokenizerV1)(
            pieces
        )
        self._normalizer = get_normalizer(pieces.version)
        self._validators = {mode: get_validator(pieces.version, mode) for mode in ValidationMode}

    def encode_training(self, chat: Chat) -> Encoded:
        """Encodes a conversation that ends with an answer.

        Raises:
            RecordError: roles out of order, an empty answer, a call that the version lacks.
        """
        return self._encode(chat, ValidationMode.finetuning)

    def encode_prompt(self, chat: Chat) -> Int32[np.ndarray, " tokens"]:
        """Encodes a conversation up to where the assistant speaks next.

        Raises:
            RecordError: as above, or the last word is the assistant's.
        """
        return self._encode(chat, ValidationMode.test).tokens

    def _encode(self, chat: Chat, mode: ValidationMode) -> Encoded:
        """Walks the messages as `encode_instruct` of mistral-common does, to know whose each token is."""
        encoder = self._encoder
        if self.version == "v1" and (chat.tools or any(message.get("tool_calls") for message in chat.messages)):
            raise RecordError("the tokenizer has no tokens for tools, as mixtral-v3 or one that train-v3 made has")
        try:
            json.dumps([chat.messages, chat.tools], ensure_ascii=False, default=str).encode()  # half a surrogate pair
            request = ChatCompletionRequest.from_openai(chat.messages, chat.tools or None)
            normal = self._normalizer.from_chat_completion_request(self._validators[mode].validate_request(request))
            first, last = encoder.find_first_last_user(normal)
            parts = [(encoder.start(), False)]
            for number, message in enumerate(normal.messages):
                if isinstance(message, AssistantMessage):
                    parts.append((encoder.encode_assistant_message(message, number < last), True))
                elif isinstance(message, ToolMessage):
                    parts.append((encoder.encode_tool_message(message, number < last)[0], False))
                else:
                    user, *_ = encoder.encode_user_message(
                        message, normal.available_tools, number == last, number == first, normal.system_prompt
                    )
                    parts.append((user, False))
        except KeyError as error:
            raise RecordError(f"a message lacks {error}") from None
        except RecursionError:  # the arguments of a call, which the library reads
            raise RecordError("a message holds JSON that is nested too deeply") from None
        except (MistralCommonException, ValidationError, ValueError) as error:
            raise RecordError(" ".join(str(error).split())) from None
        tokens = np.concatenate([np.array(part, np.int32) for part, _ in parts])
        return Encoded(tokens, np.repeat([said for _, said in parts], [len(part) for part, _ in parts]))
