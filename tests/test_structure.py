"""The order of the house: imports only go down, no folders in a circle, engines behind doors, small files."""

import ast
import functools
from collections.abc import Container, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# The floor of a module is that of the longest name here that its own starts with. Equal floors may import each other
# as long as no circle arises.
FLOORS = {
    "config": 0, "config_renames": 0, "config_loading": 0, "console": 0, "pytree": 0, "cli": 0, "hardware": 0,
    "distributed": 0,
    "precision": 1, "sharding": 1, "runtime": 1, "kernels": 1, "zigzag": 1, "remat": 1,
    "kernels.backends": 0, "kernels.cpu.memory": 0,
    "model": 2, "data": 2, "metrics": 2, "compiled": 2,
    "model.mixtral": 3, "training.losses": 3, "training.optimizer": 3, "data.pipeline": 3,
    "runs": 3,
    "training": 4, "inference": 4, "weights": 4, "serving": 5,
    "training.trainer": 5, "training.summary": 5, "evaluation": 5, "planning": 5, "preparation": 5,
    "verbs": 6, "__main__": 6, "train.py": 6, "eval.py": 6,
}  # fmt: skip

# An engine of one platform, and the one module of it that others may import; the table of backends loads those that it
# names when they are used.
DOORS = {"kernels.cpu": "kernels.cpu.memory", "kernels.gpu": "", "kernels.tpu": ""}

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


def circle(edges: Mapping[str, set[str]]) -> list[str]:
    """Names along a circle, the first one again at the end; empty where there is none."""
    done, path = set(), []

    def visit(name: str) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        path.append(name)
        found = next(filter(None, map(visit, sorted(edges.get(name, ())))), [])
        done.add(path.pop())
        return found

    return next(filter(None, map(visit, edges)), [])


def folders(edges: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """What each folder imports of others; a module outside of folders is one of its own."""
    found: dict[str, set[str]] = {}

    def folder(name: str) -> str:
        return name if name.endswith(".py") else name.split(".")[0]

    for name, others in edges.items():
        found.setdefault(folder(name), set()).update(set(map(folder, others)) - {folder(name)})
    return found


def beside_doors(edges: Mapping[str, set[str]], doors: Mapping[str, str]) -> list[str]:
    """Imports of an engine from outside of it that are not of its door."""
    return [
        f"{name} imports {other}, not {door}"
        for name, others in edges.items()
        for other in sorted(others)
        for engine, door in doors.items()
        if other.startswith(f"{engine}.") and not name.startswith(f"{engine}.") and other != door
    ]


@pytest.mark.parametrize("name", modules())
def test_imports_go_down(name):
    for other in graph()[name]:
        assert floor(other) <= floor(name), f"{name} (floor {floor(name)}) imports {other} (floor {floor(other)})"


def test_no_imports_in_a_circle():
    assert not circle(graph())


def test_no_folders_in_a_circle():
    assert not circle(folders(graph()))


def test_engines_are_entered_through_their_doors():
    assert not beside_doors(graph(), DOORS)


def test_the_walk_sees_the_imports():
    assert {"config", "precision", "sharding"} <= graph()["runtime"]
    assert "model.mixtral" in graph()["training.step"]


PLANTED = {
    "from mixtral_jax.training.step import Trainable": ["evaluation", "training", "evaluation"],
    "def late():\n    import mixtral_jax.training.step": ["evaluation", "training", "evaluation"],
    "from mixtral_jax.runs import checkpoint": [],
}


@pytest.mark.parametrize("text", PLANTED)
def test_a_planted_circle_of_folders_is_seen(text, tmp_path):
    file = tmp_path / "planted.py"
    file.write_text(text)
    planted = {**graph(), "evaluation.planted": imports(file, graph())}
    assert not circle(planted)  # of modules; the folders alone have one
    assert circle(folders(planted)) == PLANTED[text]


@pytest.mark.parametrize("importer", ["model.moe", "training.step", "kernels.expert_ffn", "kernels.gpu.door"])
def test_a_planted_way_around_a_door_is_seen(importer):
    doors = {"kernels.cpu": "kernels.cpu.door"}
    found = beside_doors({importer: {"kernels.cpu.amx"}}, doors)
    assert found == [f"{importer} imports kernels.cpu.amx, not kernels.cpu.door"]
    assert not beside_doors({importer: {"kernels.cpu.door"}}, doors)
    assert not beside_doors({"kernels.cpu.door": {"kernels.cpu.amx"}}, doors)


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


@pytest.mark.parametrize("name", [name for name in modules() if name != "console"])
def test_names_of_users_are_never_markup(name):
    """Consoles that read no markup come from one place; columns of progress read it unless told not to."""
    for node in ast.walk(ast.parse(modules()[name].read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "Console", f"{name}: use make_console"
            said = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert node.func.id != "TextColumn" or said.get("markup") == "False", ast.unparse(node)
