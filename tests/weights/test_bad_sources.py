"""Whatever is wrong with a source, one sentence names the tensor or value and the file."""

import io
import json
import os
import pickle
import re
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from safetensors.numpy import load_file, save_file

from mixtral_jax.config import UserError
from mixtral_jax.serving.opening import open_model
from mixtral_jax.weights.names import FORMATS
from mixtral_jax.weights.released import Upcycling, open_released
from mixtral_jax.weights.torch_files import read_torch
from tests.weights.models import import_arrays, runtime, small
from tests.weights.synthetic import classic, save_torch, write

CONFIG = small()
FIRST, LAST = "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"
W1 = "model.layers.1.block_sparse_moe.experts.2.w1.weight"


def refused(directory: Path, *words: str, upcycling: Upcycling | None = None) -> None:
    with pytest.raises(UserError) as caught:
        open_released(directory, upcycling)
    sentence = str(caught.value)
    assert "\n" not in sentence
    for word in words:
        assert word in sentence, sentence


def edit_json(file: Path, **changes: Any) -> None:
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value != "absent"}))


def edit_tensors(file: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def file_of(directory: Path, key: str) -> Path:
    return directory / json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"][key]


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return write(tmp_path / "hf", "hf", classic(CONFIG, "float32"), CONFIG, "float32")


@pytest.fixture
def fused_pt(tmp_path: Path) -> Path:
    return write(tmp_path / "pt", "mistral-fused", classic(CONFIG, "float32"), CONFIG, "float32")


def test_directories(tmp_path: Path, hf: Path) -> None:
    refused(tmp_path / "none", "none is not a directory")
    refused(tmp_path, "holds no weights", "config.json", "params.json")
    (hf / "config.json").unlink()
    refused(hf, FIRST, "no config.json")


@pytest.mark.parametrize("cut", [3, 50, 100_000])
def test_truncated_safetensors(hf: Path, cut: int) -> None:
    file = hf / LAST
    file.write_bytes(file.read_bytes()[: cut if cut < 1000 else -7])
    refused(hf, str(file), "truncated", "download it again", *(["tensor 'model."] if cut > 1000 else []))


def test_a_release_that_is_being_copied(tmp_path: Path, hf: Path) -> None:
    """Whatever file is cut, and whichever have come yet, from either end of the list: what is missing is told."""
    (hf / "tokenizer.model").write_bytes(make_tokenizer(CONFIG.vocab_size))
    (hf / "tokenizer_config.json").write_text('{"added_tokens_decoder": {}}')
    files = sorted(hf.iterdir())
    needed = {file.name for file in files} - {"model.safetensors.index.json", "tokenizer_config.json"}

    def told(directory: Path, word: str) -> None:
        with pytest.raises(UserError) as caught, open_model(str(directory), []):
            pass
        assert word in str(caught.value)

    for file in files:
        content = file.read_bytes()
        for tenth in (0, 3, 6, 9):
            file.write_bytes(content[: len(content) * tenth // 10])
            told(hf, str(file))
        file.write_bytes(content)
    for number, order in enumerate((files, files[::-1])):
        (come := tmp_path / str(number)).mkdir()
        told(come, str(come))
        for file in order:
            shutil.copy(file, come)
            if missing := needed - {path.name for path in come.iterdir()}:
                told(come, str(come))
        assert not missing
    (hf / "config.json").unlink()
    told(hf, "no config.json")


def header_edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    text = change(header) or json.dumps(header)
    file.write_bytes(struct.pack("<Q", len(text)) + text.encode() + content[8 + length :])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h: "{" + "x" * 30, ["header", "corrupt"]),
        (lambda h: "[]", ["header", "corrupt"]),
        (lambda h: "[" * 100_000, ["header", "corrupt"]),
        (lambda h: '{"a": ' + "1" * 5000 + "}", ["header", "corrupt"]),
        (lambda h: h["model.norm.weight"].update(shape=[10**4000, 10**4000]), ["'model.norm.weight'", "wrongly"]),
        (lambda h: h["model.norm.weight"].pop("shape") and None, ["'model.norm.weight'", "wrongly"]),
        (lambda h: h["model.norm.weight"].update(data_offsets=[8, 0]), ["'model.norm.weight'", "-8 bytes", "128"]),
        (lambda h: h["model.norm.weight"].update(shape=[-32]), ["'model.norm.weight'", "wrongly"]),
        (lambda h: h["model.norm.weight"].update(shape=[31]), ["'model.norm.weight'", "128 bytes", "124"]),
        (lambda h: h["model.norm.weight"].update(dtype="F8_E4M3"), ["'model.norm.weight'", "F8_E4M3", "bfloat16"]),
        (lambda h: h["model.norm.weight"].update(dtype=["F32"]), ["'model.norm.weight'", "wrongly"]),
        (lambda h: h.pop("model.norm.weight") and None, ["128 bytes after its last tensor"]),
        (lambda h: h.pop(min(h, key=lambda key: h[key]["data_offsets"])) and None, ["a gap"]),
        (lambda h: json.dumps(h)[:-1] + ', "model.norm.weight": 1}', ["'model.norm.weight' twice"]),
    ],
)
def test_corrupt_headers(hf: Path, change: Callable[[dict[str, Any]], Any], words: list[str]) -> None:
    file = file_of(hf, "model.norm.weight")
    header_edit(file, change)
    refused(hf, str(file), *words)


