"""Chunked and cached row access."""

import numpy as np
import pytest

from mmfusion.data import rows as row_sequences
from mmfusion.data.sources import PairedRows


class RecordingRows:
    """Rows that record each read and its indices."""

    def __init__(self, count):
        self.count, self.reads = count, []

    def __len__(self):
        return self.count

    def __getitem__(self, row):
        self.reads.append([row])
        return {"number": row, "text": b"x" * row}

    def __getitems__(self, rows):
        self.reads.append(rows)
        return [{"number": row, "text": b"x" * row} for row in rows]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(row_sequences, "ROWS", 4)


def test_cached_rows_are_read_once_in_three_passes():
    stored = RecordingRows(11)
    rows = row_sequences.CachedRows(stored)
    for _ in range(3):
        assert [row["number"] for row in rows] == [*range(11)]
    assert stored.reads == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert rows[10]["number"] == rows[-1]["number"] == 10
    with pytest.raises(IndexError):
        rows[11]


def test_cached_rows_limit_their_bytes(monkeypatch):
    monkeypatch.setattr(row_sequences, "BYTES", 30)
    stored = RecordingRows(12)
    rows = row_sequences.CachedRows(stored)
    assert [row["number"] for row in rows] == [*range(12)]
    assert rows[11]["number"] == 11 and len(stored.reads) == 3  # the newest chunk is kept whatever its size
    assert rows[0]["number"] == 0 and len(stored.reads) == 4
    assert rows[3]["number"] == 3 and len(stored.reads) == 4


def test_byte_count_covers_every_kind_of_value():
    row = {"a": b"four", "b": np.zeros(2, np.float32), "c": [b"x", {"d": "yz"}], "e": np.array([[b"abc"], [b""]], "O")}
    assert row_sequences._byte_count([row, row]) == 2 * (4 + 8 + 3 + 3)
    assert row_sequences._byte_count(np.array(b"alone", object)) == 5


def test_iterate_reads_indices_in_chunks_or_singly():
    indices = np.array([7, 0, 7, 3, 9])
    stored = RecordingRows(10)
    assert [row["number"] for row in row_sequences.iterate(stored, indices)] == indices.tolist()
    assert stored.reads == [[7, 0, 7, 3], [9]]
    assert list(row_sequences.iterate("abcdefghij", indices)) == list("hahdj")


def test_paired_rows_read_both_sources_in_chunks():
    first, second = RecordingRows(6), RecordingRows(3)
    pair = PairedRows(first, second, np.array([0, 1, 2, 2, 1, 0]), "other")
    rows = list(row_sequences.iterate(pair, np.arange(6)))
    assert [(row["number"], row["other/number"]) for row in rows] == [(0, 0), (1, 1), (2, 2), (3, 2), (4, 1), (5, 0)]
    assert first.reads == [[0, 1, 2, 3], [4, 5]] and second.reads == [[0, 1, 2, 2], [1, 0]]
    assert rows[4] == pair[4]
