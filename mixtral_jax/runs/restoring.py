"""A model out of a checkpoint: as it lies there, or adapters merged into the parameters below them."""

from collections.abc import Callable
from pathlib import Path
from typing import cast

from mixtral_jax.config import UserError
from mixtral_jax.config_loading import parse_config
from mixtral_jax.distributed.processes import from_main
from mixtral_jax.model.mixtral import Architecture, Arrays, without_adapters
from mixtral_jax.runs.checkpoint import Checkpoints, find_checkpoint
from mixtral_jax.runs.manifest import fingerprint
from mixtral_jax.runs.merging import MergedArrays
from mixtral_jax.runs.sources import Source
from mixtral_jax.sharding import ANY_MESH

ADAPTERS = "adapters"  # in the meta file of a checkpoint that holds adapters: what lies below them


def describe_base(checkpoints: Checkpoints, step: int) -> dict[str, str | None]:
    """Says for the meta file where the parameters below adapters lie, and by what they are known."""
    bundle = checkpoints.directory / str(step)
    return {"base": str(bundle), "fingerprint": fingerprint(bundle)}


def find_base(checkpoints: Checkpoints, step: int, init_from: str = "") -> tuple[Checkpoints, int]:
    """Finds the checkpoint that a checkpoint's adapters were trained above.

    Args:
        checkpoints: of the adapters.
        step: of the adapters.
        init_from: where to look, if the adapters' own configuration does not say the same; else where it was.

    Raises:
        UserError: it is not there, is another one, or is damaged.
    """
    meta = checkpoints.read_meta(step)
    recorded = meta[ADAPTERS]
    elsewhere = init_from not in ("", parse_config(meta["config"], [ANY_MESH], saved=True).init_from)
    place = Path(init_from if elsewhere else recorded["base"])

    def find() -> list[str]:
        bundles = (place, *place.glob("[0-9]*"), *place.glob("checkpoints/[0-9]*"))
        return [str(bundle) for bundle in bundles if fingerprint(bundle) == recorded["fingerprint"]]

    found = from_main(find)
    if not found:
        raise UserError(
            f"{checkpoints.directory / str(step)} holds adapters alone, and {place} is not, or no longer, the "
            "checkpoint that they were trained above: restore it, or say with init_from= (export: --base) where it lies"
        )
    return find_checkpoint(Path(found[0]))


def restore_model(
    checkpoints: Checkpoints,
    step: int,
    architecture: Architecture,
    init_from: str = "",
    advance: Callable[[int], None] | None = None,
) -> Arrays:
    """Restores a model's parameters and selection bias; adapters are merged into their base, in its type.

    Args:
        checkpoints: of a run or import.
        step: of the checkpoint, which has been found good.
        architecture: of the model; what it says of adapters is left aside.
        init_from: where the base of adapters lies, see `find_base`.
        advance: see `Checkpoints.restore`.

    Raises:
        UserError: arrays do not fit, or adapters lack their base.
    """
    whole = without_adapters(architecture.abstract())
    meta = checkpoints.read_meta(step)
    if ADAPTERS not in meta:
        return checkpoints.restore(step, whole, advance)
    base = restore_model(*find_base(checkpoints, step, init_from), architecture, advance=advance)
    own = with_adapters(checkpoints, step, architecture)
    found = checkpoints.restore(step, own.stored())
    return own.merge(cast(Arrays, {**found, "adapters": found["params"], "params": base["params"]}))


def stored_model(checkpoints: Checkpoints, step: int, architecture: Architecture, init_from: str = "") -> Source:
    """Opens a model where it lies, as `restore_model` would give it; what it says of devices is left aside."""
    if ADAPTERS not in checkpoints.read_meta(step):
        return checkpoints.stored(step, without_adapters(architecture.abstract()))
    base = stored_model(*find_base(checkpoints, step, init_from), architecture)
    own = with_adapters(checkpoints, step, architecture)
    return MergedArrays(base, checkpoints.stored(step, own.stored()), own.adapters_scale)


def with_adapters(checkpoints: Checkpoints, step: int, architecture: Architecture) -> Architecture:
    """Returns the architecture that has the adapters of a checkpoint."""
    config = parse_config(checkpoints.read_meta(step)["config"], [ANY_MESH], saved=True)
    return Architecture(architecture.config, architecture.runtime, config.objective)
