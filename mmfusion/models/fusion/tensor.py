"""Outer products of the modalities, full or factorised: tensor fusion, MUTAN, BLOCK and compact bilinear pooling.

In MUTAN and BLOCK the factor of an absent modality is 1. B batch · M modalities · D width · r rank
"""

import zlib
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmfusion.errors import UserError
from mmfusion.models.fusion.bilinear import factors_with_bias, power_normalise, product
from mmfusion.models.fusion.contract import Declaration, Fused, pool, project_each
from mmfusion.models.layers import zero_masked


class Tensor(nn.Module):
    """h = GELU(W · ⊗_m [P_m x_m; 1] + b) (Zadeh et al. 2017, arXiv:1707.07250); P_m x_m is 0 if modality m is absent.

    Attributes:
      width: width D of the features.
      project: width of each modality's projection; 0: the largest that `budget` allows, up to `width`.
      budget: limit on the number of elements, (project + 1)^M, of an example's outer product.
    """

    width: int
    project: int = 0
    budget: int = 2**12
    dtype: Any = jnp.float32

    declares: ClassVar[Declaration] = Declaration(family="bilinear", paper="arXiv:1707.07250")

    @nn.compact
    def __call__(self, tokens: dict[str, jax.Array], mask: dict[str, jax.Array], *, train: bool) -> Fused:
        """Fuses tokens `[B, N_m, D]` with masks `[B, N_m]` into features `[B, width]`.

        Raises:
          UserError: the outer product has more elements than `budget`.
        """
        del train
        pooled, present = pool(tokens, mask)
        max_width = int(self.budget ** (1 / len(pooled)) + 1e-9) - 1
        project = self.project or max(min(self.width, max_width), 1)
        if (size := (project + 1) ** len(pooled)) > self.budget:
            raise UserError(
                f"the outer product of {len(pooled)} modalities of project={project} has {size:,} elements; lower "
                "project, raise budget, or choose low_rank_tensor",
                path="tensor.budget",
                value=self.budget,
            )
        outer = jnp.ones((present.shape[0], 1), self.dtype)
        for i, x in enumerate(project_each(sorted(tokens), pooled, project, self.dtype)):
            x = zero_masked(x, present[:, i])
            x = jnp.concatenate([x, jnp.ones_like(x[:, :1])], axis=-1)  # [B, project + 1]
            outer = (outer[:, :, None] * x[:, None, :]).reshape(x.shape[0], -1)  # [B, (project + 1)^(i + 1)]
        return Fused(features=nn.gelu(nn.Dense(self.width, dtype=self.dtype, name="out")(outer)), attention={})


class Mutan(nn.Module):
    """h = 1/r Σ_r Π_m [tanh(P_m x_m); 1] · U_m^r, a Tucker decomposition with a low-rank core (Ben-younes et al. 2017).

    arXiv:1705.06676. The paper's core tensor of two modalities is extended to M modalities, with the same rank r.

    Attributes:
      width: width D of the features.
      rank: rank r of the core tensor.
    """

    width: int
    rank: int = 5
    dtype: Any = jnp.float32

    declares: ClassVar[Declaration] = Declaration(family="bilinear", paper="arXiv:1705.06676", symmetric=True)

    @nn.compact
    def __call__(self, tokens: dict[str, jax.Array], mask: dict[str, jax.Array], *, train: bool) -> Fused:
        """Fuses tokens `[B, N_m, D]` with masks `[B, N_m]` into features `[B, width]`."""
        del train
        pooled, present = pool(tokens, mask)
        names = sorted(tokens)
        hidden = [nn.tanh(x) for x in project_each(names, pooled, self.width, self.dtype, "hidden")]
        factors = factors_with_bias(names, hidden, (self.rank, self.width), self.dtype)  # M times [B, r, D]
        return Fused(features=product(factors, present).sum(axis=1) / self.rank, attention={})


