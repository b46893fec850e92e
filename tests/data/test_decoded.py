"""Decoded rows on disk: equal to those decoded by the run itself, resumed, shared, and never stale."""

import json
import os
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from mmfusion import config as configs
from mmfusion.config import defaults
from mmfusion.data import (
    array_files,
    cache,
    dataset,
    decode_worker,
    decoded,
    decoded_files,
    fitting,
    opening,
    sources,
    table_dataset,
)
from mmfusion.data.split import Split
from tests import planted
from tests.errors import rejects

ROWS = 90


@pytest.fixture
def table(tmp_path):
    """A table of 90 rows with an image, a recording, a text and a label; two of its files are damaged."""
    folder = tmp_path / "data"
    folder.mkdir()
    lines = []
    for i in range(ROWS):
        (folder / f"{i}.png").write_bytes(planted.png(i))
        (folder / f"{i}.wav").write_bytes(planted.wav(0.1 + i / 50))
        lines.append({"photo": f"{i}.png", "sound": f"{i}.wav", "note": f"row {i} of them", "label": f"c{i % 2}"})
    (folder / "7.png").write_bytes(b"no image")
    (folder / "9.wav").unlink()
    path = folder / "table.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture(autouse=True)
def all_kept(monkeypatch):
    """Everything is kept, in chunks of eight rows, decoded by this process alone."""
    monkeypatch.setattr(decoded, "SECONDS", 0)
    monkeypatch.setattr(cache, "SECONDS", 0)
    monkeypatch.setattr(decoded_files, "ROWS", 8)
    use_processes(monkeypatch, 1)


def use_processes(monkeypatch, count):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(count)))


def config_of(table, folder, **changes):
    config = defaults.get_config()
    with config.unlocked():
        config.data.name, config.data.cache, config.data.max_bad_fraction = str(table), str(folder), 0.5
        config.data.modalities.photo = defaults.modality("image", "photo", size=(8, 8))
        config.data.modalities.sound = defaults.modality("audio", "sound", rate=1000, seconds=0.1)
        config.data.modalities.note = defaults.modality("text", "note", length=6)
        config.data.targets.label = defaults.target("classification", "label")
        for name, value in changes.items():
            *path, key = name.split("__")
            section = config.data
            for part in path:
                section = section[part]
            section[key] = value
    return config


def load(table, folder, **changes):
    return dataset.load(configs.read(config_of(table, folder, **changes)).data, seed=0)


def assert_equal(found, expected):
    assert (found.notes, found.rejected, found.saved()) == (expected.notes, expected.rejected, expected.saved())
    for name, split in expected.splits.items():
        assert found.splits[name].bad == split.bad
        positions = np.append(np.arange(len(split))[::-1], -1)
        for one, other in zip(
            *(jax.tree.leaves(s.splits[name].take(positions)) for s in (found, expected)), strict=True
        ):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)


