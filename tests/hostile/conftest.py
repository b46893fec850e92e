import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Returns the file that the module `planted_code`, which is on the path, writes as it is imported."""
    folder, mark = tmp_path / "code", tmp_path / "imported"
    folder.mkdir()
    (folder / "planted_code.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(str(folder))
    yield mark
    sys.modules.pop("planted_code", None)