class Block(nn.Module):
    """Block-term decomposition: chunks of the features with separate low-rank products (Ben-younes et al. 2019).

    arXiv:1902.00038. P_m x_m is split into chunks. Chunk c outputs Σ_r Π_m [chunk_m; 1] · U_{m,c}^r with signed square
    root and l2 normalisation. The chunks are concatenated and projected.

    Attributes:
      width: width D of the features.
      chunks: number of chunks; divides `width`.
      rank: rank r of each chunk's core tensor.
    """

    width: int
    chunks: int = 4
    rank: int = 4
    dtype: Any = jnp.float32

    declares: ClassVar[Declaration] = Declaration(family="bilinear", paper="arXiv:1902.00038", symmetric=True)

    @nn.compact
    def __call__(self, tokens: dict[str, jax.Array], mask: dict[str, jax.Array], *, train: bool) -> Fused:
        """Fuses tokens `[B, N_m, D]` with masks `[B, N_m]` into features `[B, width]`.

        Raises:
          UserError: `chunks` does not divide `width`.
        """
        del train
        pooled, present = pool(tokens, mask)
        if self.width % self.chunks:
            message = f"does not divide width={self.width}; choose a divisor"
            raise UserError(message, path="block.chunks", value=self.chunks)
        size = self.width // self.chunks
        factors = []
        names = sorted(tokens)
        for m, x in zip(names, project_each(names, pooled, self.width, self.dtype), strict=True):
            chunks = x.reshape(-1, self.chunks, size)
            shape = (self.chunks, size, self.rank * size)
            kernel = self.param(f"core_{m}", nn.initializers.lecun_normal(batch_axis=0), shape).astype(self.dtype)
            bias = self.param(f"core_bias_{m}", nn.initializers.ones, (self.chunks, self.rank * size))
            factors.append(jnp.einsum("bcs,csk->bck", chunks, kernel) + bias.astype(self.dtype))
        merged = product(factors, present).reshape(-1, self.chunks, self.rank, size).sum(axis=2)  # [B, C, D/C]
        merged = power_normalise(merged).reshape(-1, self.width)
        return Fused(features=nn.Dense(self.width, dtype=self.dtype, name="out")(merged), attention={})


class MCB(nn.Module):
    """Compact bilinear pooling: the count sketch of ⊗_m [x_m; 1], by FFT (Fukui et al. 2016, arXiv:1606.01847).

    The sketch of an outer product is the circular convolution of the sketches, whose hashes and signs are fixed by the
    modality's name. Signed square root, l2 normalisation and a projection of the positions that can be nonzero follow.
    An absent modality is [0; 1]; the constant 1 retains the unimodal terms. Its hash is 0 and its sign +, which makes
    [0; 1] the identity of the convolution.

    Attributes:
      width: width D of the features.
      sketch: length of the sketch, at least 2.
    """

    width: int
    sketch: int = 512
    dtype: Any = jnp.float32

    declares: ClassVar[Declaration] = Declaration(family="bilinear", paper="arXiv:1606.01847")

    @nn.compact
    def __call__(self, tokens: dict[str, jax.Array], mask: dict[str, jax.Array], *, train: bool) -> Fused:
        """Fuses tokens `[B, N_m, D]` with masks `[B, N_m]` into features `[B, width]`.

        Raises:
          UserError: `sketch` is below 2.
        """
        del train
        if self.sketch < 2:
            raise UserError("must be at least 2", path="mcb.sketch", value=self.sketch)
        pooled, present = pool(tokens, mask)
        spectrum, reachable = jnp.ones((), jnp.complex64), np.arange(self.sketch) == 0
        for i, m in enumerate(sorted(tokens)):
            matrix = _count_sketch(m, pooled[i].shape[-1], self.sketch)
            reachable = np.any([np.roll(reachable, offset) for offset in {0, *np.abs(matrix).argmax(axis=1)}], axis=0)
            sketch = pooled[i].astype(jnp.float32) @ matrix
            sketch = zero_masked(sketch, present[:, i]).at[:, 0].add(1.0)  # [B, sketch]
            spectrum = spectrum * jnp.fft.rfft(sketch)
        # Other positions have only rounding errors, which the square root would amplify.
        sketched = jnp.fft.irfft(spectrum, self.sketch)[:, reachable].astype(self.dtype)
        return Fused(
            features=nn.Dense(self.width, dtype=self.dtype, name="out")(power_normalise(sketched)), attention={}
        )


def _count_sketch(name: str, width: int, size: int) -> np.ndarray:
    """Returns a matrix `[width, size]` with one random sign per row, at a random column other than 0."""
    bits = np.random.Philox(key=zlib.crc32(name.encode())).random_raw((2, width))  # the same with every NumPy
    matrix = np.zeros((width, size), np.float32)
    matrix[np.arange(width), 1 + bits[0] % np.uint64(size - 1)] = np.where(bits[1] % np.uint64(2), 1.0, -1.0)
    return matrix
