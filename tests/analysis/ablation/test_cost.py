import dataclasses

import pytest

from mmfusion.analysis.ablation.cost import FusionSize, fusion_cost
from mmfusion.models.fusion import FUSIONS
from tests.models.inputs import FIRST_OF_FAMILY

SIZE = FusionSize(modalities=2, tokens=8, width=16, classes=5)


@pytest.mark.thorough(but=FIRST_OF_FAMILY)
@pytest.mark.parametrize("name", FUSIONS)
def test_fusion_cost_is_positive_for_every_strategy(name):
    cost = fusion_cost(FUSIONS[name], SIZE)
    assert cost.flops > 0
    assert cost.memory is None


def test_fusion_cost_counts_parameters():
    assert fusion_cost(FUSIONS["mean"], SIZE).parameters == 2 * (16 * 16 + 16)
    assert fusion_cost(FUSIONS["late_mean"], SIZE).parameters == 0
    assert fusion_cost(FUSIONS["stacking"], SIZE).parameters == 2 * (5 * 5 + 5)


def test_fusion_cost_flops_scale_as_published():
    def flops(name, **changes):
        return fusion_cost(FUSIONS[name], dataclasses.replace(SIZE, **changes)).flops

    assert flops("late_mean", tokens=1024) == flops("late_mean")  # does not depend on the tokens
    assert 3.5 < flops("film", tokens=1024) / flops("film", tokens=256) < 4.2  # linear in the tokens
    assert 12 < flops("nl_gate", tokens=4096) / flops("nl_gate", tokens=1024) < 16.5  # quadratic
    assert 1.4 < flops("mean", modalities=3) / flops("mean") < 1.6


def test_fusion_cost_memory_includes_attention_weights():
    assert fusion_cost(FUSIONS["nl_gate"], SIZE, compiled=True).memory >= 4 * 9 * 8  # the attention weights, float32


def test_list_fusions_prints_a_table_and_writes_a_plot(command, tmp_path):
    process = command("experiments.list_fusions", "--fusions=mean,tmc", "--width=8", f"--plot={tmp_path}/cost.png")
    assert process.returncode == 0, process.stderr
    assert "arXiv:2102.02051" in process.stdout
    assert f"{2 * (8 * 8 + 8)}" in process.stdout
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")


def test_list_fusions_rejects_an_unknown_name(command):
    process = command("experiments.list_fusions", "--fusions=mean,tmcc")
    assert process.returncode == 2
    assert process.stderr.strip().splitlines()[-1].startswith("error: --fusions='tmcc': unknown name; did you mean tmc")
