"""Any model that a person has, opened to write text."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mixtral_jax.evaluation.loading import LoadedModel, load_model
from mixtral_jax.weights.checkpoints import import_checkpoint

RELEASED = ("config.json", "params.json")  # one of these makes a directory of weights a released one


@contextlib.contextmanager
def open_model(checkpoint: str, overrides: list[str]) -> Iterator[LoadedModel]:
    """Loads a run, a checkpoint, or a directory of released weights, which is imported for the occasion.

    Args:
        checkpoint: its path.
        overrides: `section.key=value` on top of its configuration.

    Raises:
        UserError: there is none, or a bad override.
    """
    path = Path(checkpoint)
    if not any((path / name).is_file() for name in RELEASED):
        yield load_model(checkpoint, overrides, packed=False)
        return
    with tempfile.TemporaryDirectory(prefix="mixtral_jax_import_") as directory:
        imported = Path(directory) / "import"
        import_checkpoint(path, imported, overrides)
        yield load_model(str(imported), overrides, packed=False)
