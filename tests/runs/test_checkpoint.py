"""Checkpoints: bitwise, on any mesh, and honest about damage."""

import errno
import json
import os
import shutil
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mixtral_jax.config import CheckpointConfig, UserError
from mixtral_jax.runs import checkpoint as checkpoint_module
from mixtral_jax.runs import manifest as manifest_module
from mixtral_jax.runs.checkpoint import Checkpoints, find_checkpoint
from mixtral_jax.runs.manifest import find_damage, write_manifest


def mesh_of(*shape):
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return Mesh(devices, ("a", "b")[: len(shape)])


def make_state(seed=0, mesh=None):
    mesh = mesh or mesh_of(8)
    split = NamedSharding(mesh, PartitionSpec("a"))
    draw = np.random.default_rng(seed)
    return {
        "params": {
            "wide": jax.device_put(draw.standard_normal((16, 8)).astype(np.float32), split),
            "half": jax.device_put(jnp.asarray(draw.standard_normal((8, 2)), jnp.bfloat16), split),
        },
        "opt_state": (jnp.asarray(draw.integers(0, 9, 5)),),
        "step": jnp.asarray(seed, jnp.int32),
    }


def abstract_of(state, mesh=None):
    def describe(x):
        sharding = NamedSharding(mesh, PartitionSpec()) if mesh else x.sharding
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(describe, state)


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture
def said():
    return []


@pytest.fixture
def checkpoints(tmp_path, said):
    return Checkpoints(tmp_path / "checkpoints", CheckpointConfig(every=1, keep=3), said.append)


def save(checkpoints, *steps):
    for step in steps:
        checkpoints.save(step, make_state(step), {"data": step}, {"tokenizer.model": b"pieces"})
    checkpoints.wait()


def test_round_trip_is_bitwise(checkpoints):
    save(checkpoints, 3)
    state = make_state(3)
    assert checkpoints.latest() == 3
    assert_same(checkpoints.restore(3, abstract_of(state)), state)
    assert checkpoints.read_meta(3)["data"] == 3
    assert checkpoints.read_file(3, "tokenizer.model") == b"pieces"


@pytest.mark.drills
@pytest.mark.parametrize("shape", [(1,), (2, 4), (4, 2)])
def test_restores_onto_another_mesh(checkpoints, shape):
    save(checkpoints, 1)
    state = make_state(1)
    target = NamedSharding(mesh_of(*shape), PartitionSpec(("a", "b")[: len(shape)]))
    abstract = abstract_of(state)
    abstract["params"]["wide"] = jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=target)
    restored = checkpoints.restore(1, abstract)
    assert restored["params"]["wide"].sharding == target
    assert_same(restored, state)


def test_one_part_is_restored_alone(checkpoints):
    save(checkpoints, 1)
    shutil.rmtree(checkpoints.directory / "1" / "state" / "opt_state")  # proves that it is not read
    params = {"params": make_state(1)["params"]}
    assert_same(checkpoints.restore(1, abstract_of(params)), params)


@pytest.mark.parametrize("gone", ["state/params", "state", "tokenizer.model"])
def test_a_checkpoint_that_its_run_removes_while_it_is_read_is_one_sentence(checkpoints, gone):
    save(checkpoints, 1)
    place = checkpoints.directory / "1" / gone
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    read = checkpoints.restore if place.name != "tokenizer.model" else checkpoints.read_file
    with pytest.raises(UserError, match=r"try again, or raise its checkpoint\.keep"):
        read(1, "tokenizer.model" if read == checkpoints.read_file else abstract_of(make_state(1)))


def test_donated_buffers_do_not_reach_the_save(checkpoints):
    state = make_state(5)
    want = jax.tree.map(np.array, state)
    checkpoints.save(5, state, {}, {})
    jax.block_until_ready(jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)(state))
    checkpoints.wait()
    assert_same(checkpoints.restore(5, abstract_of(make_state(5))), want)


