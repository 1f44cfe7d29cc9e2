"""What is known of routing, as tables for people and as JSON for scripts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from mixtral_jax.console import make_table, two_lines
from mixtral_jax.evaluation.ablation import Ablation
from mixtral_jax.evaluation.results import interval_text
from mixtral_jax.evaluation.routing import PATH, RoutingCounts, own_shares, random_repeats
from mixtral_jax.evaluation.saturation import Moment

SEEN = 10  # times that a piece occurs, at least, before it tells of an expert
SHOWN_EXPERTS = 16  # of a layer, in a table
SHOWN_PIECES, SHOWN_PATHS = 8, 10

Piece = Callable[[int], str]  # a token's text


def shown_layers(layers: int) -> list[int]:
    """Chooses the first, the middle and the last layer."""
    return sorted({0, layers // 2, layers - 1})


def routing_table(counts: Mapping[str, RoutingCounts]) -> Table:
    """Makes the paper's table 5 with the shares beside it, for the first, the middle and the last layer."""
    k, layers, num_experts = next(iter(counts.values())).assignments.shape
    random_first, random_any = random_repeats(num_experts, k)
    table = make_table(
        ("layer", "source"),
        ("share, %\n1st", "\nall", "repeats\n1st", "\nany", "busiest\nmean", "\nworst"),
        f"{k} of {num_experts} experts a token. share: of the assignments, least and most used expert. repeats: "
        "neighbouring tokens with the same first choice, or with any choice in common. busiest: the most used expert "
        "of a batch against the uniform load.",
        no_wrap=True,
    )
    for layer in shown_layers(layers):
        for number, (name, count) in enumerate(counts.items()):
            first, every = 100 * count.shares(0)[layer], 100 * count.shares()[layer]
            busiest = 1 + count.batch_violations()[:, layer]
            table.add_row(
                str(layer) if number == 0 else "",
                name,
                interval_text((first.min(), first.max()), ".1f"),
                interval_text((every.min(), every.max()), ".1f"),
                f"{count.first_repeats()[layer]:.1%}",
                f"{count.any_repeats()[layer]:.1%}",
                f"{busiest.mean():.2f}x",
                f"{busiest.max():.2f}x",
                end_section=number == len(counts) - 1,
            )
    uniform = f"{100 / num_experts:.1f}"
    table.add_row("", "random", uniform, uniform, f"{random_first:.1%}", f"{random_any:.1%}", "1.00x", "", style="dim")
    return table


def routing_json(counts: Mapping[str, RoutingCounts]) -> dict[str, Any]:
    """Makes `sources`, by name what `RoutingCounts` measures of each, and `random`, what chance would give."""
    k, _, num_experts = next(iter(counts.values())).assignments.shape
    random_first, random_any = random_repeats(num_experts, k)
    return {
        "evaluation": "routing",
        "sources": {
            name: {
                "tokens": count.tokens,
                "pairs": count.pairs,
                "shares_by_choice": [count.shares(choice) for choice in range(k)],
                "shares": count.shares(),
                "repeats_first_choice": count.first_repeats(),
                "repeats_any_choice": count.any_repeats(),
                "max_violation_by_batch": count.batch_violations(),
                "router_entropy": count.router_entropy(),
                "coactivation": count.coactivation(),
                "specialisation": count.specialisation(),
                "own_shares": own,
            }
            for (name, count), own in zip(counts.items(), own_shares(list(counts.values())), strict=True)
        },
        "random": {
            "share": 1 / num_experts,
            "coactivation": (k - 1) / max(1, num_experts - 1),
            "specialisation": k / num_experts,
            "repeats_first_choice": random_first,
            "repeats_any_choice": random_any,
        },
    }


