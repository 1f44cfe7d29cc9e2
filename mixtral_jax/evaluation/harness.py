"""The model class of lm-evaluation-harness, registered as `mixtral_jax`; importing this module registers it.

Its answers are those of the harness's own `hf` model on an export of the same checkpoint: a context begins with BOS, a
long one loses its begin, and `loglikelihood_rolling` predicts what `hf` predicts.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string

from mixtral_jax.config import UserError
from mixtral_jax.console import ProgressLine
from mixtral_jax.evaluation.loading import LoadedModel, load_model
from mixtral_jax.evaluation.requests import Answer, Request, answer
from mixtral_jax.inference.decoding import Generate, make_generator
from mixtral_jax.inference.sampling import Sampling
from mixtral_jax.inference.text import Prompt, complete_texts

MAX_NEW_TOKENS = 256  # where a task does not say


@register_model("mixtral_jax")
class MixtralJax(TemplateLM):
    """A checkpoint, scored and continued on the devices at hand."""

    def __init__(self, loaded: LoadedModel, *, max_length: int | None = None, add_bos_token: bool = True):
        """Prepares a loaded model.

        Args:
            loaded: from `load_model(..., packed=False)`.
            max_length: tokens that the model sees at once; None: eval.context, or data.seq_len.
            add_bos_token: whether a context begins with BOS.
        """
        super().__init__()
        self.loaded = loaded
        self.max_length = max_length or loaded.context
        self.add_bos_token = add_bos_token
        self._drawn = 0  # texts generated so far, each with a seed of its own

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: Any = None) -> "MixtralJax":
        """Loads the model that `--model_args` name.

        Args:
            arg_dict: `checkpoint`, a run or one of its checkpoints; `max_length` and `add_bos_token`, see `__init__`;
                everything else is an override such as `precision.compute=bfloat16` or `eval.batch_size=32`.
            additional_config: the harness's batch size and device, which the checkpoint's configuration and the mesh
                decide here.
        """
        arguments = dict(arg_dict)
        checkpoint = arguments.pop("checkpoint", None)
        if checkpoint is None:
            raise UserError("the model mixtral_jax needs --model_args checkpoint=RUN_OR_CHECKPOINT")
        own = {name: arguments.pop(name) for name in ("max_length", "add_bos_token") if name in arguments}
        overrides = [f"{key}={value}" for key, value in arguments.items()]
        return cls(load_model(str(checkpoint), overrides, packed=False), **own)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Any = None) -> "MixtralJax":
        """Does the same for `key=value,key=value`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document."""
        return self.loaded.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without context."""
        return self.loaded.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        """Tells caches of the harness which tokenizer made their tokens."""
        return self.loaded.tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Encodes a text, with BOS if asked for or, by default, if contexts have it."""
        with_bos = self.add_bos_token if add_special_tokens is None else add_special_tokens
        return [self.prefix_token_id] * with_bos + self.loaded.tokenizer.encode(string)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Scores whole texts, each in windows of `max_length` tokens."""
        windows: list[Request] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                context, continuation = make_disjoint_window(window)
                windows.append(Request([*context, *continuation], len(context)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, found in zip(owners, self._answer(windows, "texts"), strict=True):
            totals[owner] -= found.nats
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continues each context until one of its stop strings, the end of the document or enough tokens."""
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        groups: dict[str, list[int]] = {}  # by what is asked of the generation
        for index, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        results = [""] * len(requests)
        with ProgressLine("generate", len(requests), plain_line_seconds=30.0) as progress:
            for members in groups.values():
                ordered = sorted(members, key=lambda index: -len(prompts[index]))
                rows = self.loaded.config.eval.batch_size
                for start in range(0, len(ordered), rows):
                    batch = ordered[start : start + rows]
                    texts = self._continue([prompts[index] for index in batch], requests[batch[0]].args[1])
                    for index, text in zip(batch, texts, strict=True):
                        results[index] = text
                        self.cache_hook.add_partial("generate_until", requests[index].args, text)
                    progress.add("", len(batch))
        return results

    def _continue(self, prompts: Sequence[list[int]], asked: dict[str, Any]) -> list[str]:
        """Continues a batch of prompts, the longest first, as the harness asks."""
        wanted = normalize_gen_kwargs(asked, MAX_NEW_TOKENS)
        until, new_tokens = handle_stop_sequences(wanted.get("until"), eos=None), wanted["max_gen_toks"]
        if unknown := set(wanted) - {"do_sample", "until", "max_gen_toks", "temperature"}:
            raise UserError(f"generation here knows no {', '.join(sorted(unknown))}: leave it out of gen_kwargs")
        room = self.max_length - new_tokens
        if room < 1:
            raise UserError(
                f"a task asks for {new_tokens} new tokens and the context is {self.max_length}: raise eval.context"
            )
        temperature = wanted["temperature"] if wanted["do_sample"] else 0.0
        cut = []
        for prompt in prompts:
            sampling = Sampling(temperature=temperature, seed=self.loaded.config.seed + self._drawn)
            # As `hf` does, the new tokens are decoded alone.
            cut.append(Prompt(prompt[-room:], sampling, new_tokens, tuple(filter(None, until)), continues=False))
            self._drawn += 1
        rows = self.loaded.config.eval.batch_size
        texts = complete_texts(self._generate, self.loaded.tokenizer, cut, rows=rows, context=self.max_length)
        return [text.text for text in texts]

    @cached_property
    def _generate(self) -> Generate:
        return make_generator(self.loaded.architecture)(self.loaded.arrays)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        prepared = []
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise UserError(
                    f"a continuation is {len(continuation):,} tokens long and the context is {self.max_length:,}: "
                    "raise eval.context"
                )
            tokens = (context + continuation)[-(self.max_length + 1) :]
            prepared.append(Request(tokens, len(tokens) - len(continuation)))
        answers = [(-found.nats, found.greedy) for found in self._answer(prepared, "continuations")]
        for (strings, _, _), pair in zip(requests, answers, strict=True):
            if strings is not None:
                self.cache_hook.add_partial("loglikelihood", strings, pair)
        return answers

    def _answer(self, requests: Sequence[Request], what: str) -> list[Answer]:
        return answer(self.loaded, requests, self.max_length, what, f"the {what} of the tasks")
