"""GGUF files: the exact numbers, and llama.cpp reads prompts and writes texts as this model does."""

import dataclasses
import json
import random
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xllamacpp

from mixtral_jax import verbs
from mixtral_jax.config import RopeScalingConfig, SourceConfig, UserError
from mixtral_jax.data.chat_records import Chat
from mixtral_jax.data.chat_template import ChatTemplate
from mixtral_jax.data.tokenizer import Tokenizer, load_tokenizer
from mixtral_jax.data.tokenizer_training import train_model
from mixtral_jax.inference.decoding import make_generator
from mixtral_jax.inference.sampling import Sampling
from mixtral_jax.model import attention, moe
from mixtral_jax.model.mixtral import Architecture, Mixtral
from mixtral_jax.weights.checkpoints import import_checkpoint
from mixtral_jax.weights.exporting import About, export_weights
from mixtral_jax.weights.gguf_files import export_gguf
from tests.limits import limited
from tests.small_run import WORDS
from tests.tiny import tiny_config
from tests.weights.models import blank, runtime, small
from tests.weights.test_bad_sources import make_tokenizer

CONFIG = small(vocab_size=322, num_experts=8, init_std=0.3, d_ff=64, num_layers=3)  # two rows without a token
CONTEXT, NEW = 256, 24


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    directory, draw = tmp_path_factory.mktemp("tokenizer"), random.Random(0)
    text = directory / "text.jsonl"
    text.write_text("".join(json.dumps({"text": " ".join(draw.choices(WORDS, k=80))}) + "\n" for _ in range(60)))
    source = SourceConfig(name="words", path=str(text))
    data = dataclasses.replace(tiny_config().data, sources=[source], cache_dir=str(directory / "cache"))
    return train_model(data, 320)


def make_arrays(config: Any) -> dict[str, Any]:
    return Architecture(config, runtime(config)).init(5)


def served(file: Path) -> xllamacpp.Server:
    """A model in llama.cpp, in this process; it computes with float32 where the file has it."""
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.cpuparams.n_threads, params.warmup, params.verbosity = (
        CONTEXT,
        1,
        1,
        False,
        0,
    )
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(params)


GREEDY = {"n_predict": NEW, "temperature": 0, "verbose": True, "return_tokens": True, "cache_prompt": False}


def theirs(server: xllamacpp.Server, prompt: Any) -> list[int]:
    """Greedy tokens after a prompt, without the end sign."""
    return server.handle_completions({"prompt": prompt, **GREEDY})["__verbose"]["tokens"]


def ours(config: Any, arrays: dict[str, Any], prompts: list[list[int]]) -> list[list[int]]:
    generate = make_generator(Architecture(config, runtime(config)))(arrays)
    found: list[list[int]] = [[] for _ in prompts]
    for step in generate(prompts, [Sampling()] * len(prompts), rows=len(prompts), slots=CONTEXT):
        found = [tokens + drawn.tokens for tokens, drawn in zip(found, step, strict=True)]
        if len(found[0]) >= NEW:
            break
    cut = [tokens[:NEW] for tokens in found]
    return [tokens[: tokens.index(2)] if 2 in tokens else tokens for tokens in cut]


def same_texts(config: Any, arrays: dict[str, Any], file: Path, count: int = 20) -> None:
    rng = np.random.default_rng(0)
    prompts = [[1, *rng.integers(3, 320, rng.integers(0, 100)).tolist()] for _ in range(count)]
    expected = ours(config, arrays, prompts)
    assert len({token for tokens in expected for token in tokens}) > 50
    server = served(file)
    assert [theirs(server, prompt) for prompt in prompts] == expected


