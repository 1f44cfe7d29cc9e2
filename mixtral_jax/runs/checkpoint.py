"""Checkpoints: one directory a step, written by Orbax in the background, sealed by a manifest, verified before use.

A bundle `checkpoints/STEP/` holds `state/` (Orbax, one item for each part of the state), `meta.json`, small files such
as the tokenizer, and last of all `manifest.json`.
"""

import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar, cast

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from mixtral_jax.config import CheckpointConfig, NoCheckpointError, UserError
from mixtral_jax.data.record import FILE as RECORD
from mixtral_jax.data.record import DocumentRecord
from mixtral_jax.distributed.processes import barrier, is_main, take_turn
from mixtral_jax.distributed.supervisor import ANEW
from mixtral_jax.runs.disk import INTACT, check_room, explain, system_error
from mixtral_jax.runs.filling import fill
from mixtral_jax.runs.manifest import NAME as MANIFEST
from mixtral_jax.runs.manifest import Digests, find_damage, hashing, write_manifest
from mixtral_jax.runs.sources import Source, StoredArrays
from mixtral_jax.runs.streaming import named_leaves, orbax_writer, read_arrays, save_args
from mixtral_jax.whole_files import write_whole

# Orbax tells of every step it takes, and of a failure in stack traces; we raise what a person needs to know.
logging.getLogger("absl").setLevel(logging.CRITICAL)

META = "meta.json"

Parts = TypeVar("Parts", bound=Mapping[str, PyTree])


