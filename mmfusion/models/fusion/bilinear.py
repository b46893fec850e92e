"""Products of projections: low-rank tensors, multiplicative interactions, MLB, MFB and MFH.

The factor of an absent modality is 1. B batch · M modalities · D width · r rank
"""

import itertools
import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfusion.errors import UserError
from mmfusion.models.fusion.contract import Declaration, Fused, pool, project_each
from mmfusion.models.layers import Dropout, zero_masked


def product(factors: list[jax.Array], present: jax.Array) -> jax.Array:
    """Returns Π_m of factors `[B, ...]` over the modalities in `present [B, M]`; the factor of an absent one is 1."""
    result = jnp.ones((), factors[0].dtype)
    for m, factor in enumerate(factors):
        mask = present[:, m].reshape(-1, *[1] * (factor.ndim - 1))
        result = result * jnp.where(mask, factor, 1)
    return jnp.broadcast_to(result, factors[0].shape)


def factors_with_bias(
    names: list[str], pooled: list[jax.Array], shape: tuple[int, ...], dtype: Any, prefix: str = "project"
) -> list[jax.Array]:
    """Returns [x_m; 1] · U_m `[B, *shape]` per modality; the bias is initialised to ones, so factors start near 1."""
    return project_each(names, pooled, shape, dtype, prefix, nn.initializers.ones)


def power_normalise(x: jax.Array) -> jax.Array:
    """Returns the signed square root of `x [..., D]`, l2-normalised; smooth at 0."""
    rooted = x * jax.lax.rsqrt(jnp.abs(x) + 1e-4)
    return rooted * jax.lax.rsqrt(jnp.square(rooted).sum(axis=-1, keepdims=True) + 1e-4)


class LowRankTensor(nn.Module):
    """h = Σ_r w_r Π_m ([x_m; 1] · U_m^r) + b with learned U_m^r (Liu et al. 2018, arXiv:1806.00064).

    Attributes:
      width: width D of the features.
      rank: number of terms r of the sum.
    """

    width: int
    rank: int = 4
    dtype: Any = jnp.float32

    declares: ClassVar[Declaration] = Declaration(family="bilinear", paper="arXiv:1806.00064", symmetric=True)

    @nn.compact
    def __call__(self, tokens: dict[str, jax.Array], mask: dict[str, jax.Array], *, train: bool) -> Fused:
        """Fuses tokens `[B, N_m, D]` with masks `[B, N_m]` into features `[B, width]`."""
        del train
        pooled, present = pool(tokens, mask)
        factors = factors_with_bias(sorted(tokens), pooled, (self.rank, self.width), self.dtype)  # M times [B, r, D]
        weights = self.param("weights", nn.initializers.normal(self.rank**-0.5), (self.rank,)).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.width,)).astype(self.dtype)
        return Fused(features=jnp.einsum("r,brd->bd", weights, product(factors, present)) + bias, attention={})


class Multiplicative(nn.Module):
    """h = Σ_{a<b} x_a^T W_ab x_b + Σ_m U_m x_m + b (Jayakumar et al. 2020, ICLR); terms of absent modalities are zero.

    Attributes:
      width: width D of the features.
      budget: limit on the total number of elements, width^3 each, of the tensors W_ab.
    """

    width: int
    budget: int = 2**22
    dtype: Any = jnp.float32

    declares: ClassVar[Declaration] = Declaration(family="bilinear", paper="openreview:rylnK6VtDH")

    @nn.compact
    def __call__(self, tokens: dict[str, jax.Array], mask: dict[str, jax.Array], *, train: bool) -> Fused:
        """Fuses tokens `[B, N_m, D]` with masks `[B, N_m]` into features `[B, width]`.

        Raises:
          UserError: the tensors have more elements than `budget`.
        """
        del train
        pooled, present = pool(tokens, mask)
        names = sorted(tokens)
        size = math.comb(len(names), 2) * pooled[0].shape[-1] ** 2 * self.width
        if size > self.budget:
            raise UserError(
                f"the pairwise tensors have {size:,} elements; lower model.width, or choose low_rank_tensor",
                path="multiplicative.budget",
                value=self.budget,
            )
        features = jnp.zeros((), self.dtype)
        for i, linear in enumerate(project_each(names, pooled, self.width, self.dtype)):
            features = features + zero_masked(linear, present[:, i])
        for (i, a), (j, b) in itertools.combinations(enumerate(names), 2):
            scale = nn.initializers.normal(1 / pooled[i].shape[-1])
            tensor = self.param(f"pair_{a}_{b}", scale, (pooled[i].shape[-1], pooled[j].shape[-1], self.width))
            features = features + jnp.einsum("bi,bj,ijd->bd", pooled[i], pooled[j], tensor.astype(self.dtype))
        return Fused(features=features, attention={})


