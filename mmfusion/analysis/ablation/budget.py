"""Widths at which methods cost the same, so that capacity is not mistaken for fusion."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from mmfusion.analysis.ablation.plan import REFERENCE, Make
from mmfusion.data.dataset import Dataset, load
from mmfusion.errors import UserError
from mmfusion.training.setup import build_setup

CLOSE = 0.02  # relative difference of costs that counts as equal
WIDEST = 4  # times the width of the config; wider is not searched
KINDS = ("parameters", "flops")


@dataclasses.dataclass(frozen=True)
class Match:
    """A width and what the model costs there, in the unit that was matched."""

    width: int
    cost: int


def cost(config: ConfigDict, dataset: Dataset, kind: str) -> int:
    """Returns a model's number of parameters, or the FLOPs of one example's forward pass as XLA counts them.

    Args:
      config: of a run.
      dataset: its data; no split is needed.
      kind: of KINDS.

    Raises:
      UserError: the strategy cannot be built, for its modalities or its budget.
    """
    setup = build_setup(config, dataset)
    shapes = setup.state_shapes()
    if kind == "parameters":
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes.params))

    def forward(params: Any, batch_stats: Any, batch: Any) -> Any:
        variables = {"params": params, "batch_stats": batch_stats}
        return setup.model.apply(variables, setup.preprocess(batch, None), train=False).logits

    one = jax.tree.map(lambda x: x[:1], setup.example)
    return int(jax.jit(forward).lower(shapes.params, shapes.batch_stats, one).cost_analysis()["flops"])


def match(cost_of: Callable[[int], int], target: int, width: int, step: int) -> Match:
    """Returns the width, a multiple of `step`, whose cost is nearest to the target.

    Args:
      cost_of: width -> cost, which grows with it; a UserError counts as too much.
      target: cost to come near.
      width: of the config, where the search begins.
      step: widths that are allowed are its multiples.
    """
    known: dict[int, float] = {}

    def at(multiple: int) -> float:
        if multiple not in known:
            try:
                known[multiple] = cost_of(multiple * step)
            except UserError:
                known[multiple] = float("inf")
        return known[multiple]

    low, high = 1, max(1, WIDEST * width // step)
    if at(low) == float("inf"):
        cost_of(low * step)  # says why
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if at(middle) <= target else (low, middle)
    best = min((low, high), key=lambda multiple: abs(at(multiple) - target))
    return Match(best * step, int(at(best)))


def matched(make: Make, fusions: Sequence[str], kind: str) -> tuple[Make, int, dict[str, Match]]:
    """Returns `make` with widths at which every strategy, and each modality alone, costs what the reference does.

    The reference is `concat` where it is among the strategies, else the first, at the config's width.

    Args:
      make: as of `plan.build`.
      fusions: names of strategies.
      kind: of KINDS.

    Returns:
      The new `make`, the reference's cost, and the match by strategy or `MODALITY alone`.

    Raises:
      UserError: a strategy cannot be built.
    """
    reference = make(REFERENCE if REFERENCE in fusions else fusions[0], 0, "")
    datasets = {}

    def cost_of(config: ConfigDict) -> int:
        key = "+".join(sorted(config.data.modalities))
        if key not in datasets:
            datasets[key] = load(config.data, seed=0, splits=())
        return cost(config, datasets[key], kind)

    def at(fusion: str, modalities: str, width: int) -> ConfigDict:
        config = make(fusion, 0, modalities)
        config.model.width = width
        return config

    target, width = cost_of(reference), reference.model.width
    alone = sorted(reference.data.modalities) if len(reference.data.modalities) > 1 else []

    @functools.cache
    def found(fusion: str, modalities: str) -> Match:
        config = make(fusion, 0, modalities)
        step = math.lcm(
            *(
                section.get(key, 1)
                for key in ("heads", "chunks")
                for section in (config.model.fusion, *config.model.encoders.values())
            )
        )
        return match(lambda w: cost_of(at(fusion, modalities, w)), target, width, step)

    def make_matched(fusion: str, seed: int, modalities: str) -> ConfigDict:
        config = make(fusion, seed, modalities)
        config.model.width = found(fusion, modalities).width
        return config

    matches = {name: found(name, "") for name in fusions} | {f"{m} alone": found("", m) for m in alone}
    return make_matched, target, matches
