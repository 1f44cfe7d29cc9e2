"""Plans as text: tables for a screen and for the files in docs/plans."""

import dataclasses
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from mixtral_jax.hardware import GIB
from mixtral_jax.metrics import flops_per_token, parameter_counts
from mixtral_jax.planning.advice import advise
from mixtral_jax.planning.compile import Memory
from mixtral_jax.planning.roofline import Plan, Traffic

NEAR = {"tpu": "ICI", "cuda": "NVLink"}
FAR = {"tpu": "DCN", "cuda": "NICs"}
SMALL = 0.001  # share of all bytes below which collectives of a kind are counted together


def print_plan(plan: Plan, console: Console) -> None:
    """Prints a whole plan."""
    tables = (_work_table(plan), _traffic_table(plan), _roofline_table(plan))
    for part in (_headline(plan), _memory_table(plan), *advise(plan), *tables, _verdict(plan)):
        console.print(part)
        console.print()


def _headline(plan: Plan) -> str:
    """Says what was planned, in a few lines."""
    config, counts = plan.config, parameter_counts(plan.config.model)
    slices = f" x {plan.topology.slices} slices" if plan.topology.slices > 1 else ""
    tokens = config.train.batch_size * config.data.seq_len
    return (
        f"{counts.total / 1e9:,.1f}B parameters, {counts.active / 1e9:,.1f}B active, on {plan.topology.name}{slices}\n"
        f"{plan.description}\n"
        f"{config.train.batch_size:,} sequences of {config.data.seq_len:,} a step = {tokens:,} tokens"
        + (f", in {config.train.microbatches} microbatches" if config.train.microbatches > 1 else "")
    )


def _verdict(plan: Plan) -> str:
    """Says what bounds the step and what utilisation that allows."""
    seconds = plan.seconds
    longest, total = max(seconds.values()), sum(seconds.values())
    tokens = plan.config.train.batch_size * plan.config.data.seq_len
    return (
        f"Bound by {_name(plan, plan.bound)}. If all four overlap: {longest:.2f} s a step, "
        f"{tokens / longest:,.0f} tokens/s, MFU {plan.mfu(longest):.1%}, which is the ceiling.\n"
        f"If none overlaps: {total:.2f} s, {tokens / total:,.0f} tokens/s, MFU {plan.mfu(total):.1%}."
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    return table


def _memory_table(plan: Plan) -> Table:
    memory, chip = plan.memory, plan.topology.chip
    names = {
        "parameters": "parameters",
        "optimizer": "optimizer state",
        "batch": "batch",
        "temporaries": "gradients, activations, temporaries",
        "output": "results (without those in place of arguments)",
        "program": "program",
    }
    table = _table("Memory of a device", "", "GiB", f"of {chip.memory / GIB:.1f}")
    assert set(names) == {field.name for field in dataclasses.fields(Memory)}
    for key, name in names.items():
        value = getattr(memory, key)
        table.add_row(name, f"{value / GIB:.2f}", f"{value / chip.memory:.1%}")
    table.add_row("total", f"{memory.total / GIB:.2f}", f"{memory.total / chip.memory:.1%}", style="bold")
    return table


def _work_table(plan: Plan) -> Table:
    model, seq_len = plan.config.model, plan.config.data.seq_len
    per_token, work = flops_per_token(model, seq_len), plan.work
    table = _table("Work", "", "TFLOP", "of the model's")
    tokens = plan.config.train.batch_size * seq_len
    table.add_row("model, a token", f"{per_token / 1e12:.4f}", "")
    table.add_row("model, a step, all devices", f"{per_token * tokens / 1e12:,.0f}", "")
    table.add_row("model, a step, one device", f"{plan.model_flops / 1e12:,.1f}", "1.00")
    for name, value in (
        ("compiled: XLA's products", work.dense),
        ("compiled: attention kernels", work.attention),
        ("compiled: grouped expert products", work.grouped),
        ("compiled FLOPs / useful FLOPs", work.flops),
    ):
        table.add_row(name, f"{value / 1e12:,.1f}", f"{value / plan.model_flops:.2f}")
    return table


def _traffic_table(plan: Plan) -> Table:
    near, far = NEAR[plan.topology.platform], FAR[plan.topology.platform]
    columns = ("collective", "mesh axes", "ops", "runs", "payload GiB", "moved GiB", f"{near} ms", f"{far} ms")
    table = _table("Collectives of a device in a step", *columns)
    table.columns[1].justify = "left"
    whole = sum(row.moved for row in plan.traffic)
    large = [row for row in plan.traffic if row.moved >= SMALL * whole]
    small = [row for row in plan.traffic if row.moved < SMALL * whole]
    for row in large:
        table.add_row(row.kind, " ".join(row.axes), *_amounts([row]))
    if small:
        table.add_row("smaller ones", "", *_amounts(small))
    table.add_row("total", "", *_amounts(plan.traffic), style="bold")
    return table


def _amounts(rows: Sequence[Traffic]) -> list[str]:
    return [
        f"{sum(row.operations for row in rows)}",
        f"{sum(row.runs for row in rows):,}",
        f"{sum(row.payload for row in rows) / GIB:.2f}",
        f"{sum(row.moved for row in rows) / GIB:.2f}",
        f"{1e3 * sum(row.near for row in rows):,.1f}",
        f"{1e3 * sum(row.far for row in rows):,.1f}",
    ]


def _name(plan: Plan, part: str) -> str:
    return {"near network": NEAR, "far network": FAR}.get(part, {}).get(plan.topology.platform, part)


def _roofline_table(plan: Plan) -> Table:
    chip, seconds = plan.topology.chip, plan.seconds
    network = chip.network
    assert network is not None
    amounts = {
        "compute": (f"{plan.work.flops / 1e12:,.0f} TFLOP", f"{chip.flops / 1e12:,.0f} TFLOP/s"),
        "memory": (f"{plan.work.memory_bytes / 1e9:,.0f} GB", f"{chip.bandwidth / 1e9:,.0f} GB/s"),
        "near network": ("see above", f"{network.links} x {network.link / 1e9:,.0f} GB/s"),
        "far network": ("see above", f"{network.far / 1e9:,.2f} GB/s"),
    }
    table = _table("Least time of a step", "", "amount", "peak of a device", "s", "MFU if alone")
    for part, (amount, peak) in amounts.items():
        value = seconds[part]
        ceiling = f"{plan.mfu(value):.1%}" if value and plan.mfu(value) < 10 else "-"
        style = "bold" if part == plan.bound else ""
        table.add_row(_name(plan, part), amount, peak, f"{value:.3f}", ceiling, style=style)
    return table
