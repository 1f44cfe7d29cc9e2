"""Writes docs/plans/NAME.txt for the shipped pod configs, and their table in docs/planning.md.

`python -m docs.record_plans [NAME ...]`; without names all of them.
"""

import io
import os
import re
from pathlib import Path

from mixtral_jax import cli
from mixtral_jax.config import UserError
from mixtral_jax.config_loading import load_config

ROOT = Path(__file__).parents[1]
CONFIGS, PLANS = ROOT / "configs" / "pods", ROOT / "docs" / "plans"
PAGE = ROOT / "docs" / "planning.md"
WIDTH = 110  # columns

TOPOLOGIES = {
    "8x7b_v5p_128": "v5p:4x4x4",
    "8x7b_v6e_256": "v6e:16x16",
    "8x7b_h100_64": "h100:8x8",
    "8x7b_h200_64": "h200:8x8",
    "8x7b_b200_64": "b200:8x8",
    "8x22b_v5p_512": "v5p:4x8x8",
    "8x22b_h100_128": "h100:16x8",
    "8x7b_32k_v5p_128": "v5p:4x4x4",
}


def main(arguments: list[str]) -> None:
    """Compiles the named configs, or all of them, and records their plans."""
    unknown = sorted(set(arguments) - set(TOPOLOGIES))
    if unknown:
        raise UserError(f"no pod config is called {', '.join(unknown)}: choose from {', '.join(TOPOLOGIES)}")
    os.environ["JAX_PLATFORMS"] = "cpu"
    for name in arguments or TOPOLOGIES:
        text, seconds = record(name)
        PLANS.mkdir(parents=True, exist_ok=True)
        (PLANS / f"{name}.txt").write_text(text)
        print(f"docs/plans/{name}.txt: compiled in {seconds:.0f} s", flush=True)
    write_between(PAGE, "plans", table())


def record(name: str) -> tuple[str, float]:
    """Returns the plan of a shipped config as text, and how long its compilation took in seconds."""
    from mixtral_jax.console import make_console
    from mixtral_jax.planning.compile import compile_step
    from mixtral_jax.planning.plan_text import print_plan
    from mixtral_jax.planning.roofline import make_plan
    from mixtral_jax.planning.topology import describe_topology

    topology = describe_topology(TOPOLOGIES[name])
    config = load_config(CONFIGS / f"{name}.yaml")
    plan = make_plan(compile_step(config, topology), topology)
    console = make_console(file=io.StringIO(), width=WIDTH)
    print_plan(plan, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    lines = [line.rstrip() for line in text.splitlines()]
    return "\n".join([f"configs/pods/{name}.yaml", *lines]).rstrip() + "\n", plan.compile_seconds


def table() -> str:
    """Sums up the recorded plans in Markdown."""
    titles = ["`configs/pods/`", "topology", "GiB a device", "compiled / useful FLOPs", "bound by", "MFU ceiling"]
    rows = [f"| {' | '.join([*titles, 'none overlaps'])} |"]
    rows.append("|---|---|---|---|---|---|---|")
    for name, topology in TOPOLOGIES.items():
        path = PLANS / f"{name}.txt"
        if not path.exists():
            continue
        text = path.read_text()

        def found(pattern: str, text: str = text) -> str:
            match = re.search(pattern, text, re.MULTILINE | re.DOTALL)
            assert match, pattern
            return " ".join(match[1].split())

        memory, given = found(r"^ total +([\d.]+) "), found(r"GiB +of +([\d.]+)$")
        wasted, bound = found(r"useful FLOPs +[\d.,]+ +([\d.]+)$"), found(r"Bound by (.*?)[.] If")
        ceiling, alone = found(r"tokens/s, MFU ([\d.]+%),"), found(r"If none overlaps:.*MFU ([\d.]+%)")
        plan = f"[{memory} of {given}](plans/{name}.txt)"
        rows.append(f"| {name} | {topology} | {plan} | {wasted} | {bound} | {ceiling} | {alone} |")
    return "\n".join(rows)


def write_between(page: Path, marker: str, text: str) -> None:
    """Replaces what stands between `<!-- marker -->` and `<!-- end -->` in a page."""
    old = page.read_text()
    start = f"<!-- {marker} -->"
    head, rest = old.split(start, 1)
    page.write_text(f"{head}{start}\n{text}\n<!-- end -->{rest.split('<!-- end -->', 1)[1]}")


if __name__ == "__main__":
    cli.run(main)
