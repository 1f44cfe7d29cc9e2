"""Compiles Mixtral 8x7B for growing v5p slices, one sequence a chip, and writes docs/plans/weak_scaling.json and its
picture: `python -m docs.weak_scaling [TOPOLOGY ...]`; without names only the picture is drawn anew.
"""

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
DATA, PICTURE = ROOT / "docs" / "plans" / "weak_scaling.json", ROOT / "docs" / "images" / "weak_scaling.png"
GIB = 2**30


def measure(name: str) -> dict:
    """Plans one topology: expert 8, fsdp the rest, as many sequences as chips."""
    from mixtral_jax.config_loading import load_config
    from mixtral_jax.planning.command import with_sizes
    from mixtral_jax.planning.compile import compile_step
    from mixtral_jax.planning.roofline import make_plan
    from mixtral_jax.planning.topology import describe_topology

    topology = describe_topology(name)
    chips = len(topology.devices)
    changes = [f"train.batch_size={chips}", "train.microbatches=1", "mesh.fsdp=-1", "mesh.expert=8"]
    config = with_sizes(load_config(ROOT / "configs" / "pods" / "8x7b_v5p_128.yaml", changes), chips)
    plan = make_plan(compile_step(config, topology), topology)
    moved: dict[str, float] = {}
    for row in plan.traffic:
        moved[" ".join(row.axes)] = moved.get(" ".join(row.axes), 0.0) + row.moved
    return {
        "chips": chips,
        "state": plan.memory.parameters + plan.memory.optimizer,
        "temporaries": plan.memory.temporaries,
        "total": plan.memory.total,
        "moved": moved,
        "operations": sum(row.operations for row in plan.traffic),
        "seconds": plan.seconds,
        "mfu_ceiling": plan.mfu(max(plan.seconds.values())),
        "compile_seconds": round(plan.compile_seconds),
    }


def draw(rows: dict[str, dict]) -> None:
    """Bytes of a device against the number of chips: memory on the left, collectives on the right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points = sorted(rows.values(), key=lambda row: row["chips"])
    chips = [str(row["chips"]) for row in points]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), constrained_layout=True)
    state = [row["state"] / GIB for row in points]
    rest = [(row["total"] - row["state"]) / GIB for row in points]
    left.bar(chips, state, 0.6, label="parameters and optimizer", color="#4477aa")
    left.bar(chips, rest, 0.6, bottom=state, label="gradients, activations, temporaries", color="#ccbb44")
    left.set(title="Memory of a chip", xlabel="chips", ylabel="GiB")
    bottom = [0.0] * len(points)
    colours = {"fsdp": "#4477aa", "expert": "#ee6677", "fsdp expert": "#228833"}
    for axes, colour in colours.items():
        values = [row["moved"].get(axes, 0.0) / GIB for row in points]
        right.bar(chips, values, 0.6, bottom=bottom, label=f"over {axes}", color=colour)
        bottom = [a + b for a, b in zip(bottom, values, strict=True)]
    right.set(title="Moved by a chip in a step", xlabel="chips", ylabel="GiB")
    for axes in (left, right):
        axes.set_ylim(0, 1.35 * axes.get_ylim()[1])
        axes.legend(frameon=False, loc="upper right", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURE, dpi=120)


def table(rows: dict[str, dict]) -> str:
    """The same in Markdown."""
    heads = "slice, chips, state GiB, in all GiB, moved GiB over fsdp, over expert, both, ICI s, compute s, MFU ceiling"
    lines = [f"| {heads.replace(', ', ' | ')} | compiled in |", "|---" * 11 + "|"]
    for name, row in sorted(rows.items(), key=lambda item: item[1]["chips"]):
        moved = [f"{row['moved'].get(axes, 0.0) / GIB:.1f}" for axes in ("fsdp", "expert", "fsdp expert")]
        lines.append(
            f"| {name} | {row['chips']} | {row['state'] / GIB:.2f} | {row['total'] / GIB:.2f} | {' | '.join(moved)} | "
            f"{row['seconds']['near network']:.2f} | {row['seconds']['compute']:.2f} | {row['mfu_ceiling']:.0%} | "
            f"{row['compile_seconds']} s |"
        )
    return "\n".join(lines)


def main(names: list[str]) -> None:
    """Measures the named topologies, keeps the rest, draws."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    rows = json.loads(DATA.read_text()) if DATA.exists() else {}
    for name in names:
        rows[name] = measure(name)
        DATA.write_text(json.dumps(rows, indent=1) + "\n")
        print(name, rows[name], flush=True)
    draw(rows)
    from docs.record_plans import PAGE, write_between

    write_between(PAGE, "weak", table(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
