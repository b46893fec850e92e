"""Encoders of graphs with a dense adjacency, padded to a set number of nodes.

B batch · N nodes · F features of a node · R relations · P parallel ones · h heads · D width
"""

from typing import Any, ClassVar, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfusion.models.layers import Dropout, head_width, masked_softmax, normalised_tokens, zero_masked


def parts_of(x: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the features `[B, N, F]` and the edges between real nodes `[B, N, N]` of `x [B, N, F + N]`."""
    nodes = x.shape[1]
    x = zero_masked(x, mask)
    return x[..., :-nodes], zero_masked(x[..., -nodes:].swapaxes(1, 2), mask).swapaxes(1, 2)


def graph_attention(
    h: jax.Array,
    to: jax.Array,
    of: jax.Array,
    linked: jax.Array,
    kinds: jax.Array | None = None,
    table: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attends along edges, by scores that add what a node says as the one and as the other end.

    Σ_j a_ij (h_j + e_ij), a_ij the softmax over the j that i is linked to of LeakyReLU(to · h_i + of · (h_j + e_ij),
    slope 0.2), e_ij the sum of the vectors of their relations, or nothing.

    Args:
      h: nodes `[B, N, h, d]`.
      to, of: the ends' vectors `[h, d]`.
      linked: `[B, N, N]` bool, from i to j.
      kinds: `[B, N, N, R]`, 1 where i has that relation to j; None: there is but one.
      table: the relations' vectors `[R, h, d]`, given with `kinds`.

    Returns:
      The mixed nodes `[B, N, h, d]`, and the weights a `[B, h, N, N]` float32.
    """
    sides = [jnp.einsum("bnhd,hd->bhn", h, side) for side in (to, of)]
    scores = sides[0][..., :, None] + sides[1][..., None, :]  # [B, h, N, N]
    if kinds is not None:
        kinds, table = kinds.astype(h.dtype), cast(jax.Array, table).astype(h.dtype)
        scores += jnp.einsum("bijr,rh->bhij", kinds, jnp.einsum("rhd,hd->rh", table, of.astype(h.dtype)))
    weights = masked_softmax(nn.leaky_relu(scores, 0.2), linked[:, None])
    mixed = jnp.einsum("bhij,bjhd->bihd", weights.astype(h.dtype), h)
    if kinds is not None:
        of_kind = jnp.einsum("bhij,bijr->bhir", weights.astype(h.dtype), kinds)  # [B, h, N, R]
        mixed += jnp.einsum("bhir,rhd->bihd", of_kind, table)
    return mixed, weights


class GCN(nn.Module):
    """H' = GELU(D^-½ (A + I) D^-½ H W + b) a layer (Kipf & Welling 2017, arXiv:1609.02907); each node is a token.

    Attributes:
      width: token width D.
      hidden: units of each layer.
      dropout: rate on each layer's units.
    """

    width: int
    hidden: tuple[int, ...] = (64, 64)
    dropout: float = 0.0
    dtype: Any = jnp.float32

    reads: ClassVar[str] = "graph"
    layer_order: ClassVar = (r"(layer|bias)\d+", "project|norm")

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Encodes features and adjacency `[B, N, F + N]` float32 with `mask [B, N]` as tokens `[B, N, D]` and mask.

        Edge weights must not be negative.
        """
        h, edges = parts_of(x, mask)
        edges = edges + jnp.eye(edges.shape[1]) * mask[:, None]
        scale = jax.lax.rsqrt(jnp.maximum(edges.sum(axis=2), 1e-12)) * mask  # [B, N]
        edges = (scale[:, :, None] * edges * scale[:, None, :]).astype(self.dtype)
        for layer, units in enumerate(self.hidden):
            bias = self.param(f"bias{layer}", nn.initializers.zeros, (units,)).astype(self.dtype)
            projected = nn.Dense(units, use_bias=False, dtype=self.dtype, name=f"layer{layer}")(h.astype(self.dtype))
            h = nn.gelu(edges @ projected + bias)
            h = Dropout(self.dropout)(h, train=train)
        return normalised_tokens(nn.Dense(self.width, dtype=self.dtype, name="project")(h), mask, self.dtype), mask


class GraphAttention(nn.Module):
    """Graph attention along the edges and to oneself (Veličković et al. 2018, arXiv:1710.10903); each node is a token.

    h'_i = ELU(Σ_j a_ij W h_j), a_ij the softmax over i's neighbours j of LeakyReLU(u · W h_i + v · W h_j, slope 0.2);
    heads are concatenated. What weighs an edge does not matter, only that it is there.

    Attributes:
      width: token width D.
      layers: attention layers.
      hidden: units of a layer, all heads together.
      heads: attention heads; divides `hidden`.
      dropout: rate on each layer's units.
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
        """Encodes features and adjacency `[B, N, F + N]` float32 with `mask [B, N]` as tokens `[B, N, D]` and mask.

        Raises:
          UserError: `heads` does not divide `hidden`.
        """
        h, edges = parts_of(x, mask)
        linked = (edges != 0) | (jnp.eye(edges.shape[1], dtype=bool) & mask[:, None])  # [B, N, N]
        shape = (self.heads, head_width(self.hidden, self.heads))
        for layer in range(self.layers):
            h = nn.DenseGeneral(shape, use_bias=False, dtype=self.dtype, name=f"layer{layer}")(h.astype(self.dtype))
            to, of = (self.param(f"layer{layer}_{side}", nn.initializers.normal(0.5), shape) for side in ("to", "from"))
            mixed, _ = graph_attention(h, to, of, linked)
            h = nn.elu(mixed).reshape(*mask.shape, self.hidden)
            h = Dropout(self.dropout)(h, train=train)
        return normalised_tokens(nn.Dense(self.width, dtype=self.dtype, name="project")(h), mask, self.dtype), mask


class KnowledgeAttention(nn.Module):
    """Relation-aware attention over a row's part of a knowledge graph (Busbridge et al. 2019, arXiv:1904.05811).

    A node begins as its entity's embedding, with a vector that says whether the row names it or only knows of it; then
    h'_i = h_i + ELU(Σ_j a_ij (W h_j + e_ij)) a layer, over i's neighbours and itself, e_ij the sum of the embeddings of
    their relations (see `graph_attention`). Each node is a token.

    Attributes:
      width: token width D.
      entities: of the graph.
      relations: of the graph, with their inverses.
      layers: attention layers.
      hidden: units of a layer, all heads together.
      heads: attention heads; divides `hidden`.
      dropout: rate on each layer's units.
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
        """Encodes nodes and relations `[B, N, 2 + P · N]` int32 with `mask [B, N]` as tokens `[B, N, D]` and mask.

        Raises:
          UserError: `heads` does not divide `hidden`.
        """
        x, nodes = zero_masked(x, mask), mask.shape[1]
        relation = x[..., 2:].reshape(len(x), nodes, -1, nodes).swapaxes(2, 3)  # [B, N, N, P], 0: none
        oneself = jnp.eye(nodes, dtype=bool) & mask[:, None]
        both = mask[:, :, None] & mask[:, None, :]
        kinds = jax.nn.one_hot(relation, self.relations + 1).sum(axis=3).at[..., 0].set(oneself) * both[..., None]
        linked = kinds.any(axis=3)

        def table(rows: int, name: str) -> nn.Embed:
            return nn.Embed(rows, self.hidden, dtype=self.dtype, embedding_init=nn.initializers.normal(0.1), name=name)

        h = table(self.entities + 1, "entity")(x[..., 0]) + table(2, "named")(x[..., 1])
        shape = (self.heads, head_width(self.hidden, self.heads))
        for layer in range(self.layers):
            told = nn.DenseGeneral(shape, use_bias=False, dtype=self.dtype, name=f"layer{layer}")(h)
            to, of = (self.param(f"layer{layer}_{side}", nn.initializers.normal(0.5), shape) for side in ("to", "from"))
            vectors = self.param(f"layer{layer}_relations", nn.initializers.normal(0.1), (self.relations + 1, *shape))
            mixed, _ = graph_attention(told, to, of, linked, kinds, vectors)  # 0: to oneself
            h = h + Dropout(self.dropout)(nn.elu(mixed).reshape(h.shape), train=train)
        return normalised_tokens(nn.Dense(self.width, dtype=self.dtype, name="project")(h), mask, self.dtype), mask
