"""Graph encoders with a dense adjacency matrix, padded to a fixed number of nodes.

B batch · N nodes · F node features · R relations · P parallel relations · h heads · D width
"""

from typing import Any, ClassVar, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfusion.models.layers import Dropout, head_width, masked_softmax, normalised_tokens, zero_masked


def split_graph(x: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Splits `x [B, N, F + N]` into features `[B, N, F]` and the adjacency `[B, N, N]` between unmasked nodes."""
    nodes = x.shape[1]
    x = zero_masked(x, mask)
    return x[..., :-nodes], zero_masked(x[..., -nodes:].swapaxes(1, 2), mask).swapaxes(1, 2)


def graph_attention(
    h: jax.Array,
    target: jax.Array,
    source: jax.Array,
    edges: jax.Array,
    relations: jax.Array | None = None,
    embeddings: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Graph attention with additive scores of the target and source nodes of each edge.

    Σ_j a_ij (h_j + e_ij), with a_ij the softmax over the neighbours j of node i of LeakyReLU(target · h_i +
    source · (h_j + e_ij), slope 0.2), and e_ij the sum of the embeddings of their relations, or zero without relations.

    Args:
      h: node features `[B, N, h, d]`.
      target, source: attention vectors `[h, d]`.
      edges: `[B, N, N]` bool, True at (i, j) if node i attends to node j.
      relations: `[B, N, N, R]`, 1 where i has the relation to j; None for a graph without relations.
      embeddings: relation embeddings `[R, h, d]`; required with `relations`.

    Returns:
      The updated nodes `[B, N, h, d]`, and the attention weights a `[B, h, N, N]` float32.
    """
    end_scores = [jnp.einsum("bnhd,hd->bhn", h, vector) for vector in (target, source)]
    scores = end_scores[0][..., :, None] + end_scores[1][..., None, :]  # [B, h, N, N]
    if relations is not None:
        relations, embeddings = relations.astype(h.dtype), cast(jax.Array, embeddings).astype(h.dtype)
        scores += jnp.einsum("bijr,rh->bhij", relations, jnp.einsum("rhd,hd->rh", embeddings, source.astype(h.dtype)))
    weights = masked_softmax(nn.leaky_relu(scores, 0.2), edges[:, None])
    updated = jnp.einsum("bhij,bjhd->bihd", weights.astype(h.dtype), h)
    if relations is not None:
        weights_by_relation = jnp.einsum("bhij,bijr->bhir", weights.astype(h.dtype), relations)  # [B, h, N, R]
        updated += jnp.einsum("bhir,rhd->bihd", weights_by_relation, embeddings)
    return updated, weights


class GCN(nn.Module):
    """H' = GELU(D^-½ (A + I) D^-½ H W + b) per layer (Kipf & Welling 2017, arXiv:1609.02907); each node is a token.

    Attributes:
      width: width D of the tokens.
      hidden: units of each layer.
      dropout: dropout rate after each layer.
    """

    width: int
    hidden: tuple[int, ...] = (64, 64)
    dropout: float = 0.0
    dtype: Any = jnp.float32

    reads: ClassVar[str] = "graph"
    layer_order: ClassVar = (r"(layer|bias)\d+", "project|norm")

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Encodes float32 features and adjacency `[B, N, F + N]` with `mask [B, N]` as tokens `[B, N, D]` and a mask.

        Edge weights must not be negative.
        """
        h, adjacency = split_graph(x, mask)
        adjacency = adjacency + jnp.eye(adjacency.shape[1]) * mask[:, None]
        inverse_sqrt_degree = jax.lax.rsqrt(jnp.maximum(adjacency.sum(axis=2), 1e-12)) * mask  # [B, N]
        adjacency = (inverse_sqrt_degree[:, :, None] * adjacency * inverse_sqrt_degree[:, None, :]).astype(self.dtype)
        for layer, units in enumerate(self.hidden):
            bias = self.param(f"bias{layer}", nn.initializers.zeros, (units,)).astype(self.dtype)
            projected = nn.Dense(units, use_bias=False, dtype=self.dtype, name=f"layer{layer}")(h.astype(self.dtype))
            h = nn.gelu(adjacency @ projected + bias)
            h = Dropout(self.dropout)(h, train=train)
        return normalised_tokens(nn.Dense(self.width, dtype=self.dtype, name="project")(h), mask, self.dtype), mask


class GraphAttention(nn.Module):
    """Graph attention over edges and self-loops (Veličković et al. 2018, arXiv:1710.10903); each node is a token.

    h'_i = ELU(Σ_j a_ij W h_j), with a_ij the softmax over i's neighbours j of LeakyReLU(u · W h_i + v · W h_j, slope
    0.2), for several concatenated heads. Edge weights are ignored: every nonzero element is an edge.

    Attributes:
      width: width D of the tokens.
      layers: number of attention layers.
      hidden: units of each layer, summed over heads.
      heads: attention heads; divides `hidden`.
      dropout: dropout rate after each layer.
    """

    width: int
    layers: int = 2
    hidden: int = 64
    heads: int = 4
    dropout: float = 0.0
    dtype: Any = jnp.float32

    reads: ClassVar[str] = "graph"
    layer_order: ClassVar = (r"layer\d+.*", "project|norm")

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Encodes float32 features and adjacency `[B, N, F + N]` with `mask [B, N]` as tokens `[B, N, D]` and a mask.

        Raises:
          UserError: `heads` does not divide `hidden`.
        """
        h, adjacency = split_graph(x, mask)
        edges = (adjacency != 0) | (jnp.eye(adjacency.shape[1], dtype=bool) & mask[:, None])  # [B, N, N]
        shape = (self.heads, head_width(self.hidden, self.heads))
        for layer in range(self.layers):
            h = nn.DenseGeneral(shape, use_bias=False, dtype=self.dtype, name=f"layer{layer}")(h.astype(self.dtype))
            target, source = (
                self.param(f"layer{layer}_{end}", nn.initializers.normal(0.5), shape) for end in ("to", "from")
            )
            updated, _ = graph_attention(h, target, source, edges)
            h = nn.elu(updated).reshape(*mask.shape, self.hidden)
            h = Dropout(self.dropout)(h, train=train)
        return normalised_tokens(nn.Dense(self.width, dtype=self.dtype, name="project")(h), mask, self.dtype), mask


class KnowledgeAttention(nn.Module):
    """Relation-aware attention over a subgraph of a knowledge graph (Busbridge et al. 2019, arXiv:1904.05811).

    A node starts as its entity's embedding plus an embedding of whether the example names it or it is a neighbour. Each
    layer computes h'_i = h_i + ELU(Σ_j a_ij (W h_j + e_ij)) over the neighbours of node i and itself, with e_ij the sum
    of the embeddings of their relations (see `graph_attention`). Each node is a token.

    Attributes:
      width: width D of the tokens.
      entities: number of entities of the graph.
      relations: number of relations of the graph, including inverses.
      layers: number of attention layers.
      hidden: units of each layer, summed over heads.
      heads: attention heads; divides `hidden`.
      dropout: dropout rate after each layer.
    """

    width: int
    entities: int
    relations: int
    layers: int = 2
    hidden: int = 64
    heads: int = 4
    dropout: float = 0.0
    dtype: Any = jnp.float32

    reads: ClassVar[str] = "knowledge"
    layer_order: ClassVar = None

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Encodes int32 nodes and relations `[B, N, 2 + P · N]` with `mask [B, N]` as tokens `[B, N, D]` and a mask.

        Raises:
          UserError: `heads` does not divide `hidden`.
        """
        x, nodes = zero_masked(x, mask), mask.shape[1]
        relation_ids = x[..., 2:].reshape(len(x), nodes, -1, nodes).swapaxes(2, 3)  # [B, N, N, P], 0: none
        self_loops = jnp.eye(nodes, dtype=bool) & mask[:, None]
        pair_mask = mask[:, :, None] & mask[:, None, :]
        relations = (
            jax.nn.one_hot(relation_ids, self.relations + 1).sum(axis=3).at[..., 0].set(self_loops)
            * pair_mask[..., None]
        )
        edges = relations.any(axis=3)

        def embedding(rows: int, name: str) -> nn.Embed:
            return nn.Embed(rows, self.hidden, dtype=self.dtype, embedding_init=nn.initializers.normal(0.1), name=name)

        h = embedding(self.entities + 1, "entity")(x[..., 0]) + embedding(2, "named")(x[..., 1])
        shape = (self.heads, head_width(self.hidden, self.heads))
        for layer in range(self.layers):
            projected = nn.DenseGeneral(shape, use_bias=False, dtype=self.dtype, name=f"layer{layer}")(h)
            target, source = (
                self.param(f"layer{layer}_{end}", nn.initializers.normal(0.5), shape) for end in ("to", "from")
            )
            embeddings = self.param(
                f"layer{layer}_relations", nn.initializers.normal(0.1), (self.relations + 1, *shape)
            )
            updated, _ = graph_attention(projected, target, source, edges, relations, embeddings)
            h = h + Dropout(self.dropout)(nn.elu(updated).reshape(h.shape), train=train)
        return normalised_tokens(nn.Dense(self.width, dtype=self.dtype, name="project")(h), mask, self.dtype), mask
