"""Widths at which methods cost the same, so that an effect of capacity is not attributed to the fusion strategy."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import numpy as np
from ml_collections import ConfigDict

from mmfusion import config as configs
from mmfusion.analysis.ablation.plan import REFERENCE, MakeConfig
from mmfusion.data.dataset import Dataset, load
from mmfusion.errors import UserError
from mmfusion.training.setup import build_setup

TOLERANCE = 0.02  # relative difference below which costs count as equal
MAX_WIDTH_FACTOR = 4  # widths above this multiple of the config's are not searched
KINDS = ("parameters", "flops")


@dataclasses.dataclass(frozen=True)
class Match:
    """A width and the cost of the model at that width, in the matched unit."""

    width: int
    cost: int


def model_cost(config: ConfigDict, dataset: Dataset, kind: str) -> int:
    """Returns a model's number of parameters, or the FLOPs of one example's forward pass as XLA counts them.

    Args:
      config: the config of a run.
      dataset: its data; no split is needed.
      kind: one of KINDS.

    Raises:
      UserError: the strategy cannot be built for these modalities, or exceeds its size limit.
    """
    setup = build_setup(config, dataset)
    shapes = setup.state_shapes()
    if kind == "parameters":
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes.params))

    def forward(params: Any, batch_stats: Any, batch: Any) -> Any:
        variables = {"params": params, "batch_stats": batch_stats}
        out: Any = setup.model.apply(variables, setup.preprocess(batch, None), train=False)
        return out.logits

    row = jax.tree.map(lambda x: x[:1], setup.example)
    analysis = jax.jit(forward).lower(shapes.params, shapes.batch_stats, row).cost_analysis()
    return int(cast(Any, analysis)["flops"])


def nearest_width(cost_of: Callable[[int], int], target: int, width: int, step: int) -> Match:
    """Returns the width, a multiple of `step`, whose cost is nearest to the target, by bisection.

    Args:
      cost_of: width -> cost, which must increase with the width; a UserError counts as infinite cost.
      target: the cost to match.
      width: the config's width; widths up to MAX_WIDTH_FACTOR times this are searched.
      step: allowed widths are multiples of it.
    """

    @functools.cache
    def cost_at(multiple: int) -> float:
        try:
            return cost_of(multiple * step)
        except UserError:
            return math.inf

    low, high = 1, max(1, MAX_WIDTH_FACTOR * width // step)
    if math.isinf(cost_at(low)):
        cost_of(low * step)  # raises its UserError
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost_at(middle) <= target else (low, middle)
    best = min((low, high), key=lambda multiple: abs(cost_at(multiple) - target))
    return Match(best * step, int(cost_at(best)))


def match_widths(make: MakeConfig, fusions: Sequence[str], kind: str) -> tuple[MakeConfig, int, dict[str, Match]]:
    """Returns `make` with widths at which every strategy, and each modality alone, costs as much as the reference.

    The reference is `concat` if it is among the strategies, otherwise the first one, at the config's width.

    Args:
      make: see `plan.build`.
      fusions: names of strategies.
      kind: one of KINDS.

    Returns:
      The new `make`, the reference's cost, and the match by strategy or `MODALITY alone`.

    Raises:
      UserError: a strategy cannot be built.
    """
    reference = make(REFERENCE if REFERENCE in fusions else fusions[0], 0, "")
    datasets: dict[str, Dataset] = {}
    target, width = _cost(reference, kind, datasets), reference.model.width

    @functools.cache
    def match(fusion: str, modalities: str) -> Match:
        config = make(fusion, 0, modalities)
        sections = (config.model.fusion, *config.model.encoders.values())
        step = math.lcm(*(section.get(key, 1) for key in ("heads", "chunks") for section in sections))

        def cost_of(width: int) -> int:
            config = make(fusion, 0, modalities)
            config.model.width = width
            return _cost(config, kind, datasets)

        return nearest_width(cost_of, target, width, step)

    def make_matched(fusion: str, seed: int, modalities: str) -> ConfigDict:
        config = make(fusion, seed, modalities)
        config.model.width = match(fusion, modalities).width
        return config

    matches = {name: match(name, "") for name in fusions}
    if len(reference.data.modalities) > 1:
        matches |= {f"{m} alone": match("", m) for m in sorted(reference.data.modalities)}
    return make_matched, target, matches


def _cost(config: ConfigDict, kind: str, datasets: dict[str, Dataset]) -> int:
    """Returns the cost of a config's model; `datasets` caches one dataset per set of modalities."""
    key = "+".join(sorted(config.data.modalities))
    if key not in datasets:
        datasets[key] = load(configs.read(config).data, seed=0, splits=())
    return model_cost(config, datasets[key], kind)