class MLB(nn.Module):
    """h = P (⊙_m tanh(U_m x_m + c_m)) (Kim et al. 2017, arXiv:1610.04325).

    Attributes:
      width: width D of the features.
    """

    width: int
    dtype: Any = jnp.float32

    declares: ClassVar[Declaration] = Declaration(family="bilinear", paper="arXiv:1610.04325", symmetric=True)

    @nn.compact
    def __call__(self, tokens: dict[str, jax.Array], mask: dict[str, jax.Array], *, train: bool) -> Fused:
        """Fuses tokens `[B, N_m, D]` with masks `[B, N_m]` into features `[B, width]`."""
        del train
        pooled, present = pool(tokens, mask)
        factors = [nn.tanh(f) for f in factors_with_bias(sorted(tokens), pooled, (self.width,), self.dtype)]
        out = nn.Dense(self.width, dtype=self.dtype, name="out")
        return Fused(features=out(product(factors, present)), attention={})


class MFB(nn.Module):
    """MFB: Σ_k dropout(Π_m [x_m; 1] · U_m), signed square root, l2-normalised (Yu et al. 2017, arXiv:1708.01471).

    Attributes:
      width: width D of the features.
      factors: number k of products summed per feature.
      dropout: dropout rate of the products.
    """

    width: int
    factors: int = 5
    dropout: float = 0.1
    dtype: Any = jnp.float32

    declares: ClassVar[Declaration] = Declaration(family="bilinear", paper="arXiv:1708.01471", symmetric=True)

    @nn.compact
    def __call__(self, tokens: dict[str, jax.Array], mask: dict[str, jax.Array], *, train: bool) -> Fused:
        """Fuses tokens `[B, N_m, D]` with masks `[B, N_m]` into features `[B, width]`."""
        pooled, present = pool(tokens, mask)
        factors = factors_with_bias(sorted(tokens), pooled, (self.width, self.factors), self.dtype)  # M times [B, D, k]
        expanded = Dropout(self.dropout)(product(factors, present), train=train)
        return Fused(features=power_normalise(expanded.sum(axis=-1)), attention={})


class MFH(nn.Module):
    """MFH: cascaded MFB blocks, each multiplied by the previous block's products (Yu et al. 2018, arXiv:1708.03619).

    The outputs of the blocks are concatenated and projected. A block's products are dropped as those of MFB, before
    they are summed and before they are multiplied by the next block's.

    Attributes:
      width: width D of the features.
      factors: number k of products summed per feature.
      order: number of cascaded blocks.
      dropout: dropout rate of the products.
    """

    width: int
    factors: int = 5
    order: int = 2
    dropout: float = 0.1
    dtype: Any = jnp.float32

    declares: ClassVar[Declaration] = Declaration(family="bilinear", paper="arXiv:1708.03619", symmetric=True)

    @nn.compact
    def __call__(self, tokens: dict[str, jax.Array], mask: dict[str, jax.Array], *, train: bool) -> Fused:
        """Fuses tokens `[B, N_m, D]` with masks `[B, N_m]` into features `[B, width]`."""
        pooled, present = pool(tokens, mask)
        expanded, blocks = jnp.ones((), self.dtype), []
        for i in range(self.order):
            factors = factors_with_bias(sorted(tokens), pooled, (self.width, self.factors), self.dtype, f"block{i}")
            expanded = Dropout(self.dropout)(expanded * product(factors, present), train=train)  # [B, D, k]
            blocks.append(power_normalise(expanded.sum(axis=-1)))
        out = nn.Dense(self.width, dtype=self.dtype, name="out")
        return Fused(features=out(jnp.concatenate(blocks, axis=-1)), attention={})
