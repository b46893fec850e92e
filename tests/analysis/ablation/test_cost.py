import dataclasses

import pytest

from mmfusion.analysis.ablation.cost import Size, cost
from mmfusion.models.fusion import FUSIONS

SIZE = Size(modalities=2, tokens=8, width=16, classes=5)


@pytest.mark.parametrize("name", FUSIONS)
def test_every_strategy_has_a_cost(name):
    one = cost(FUSIONS[name], SIZE)
    assert one.flops > 0
    assert one.memory is None


def test_parameters_are_those_of_the_formula():
    assert cost(FUSIONS["mean"], SIZE).parameters == 2 * (16 * 16 + 16)
    assert cost(FUSIONS["late_mean"], SIZE).parameters == 0
    assert cost(FUSIONS["stacking"], SIZE).parameters == 2 * (5 * 5 + 5)


def test_operations_grow_as_the_strategy_says():
    def flops(name, **changes):
        return cost(FUSIONS[name], dataclasses.replace(SIZE, **changes)).flops

    assert flops("late_mean", tokens=1024) == flops("late_mean")  # it sees no tokens
    assert 3.5 < flops("film", tokens=1024) / flops("film", tokens=256) < 4.2  # linear in the tokens
    assert 12 < flops("nl_gate", tokens=4096) / flops("nl_gate", tokens=1024) < 16.5  # quadratic
    assert 1.4 < flops("mean", modalities=3) / flops("mean") < 1.6


def test_memory_is_of_the_compiled_program():
    assert cost(FUSIONS["nl_gate"], SIZE, compiled=True).memory >= 4 * 9 * 8  # the attention weights, float32


def test_the_command_lists_and_draws(command, tmp_path):
    done = command("experiments.list_fusions", "--fusions=mean,tmc", "--width=8", f"--plot={tmp_path}/cost.png")
    assert done.returncode == 0, done.stderr
    assert "arXiv:2102.02051" in done.stdout
    assert f"{2 * (8 * 8 + 8)}" in done.stdout
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")


def test_an_unknown_name_is_the_users_error(command):
    done = command("experiments.list_fusions", "--fusions=mean,tmcc")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: --fusions='tmcc': unknown name; did you mean tmc")