def together_table(total: RoutingCounts) -> Table:
    """Makes a table of the pairs of experts that tokens choose together most, and least, in three layers."""
    k, layers, num_experts = total.assignments.shape
    chance = (k - 1) / max(1, num_experts - 1)
    caption = f"experts of a layer that the same tokens choose: share of the first one's tokens; by chance {chance:.1%}"
    table = make_table(("layer", "most together", "least together"), caption=caption)
    for layer in shown_layers(layers):
        found = total.coactivation()[layer]
        pairs = [(found[i, j], i, j) for i in range(num_experts) for j in range(num_experts) if i != j]
        pairs = sorted((pair for pair in pairs if total.together[layer, pair[1], pair[1]]), reverse=True)
        said = [f"{i}\N{RIGHTWARDS ARROW}{j} {share:.0%}" for share, i, j in pairs]
        table.add_row(str(layer), ", ".join(said[:4]), ", ".join(said[-3:]))
    return table


def sources_table(counts: Mapping[str, RoutingCounts]) -> Table:
    """Makes a table of how far experts belong to sources, in three layers."""
    parts = list(counts.values())
    k, layers, num_experts = parts[0].assignments.shape
    table = make_table(
        ("layer", "expert"),
        counts,
        f"share of a source's tokens that go to the expert, by chance {k / num_experts:.1%}; below, what share of the "
        "expert's tokens that is, each source counted alike",
    )
    own, found = own_shares(parts), [count.specialisation() for count in parts]
    for layer in shown_layers(layers):
        for expert in _foremost(own[:, layer].max(axis=0)):
            cells = [
                two_lines(f"{share[layer, expert]:.1%}", f"{of_it[layer, expert]:.0%}")
                for share, of_it in zip(found, own, strict=True)
            ]
            table.add_row(str(layer), str(expert), *cells)
        table.add_section()
    return table


def vocabulary_json(total: RoutingCounts, piece: Piece, most: int = 20) -> list[dict[str, Any]]:
    """Makes, for each layer, its mean `specialisation` and for each expert the pieces that go to it first of all.

    The mean is over pieces that occur often enough, of the share of each one's foremost expert.
    """
    found = []
    often = np.flatnonzero(total.pieces[0].sum(axis=-1) >= SEEN)
    for counts, shares in zip(total.pieces, total.vocabulary(), strict=True):
        foremost, share = shares[often].argmax(axis=-1), shares[often].max(axis=-1)
        experts = []
        for expert in range(counts.shape[-1]):
            own = np.flatnonzero(foremost == expert)
            order = own[np.lexsort((-counts[often[own], expert], -share[own]))][:most]
            experts.append(
                [
                    {"piece": piece(int(often[i])), "share": float(share[i]), "count": int(counts[often[i]].sum())}
                    for i in order
                ]
            )
        found.append({"specialisation": float(share.mean()) if len(often) else None, "experts": experts})
    return found


def vocabulary_table(vocabulary: Sequence[dict[str, Any]]) -> Table:
    """Makes a table of the pieces of each expert with their share, in three layers."""
    table = make_table(
        ("layer", "expert", "pieces"),
        caption=f"pieces of text, of those that occur {SEEN} times and more, whose first choice is most often this "
        "expert, and how often it is; below the layer, the mean over all pieces of their foremost expert's share",
    )
    for layer in shown_layers(len(vocabulary)):
        found = vocabulary[layer]
        for expert in _foremost(np.array([len(pieces) for pieces in found["experts"]])):
            pieces = [f"{each['piece']} {each['share']:.0%}" for each in found["experts"][expert][:SHOWN_PIECES]]
            table.add_row(str(layer), str(expert), Text(", ".join(pieces)))  # of brackets rich would make markup
        table.add_row("", "", "none occurs so often" if found["specialisation"] is None else
                      f"mean {found['specialisation']:.1%}", style="dim", end_section=True)  # fmt: skip
    return table


def paths_json(total: RoutingCounts, counts: Mapping[str, RoutingCounts], most: int = 100) -> dict[str, Any]:
    """Makes `different` and `effective` numbers of paths, and the most frequent ones with their shares.

    `independent` is the share that a path would have if layers chose independently of each other.
    """
    steps, times = total.path_table()
    first = total.shares(0)
    return {
        "different": len(times),
        "effective": total.effective_paths(),
        "most_frequent": [
            {
                "experts": path.tolist(),
                "share": int(count) / total.tokens,
                "independent": float(first[np.arange(len(path)), path].prod()),
                "sources": {
                    name: part.paths[path.astype(PATH).tobytes()] / part.tokens for name, part in counts.items()
                },
            }
            for path, count in zip(steps[:most], times[:most], strict=True)
        ],
    }


