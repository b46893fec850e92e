"""Graph strategies, whose nodes are the tokens of all modalities."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfusion.models.encoders.graph import graph_attention
from mmfusion.models.fusion.contract import Declaration, Fused
from mmfusion.models.fusion.sequence import add_type_embeddings, concatenate_tokens, pooled_features, split_weights
from mmfusion.models.layers import head_width, zero_masked


class GraphFusion(nn.Module):
    """Base class of the graph strategies.

    Attributes:
      width: width D of tokens and features.
      layers: number of attention layers.
      heads: attention heads; divides `width`.
    """

    width: int
    layers: int = 2
    heads: int = 4
    dtype: Any = jnp.float32

    has_relations: ClassVar[bool] = False

    @nn.compact
    def __call__(self, tokens: dict[str, jax.Array], mask: dict[str, jax.Array], *, train: bool) -> Fused:
        """Fuses tokens `[B, N_m, width]` with masks `[B, N_m]` into features `[B, width]`.

        The returned attention weights are the last layer's.

        Raises:
          UserError: `heads` does not divide `width`.
        """
        del train
        names = sorted(tokens)
        x, x_mask, sizes = concatenate_tokens(add_type_embeddings(self, tokens, mask), mask, names)  # [B, N, D]
        shape, attention = (self.heads, head_width(self.width, self.heads)), {}
        for layer in range(self.layers):
            h = nn.DenseGeneral(shape, use_bias=False, dtype=self.dtype, name=f"layer{layer}")(x)  # [B, N, h, D/h]
            target, source = (
                self.param(f"layer{layer}_{end}", nn.initializers.normal(0.5), shape) for end in ("to", "from")
            )
            relations = self._relations(names, sizes, f"layer{layer}", shape) if self.has_relations else (None, None)
            mixed, weights = graph_attention(h, target, source, x_mask[:, None, :] & x_mask[:, :, None], *relations)
            attention = split_weights(weights, names, sizes, names, sizes)
            x = zero_masked(x + nn.elu(mixed.reshape(x.shape)), x_mask)
        return Fused(features=pooled_features(x, x_mask, self.width, self.dtype), attention=attention)

    def _relations(self, names: list[str], sizes: list[int], name: str, shape: tuple[int, int]) -> tuple[Any, Any]:
        """Returns the tokens' one-hot relations `[1, N, N, M · M]` and the relation embeddings `[M · M, h, d]`."""
        modality_index = jnp.repeat(jnp.arange(len(names)), jnp.array(sizes), total_repeat_length=sum(sizes))
        init = nn.initializers.normal(0.1)
        embeddings = [self.param(f"{name}_relation_{query}_{key}", init, shape) for query in names for key in names]
        relation = modality_index[:, None] * len(names) + modality_index  # [N, N]
        return jax.nn.one_hot(relation, len(embeddings))[None], jnp.stack(embeddings)


class GAT(GraphFusion):
    """Graph attention over the complete graph of all tokens (Veličković et al. 2018, arXiv:1710.10903).

    h'_i = ELU(Σ_j a_ij W h_j), with a_ij the softmax over nodes j of LeakyReLU(u · W h_i + v · W h_j, slope 0.2) and
    concatenated heads. A learned modality embedding is added to each node. Each layer has a skip connection.

    The options are those of `GraphFusion`.
    """

    declares: ClassVar[Declaration] = Declaration(
        family="graph", paper="arXiv:1710.10903", symmetric=True, needs_tokens=True
    )


class KnowledgeGraph(GraphFusion):
    """Graph attention with relation embeddings over all tokens as entities (Busbridge et al. 2019, arXiv:1904.05811).

    Extends `gat` by one relation per ordered pair of modalities, with learned embeddings e:
    h'_i = ELU(Σ_j a_ij (W h_j + e_ij)). The entities of a `knowledge` modality, encoded with the relations of their own
    graph, are thereby related to text tokens and image positions. The options are those of `GraphFusion`.
    """

    declares: ClassVar[Declaration] = Declaration(family="graph", paper="arXiv:1904.05811", needs_tokens=True)

    has_relations: ClassVar[bool] = True