def test_keeps_the_newest_and_the_multiples(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=2, keep_every=4))
    save(checkpoints, *range(1, 10))
    assert checkpoints.steps() == [4, 8, 9]


def data_file(bundle: Path) -> Path:
    return max((p for p in bundle.rglob("*") if p.is_file() and "/d/" in str(p)), key=lambda p: p.stat().st_size)


def flip_bit(bundle):
    content = bytearray(data_file(bundle).read_bytes())
    content[len(content) // 2] ^= 1
    data_file(bundle).write_bytes(bytes(content))


DAMAGE = {
    "flipped bit": (flip_bit, "checksum"),
    "truncated": (lambda b: data_file(b).write_bytes(data_file(b).read_bytes()[:-1]), "bytes instead of"),
    "missing file": (lambda b: data_file(b).unlink(), "is missing"),
    "stray file": (lambda b: (b / "state" / "stray").write_bytes(b"x"), "does not belong"),
    "no manifest": (lambda b: (b / "manifest.json").unlink(), "unfinished"),
    "bad manifest": (lambda b: (b / "manifest.json").write_bytes(b"{"), "manifest is damaged"),
    "renamed": (lambda b: shutil.rmtree(b) or shutil.copytree(b.parent / "1", b), "checkpoint of step 1 under another"),
    "flipped bit in meta": (lambda b: (b / "meta.json").write_text((b / "meta.json").read_text()[::-1]), "meta.json"),
}


@pytest.mark.drills
@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_the_older_one_used(checkpoints, said, kind):
    save(checkpoints, 1, 2)
    harm, sentence = DAMAGE[kind]
    harm(checkpoints.directory / "2")
    assert checkpoints.latest() == 1
    assert len(said) == 1
    assert str(checkpoints.directory / "2") in said[0]
    assert sentence in said[0]


@pytest.mark.drills
def test_any_flipped_bit_of_any_file_is_found_and_the_older_one_used(checkpoints, said):
    save(checkpoints, 1, 2)
    bundle = checkpoints.directory / "2"
    files = sorted(path for path in bundle.rglob("*") if path.is_file() and path.stat().st_size)
    draw = np.random.default_rng(0)
    for number in range(100):
        file = files[draw.integers(len(files))] if number else bundle / "manifest.json"
        content = bytearray(good := file.read_bytes())
        content[draw.integers(len(content))] ^= 1 << draw.integers(8)
        file.write_bytes(bytes(content))
        damage = find_damage(bundle)
        assert damage is not None
        assert file.name in damage or file.name == "manifest.json"
        if number % 25 == 0:
            assert checkpoints.latest() == 1
            assert damage in said[-1]
        file.write_bytes(good)
    assert checkpoints.latest() == 2


@pytest.mark.drills
def test_old_ones_stay_where_the_newest_reads_back_damaged(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=1))
    save(checkpoints, 1)

    def write_and_harm(bundle, digests):
        write_manifest(bundle, digests)
        flip_bit(bundle)

    monkeypatch.setattr(checkpoint_module, "write_manifest", write_and_harm)
    with pytest.raises(UserError, match=r"checkpoint 2 .* reads back damaged: .* \(checksum\); .* earlier .* intact"):
        save(checkpoints, 2)
    assert checkpoints.latest() == 1
    monkeypatch.undo()
    save(checkpoints, 3)
    assert checkpoints.steps() == [3]


@pytest.mark.drills
def test_stray_directories_mislead_nobody(checkpoints, said):
    save(checkpoints, 2)
    (checkpoints.directory / "5").mkdir()
    (checkpoints.directory / "7").write_text("a file")
    (checkpoints.directory / "notes").mkdir()
    assert checkpoints.latest() == 2
    assert len(said) == 2
    save(checkpoints, 3, 8)  # and nobody removes what is not ours
    assert (checkpoints.directory / "5").is_dir()
    assert checkpoints.latest() == 8


