"""The verb `generate`: continues prompts, or answers them, at the terminal or into a file."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixtral_jax.config import UserError
from mixtral_jax.data.chat_records import Chat, RecordError
from mixtral_jax.data.chat_template import ChatTemplate
from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.evaluation.outputs import write_json
from mixtral_jax.inference.decoding import make_generator
from mixtral_jax.inference.sampling import Sampling
from mixtral_jax.inference.text import Continuation, Prompt, begin_text, check_room, continue_texts
from mixtral_jax.serving.opening import open_model


@dataclass(frozen=True)
class GenerateOptions:
    """What is asked of every prompt."""

    sampling: Sampling = field(default_factory=Sampling)
    new_tokens: int = 128
    stops: tuple[str, ...] = ()
    chat: bool = False  # prompts are questions, put into the chat template
    system: str = ""  # the system prompt of a chat
    weights: str = ""  # type in which matrices are held; empty: the checkpoint's


def generate(
    checkpoint: str,
    prompts: Sequence[str],
    options: GenerateOptions,
    overrides: list[str],
    json_file: Path | None = None,
) -> None:
    """Writes the continuation of every prompt to standard output as it comes, and all of them as JSON if asked.

    Args:
        checkpoint: a run, a checkpoint, or a directory of released weights, which is imported for the occasion.
        prompts: texts; several are continued together.
        options: for every prompt.
        overrides: `section.key=value` on top of the checkpoint's configuration.
        json_file: gets {"texts": [objects of prompt, text, finish_reason, tokens, and log_probs in nats]}.

    Raises:
        UserError: a bad value or checkpoint, or a prompt that leaves no room.
    """
    if not prompts or not all(prompts):
        raise UserError("there is nothing to continue: give a PROMPT, --prompts FILE or text on standard input")
    if options.new_tokens < 1:
        raise UserError(f"--max-new-tokens is {options.new_tokens}: it must be 1 or more")
    if options.system and not options.chat:
        raise UserError("--system belongs to a chat: add --chat")
    with open_model(checkpoint, overrides, options.weights) as loaded:
        encode = _encoder(loaded.tokenizer, options)
        wanted = [
            Prompt(encode(text), options.sampling, options.new_tokens, options.stops, continues=not options.chat)
            for text in prompts
        ]
        rows = min(loaded.config.eval.batch_size, 1 << (len(wanted) - 1).bit_length())
        draw = make_generator(loaded.architecture)(loaded.arrays)
        check_room(wanted, loaded.context)  # of all, before anything is written
        done: list[Continuation] = []
        for start in range(0, len(wanted), rows):
            batch = wanted[start : start + rows]
            steps = continue_texts(draw, loaded.tokenizer, batch, rows=rows, context=loaded.context)
            shown = [text + "\n" * options.chat for text in prompts[start : start + rows]]
            done += _show(steps, shown, alone=len(prompts) == 1)
    if json_file:
        found = [_describe(prompt, text) for prompt, text in zip(prompts, done, strict=True)]
        write_json(json_file, {"texts": found})


def _encoder(tokenizer: Tokenizer, options: GenerateOptions) -> Any:
    if not options.chat:
        return lambda text: begin_text(text, tokenizer)
    template = ChatTemplate(tokenizer)
    system = [{"role": "system", "content": options.system}] if options.system else []

    def encode(text: str) -> list[int]:
        try:
            tokens = template.encode_prompt(Chat([*system, {"role": "user", "content": text}]))
        except RecordError as error:
            raise UserError(f"the prompt is no chat: {error}") from None
        return [int(token) for token in tokens]

    return encode


def _show(
    steps: Iterator[list[tuple[Continuation, str]]], prompts: Sequence[str], *, alone: bool
) -> list[Continuation]:
    """Prints one text as it comes, several of them when they are done, each behind what stands before it."""
    texts: list[Continuation] = []
    if alone:
        sys.stdout.write(f"\033[2m{prompts[0]}\033[0m" if sys.stdout.isatty() else prompts[0])
    for step in steps:
        texts = [text for text, _ in step]
        if alone:
            sys.stdout.write(step[0][1])
            sys.stdout.flush()
    if alone:
        sys.stdout.write("\n")
    else:
        for prompt, text in zip(prompts, texts, strict=True):
            sys.stdout.write(f"{prompt}{text.text}\n\n")
    return texts


def _describe(prompt: str, text: Continuation) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "text": text.text,
        "finish_reason": text.finish_reason,
        "tokens": text.tokens,
        "log_probs": text.log_probs,
    }
