"""A chat model: two tokens more than the tokenizer has pieces. Import, training and export beside transformers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mixtral_jax.data.tokenizer import Tokenizer, load_tokenizer
from mixtral_jax.runs.checkpoint import find_checkpoint
from mixtral_jax.weights.checkpoints import export_checkpoint, import_checkpoint
from mixtral_jax.weights.hf_tokenizer import tokenizer_files
from mixtral_jax.weights.released_tokenizer import read_tokenizer
from tests.small_run import run
from tests.tiny import tiny_config
from tests.weights.models import small
from tests.weights.parity.oracle import make_oracle, save
from tests.weights.parity.test_against_transformers import ONE_DEVICE, imported, logits_of

CONFIG = small(vocab_size=32002)
CHAT = "<|im_start|>user\nHello  there, 123!<|im_end|>\n<|im_start|>assistant\n über <|im_end|> <|im_end|><|im_start|>"
TEXTS = [
    CHAT,
    "",
    " ",
    "plain text",
    "<|im_end|>",
    " <|im_start|> x",
    "<|im_start",
    "a<|im_end|>b",
    CHAT * 300,
]


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As a fine-tune is saved: Mixtral's tokenizer.model, and Hugging Face's files with two tokens more."""
    directory = tmp_path_factory.mktemp("chat") / "hf"
    save(make_oracle(CONFIG), directory)
    base = load_tokenizer(tiny_config("data.tokenizer=mixtral").data, 32000)
    base.save(directory / "tokenizer.model")
    for name, content in tokenizer_files(base.model_bytes).items():
        (directory / name).write_text(content, encoding="utf-8")
    theirs = AutoTokenizer.from_pretrained(directory)
    theirs.add_special_tokens({"additional_special_tokens": ["<|im_end|>", "<|im_start|>"]})
    theirs.save_pretrained(directory)
    return directory


def same_tokens(ours: Tokenizer, directory: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(directory)
    encoded = [theirs.encode(text, add_special_tokens=False) for text in TEXTS]
    assert [ours.encode(text) for text in TEXTS] == encoded
    assert [ids.tolist() for ids in ours.encode_batch(TEXTS)] == encoded
    assert ours.decode(encoded[0]) == theirs.decode(encoded[0])
    assert {32000, 32001} <= set(encoded[0])


@pytest.mark.parametrize("left", ["all", "added_tokens.json", "tokenizer.json", "tokenizer_config.json"])
def test_every_way_to_name_added_tokens(chat: Path, tmp_path: Path, left: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes((chat / "tokenizer.model").read_bytes())
    (tmp_path / "added_tokens.json").write_text('{"<|im_end|>": 32000, "<|im_start|>": 32001}')
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((chat / name).read_text(encoding="utf-8"), encoding="utf-8")
    for file in tmp_path.glob("*.json"):
        if left not in ("all", file.name):
            file.unlink()
    if left != "tokenizer_config.json":  # transformers 5 writes them into tokenizer.json alone
        same_tokens(read_tokenizer(tmp_path, 32002), chat)


def test_import_train_export(chat: Path, tmp_path: Path) -> None:
    said: list[str] = []
    import_checkpoint(chat, tmp_path / "import", ["precision.params=float32"], say=said.append)
    assert "tokenizer: 32000 pieces, 2 added tokens" in said
    checkpoints, step = find_checkpoint(tmp_path / "import")
    tokenizer = Tokenizer(checkpoints.read_file(step, "tokenizer.model"))
    assert tokenizer.vocab_size == 32002
    same_tokens(tokenizer, chat)

    (tmp_path / "text.txt").write_text("\n\n".join([CHAT * 4] * 40), encoding="utf-8")
    (tmp_path / "config.yaml").write_text(f"""
model: {{d_model: {CONFIG.d_model}, d_ff: {CONFIG.d_ff}, num_layers: {CONFIG.num_layers}, num_heads: {CONFIG.num_heads},
        num_kv_heads: {CONFIG.num_kv_heads}, head_dim: {CONFIG.head_dim}, vocab_size: 32002,
        num_experts: {CONFIG.num_experts}, num_experts_per_tok: {CONFIG.num_experts_per_tok}, rope_theta: 1e6,
        norm_eps: {CONFIG.norm_eps}}}
data: {{sources: [{{name: chat, path: {tmp_path}/text.txt}}], seq_len: 32, cache_dir: {tmp_path}/cache,
       tokenizer: {tmp_path}/import/checkpoints/0/tokenizer.model}}
train: {{steps: 2, batch_size: 2}}
run_dir: {tmp_path}/run
init_from: {tmp_path}/import
""")
    slowed = "model.rope_scaling={kind: linear, factor: 2}"
    trained = run("train.py", tmp_path / "config.yaml", "data.holdout=0", slowed)
    assert trained.returncode == 0, trained.stderr
    assert "model.rope_scaling.kind is none there and linear here" in trained.stdout

    for source in ("import", "run"):
        out = tmp_path / f"{source}-out"
        export_checkpoint(tmp_path / source, out, "hf", say=said.append)
        same_tokens(tokenizer, out)
        tokens = np.array([tokenizer.encode(CHAT)], np.int32)
        with torch.no_grad():
            theirs = AutoModelForCausalLM.from_pretrained(out)(torch.from_numpy(tokens).long()).logits.numpy()
        ours = logits_of(*imported(out, ONE_DEVICE, 1, tokens.shape[1]), tokens)
        np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
        if source == "import":
            with torch.no_grad():
                original = AutoModelForCausalLM.from_pretrained(chat)(torch.from_numpy(tokens).long()).logits.numpy()
            np.testing.assert_array_equal(theirs, original)