def test_greedy_texts_are_those_of_llama_cpp(tokenizer: bytes, tmp_path: Path) -> None:
    arrays = make_arrays(CONFIG)
    file = export_gguf(arrays, CONFIG, tmp_path / "model.gguf", context=CONTEXT, tokenizer=tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    same_texts(CONFIG, arrays, file)

    server, known, template = served(file), Tokenizer(tokenizer), ChatTemplate(Tokenizer(tokenizer))
    texts = ["the river", "  two  spaces ", "Über «größere» Straßen", "漢字 😀", "a\n\tb", "12,5 </s> x"[:5]]
    for text in texts:
        assert theirs(server, text) == theirs(server, [known.bos_id, *known.encode(text)]), text
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "the river"},
        {"role": "assistant", "content": "old trees"},
        {"role": "user", "content": "and?"},
    ]
    answered = server.handle_chat_completions({"messages": messages, **GREEDY, "max_tokens": NEW})
    prompt = template.encode_prompt(Chat(messages)).tolist()
    assert answered["usage"]["prompt_tokens"] == len(prompt)
    assert [answered["__verbose"]["tokens"]] == ours(CONFIG, arrays, [prompt])


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScalingConfig("linear", factor=4.0),
        RopeScalingConfig("yarn", factor=4.0, original_context=64),
        RopeScalingConfig("yarn", 3.0, 64, beta_fast=6.0, beta_slow=1.5, attention_factor=1.5),
    ],
    ids=["linear", "yarn", "yarn with factors of its own"],
)
def test_scaled_positions(scaling: RopeScalingConfig, tokenizer: bytes, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, rope_scaling=scaling)
    arrays = make_arrays(config)
    file = export_gguf(arrays, config, tmp_path / "model.gguf", context=CONTEXT, tokenizer=tokenizer)
    same_texts(config, arrays, file, count=4)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "q8_0"])
def test_numbers_and_metadata(dtype: Any, tokenizer: bytes, tmp_path: Path) -> None:
    arrays = make_arrays(CONFIG)
    file = export_gguf(arrays, CONFIG, tmp_path / "model.gguf", context=77, dtype=dtype, tokenizer=tokenizer)
    found, params, layers = gguf.GGUFReader(file), arrays["params"], arrays["params"]["layers"]
    tensors = {tensor.name: tensor for tensor in found.tensors}
    assert len(tensors) == 3 + 10 * CONFIG.num_layers
    attention, moe = layers["attention"], layers["moe"]
    # Halves of a head become neighbours: numbers 0, 4, 1, 5, ... of a head of 8.
    rotated = lambda w: np.asarray(w).reshape(32, -1, 2, 4).transpose(1, 3, 2, 0).reshape(-1, 32)  # noqa: E731
    expected = {
        "token_embd": params["embedding"],
        "output": params["lm_head"].T,
        "output_norm": params["final_norm"]["scale"],
    }
    for n in range(CONFIG.num_layers):
        expected |= {f"blk.{n}.{name}": value for name, value in {
            "attn_norm": layers["attention_norm"]["scale"][n], "ffn_norm": layers["moe_norm"]["scale"][n],
            "attn_q": rotated(attention["wq"][n]), "attn_k": rotated(attention["wk"][n]),
            "attn_v": attention["wv"][n].reshape(32, -1).T, "attn_output": attention["wo"][n].reshape(-1, 32).T,
            "ffn_gate_inp": moe["router"][n].T, "ffn_gate_exps": moe["w_gate"][n].swapaxes(1, 2),
            "ffn_up_exps": moe["w_up"][n].swapaxes(1, 2), "ffn_down_exps": moe["w_down"][n].swapaxes(1, 2),
        }.items()}  # fmt: skip
    assert {f"{name}.weight" for name in expected} == tensors.keys()
    for name, value in expected.items():
        tensor, value = tensors[f"{name}.weight"], np.asarray(value)
        whole = "norm" in name or "gate_inp" in name or dtype == "float32"
        assert (tensor.tensor_type == gguf.GGMLQuantizationType.F32) == whole, name
        read = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert read.shape == value.shape, name
        if whole or dtype != "q8_0":
            np.testing.assert_array_equal(
                read, value.astype("float32" if whole else jnp.dtype(dtype)).astype(np.float32)
            )
        else:
            scale = np.abs(value).reshape(-1, 32).max(axis=1).repeat(32).reshape(value.shape) / 127
            assert (np.abs(read - value) <= (0.5 + 127 * 2**-11) * scale).all(), name  # the scale is a float16
    fields = {name: field.contents() for name, field in found.fields.items()}
    assert fields["general.architecture"] == "llama"
    assert fields["llama.context_length"] == 77
    assert len(fields["tokenizer.ggml.tokens"]) == len(fields["tokenizer.ggml.token_type"]) == CONFIG.vocab_size
    assert "[INST]" in fields["tokenizer.chat_template"]


