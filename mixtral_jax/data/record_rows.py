"""Rows of whole records: chats, or pairs of them, put where they fit best; attention never goes from one to another."""

import bisect
import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Int64

from mixtral_jax.config import ObjectiveConfig
from mixtral_jax.data.answers import ANSWER, WORSE
from mixtral_jax.data.batch import HostBatch, padding
from mixtral_jax.data.row_order import shuffled_rows
from mixtral_jax.data.splits import Documents

JUDGED = ObjectiveConfig(name="preference")
Places = Int64[np.ndarray, "_"]  # of tokens in the source


class RecordRows:
    """The rows of one source. A conversation takes a place less than it has tokens, since its end predicts nothing.

    A pair lies in one row. Segments are numbered so that a loss can find what belongs together: conversation u of a row
    is segment u + 1; of judged answers, the better one to prompt u is segment 2u + 1 and the worse one 2u + 2.
    """

    def __init__(
        self,
        documents: Documents,
        seq_len: int,
        too_long: Literal["drop", "cut"] = "drop",
        *,
        mismatched: bool = False,
    ):
        """Lays out the rows; only the marks of pairs, and what is cut, are read."""
        assert documents.marks is not None
        self._documents, self._marks = documents, documents.marks
        self._seq_len = seq_len
        self.format = documents.format
        self._mismatched = mismatched
        self._judged = documents.format in ("pairs", "labels")
        self.dropped = self.cut = 0
        units: list[list[tuple[int, int]]] = []  # of each record, its conversations: place and tokens
        for index in range(documents.num_documents):
            parts = self._conversations(index)
            if sum(length - 1 for _, length in parts) > seq_len:
                parts = self._shortened(parts) if too_long == "cut" else []
                self.cut += bool(parts)
                self.dropped += not parts
            if parts:
                units.append(parts)
        sizes = [sum(length - 1 for _, length in parts) for parts in units]
        self._rows = [[units[index] for index in row] for row in best_fit(sizes, seq_len)]
        self._row_tokens = np.array([sum(n - 1 for unit in row for _, n in unit) for row in self._rows], np.int64)
        self.count = len(self._rows)
        self.copies = 1
        self.empty = self.count * seq_len - int(self._row_tokens.sum())
        self.targets = sum(
            int(np.count_nonzero(self._marks[place + 1 : place + length] & ANSWER))
            for parts in units
            for place, length in parts
        )  # fmt: skip

    def _conversations(self, index: int) -> list[tuple[int, int]]:
        documents = self._documents
        start, length = int(documents.starts[index]), int(documents.offsets[index + 1] - documents.offsets[index])
        if documents.format != "pairs":
            return [(start, length)]
        better = int(np.count_nonzero(self._marks[start : start + length] & WORSE == 0))
        return [(start, better), (start + better, length - better)]

    def _shortened(self, parts: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Cuts all of a record to equal shares of a row; nothing, if one loses its answer or two are alike."""
        room = self._seq_len // len(parts)
        parts = [(place, min(length, room + 1)) for place, length in parts]
        kept = all(np.any(self._marks[place : place + length] & ANSWER) for place, length in parts)
        tokens = {self._documents.buffer[place : place + length].tobytes() for place, length in parts}
        return parts if kept and len(tokens) == len(parts) else []

    def pack(self, rows: Int64[np.ndarray, "rows"]) -> HostBatch:
        """Builds rows as `pack_rows` does; targets that count are the answers' tokens, with the EOS that ends them."""
        batch = self._pack(rows)
        return dataclasses.replace(batch, mismatched=self._pack(rows, mismatched=True)) if self._mismatched else batch

    def _pack(self, rows: Int64[np.ndarray, "rows"], *, mismatched: bool = False) -> HostBatch:
        documents = self._documents
        batch = padding(len(rows), self._seq_len, JUDGED if self._judged else None)
        for row, number in enumerate(rows):
            start = 0
            for conversation, places in enumerate(self.conversations(int(number), mismatched=mismatched)):
                here, tokens = slice(start, start + len(places) - 1), documents.buffer[places].astype(np.int32)
                worse = int(self._marks[places[0]] & WORSE > 0)
                unit = conversation // (2 if self.format == "pairs" else 1)
                batch.tokens[row, here], batch.targets[row, here] = tokens[:-1], tokens[1:]
                batch.segment_ids[row, here] = 2 * unit + 1 + worse if self._judged else unit + 1
                batch.positions[row, here] = np.arange(len(places) - 1)
                batch.loss_mask[row, here] = self._marks[places[1:]] & ANSWER > 0
                if batch.reference is not None and documents.reference is not None:
                    batch.reference[row, here] = documents.reference[int(mismatched), places[1:]]
                start += len(places) - 1
        return batch

    def tokens_of(self, dealt: int, seed: int, source: int) -> int:
        """Counts the tokens of the first so many rows of the source that a run takes, over all epochs."""
        epochs, begun = divmod(dealt, self.count)
        order = shuffled_rows(np.arange(begun) + epochs * self.count, self.count, seed, source)
        return epochs * int(self._row_tokens.sum()) + int(self._row_tokens[order].sum())

    def conversations(self, row: int, *, mismatched: bool = False) -> list[Places]:
        """Finds where in the source the tokens of a row's conversations lie, in the order of the row.

        Args:
            row: its number.
            mismatched: every prompt gets the answer to the one before it, the first of all the last answer of all. One
                that comes from the row before is cut to the room that there is.
        """
        units = self._rows[row]
        if not mismatched:
            return [np.arange(place, place + length) for parts in units for place, length in parts]
        halves = [[self._halves(*part) for part in parts] for parts in (self._rows[row - 1][-1], *units)]
        answers = [[answer for _, answer in parts] for parts in halves]
        room = self._seq_len - int(self._row_tokens[row])
        for place, (comes, leaves) in enumerate(zip(answers[0], answers[-1], strict=True)):
            answers[0][place] = comes[: len(leaves) + room]
            room += len(leaves) - len(answers[0][place])
        return [
            np.append(prompt, answer)
            for parts, others in zip(halves[1:], answers[:-1], strict=True)
            for (prompt, _), answer in zip(parts, others, strict=True)
        ]

    def _halves(self, place: int, length: int) -> list[Places]:
        """Where the prompt and the answer to judge lie."""
        begin = int(np.argmax(self._marks[place : place + length] & ANSWER > 0))
        return np.split(np.arange(place, place + length), [begin])


def best_fit(sizes: list[int], room: int) -> list[list[int]]:
    """Puts things into boxes, large ones first, each where it leaves the least room.

    Args:
        sizes: of the things, none larger than `room`.
        room: of a box.

    Returns:
        The numbers of the things in each box.

    Source: best-fit decreasing; for packing sequences, arXiv 2107.02027 and 2404.10830.
    """
    boxes: list[list[int]] = []
    open_boxes: dict[int, list[int]] = {}  # by the room that is left
    rooms: list[int] = []  # those that occur, ascending
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        place = bisect.bisect_left(rooms, sizes[index])
        if place == len(rooms):
            box, left = len(boxes), room
            boxes.append([])
        else:
            left = rooms[place]
            box = open_boxes[left].pop()
            if not open_boxes[left]:
                del open_boxes[left], rooms[place]
        boxes[box].append(index)
        left -= sizes[index]
        if left not in open_boxes:
            bisect.insort(rooms, left)
            open_boxes[left] = []
        open_boxes[left].append(box)
    return boxes
