"""Convolution over stacked modalities, and channel-wise multiplication by the other modalities."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfusion.models.convolution import convolve
from mmfusion.models.fusion.additive import project
from mmfusion.models.fusion.conditioning import choose_main
from mmfusion.models.fusion.contract import Declaration, Fused, pool
from mmfusion.models.layers import zero_masked


class Conv(nn.Module):
    """Convolution along the features of the modalities' projections, stacked as channels; zeros for an absent one.

    Attributes:
      width: width D of the features.
      channels: filters of each of the two convolutions.
      kernel: kernel size, in features.
    """

    width: int
    channels: int = 16
    kernel: int = 3
    dtype: Any = jnp.float32

    declares: ClassVar[Declaration] = Declaration(family="convolutional")

    @nn.compact
    def __call__(self, tokens: dict[str, jax.Array], mask: dict[str, jax.Array], *, train: bool) -> Fused:
        """Fuses tokens `[B, N_m, D]` with masks `[B, N_m]` into features `[B, width]`."""
        del train
        pooled, present = pool(tokens, mask)
        stacked = zero_masked(project(tokens, pooled, self.width, self.dtype), present)  # [B, M, D]
        x = stacked.swapaxes(1, 2)  # [B, D, M]
        for layer in range(2):
            conv = nn.Conv(
                self.channels, (self.kernel,), dtype=self.dtype, conv_general_dilated=convolve, name=f"conv_{layer}"
            )
            x = nn.gelu(conv(x))
        features = nn.Dense(self.width, dtype=self.dtype, name="out")(x.reshape(x.shape[0], -1))  # [B, D · channels]
        return Fused(features=nn.gelu(features), attention={})


class ChannelMultiply(nn.Module):
    """Channel-wise scaling of the main modality by vectors of the others (Duanmu et al. 2020, MICCAI).

    h = GELU(W (x_main ⊙ Π_o s_o)) with s_o = 1 + C_o GELU(A_o x_o); the factor of an absent modality is 1.

    Attributes:
      width: width D of the features.
      main: the modality whose channels are scaled; empty: the first in sorted order.
    """

    width: int
    main: str = ""
    dtype: Any = jnp.float32

    declares: ClassVar[Declaration] = Declaration(family="convolutional", paper="doi:10.1007/978-3-030-59713-9_24")

    @nn.compact
    def __call__(self, tokens: dict[str, jax.Array], mask: dict[str, jax.Array], *, train: bool) -> Fused:
        """Fuses tokens `[B, N_m, D]` with masks `[B, N_m]` into features `[B, width]`.

        Raises:
          UserError: `main` is not a modality of the model.
        """
        del train
        main, _ = choose_main("channel_multiply", self.main, tokens)
        names = sorted(tokens)
        pooled, present = pool(tokens, mask)
        features = jnp.ones((), self.dtype)
        for i, m in enumerate(names):
            x = pooled[i]
            if m != main:
                hidden = nn.gelu(nn.Dense(self.width, dtype=self.dtype, name=f"hidden_{m}")(x))
                x = 1 + nn.Dense(self.width, dtype=self.dtype, name=f"scale_{m}")(hidden)
            features = features * jnp.where(present[:, i, None], x, 1)  # [B, D]
        return Fused(features=nn.gelu(nn.Dense(self.width, dtype=self.dtype, name="out")(features)), attention={})