ROUNDED = dataclasses.replace(CONFIG, vocab_size=320)
Model = dict[str, Any]


@pytest.fixture(scope="module")
def run(tokenizer: bytes, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Callable[[Path], Model]]:
    """A checkpoint, and what makes a model of the numbers that a file of it holds.

    Where each number goes shows an export of a model of consecutive ones.
    """
    directory, arrays = tmp_path_factory.mktemp("run"), make_arrays(ROUNDED)
    export_weights(arrays, ROUNDED, directory / "hf", "hf", About(CONTEXT, 0.0, tokenizer))
    import_checkpoint(directory / "hf", directory / "run", [], say=lambda text: None)
    leaves, tree = jax.tree.flatten(arrays["params"])
    ends = np.cumsum([0, *(leaf.size for leaf in leaves)])
    assert ends[-1] < 2**24  # which float32 tells apart

    def model_of(numbers: np.ndarray) -> Model:
        parts = [numbers[a:b].reshape(leaf.shape) for a, b, leaf in zip(ends, ends[1:], leaves, strict=False)]
        placed = [jax.device_put(part, leaf.sharding) for part, leaf in zip(parts, leaves, strict=True)]
        return {**arrays, "params": jax.tree.unflatten(tree, placed)}

    consecutive = model_of(np.arange(ends[-1], dtype=np.float32))
    plan = export_gguf(consecutive, ROUNDED, directory / "plan.gguf", context=CONTEXT, tokenizer=tokenizer)
    places = {tensor.name: np.ravel(tensor.data).astype(int) for tensor in gguf.GGUFReader(plan).tensors}

    def held_by(file: Path) -> Model:
        numbers = np.full(ends[-1], np.nan, np.float32)
        for tensor in gguf.GGUFReader(file).tensors:
            numbers[places[tensor.name]] = np.ravel(gguf.dequantize(tensor.data, tensor.tensor_type))
        return model_of(numbers)

    return directory / "run", held_by


