"""Who imports whom in the package, and on which floor each module is."""

import ast
import functools
from collections.abc import Container
from pathlib import Path

ROOT = Path(__file__).parents[1]

# The floor of a module is that of the longest name here that its own starts with. Equal floors may import each other
# as long as no circle arises.
FLOORS = {
    "config": 0, "config_checks": 0, "config_loading": 0, "console": 0, "pytree": 0, "cli": 0,
    "hardware": 0, "distributed": 0, "whole_files": 0,
    "precision": 1, "sharding": 1, "runtime": 1, "kernels": 1, "zigzag": 1, "remat": 1,
    "kernels.backends": 0, "kernels.cpu.memory": 0,
    "model": 2, "data": 2, "metrics": 2, "compiled": 2,
    "model.mixtral": 3, "training.losses": 3, "training.preferences": 3, "training.optimizer": 3, "data.pipeline": 3,
    "runs": 3,
    "training": 4, "inference": 4, "weights": 4, "serving": 5,
    "training.trainer": 5, "training.starting_point": 5, "training.reference": 5, "training.summary": 5,
    "training.experiment": 5, "training.held_out": 5,
    "evaluation": 5, "planning": 5, "preparation": 5,
    "verbs": 6, "__main__": 6, "train.py": 6, "eval.py": 6,
}  # fmt: skip


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


def imports(path: Path, known: Container[str]) -> set[str]:
    """The modules of the package, of those known, that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide which floor they go to"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    inside = {name.removeprefix("mixtral_jax.") for name in found if name.startswith("mixtral_jax.")}
    return {name for name in inside if name in known}


@functools.cache
def graph() -> dict[str, set[str]]:
    """What each module imports."""
    files = {name for name, path in modules().items() if path.name != "__init__.py"}
    return {name: imports(path, files) for name, path in modules().items()}


def floor(name: str) -> int:
    fitting = [known for known in FLOORS if name == known or name.startswith(f"{known}.")]
    assert fitting, f"give {name} a floor in {Path(__file__).name}"
    return FLOORS[max(fitting, key=len)]
