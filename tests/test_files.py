import json

import numpy as np
import pytest

from mmfusion import files


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