@pytest.mark.drills
def test_all_damaged_is_an_error_but_none_is_a_fresh_start(checkpoints):
    assert checkpoints.latest() is None
    save(checkpoints, 1)
    flip_bit(checkpoints.directory / "1")
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged"):
        checkpoints.latest()


@pytest.mark.drills
def test_lost_manifests_are_no_fresh_start(checkpoints):
    save(checkpoints, 1, 2)
    for manifest in checkpoints.directory.glob("*/manifest.json"):
        manifest.unlink()
    with pytest.raises(UserError, match="every checkpoint"):
        checkpoints.latest()


@pytest.mark.drills
def test_damaged_ones_take_no_good_one_s_place(tmp_path, said):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=2), said.append)
    save(checkpoints, 1, 2)
    flip_bit(tmp_path / "2")
    assert checkpoints.latest() == 1
    save(checkpoints, 3)
    assert checkpoints.steps() == [1, 3]


@pytest.mark.drills
def test_an_error_lets_the_save_under_way_finish(checkpoints):
    def fail_while_saving():
        with checkpoints:
            checkpoints.save(1, make_state(1), {}, {})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_while_saving()
    assert checkpoints.latest() == 1


@pytest.mark.drills
@pytest.mark.parametrize(("number", "words"), [(errno.EROFS, "Read-only"), (errno.EFBIG, "too large")])
def test_errors_below_orbax_are_one_sentence(checkpoints, monkeypatch, number, words):
    def fail(directory, digests):
        raise ValueError(f"INTERNAL: writing [os_error_code='{number}']")

    monkeypatch.setattr(checkpoint_module, "write_manifest", fail)
    checkpoints.save(2, make_state(2), {}, {})
    with pytest.raises(UserError, match=words):
        checkpoints.wait()


@pytest.mark.parametrize("change", ["shape", "dtype", "missing", "extra"])
def test_a_state_that_does_not_fit_is_named(checkpoints, change):
    save(checkpoints, 1)
    params = abstract_of(make_state(1))["params"]
    wide = params["wide"]
    match change:
        case "shape":
            params["wide"] = jax.ShapeDtypeStruct((16, 4), wide.dtype, sharding=wide.sharding)
        case "dtype":
            params["wide"] = jax.ShapeDtypeStruct(wide.shape, jnp.bfloat16, sharding=wide.sharding)
        case "missing":
            del params["wide"]
        case "extra":
            params["more"] = wide
    with pytest.raises(UserError, match=r"does not fit the configuration: params/(wide|more) is"):
        checkpoints.restore(1, {"params": params})


@pytest.mark.drills
def test_a_full_disk_is_one_sentence_and_the_next_save_works(checkpoints, monkeypatch):
    save(checkpoints, 1)
    real = checkpoint_module.write_manifest

    def full(directory, digests):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_module, "write_manifest", full)
    checkpoints.save(2, make_state(2), {}, {})
    with pytest.raises(UserError, match=r"checkpoint 2 could not be written .* disk is full"):
        checkpoints.wait()
    assert checkpoints.steps() == [1]
    monkeypatch.setattr(checkpoint_module, "write_manifest", real)
    save(checkpoints, 3)
    assert checkpoints.latest() == 3


@pytest.mark.drills
@pytest.mark.parametrize(("inodes", "free", "fits"), [(10_000, 3, False), (10_000, 5000, True), (0, 0, True)])
def test_room_for_files_is_checked_before_writing(checkpoints, monkeypatch, inodes, free, fits):
    """Disks that count no inodes say 0 of 0."""
    checkpoints.directory.mkdir(parents=True, exist_ok=True)
    real = os.statvfs(checkpoints.directory)
    facts = {name: getattr(real, name) for name in dir(real) if name.startswith("f_")}
    facts |= {"f_files": inodes, "f_favail": free}
    monkeypatch.setattr(os, "statvfs", lambda path: types.SimpleNamespace(**facts))
    if fits:
        save(checkpoints, 2)
    else:
        with pytest.raises(UserError, match="the disk takes 3 more files"):
            checkpoints.save(2, make_state(2), {}, {})
    assert checkpoints.steps() == [2] * fits


