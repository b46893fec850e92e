"""Objectives that belong to a fusion strategy: its paper trains it with them, and its own options turn them off."""

import flax.linen as nn

from mmfusion.models.fusion.late import TMC
from mmfusion.objectives.base import Objective
from mmfusion.objectives.evidence import Evidence


def strategy_objectives(fusion: nn.Module) -> dict[str, Objective]:
    """Returns the objectives of a strategy by the name under which they log."""
    if isinstance(fusion, TMC) and fusion.loss == "digamma":
        return {"of_tmc": Evidence(fusion.anneal)}
    return {}
