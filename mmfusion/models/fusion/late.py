"""Decision-level strategies, which fuse the logits of one head per modality."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfusion.errors import UserError
from mmfusion.models.fusion.contract import Declaration, learned_weights
from mmfusion.models.layers import zero_masked

Logits = dict[str, jax.Array]  # modality -> [B, C]
Present = dict[str, jax.Array]  # modality -> [B]


def stack(logits: Logits, present: Present) -> tuple[jax.Array, jax.Array]:
    """Returns the logits `[B, M, C]` in sorted order of modalities, zeros if absent, and their presence `[B, M]`."""
    mask = jnp.stack([present[m] for m in sorted(logits)], axis=1)  # [B, M]
    return zero_masked(jnp.stack([logits[m] for m in sorted(logits)], axis=1), mask), mask


def _needs_classes(strategy: str, outputs: int) -> None:
    if outputs < 2:
        raise UserError("its task has one output, not classes; choose late_mean for regression", path=strategy)


class LateMean(nn.Module):
    """Mean of the present modalities' logits, the geometric mean of their probabilities; zeros if none is present."""

    declares: ClassVar[Declaration] = Declaration(
        family="decision", level="decision", additive=True, synergy=False, symmetric=True
    )

    @nn.compact
    def __call__(self, logits: Logits, present: Present, *, train: bool) -> jax.Array:
        """Fuses logits `[B, C]` of the modalities where `present [B]` is True into logits `[B, C]`."""
        del train
        stacked, mask = stack(logits, present)
        return stacked.sum(axis=1) / jnp.maximum(mask.sum(axis=1, keepdims=True), 1)


class LateWeighted(nn.Module):
    """Σ_{m in P} w_m l_m, with w the softmax over the present modalities P of one learned scalar each."""

    declares: ClassVar[Declaration] = Declaration(
        family="decision", level="decision", additive=True, synergy=False, symmetric=True
    )

    @nn.compact
    def __call__(self, logits: Logits, present: Present, *, train: bool) -> jax.Array:
        """Fuses logits `[B, C]` of the modalities where `present [B]` is True into logits `[B, C]`."""
        del train
        stacked, mask = stack(logits, present)
        if len(logits) == 1:  # a single weight is always 1
            return stacked[:, 0]
        return jnp.einsum("bm,bmc->bc", learned_weights(self, sorted(logits), mask), stacked)


class ProductOfExperts(nn.Module):
    """p ∝ Π_{m in P} p_m over the present modalities, computed as the sum of their logits (Hinton 2002).

    doi:10.1162/089976602760128018. For regression it is the sum of the predictions, not a product of densities.
    """

    declares: ClassVar[Declaration] = Declaration(
        family="decision", paper="doi:10.1162/089976602760128018", level="decision", additive=True, synergy=False,
        symmetric=True,
    )  # fmt: skip

    @nn.compact
    def __call__(self, logits: Logits, present: Present, *, train: bool) -> jax.Array:
        """Fuses logits `[B, C]` of the modalities where `present [B]` is True into logits `[B, C]`."""
        del train
        return stack(logits, present)[0].sum(axis=1)


class Stacking(nn.Module):
    """Linear meta-learner on the modalities' logits, which are trained only by their own losses (Wolpert 1992).

    doi:10.1016/S0893-6080(05)80023-1. No gradient passes from the meta-learner to the logits. It is trained on the same
    examples as the modalities: the paper's held-out predictions require models trained beforehand.
    """

    declares: ClassVar[Declaration] = Declaration(
        family="decision", paper="doi:10.1016/S0893-6080(05)80023-1", level="decision", additive=True, synergy=False,
        symmetric=True, unimodal_loss=True,
    )  # fmt: skip

    @nn.compact
    def __call__(self, logits: Logits, present: Present, *, train: bool) -> jax.Array:
        """Fuses logits `[B, C]` of the modalities where `present [B]` is True into logits `[B, C]`."""
        del train
        stacked, mask = stack(jax.lax.stop_gradient(logits), present)
        size = stacked.shape[-1]
        projected = [nn.Dense(size, name=f"meta_{m}")(stacked[:, i]) for i, m in enumerate(sorted(logits))]
        return zero_masked(jnp.stack(projected, axis=1), mask).sum(axis=1)


