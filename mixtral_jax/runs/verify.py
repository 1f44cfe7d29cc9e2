"""Whether checkpoints are what a run can go on from: checksums, configuration, tokenizer, shapes, finite numbers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mixtral_jax.config import CheckpointConfig, NoCheckpointError, UserError
from mixtral_jax.config_loading import parse_config
from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.distributed.processes import take_turn, with_all
from mixtral_jax.model.mixtral import Architecture
from mixtral_jax.runs.checkpoint import META, Checkpoints, check_fits
from mixtral_jax.runs.restoring import ADAPTERS, find_base
from mixtral_jax.runs.streaming import num_blocks, read_blocks
from mixtral_jax.runtime import make_runtime
from mixtral_jax.sharding import ANY_MESH

SHARES = 16  # of an array, that processes and threads read


def verify(path: Path, say: Callable[[str], None]) -> None:
    """Reads every byte of a checkpoint, or of all checkpoints of a run, and says what it found of each.

    Several processes call it together, and each reads its share.

    Args:
        path: a run directory, its `checkpoints` directory, or one bundle in it.
        say: told a line for each checkpoint.

    Raises:
        UserError: there is none, or one is not good.
    """
    if (path / META).exists() and path.name.isdecimal():
        checkpoints, steps = Checkpoints(path.parent, CheckpointConfig()), [int(path.name)]
    else:
        inner = path / "checkpoints"
        checkpoints = Checkpoints(inner if inner.is_dir() else path, CheckpointConfig())
        steps = checkpoints.steps()
    if not steps:
        raise NoCheckpointError(path)
    problems = {step: problem for step in steps if (problem := _verify_one(checkpoints, step, say))}
    if problems:
        good = max(set(steps) - set(problems), default=None)
        advice = "none is good: restore one from a copy" if good is None else f"the newest good one is {good}"
        raise UserError(
            f"{len(problems)} of {len(steps)} checkpoints in {checkpoints.directory} are not good; {advice}"
        )


def _verify_one(checkpoints: Checkpoints, step: int, say: Callable[[str], None]) -> str | None:
    bundle = checkpoints.directory / str(step)
    problem = checkpoints.find_damage(step)
    count = size = 0
    if problem is None:
        try:
            _check_model(checkpoints, step)
            for name, (length, finite) in _read_all(bundle, checkpoints.read_meta(step)["arrays"]).items():
                if not finite:
                    raise UserError(f"{name} holds numbers that are not finite")
                count, size = count + 1, size + length
        except UserError as error:
            problem = str(error)
    say(f"{bundle}: {problem or f'good, {count} arrays of {size / 1e9:,.2f} GB'}")
    return problem


def _read_all(bundle: Path, described: dict[str, dict[str, Any]]) -> dict[str, tuple[int, bool]]:
    """Reads all arrays, of which each process takes its share; gives, by name, the bytes and whether all is finite."""
    arrays = [(part, name, *fact) for part, facts in described.items() for name, fact in facts.items()]
    parts = [
        (part, name, first, every)
        for part, name, shape, dtype in arrays
        for every in [min(SHARES, num_blocks(tuple(shape), dtype))]
        for first in range(every)
    ]
    items = [json.dumps([str(bundle / "state" / part), *rest]) for part, *rest in parts]
    found: dict[str, tuple[int, bool]] = {}
    answers = with_all(take_turn(), _read_share, lambda ask: ask(items))
    for (part, name, *_), (size, finite) in zip(parts, map(json.loads, answers), strict=True):
        before, fine = found.get(f"{part}/{name}", (0, True))
        found[f"{part}/{name}"] = before + size, fine and finite
    return found


def _read_share(item: str) -> str:
    size, finite = 0, True
    directory, *which = json.loads(item)
    for block in read_blocks(Path(directory), *which):
        size += block.nbytes
        finite &= not jnp.issubdtype(block.dtype, jnp.floating) or bool(np.isfinite(block).all())
    return json.dumps([size, finite])


def _check_model(checkpoints: Checkpoints, step: int) -> None:
    """Holds the arrays against the configuration, and the configuration against the tokenizer, that lie beside them."""
    bundle = str(checkpoints.directory / str(step))
    meta = checkpoints.read_meta(step)
    config = parse_config(meta["config"], [ANY_MESH], where=f"the configuration in {bundle}", saved=True)
    tokenizer = Tokenizer(checkpoints.read_file(step, "tokenizer.model"), f"the tokenizer in {bundle}")
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(f"its tokenizer has {tokenizer.vocab_size} pieces, its model {config.model.vocab_size}")
    for name, part in Architecture(config.model, make_runtime(config), config.objective).stored().items():
        check_fits(checkpoints.directory / str(step), name, meta["arrays"].get(name, {}), part)
    if ADAPTERS in meta:
        find_base(checkpoints, step)
