"""Imported models compute what transformers computes; exported ones are taken by transformers."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from mixtral_jax.config import LossesConfig
from mixtral_jax.data.batch import Batch
from mixtral_jax.model.mixtral import Architecture
from mixtral_jax.training.losses import compute_losses, count
from mixtral_jax.weights.exporting import About, export_weights
from mixtral_jax.weights.released import Upcycling, open_released
from tests.tiny import by_engine
from tests.weights.models import import_arrays, runtime, small
from tests.weights.parity.oracle import make_oracle, random_tokens, save

SHAPES = {
    "small": small(),
    "one kv head, top 3 of 8": small(
        num_layers=3, num_heads=8, num_kv_heads=1, head_dim=4, num_experts=8, num_experts_per_tok=3, d_ff=40
    ),
    "top 1, wide heads": small(
        d_model=48, num_heads=2, num_kv_heads=2, head_dim=24, num_experts=3, num_experts_per_tok=1, rope_theta=1e4
    ),
    "all experts": small(num_experts=8, num_experts_per_tok=8, vocab_size=98, norm_eps=1e-3),
}
GREEDY: Any = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
ONE_DEVICE: dict[str, int] = {}
ALL_KINDS = {"fsdp": 2, "expert": 2, "tensor": 2}


def imported(
    directory: Path, mesh: dict[str, int], batch: int, length: int, matmul: str = "xla"
) -> tuple[Architecture, dict[str, Any]]:
    released = open_released(directory)
    where = runtime(released.config, batch=batch, seq_len=length, matmul=matmul, **mesh)
    architecture = Architecture(released.config, where)
    return architecture, import_arrays(released, architecture.runtime)


def logits_of(architecture: Architecture, arrays: dict[str, Any], tokens: np.ndarray) -> np.ndarray:
    return np.asarray(_forward(arrays, tokens, architecture))


@partial(jax.jit, static_argnums=2)
def _forward(arrays: dict[str, Any], tokens: jax.Array, architecture: Architecture) -> jax.Array:
    model = architecture.bind(arrays)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return model.logits(model(tokens, jnp.ones_like(tokens), positions)[0])


@pytest.mark.parametrize(
    ("name", "batch", "length", "mesh"),
    [
        ("small", 1, 1, ONE_DEVICE),
        ("small", 4, 33, ALL_KINDS),
        ("one kv head, top 3 of 8", 3, 17, ONE_DEVICE),
        ("top 1, wide heads", 2, 96, ONE_DEVICE),
        ("all experts", 4, 24, ALL_KINDS),
        ("all experts", 5, 7, ONE_DEVICE),
    ],
)
def test_logits(name: str, batch: int, length: int, mesh: dict[str, int], tmp_path: Path) -> None:
    config = SHAPES[name]
    oracle = make_oracle(config)
    save(oracle, tmp_path / "hf")
    tokens = random_tokens(config, batch, length)
    with torch.no_grad():
        expected = oracle(torch.from_numpy(tokens).long()).logits.numpy()
    actual = logits_of(*imported(tmp_path / "hf", mesh, batch, length), tokens)
    np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=0)
    np.testing.assert_array_equal(actual.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize(("matmul", "limit"), [by_engine("mkl", "mkl", 1e-4), by_engine("amx", "amx", 5e-4)])
def test_logits_by_other_products(matmul: str, limit: float, tmp_path: Path) -> None:
    config = SHAPES["one kv head, top 3 of 8"]
    oracle = make_oracle(config)
    save(oracle, tmp_path / "hf")
    tokens = random_tokens(config, 3, 17)
    with torch.no_grad():
        expected = oracle(torch.from_numpy(tokens).long()).logits.numpy()
    actual = logits_of(*imported(tmp_path / "hf", ONE_DEVICE, 3, 17, matmul), tokens)
    np.testing.assert_allclose(actual, expected, atol=limit, rtol=0)
    np.testing.assert_array_equal(actual.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("name", ["one kv head, top 3 of 8", "top 1, wide heads"])
def test_gradients_and_load_balancing_loss(name: str, tmp_path: Path) -> None:
    config, coefficient, batch, length = SHAPES[name], 0.3, 2, 24
    oracle = make_oracle(config)
    save(oracle, tmp_path / "hf")
    tokens = random_tokens(config, batch, length + 1)
    inputs, targets = torch.from_numpy(tokens[:, :-1]).long(), torch.from_numpy(tokens[:, 1:]).long()
    out = oracle(inputs, output_router_logits=True)
    cross_entropy = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), targets.flatten())
    # Layer by layer: Hugging Face pools the layers, which hides opposite imbalances; the formula is the same.
    balance = torch.stack(
        [
            load_balancing_loss_func((layer,), config.num_experts, config.num_experts_per_tok)
            for layer in out.router_logits
        ]
    ).mean()
    # Some releases hand out probabilities under this name and take the softmax twice.
    assert not torch.allclose(out.router_logits[0].sum(-1), torch.ones(()))
    (cross_entropy + coefficient * balance).backward()

    architecture, arrays = imported(tmp_path / "hf", ONE_DEVICE, batch, length)
    data = Batch(
        tokens=jnp.asarray(tokens[:, :-1]),
        targets=jnp.asarray(tokens[:, 1:]),
        segment_ids=jnp.ones((batch, length), jnp.int32),
        positions=jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length)),
        loss_mask=jnp.ones((batch, length), bool),
    )
    losses_config = LossesConfig(load_balance=coefficient * config.num_experts_per_tok, router_z=0.0)

    def loss(params: dict[str, Any]) -> tuple[jax.Array, Any]:
        model = architecture.bind({**arrays, "params": params})
        losses, _ = compute_losses(model, data, count(data), None, losses_config)
        return losses.total, losses

    grads, losses = jax.jit(jax.grad(loss, has_aux=True))(arrays["params"])
    np.testing.assert_allclose(losses.cross_entropy, cross_entropy.item(), rtol=1e-5)
    np.testing.assert_allclose(losses.load_balance * config.num_experts_per_tok, balance.item(), rtol=1e-5)

    # The export knows which gradient is whose.
    export_weights({**arrays, "params": grads}, config, tmp_path / "grads", "hf-fused", About(length, load_balance=0.0))
    ours = load_file(tmp_path / "grads" / "model.safetensors")
    theirs = {key: parameter.grad for key, parameter in oracle.named_parameters()}
    assert ours.keys() == theirs.keys()
    for key, grad in theirs.items():
        np.testing.assert_allclose(ours[key], grad, atol=2e-5 * grad.abs().max().item() + 1e-7, rtol=0, err_msg=key)


def test_the_load_balancing_coefficient_keeps_its_meaning(tmp_path: Path) -> None:
    """One layer: there pooling over layers changes nothing, and the exported coefficient times HF's loss is ours."""
    config = small(num_layers=1, num_experts_per_tok=3)
    save(make_oracle(config), tmp_path / "hf")
    architecture, arrays = imported(tmp_path / "hf", ONE_DEVICE, 2, 16)
    export_weights(arrays, config, tmp_path / "out", "hf", About(context=16, load_balance=0.6))
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.from_numpy(random_tokens(config, 2, 16)).long()
    out = oracle(tokens, labels=tokens, output_router_logits=True)
    plain = oracle(tokens, labels=tokens, output_router_logits=False)
    data = Batch(
        tokens=jnp.asarray(tokens.numpy(), jnp.int32),
        targets=jnp.zeros((2, 16), jnp.int32),
        segment_ids=jnp.ones((2, 16), jnp.int32),
        positions=jnp.broadcast_to(jnp.arange(16, dtype=jnp.int32), (2, 16)),
        loss_mask=jnp.ones((2, 16), bool),
    )
    losses, _ = jax.jit(
        lambda a: compute_losses(architecture.bind(a), data, count(data), None, LossesConfig(load_balance=0.6))
    )(arrays)
    np.testing.assert_allclose(0.6 * losses.load_balance, (out.loss - plain.loss).item(), rtol=1e-4)