def test_overlapping_tensors(hf: Path) -> None:
    file = file_of(hf, W1)
    header_edit(file, lambda h: h[W1].update(data_offsets=[0, np.prod(h[W1]["shape"]).item() * 4]))
    refused(hf, str(file), "overlap")


def test_missing_files_and_keys(hf: Path) -> None:
    (hf / LAST).rename(hf / "elsewhere")
    refused(hf, "index.json", LAST, "which is missing")
    (hf / "model.safetensors.index.json").unlink()
    refused(hf, str(hf), "2 of 3 files")
    (hf / FIRST).unlink()
    (hf / "model-00002-of-00003.safetensors").rename(hf / "model.safetensors")
    refused(hf, "no known format", "block_sparse_moe.experts.0.w1.weight")


def test_one_missing_key(hf: Path) -> None:
    file = file_of(hf, W1)
    edit_tensors(file, lambda tensors: tensors.pop(W1))
    refused(hf, "index.json", W1, file.name, "does not hold it")
    (hf / "model.safetensors.index.json").unlink()
    refused(hf, f"tensor '{W1}' of the hf format", f"{hf}/config.json", "not in the files beside it")


def test_unknown_duplicate_and_misshapen_keys(hf: Path) -> None:
    extra = "model.layers.2.input_layernorm.weight"
    edit_tensors(hf / FIRST, lambda tensors: tensors.update({extra: np.ones(32, np.float32)}))
    refused(hf, extra, str(hf / FIRST), "index.json does not name")
    (hf / "model.safetensors.index.json").unlink()
    refused(hf, extra, str(hf / FIRST), "not part of the hf format")
    edit_tensors(hf / FIRST, lambda tensors: tensors.pop(extra))
    key = next(iter(load_file(hf / LAST)))
    edit_tensors(hf / FIRST, lambda tensors: tensors.update({key: np.ones(32, np.float32)}))
    refused(hf, f"'{key}' is both in {hf / FIRST} and in {hf / LAST}")


def test_wrong_shapes_and_types(hf: Path) -> None:
    file = file_of(hf, W1)
    edit_tensors(file, lambda tensors: tensors.update({W1: np.ascontiguousarray(tensors[W1].T)}))
    refused(hf, W1, str(file), "[32, 48]", "[48, 32]")
    edit_tensors(file, lambda tensors: tensors.update({W1: tensors[W1].T.astype(np.float64)}))
    refused(hf, W1, str(file), "F64", "float32, bfloat16, float16")


@pytest.mark.parametrize(
    ("key", "bad"), [(W1, np.nan), (W1.replace("experts.2", "experts.3"), np.inf), ("model.norm.weight", -np.inf)]
)
def test_not_finite(hf: Path, key: str, bad: float) -> None:
    file = file_of(hf, key)
    edit_tensors(file, lambda tensors: tensors[key].__setitem__(-1, bad))
    with pytest.raises(UserError, match=rf"tensor '{re.escape(key)}' of {re.escape(str(file))} holds NaN"):
        import_arrays(open_released(hf), runtime(CONFIG))


@pytest.mark.parametrize(
    "text", ["", "[]", '{"weight_map": 3}', '{"weight_map": {"a": []}}', "[" * 100_000, "1" * 5000]
)
def test_indices_that_are_none(hf: Path, text: str) -> None:
    (hf / "model.safetensors.index.json").write_text(text)
    refused(hf, "model.safetensors.index.json is not an index")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/outside.safetensors", "model-00001-of-00009.safetensors"])
