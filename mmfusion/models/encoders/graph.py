"""Encoders of graphs with a dense adjacency, padded to a set number of nodes.

B batch · N nodes · F features of a node · h heads · D width
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfusion.models.layers import Dropout, head_width, masked_softmax, normalised_tokens, zero_masked


def parts_of(x: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the features `[B, N, F]` and the edges between real nodes `[B, N, N]` of `x [B, N, F + N]`."""
    nodes = x.shape[1]
    x = zero_masked(x, mask)
    return x[..., :-nodes], zero_masked(x[..., -nodes:].swapaxes(1, 2), mask).swapaxes(1, 2)


def graph_attention(h: jax.Array, to: jax.Array, of: jax.Array, linked: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Attends along edges, by scores that add what a node says as the one and as the other end.

    Σ_j a_ij h_j, a_ij the softmax over the j that i is linked to of LeakyReLU(to · h_i + of · h_j, slope 0.2).

    Args:
      h: nodes `[B, N, h, d]`.
      to, of: the ends' vectors `[h, d]`.
      linked: `[B, N, N]` bool, from i to j.

    Returns:
      The mixed nodes `[B, N, h, d]`, and the weights a `[B, h, N, N]` float32.
    """
    sides = [jnp.einsum("bnhd,hd->bhn", h, side) for side in (to, of)]
    scores = nn.leaky_relu(sides[0][..., :, None] + sides[1][..., None, :], 0.2)  # [B, h, N, N]
    weights = masked_softmax(scores, linked[:, None])
    return jnp.einsum("bhij,bjhd->bihd", weights.astype(h.dtype), h), weights


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
      heads: attention heads; they divide `hidden`.
      dropout: rate on each layer's units.
    """

    width: int
    layers: int = 2
    hidden: int = 64
    heads: int = 4
    dropout: float = 0.0
    dtype: Any = jnp.float32

    reads: ClassVar[str] = "graph"

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
            ends = [self.param(f"layer{layer}_{side}", nn.initializers.normal(0.5), shape) for side in ("to", "from")]
            mixed, _ = graph_attention(h, *ends, linked)
            h = nn.elu(mixed).reshape(*mask.shape, self.hidden)
            h = Dropout(self.dropout)(h, train=train)
        return normalised_tokens(nn.Dense(self.width, dtype=self.dtype, name="project")(h), mask, self.dtype), mask
