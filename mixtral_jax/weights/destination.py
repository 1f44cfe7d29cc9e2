"""The places that import and export read and write: a new directory or file appears whole or not at all."""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from mixtral_jax.config import UserError
from mixtral_jax.distributed.processes import barrier, from_main, is_main, undone
from mixtral_jax.whole_files import make_place, move


@contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
    """Makes a directory of a name that nobody else has, to be filled; renames it when that is done.

    All processes enter and leave it together, and the first one does both.

    Args:
        directory: the final name; must not exist, or be empty. A link is followed.

    Yields:
        The directory to fill. It is removed when an exception passes, and nothing else is.

    Raises:
        UserError: the name is taken, or the place cannot be written.
    """
    with _new(directory, check_new) as partial:
        if is_main():
            partial.mkdir()
        barrier()
        yield partial


def new_file(file: Path) -> AbstractContextManager[Path]:
    """Names a file that nobody else has, to be written, and renames it when that is done; see `new_directory`."""
    return _new(file, check_new_file)


@contextmanager
def _new(path: Path, check: Callable[[Path], None]) -> Iterator[Path]:
    check(path)
    if not is_main():
        yield Path(from_main(str))
        barrier()
        barrier()
        return
    with _beside(path) as (partial, target):
        yield Path(from_main(lambda: str(partial)))
        barrier()
        check(path)
        move(partial, target)  # takes the place of an empty directory, never of a full one
    barrier()


@contextmanager
def _beside(path: Path) -> Iterator[tuple[Path, Path]]:
    """Names another place where a path will be, and in the end leaves nothing that was made for it."""
    target = path.resolve()
    above = [parent for parent in target.parents if not parent.exists()]
    undo = ExitStack()
    undo.callback(_remove_empty, above)
    with undone(undo.close):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            partial, remove = make_place(target.with_name(f".{target.name}"))
            undo.callback(remove)
            yield partial, target
        except OSError as error:
            why = error.strerror or error
            raise UserError(f"cannot write {path} ({why}): free some space or name another one") from None


def _remove_empty(directories: list[Path]) -> None:
    for directory in directories:
        if directory.exists() and not any(directory.iterdir()):
            directory.rmdir()


def check_release(directory: Path) -> None:
    """Raises `UserError` where no release can be."""
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory: name the one that holds config.json or params.json")


def check_new(directory: Path) -> None:
    """Raises `UserError` unless a directory of this name can be made; makes nothing."""
    if directory.is_symlink() and not directory.exists():
        raise UserError(f"{directory} is a link to nothing: remove it or name another directory")
    target = directory.resolve()
    if target == Path.cwd() or target in Path.cwd().parents:
        raise UserError(f"{directory} is where you are, or above it: name a new directory")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{directory} exists and is not empty: name a new directory")


def check_new_file(file: Path) -> None:
    """Raises `UserError` if something has this name; makes nothing."""
    if file.exists() or file.is_symlink():
        raise UserError(f"{file} exists: name a new file")


def check_target(target: Path, format_name: str, dtype: str | None) -> None:
    """Raises `UserError` unless an export in this format and type can have this name; makes nothing."""
    if format_name != "gguf":
        if dtype == "q8_0":
            raise UserError(f"--dtype Q8_0 is a type of the format gguf: choose another one for {format_name}")
        if dtype and format_name in ("checkpoint", "peft"):
            raise UserError(f"--format {format_name} keeps the types as they are: leave --dtype out")
        return check_new(target)
    if target.suffix != ".gguf":
        raise UserError(f"{target} is to be one file of the format gguf: let its name end in .gguf")
    if importlib.util.find_spec("gguf") is None:
        raise UserError("the format gguf needs a package that is not installed: pip install 'mixtral_jax[gguf]'")
    check_new_file(target)
