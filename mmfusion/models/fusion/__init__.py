"""Registry of fusion strategies, by config name; `contract.py` documents the call signatures."""

from collections.abc import Sequence

import flax.linen as nn

from mmfusion.errors import UserError
from mmfusion.models.fusion.additive import EmbraceNet, Mean, Sum, Weighted
from mmfusion.models.fusion.bilinear import MFB, MFH, MLB, LowRankTensor, Multiplicative
from mmfusion.models.fusion.bilinear_attention import BilinearAttention
from mmfusion.models.fusion.co_attention import CoAttention
from mmfusion.models.fusion.concat import Concat
from mmfusion.models.fusion.conditioning import MAG, FiLM, NLGate
from mmfusion.models.fusion.convolutional import ChannelMultiply, Conv
from mmfusion.models.fusion.cross_attention import CrossAttention, MulT
from mmfusion.models.fusion.depthwise import Central, DeepSets
from mmfusion.models.fusion.elementwise import Max, Product
from mmfusion.models.fusion.gating import AttentionPool, SqueezeExcite
from mmfusion.models.fusion.gmu import GMU
from mmfusion.models.fusion.graph import GAT, KnowledgeGraph
from mmfusion.models.fusion.late import QMF, TMC, LateMean, LateWeighted, ProductOfExperts, Stacking
from mmfusion.models.fusion.latent import Perceiver, QFormer
from mmfusion.models.fusion.merged import Bottleneck, LateTransformer, MergedAttention
from mmfusion.models.fusion.mixed import I2M2, MoE
from mmfusion.models.fusion.tensor import MCB, Block, Mutan, Tensor
from mmfusion.registry import lookup

FUSIONS: dict[str, type[nn.Module]] = {
    "concat": Concat,
    "mean": Mean,
    "sum": Sum,
    "max": Max,
    "product": Product,
    "weighted": Weighted,
    "attention_pool": AttentionPool,
    "gmu": GMU,
    "embracenet": EmbraceNet,
    "squeeze_excite": SqueezeExcite,
    "conv": Conv,
    "channel_multiply": ChannelMultiply,
    "tensor": Tensor,
    "low_rank_tensor": LowRankTensor,
    "multiplicative": Multiplicative,
    "mcb": MCB,
    "mlb": MLB,
    "mfb": MFB,
    "mfh": MFH,
    "mutan": Mutan,
    "block": Block,
    "film": FiLM,
    "nl_gate": NLGate,
    "mag": MAG,
    "cross_attention": CrossAttention,
    "co_attention": CoAttention,
    "merged_attention": MergedAttention,
    "mult": MulT,
    "bottleneck": Bottleneck,
    "perceiver": Perceiver,
    "qformer": QFormer,
    "bilinear_attention": BilinearAttention,
    "late_transformer": LateTransformer,
    "gat": GAT,
    "knowledge_graph": KnowledgeGraph,
    "central": Central,
    "deepsets": DeepSets,
    "late_mean": LateMean,
    "late_weighted": LateWeighted,
    "product_of_experts": ProductOfExperts,
    "moe": MoE,
    "stacking": Stacking,
    "tmc": TMC,
    "qmf": QMF,
    "i2m2": I2M2,
}


def fusion_classes(names: Sequence[str] | str) -> dict[str, type[nn.Module]]:
    """Returns fusion strategies by name.

    Args:
      names: registry names or `package.module:Class`, as a sequence or comma-separated; `all` selects the registry.

    Raises:
      UserError: a name is unknown or repeated.
    """
    if names == "all":
        return dict(FUSIONS)
    listed = names.split(",") if isinstance(names, str) else list(names)
    if len(set(listed)) < len(listed):
        raise UserError("a strategy is given twice", path="--fusions", value=",".join(listed))
    return {name: lookup(FUSIONS, name, "--fusions") for name in listed}
