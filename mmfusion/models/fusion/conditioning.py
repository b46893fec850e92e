"""One modality's tokens changed by the others: FiLM, the non-local gate, and the multimodal adaptation gate.

A learned token stands beside the main modality's, so that the others are heard where the main one is absent.
"""

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfusion.errors import UserError
from mmfusion.models.convolution import conv
from mmfusion.models.fusion.contract import Declaration, Fused, project_each
from mmfusion.models.fusion.sequence import cut, joined, pooled_features, with_learned_token
from mmfusion.models.layers import Attention, masked_mean, zero_masked


def choose_main(strategy: str, main: str, names: Iterable[str]) -> tuple[str, list[str]]:
    """Returns the main modality (`main`, or the first in sorted order where that is empty) and the others.

    Raises:
      UserError: `main` is none of the modalities.
    """
    names = sorted(names)
    if main and main not in names:
        raise UserError(f"{strategy}: main={main!r} is no modality of this model; choose {', '.join(names)}")
    main = main or names[0]
    return main, [m for m in names if m != main]


class FiLM(nn.Module):
    """Residual blocks on the main modality's tokens, scaled and shifted by the others (Perez et al. 2018).

    arXiv:1709.07871. In each block u = GELU(W h), h' = u + GELU(γ ⊙ LN(V u) + β) with (γ - 1, β) an affine map of
    c = GELU(Σ_{o in P} C_o x_o + d_o). The paper's ReLU and batch norm are GELU and layer norm here.

    Attributes:
      width: width D of tokens and features.
      blocks: residual blocks.
      kernel: side of V: 1 takes each token by itself, 3 (the paper's) with its neighbours in a square grid of tokens.
      main: the modality that is conditioned; empty: the first in sorted order.
    """

    width: int
    blocks: int = 2
    kernel: int = 1
    main: str = ""
    dtype: Any = jnp.float32

    declares: ClassVar[Declaration] = Declaration(family="conditioning", paper="arXiv:1709.07871", needs_tokens=True)

    @nn.compact
    def __call__(self, tokens: dict[str, jax.Array], mask: dict[str, jax.Array], *, train: bool) -> Fused:
        """Fuses tokens `[B, N_m, D]` with masks `[B, N_m]` into features `[B, width]`.

        Raises:
          UserError: `main` is none of the modalities, its tokens are no square grid where the kernel looks around, or
            the kernel is even.
        """
        del train
        if self.kernel % 2 == 0:
            raise UserError(f"film: kernel={self.kernel} must be odd: a token stands in the middle of its neighbours")
        main, others = choose_main("film", self.main, tokens)
        count = tokens[main].shape[1]
        if self.kernel > 1 and math.isqrt(count) ** 2 != count:
            raise UserError(
                f"film: kernel={self.kernel} needs a square grid of tokens, and {main} has {count}; choose kernel=1"
            )

        def dense(width: int, x: jax.Array, name: str) -> jax.Array:
            return nn.Dense(width, dtype=self.dtype, name=name)(x)

        h, real = with_learned_token(self, tokens[main], mask[main])
        projected = project_each(
            others, [masked_mean(tokens[m], mask[m]) for m in others], self.width, self.dtype, "condition"
        )
        condition = sum(zero_masked(x, mask[m].any(axis=1)) for m, x in zip(others, projected, strict=True))
        for block in range(self.blocks):
            u = nn.gelu(dense(self.width, h, f"block{block}_in"))
            v = self._convolved(zero_masked(u, real), f"block{block}_out")
            v = nn.LayerNorm(use_scale=not others, use_bias=not others, dtype=self.dtype, name=f"block{block}_norm")(v)
            if others:
                change = dense(2 * self.width, nn.gelu(condition), f"block{block}_film")[:, None]  # [B, 1, 2D]
                v = (1 + change[..., : self.width]) * v + change[..., self.width :]
            h = u + nn.gelu(v)
        return Fused(features=pooled_features(h, real, self.width, self.dtype), attention={})

    def _convolved(self, tokens: jax.Array, name: str) -> jax.Array:
        """Convolves the grid of tokens `[B, 1 + N, D]` after the first, which is a grid of its own."""
        if self.kernel == 1:
            return nn.Dense(self.width, dtype=self.dtype, name=name)(tokens)
        around = conv(self.width, self.kernel, 1, self.dtype, name=name)
        rows, side = tokens.shape[0], math.isqrt(tokens.shape[1] - 1)
        parts = around(tokens[:, :1, None]), around(tokens[:, 1:].reshape(rows, side, side, -1))
        return jnp.concatenate([part.reshape(rows, -1, self.width) for part in parts], axis=1)


