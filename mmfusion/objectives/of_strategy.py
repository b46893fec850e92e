"""Objectives that belong to a fusion strategy: its paper trains it with them, and its own options turn them off."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from mmfusion.models.fusion import FUSIONS
from mmfusion.models.fusion.late import QMF, TMC
from mmfusion.objectives.base import Objective
from mmfusion.objectives.evidence import Evidence
from mmfusion.objectives.ranking import Ranking
from mmfusion.registry import lookup


def strategy_objectives(fusion: nn.Module) -> dict[str, Objective]:
    """Returns the objectives of a strategy by the name under which they log."""
    if isinstance(fusion, TMC) and fusion.loss == "digamma":
        return {"of_tmc": Evidence(fusion.anneal)}
    if isinstance(fusion, QMF) and fusion.ranking:
        return {"of_qmf": Ranking(fusion)}
    return {}


def strategy_group(section: Mapping[str, Any]) -> int:
    """Returns how many rows in sequence the strategy of a config's `model.fusion` needs in one micro-batch."""
    strategy: Any = lookup(FUSIONS, section["name"], "config.model.fusion.name")
    ranks = issubclass(strategy, QMF) and section.get("ranking", strategy.ranking)
    return Ranking.requires.group if ranks else 1