def test_names_in_an_index_open_nothing(hf: Path, name: str) -> None:
    """Neither above the directory nor elsewhere; what must be there is named."""
    index = hf / "model.safetensors.index.json"
    outside = hf.parent / "outside.safetensors"
    os.mkfifo(outside)  # whoever opens it waits for ever
    where = json.loads(index.read_text())["weight_map"]
    key = next(iter(where))
    index.write_text(
        json.dumps({"weight_map": {**where, key: name.replace("/outside", f"{hf.parent}/outside", name[0] == "/")}})
    )
    refused(hf, name.rpartition("/")[2])


def make_tokenizer(vocab_size: int, **ids: int) -> bytes:
    model, letters = io.BytesIO(), np.array(list("abcdefghijklmnopqrst"))
    words = ["".join(word) for word in letters[np.random.default_rng(0).integers(0, 20, (300, 4))]]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(words[i : i + 5]) for i in range(0, 300, 5)]),
        model_writer=model,
        vocab_size=vocab_size,
        hard_vocab_limit=True,
        minloglevel=2,
        **ids,
    )
    return model.getvalue()


def read_buffers(hf: Path, key: str) -> tuple[str, ...]:
    edit_tensors(hf / FIRST, lambda tensors: tensors.update({key: np.ones(4, np.float32)}))
    (hf / "model.safetensors.index.json").unlink(missing_ok=True)
    return open_released(hf).notes


def test_buffers_of_rotary_frequencies_are_left_out_and_said(hf: Path) -> None:
    before = open_released(hf)
    (note,) = read_buffers(hf, "model.layers.0.self_attn.rotary_emb.inv_freq")
    assert note.startswith("1 buffers of rotary frequencies")
    (note,) = read_buffers(hf, "model.rotary_emb.inv_freq")
    assert note.startswith("2 buffers of rotary frequencies")
    assert open_released(hf).tensors.keys() == before.tensors.keys()


def test_truncated_pytorch_files(fused_pt: Path) -> None:
    file = fused_pt / "consolidated.01.pt"
    whole = file.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 10):
        file.write_bytes(whole[:length])
        refused(fused_pt, str(file), "truncated or not in PyTorch's zip format", "1.6")
    file.unlink()
    refused(fused_pt, "layers.1.", "more of the mistral-fused format", "not in the files beside it")


def without_last_row(tensors: dict[str, np.ndarray], key: str) -> None:
    tensors[key] = tensors[key][:-1]


ANY_FORMAT: dict[str, tuple[Callable[[dict[str, np.ndarray], str], Any], str]] = {
    "missing": (lambda tensors, key: tensors.pop(key), "tensor '{key}' of the {name} format"),
    "extra": (lambda tensors, key: tensors.update({"spare." + key: tensors[key]}), "tensor 'spare.{key}' of {file}"),
    "misshapen": (without_last_row, "tensor '{key}' of {file} has shape"),
}


@pytest.mark.parametrize("damage", ANY_FORMAT)
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_accounts_for_every_tensor(tmp_path: Path, name: Any, damage: str) -> None:
    upcycling = Upcycling(4) if FORMATS[name].dense else None
    directory = write(tmp_path / "in", name, classic(CONFIG, "float32"), CONFIG, "float32")
    (directory / "model.safetensors.index.json").unlink(missing_ok=True)
    open_released(directory, upcycling)
    change, sentence = ANY_FORMAT[damage]
    file = sorted(directory.glob("*.*t*"))[-1]
    tensors = load_file(file) if file.suffix == ".safetensors" else read_arrays(file)
    key = sorted(tensors)[-1]
    change(tensors, key)
    save_file(tensors, file) if file.suffix == ".safetensors" else save_torch(tensors, file, "float32")
    refused(directory, sentence.format(key=key, file=file, name=name), upcycling=upcycling)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) - 9])
    refused(directory, str(file), "truncated", upcycling=upcycling)


def read_arrays(file: Path) -> dict[str, np.ndarray]:
    return {key: np.array(tensor.open()).view(np.float32) for key, tensor in read_torch(file).items()}


class Evil:
    def __reduce__(self) -> Any:
        return (Path.write_text, (Path("never-written-by-a-test"), "x"))


