"""The search as a command: a table of candidates, the compiler's word on the best few, and the chosen config."""

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from mixtral_jax.config import Config, UserError
from mixtral_jax.config_loading import to_yaml
from mixtral_jax.console import ProgressLine
from mixtral_jax.hardware import GIB
from mixtral_jax.planning.plan_text import print_plan
from mixtral_jax.planning.search import Candidate, Checked, check, distinct, rank
from mixtral_jax.planning.topology import Topology
from mixtral_jax.sharding import MESH_AXES

SHOWN = 12


def choose(
    config: Config, topology: Topology, console: Console, batch_sizes: list[int], count: int, target: Path | None
) -> None:
    """Searches, prints what was found, and writes the best config that the compiler accepts.

    Raises:
        UserError: nothing fits.
    """
    ranked = rank(config, topology, batch_sizes)
    shown = distinct(ranked)
    console.print(
        _table(
            shown[:SHOWN], [], f"{len(ranked):,} candidates should fit; the best of each mesh (~: by the simple model)"
        )
    )
    checked: list[Checked] = []
    with ProgressLine("compiling", count) as progress:
        for number, candidate in enumerate(shown[:count], 1):
            checked.append(check(candidate, topology))
            progress.update(number, _mesh(candidate))
    console.print(_table(shown[:count], checked, "Checked by compiling"))
    fitting = [c for c in checked if c.plan is not None and c.plan.fits]
    if not fitting:
        raise UserError(
            f"the compiler accepts none of the {count} best candidates: raise --check, or take more devices"
        )
    best = max(fitting, key=lambda c: c.plan.mfu(max(c.plan.seconds.values())) if c.plan else 0.0)
    assert best.plan is not None
    print_plan(best.plan, console)
    if target:
        target.write_text(to_yaml(best.candidate.config))
        console.print(f"written: {target}")


def _mesh(candidate: Candidate) -> str:
    sizes = {name: getattr(candidate.config.mesh, name) for name in MESH_AXES}
    return ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "one device"


def _table(candidates: list[Candidate], checked: list[Checked], title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("mesh", min_width=14)  # the one that gives way where the screen is narrow
    table.add_column("batch / parts, remat", no_wrap=True)
    guessed, compiled = ("~GiB", "~s", "~MFU"), ("GiB", "s", "MFU")
    for column in (*guessed, *(compiled if checked else ())):
        table.add_column(column, justify="right", no_wrap=True)
    for index, candidate in enumerate(candidates):
        train, guess = candidate.config.train, candidate.estimate
        row = [_mesh(candidate), f"{train.batch_size} / {train.microbatches}, {train.remat}"]
        row += [f"{guess.memory / GIB:.1f}", f"{guess.seconds:.2f}", f"{guess.mfu:.1%}"]
        if checked:
            plan, needed = checked[index].plan, checked[index].needed
            seconds = max(plan.seconds.values()) if plan else 0.0
            row += [f"{needed / GIB:.1f}", *([f"{seconds:.2f}", f"{plan.mfu(seconds):.1%}"] if plan else ["no", "fit"])]
        table.add_row(*row)
    return table
