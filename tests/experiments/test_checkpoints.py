"""The command that lists, verifies, shows, compares and copies checkpoints."""

from pathlib import Path

import numpy as np
import pytest
from absl.testing import flagsaver

from experiments import checkpoints as command
from mmfusion.errors import UserError
from tests.checkpoints.test_manager import flip_bit, save_checkpoints
from tests.errors import rejects


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_checkpoints(tmp_path / "run" / "checkpoints", {1: 0.5, 2: None}).close()
    return tmp_path / "run"


@pytest.fixture
def run():
    """Returns `run("DIR", "--tree=1")`, which restores the flags afterwards."""

    def run(*args: str) -> None:
        with flagsaver.flagsaver():
            command.main(["checkpoints", *args])

    return run


def test_checkpoints_command_lists_and_verifies_each_step(folder: Path, run, capsys):
    run(str(folder))
    output = capsys.readouterr().out
    assert output.count("valid") == 2 and "0.5" in output


def test_checkpoints_command_reports_but_does_not_move_a_corrupt_step(folder: Path, run, capsys):
    (path,) = (folder / "checkpoints" / "2" / "meta").glob("metadata")
    flip_bit(path, np.random.default_rng(0))
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as caught:
        run(str(folder / "checkpoints"))
    assert caught.value.code == 1
    output = capsys.readouterr().out
    assert output.count("valid") == 1 and "damaged" in output
    assert sorted(folder.rglob("*")) == before
    with pytest.raises(UserError, match="is damaged"):
        run(str(folder), "--copy=2", f"--to={folder / 'copy'}")
    assert not (folder / "copy").exists()


def test_checkpoints_command_shows_compares_and_copies(folder: Path, run, capsys):
    run(str(folder), "--tree=1")
    output = capsys.readouterr().out
    assert "params/dense/kernel" in output and "3x2" in output and "9 values in 3 arrays" in output
    run(str(folder), "--compare=1,2")
    output = capsys.readouterr().out
    assert "2 of 3 arrays differ" in output and "params/dense/bias" not in output
    run(str(folder), "--copy=1", f"--to={folder / 'copy'}")
    assert (folder / "copy" / "meta").is_dir()


@pytest.mark.parametrize(
    ("args", "path", "value", "suggestion"),
    [
        ((), "", None, ""),
        (("--tree=3",), "step", "3", "2"),
        (("--compare=1",), "--compare", "1", ""),
        (("--copy=1",), "--to", "", ""),
    ],
)
def test_checkpoints_command_rejects_bad_input(folder: Path, run, args, path, value, suggestion):
    with rejects(path, value, suggestion, says="" if args else "one directory"):
        run(*([str(folder)] if args else []), *args)
    with rejects(folder.parent / "none", None, says="no checkpoints"):
        run(str(folder.parent / "none"))