def zip_with(file: Path, content: bytes, **members: bytes) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        for name, data in members.items():
            archive.writestr(f"archive/{name}", data)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (pickle.dumps({"a": Evil()}), ["more than tensors", "pathlib.Path", "not run"]),
        (pickle.dumps(eval), ["more than tensors", "builtins.eval"]),
        (b"cos\nsystem\n(S'true'\ntR.", ["more than tensors", "os.system"]),
        (b"ctorch\nload\n.", ["more than tensors", "torch.load"]),
        (pickle.dumps([1]), ["a list, not a dictionary"]),
        (pickle.dumps({"a": 1}), ["'a'", "not a tensor"]),
        (pickle.dumps({"a": 1})[:-3], ["pickle", "corrupt"]),
        (b"\x80\x02}X\x01\x00\x00\x00aK\x01Q.", ["pickle", "corrupt"]),
        # State set on the one callable, then on a name: neither has any.
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aK\x01sb.", ["pickle", "corrupt"]),
        (b"\x80\x02ctorch\nFloatStorage\n}X\x01\x00\x00\x00aK\x01sb.", ["pickle", "corrupt"]),
    ],
)
def test_pickles_run_nothing(tmp_path: Path, content: bytes, words: list[str]) -> None:
    file = tmp_path / "consolidated.00.pt"
    zip_with(file, content)
    with pytest.raises(UserError) as caught:
        read_torch(file)
    for word in (str(file), *words):
        assert word in str(caught.value)
    assert not Path("never-written-by-a-test").exists()


def described(storage: str, length: int, start: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> bytes:
    """A pickle of {"w": tensor} with these numbers."""
    number = lambda n: b"J" + struct.pack("<i", n)  # noqa: E731
    text = lambda s: b"X" + struct.pack("<I", len(s)) + s.encode()  # noqa: E731
    tuple_of = lambda ns: b"(" + b"".join(map(number, ns)) + b"t"  # noqa: E731
    pid = b"(" + text("storage") + b"ctorch\n" + storage.encode() + b"\n" + text("0") + text("cpu") + number(length)
    tensor = b"(" + pid + b"tQ" + number(start) + tuple_of(shape) + tuple_of(strides) + b"\x89Nt"
    return b"\x80\x02}" + text("w") + b"ctorch._utils\n_rebuild_tensor_v2\n" + tensor + b"Rs."


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("FloatStorage", 12, 0, (3, 4), (1, 3)), ["not stored row by row", "contiguous"]),
        (("FloatStorage", 12, 8, (3, 4), (4, 1)), ["outside of its storage"]),
        (("FloatStorage", 12, -4, (3, 4), (4, 1)), ["outside of its storage"]),
        (("FloatStorage", 13, 0, (3, 4), (4, 1)), ["outside of its storage"]),
        (("DoubleStorage", 6, 0, (6,), (1,)), ["DoubleStorage", "float32"]),
    ],
)
def test_tensors_outside_of_their_storage(tmp_path: Path, arguments: Any, words: list[str]) -> None:
    file = tmp_path / "consolidated.00.pt"
    zip_with(file, described("FloatStorage", 12, 0, (3, 4), (4, 1)), **{"data/0": bytes(48)})
    assert read_torch(file)["w"].shape == (3, 4)
    zip_with(file, described(*arguments), **{"data/0": bytes(48)})
    with pytest.raises(UserError) as caught:
        read_torch(file)
    for word in ("'w'", str(file), *words):
        assert word in str(caught.value)


def test_archives(tmp_path: Path) -> None:
    file = tmp_path / "consolidated.00.pt"
    content = described("FloatStorage", 12, 0, (3, 4), (4, 1))
    zip_with(file, content)
    with pytest.raises(UserError, match=r"'w' .* outside of its storage"):
        read_torch(file)
    zip_with(file, content, **{"data/0": bytes(48), "byteorder": b"big"})
    with pytest.raises(UserError, match="big-endian"):
        read_torch(file)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/data/0", bytes(48))
    with pytest.raises(UserError, match="compressed"):
        read_torch(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("else", b"")
    with pytest.raises(UserError, match=r"0 files 'data.pkl'"):
        read_torch(file)


def test_duplicates_between_pytorch_files(fused_pt: Path) -> None:
    save_torch({"norm.weight": np.ones(32, np.float32)}, fused_pt / "consolidated.02.pt", "float32")
    refused(fused_pt, "'norm.weight' is both in", "consolidated.02.pt")


def test_upcycling_where_it_does_not_belong(tmp_path: Path, hf: Path) -> None:
    refused(hf, "already is a mixture", upcycling=Upcycling(4))
    dense = write(tmp_path / "dense", "hf-dense", classic(CONFIG, "float32"), CONFIG, "float32")
    refused(dense, "is a dense model", "--upcycle-experts")
    refused(dense, "--upcycle-experts 1", "per token, 2", upcycling=Upcycling(1))
    refused(dense, "--upcycle-noise -1", upcycling=Upcycling(4, noise=-1.0))
