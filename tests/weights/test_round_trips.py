"""Every format in and out, bit for bit, on every kind of mesh."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mixtral_jax.config import ModelConfig
from mixtral_jax.model.mixtral import Architecture
from mixtral_jax.runs import sources
from mixtral_jax.runs.sources import DeviceArrays
from mixtral_jax.runs.streaming import place
from mixtral_jax.weights.exporting import EXPORT_FORMATS, About, export_weights
from mixtral_jax.weights.importing import ReleasedArrays
from mixtral_jax.weights.names import FORMATS, OURS, atoms, axis_sizes
from mixtral_jax.weights.released import Upcycling, open_released
from tests.weights.models import blank, import_arrays, runtime, small
from tests.weights.synthetic import LAYOUTS, Tensors, classic, load, save_torch, write

MESHES: list[dict[str, int]] = [{}, {"expert": 2, "tensor": 2, "fsdp": 2}, {"data": 2, "expert": 4}]
CONFIG = small()


def expected_arrays(tensors: Tensors, config: ModelConfig) -> dict[str, Any]:
    """What the parameters of a model in classic keys are, written out."""
    each = range(config.num_layers)
    inner = lambda name: [tensors[f"model.layers.{n}.{name}.weight"] for n in each]  # noqa: E731
    experts = lambda w: [  # noqa: E731
        [tensors[f"model.layers.{n}.block_sparse_moe.experts.{e}.{w}.weight"].T for e in range(config.num_experts)]
        for n in each
    ]
    heads = lambda w: w.T.reshape(config.d_model, -1, config.head_dim)  # noqa: E731
    return {
        "embedding": tensors["model.embed_tokens.weight"],
        "lm_head": tensors["lm_head.weight"].T,
        "final_norm": {"scale": tensors["model.norm.weight"]},
        "layers": {
            "attention_norm": {"scale": np.stack(inner("input_layernorm"))},
            "moe_norm": {"scale": np.stack(inner("post_attention_layernorm"))},
            "attention": {
                **{f"w{x}": np.stack([heads(w) for w in inner(f"self_attn.{x}_proj")]) for x in "qkv"},
                "wo": np.stack([w.T.reshape(-1, config.head_dim, config.d_model) for w in inner("self_attn.o_proj")]),
            },
            "moe": {
                "router": np.stack([w.T for w in inner("block_sparse_moe.gate")]),
                "w_gate": np.array(experts("w1")),
                "w_up": np.array(experts("w3")),
                "w_down": np.array(experts("w2")),
            },
        },
    }


def assert_same_bits(a: Any, b: Any) -> None:
    a, b = np.asarray(a), np.asarray(b)
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("name", EXPORT_FORMATS)
def test_every_format_gives_the_same_arrays_on_every_mesh(name: str, mesh: dict[str, int], tmp_path: Path) -> None:
    tensors = classic(CONFIG, "float32")
    released = open_released(write(tmp_path / "in", name, tensors, CONFIG, "float32"))
    assert (released.config, released.layout.name) == (CONFIG, name)
    here = runtime(CONFIG, **mesh)
    arrays = import_arrays(released, here)
    jax.tree.map(assert_same_bits, arrays["params"], expected_arrays(tensors, CONFIG))
    jax.tree.map(lambda bias: np.testing.assert_array_equal(bias, 0), arrays["selection_bias"])
    abstract = Architecture(CONFIG, here).abstract()
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), arrays) == jax.tree.map(
        lambda x: (x.shape, x.dtype, x.sharding), abstract
    )


@pytest.mark.parametrize("upcycled", [False, True])
def test_blocks_of_any_shape_hold_the_same_numbers(tmp_path: Path, upcycled: bool) -> None:
    """Where arrays are small, one block holds several layers and experts; where they are large, one a part of a row."""
    upcycling = Upcycling(3) if upcycled else None
    name: Any = "hf-dense" if upcycled else "mistral"
    released = open_released(write(tmp_path / "in", name, classic(CONFIG, "float32"), CONFIG, "float32"), upcycling)
    abstract = Architecture(released.config, runtime(released.config)).abstract()
    source = ReleasedArrays(released, abstract, upcycling)
    draw = np.random.default_rng(0)
    for part, leaves in source.parts.items():
        for path, leaf in leaves.items():
            whole = source.block(part, path, (0,) * len(leaf.shape), leaf.shape)
            assert (whole.shape, whole.dtype) == (leaf.shape, leaf.dtype)
            for _ in range(4):
                start = tuple(int(draw.integers(size)) for size in leaf.shape)
                shape = tuple(int(draw.integers(1, n - at + 1)) for at, n in zip(start, leaf.shape, strict=True))
                assert_same_bits(source.block(part, path, start, shape), whole[place(start, shape)])


def test_experts_in_one_pth_file_are_the_same_arrays(tmp_path: Path) -> None:
    tensors = classic(CONFIG, "bfloat16")
    write(tmp_path / "in", "mistral", tensors, CONFIG, "bfloat16")
    (tmp_path / "in" / "consolidated.safetensors").unlink()
    save_torch(LAYOUTS["mistral"](tensors, CONFIG), tmp_path / "in" / "consolidated.00.pth", "bfloat16")
    released = open_released(tmp_path / "in")
    assert (released.config, released.layout.name, released.dtype) == (CONFIG, "mistral", "bfloat16")
    arrays = import_arrays(released, runtime(CONFIG, params="bfloat16"))
    jax.tree.map(assert_same_bits, arrays["params"], expected_arrays(tensors, CONFIG))


@pytest.mark.parametrize(
    ("dtype", "params", "mesh"),
    [
        ("float32", "float32", MESHES[0]),
        ("bfloat16", "float32", MESHES[1]),
        ("bfloat16", "bfloat16", MESHES[2]),
        ("float16", "float32", MESHES[1]),
    ],
)
@pytest.mark.parametrize("name", EXPORT_FORMATS)
def test_import_then_export_is_byte_equal(
    name: Any, dtype: Any, params: Any, mesh: dict[str, int], tmp_path: Path
) -> None:
    config = small(num_layers=5)  # more than one file of the fused Mistral format
    write(tmp_path / "in", name, classic(config, dtype), config, dtype)
    arrays = import_arrays(open_released(tmp_path / "in"), runtime(config, params=params, **mesh))
    export_weights(arrays, config, tmp_path / "out", name, About(8, 0.02), dtype=dtype, shard_bytes=30_000)
    before, after = load(tmp_path / "in"), load(tmp_path / "out")
    assert before.keys() == after.keys()
    for key in before:
        assert_same_bits(before[key], after[key])
    again = open_released(tmp_path / "out")
    assert (again.config, again.dtype, again.layout.name) == (config, dtype, name)


def test_files_of_an_export_stay_below_the_limit(tmp_path: Path) -> None:
    arrays = blank(CONFIG)
    files = export_weights(arrays, CONFIG, tmp_path / "a", "hf", About(8, 0.0), shard_bytes=40_000)
    shards = [file for file in files if file.suffix == ".safetensors"]
    assert len(shards) > 3
    assert all(file.stat().st_size < 40_000 + 10_000 for file in shards)  # headers come on top
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    files = export_weights(arrays, CONFIG, tmp_path / "b", "hf", About(8, 0.0))
    assert [file.name for file in files] == ["config.json", "model.safetensors"]


def test_the_table_of_axes_is_the_models() -> None:
    config = small(num_layers=3, num_experts=6, num_kv_heads=1, vocab_size=62)  # no two sizes alike by chance
    sizes = axis_sizes(config)
    architecture = Architecture(config, runtime(config))
    flat = jax.tree_util.tree_leaves_with_path(architecture.abstract()["params"])
    shapes = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in flat}
    assert shapes == {path: tuple(sizes[axis] for axis in atoms(axes)) for path, axes in OURS.items()}
    logical = jax.tree_util.tree_leaves_with_path(architecture.axes()["params"], is_leaf=lambda x: isinstance(x, tuple))
    for path, axes in logical:
        named = atoms(OURS[jax.tree_util.keystr(path, simple=True, separator="/")])
        assert all(ours in (None, theirs, f"expert_{theirs}") for ours, theirs in zip(axes, named, strict=True))


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_holds_every_parameter_once(name: Any) -> None:
    paths = [row.path for row in FORMATS[name].rows]
    assert len(paths) == len(set(paths))
    assert set(OURS) - set(paths) == ({"layers/moe/router"} if FORMATS[name].dense else set())
    assert set(LAYOUTS) == set(FORMATS)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_devices_exchange_nothing(mesh: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read of arrays on devices comes from each device alone, whatever is asked for."""
    take, devices = sources._take, []
    monkeypatch.setattr(sources, "_take", lambda whole, *rest: devices.append(whole.devices()) or take(whole, *rest))
    source = DeviceArrays(Architecture(CONFIG, runtime(CONFIG, **mesh)).init(0))
    draw = np.random.default_rng(0)
    for path, leaf in source.parts["params"].items():
        start = tuple(int(draw.integers(size)) for size in leaf.shape)
        shape = tuple(int(draw.integers(1, n - at + 1)) for at, n in zip(start, leaf.shape, strict=True))
        assert_same_bits(source.block("params", path, start, shape), np.asarray(leaf)[place(start, shape)])
    assert {len(found) for found in devices} == {1}
    assert len(set().union(*devices)) > 1 or not mesh
