"""The README's example of an out-of-tree objective."""

import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import mmfusion.objectives
from mmfusion import config as configs
from mmfusion.config import defaults
from mmfusion.data import dataset as datasets
from mmfusion.training.setup import build_setup
from tests.errors import rejects

README = Path(mmfusion.objectives.__file__).with_name("README.md").read_text()


@pytest.fixture
def custom_objective(tmp_path, monkeypatch):
    """Installs the README's example as the module `custom_losses` and yields the objective's name."""
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(example.splitlines()) < 25
    (tmp_path / "custom_losses.py").write_text(example)
    monkeypatch.syspath_prepend(tmp_path)
    yield "custom_losses:SmallFeatures"
    sys.modules.pop("custom_losses", None)


def with_objective(tiny_config, name, **options):
    config = tiny_config("fusion=concat", {"optim.clip_norm": 0.0, "parallel.mode": "jit"})
    with config.unlocked():
        config.objectives.small = defaults.objective(name, **options)
    configs.check(config)
    return config


def test_readme_objective_is_added_to_the_loss_and_logged(custom_objective, tiny_config):
    losses = {}
    for weight in (0.0, 0.5):
        config = with_objective(tiny_config, custom_objective, weight=weight)
        dataset = datasets.load(configs.read(config).data, seed=0)
        setup = build_setup(config, dataset)
        batch = dataset.splits["train"].take(np.arange(16))
        _, losses[weight] = jax.jit(setup.step)(setup.init_on_host(0), batch, np.float32(0.1))
    difference = losses[0.5]["loss"] - losses[0.0]["loss"]
    assert float(difference) == pytest.approx(0.5 * float(losses[0.5]["objective/small"]), rel=1e-4)
    assert float(losses[0.5]["objective/small"]) > 0


def test_objective_lookup_rejects_an_unknown_class(custom_objective, tiny_config):
    name = "custom_losses:LargeFeatures"
    with rejects(f"config.objectives.{name}", name, "custom_losses:SmallFeatures"):
        with_objective(tiny_config, name)
