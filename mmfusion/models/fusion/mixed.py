"""Decision-level strategies that also use features: mixture of experts, and unimodal plus joint predictions."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfusion.errors import UserError
from mmfusion.models.fusion.contract import Declaration
from mmfusion.models.fusion.late import Logits, Present, stack
from mmfusion.models.layers import masked_softmax, row_keys, zero_masked

GATES = ("soft", "top1")


def joint_hidden(features: dict[str, jax.Array], present: Present, width: int, dtype: Any) -> jax.Array:
    """Returns GELU(Σ_m W_m x_m + b_m) `[B, width]` over the present modalities; call it in a compact method."""
    projected = []
    for m in sorted(features):
        x = zero_masked(features[m], present[m]).astype(dtype)
        projected.append(zero_masked(nn.Dense(width, dtype=dtype, name=f"joint_{m}")(x), present[m]))
    return nn.gelu(sum(projected))


class MoE(nn.Module):
    """Σ_e g_e l_e over experts: one per modality and one joint expert (DynMM, Xue & Marculescu 2023, arXiv:2204.00102).

    The gate g is a softmax over the experts whose modality is present. The gate and the joint expert are linear in
    GELU(Σ_m W_m x_m + b_m). With `gate="top1"` one expert is selected: in evaluation the one of the largest gate, in
    training one sampled with Gumbel noise, with the gradient of the soft gate. The paper's cost term is not used.

    Attributes:
      width: hidden width of the gate and of the joint expert.
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
        """Fuses logits `[B, C]` where `present [B]` is True, gated by features `[B, D]`, into logits `[B, C]`.

        Raises:
          UserError: `gate` is unknown.
        """
        if self.gate not in GATES:
            raise UserError("unknown value", path="moe.gate", value=self.gate, choices=GATES)
        stacked, mask = stack(logits, present)  # [B, M, C], [B, M]
        if len(logits) == 1:  # a single modality needs no gate
            return stacked[:, 0]
        hidden = joint_hidden(features, present, self.width, self.dtype)
        joint = nn.Dense(stacked.shape[-1], name="joint")(hidden)
        experts = jnp.concatenate([stacked, joint[:, None]], axis=1)  # [B, M + 1, C]
        mask = jnp.concatenate([mask, mask.any(axis=1, keepdims=True)], axis=1)
        gate_logits = [nn.Dense(1, name=f"gate_{name}")(hidden) for name in (*sorted(logits), "joint")]
        scores = jnp.concatenate(gate_logits, axis=-1)  # [B, M + 1]
        if self.gate == "soft":
            return jnp.einsum("be,bec->bc", masked_softmax(scores, mask), experts)
        keys = row_keys(self, train=train)
        if keys is not None:
            scores = scores + jax.vmap(lambda key: jax.random.gumbel(key, scores.shape[1:]))(keys)
        soft_gate = masked_softmax(scores, mask)
        hard_gate = jax.nn.one_hot(soft_gate.argmax(axis=1), soft_gate.shape[1]) * mask
        return jnp.einsum("be,bec->bc", soft_gate + jax.lax.stop_gradient(hard_gate - soft_gate), experts)


class I2M2(nn.Module):
    """p ∝ p(y | x_1, ..., x_M) Π_m p(y | x_m): the sum of the unimodal and joint logits (Madaan et al. 2024).

    arXiv:2405.17613. The joint logits are linear in GELU(Σ_m W_m x_m + b_m) over the present modalities. All components
    are trained jointly. For regression, the predicted values are summed.

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
        stacked, _ = stack(logits, present)
        hidden = joint_hidden(features, present, self.width, self.dtype).astype(jnp.float32)
        return stacked.sum(axis=1) + nn.Dense(stacked.shape[-1], name="joint")(hidden)
