"""Vision transformers on image patches (Dosovitskiy et al. 2021, arXiv:2010.11929).

B batch · H W image · C channels · P patches · N = 1 + P tokens · D width
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfusion.errors import UserError
from mmfusion.models.convolution import conv
from mmfusion.models.layers import Dropout, TransformerBlock, normalised_tokens, zero_masked


class ViTTi(nn.Module):
    """ViT-Ti: 12 blocks of width 192 and 3 heads (Touvron et al. 2021, arXiv:2012.12877).

    The tokens are the class token and the patches in row-major order.

    Attributes:
      width: width D of the output tokens.
      patch: side of the patches, pixels.
      layers: number of transformer blocks.
      hidden: width of the transformer blocks.
      heads: attention heads; divides `hidden`.
      dropout: dropout rate of the patch embeddings and the residual branches.
    """

    width: int
    patch: int = 16
    layers: int = 12
    hidden: int = 192
    heads: int = 3
    dropout: float = 0.0
    dtype: Any = jnp.float32

    reads: ClassVar[str] = "image"
    layer_order: ClassVar = ("class|patches|positions", r"block\d+", "norm_last|project|norm")

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Encodes normalised float32 images `[B, H, W, C]` with `mask [B, 1]` as tokens `[B, 1 + P, D]` and a mask.

        Raises:
          UserError: `patch` does not divide the sides of the images, or `heads` does not divide `hidden`.
        """
        if x.shape[1] % self.patch or x.shape[2] % self.patch:
            raise UserError(f"does not divide images of {x.shape[1]}×{x.shape[2]}", path="vit.patch", value=self.patch)
        present = mask[:, 0]  # [B]
        x = zero_masked(x, present).astype(self.dtype)
        x = conv(self.hidden, self.patch, self.patch, self.dtype, padding=0, name="patches")(x)
        x = x.reshape(x.shape[0], -1, self.hidden)  # [B, P, hidden]
        class_token = self.param("class", nn.initializers.normal(0.02), (1, self.hidden)).astype(self.dtype)
        x = jnp.concatenate(
            [jnp.broadcast_to(class_token, (x.shape[0], *class_token.shape)), x], axis=1
        )  # [B, 1 + P, hidden]
        x = x + self.param("positions", nn.initializers.normal(0.02), x.shape[1:]).astype(self.dtype)
        x = Dropout(self.dropout)(x, train=train)
        mask = jnp.broadcast_to(present[:, None], x.shape[:2])
        for layer in range(self.layers):
            block = TransformerBlock(
                self.heads, self.hidden, 4.0, self.dropout, self.dtype, published=True, name=f"block{layer}"
            )
            x, _ = block(x, mask, train=train)
        x = nn.LayerNorm(dtype=self.dtype, name="norm_last")(x)
        return normalised_tokens(nn.Dense(self.width, dtype=self.dtype, name="project")(x), mask, self.dtype), mask


class ViTS(ViTTi):
    """ViT-S: 12 blocks of width 384 and 6 heads (arXiv:2012.12877); attributes as ViT-Ti."""

    hidden: int = 384
    heads: int = 6


class ViTB(ViTTi):
    """ViT-B: 12 blocks of width 768 and 12 heads (arXiv:2010.11929); attributes as ViT-Ti."""

    hidden: int = 768
    heads: int = 12
