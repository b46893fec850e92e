"""The model: one encoder per modality → fusion → one linear head per task.

B batch · N tokens · D width · C outputs of a task · m modality
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, cast

import flax.core
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from mmfusion.data.batch import Batch
from mmfusion.errors import UserError
from mmfusion.models.layers import masked_mean, zero_masked

Tokens = dict[str, jax.Array]
Masks = dict[str, jax.Array]


@flax.struct.dataclass
class Encoded:
    """Pooled outputs of the encoders; the input of auxiliary objectives.

    Attributes:
      pooled: per modality, the mean `[B, D]` of its unmasked tokens; zeros where the modality is absent.
      present: per modality, its presence in each example, `[B]` bool.
    """

    pooled: dict[str, jax.Array]
    present: dict[str, jax.Array]


@flax.struct.dataclass
class Outputs:
    """Outputs of the model, in training and in evaluation.

    Attributes:
      logits: per task, `[B, C]` float32.
      features: inputs of the heads `[B, D]`; at decision level, the mean of the present modalities' pooled tokens.
      attention: attention weights `[B, heads, N_query, N_key]` by (query modality, key modality); empty without
        attention.
      unimodal: per task and modality, the unimodal logits `[B, C]`; empty unless the strategy or an objective uses
        them.
      present: per modality, its presence in each example, `[B]` bool.
      auxiliary: per auxiliary objective, the loss of each example `[B]`.
    """

    logits: dict[str, jax.Array]
    features: jax.Array
    attention: dict[tuple[str, str], jax.Array]
    unimodal: dict[str, dict[str, jax.Array]]
    present: dict[str, jax.Array]
    auxiliary: dict[str, jax.Array]


class FusionModel(nn.Module):
    """Encoders, a fusion strategy and linear heads.

    Attributes:
      encoders: one encoder per modality. Mappings are FrozenDicts, which makes the model hashable.
      fusion: a feature-level, decision-level or mixed strategy.
      tasks: (task, number of outputs) pairs.
      shares: modality -> the modality whose encoder, with shared weights, also encodes it.
      joins: modality -> modalities whose channels are concatenated to its own; they have no tokens of their own.
      frozen: modalities whose encoders run in evaluation mode.
      auxiliaries: modules of auxiliary objectives; at most one of them imputes the features of absent modalities.
      unimodal: `heads` adds a head per modality and task; `probes` adds heads behind a stop-gradient, which train no
        encoder (a decision-level strategy uses its own heads, and one with branches heads of these); empty adds none.
      scalars: names of scalar parameters, initialised to 0, that objectives read.
    """

    encoders: Mapping[str, nn.Module]
    fusion: nn.Module
    tasks: tuple[tuple[str, int], ...]
    shares: Mapping[str, str] = flax.core.FrozenDict()
    joins: Mapping[str, tuple[str, ...]] = flax.core.FrozenDict()
    frozen: tuple[str, ...] = ()
    auxiliaries: Mapping[str, nn.Module] = flax.core.FrozenDict()
    unimodal: str = ""
    scalars: tuple[str, ...] = ()

    @property
    def modalities(self) -> list[str]:
        """The modalities that have tokens, sorted."""
        return sorted({*self.encoders, *self.shares})

    @property
    def has_unimodal_losses(self) -> bool:
        """Whether the loss includes unimodal losses; the probes of a decision-level strategy are its own heads."""
        if self._is_feature_level:
            return bool(self.unimodal) or self._has_branches
        return self.unimodal == "heads" or self.fusion.declares.unimodal_loss

    @property
    def uses_probes(self) -> bool:
        """Whether the unimodal losses train only probes and are excluded from a task's loss."""
        return self.unimodal == "probes" and self._is_feature_level and not self._has_branches

    @property
    def _has_branches(self) -> bool:
        return getattr(self.fusion, "branch_losses", False)

    @property
    def _is_feature_level(self) -> bool:
        return self.fusion.declares.level == "feature"

    def __call__(self, batch: Batch, *, train: bool) -> Outputs:
        """Returns the Outputs for a preprocessed batch, whose images are normalised float32.

        Examples of weight 0 are treated as absent. Modalities of the batch without an encoder are ignored.
        """
        tokens, mask = self.encode(batch, train=train)
        encoded = Encoded(
            pooled={m: masked_mean(tokens[m], mask[m]).astype(jnp.float32) for m in tokens},
            present={m: mask[m].any(axis=1) for m in mask},
        )
        losses = {name: auxiliary(encoded, train=train) for name, auxiliary in self.auxiliaries.items()}
        for auxiliary in self.auxiliaries.values():
            if getattr(auxiliary, "fill", False):
                tokens, mask = _fill_absent(tokens, mask, encoded, auxiliary.impute(encoded))
        outputs = self.fuse(tokens, mask, train=train)
        return dataclasses.replace(outputs, present=encoded.present, auxiliary=losses)

    def presence(self, batch: Batch) -> Masks:
        """Returns per modality with tokens the presence `[B]` bool of it or of any modality joined to it."""
        return {
            m: functools.reduce(jnp.logical_or, [batch.present[name] for name in (m, *self.joins.get(m, ()))])
            & (batch.weight > 0)
            for m in self.modalities
        }

    def encode(self, batch: Batch, *, train: bool) -> tuple[Tokens, Masks]:
        """Returns the tokens `[B, N, D]` of each modality and their masks `[B, N]`."""
        tokens, mask = {}, {}
        for m in self.modalities:
            encoded, mask[m] = self.encode_one(batch, m, train=train)
            tokens[m] = zero_masked(encoded, mask[m])
        return tokens, mask

    def encode_one(self, batch: Batch, m: str, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Returns the tokens `[B, N, D]` of one modality, of any value where masked, and their mask `[B, N]`."""
        encoder_name = self.shares.get(m, m)
        return self.encoders[encoder_name](
            *self._encoder_input(batch, m), train=train and encoder_name not in self.frozen
        )

    def _encoder_input(self, batch: Batch, m: str) -> tuple[jax.Array, jax.Array]:
        """Returns a modality's encoder input and its mask; the channels of an absent modality are zeros."""
        present = {name: batch.present[name] & (batch.weight > 0) for name in (m, *self.joins.get(m, ()))}  # [B]
        inputs = [zero_masked(batch.inputs[name], rows) for name, rows in present.items()]
        masks = [batch.mask[name] & rows[:, None] for name, rows in present.items()]
        if len(inputs) == 1:
            return inputs[0], masks[0]
        if len({x.shape[:-1] for x in inputs}) > 1:
            sizes = ", ".join(f"{name} {x.shape[1:-1]}" for name, x in zip(present, inputs, strict=True))
            raise UserError(
                f"joined modalities must have the same size, got {sizes}", path=f"config.model.encoders.{m}.join"
            )
        return jnp.concatenate(inputs, axis=-1), functools.reduce(jnp.logical_or, masks)

    @nn.compact
    def fuse(self, tokens: Tokens, mask: Masks, *, train: bool) -> Outputs:
        """Returns the Outputs for encoded modalities: tokens `[B, N, D]` with masks `[B, N]`."""
        present = {m: mask[m].any(axis=1) for m in tokens}  # [B]
        pooled = {m: masked_mean(tokens[m], mask[m]).astype(jnp.float32) for m in tokens}  # [B, D]
        pooled = {m: self._mix_rows(x, train=train) for m, x in pooled.items()}
        for name in self.scalars:
            self.param(name, nn.initializers.zeros, ())
        if self._is_feature_level:
            fused = self.fusion(tokens, mask, train=train)
            features, attention = self._mix_rows(fused.features.astype(jnp.float32), train=train), fused.attention
            logits = {task: self._head(num_outputs, task)(features) for task, num_outputs in self.tasks}
            branches = {m: self._mix_rows(x.astype(jnp.float32), train=train) for m, x in fused.branches.items()}
            unimodal = self._unimodal_heads(branches or pooled) if self.has_unimodal_losses else {}
        else:
            logits, unimodal = self._fuse_decisions(pooled, present, train=train)
            stacked, stacked_mask = (jnp.stack(list(values.values()), axis=1) for values in (pooled, present))
            features, attention = masked_mean(stacked, stacked_mask), {}
        return Outputs(logits, features, attention, unimodal, present, {})

    def _unimodal_heads(self, pooled: Tokens) -> dict[str, dict[str, jax.Array]]:
        """Returns the logits `[B, C]` per task and modality of a feature-level strategy's additional heads."""
        prefix = "unimodal"
        if self.uses_probes:
            prefix, pooled = "probes", jax.lax.stop_gradient(pooled)
        return {
            task: {m: nn.Dense(num_outputs, name=f"{prefix}_{task}_{m}")(x) for m, x in pooled.items()}
            for task, num_outputs in self.tasks
        }

    def _fuse_decisions(
        self, pooled: Tokens, present: Masks, *, train: bool
    ) -> tuple[dict[str, jax.Array], dict[str, dict[str, jax.Array]]]:
        """Returns the fused logits `[B, C]` per task, and the unimodal logits if a loss uses them."""
        declares = self.fusion.declares
        extra = {"features": pooled} if declares.level == "mixed" else {}
        logits, unimodal = {}, {}
        for task, num_outputs in self.tasks:
            decisions = {m: self._head(num_outputs, f"{task}_{m}")(x) for m, x in pooled.items()}  # [B, C]
            fusion = self.fusion if len(self.tasks) == 1 else self.fusion.clone(parent=self, name=f"fusion_{task}")
            logits[task] = fusion(decisions, present, **extra, train=train)
            if declares.unimodal_loss or self.unimodal:
                unimodal_logits = getattr(self.fusion, "unimodal", None)
                unimodal[task] = {m: unimodal_logits(x) for m, x in decisions.items()} if unimodal_logits else decisions
        return logits, unimodal

    def _mix_rows(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Returns features `[B, D]`, interpolated with the neighbour's by the shares `mix` of the collection `rows`."""
        mix = cast(Any, self.scope).root.get_variable("rows", "mix") if train else None  # [B]
        if mix is None:
            return x
        return mix[:, None] * x + (1 - mix[:, None]) * x[jnp.arange(len(x)) ^ 1]

    def _head(self, num_outputs: int, name: str) -> nn.Dense:
        return nn.Dense(num_outputs, name=f"heads_{name}")


def _fill_absent(tokens: Tokens, mask: Masks, encoded: Encoded, predictions: Tokens) -> tuple[Tokens, Masks]:
    """Returns the tokens with a prediction as the first token of each absent modality, if another is present."""
    any_present = functools.reduce(jnp.logical_or, encoded.present.values())  # [B]
    tokens, mask = dict(tokens), dict(mask)
    for m, predicted_token in predictions.items():
        absent = (any_present & ~encoded.present[m])[:, None]  # [B, 1]
        first_token = jnp.where(absent, predicted_token.astype(tokens[m].dtype), tokens[m][:, 0])
        tokens[m], mask[m] = tokens[m].at[:, 0].set(first_token), mask[m].at[:, :1].set(mask[m][:, :1] | absent)
    return tokens, mask
