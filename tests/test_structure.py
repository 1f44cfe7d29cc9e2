"""The order of the house: imports only go down, files stay small, float types are named in one place."""

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# The floor of a module is that of the longest name here that its own starts with. Equal floors may import each other
# as long as no circle arises.
FLOORS = {
    "config": 0, "config_loading": 0, "console": 0, "cli": 0, "hardware": 0, "distributed": 0,
    "precision": 1, "sharding": 1, "runtime": 1, "kernels": 1, "zigzag": 1, "remat": 1,
    "model": 2, "data": 2, "metrics": 2, "compiled": 2,
    "model.mixtral": 3, "training.losses": 3, "training.optimizer": 3, "data.pipeline": 3,
    "runs": 3,
    "training": 4, "inference": 4, "weights": 4,
    "training.trainer": 5, "training.summary": 5, "evaluation": 5, "planning": 5, "preparation": 5,
    "verbs": 6, "__main__": 6, "train.py": 6, "eval.py": 6,
}  # fmt: skip

FLOAT_TYPES = {"float16", "bfloat16", "float32", "float64"}
# The table and the names it is made from; the types that files of weights hold, and their choice on the command line.
MAY_NAME_FLOAT_TYPES = ("precision", "config", "weights", "verbs")


@functools.cache
def modules() -> dict[str, Path]:
    """Every module of the package by its name without `mixtral_jax.`, and the entry scripts."""
    package = ROOT / "mixtral_jax"
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[name] = path
    return found | {name: ROOT / name for name in ("train.py", "eval.py")}


def imports(path: Path) -> set[str]:
    """The modules of the package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide which floor they go to"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    inside = {name.removeprefix("mixtral_jax.") for name in found if name.startswith("mixtral_jax.")}
    return {name for name in inside if name in modules() and modules()[name].name != "__init__.py"}


def floor(name: str) -> int:
    fitting = [known for known in FLOORS if name == known or name.startswith(f"{known}.")]
    assert fitting, f"give {name} a floor in {Path(__file__).name}"
    return FLOORS[max(fitting, key=len)]


@pytest.mark.parametrize("name", modules())
def test_imports_go_down(name):
    for other in imports(modules()[name]):
        assert floor(other) <= floor(name), f"{name} (floor {floor(name)}) imports {other} (floor {floor(other)})"


def test_no_imports_in_a_circle():
    done, path = set(), []

    def visit(name: str) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        for other in sorted(imports(modules()[name])):
            visit(other)
        done.add(path.pop())

    for name in modules():
        visit(name)


def test_the_walk_sees_the_imports():
    assert {"config", "precision", "sharding"} <= imports(modules()["runtime"])
    assert "model.mixtral" in imports(modules()["training.step"])


@pytest.mark.parametrize("path", [*modules().values(), *sorted((ROOT / "tests").rglob("*.py"))], ids=lambda p: p.name)
def test_files_are_small(path):
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("name", [name for name in modules() if name.split(".")[0] not in MAY_NAME_FLOAT_TYPES])
def test_float_types_are_named_in_the_table_alone(name):
    """numpy on the host may name its own types, for sums of floats say."""
    for node in ast.walk(ast.parse(modules()[name].read_text())):
        if isinstance(node, ast.Attribute) and node.attr in FLOAT_TYPES:
            assert isinstance(node.value, ast.Name), ast.unparse(node)
            assert node.value.id == "np", ast.unparse(node)
        if isinstance(node, ast.Constant):
            assert node.value not in FLOAT_TYPES, f"line {node.lineno}: {ast.unparse(node)}"
        if isinstance(node, ast.ImportFrom):
            assert not FLOAT_TYPES & {alias.name for alias in node.names}, ast.unparse(node)


@pytest.mark.parametrize("script", ["train.py", "eval.py"])
def test_entry_scripts_fit_on_a_screen(script):
    assert len((ROOT / script).read_text().splitlines()) <= 80
