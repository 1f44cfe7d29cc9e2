from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from mixtral_jax import hardware
from mixtral_jax.config import ModelConfig
from mixtral_jax.config_loading import load_config
from mixtral_jax.hardware import PeakFlops, measured_matmul_peak, memory_in_use, peak_flops
from mixtral_jax.metrics import flops_per_token, parameter_counts, speed

MIXTRAL_8X7B = ModelConfig(4096, 14336, 32, 32, 8, 128, 32000, 8, 2, 1e6, 1e-5)
MIXTRAL_8X22B = ModelConfig(6144, 16384, 56, 48, 8, 128, 32000, 8, 2, 1e6, 1e-5)
SMALL = load_config(Path(__file__).parents[1] / "configs/small.yaml").model


@pytest.mark.parametrize(
    ("model", "total", "active"),
    [(MIXTRAL_8X7B, 46_702_792_704, 12_879_925_248), (MIXTRAL_8X22B, 140_620_634_112, 39_152_031_744)],
)
def test_parameters_of_the_released_models(model, total, active):
    assert parameter_counts(model) == (total, active)


def test_parameters_and_work_of_small():
    assert parameter_counts(SMALL).total == 214_213_120
    assert flops_per_token(SMALL, 0) == 6 * 65_699_840  # the weights that a token meets
    assert flops_per_token(SMALL, 512) == pytest.approx(406.8e6, abs=0.05e6)


def test_attention_work_is_the_causal_half():
    per_key = 3 * 2 * 2 * SMALL.num_heads * SMALL.head_dim * SMALL.num_layers  # passes, products, FLOP of a product
    assert flops_per_token(SMALL, 4096) - flops_per_token(SMALL, 0) == per_key * 4096 / 2


def test_speed_counts_all_devices():
    rates = speed(tokens=8000, seconds=4.0, flops=5e6, num_devices=4, peak=PeakFlops(1e10, "made up"))
    assert rates == {"tokens_per_second": 2000.0, "model_flops_per_second": 1e10, "mfu": 0.25}


def pretend(monkeypatch, kind, platform, count=1):
    device = SimpleNamespace(device_kind=kind, platform=platform)
    monkeypatch.setattr(jax, "local_devices", lambda: [device] * count)
    monkeypatch.setattr(jax, "local_device_count", lambda: count)
    monkeypatch.setattr(hardware, "measured_matmul_peak", lambda compute, multiply: 8e10)


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA B200", 2250),
    ],
)
def test_peak_of_known_chips(monkeypatch, kind, teraflops):
    pretend(monkeypatch, kind, "tpu", count=4)
    peak = peak_flops(jnp.bfloat16)
    assert peak.value == teraflops * 1e12
    assert "by its maker's data" in peak.source


@pytest.mark.parametrize("kind", ["NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090"])
def test_peak_of_unknown_chips_is_measured(monkeypatch, kind):
    pretend(monkeypatch, kind, "gpu", count=2)
    peak = peak_flops(jnp.bfloat16)
    assert peak.value == 8e10
    assert peak.source.startswith("80 GFLOP/s: fastest bfloat16 matrix product timed at start")
    assert peak.source.endswith(f"on one {kind}, which the table of peaks does not hold")


def test_simulated_devices_share_the_processor(monkeypatch):
    pretend(monkeypatch, "cpu", "cpu", count=8)
    peak = peak_flops(jnp.float32)
    assert peak.value == 1e10
    assert peak.source.endswith("timed at start on this processor, shared by 8 simulated devices")


@pytest.mark.parametrize("compute", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("platform", "fastest"), [("cpu", 2 * 16**3 / 0.0025), ("gpu", 2 * 128**3 / 0.08)])
def test_the_measured_peak_is_the_fastest_rate_of_all_products(monkeypatch, compute, platform, fastest):
    took = {8: (0.04, 0.02, 0.03), 16: (0.01, 0.0025, 0.09), 32: (0.05, 0.08, 0.05), 64: (0.99,)}
    took |= {128: (0.09, 0.08, 0.1)}  # seconds, of which size

    def multiply(a, b):
        assert a.dtype == compute
        return a @ b

    times = iter([reading for size in took for seconds in took[size] for reading in (0.0, seconds)])
    monkeypatch.setattr(hardware, "SIZES", tuple(took))
    monkeypatch.setattr(hardware, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(platform=platform)])
    assert measured_matmul_peak(compute, multiply) == fastest


def test_memory_grows_with_what_is_held():
    before = memory_in_use()
    held = jnp.ones((64, 2**20)).block_until_ready()  # 256 MiB
    after = memory_in_use()
    assert after["memory_gib"] >= before["memory_gib"]
    assert after["memory_resident_gib"] - before["memory_resident_gib"] == pytest.approx(held.nbytes / 2**30, abs=0.1)
    assert 0 < after["memory_resident_gib"] <= after["memory_gib"]
