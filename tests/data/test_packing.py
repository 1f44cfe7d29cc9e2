"""Packing: against an obvious loop, and every token a target once."""

from collections import Counter

import numpy as np
from hypothesis import example, given
from hypothesis.strategies import integers, lists

from mixtral_jax.data.packing import num_rows, pack_rows

LENGTHS = lists(integers(2, 60), min_size=1, max_size=12)


def slow_rows(documents, seq_len):
    """One dictionary of lists a row, token by token."""
    stream = [(index, place, token) for index in range(documents.num_documents)
              for place, token in enumerate(documents.tokens(index).tolist())]  # fmt: skip
    for start in range(0, max(len(stream) - 1, 0), seq_len):
        window = stream[start : start + seq_len + 1]
        row = {"tokens": [], "targets": [], "segment_ids": [], "positions": [], "loss_mask": []}
        segment = position = 0
        for column in range(seq_len):
            here = window[column] if column < len(window) else None
            after = window[column + 1] if column + 1 < len(window) else None
            if here is not None:
                new = column == 0 or here[0] != window[column - 1][0]
                segment, position = (segment + 1, 0) if new else (segment, position + 1)
            row["tokens"].append(here[2] if here else 0)
            row["targets"].append(after[2] if after else 0)
            row["segment_ids"].append(segment if here else 0)
            row["positions"].append(position if here else 0)
            row["loss_mask"].append(here is not None and after is not None and here[0] == after[0])
        yield row


@given(LENGTHS, integers(1, 70))
@example([8, 8, 8, 8], 8)
@example([9, 9], 8)
@example([2], 1)
@example([100, 2, 2, 2, 31], 64)
def test_rows_equal_an_obvious_loop(make_documents, lengths, seq_len):
    documents = make_documents(lengths)
    expected = list(slow_rows(documents, seq_len))
    assert num_rows(documents, seq_len) == len(expected)
    order = np.random.default_rng(0).permutation(len(expected))
    batch = pack_rows(documents, order, seq_len)
    for place, row in enumerate(order):
        for name, values in expected[row].items():
            np.testing.assert_array_equal(getattr(batch, name)[place], values, err_msg=name)
    kinds = {name: array.dtype for name, array in vars(batch).items() if array is not None}
    assert kinds == {name: np.bool_ if name == "loss_mask" else np.int32 for name in expected[0]}


@given(LENGTHS, integers(1, 70))
def test_every_token_but_the_first_of_a_document_is_a_target_once(make_documents, lengths, seq_len):
    documents = make_documents(lengths)
    batch = pack_rows(documents, np.arange(num_rows(documents, seq_len)), seq_len)
    counts = Counter(batch.targets[batch.loss_mask].tolist())
    assert counts == Counter(
        token for index in range(documents.num_documents) for token in documents.tokens(index)[1:].tolist()
    )


def test_no_documents_are_no_rows(make_documents):
    assert num_rows(make_documents([]), 8) == 0
