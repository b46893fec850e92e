"""Widths of equal cost: the exact one where it exists, else the nearest, with the same data for every strategy."""

import functools

import pytest

from mmfusion import config as configs
from mmfusion.analysis.ablation import budget
from mmfusion.data import dataset
from mmfusion.errors import UserError
from tests import tiny


def test_nearest_width_minimizes_the_cost_difference():
    quadratic = lambda width: 100 + 3 * width * width  # noqa: E731
    assert budget.nearest_width(quadratic, quadratic(24), width=64, step=1) == budget.Match(24, quadratic(24))
    assert budget.nearest_width(quadratic, quadratic(24) + 5, width=64, step=1).width == 24
    assert budget.nearest_width(quadratic, quadratic(26), width=64, step=4).width in (24, 28)
    assert budget.nearest_width(quadratic, 0, width=64, step=4).width == 4  # smallest allowed width
    assert budget.nearest_width(quadratic, 10**9, width=64, step=4).width == 256  # largest allowed width


def test_nearest_width_skips_widths_that_raise():
    def bounded(width):
        if width > 20:
            raise UserError("over the budget")
        return width

    assert budget.nearest_width(bounded, 30, width=64, step=1).width == 20
    with pytest.raises(UserError, match="over the budget"):
        budget.nearest_width(lambda width: bounded(99), 30, width=64, step=1)


def make(data_dir, fusion, seed, modalities):
    arg = [f"seed={seed}"] + [f"fusion={fusion}"] * bool(fusion) + [f"modalities={modalities}"] * bool(modalities)
    return tiny.config(",".join(arg), {"data.dir": data_dir})


@pytest.mark.parametrize("kind", ["parameters", pytest.param("flops", marks=pytest.mark.thorough)])
def test_match_widths_equalizes_cost_with_concat(kind, data_dir):
    make_config = functools.partial(make, data_dir)
    matched, reported_target, found = budget.match_widths(make_config, ["low_rank_tensor", "concat"], kind)
    assert set(found) == {"low_rank_tensor", "concat", "image alone", "text alone"}
    config = make_config("concat", 0, "")
    data = dataset.load(configs.read(config).data, seed=0, splits=())
    target = budget.model_cost(config, data, kind)
    assert reported_target == target and found["concat"] == budget.Match(config.model.width, target)
    other = matched("low_rank_tensor", 1, "")
    assert (other.model.width, other.seed) == (found["low_rank_tensor"].width, 1)
    assert budget.model_cost(other, data, kind) == found["low_rank_tensor"].cost
    assert found["low_rank_tensor"].cost == pytest.approx(target, rel=0.1)
    assert make_config("low_rank_tensor", 0, "").model.width == config.model.width
    assert matched("", 0, "text").model.width == found["text alone"].width
