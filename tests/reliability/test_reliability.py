"""A small share of the faults, and that failures are detected."""

import dataclasses
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmfusion import config as configs
from mmfusion.data.builders import archives
from tests.reliability import faults, fuzz, runs
from tests.reliability.faults import Outcome


@pytest.fixture(scope="module")
def locations(data_dir: str) -> list[str]:
    return [f"--config.data.dir={data_dir}"]


def failures(outcomes: list[Outcome]) -> list[str]:
    return [message for survived, message in outcomes if not survived]


def test_fuzzed_configs_and_archives_are_accepted_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert failures(list(fuzz.fuzzed_configs(150, tmp_path, ()))) == []
    outcomes = list(fuzz.fuzzed_archives(300, tmp_path, ()))
    assert len(outcomes) == 300 and failures(outcomes) == []
    monkeypatch.setattr(archives, "ZIP_ERRORS", (zipfile.BadZipFile,))  # fewer than are raised
    assert failures(list(fuzz.fuzzed_archives(300, tmp_path, ()))) != []


def test_cases_are_valid_configs(locations: list[str]):
    assert len(runs.CASES) == 5
    for case in (*runs.CASES, runs.SHORTEST, faults.HOSTS):
        configs.check(runs.cli.make_config(case.source, (*case.changes, *locations)), case.devices)


@pytest.mark.process
@pytest.mark.parametrize(
    ("fault", "count"),
    [  # test_resume.py kills runs, test_recovery.py plants NaN, and test_saver.py lets writes fail, too
        pytest.param(faults.kills, 1, marks=pytest.mark.thorough),
        (faults.bit_flips, 1),
        pytest.param(faults.nan_planted, 2, marks=pytest.mark.thorough),
        pytest.param(faults.failing_writes, 2, marks=pytest.mark.thorough),
    ],
)
def test_runs_survive(
    fault: Callable[..., Any], count: int, locations: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(faults, "CASES", [runs.SHORTEST])
    outcomes = list(fault(count, tmp_path, locations))
    assert len(outcomes) >= count and failures(outcomes) == []
    if fault is faults.failing_writes:  # the preloaded library covers Python's files and those of Orbax's writer
        assert int(re.search(r"call \d+ of (\d+)", outcomes[0][1])[1]) > 20


@pytest.mark.process
@pytest.mark.thorough  # test_hosts.py and test_ablation.py kill a host and a process of an ablation, too
@pytest.mark.spread
@pytest.mark.parametrize("fault", [faults.killed_hosts, faults.killed_ablations])
def test_hosts_and_ablations_survive_kills(fault: Callable[..., Any], locations: list[str], tmp_path: Path):
    outcomes = list(fault(1, tmp_path, locations))
    assert len(outcomes) == 1 and failures(outcomes) == []


@pytest.mark.process
@pytest.mark.thorough
def test_soak_runs_in_flat_memory(locations: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(faults, "CASES", [runs.SHORTEST])
    assert failures(list(faults.soak(8, tmp_path, locations))) == []


def test_soak_detects_memory_growth():
    start = [100.0] * 50
    assert faults.flat([*start, *[500.0 + i % 7 for i in range(350)]])
    assert not faults.flat([*start, *[500.0 + 0.1 * i for i in range(350)]])  # 4 MB of 500 a tenth of the time


@pytest.mark.thorough
@pytest.mark.process
def test_differences_are_detected(locations: list[str], tmp_path: Path):
    one, other = tmp_path / "one", tmp_path / "other"
    runs.whole(runs.SHORTEST, one, locations)
    changed = (*runs.SHORTEST.changes, "--config.optim.learning_rate=0.0011")
    runs.whole(dataclasses.replace(runs.SHORTEST, changes=changed), other, locations)
    found = runs.differences(one, other)
    assert re.match(r"step \d+: ", found[0])
    assert any(line.startswith("state params/") for line in found)
    assert runs.differences(one, one) == []


def test_reliability_command_writes_its_table(command: Callable[..., Any], tmp_path: Path):
    table = tmp_path / "table.md"
    for fault, share in (("fuzzed_archives", "0.02"), ("fuzzed_configs", "0.002"), ("fuzzed_archives", "0.01")):
        done = command("tests.reliability", fault, f"--share={share}", f"--output={table}")
        assert done.returncode == 0, done.stderr
    configs, archives = table.read_text().splitlines()[-2:]
    assert configs.startswith("| fuzzed_configs | a config made at random | 2 | taken, or refused in a line | 2 |")
    assert archives.startswith("| fuzzed_archives | an archive damaged or hostile | 10 | as it was, or refused | 10 |")
    assert archives in done.stdout
    assert command("tests.reliability", "fuzz").returncode == 2