class Checkpoints(AbstractContextManager["Checkpoints"]):
    """The checkpoints of one run; one writer at a time (see `RunDirectory`).

    A context manager for whoever saves: leaving it, also by an error, first finishes the save that is under way.

    Of several processes each writes and reads the parts of its devices, on storage that all share; the main one alone
    makes the bundle, seals, verifies and removes, and all work out checksums together.
    """

    def __init__(self, directory: Path, config: CheckpointConfig, warn: Callable[[str], None] = print):
        """Looks at nothing yet.

        Args:
            directory: parent of the bundles.
            config: which bundles are kept.
            warn: told of every bundle that is passed over.
        """
        self.directory = directory.absolute()
        self.config = config
        self.warn = warn
        self._saver: ocp.AsyncCheckpointer | None = None
        self._sealer: threading.Thread | None = None
        self._error: Exception | None = None
        self._damaged: set[int] = set()

    def steps(self) -> list[int]:
        """Lists the steps of all bundles, finished or not, oldest first."""
        if not self.directory.is_dir():
            return []
        return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdecimal())

    def save(self, step: int, state: Mapping[str, PyTree], meta: dict[str, Any], files: dict[str, bytes]) -> None:
        """Saves in the background; the state's buffers may be donated as soon as this returns.

        Args:
            step: names the bundle.
            state: parts by name, each a tree of arrays.
            meta: JSON, read back by `read_meta`.
            files: small files by name, read back by `read_file`.

        Raises:
            UserError: no room for it, or the save before this one failed.
        """
        self.wait()
        bundle = self.directory / str(step)
        described = {**meta, "bundle": step, "arrays": {name: _describe(part) for name, part in state.items()}}
        try:
            if is_main():
                self._make(bundle, state, {**files, META: json.dumps(described, indent=1).encode()}, INTACT)
            barrier()
            self._saver = self._saver or orbax_writer(ocp.AsyncCheckpointer)
            items = {name: _save_item(named_leaves(part)) for name, part in state.items()}
            self._saver.save(bundle / "state", args=ocp.args.Composite(**items))
        except (OSError, ValueError) as error:
            self._abandon(bundle)
            raise explain(error, step, self.directory) from error
        self._sealer = threading.Thread(target=self._seal, args=(step, bundle, take_turn()), name="seal-checkpoint")
        self._sealer.start()

    def save_streamed(
        self, step: int, source: Source, meta: dict[str, Any], files: dict[str, bytes], advance: Callable[[int], None]
    ) -> None:
        """Saves like `save`, but waits for it, and the host holds a few blocks instead of the whole state.

        Args:
            step: names the bundle.
            source: of the state; each process reads a share of it.
            meta: JSON, read back by `read_meta`.
            files: small files by name, read back by `read_file`.
            advance: told of every block's bytes.

        Raises:
            UserError: no room for it.
            OSError: it could not be written.
        """
        self.wait()
        bundle = self.directory / str(step)
        arrays = {name: _describe(part) for name, part in source.parts.items()}
        written = {**files, META: json.dumps({**meta, "bundle": step, "arrays": arrays}, indent=1).encode()}
        try:
            fill(bundle / "state", source, lambda: self._make(bundle, source.parts, written, ANEW), advance)
            hashing(lambda digests: write_manifest(bundle, digests))
        except (OSError, ValueError) as error:
            self._abandon(bundle)
            number = system_error(error)
            raise (error if number is None else OSError(number, os.strerror(number))) from error
        hashing(lambda digests: self._retain(step, digests))

    def _make(self, bundle: Path, state: Mapping[str, PyTree], files: dict[str, bytes], then: str) -> None:
        """Makes a bundle that lacks only the arrays and the manifest; `then` is to be done when there is room."""
        self.directory.mkdir(parents=True, exist_ok=True)
        needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(dict(state)))
        check_room(self.directory, needed, then)
        if bundle.exists():  # what a killed process left unfinished
            shutil.rmtree(bundle)
        bundle.mkdir()
        for name, content in files.items():
            write_whole(bundle / name, content)

    def wait(self) -> None:
        """Waits until the last save is finished and sealed.

        Raises:
            UserError: it failed; the bundles before it are intact and the next save starts anew.
        """
        if self._sealer is not None:
            self._sealer.join()
            self._sealer = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def latest(self) -> int | None:
        """Finds the newest bundle that is as it was written, and names those passed over.

        Returns:
            Its step; None when no save was ever finished here.

        Raises:
            UserError: there are finished bundles, but all are damaged.
        """
        return hashing(self._latest)

    def _latest(self, digests: Digests) -> int | None:
        ours = finished = 0
        for step in reversed(self.steps()):
            bundle = self.directory / str(step)
            damage = self._find_damage(step, digests)
            if damage is None:
                return step
            self.warn(f"warning: checkpoint {bundle} is passed over: {damage}")
            self._damaged.add(step)
            ours += (bundle / META).exists()
            finished += (bundle / MANIFEST).exists()
        if finished or ours > 1:  # a run that was killed in its first save leaves one unfinished bundle
            raise UserError(
                f"every checkpoint in {self.directory} is damaged: restore one from a copy, or choose another run_dir"
            )
        return None

    def find_damage(self, step: int) -> str | None:
        """Says what is wrong with a bundle, in every process; None when it is as it was written."""
        return hashing(lambda digests: self._find_damage(step, digests))

    def _find_damage(self, step: int, digests: Digests) -> str | None:
        damage = find_damage(self.directory / str(step), digests)
        # The first versions did not write it.
        if damage is None and (written := self.read_meta(step).get("bundle", step)) != step:
            return f"it is the checkpoint of step {written} under another name"
        return damage

    def read_meta(self, step: int) -> dict[str, Any]:
        """Reads what `save` was given as meta."""
        return json.loads(self.read_file(step, META))

    def read_file(self, step: int, name: str) -> bytes:
        """Reads one of the files that `save` was given; `UserError` in a process that does not see it."""
        try:
            return (self.directory / str(step) / name).read_bytes()
        except FileNotFoundError as error:
            raise UserError(
                f"{error.filename} is missing: checkpoints must lie on storage that all processes share, and a run "
                "that goes on removes old ones: try again, or raise its checkpoint.keep"
            ) from None

    def read_record(self, step: int) -> DocumentRecord | None:
        """Reads what the model was trained on; None: it is not known, of an import say."""
        if "documents" not in self.read_meta(step):
            return None
        return DocumentRecord.read(self.read_file(step, RECORD))

    def restore(self, step: int, abstract: Parts, advance: Callable[[int], None] | None = None) -> Parts:
        """Restores the named parts of a state onto any devices.

        Args:
            step: a bundle that `latest` or `find_checkpoint` has found good.
            abstract: parts by name, each a tree of `jax.ShapeDtypeStruct` with shardings; parts that are not named
                are not read.
            advance: if given, the host holds a few blocks instead of whole arrays; told of every block's bytes.

        Raises:
            UserError: an array is missing, left over, or has another shape or type.
        """
        self.stored(step, abstract)
        bundle = self.directory / str(step)
        named = {name: named_leaves(part) for name, part in abstract.items()}
        if advance is None:
            items = {name: ocp.args.StandardRestore(part) for name, part in named.items()}
            try:
                with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
                    restored: Any = reader.restore(bundle / "state", args=ocp.args.Composite(**items))
            except (FileNotFoundError, KeyError):  # what the meta file names was there
                raise UserError(
                    f"{bundle} lost files while it was read, as a run that goes on removes old checkpoints: try again, "
                    "or raise its checkpoint.keep"
                ) from None
        else:
            restored = {name: read_arrays(bundle / "state" / name, part, advance) for name, part in named.items()}
        parts = {
            name: jax.tree.unflatten(jax.tree.structure(part), [restored[name][key] for key in named_leaves(part)])
            for name, part in abstract.items()
        }
        return cast(Parts, parts)

    def stored(self, step: int, abstract: Mapping[str, PyTree]) -> StoredArrays:
        """Opens the named parts of a state where they lie; see `restore`.

        Raises:
            UserError: an array is missing, left over, or has another shape or type.
        """
        stored = self.read_meta(step)["arrays"]
        bundle = self.directory / str(step)
        for name, part in abstract.items():
            check_fits(bundle, name, stored.get(name, {}), part)
        return StoredArrays(bundle, {name: stored[name] for name in abstract})

    def __exit__(self, _: object, error: object, __: object) -> None:
        try:
            self.wait()
        except UserError as failure:
            if error is None:
                raise
            self.warn(f"warning: {failure}")  # the error under way is the one to raise

    def _seal(self, step: int, bundle: Path, turn: int) -> None:
        """Runs in the background: waits for Orbax, writes the manifest, removes what is no longer kept."""
        try:
            assert self._saver is not None
            self._saver.wait_until_finished()
            hashing(lambda digests: self._seal_now(step, bundle, digests), turn)
        except Exception as error:  # raised by the next `wait`, in the thread of the loop
            self._abandon(bundle)
            self._error = explain(error, step, self.directory)

    def _seal_now(self, step: int, bundle: Path, digests: Digests) -> None:
        write_manifest(bundle, digests)
        self._retain(step, digests)

    def _retain(self, newest: int, digests: Digests) -> None:
        """Removes old bundles and unfinished ones of ours, once the newest was read back and found good.

        A directory without our meta file is not ours.
        """
        ours = [step for step in self.steps() if (self.directory / str(step) / META).exists()]
        self._damaged.discard(newest)
        sealed = [step for step in ours if (self.directory / str(step) / MANIFEST).exists() and step <= newest]
        finished = [step for step in sealed if step not in self._damaged]
        kept = set(finished[-self.config.keep :])
        if self.config.keep_every:
            kept |= {step for step in finished if step % self.config.keep_every == 0}
        removed = [step for step in ours if step not in kept and step <= newest]
        if removed and (damage := self._find_damage(newest, digests)) is not None:
            raise UserError(
                f"checkpoint {newest} in {self.directory} reads back damaged: {damage}; look at the disk and start the "
                "same command again, the earlier checkpoints are intact"
            )
        for step in removed:
            bundle = self.directory / str(step)
            meta = (bundle / META).read_bytes()
            try:
                (bundle / MANIFEST).unlink(missing_ok=True)  # a half-removed bundle must not look like a damaged one
                shutil.rmtree(bundle)
            except OSError as error:
                # On NFS a file that somebody reads stays, under another name; the next save tries again.
                self.warn(f"warning: the old checkpoint {bundle} could not be removed: {error.strerror}")
                write_whole(bundle / META, meta)  # by which it knows that this is ours

    def _abandon(self, bundle: Path) -> None:
        """Removes a failed bundle and the saver with it: Orbax would raise its error again and save nothing."""
        if is_main():
            shutil.rmtree(bundle, ignore_errors=True)
        self._saver = None


