"""Whether checkpoints are what a run can go on from: checksums, configuration, tokenizer, shapes, finite numbers."""

from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from mixtral_jax.config import CheckpointConfig, UserError
from mixtral_jax.config_loading import parse_config
from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.model.mixtral import Architecture
from mixtral_jax.runs.checkpoint import META, Checkpoints, check_fits
from mixtral_jax.runs.restoring import ADAPTERS, find_base
from mixtral_jax.runs.streaming import read_blocks
from mixtral_jax.runtime import make_runtime
from mixtral_jax.sharding import ANY_MESH


def verify(path: Path, say: Callable[[str], None]) -> None:
    """Reads every byte of a checkpoint, or of all checkpoints of a run, and says what it found of each.

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
        raise UserError(f"there is no checkpoint in {path}: name a run directory or one of its checkpoints")
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
            for part, arrays in checkpoints.read_meta(step)["arrays"].items():
                for name in arrays:
                    count += 1
                    for block in read_blocks(bundle / "state" / part, name):
                        size += block.nbytes
                        if jnp.issubdtype(block.dtype, jnp.floating) and not np.isfinite(block).all():
                            raise UserError(f"{part}/{name} holds numbers that are not finite")
        except UserError as error:
            problem = str(error)
    say(f"{bundle}: {problem or f'good, {count} arrays of {size / 1e9:,.2f} GB'}")
    return problem


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
