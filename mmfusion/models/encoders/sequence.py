"""Encoders of vectors: an MLP on an embedding or on each position of a sequence, and a temporal convolutional network.

B batch · T N positions · F features · C channels · D width
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfusion.models.layers import Dropout, normalised_tokens, zero_masked


class MLP(nn.Module):
    """MLP on every vector; a linear layer if `hidden` is empty.

    Attributes:
      width: width D of the tokens.
      hidden: units of each hidden layer.
      dropout: dropout rate after each hidden layer, or of the vectors without one.
    """

    width: int
    hidden: tuple[int, ...] = (128,)
    dropout: float = 0.0
    dtype: Any = jnp.float32

    reads: ClassVar = ("embedding", "sequence")
    layer_order: ClassVar = (r"hidden\d+", "project|norm")

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Encodes vectors `[B, F]` with `mask [B, 1]`, or `[B, T, F]` with `mask [B, T]`, as tokens `[B, N, D]`."""
        hidden = zero_masked(x.reshape(*mask.shape, -1), mask).astype(self.dtype)  # [B, N, F]
        if not self.hidden:
            hidden = Dropout(self.dropout)(hidden, train=train)
        for layer, units in enumerate(self.hidden):
            hidden = nn.gelu(nn.Dense(units, dtype=self.dtype, name=f"hidden{layer}")(hidden))
            hidden = Dropout(self.dropout)(hidden, train=train)
        return normalised_tokens(nn.Dense(self.width, dtype=self.dtype, name="project")(hidden), mask, self.dtype), mask


class TCNBlock(nn.Module):
    """Two dilated causal convolutions with weight normalisation, ReLU and dropout, and a residual connection."""

    channels: int
    kernel: int
    dilation: int
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool) -> jax.Array:
        """Maps `x [B, T, C]` with `mask [B, T]` to `[B, T, channels]`, zeros where masked."""
        hidden = x
        for layer in range(2):
            # A causal convolution as a product of the positions t, t - dilation, t - 2 · dilation, ... and a matrix.
            taps = [self._delayed(hidden, self.dilation * tap) for tap in range(self.kernel)]
            dense = nn.Dense(self.channels, dtype=self.dtype, name=f"conv{layer}")
            normalised = nn.WeightNorm(dense, variable_filter={"kernel"}, name=f"weight_norm{layer}")
            hidden = zero_masked(nn.relu(normalised(jnp.concatenate(taps, axis=-1))), mask)
            hidden = Dropout(self.dropout)(hidden, train=train)
        if x.shape[-1] != self.channels:
            x = nn.Dense(self.channels, dtype=self.dtype, name="skip")(x)
        return zero_masked(nn.relu(x + hidden), mask)

    @staticmethod
    def _delayed(x: jax.Array, steps: int) -> jax.Array:
        return jnp.pad(x, ((0, 0), (steps, 0), (0, 0)))[:, : x.shape[1]]


class TCN(nn.Module):
    """Temporal convolutional network (Bai et al. 2018, arXiv:1803.01271): block i has dilation 2^i.

    A token depends on the 1 + 2 · (kernel - 1) · (2^blocks - 1) positions up to its own.

    Attributes:
      width: width D of the tokens.
      channels: channels of each block.
      kernel: kernel size, positions.
      dropout: dropout rate after each convolution.
    """

    width: int
    channels: tuple[int, ...] = (64, 64, 64, 64)
    kernel: int = 3
    dropout: float = 0.0
    dtype: Any = jnp.float32

    reads: ClassVar[str] = "sequence"
    layer_order: ClassVar = (r"block\d+", "project|norm")

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Encodes vectors `[B, T, F]` with `mask [B, T]` as tokens `[B, T, D]` and their mask."""
        hidden = zero_masked(x, mask).astype(self.dtype)
        for block, channels in enumerate(self.channels):
            layer = TCNBlock(channels, self.kernel, 2**block, self.dropout, self.dtype, name=f"block{block}")
            hidden = layer(hidden, mask, train=train)
        return normalised_tokens(nn.Dense(self.width, dtype=self.dtype, name="project")(hidden), mask, self.dtype), mask