def find_checkpoint(path: Path, warn: Callable[[str], None] = print) -> tuple[Checkpoints, int]:
    """Finds what a person means by a checkpoint.

    Args:
        path: a run directory, its `checkpoints` directory, or one bundle in it.
        warn: told of every damaged bundle that is passed over.

    Returns:
        The checkpoints and the step to use: the named bundle, or the newest good one.

    Raises:
        UserError: there is none, or the named one is damaged or being written.
    """
    directory, step = hashing(lambda digests: _find(path, warn, digests))
    return Checkpoints(Path(directory), CheckpointConfig(), warn), step


def _find(path: Path, warn: Callable[[str], None], digests: Digests) -> tuple[str, int]:
    config, begun = CheckpointConfig(), False
    if (path / META).exists() and path.name.isdecimal():
        checkpoints = Checkpoints(path.parent, config, warn)
        damage = checkpoints._find_damage(int(path.name), digests)
        if damage:
            raise UserError(f"the checkpoint {path} cannot be used: {damage}; name another one")
        return str(path.parent), int(path.name)
    for directory in (path / "checkpoints", path):
        if directory.is_dir():
            checkpoints = Checkpoints(directory, config, warn)
            step = checkpoints._latest(digests)
            if step is not None:
                return str(directory), step
            begun |= bool(checkpoints.steps())
    raise NoCheckpointError(path, begun=begun)


def _save_item(leaves: dict[str, Any]) -> ocp.args.StandardSave:
    return ocp.args.StandardSave(leaves, save_args={name: save_args(leaf) for name, leaf in leaves.items()})


def _describe(tree: Any) -> dict[str, list[Any]]:
    return {name: [list(leaf.shape), str(np.dtype(leaf.dtype))] for name, leaf in named_leaves(tree).items()}


def check_fits(bundle: Path, part: str, stored: dict[str, list[Any]], tree: PyTree) -> None:
    """Raises `UserError` where a part of a bundle does not hold the arrays of a tree: names, shapes, types."""
    wanted = _describe(tree)
    for name in sorted(stored.keys() | wanted.keys()):
        have, want = stored.get(name), wanted.get(name)
        if have != want:
            say = lambda fact: f"{fact[1]} {fact[0]}" if fact else "absent"  # noqa: E731
            raise UserError(
                f"the checkpoint {bundle} does not fit the configuration: {part}/{name} is {say(have)} there and "
                f"{say(want)} here; use the configuration that it was trained with"
            )
