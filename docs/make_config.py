"""Writes docs/config.md and docs/preparation-config.md from the comments at the keys: `python docs/make_config.py`."""

import ast
from pathlib import Path

from mixtral_jax.kernels.backends import BACKENDS

ROOT = Path(__file__).parent.parent
HEAD = """# Every key of the configuration

A YAML file says only what differs from these defaults; `section.key=value` on the command line overrides it. A key
without a default must be given. This page is made from `{module}` by `python docs/make_config.py`.
"""
# Page: the module, its top class, and classes of list members by the key of the list.
PAGES = {
    "config.md": (
        "mixtral_jax/config.py",
        "Config",
        {"data.sources": "SourceConfig", "objective.losses": "LossConfig"},
    ),
    "preparation-config.md": ("mixtral_jax/preparation/config.py", "PrepareConfig", {"sources": "PrepareSource"}),
}


def comment_of(lines: list[str], node: ast.AnnAssign) -> str:
    """Joins the comment lines above a field and the comment behind it."""
    above: list[str] = []
    index = node.lineno - 2
    while index >= 0 and lines[index].strip().startswith("#"):
        above.insert(0, lines[index].strip().lstrip("# "))
        index -= 1
    behind = lines[node.end_lineno - 1][node.end_col_offset :].strip().lstrip("# ")
    return " ".join([*above, behind]).strip()


def sections_of(classes: dict[str, ast.ClassDef], node: ast.ClassDef, prefix: str = "") -> dict[str, ast.ClassDef]:
    """Lists a class and those of its fields, at any depth, by the prefix of their keys."""
    sections = {prefix: node}
    for entry in node.body:
        if isinstance(entry, ast.AnnAssign) and ast.unparse(entry.annotation) in classes:
            sections |= sections_of(classes, classes[ast.unparse(entry.annotation)], f"{prefix}{entry.target.id}.")  # type: ignore[union-attr]
    return sections


def backends_table() -> list[str]:
    """Renders the table of backends, in the order in which `auto` tries them."""
    lines = [
        "## Backends",
        "",
        "`auto` takes the first that runs on the platform and whose needs are met.",
        "",
    ]
    lines += ["| operation | backend | platforms | if asked for | needs | what it is |", "|---|---|---|---|---|---|"]
    for operation, backends in BACKENDS.items():
        for b in backends:
            needs = ", ".join(need.short or need.problem for need in b.needs + b.auto_needs)
            places = f"{', '.join(b.platforms)} | {', '.join(b.if_asked)}"
            lines.append(f"| `{operation}` | `{b.name}` | {places} | {needs} | {b.what} |")
    return [*lines, ""]


def make_page(page: str = "config.md") -> str:
    """Renders a page."""
    module, top, members = PAGES[page]
    source = (ROOT / module).read_text(encoding="utf-8")
    lines = source.splitlines()
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    sections = sections_of(classes, classes[top])
    sections |= {f"{key}[].": classes[name] for key, name in members.items()}
    out = [HEAD.format(module=module)]
    for prefix, node in sections.items():
        fields = [f for f in node.body if isinstance(f, ast.AnnAssign) and ast.unparse(f.annotation) not in classes]
        out += [f"## {prefix.rstrip('.') or 'top level'}", "", ast.get_docstring(node) or "", ""]
        out += ["| key | type | default | meaning |", "|---|---|---|---|"]
        for entry in fields:
            default = ast.unparse(entry.value) if entry.value else ""
            default = {"MISSING": "(none)", "field(default_factory=list)": "[]"}.get(default, default)
            default = (
                default.removeprefix("field(default_factory=lambda: ").removesuffix(")")
                if "lambda" in default
                else default
            )
            kind = ast.unparse(entry.annotation).replace("|", "\\|")
            name = entry.target.id  # type: ignore[union-attr]
            out.append(f"| `{prefix}{name}` | {kind} | `{default}` | {comment_of(lines, entry)} |")
        out.append("")
    if page == "config.md":
        out += backends_table()
    return "\n".join(out)


if __name__ == "__main__":
    for page in PAGES:
        (ROOT / "docs" / page).write_text(make_page(page), encoding="utf-8")
