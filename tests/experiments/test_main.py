"""The console command, which dispatches to the modules of the commands."""

import tomllib

import pytest

from experiments import __main__ as console
from tests.processes import ROOT


def test_console_lists_every_command_with_a_summary(capsys):
    console.main([])
    text = capsys.readouterr().out
    files = (ROOT / "experiments").glob("*.py")
    commands = {path.stem for path in files if '__name__ == "__main__"' in path.read_text()} - {"__main__"}
    assert commands == {*console.COMMANDS, *console.OLD_NAMES} - {"benchmark"}
    for name in console.COMMANDS:
        summary = console.summary(name)
        assert f"  {name} " in text and summary in text
        assert summary.endswith((".", "`.")) and len(summary) < 110


def test_console_suggests_the_nearest_command(capsys):
    with pytest.raises(SystemExit) as caught:
        console.main(["trian", "--workdir=x"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: no command 'trian'; did you mean train?\n"


def test_console_is_an_entry_point_of_the_package():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"mmfusion": "experiments.__main__:main"}


def test_console_dispatches_flags_and_exit_status(command, tmp_path):
    process = command("experiments", "evaluate", f"--workdir={tmp_path}")
    assert process.returncode == 2 and f"error: {tmp_path}: " in process.stderr
    process = command("experiments", "train", "--help")
    assert process.returncode == 0
    assert (
        "--workdir" in process.stdout and "Trains a config" in process.stdout and "--config.steps=100" in process.stdout
    )


@pytest.mark.parametrize("old", ["fusions", "known_answer", "replay", "rerun"])
def test_old_command_names_work_with_a_warning(old, command):
    process = command(f"experiments.{old}", "--nothing=1")
    assert process.returncode == 2
    assert f"experiments.{old} is now called experiments." in process.stderr and "nothing" in process.stderr
