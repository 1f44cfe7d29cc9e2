"""The order of the house: imports only go down, no folders in a circle, engines behind doors, small files."""

import ast
from collections.abc import Mapping

import pytest

from mixtral_jax.kernels.backends import BACKENDS
from tests.imports import ROOT, floor, graph, imports, modules

# An engine of one platform, and the one module of it that others may import; the table of backends loads those that it
# names when they are used.
DOORS = {"kernels.cpu": "kernels.cpu.memory", "kernels.gpu": "", "kernels.tpu": ""}

# Rooms that know operations and no platform, and names by which engines once reached into them.
NO_PLATFORM = ("model.", "training.", "evaluation.", "inference.", "data.")
OF_ENGINES = {"Stacks", "InPlace", "carried", "collect", "memory", "in_place", "weighted", "exact_matmul"}
# A driver's version; a fault of XLA's; devices that are simulated.
PLATFORMS_ASKED = {"training.admission": {"gpu"}, "inference.decoding": {"cpu"}, "training.mesh_check": {"cpu"}}

FLOAT_TYPES = {"float16", "bfloat16", "float32", "float64"}
# The table and the names it is made from; the types that files of weights hold, and their choice on the command line.
MAY_NAME_FLOAT_TYPES = ("precision", "config", "weights", "verbs")


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


def of_platforms(path) -> set[str]:
    """Names of engines, of their backends and of platforms that a file's code holds."""
    known = {"cpu", "gpu", "tpu"} | {b.name for lines in BACKENDS.values() for b in lines if b.module[3:4] == "."}
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        found |= {getattr(node, field, None) for field in ("id", "attr", "arg", "name")} & OF_ENGINES
        found |= {node.value} & known if isinstance(node, ast.Constant) and isinstance(node.value, str) else set()
    return found


@pytest.mark.parametrize("name", [name for name in modules() if name.startswith(NO_PLATFORM)])
def test_no_room_above_the_kernels_knows_a_platform(name):
    assert of_platforms(modules()[name]) == PLATFORMS_ASKED.get(name, set())


def test_a_planted_name_of_an_engine_is_seen(tmp_path):
    file = tmp_path / "planted.py"
    file.write_text("def layer(x, carried):\n    return x if backend == 'hopper' else carried\n")
    assert of_platforms(file) == {"carried", "hopper"}


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
