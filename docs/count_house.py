"""Counts the package as it was and as it is, in Markdown: `python -m docs.count_house [COMMIT]`.

Lines by room, and which of them belong to what the package could not do at that commit.
"""

import ast
import subprocess
import sys
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path

import jaxtyping

BEFORE = "b06afc9"  # the last commit before the engines got rooms of their own
# What the package has learnt since, by the files that have nothing else in them.
LATER = {
    "serving and batched decoding": (
        "serving/*", "inference/batching*", "inference/text*", "inference/samp*",
    ),
    "weights held in fewer bits": ("*/stored*", "inference/holding*", "kernels/chosen*", "kernels/lookup*"),
    "chats, preferences, adapters": (
        "data/chat*", "data/record_rows*", "data/marked*", "data/answers*", "training/pref*", "training/reference*",
        "model/adapters*", "weights/peft*", "weights/chat*", "runs/merging*",
    ),
    "GGUF, added tokens, scaled positions, keys of releases": (
        "weights/gguf*", "weights/released_tok*", "weights/released_keys*", "weights/rope*", "model/rope*",
        "weights/destination*",
    ),
    "Hopper's kernels, rows moved by tokens": ("kernels/gpu/hopper*", "kernels/gpu/triton_rows*"),
    "text held out by content": ("data/record.py", "data/fingerprints*", "evaluation/texts*"),
    "experiments, checks of meshes, alarms, goodput, rates, verify": (
        "evaluation/experiment*", "evaluation/history*", "evaluation/outputs*", "training/experiment*",
        "training/mesh*", "training/collapse*", "training/step_clock*", "training/spikes*", "runs/goodput*",
        "runs/verify*", "distributed/step_watch*",
    ),
    "experts switched off, routers through training": ("evaluation/ablation*", "evaluation/saturation*"),
    "damaged, encoded and private pages": (
        "preparation/warc_pages*", "preparation/decompression*", "preparation/decoding*", "preparation/masking*",
    ),
}  # fmt: skip
SHAPED = set(vars(jaxtyping))
BARE = ("jax.Array", "np.ndarray", "Array")


def git(*words: str) -> str:
    """What git says."""
    return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout


def texts(commit: str | None) -> dict[str, str]:
    """The package's Python files by their paths in it; without a commit those of the working tree."""
    listed = git("ls-tree", "-r", "--name-only", commit, "mixtral_jax") if commit else git("ls-files", "mixtral_jax")
    paths = [path for path in listed.split() if path.endswith(".py")]
    read = (lambda path: git("show", f"{commit}:{path}")) if commit else (lambda path: Path(path).read_text())
    return {path.removeprefix("mixtral_jax/"): read(path) for path in paths}


def room(path: str) -> str:
    """The folder of a file, engines apart."""
    folder = path.rpartition("/")[0]
    return f"{folder}/" if folder else "files beside the folders"


def arrays(annotation: ast.AST) -> Counter[str]:
    """How many arrays an annotation names with a shape, and how many without."""
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) in SHAPED:
        return Counter(["shaped"])
    if isinstance(annotation, ast.Attribute | ast.Name) and ast.unparse(annotation) in BARE:
        return Counter(["unshaped"])
    return sum(map(arrays, ast.iter_child_nodes(annotation)), Counter())


def public(tree: ast.Module) -> list[ast.FunctionDef]:
    """Functions and methods that others may call; functions inside of functions are nobody else's."""
    bodies = [tree.body, *(node.body for node in tree.body if isinstance(node, ast.ClassDef))]
    found = [node for body in bodies for node in body if isinstance(node, ast.FunctionDef)]
    return [node for node in found if not node.name.startswith("_")]


def parameters(function: ast.FunctionDef) -> list[ast.arg]:
    """Of a function, `self` excluded."""
    of = function.args
    return [each for each in [*of.posonlyargs, *of.args, *of.kwonlyargs] if each.arg not in ("self", "cls")]


def code_lines(text: str) -> int:
    """Counts the lines that are neither docstrings nor comments nor blank."""
    prose = set[int]()
    for node in ast.walk(ast.parse(text)):
        first = node.body[0] if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and node.body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            prose |= {*range(first.lineno, (first.end_lineno or 0) + 1)}
    lines = enumerate(map(str.strip, text.splitlines()), 1)
    return sum(bool(line) and not line.startswith("#") and number not in prose for number, line in lines)


def figures(files: dict[str, str]) -> dict[str, int]:
    """What is counted over the whole package."""
    trees = [ast.parse(text) for text in files.values()]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    annotations = [
        each.annotation for tree in trees for one in public(tree) for each in parameters(one) if each.annotation
    ]
    shapes = sum(map(arrays, annotations), Counter())
    return {
        "lines": sum(text.count("\n") for text in files.values()),
        "of them code: no docstrings, comments, blank lines": sum(map(code_lines, files.values())),
        "files": len(files),
        "functions with more than 7 parameters": sum(len(parameters(each)) > 7 for each in functions),
        "the same outside of engines": sum(
            len(parameters(node)) > 7
            for path, text in files.items()
            if not path.startswith(("kernels/cpu/", "kernels/gpu/"))
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.FunctionDef)
        ),
        "`Any`": sum(isinstance(node, ast.Name) and node.id == "Any" for node in nodes),
        "public array parameters with a shape": shapes["shaped"],
        "without": shapes["unshaped"],
    }


def figure(count: int) -> str:
    """A cell of the table."""
    return f"{count:,}" if count else "-"


def later(path: str) -> str:
    """The feature that a file came with, or nothing."""
    return next((name for name, patterns in LATER.items() if any(fnmatch(path, each) for each in patterns)), "")


def main(commit: str) -> None:
    """Prints the tables."""
    before, now = texts(commit), texts(None)
    rows = [(name, value, figures(now)[name]) for name, value in figures(before).items()]
    rooms = sorted({*map(room, before), *map(room, now)})
    rows += [
        (f"lines of `{name}`" if "/" in name else f"lines of {name}",
         *(sum(text.count("\n") for path, text in files.items() if room(path) == name) for files in (before, now)))
        for name in rooms
    ]  # fmt: skip
    print("| | before | now |\n|---|---|---|")
    print("\n".join(f"| {name} | {figure(old)} | {figure(new)} |" for name, old, new in rows))
    lines, code = Counter[str](), Counter[str]()
    for path, text in now.items():
        lines[later(path)] += text.count("\n")
        code[later(path)] += code_lines(text)
    print("\n| files that came with | lines | of them code |\n|---|---|---|")
    print("\n".join(f"| {name} | {lines[name]:,} | {code[name]:,} |" for name in LATER))
    print(f"| what there was before | {lines['']:,} | {code['']:,} |")


if __name__ == "__main__":
    main(*(sys.argv[1:] or [BEFORE]))
