"""Graph strategies: the tokens of all modalities as nodes."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfusion.models.encoders.graph import graph_attention
from mmfusion.models.fusion.contract import Declaration, Fused
from mmfusion.models.fusion.sequence import cut, joined, pooled_features, typed
from mmfusion.models.layers import head_width, zero_masked


class GraphFusion(nn.Module):
    """What the graph strategies share.

    Attributes:
      width: width D of tokens and features.
      layers: attention layers.
      heads: attention heads; divides `width`.
    """

    width: int
    layers: int = 2
    heads: int = 4
    dtype: Any = jnp.float32

    related: ClassVar[bool] = False

    @nn.compact
    def __call__(self, tokens: dict[str, jax.Array], mask: dict[str, jax.Array], *, train: bool) -> Fused:
        """Fuses tokens `[B, N_m, width]` with masks `[B, N_m]` into features `[B, width]`.

        The attention returned is the last layer's.

        Raises:
          UserError: `heads` does not divide `width`.
        """
        del train
        names = sorted(tokens)
        x, real, sizes = joined(typed(self, tokens, mask), mask, names)  # [B, N, D]
        shape, attention = (self.heads, head_width(self.width, self.heads)), {}
        for layer in range(self.layers):
            h = nn.DenseGeneral(shape, use_bias=False, dtype=self.dtype, name=f"layer{layer}")(x)  # [B, N, h, D/h]
            to, of = (self.param(f"layer{layer}_{side}", nn.initializers.normal(0.5), shape) for side in ("to", "from"))
            relations = self._relations(names, sizes, f"layer{layer}", shape) if self.related else (None, None)
            mixed, weights = graph_attention(h, to, of, real[:, None, :] & real[:, :, None], *relations)
            attention = cut(weights, names, sizes, names, sizes)
            x = zero_masked(x + nn.elu(mixed.reshape(x.shape)), real)
        return Fused(features=pooled_features(x, real, self.width, self.dtype), attention=attention)

    def _relations(self, names: list[str], sizes: list[int], name: str, shape: tuple[int, int]) -> tuple[Any, Any]:
        """Returns how tokens are related `[1, N, N, M · M]`, and the relations' vectors `[M · M, h, d]`."""
        number = jnp.repeat(jnp.arange(len(names)), jnp.array(sizes), total_repeat_length=sum(sizes))
        drawn = nn.initializers.normal(0.1)
        table = [self.param(f"{name}_relation_{q}_{k}", drawn, shape) for q in names for k in names]
        return jax.nn.one_hot(number[:, None] * len(names) + number, len(table))[None], jnp.stack(table)


class GAT(GraphFusion):
    """Graph attention over the complete graph of all tokens (Veličković et al. 2018, arXiv:1710.10903).

    h'_i = ELU(Σ_j a_ij W h_j), a_ij the softmax over nodes j of LeakyReLU(u · W h_i + v · W h_j, slope 0.2), several
    heads concatenated; a learned vector says which modality a node is from. A skip connection is added to each layer.

    Its options are those of `GraphFusion`.
    """

    declares: ClassVar[Declaration] = Declaration(
        family="graph", paper="arXiv:1710.10903", symmetric=True, needs_tokens=True
    )


class KnowledgeGraph(GraphFusion):
    """Attention over the tokens of all modalities as entities of one graph, whose relations have vectors of their own.

    As `gat`, and how a token of one modality is related to one of another is a relation, one for each ordered pair of
    modalities (relational graph attention, Busbridge et al. 2019, arXiv:1904.05811):
    h'_i = ELU(Σ_j a_ij (W h_j + e_ij)). Where a modality is `knowledge`, its entities, encoded with the relations of
    its own graph, are so linked to words and to places of an image. Its options are those of `GraphFusion`.
    """

    declares: ClassVar[Declaration] = Declaration(family="graph", paper="arXiv:1904.05811", needs_tokens=True)

    related: ClassVar[bool] = True
