"""The text that every Python installation carries: its language reference, docstrings and source."""

import ast
import os
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from mixtral_jax.config import UserError

# Tests, other people's packages, drawing demos, tables of character codes, and a second copy of an old grammar.
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "idlelib", "turtledemo", "encodings",
           "lib2to3", "pydoc_data", "ensurepip", "__pycache__"}  # fmt: skip
TOPICS = Path("pydoc_data") / "topics.py"


def python_files() -> list[Path]:
    """Lists the files that the corpus is read from, in order.

    Raises:
        UserError: the standard library of this Python has no source files (a zipped or stripped installation).
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for directory, below, names in os.walk(root):
        below[:] = set(below) - SKIPPED  # never even looked into: site-packages can be huge
        files += [Path(directory, name) for name in names if name.endswith(".py")]
    files.sort()
    if (root / TOPICS).exists():
        files.insert(0, root / TOPICS)
    if not files:
        raise UserError(
            f"builtin 'python': the standard library at {root} has no source files: give data.sources a path instead"
        )
    return files


def python_documents(on_bytes: Callable[[int], None]) -> Iterator[str]:
    """Yields the corpus: the reference by topic, then each module's docstrings and its source without them.

    No text comes twice: topics share whole sections, so a paragraph is kept where it is first seen, and docstrings are
    taken out of the source. Otherwise held-out documents would be found again among the training documents.

    Args:
        on_bytes: is told how many bytes of the files were consumed since it was last called.

    Yields:
        The text of one document; it may be empty.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in python_files():
        data = file.read_bytes()
        try:
            text = data.decode()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old escapes in other people's strings
                tree = ast.parse(text)
        except (UnicodeDecodeError, SyntaxError, ValueError):
            continue  # not text of this Python
        if file == root / TOPICS:
            yield from _topics(tree)
        else:
            name = ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            yield _docstrings(tree, name)
            yield _code(tree, text)
        on_bytes(len(data))


def _topics(tree: ast.Module) -> Iterator[str]:
    """The chapters of the language reference, longest first, each paragraph once."""
    assignments = [node for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)]
    chapters: dict[str, str] = ast.literal_eval(assignments[0].value) if assignments else {}
    seen: set[str] = set()
    for name in sorted(chapters, key=lambda name: (-len(chapters[name]), name)):
        paragraphs = []
        for paragraph in chapters[name].split("\n\n"):
            words = " ".join(paragraph.split())
            if words not in seen:
                seen.add(words)
                paragraphs.append(paragraph)
        yield "\n\n".join(paragraphs).strip() + "\n"


def _documented(tree: ast.Module, module: str) -> Iterator[tuple[str, ast.Module | ast.ClassDef | ast.FunctionDef]]:
    """Walks modules, classes and functions in the order of the file, each with its dotted name."""
    stack: list[tuple[str, ast.AST]] = [(module, tree)]
    while stack:
        name, node = stack.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield name, node  # type: ignore[misc]
        stack += [
            (f"{name}.{child.name}" if hasattr(child, "name") else name, child)
            for child in reversed(list(ast.iter_child_nodes(node)))
            if isinstance(child, ast.stmt)
        ]


def _docstrings(tree: ast.Module, module: str) -> str:
    """A module's docstrings under their dotted names, as a page of prose."""
    entries = ((name, ast.get_docstring(node)) for name, node in _documented(tree, module))
    return "\n".join(f"{name}\n\n{docstring.strip()}\n" for name, docstring in entries if docstring)


def _code(tree: ast.Module, text: str) -> str:
    """The source without its docstrings."""
    lines = text.split("\n")
    for _, node in _documented(tree, ""):
        if ast.get_docstring(node, clean=False) is None:
            continue
        first = node.body[0]
        end = first.end_lineno or first.lineno
        before = lines[first.lineno - 1].encode()[: first.col_offset]
        after = lines[end - 1].encode()[first.end_col_offset :]
        if before.strip() or after.strip():
            continue  # it shares its line with code
        blank = [""] * (end - first.lineno + 1)
        if len(node.body) == 1:
            blank[0] = f"{before.decode()}pass"
        lines[first.lineno - 1 : end] = [line or "\0" for line in blank]  # numbers of other lines stay
    return "\n".join(line for line in lines if line != "\0")
