"""The parameters of every shipped config as text: path, type, shape, logical axes, mesh axes.

After an intended change: `python -m pytest tests/model/test_golden.py --update-golden`, and read the difference.
"""

from pathlib import Path

import jax
import pytest

from mixtral_jax.config_loading import load_config, replace
from mixtral_jax.model.mixtral import Architecture
from mixtral_jax.runtime import make_runtime
from tests.tiny import mesh_of

ROOT = Path(__file__).parents[2]
OTHERS = ("prepare", "sft", "dpo")  # without an architecture
CONFIGS = [path for path in sorted((ROOT / "configs").glob("*.yaml")) if not path.stem.startswith(OTHERS)]


def describe(path: Path) -> str:
    config = load_config(path)
    arch = Architecture(config.model, make_runtime(replace(config, mesh={"fsdp": 1, "expert": 1}), mesh_of()))
    axes = jax.tree.leaves(arch.axes(), is_leaf=lambda x: isinstance(x, tuple))
    leaves = jax.tree_util.tree_leaves_with_path(arch.abstract())
    rows = [("path", "type", "shape", "logical axes", "mesh axes")]
    for (keys, x), logical in zip(leaves, axes, strict=True):
        name = "/".join(key.key for key in keys)
        shape = " x ".join(map(str, x.shape))
        rows.append((name, x.dtype.name, shape, listed(logical), listed(x.sharding.spec)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    total = sum(x.size for keys, x in leaves if keys[0].key == "params")
    return "\n".join([*table, f"{total:,} parameters", ""])


def listed(axes) -> str:
    return ", ".join("-" if axis is None else str(axis) for axis in axes)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_parameters_are_those_of_the_golden_file(path, request):
    golden = ROOT / "tests" / "golden" / f"{path.stem}.txt"
    if request.config.getoption("--update-golden"):
        golden.write_text(describe(path))
    assert golden.exists(), f"write it with --update-golden: {golden.name}"
    assert describe(path) == golden.read_text()