@pytest.mark.parametrize("format_name", ["hf", "hf-fused"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_transformers_takes_exports(format_name: Any, dtype: Any, tmp_path: Path) -> None:
    config = SHAPES["one kv head, top 3 of 8"]
    oracle = make_oracle(config).to(getattr(torch, dtype))
    save(oracle, tmp_path / "hf")
    _, arrays = imported(tmp_path / "hf", ONE_DEVICE, 1, 8)
    export_weights(
        arrays,
        config,
        tmp_path / "out",
        format_name,
        About(context=128, load_balance=0.02),
        dtype=dtype,
        shard_bytes=50_000,
    )
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert loaded.dtype == getattr(torch, dtype)
    state = loaded.state_dict()
    for key, value in oracle.state_dict().items():
        assert torch.equal(value, state[key]), key
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    prompt = torch.from_numpy(random_tokens(config, 2, 5)).long()
    assert torch.equal(loaded.generate(prompt, **GREEDY), original.generate(prompt, **GREEDY))


def test_transformers_generates_what_this_model_generates(tmp_path: Path) -> None:
    config = small(init_std=0.3)
    architecture = Architecture(config, runtime(config, batch=4, seq_len=25))
    arrays = architecture.init(3)
    tokens = np.zeros((4, 25), np.int32)
    tokens[:, :5] = random_tokens(config, 4, 5)
    for place in range(5, 25):
        tokens[:, place] = logits_of(architecture, arrays, tokens)[:, place - 1].argmax(-1)
    assert len(set(tokens[:, 5:].flatten().tolist())) > 10
    export_weights(arrays, config, tmp_path / "out", "hf", About(context=25, load_balance=0.02))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    generated = loaded.generate(torch.from_numpy(tokens[:, :5]).long(), **GREEDY)
    np.testing.assert_array_equal(generated.numpy(), tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pytorch_reads_and_writes_the_same_pickles(dtype: torch.dtype, tmp_path: Path) -> None:
    config = small(num_layers=6)
    oracle = make_oracle(config).to(dtype)
    save(oracle, tmp_path / "hf")
    _, arrays = imported(tmp_path / "hf", ONE_DEVICE, 1, 8)
    name: Any = str(dtype).removeprefix("torch.")
    export_weights(arrays, config, tmp_path / "out", "mistral-fused", About(context=8, load_balance=0.0), dtype=name)
    files = sorted((tmp_path / "out").glob("*.pt"))
    assert [file.name for file in files] == ["consolidated.00.pt", "consolidated.01.pt"]
    for file in files:
        for mmap in (False, True):
            tensors = torch.load(file, weights_only=True, mmap=mmap)
            assert {tensor.dtype for tensor in tensors.values()} == {dtype}
        # As PyTorch writes it: several tensors in one storage, parameters, and attributes on the dictionary.
        shared = torch.cat([tensor.flatten() for tensor in tensors.values()])
        start, state = 0, torch.nn.Module().state_dict()
        for key, tensor in tensors.items():
            state[key] = torch.nn.Parameter(shared[start : start + tensor.numel()].view(tensor.shape))
            start += tensor.numel()
        torch.save(state, file)
    again = import_arrays(open_released(tmp_path / "out"), runtime(config))
    jax.tree.map(np.testing.assert_array_equal, again, arrays)


def test_an_upcycled_dense_model_computes_the_same(tmp_path: Path) -> None:
    config = small(num_experts=6, num_experts_per_tok=2)
    torch.manual_seed(0)
    dense = MistralForCausalLM(
        MistralConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            intermediate_size=config.d_ff,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            rms_norm_eps=config.norm_eps,
            sliding_window=None,
            initializer_range=0.2,
        )
    ).eval()
    dense.save_pretrained(tmp_path / "dense")
    upcycling = Upcycling(6, 2)
    released = open_released(tmp_path / "dense", upcycling)
    assert released.config == config
    architecture = Architecture(config, runtime(config, batch=4, seq_len=20, **ALL_KINDS))
    arrays = import_arrays(released, architecture.runtime, upcycling)
    tokens = random_tokens(config, 4, 20)
    with torch.no_grad():
        expected = dense(torch.from_numpy(tokens).long()).logits.numpy()
    np.testing.assert_allclose(logits_of(architecture, arrays, tokens), expected, atol=1e-4, rtol=0)