class TMC(nn.Module):
    """Trusted multi-view classification: evidence combined by Dempster's rule (Han et al. 2021, arXiv:2102.02051).

    Evidence e_m = softplus(l_m) defines Dirichlet parameters α_m = 1 + e_m. The reduced rule, applied to one modality
    after another, has the closed form α = 1 + C (Π_m (1 + e_m / C) - 1); an absent modality has e = 0. The returned
    logits are log α, whose softmax is the mean of the Dirichlet. The loss, of each modality and of the fusion, is the
    expected cross-entropy ψ(Σα) - ψ(α_y), and a divergence that penalises evidence for wrong classes and whose weight
    rises during training, see `objectives/evidence.py`.

    Attributes:
      loss: `digamma`, the paper's; or `task`, the task's own on log α: of cross-entropy -log E[p_y] (type II maximum
        likelihood, Sensoy et al. 2018, arXiv:1806.01768), without the divergence.
      anneal: steps over which the weight of the divergence rises from 0 to 1 (the authors: 50 of 500 epochs); 0: none.
    """

    loss: str = "digamma"
    anneal: int = 500

    declares: ClassVar[Declaration] = Declaration(
        family="decision", paper="arXiv:2102.02051", level="decision", synergy=False, symmetric=True,
        unimodal_loss=True, classes_only=True,
    )  # fmt: skip

    @staticmethod
    def unimodal(logits: jax.Array) -> jax.Array:
        """Returns log α `[B, C]` of the logits of one modality."""
        return jnp.log1p(nn.softplus(logits))

    @nn.compact
    def __call__(self, logits: Logits, present: Present, *, train: bool) -> jax.Array:
        """Fuses logits `[B, C]` of the modalities where `present [B]` is True into log α `[B, C]`.

        Raises:
          UserError: the task has a single output and is not a classification, or an option is out of range.
        """
        del train
        stacked, mask = stack(logits, present)
        classes = stacked.shape[-1]
        _needs_classes("tmc", classes)
        if self.loss not in (choices := ("digamma", "task")):
            raise UserError("unknown value", path="tmc.loss", value=self.loss, choices=choices)
        if self.anneal < 0:
            raise UserError("must not be negative", path="tmc.anneal", value=self.anneal)
        evidence = zero_masked(nn.softplus(stacked), mask)  # [B, M, C]
        return jnp.log1p(classes * jnp.expm1(jnp.log1p(evidence / classes).sum(axis=1)))


def energy_confidence(logits: jax.Array, temperature: float, centred: bool) -> jax.Array:
    """Returns the negative energy, T log Σ_k e^{l_k / T}, of logits `[..., C]`: `[..., 1]`."""
    if centred:
        logits = logits - logits.mean(axis=-1, keepdims=True)
    return temperature * jax.nn.logsumexp(logits / temperature, axis=-1, keepdims=True)


class QMF(nn.Module):
    """Σ_{m in P} c_m l_m with confidence c_m = T log Σ_k e^{l_mk / T}, the negative energy (Zhang et al. 2023).

    arXiv:2306.02050. No gradient passes through c_m, and each modality has its own loss. A regulariser ranks the
    confidences of two examples by their past losses, see `objectives/ranking.py`. The authors' code fuses with
    c_m / 10: the predicted class is the same, but most probabilities are close to chance.

    Attributes:
      temperature: temperature T, above 0.
      ranking: weight of the regulariser; 0: none.
      history: number of examples whose past losses are kept; two with the same row number modulo it share theirs.
      centred: compute the energy from logits centred at mean 0. The authors' is of logits as they are: on their shift
        no loss of a single example depends, so that confidences can be negative, which swaps the predicted classes.
    """

    temperature: float = 1.0
    ranking: float = 1.0
    history: int = 65536
    centred: bool = True

    declares: ClassVar[Declaration] = Declaration(
        family="decision", paper="arXiv:2306.02050", level="decision", additive=True, synergy=False, symmetric=True,
        unimodal_loss=True, classes_only=True,
    )  # fmt: skip

    @nn.compact
    def __call__(self, logits: Logits, present: Present, *, train: bool) -> jax.Array:
        """Fuses logits `[B, C]` of the modalities where `present [B]` is True into logits `[B, C]`.

        Raises:
          UserError: the task has a single output and is not a classification, or an option is out of range.
        """
        del train
        stacked, mask = stack(logits, present)
        _needs_classes("qmf", stacked.shape[-1])
        if not self.temperature > 0:
            raise UserError("must be above 0", path="qmf.temperature", value=self.temperature)
        if self.ranking < 0:
            raise UserError("must not be negative", path="qmf.ranking", value=self.ranking)
        if self.history < 1:
            raise UserError("must be at least 1", path="qmf.history", value=self.history)
        confidence = energy_confidence(stacked, self.temperature, self.centred)  # [B, M, 1]
        return (zero_masked(jax.lax.stop_gradient(confidence), mask) * stacked).sum(axis=1)
