import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mmfusion import files
from tests.errors import rejects


def test_write_json_is_atomic(tmp_path):
    path = tmp_path / "result.json"
    files.write_json(path, {"a": np.float32(0.5), "b": (np.int64(3), float("nan")), 4: "é"})
    assert json.loads(path.read_text()) == {"a": 0.5, "b": [3, None], "4": "é"}
    with pytest.raises(TypeError):
        files.write_json(path, {"a": object()})
    assert json.loads(path.read_text())["a"] == 0.5
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_write_json_keeps_the_old_file_on_a_failing_disk(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    files.write_json(path, 1)
    monkeypatch.setattr(files.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        files.write_json(path, 2)
    assert path.read_text() == "1\n"
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_append_json_keeps_earlier_entries(tmp_path):
    path = str(tmp_path / "evaluation.json")
    for entry in ({"a": 1}, {"a": float("nan")}):
        files.append_json(path, entry)
    assert json.loads((tmp_path / "evaluation.json").read_text()) == [{"a": 1}, {"a": None}]
    files.write_json(path, {"a": 1})  # as it was written before
    files.append_json(path, {"a": 2})
    assert json.loads((tmp_path / "evaluation.json").read_text()) == [{"a": 1}, {"a": 2}]
    (tmp_path / "evaluation.json").write_text("[1")
    with rejects(path, None, says="no list"):
        files.append_json(path, {})
    assert [p.name for p in tmp_path.iterdir()] == ["evaluation.json"]


def test_append_json_of_several_processes_loses_no_entry(tmp_path):
    path = str(tmp_path / "evaluation.json")
    with ThreadPoolExecutor(4) as pool:  # a lock is of an open file, so that threads wait like processes
        list(pool.map(lambda number: files.append_json(path, number), range(20)))
    assert sorted(json.loads((tmp_path / "evaluation.json").read_text())) == [*range(20)]
