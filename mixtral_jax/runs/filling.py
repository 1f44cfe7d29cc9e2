"""Fills a checkpoint with the numbers of a source, block by block, in threads and processes.

Orbax writes arrays of one byte, and tensorstore, on which it is built, puts the true ones in their places. Of several
processes each writes files of its own beside them, and in the end process 0 enters what they hold with the others.
"""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from mixtral_jax.distributed.processes import barrier, is_main, number, take_turn, with_all
from mixtral_jax.runs.sources import Source
from mixtral_jax.runs.streaming import array_spec, blocks_of, chunk_shape, database_spec, orbax_writer, place

THREADS = 3  # of a process; each holds a block


def fill(directory: Path, source: Source, begin: Callable[[], None], advance: Callable[[int], None]) -> None:
    """Writes what Orbax would write, but not compressed; all processes call it, and each writes its share.

    Args:
        directory: made by this.
        source: of the arrays.
        begin: called by process 0 before all else.
        advance: told of every block's bytes that this process has written.

    Raises:
        OSError, ValueError: as Orbax and tensorstore do.
    """
    if is_main():
        begin()
    barrier()
    items = {
        part: ocp.args.StandardSave({name: np.zeros(1, np.uint8) for name in leaves})
        for part, leaves in source.parts.items()
    }
    with orbax_writer(ocp.Checkpointer) as writer:
        writer.save(directory, args=ocp.args.Composite(**items))
    stores: dict[tuple[str, str], ts.TensorStore] = {}
    creating = threading.Lock()

    def store_of(part: str, name: str) -> ts.TensorStore:
        with creating:
            if (part, name) not in stores:
                mine = directory / part if is_main() else _share(directory / part, number())
                stores[part, name] = _create(mine, name, source.parts[part][name])
            return stores[part, name]

    def write(item: str) -> str:
        part, name, *at = json.loads(item)
        start, shape = map(tuple, at)
        block = source.block(part, name, start, shape)
        store_of(part, name)[place(start, shape)].write(block, can_reference_source_data_indefinitely=True).result()
        advance(block.nbytes)
        return ""

    def write_all(ask: Callable[[list[str]], list[str]]) -> None:
        blocks = []
        for part, leaves in source.parts.items():
            for name, leaf in leaves.items():
                store_of(part, name)
                blocks += [json.dumps([part, name, *block]) for block in blocks_of(leaf.shape, leaf.dtype)]
        ask(blocks)
        for part in source.parts:
            _gather(directory / part)

    with_all(take_turn(), write, write_all, THREADS)


def _create(directory: Path, name: str, leaf: jax.Array | jax.ShapeDtypeStruct) -> ts.TensorStore:
    """Puts an array in another one's place; weights hardly compress, and zstd takes longer than all the rest."""
    layout = ts.ChunkLayout(chunk_shape=chunk_shape(leaf.shape, leaf.dtype))
    # The manifest's writer sees to it that all is on the disk.
    uncompressed: dict[str, Any] = {"metadata": {"compressor": None}, "context": {"file_io_sync": False}}
    return ts.open(
        array_spec(directory, name) | uncompressed,
        create=True, delete_existing=True, dtype=leaf.dtype, shape=leaf.shape, chunk_layout=layout,
    ).result()  # fmt: skip


def _share(directory: Path, process: int) -> Path:
    """Where a process other than the first one writes; it stays, for the whole refers to what is in there."""
    return directory / f"written_by.{process}"


def _gather(directory: Path) -> None:
    """Enters what other processes have written with what is there."""
    context = ts.Context()  # copying needs the same one of both
    whole = ts.KvStore.open(database_spec(directory), context=context).result()
    for share in sorted(directory.glob("written_by.*")):
        with ts.Transaction(atomic=True) as transaction:
            theirs = ts.KvStore.open(database_spec(share), context=context).result()
            theirs.experimental_copy_range_to(whole.with_transaction(transaction)).result()