def paths_table(paths: dict[str, Any]) -> Table:
    """Makes a table of the most frequent paths."""
    table = make_table(
        ["experts, first to last layer"],
        ("share", "independent", *paths["most_frequent"][0]["sources"]),
        f"{paths['different']:,} different paths of first choices, as hard to guess as {paths['effective']:,.0f} "
        "equally frequent ones; independent: the share if layers chose independently",
    )
    for path in paths["most_frequent"][:SHOWN_PATHS]:
        cells = [f"{share:.2%}" for share in (path["share"], path["independent"], *path["sources"].values())]
        table.add_row(" ".join(map(str, path["experts"])), *cells)
    return table


def ablation_table(ablation: Ablation) -> Table:
    """Makes a table of the experts that matter most, in three layers."""
    table = make_table(
        ("layer", "expert"),
        (*ablation.whole.sources, "total"),
        "bits per byte without the expert less those of the whole model, in thousandths; below, the 95% interval over "
        "documents",
    )
    layers = 1 + max(layer for layer, _ in ablation.without)
    for layer in shown_layers(layers):
        found = [changes for (where, _), changes in ablation.without.items() if where == layer]
        for expert in _foremost(np.array([changes["total"].bits_per_byte for changes in found])):
            cells = [
                two_lines(f"{1000 * change.bits_per_byte:+.1f}", interval_text(
                    change.interval and (1000 * change.interval[0], 1000 * change.interval[1]), "+.1f"
                ))
                for change in found[expert].values()
            ]  # fmt: skip
            table.add_row(str(layer), str(expert), *cells)
        table.add_section()
    return table


def ablation_json(ablation: Ablation) -> dict[str, Any]:
    """Makes `sources` with the whole model's `bits_per_byte`, and `without`: by layer and expert what changes."""
    experts = [
        {"layer": layer, "expert": expert, "changes": changes} for (layer, expert), changes in ablation.without.items()
    ]
    sources = {name: {"bits_per_byte": result.bits_per_byte} for name, result in ablation.whole.sources.items()}
    return {"evaluation": "ablation", "sources": sources, "without": experts}


def saturation_table(moments: Sequence[Moment], k: int) -> Table:
    """Makes a table of the checkpoints: a column for each of three layers, and the mean over all layers."""
    layers, num_experts = moments[0].shares.shape
    shown = shown_layers(layers)
    named = [f"\nlayer {layer}" for layer in shown]
    table = make_table(
        (),
        ("step", *named, "saturation\nall", "entropy\nall", "busiest\nmean", "\nworst"),
        f"saturation: of the {k} experts of a token, the share that the last checkpoint chooses too, by chance "
        f"{k / num_experts:.1%}; entropy of the routers' probabilities, nats, of at most {np.log(num_experts):.2f}; "
        "the busiest expert's load, 1 at balance",
        no_wrap=True,
    )
    for moment in moments:
        busiest = moment.shares.max(axis=-1) * num_experts
        cells = [f"{share:.1%}" for share in (*moment.saturation[shown], moment.saturation.mean())]
        cells += [f"{value:.2f}" for value in (moment.router_entropy.mean(), busiest.mean(), busiest.max())]
        table.add_row(f"{moment.step:,}", *cells)
    return table


def saturation_json(moments: Sequence[Moment]) -> dict[str, Any]:
    """Makes `checkpoints`: of each the step and, by layer, saturation, entropy in nats and the experts' shares."""
    return {"evaluation": "saturation", "checkpoints": list(moments)}


def _foremost(values: np.ndarray) -> list[int]:
    """Chooses the experts of the largest values, in the order of their numbers."""
    return sorted(np.argsort(-values, kind="stable")[:SHOWN_EXPERTS].tolist())