@pytest.mark.drills
def test_room_is_checked_before_writing(checkpoints, monkeypatch):
    save(checkpoints, 1)
    usage = shutil.disk_usage(checkpoints.directory)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="no room for a checkpoint"):
        checkpoints.save(2, make_state(2), {}, {})
    assert checkpoints.latest() == 1
    assert checkpoints.steps() == [1]


def test_finds_what_a_person_names(tmp_path, checkpoints):
    save(checkpoints, 1, 2)
    for path, step in ((tmp_path, 2), (tmp_path / "checkpoints", 2), (tmp_path / "checkpoints" / "1", 1)):
        assert find_checkpoint(path)[1] == step
    with pytest.raises(UserError, match="no checkpoint in"):
        find_checkpoint(tmp_path / "elsewhere")
    flip_bit(checkpoints.directory / "1")
    with pytest.raises(UserError, match=r"cannot be used: .*checksum"):
        find_checkpoint(tmp_path / "checkpoints" / "1")


def test_one_that_is_being_written_is_waited_for(tmp_path, checkpoints, said):
    save(checkpoints, 1)
    bundle = checkpoints.directory / "1"
    sealed = (bundle / "manifest.json").rename(tmp_path / "sealed")
    for path in (tmp_path, checkpoints.directory):
        with pytest.raises(UserError, match=r"no checkpoint in .* is whole: wait until the run or copy"):
            find_checkpoint(path, said.append)
    with pytest.raises(UserError, match="checkpoints/1 cannot be used: it is unfinished"):
        find_checkpoint(bundle, said.append)
    sealed.rename(bundle / "manifest.json")
    (checkpoints.directory / "2").mkdir()
    (checkpoints.directory / "2" / "meta.json").write_text("{}")
    assert find_checkpoint(tmp_path, said.append)[1] == 1
    assert len(said) == 3


def test_one_that_is_copied_or_removed_meanwhile_is_damaged(checkpoints, monkeypatch):
    save(checkpoints, 1)
    bundle = checkpoints.directory / "1"
    for file in sorted(path for path in bundle.rglob("*") if path.is_file()):
        content = file.read_bytes()
        for part in (None, content[:-1], content[: len(content) // 2]):
            file.unlink() if part is None else file.write_bytes(part or b"x")  # some files are empty
            with pytest.raises(UserError, match=r"every checkpoint in .* is damaged|no checkpoint in .* is whole"):
                find_checkpoint(bundle.parent, lambda text: None)
            assert find_damage(bundle)
        file.write_bytes(content)
    listed = manifest_module._files

    def gone(directory):
        files = listed(directory)
        data_file(bundle).unlink(missing_ok=True)
        return files

    monkeypatch.setattr(manifest_module, "_files", gone)
    assert "cannot be read: No such file" in find_damage(bundle)


def test_meta_tells_every_array(checkpoints):
    save(checkpoints, 1)
    meta = json.loads((checkpoints.directory / "1" / "meta.json").read_text())
    assert meta["arrays"]["params"] == {"half": [[8, 2], "bfloat16"], "wide": [[16, 8], "float32"]}


@pytest.mark.parametrize("name", ["_METADATA", "_hidden/x", ".dot", "plain", "d/_sharding"])
def test_a_manifest_knows_files_of_every_name(tmp_path, name):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"content")
    write_manifest(tmp_path)
    assert find_damage(tmp_path) is None
    file.write_bytes(b"contenT")
    assert find_damage(tmp_path) == f"{name} is not what was written (checksum)"
    file.write_bytes(b"content, and more")
    assert find_damage(tmp_path) == f"{name} has 17 bytes instead of 7"
    file.unlink()
    assert find_damage(tmp_path) == f"{name!r} is missing"
    file.write_bytes(b"content")
    (tmp_path / "_new").write_bytes(b"")
    assert find_damage(tmp_path) == "_new does not belong to it"