class NLGate(nn.Module):
    """Non-local gate: the main modality's tokens plus what they find in the others (Wang et al. 2018).

    arXiv:1711.07971. y_i = x_i + W softmax_j(θ(x_i) · φ(z_j) / √(D / heads)) g(z_j), z the others' tokens (its own
    where it is alone).

    Attributes:
      width: width D of tokens and features.
      heads: attention heads; divides `width`.
      main: the modality that asks; empty: the first in sorted order.
    """

    width: int
    heads: int = 1
    main: str = ""
    dtype: Any = jnp.float32

    declares: ClassVar[Declaration] = Declaration(family="conditioning", paper="arXiv:1711.07971", needs_tokens=True)

    @nn.compact
    def __call__(self, tokens: dict[str, jax.Array], mask: dict[str, jax.Array], *, train: bool) -> Fused:
        """Fuses tokens `[B, N_m, D]` with masks `[B, N_m]` into features `[B, width]`.

        The attention returned is from (the learned token and) the main modality's tokens to each other modality's.

        Raises:
          UserError: `main` is none of the modalities, or `heads` does not divide `width`.
        """
        main, others = choose_main("nl_gate", self.main, tokens)
        keys = others or [main]
        x, real = with_learned_token(self, tokens[main], mask[main])
        context, context_mask, sizes = joined(tokens, mask, keys)
        attend = Attention(heads=self.heads, width=self.width, dtype=self.dtype, name="attention")
        found, weights = attend(x, context, context_mask)
        weights = jnp.where(real[:, None, :, None], weights, 0.0)[:, :, 1:]  # [B, h, N, Nk], the main's own tokens
        return Fused(
            features=pooled_features(x + found, real, self.width, self.dtype),
            attention=cut(weights, [main], [tokens[main].shape[1]], keys, sizes),
        )


class MAG(nn.Module):
    """Multimodal adaptation gate: the main tokens moved by the others, by `beta` of their own length at the most.

    Rahman et al. 2020 (arXiv:1908.05787). g_o = ReLU(G_o [z; x_o] + b_o), H = Σ_o g_o ⊙ (W_o x_o),
    z' = LN(z + min(β |z| / |H|, 1) H), with x_o the mean of the other modality's tokens, as nothing aligns the tokens,
    and without the paper's bias in H, so that an absent modality moves nothing.

    Attributes:
      width: width D of tokens and features.
      beta: how far tokens move, in their own lengths.
      main: the modality that is moved; empty: the first in sorted order.
    """

    width: int
    beta: float = 1.0
    main: str = ""
    dtype: Any = jnp.float32

    declares: ClassVar[Declaration] = Declaration(family="conditioning", paper="arXiv:1908.05787", needs_tokens=True)

    @nn.compact
    def __call__(self, tokens: dict[str, jax.Array], mask: dict[str, jax.Array], *, train: bool) -> Fused:
        """Fuses tokens `[B, N_m, D]` with masks `[B, N_m]` into features `[B, width]`.

        Raises:
          UserError: `main` is none of the modalities.
        """
        del train
        main, others = choose_main("mag", self.main, tokens)
        z, real = with_learned_token(self, tokens[main], mask[main])
        shift = 0.0
        for m in others:
            x = jnp.broadcast_to(masked_mean(tokens[m], mask[m])[:, None], z.shape)  # [B, 1 + N, D]
            gate = nn.relu(nn.Dense(self.width, dtype=self.dtype, name=f"gate_{m}")(jnp.concatenate([z, x], axis=-1)))
            moved = gate * nn.Dense(self.width, use_bias=False, dtype=self.dtype, name=f"project_{m}")(x)
            shift = shift + zero_masked(moved, mask[m].any(axis=1))
        if others:
            lengths = [jnp.sqrt(jnp.square(v).sum(-1, keepdims=True) + 1e-6) for v in (z, shift)]
            z = z + jnp.minimum(self.beta * lengths[0] / lengths[1], 1.0) * shift
        z = nn.LayerNorm(dtype=self.dtype, name="norm")(z)
        return Fused(features=pooled_features(z, real, self.width, self.dtype), attention={})