def chunks_of(data):
    return sum(-(-len(split) // 8) for split in data.splits.values())


def is_mapped(split):
    array = split.arrays.inputs["photo"]
    return isinstance(array.base, np.memmap)


def no_decoding(monkeypatch):
    """Makes every function that reads rows fail."""

    def fail(*_, **__):
        raise AssertionError("rows are read again")

    monkeypatch.setattr(Split, "decode", fail)
    monkeypatch.setattr(opening, "split_ids", fail)
    monkeypatch.setattr(fitting, "_states_and_scales", fail)


@pytest.mark.process
def test_kept_rows_are_bitwise_those_of_a_run_without_cache(table, tmp_path, monkeypatch):
    expected = load(table, "off", missing=0.3)
    assert set(expected.splits["train"].bad) | set(expected.splits["test"].bad) | set(
        expected.splits["valid"].bad
    ) == {7, 9}  # fmt: skip
    assert not any(is_mapped(split) for split in expected.splits.values())
    chunks, mine, original = chunks_of(expected), [], decoded_files.Chunk.decode
    monkeypatch.setattr(decoded_files.Chunk, "decode", lambda chunk: (mine.append(chunk.first), original(chunk)))
    for processes in (1, 3):
        folder = tmp_path / f"cache{processes}"
        use_processes(monkeypatch, processes)
        mine.clear()
        found = load(table, folder, missing=0.3)
        assert len(mine) == chunks if processes == 1 else len(mine) <= chunks - 2  # each worker had one or more
        assert all(is_mapped(split) for split in found.splits.values())
        assert_equal(found, expected)
    no_decoding(monkeypatch)
    assert_equal(load(table, folder, missing=0.3), expected)


def test_kept_rows_of_a_prepared_dataset_are_bitwise_the_same(data_dir, tmp_path, monkeypatch):
    def shapes(folder):
        config = planted.config("image+text", data__name="shapes/match", data__dir=data_dir, data__cache=str(folder))
        with config.unlocked():
            config.data.train, config.data.test = "train[:200]", "test[:50]"
            config.data.modalities.text.feature = "sentence"
        return dataset.load(configs.read(config).data, seed=0)

    expected = shapes("off")
    assert_equal(shapes(tmp_path / "cache"), expected)
    no_decoding(monkeypatch)
    assert_equal(shapes(tmp_path / "cache"), expected)


def test_kept_rows_larger_than_memory_are_mapped(table, tmp_path):
    assert all(is_mapped(split) for split in load(table, tmp_path / "cache", memory_gb=0.0).splits.values())


def test_kept_rows_follow_every_change(table, tmp_path):
    folder = tmp_path / "cache"

    def kept(**changes):
        load(table, folder, **changes)
        return {path.name for path in folder.iterdir() if path.is_dir()}

    first = kept()
    assert len(first) == 3
    assert kept(modalities__photo__augment__flip=0.5) == kept(memory_gb=1.0) == first  # they change no decoded row
    seen = first
    for changes in (
        {"modalities__photo__size": (4, 4)}, {"modalities__note__length": 5}, {"missing": 0.2},
        {"valid_fraction": 0.3}, {"targets__label__label_smoothing": 0.1},
    ):  # fmt: skip
        now = kept(**changes)
        assert seen < now, changes
        seen = now
    photo = table.parent / "20.png"
    stat = photo.stat()
    value = next(v for v in range(100, 250) if len(planted.png(v)) == stat.st_size)
    photo.write_bytes(planted.png(value))
    os.utime(photo, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert len(kept() - seen) == 3
    split = next(split for split in load(table, folder).splits.values() if 20 in split.ids)
    assert split.take(np.flatnonzero(split.ids == 20)).inputs["photo"].max() == value


def test_kept_rows_are_not_used_for_other_code_or_types_from_outside(table, tmp_path, monkeypatch):
    source = table_dataset.open_table_source(configs.read(config_of(table, "off")).data)
    assert cache.source_key(source, {"m": {"kind": "image"}})
    assert cache.source_key(source, {"m": {"kind": "points:POINT"}}) is None
    assert cache.source_key(source, {"m": {"kind": "text", "tokenizer": "gs://bucket/tokenizer.json"}}) is None
    assert cache.source_key(sources.Source([], {}, "unknown"), {}) is None
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    before = cache.source_key(source, {"m": {"kind": "text", "tokenizer": str(tokenizer)}})
    tokenizer.write_text("{} ")
    assert cache.source_key(source, {"m": {"kind": "text", "tokenizer": str(tokenizer)}}) != before
    path = cache.Cache(tmp_path).path(["a"])
    monkeypatch.setattr(cache, "code", lambda: "other")
    assert cache.Cache(tmp_path).path(["a"]) != path
    assert cache.Cache(tmp_path).path(["a", None]) is None and cache.Cache(None).path(["a"]) is None


def test_decoding_is_resumed_after_a_kill_and_damaged_chunks_are_decoded_again(table, tmp_path, monkeypatch):
    folder, expected, original = tmp_path / "cache", load(table, "off"), decoded_files.Chunk.decode
    calls = []

    def decode(chunk):
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(chunk.first)
        original(chunk)

    monkeypatch.setattr(decoded_files.Chunk, "decode", decode)
    with pytest.raises(KeyboardInterrupt):
        load(table, folder)
    parts = [part for part in folder.glob("*.part") if (part / array_files.CHUNKS).stat().st_size]
    # What a power loss may leave: a chunk whose bytes were not written, and half a line.
    lines = (parts[0] / array_files.CHUNKS).read_text().splitlines(keepends=True)
    first = json.loads(lines[0])["first"]
    array = np.load(parts[0] / "00.npy", mmap_mode="r+")
    array[first : first + 8] = 0
    array.flush()
    (parts[0] / array_files.CHUNKS).write_text("".join(lines) + lines[0][:-20])
    resumed = []
    monkeypatch.setattr(decoded_files.Chunk, "decode", lambda chunk: (resumed.append(chunk.first), original(chunk)))
    assert_equal(load(table, folder), expected)
    assert len(resumed) == chunks_of(expected) - 5 + 1
    assert not list(folder.glob("*.part"))


@pytest.mark.process
def test_decoding_waits_for_a_process_that_decodes_and_resumes_when_it_is_killed(table, tmp_path, monkeypatch):
    folder, started = tmp_path / "cache", tmp_path / "started"
    code = f"""
import os, pathlib, time
from tests.data import test_decoded as t
from mmfusion.data import cache, decoded, decoded_files
decoded.SECONDS, decoded_files.ROWS, original = 0, 8, decoded_files.Chunk.decode
os.sched_getaffinity = lambda _: {{0}}
def decode(chunk):
    original(chunk)
    pathlib.Path({str(started)!r}).touch()
    time.sleep(100)
decoded_files.Chunk.decode = decode
t.load(pathlib.Path({str(table)!r}), {str(folder)!r})
"""
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    try:
        while not started.exists():
            assert other.poll() is None
            time.sleep(0.05)
        threading.Timer(1, other.kill).start()  # while this process waits for it
        began, resumed, original = time.monotonic(), [], decoded_files.Chunk.decode
        monkeypatch.setattr(decoded_files.Chunk, "decode", lambda chunk: (resumed.append(chunk.first), original(chunk)))
        found = load(table, folder)
        assert time.monotonic() - began > 0.9
    finally:
        other.kill()
        other.wait()
    expected = load(table, "off")
    assert_equal(found, expected)
    assert len(resumed) == chunks_of(expected) - 1


@pytest.mark.process
def test_decoding_continues_without_workers_that_die(table, tmp_path, monkeypatch):
    use_processes(monkeypatch, 3)
    monkeypatch.setattr(decode_worker.sys, "executable", "/bin/true")
    assert_equal(load(table, tmp_path / "cache"), load(table, "off"))


@pytest.mark.process
def test_decoding_reports_the_first_target_that_cannot_be_read(table, tmp_path, monkeypatch):
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    for i, row in enumerate(rows):
        row["split"] = "test" if i >= 40 else "train"
    rows[55]["label"] = rows[85]["label"] = "neither"
    table.write_text("\n".join(map(json.dumps, rows)))
    for processes in (1, 3):
        use_processes(monkeypatch, processes)
        with rejects("config.data.targets", says="split 'test', row 55, target 'label'"):
            load(table, tmp_path / f"cache{processes}")


def test_decoding_goes_on_where_the_disk_is_full(table, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert_equal(load(table, tmp_path / "cache"), load(table, "off"))
    assert "data   decoded rows are not kept in" in capsys.readouterr().out
    assert not list((tmp_path / "cache").glob("*.part"))  # they would take the space that is left
    monkeypatch.undo()
    monkeypatch.setattr(decoded, "SECONDS", 0)
    monkeypatch.setattr(cache, "DISK_SHARE", 0)
    load(table, tmp_path / "cache")
    assert "GB are free" in capsys.readouterr().out


def test_rows_that_are_decoded_quickly_are_not_kept(table, tmp_path, monkeypatch):
    monkeypatch.setattr(decoded, "SECONDS", 60)
    monkeypatch.setattr(cache, "SECONDS", 60)
    assert not is_mapped(load(table, tmp_path / "cache").splits["train"])
    assert not list((tmp_path / "cache").iterdir())


def test_cache_refuses_a_folder_that_cannot_be_written(table, tmp_path):
    (tmp_path / "file").touch()
    with rejects("config.data.cache", str(tmp_path / "file"), says="cannot be written"):
        load(table, tmp_path / "file")


def test_cache_removes_its_own_entries_that_are_not_used(table, tmp_path):
    load(table, tmp_path)
    mine = sorted(path for path in tmp_path.iterdir() if path.name != "data")
    assert len(mine) == 8  # three splits, their contents, their ids, and the tokenizer
    foreign = [tmp_path / "thesis.txt", tmp_path / "abc.json"]
    for path in foreign:
        path.write_text("precious")
    old = time.time() - (cache.DAYS + 1) * 24 * 3600
    for path in [*mine[1:], *foreign]:
        os.utime(path, (old, old))
    cache.Cache(tmp_path).remove_unused()
    assert sorted(tmp_path.iterdir()) == sorted([mine[0], *foreign, table.parent])