def rounds_inputs(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets our model round the inputs of every product with a matrix of a file's type, as llama.cpp does."""

    def rounded(x: jax.Array) -> jax.Array:
        if dtype != "Q8_0":
            return jax.lax.reduce_precision(x, *{"F16": (5, 10), "BF16": (8, 7)}[dtype])
        blocks = x.reshape(*x.shape[:-1], -1, 32)
        scale = jnp.abs(blocks).max(-1, keepdims=True) / 127
        numbers = jnp.round(blocks / jnp.where(scale > 0, scale, 1))
        return (numbers * jax.lax.reduce_precision(scale, 5, 10)).reshape(x.shape)

    def contract(x: jax.Array, w: jax.Array, axes: int, *, backend: str) -> jax.Array:
        inner = w.shape[:axes]
        return jnp.tensordot(rounded(x.reshape(*x.shape[:-axes], -1)), w.reshape(np.prod(inner), *w.shape[axes:]), 1)

    def stacked_ffn(rows: jax.Array, sizes: jax.Array, weights: Any, options: Any) -> tuple[jax.Array, None]:
        ends = jnp.cumsum(sizes + -sizes % options.row_multiple)
        expert, x, out = jnp.searchsorted(ends, jnp.arange(len(rows)), side="right"), rounded(rows), rows
        for number, (gate, up, down) in enumerate(zip(weights.w_gate, weights.w_up, weights.w_down, strict=True)):
            y = rounded(jax.nn.silu(x @ gate) * (x @ up)) @ down
            out = jnp.where((expert == number)[:, None], y, out)
        return out, None

    monkeypatch.setattr(attention, "contract", contract)
    monkeypatch.setattr(moe, "stacked_ffn", stacked_ffn)
    monkeypatch.setattr(Mixtral, "logits", lambda self, x: rounded(x) @ self.head())


@pytest.mark.parametrize("dtype", ["F16", "BF16", "Q8_0"])
def test_the_verb_and_llama_cpp_in_other_types(
    dtype: str, run: tuple[Path, Callable[[Path], Model]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the same rounded weights llama.cpp's greedy tokens are ours where we round as it does.

    It rounds the inputs of products with the matrices to the matrices' own type. Where sums in another order let one of
    them fall to the other side, the two likeliest tokens may change places if they are as close as `near`.
    """
    near, few = 0.1, 5  # nats, tokens of 480
    (checkpoint, held_by), file = run, tmp_path / "out.gguf"
    verbs.export([str(checkpoint), str(file), "--format", "gguf", "--dtype", dtype.lower()])
    assert {tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors} == {"F32", dtype}
    rng, server = np.random.default_rng(0), served(file)
    prompts = [[1, *rng.integers(3, 320, rng.integers(0, 100)).tolist()] for _ in range(20)]
    texts = [theirs(server, prompt) for prompt in prompts]
    tokens = np.zeros((20, 128), np.int32)
    for row, prompt, text in zip(tokens, prompts, texts, strict=True):
        row[: len(prompt) + len(text)] = prompt + text

    def compute(arrays: Model) -> jax.Array:
        model = Architecture(ROUNDED, runtime(ROUNDED)).bind(arrays)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return jax.nn.log_softmax(model.logits(model(jnp.asarray(tokens), jnp.ones_like(tokens), positions)[0]))

    rounds_inputs(dtype, monkeypatch)
    found = np.asarray(jax.jit(compute)(held_by(file)))
    gaps = [
        row[len(prompt) + n - 1].max() - row[len(prompt) + n - 1, token]
        for row, prompt, text in zip(found, prompts, texts, strict=True)
        for n, token in enumerate(text)
    ]
    others = sorted(float(gap) for gap in gaps if gap)
    print(f"{dtype}: {len(gaps) - len(others)} of {len(gaps)} greedy tokens are ours, the others behind by {others}")
    assert len(gaps) > 450
    assert len(others) <= few
    assert max(gaps) < near


def refused(tmp_path: Path, words: str, *, arrays: Any = None, config: Any = CONFIG, **options: Any) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=words):
        export_gguf(arrays or blank(config), config, tmp_path / "new" / "model.gguf", context=8, **options)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_a_file_cannot_hold(tokenizer: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(tmp_path, "this checkpoint has none: use --format hf")
    refused(tmp_path, "not a byte-pair model", tokenizer=make_tokenizer(40))
    wide = load_tokenizer(tiny_config("data.tokenizer=mixtral").data, 32000).model_bytes
    refused(tmp_path, "32000 pieces but model.vocab_size is 322", tokenizer=wide)
    refused(tmp_path, "d_ff=48: choose --dtype F16", config=small(vocab_size=322), dtype="q8_0", tokenizer=tokenizer)
    arrays = blank(CONFIG)
    layers = arrays["params"]["layers"]
    layers["moe"]["w_up"] = layers["moe"]["w_up"].at[1, 3, 0, 0].set(1e6)
    refused(tmp_path, r"blk\.1\.ffn_up_exps.* float16 cannot hold", arrays=arrays, dtype="float16", tokenizer=tokenizer)
    arrays["selection_bias"] = jax.tree.map(lambda bias: bias + 1, arrays["selection_bias"])
    refused(tmp_path, "no released format has a place", arrays=arrays, tokenizer=tokenizer)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "model.gguf").touch()
    refused(tmp_path, "exists: name a new file", tokenizer=tokenizer)
    (tmp_path / "new" / "model.gguf").unlink()

    with limited(resource.RLIMIT_FSIZE, 20_000):
        refused(tmp_path, "File too large", tokenizer=tokenizer)
