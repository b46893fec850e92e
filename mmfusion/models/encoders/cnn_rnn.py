"""A recurrent network over the feature map of a CNN.

B batch · H W image · C channels · T steps of the sequence · D width
"""

from typing import Any, ClassVar, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfusion.errors import UserError
from mmfusion.models.convolution import conv
from mmfusion.models.encoders.classic import pool
from mmfusion.models.encoders.text import CELLS
from mmfusion.models.layers import Dropout, Norm, normalised_tokens, zero_masked

TOKENS = ("all", "last", "attention")


class CNNRNN(nn.Module):
    """Convolutions with pooling, then a recurrent network over the rows or cells of the feature map, from the top left.

    Attributes:
      width: width D of the tokens.
      channels: channels of each 3×3 convolution, which is followed by 2×2 max pooling.
      norm: normalisation after each convolution: `batch`, `layer`, `group` or `none`.
      steps: `rows` of the feature map, or `cells` (its spatial positions).
      cell: `vanilla`, `gru` or `lstm`.
      layers: number of recurrent layers.
      hidden: units of each recurrent layer.
      tokens: `all` returns the outputs of all steps, `last` that of the last step, `attention` their mean weighted by
        additive attention (Bahdanau et al. 2015, arXiv:1409.0473), softmax over steps of v · tanh(W h + b).
      dropout: dropout rate of the feature map and between the recurrent layers.
    """

    width: int
    channels: tuple[int, ...] = (16, 32)
    norm: str = "batch"
    steps: str = "rows"
    cell: str = "lstm"
    layers: int = 1
    hidden: int = 64
    tokens: str = "all"
    dropout: float = 0.0
    dtype: Any = jnp.float32
    axis_name: str | None = None

    reads: ClassVar[str] = "image"
    layer_order: ClassVar = None

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Encodes normalised float32 images `[B, H, W, C]` with `mask [B, 1]` as tokens `[B, T or 1, D]` and a mask.

        Raises:
          UserError: `steps`, `cell` or `tokens` is unknown, or the images are too small for the pooling layers.
        """
        for name, choices in (("steps", ("rows", "cells")), ("cell", CELLS), ("tokens", TOKENS)):
            if (value := getattr(self, name)) not in choices:
                raise UserError("unknown value", path=f"cnn_rnn.{name}", value=value, choices=choices)
        present = mask[:, 0]  # [B]
        x = zero_masked(x, present).astype(self.dtype)
        for channels in self.channels:
            x = conv(channels, 3, 1, self.dtype)(x)
            x = nn.relu(Norm(self.norm, self.axis_name, self.dtype)(x, present, train=train))
            x = pool(x, 2, 2, "cnn_rnn")
        num_steps = x.shape[1] * (x.shape[2] if self.steps == "cells" else 1)
        steps = x.reshape(x.shape[0], num_steps, -1)  # [B, T, W'·C or C]
        for layer in range(self.layers):
            steps = Dropout(self.dropout)(steps, train=train)
            cell = CELLS[self.cell](self.hidden, dtype=self.dtype, name=f"rnn{layer}")
            steps = cast(jax.Array, nn.RNN(cell, name=f"scan{layer}")(steps))  # [B, T, hidden]
        if self.tokens == "attention":
            keys = nn.tanh(nn.Dense(self.hidden, dtype=self.dtype, name="attend")(steps))
            weights = nn.softmax(nn.Dense(1, use_bias=False, dtype=self.dtype, name="score")(keys), axis=1)  # [B, T, 1]
            steps = (weights * steps).sum(axis=1, keepdims=True)
        elif self.tokens == "last":
            steps = steps[:, -1:]
        mask = jnp.broadcast_to(present[:, None], steps.shape[:2])
        return normalised_tokens(nn.Dense(self.width, dtype=self.dtype, name="project")(steps), mask, self.dtype), mask
