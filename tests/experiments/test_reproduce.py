"""Provenance of results, and the command that reproduces a run."""

import json
import subprocess

import pytest
from absl.testing import flagsaver

from experiments import reproduce
from mmfusion.distributed import platform
from mmfusion.errors import UserError
from mmfusion.tracking import provenance
from mmfusion.training.loop import train
from mmfusion.training.restore import read_config
from tests.errors import rejects


@pytest.fixture(scope="module")
def finished_run(tiny_config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("reproduce") / "run"
    train(tiny_config("fusion=concat"), workdir)
    return workdir


def run_reproduce(*args):
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as caught:
        reproduce.main(["reproduce", *args])
    return caught.value.code


@pytest.mark.loop
def test_reproduce_is_bit_identical(finished_run, capsys):
    assert run_reproduce(str(finished_run)) == 0
    assert "bitwise identical" in capsys.readouterr().out
    assert (finished_run.parent / "run-again" / "result.json").exists()


@pytest.mark.loop
def test_reproduce_reports_differences_from_the_first_step(finished_run, tmp_path, capsys):
    for name in ("config.json", "result.json", "metrics.jsonl"):
        (tmp_path / name).write_text((finished_run / name).read_text())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    lines[2]["loss"] += 1e-9
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    result = json.loads((tmp_path / "result.json").read_text())
    result["test"]["accuracy"] += 0.1
    result["versions"]["jax"], result["best_step"] = "0.1", 1
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert run_reproduce(str(tmp_path), f"--again={tmp_path / 'other'}") == 1
    output = capsys.readouterr().out
    assert "step 3: loss" in output and "test accuracy:" in output and "'jax': '0.1'" in output
    assert "best step: 1 and" in output


@pytest.mark.loop
def test_reproduce_accepts_changes_of_data_locations_only(finished_run):
    with flagsaver.flagsaver():
        with rejects("config.steps", None, says="data.dir"):
            reproduce.main(["reproduce", str(finished_run), "--config.steps=3"])
        with pytest.raises(UserError, match="give one finished run"):
            reproduce.main(["reproduce"])
        with rejects("--again", str(finished_run)):
            reproduce.main(["reproduce", str(finished_run), f"--again={finished_run}"])
        with rejects(finished_run.parent, says="config.json"):
            reproduce.main(["reproduce", str(finished_run.parent)])
    config = read_config(finished_run)
    assert reproduce.relocated(config, ["--config.data.dir=/else"]).data.dir == "/else"


@pytest.mark.loop
def test_result_records_versions_and_commit(finished_run, tmp_path):
    result = json.loads((finished_run / "result.json").read_text())
    assert result["versions"] == provenance.environment()["versions"]
    assert {"jax", "jaxlib", "flax", "orbax-checkpoint", "python", "mmfusion"} <= set(result["versions"])
    assert provenance.commit(tmp_path) is None
    (tmp_path / "COMMIT").write_text("0123abc\n")  # as in an archive
    assert provenance.commit(tmp_path) == {"id": "0123abc", "dirty": False}
    (tmp_path / "COMMIT").unlink()
    for command in (
        ["init", "-q"], ["config", "user.email", "a@b"], ["config", "user.name", "a"],
        ["commit", "-q", "--allow-empty", "-m", "one"],
    ):  # fmt: skip
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    assert provenance.commit(tmp_path)["dirty"] is False
    (tmp_path / "file").write_text("a")
    subprocess.run(["git", "-C", tmp_path, "add", "file"], check=True)
    found = provenance.commit(tmp_path)
    assert found["dirty"] is True and len(found["id"]) == 40


def test_deterministic_xla_flags_are_set_once_and_checked(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_one=1")
    with rejects("config.deterministic", True, says="XLA_FLAGS=--xla_gpu_deterministic_ops=true"):
        platform.check_determinism("gpu")
    platform.check_determinism("cpu")
    for _ in range(2):
        platform.set_deterministic_flags()
        assert platform.os.environ["XLA_FLAGS"] == "--xla_one=1 --xla_gpu_deterministic_ops=true"
    platform.check_determinism("gpu")
