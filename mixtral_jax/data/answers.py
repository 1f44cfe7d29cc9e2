"""Documents in tokens, records of chats and of judged answers among them: how they are marked, and in which format."""

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Integer, UInt8

from mixtral_jax.config import SourceConfig, UserError
from mixtral_jax.data.chat_records import CHAT_FORMATS, recognize
from mixtral_jax.data.sources import iter_records

Kind = Literal["pretrain", "sft", "preference"]  # as `objective.name`: what a source holds
ANSWER = 1  # bit of a mark: the token is learnt
WORSE = 2  # bit of a mark: the token belongs to a conversation whose answer is the rejected one, or was found bad
JUDGED_FORMATS = ("pairs", "labels")


class Piece(NamedTuple):
    """Some documents, one after the other; of judged answers, the better one comes before the worse in a document."""

    tokens: Integer[np.ndarray, " tokens"]
    lengths: list[int]  # tokens of each
    sizes: list[int]  # bytes of each
    marks: UInt8[np.ndarray, " tokens"] | None = None  # says whose each token is; None: texts


def format_of(source: SourceConfig, kind: Kind) -> str:
    """Names the format of a source's records: the one it is said to have, or that of its first record.

    Raises:
        UserError: none of those of its kind.
    """
    known = tuple(CHAT_FORMATS) if kind == "sft" else JUDGED_FORMATS
    if source.format in known:
        return source.format
    if source.format != "auto":
        raise UserError(
            f"source '{source.name}' has the format '{source.format}': with objective.name={kind} there are auto, "
            f"{', '.join(known)}"
        )
    where, record = next(iter_records(source), ("", None))
    if record is None:
        raise UserError(f"source '{source.name}' holds no record: name files that do")
    judged = "pairs" if {"chosen", "rejected"} <= record.keys() else "labels" if "label" in record else None
    if found := recognize(record) if kind == "sft" and not judged else judged if kind == "preference" else None:
        return found
    raise UserError(
        f"{where} has none of the formats of objective.name={kind} ({', '.join(known)}), but the keys "
        f"{', '.join(record) or 'none'}: convert the records, or choose another objective.name"
    )
