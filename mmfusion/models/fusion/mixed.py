"""Decision-level strategies that read features beside the logits: a mixture of experts, and unimodal plus joint."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfusion.errors import UserError
from mmfusion.models.fusion.contract import Declaration
from mmfusion.models.fusion.late import Logits, Present, stack
from mmfusion.models.layers import masked_softmax, zero_masked

GATES = ("soft", "top1")


def joint_hidden(features: dict[str, jax.Array], present: Present, width: int, dtype: Any) -> jax.Array:
    """Returns GELU(Σ_m W_m x_m + b_m) `[B, width]` over the present modalities; call it in a compact method."""
    each = []
    for m in sorted(features):
        x = zero_masked(features[m], present[m]).astype(dtype)
        each.append(zero_masked(nn.Dense(width, dtype=dtype, name=f"joint_{m}")(x), present[m]))
    return nn.gelu(sum(each))


class MoE(nn.Module):
    """Σ_m g_m l_m, a modality being an expert and g a gate that reads all of them (Xue & Marculescu 2023, DynMM).

    arXiv:2204.00102. g is the softmax over present modalities of an MLP's scores; with `gate="top1"` only the expert
    of the largest g is kept, still scaled by it, so that the gate is trained.

    Attributes:
      width: hidden width of the gate.
      gate: `soft` or `top1`.
    """

    width: int
    gate: str = "soft"
    dtype: Any = jnp.float32

    declares: ClassVar[Declaration] = Declaration(
        family="decision", paper="arXiv:2204.00102", level="mixed", symmetric=True
    )

    @nn.compact
    def __call__(self, logits: Logits, present: Present, *, features: dict[str, jax.Array], train: bool) -> jax.Array:
        """Fuses logits `[B, C]` where `present [B]` is True, by what features `[B, D]` say, into logits `[B, C]`.

        Raises:
          UserError: `gate` is unknown.
        """
        del train
        if self.gate not in GATES:
            raise UserError(f"moe: gate={self.gate!r} is unknown; choose {', '.join(GATES)}")
        each, there = stack(logits, present)  # [B, M, C], [B, M]
        if len(logits) == 1:  # one expert needs no gate
            return each[:, 0]
        hidden = joint_hidden(features, present, self.width, self.dtype)
        scores = [nn.Dense(1, dtype=self.dtype, name=f"gate_{m}")(hidden) for m in sorted(logits)]
        gates = masked_softmax(jnp.concatenate(scores, axis=-1), there)  # [B, M]
        if self.gate == "top1":
            gates = jnp.where(jnp.arange(gates.shape[1]) == gates.argmax(axis=1, keepdims=True), gates, 0.0)
        return jnp.einsum("bm,bmc->bc", gates, each)


class I2M2(nn.Module):
    """p ∝ p(y | x_1, ..., x_M) Π_m p(y | x_m): the modalities' logits plus joint ones (Madaan et al. 2024).

    arXiv:2405.17613. The joint logits are linear in GELU(Σ_m W_m x_m + b_m) of the present modalities.

    Attributes:
      width: hidden width of the joint model.
    """

    width: int
    dtype: Any = jnp.float32

    declares: ClassVar[Declaration] = Declaration(
        family="decision", paper="arXiv:2405.17613", level="mixed", symmetric=True
    )

    @nn.compact
    def __call__(self, logits: Logits, present: Present, *, features: dict[str, jax.Array], train: bool) -> jax.Array:
        """Fuses logits `[B, C]` where `present [B]` is True, with features `[B, D]`, into logits `[B, C]`."""
        del train
        each, _ = stack(logits, present)
        hidden = joint_hidden(features, present, self.width, self.dtype).astype(jnp.float32)
        return each.sum(axis=1) + nn.Dense(each.shape[-1], name="joint")(hidden)
