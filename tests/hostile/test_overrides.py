"""Overrides of a config that would be read as something else."""

import pytest

from experiments import cli
from tests.errors import rejects

CHANNELS = "config.model.encoders.image.channels"


@pytest.mark.parametrize(
    "overrides",
    [
        [f"--{CHANNELS}=(4,8)", f"--{CHANNELS}=(8,16)"],
        [f"--{CHANNELS}=(4,8)", f"--{CHANNELS}=(4,8)"],
        [f"--{CHANNELS}", "(4,8)", f"--{CHANNELS}", "(8,16)"],
        [f"--{CHANNELS}=(4,8)", f"--{CHANNELS}", "(8,16)"],
    ],
)
def test_make_config_refuses_a_tuple_given_twice(overrides):
    with rejects(f"--{CHANNELS}", None, says="twice"):
        cli.make_config("configs/quickstart.py", overrides)


def test_make_config_takes_the_last_of_other_values():
    config = cli.make_config("configs/quickstart.py", ["--config.steps=3", f"--{CHANNELS}=(4,8)", "--config.steps=5"])
    assert config.steps == 5 and config.model.encoders.image.channels == (4, 8)
