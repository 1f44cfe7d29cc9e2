"""Checkpoints block by block are Orbax's own, bit for bit, and no block is large."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mixtral_jax.config import CheckpointConfig, UserError
from mixtral_jax.runs import filling, streaming
from mixtral_jax.runs.checkpoint import Checkpoints
from mixtral_jax.runs.sources import DeviceArrays
from tests.tiny import mesh_of

BLOCK = 4096  # bytes, where the package has many megabytes
MESHES = [{}, {"expert": 2, "tensor": 2, "fsdp": 2}, {"data": 2, "expert": 4}]
SPECS = {  # name: shape, type, spec
    "layers/experts": ((3, 8, 16, 32), jnp.bfloat16, PartitionSpec(None, "expert", "fsdp", "tensor")),
    "layers/norm": ((3, 7), jnp.float32, PartitionSpec()),
    "embedding": ((64, 48), jnp.float32, PartitionSpec("tensor", "fsdp")),  # larger than a block, and whole
    "step": ((), jnp.int32, PartitionSpec()),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(streaming, "BLOCK", BLOCK)
    monkeypatch.setattr(streaming, "CHUNK", BLOCK // 4)


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "checkpoints", CheckpointConfig())


def state_on(sizes):
    mesh, draw = mesh_of(**sizes), np.random.default_rng(0)
    return {
        "params": {
            name: jax.device_put(jnp.asarray(draw.standard_normal(shape) * 99, dtype), NamedSharding(mesh, spec))
            for name, (shape, dtype, spec) in SPECS.items()
        }
    }


def abstract_on(sizes):
    mesh = mesh_of(**sizes)
    return {
        "params": {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
            for name, (shape, dtype, spec) in SPECS.items()
        }
    }


def assert_same(left, right):
    for name in SPECS:
        a, b = left["params"][name], right["params"][name]
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), name


@pytest.mark.parametrize("there", MESHES, ids=str)
@pytest.mark.parametrize("here", MESHES, ids=str)
def test_what_is_written_block_by_block_is_orbax_own(checkpoints, here, there):
    state, blocks = state_on(here), []
    checkpoints.save_streamed(5, DeviceArrays(state), {"a": 1}, {"b": b"c"}, blocks.append)
    assert (checkpoints.latest(), checkpoints.read_meta(5)["a"], checkpoints.read_file(5, "b")) == (5, 1, b"c")
    assert_same(checkpoints.restore(5, abstract_on(there)), state)
    assert sum(blocks) == sum(leaf.nbytes for leaf in state["params"].values())
    assert max(blocks) <= max(BLOCK, state["params"]["embedding"].nbytes)  # a matrix is never cut


@pytest.mark.parametrize("there", MESHES, ids=str)
@pytest.mark.parametrize("here", MESHES, ids=str)
def test_what_orbax_writes_is_read_block_by_block(checkpoints, here, there):
    state, blocks = state_on(here), []
    checkpoints.save(5, state, {}, {})
    checkpoints.wait()
    wanted = abstract_on(there)
    restored = checkpoints.restore(5, wanted, blocks.append)
    assert_same(restored, state)
    for name, leaf in restored["params"].items():
        assert leaf.sharding == wanted["params"][name].sharding
    assert len(blocks) >= 3 * 8 // 4 + 3
    assert max(blocks) <= max(BLOCK, state["params"]["embedding"].nbytes)


def test_blocks_are_not_compressed_and_those_that_are_can_be_read(checkpoints):
    state = state_on({})
    checkpoints.save_streamed(5, DeviceArrays(state), {}, {}, lambda count: None)
    checkpoints.save(6, state, {}, {})
    checkpoints.wait()
    for step, compressor in ((5, None), (6, "zstd")):
        folder = checkpoints.directory / str(step) / "state" / "params"
        stored = streaming.open_array(folder, "embedding")
        assert (stored.spec().to_json()["metadata"]["compressor"] or {}).get("id") == compressor
        assert math.prod(stored.chunk_layout.read_chunk.shape) * 4 <= streaming.CHUNK
        read = np.concatenate(list(streaming.read_blocks(folder, "embedding")))
        assert read.tobytes() == np.asarray(state["params"]["embedding"]).tobytes()


def test_reading_an_array_that_is_not_there_is_an_error_as_without_blocks(checkpoints):
    state = state_on({})
    checkpoints.save_streamed(5, DeviceArrays(state), {}, {}, lambda count: None)
    wanted = abstract_on({})
    wanted["params"]["more"] = wanted["params"]["step"]
    with pytest.raises(UserError, match=r"params/more is absent there"):
        checkpoints.restore(5, wanted, lambda count: None)


def test_a_save_that_fails_leaves_no_bundle(checkpoints):
    def full(count):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left on device"):
        checkpoints.save_streamed(5, DeviceArrays(state_on({})), {}, {}, full)
    assert checkpoints.steps() == []


def test_a_whole_model_is_cut_by_layer_and_expert(monkeypatch):
    monkeypatch.undo()
    blocks = list(streaming.blocks_of((32, 8, 4096, 14336), jnp.bfloat16))  # experts of 8x7B
    assert len(blocks) == 32 * 8
    assert {shape for _, shape in blocks} == {(1, 1, 4096, 14336)}
    assert len(list(streaming.blocks_of((32000, 4096), jnp.bfloat16))) == 1


def test_the_matrices_of_attention_are_cut_by_layer_however_large(monkeypatch):
    monkeypatch.undo()
    assert {shape for _, shape in streaming.blocks_of((56, 6144, 48, 128), jnp.float32)} == {(1, 6144, 48, 128)}


def test_few_blocks_are_held_at_once(checkpoints, monkeypatch):
    """However many there are, no more are read than threads write."""

    class Watched(DeviceArrays):
        def block(self, *place):
            held.append(1)
            most.append(len(held))
            return super().block(*place)

    held, most = [], []
    checkpoints.save_streamed(5, Watched(state_on({})), {}, {}, lambda count: held.pop())
    assert len(most) > 3 * 8
    assert max(most) <= filling.THREADS
    assert_same(checkpoints.restore(5, abstract_on({})), state_on({}))
