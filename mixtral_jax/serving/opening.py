"""Any model that a person has, opened to write text."""

import contextlib
import dataclasses
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mixtral_jax.evaluation.loading import LoadedModel, load_model
from mixtral_jax.inference.holding import hold_weights, size_of
from mixtral_jax.weights.checkpoints import import_checkpoint
from mixtral_jax.weights.files import holds_release
from mixtral_jax.whole_files import make_place


@contextlib.contextmanager
def open_model(checkpoint: str, overrides: list[str], weights: str = "") -> Iterator[LoadedModel]:
    """Loads a run, a checkpoint, or a directory of released weights, which is imported for the occasion.

    Args:
        checkpoint: its path.
        overrides: `section.key=value` on top of its configuration.
        weights: type in which matrices are held, see `hold_weights`; empty: the checkpoint's.

    Raises:
        UserError: there is none, or a bad override.
    """
    path = Path(checkpoint)
    if not holds_release(path):
        yield _held(load_model(checkpoint, overrides, packed=False), weights)
        return
    imported, remove = make_place(Path(tempfile.gettempdir()) / "mixtral_jax_import")
    try:
        with contextlib.redirect_stdout(sys.stderr):  # standard output is for texts
            import_checkpoint(path, imported, overrides)
        yield _held(load_model(str(imported), overrides, packed=False), weights)
    finally:
        remove()


def _held(loaded: LoadedModel, weights: str) -> LoadedModel:
    if not weights:
        return loaded
    before = size_of(loaded.arrays)
    held = dataclasses.replace(loaded, arrays=hold_weights(loaded.arrays, weights))
    print(f"weights in {weights}: {size_of(held.arrays) / 1e9:.2f} GB, in the checkpoint {before / 1e9:.2f} GB",
          file=sys.stderr)  # fmt: skip
    return held
