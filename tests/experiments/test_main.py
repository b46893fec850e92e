"""The console command, which dispatches to the modules of the commands."""

import tomllib

import pytest

from experiments import __main__ as console
from tests.processes import ROOT


def test_console_lists_every_command_with_a_line(capsys):
    console.main([])
    text = capsys.readouterr().out
    modules = {path.stem for path in (ROOT / "experiments").glob("*.py")} - {"__init__", "__main__"}
    helpers = {"cli", "progress_table", "trial_config"}
    assert modules - helpers == {*console.COMMANDS, *console.OLD_NAMES} - {"benchmark"}
    for name in console.COMMANDS:
        summary = console.summary(name)
        assert f"  {name} " in text and summary in text
        assert summary.endswith((".", "`.")) and len(summary) < 110


def test_console_unknown_command_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as stop:
        console.main(["trian", "--workdir=x"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: no command 'trian'; did you mean train?\n"


def test_console_is_an_entry_point_of_the_package():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"mmfusion": "experiments.__main__:main"}


def test_console_dispatches_flags_and_exit_status(command, tmp_path):
    done = command("experiments", "evaluate", f"--workdir={tmp_path}")
    assert done.returncode == 2 and "is no run directory" in done.stderr
    done = command("experiments", "train", "--help")
    assert done.returncode == 0
    assert "--workdir" in done.stdout and "Trains a config" in done.stdout and "--config.steps=100" in done.stdout


@pytest.mark.parametrize("old", ["fusions", "known_answer", "replay", "rerun"])
def test_old_command_names_warn_and_work(old, command):
    done = command(f"experiments.{old}", "--nothing=1")
    assert done.returncode == 2
    assert f"experiments.{old} is now called experiments." in done.stderr and "nothing" in done.stderr
