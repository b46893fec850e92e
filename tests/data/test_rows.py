"""Rows that are read many at a time are the rows, and what fits is read once."""

import numpy as np
import pytest

from mmfusion.data import rows as row_sequences
from mmfusion.data.sources import PairedRows


class Stored:
    """Rows that say how often and how many at a time they were read."""

    def __init__(self, count):
        self.count, self.asked = count, []

    def __len__(self):
        return self.count

    def __getitem__(self, row):
        self.asked.append([row])
        return {"number": row, "text": b"x" * row}

    def __getitems__(self, rows):
        self.asked.append(rows)
        return [{"number": row, "text": b"x" * row} for row in rows]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(row_sequences, "ROWS", 4)


def test_cached_rows_are_read_once_in_three_passes():
    stored = Stored(11)
    rows = row_sequences.CachedRows(stored)
    for _ in range(3):
        assert [row["number"] for row in rows] == [*range(11)]
    assert stored.asked == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert rows[10]["number"] == rows[-1]["number"] == 10
    with pytest.raises(IndexError):
        rows[11]


def test_cached_rows_keep_a_limited_number_of_bytes(monkeypatch):
    monkeypatch.setattr(row_sequences, "BYTES", 30)
    stored = Stored(12)
    rows = row_sequences.CachedRows(stored)
    assert [row["number"] for row in rows] == [*range(12)]
    assert rows[11]["number"] == 11 and len(stored.asked) == 3  # the newest, however large
    assert rows[0]["number"] == 0 and len(stored.asked) == 4
    assert rows[3]["number"] == 3 and len(stored.asked) == 4


def test_byte_count_covers_every_kind_of_value():
    row = {"a": b"four", "b": np.zeros(2, np.float32), "c": [b"x", {"d": "yz"}], "e": np.array([[b"abc"], [b""]], "O")}
    assert row_sequences._byte_count([row, row]) == 2 * (4 + 8 + 3 + 3)
    assert row_sequences._byte_count(np.array(b"alone", object)) == 5


def test_iterate_reads_any_indices_in_chunks_or_one_at_a_time():
    numbers = np.array([7, 0, 7, 3, 9])
    stored = Stored(10)
    assert [row["number"] for row in row_sequences.iterate(stored, numbers)] == numbers.tolist()
    assert stored.asked == [[7, 0, 7, 3], [9]]
    assert list(row_sequences.iterate("abcdefghij", numbers)) == list("hahdj")


def test_paired_rows_read_both_in_chunks():
    first, second = Stored(6), Stored(3)
    pair = PairedRows(first, second, np.array([0, 1, 2, 2, 1, 0]), "other")
    rows = list(row_sequences.iterate(pair, np.arange(6)))
    assert [(row["number"], row["other/number"]) for row in rows] == [(0, 0), (1, 1), (2, 2), (3, 2), (4, 1), (5, 0)]
    assert first.asked == [[0, 1, 2, 3], [4, 5]] and second.asked == [[0, 1, 2, 2], [1, 0]]
    assert rows[4] == pair[4]
