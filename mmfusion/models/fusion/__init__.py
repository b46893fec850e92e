"""Fusion strategies, by the name a config gives them; `contract.py` says how each is called."""

import flax.linen as nn

from mmfusion.models.fusion.additive import Mean, Weighted
from mmfusion.models.fusion.concat import Concat
from mmfusion.models.fusion.cross_attention import CrossAttention
from mmfusion.models.fusion.gmu import GMU
from mmfusion.models.fusion.late import LateMean

FUSIONS: dict[str, type[nn.Module]] = {
    "concat": Concat,
    "mean": Mean,
    "weighted": Weighted,
    "gmu": GMU,
    "late_mean": LateMean,
    "cross_attention": CrossAttention,
}
