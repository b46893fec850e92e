"""Auxiliary objectives in a run: what each logs, that weights weigh, and what fills in for an absent modality."""

import json

import numpy as np
import pytest

from configs import base, quickstart
from mmfusion import config as configs
from mmfusion.errors import UserError
from mmfusion.evaluate import evaluate, open_run
from mmfusion.models.auxiliary import AUXILIARIES
from mmfusion.train import train
from tests import planted


@pytest.fixture
def rows(monkeypatch):
    planted.plant(monkeypatch, train=[planted.row(i) for i in range(60)], test=[planted.row(i) for i in range(20)])


def config(*names, **changes):
    result = planted.config("image+text", steps=4, **changes)
    base.add_objectives(result, "+".join(names))
    with result.unlocked():
        for name in names:
            result.objectives[name].update(
                {k: 4 for k in ("hidden", "shared", "latent") if k in result.objectives[name]}
            )
    return result


def logged(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "grad_norm" in line]


@pytest.mark.parametrize("names", [("contrastive", "cca", "adversarial", "mvae"), ("mmvae",), ("gan",)])
def test_each_logs_its_own_loss(rows, tmp_path, names):
    train(config(*names), tmp_path / "run")
    for line in logged(tmp_path / "run"):
        assert all(np.isfinite(line[f"objective/{name}"]) for name in names)
        assert line["skipped"] == 0
    assert open_run(tmp_path / "run", []).config.objectives.to_dict().keys() == set(names)


def test_the_loss_is_the_tasks_and_the_weighted_objectives(rows, tmp_path):
    weighed = config("contrastive")
    with weighed.unlocked():
        weighed.objectives.contrastive.weight = 0.25
    first = [
        logged(tmp_path / name)[0]
        for name, made in (("plain", config()), ("with", weighed))
        if train(made, tmp_path / name)
    ]
    assert first[1]["loss"] == pytest.approx(first[0]["loss"] + 0.25 * first[1]["objective/contrastive"], rel=1e-4)


def test_what_is_filled_in_changes_what_a_missing_modality_does(rows, tmp_path):
    filled = config("mvae", model__fusion=base.fusion("concat"))
    train(filled, tmp_path / "filled")
    with filled.unlocked():
        filled.objectives.mvae.fill = False
    train(filled, tmp_path / "empty")
    whole, part = (
        [evaluate(tmp_path / name, modalities=kept)["loss"] for name in ("filled", "empty")]
        for kept in (None, ["image"])
    )
    assert whole[0] == pytest.approx(whole[1], abs=1e-6)  # nothing is absent: the same run
    assert abs(part[0] - part[1]) > 2e-5


def test_every_config_takes_objectives_and_wrong_ones_are_told():
    given = quickstart.get_config("objectives=contrastive+mvae")
    assert list(given.objectives) == ["contrastive", "mvae"]
    configs.check(given, base.get_config(), 1)
    with pytest.raises(UserError, match=r"config\.objectives\.contrast is unknown: did you mean contrastive"):
        quickstart.get_config("objectives=contrast")
    with given.unlocked():
        given.objectives.contrastive.temprature = 1.0
    with pytest.raises(UserError, match=r"objectives\.contrastive\.temprature is not read .* did you mean temperature"):
        configs.check(given, base.get_config(), 1)
    both = quickstart.get_config("objectives=mvae+gan")
    with pytest.raises(UserError, match="gan and mvae cannot both fill in"):
        configs.check(both, base.get_config(), 1)
    assert "fill" in AUXILIARIES["mvae"].__dataclass_fields__
