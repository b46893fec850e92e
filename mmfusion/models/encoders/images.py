"""Image encoders on several images per example.

B batch · K images · H W image · C channels · D width
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfusion.data.images import POOLS
from mmfusion.errors import UserError
from mmfusion.models.layers import masked_mean, zero_masked


class PerImage(nn.Module):
    """Applies an image encoder to every image, with shared weights; the mean of an image's tokens is its token.

    It has no parameters beside the encoder's, which have the paths that they have without it, so that published
    weights, frozen layers and layer-wise learning-rate decay need not know of it.

    Attributes:
      encoder: the image encoder.
      pool: `none` outputs one token per image, `mean` one token, the mean of the images' tokens.
    """

    encoder: nn.Module
    pool: str = "none"
    dtype: Any = jnp.float32

    def setup(self):
        nn.share_scope(self, self.encoder)

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Encodes normalised float32 images `[B, K, H, W, C]` with `mask [B, K]` as tokens `[B, K or 1, D]` and mask.

        Raises:
          UserError: `pool` is unknown.
        """
        if self.pool not in POOLS:
            raise UserError("unknown value", path="pool", value=self.pool, choices=POOLS)
        images = x.reshape(-1, *x.shape[2:])  # [B · K, H, W, C]
        features, features_mask = self.encoder(images, mask.reshape(-1, 1), train=train)  # [B · K, N, D]
        tokens = masked_mean(features, features_mask).reshape(*mask.shape, -1)  # [B, K, D]
        if self.pool == "mean":
            tokens, mask = masked_mean(tokens, mask)[:, None], mask.any(axis=1, keepdims=True)
        # Normalised again, as a mean has a smaller scale; without parameters, which published weights lack.
        norm = nn.LayerNorm(use_scale=False, use_bias=False, dtype=self.dtype, name="norm_images")
        return zero_masked(norm(tokens), mask), mask
