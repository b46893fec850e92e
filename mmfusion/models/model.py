"""The model: one encoder a modality → fusion → one linear head a task.

B batch · N tokens · D width · C outputs of a task
"""

import dataclasses
import functools
from collections.abc import Collection, Mapping
from typing import Any

import flax.core
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from mmfusion.data.batch import Batch
from mmfusion.errors import UserError, nearest
from mmfusion.models.encoders import ENCODERS
from mmfusion.models.fusion import FUSIONS
from mmfusion.models.layers import masked_mean, zero_masked

Tokens = dict[str, jax.Array]
Masks = dict[str, jax.Array]

# Fields of encoders and strategies that the model gives them; every other field is an option of the config.
SUPPLIED = frozenset(
    {"width", "dtype", "axis_name", "vocabulary", "rate", "categories", "entities", "relations", "modalities"}
)


# What every encoder's config may say beside the encoder's own options.
ENCODER_OPTIONS = {
    "init": "",  # where it begins: a safetensors file, folder or hub id, or run:WORKDIR; empty: drawn
    "freeze": 0,  # steps in which it does not learn; those of the whole run: never
    "layer_decay": 1.0,  # factor of the learning rate from each layer to the one before
    "share": "",  # another modality, whose encoder, the same weights, reads this one, too
    "join": (),  # other modalities of the same size, whose channels it reads beside its own (they need no encoder)
}


@flax.struct.dataclass
class Encoded:
    """A batch as the encoders leave it.

    Attributes:
      pooled: per modality the mean of its real tokens `[B, D]`; zeros where it is absent.
      present: per modality which rows have it `[B]` bool.
    """

    pooled: dict[str, jax.Array]
    present: dict[str, jax.Array]


@flax.struct.dataclass
class Outputs:
    """What a model returns, whatever `train` is.

    Attributes:
      logits: per task `[B, C]` float32.
      features: what the heads read `[B, D]`; at decision level the mean of the present modalities' pooled tokens.
      attention: weights `[B, heads, N_query, N_key]` by (query modality, key modality); empty without attention.
      unimodal: per task and modality its own logits `[B, C]`, where a strategy or an objective scores them; else empty.
      present: per modality which rows have it `[B]` bool.
      auxiliary: per auxiliary objective the loss of each row `[B]`.
      log_variance: per task a learned log variance, where tasks are weighed by it; else empty.
    """

    logits: dict[str, jax.Array]
    features: jax.Array
    attention: dict[tuple[str, str], jax.Array]
    unimodal: dict[str, dict[str, jax.Array]]
    present: dict[str, jax.Array]
    auxiliary: dict[str, jax.Array]
    log_variance: dict[str, jax.Array]


class FusionModel(nn.Module):
    """Encoders, a fusion strategy and linear heads.

    Attributes:
      encoders: an encoder per modality (mappings are FrozenDicts where the model must be hashable).
      fusion: a feature-level or decision-level strategy.
      tasks: (task, number of outputs) pairs.
      shares: modality -> the modality whose encoder, the same weights, reads it, too.
      joins: modality -> those whose channels its encoder reads beside its own; they have no tokens of their own.
      frozen: modalities whose encoders are as in evaluation.
      auxiliaries: objectives beside the tasks'; one of them may predict the features of an absent modality.
      unimodal: what scores each modality alone: `heads`; `probes`, which only watch (those of feature-level strategies
        learn, and no gradient reaches the encoders); or empty.
      uncertain: learn a variance for each task.
    """

    encoders: Mapping[str, nn.Module]
    fusion: nn.Module
    tasks: tuple[tuple[str, int], ...]
    shares: Mapping[str, str] = flax.core.FrozenDict()
    joins: Mapping[str, tuple[str, ...]] = flax.core.FrozenDict()
    frozen: tuple[str, ...] = ()
    auxiliaries: Mapping[str, nn.Module] = flax.core.FrozenDict()
    unimodal: str = ""
    uncertain: bool = False

    @property
    def modalities(self) -> list[str]:
        """The modalities that have tokens, sorted."""
        return sorted({*self.encoders, *self.shares})

    @property
    def own_losses(self) -> bool:
        """Whether the modalities' own losses are part of the loss: not where they are heads anyway and only watched."""
        return (
            bool(self.unimodal) if self._by_features else self.unimodal == "heads" or self.fusion.declares.unimodal_loss
        )

    @property
    def probed(self) -> bool:
        """Whether the modalities' own losses teach probes alone, and so must not weigh in what a task counts."""
        return self.unimodal == "probes" and self._by_features

    @property
    def _by_features(self) -> bool:
        return self.fusion.declares.level == "feature"

    def __call__(self, batch: Batch, *, train: bool) -> Outputs:
        """Returns the Outputs of a batch whose pictures are normalised float32 by now.

        Rows of weight 0 count as absent. Modalities of the batch that no encoder reads are ignored.
        """
        tokens, mask = self.encode(batch, train=train)
        encoded = Encoded(
            pooled={m: masked_mean(tokens[m], mask[m]).astype(jnp.float32) for m in tokens},
            present={m: real.any(axis=1) for m, real in mask.items()},
        )
        losses = {name: auxiliary(encoded, train=train) for name, auxiliary in self.auxiliaries.items()}
        for auxiliary in self.auxiliaries.values():
            if getattr(auxiliary, "fill", False):
                tokens, mask = _filled(tokens, mask, encoded, auxiliary.impute(encoded))
        return self.fuse(tokens, mask, train=train).replace(present=encoded.present, auxiliary=losses)

    def presence(self, batch: Batch) -> Masks:
        """Returns per modality with tokens which rows have it `[B]`; of joined ones, have any of them."""
        return {
            m: functools.reduce(jnp.logical_or, [batch.present[name] for name in (m, *self.joins.get(m, ()))])
            & (batch.weight > 0)
            for m in self.modalities
        }

    def encode(self, batch: Batch, *, train: bool) -> tuple[Tokens, Masks]:
        """Returns the tokens `[B, N, D]` of each modality that has some, and which are real `[B, N]`."""
        tokens, mask = {}, {}
        for m in self.modalities:
            x, there = self._input(batch, m)
            owner = self.shares.get(m, m)
            encoded, real = self.encoders[owner](x, there, train=train and owner not in self.frozen)
            tokens[m], mask[m] = zero_masked(encoded, real), real  # [B, N, D], [B, N]
        return tokens, mask

    def _input(self, batch: Batch, m: str) -> tuple[jax.Array, jax.Array]:
        """Returns what the encoder of `m` reads, and its mask; zeros stand for the channels of what is absent."""
        rows = {name: batch.present[name] & (batch.weight > 0) for name in (m, *self.joins.get(m, ()))}  # [B]
        parts = [zero_masked(batch.inputs[name], there) for name, there in rows.items()]
        masks = [batch.mask[name] & there[:, None] for name, there in rows.items()]
        if len(parts) == 1:
            return parts[0], masks[0]
        if len({part.shape[:-1] for part in parts}) > 1:
            sizes = ", ".join(f"{name} {part.shape[1:-1]}" for name, part in zip(rows, parts, strict=True))
            raise UserError(f"model.encoders.{m}.join: what is joined must have one size, here {sizes}")
        return jnp.concatenate(parts, axis=-1), functools.reduce(jnp.logical_or, masks)

    @nn.compact
    def fuse(self, tokens: Tokens, mask: Masks, *, train: bool) -> Outputs:
        """Returns the Outputs of encoded modalities: tokens `[B, N, D]` with their masks `[B, N]`."""
        present = {m: mask[m].any(axis=1) for m in tokens}  # [B]
        pooled = {m: masked_mean(tokens[m], mask[m]).astype(jnp.float32) for m in tokens}  # [B, D]
        names = [task for task, _ in self.tasks] if self.uncertain else []
        log_variance = {task: self.param(f"log_variance_{task}", nn.initializers.zeros, ()) for task in names}
        if self._by_features:
            fused = self.fusion(tokens, mask, train=train)
            features = self._mixed(fused.features.astype(jnp.float32), train=train)
            logits = {task: self._head(size, task)(features) for task, size in self.tasks}
            seen = {m: self._mixed(x, train=train) for m, x in pooled.items()}
            seen = jax.lax.stop_gradient(seen) if self.unimodal == "probes" else seen
            own = "probes" if self.unimodal == "probes" else "unimodal"
            unimodal = {
                task: {m: nn.Dense(size, name=f"{own}_{task}_{m}")(x) for m, x in seen.items()}
                for task, size in (self.tasks if self.unimodal else ())
            }
            return Outputs(logits, features, fused.attention, unimodal, present, {}, log_variance)

        pooled = {m: self._mixed(x, train=train) for m, x in pooled.items()}
        more = {"features": pooled} if self.fusion.declares.level == "mixed" else {}
        scored = getattr(self.fusion, "unimodal", lambda logits: logits)
        logits, unimodal = {}, {}
        for task, size in self.tasks:
            each = {m: self._head(size, f"{task}_{m}")(pooled[m]) for m in pooled}  # [B, C]
            fusion = self.fusion if len(self.tasks) == 1 else self.fusion.clone(parent=self, name=f"fusion_{task}")
            logits[task] = fusion(each, present, **more, train=train)
            if self.fusion.declares.unimodal_loss or self.unimodal:
                unimodal[task] = {m: scored(one) for m, one in each.items()}
        features = masked_mean(jnp.stack(list(pooled.values()), axis=1), jnp.stack(list(present.values()), axis=1))
        return Outputs(logits, features, {}, unimodal, present, {}, log_variance)

    def _mixed(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Returns features `[B, D]`, mixed with a partner's where the step says so (`mixing.Mix`)."""
        mix = self.scope.root.get_variable("rows", "mix") if train else None
        if mix is None:
            return x
        return mix.share[:, None] * x + (1 - mix.share[:, None]) * x[mix.partner]

    def _head(self, size: int, name: str) -> nn.Dense:
        return nn.Dense(size, name=f"heads_{name}")


def _filled(tokens: Tokens, mask: Masks, encoded: Encoded, predicted: Tokens) -> tuple[Tokens, Masks]:
    """Returns the tokens with a predicted one first where a modality is absent and another is there."""
    some = functools.reduce(jnp.logical_or, encoded.present.values())  # [B]
    tokens, mask = dict(tokens), dict(mask)
    for m, vector in predicted.items():
        absent = (some & ~encoded.present[m])[:, None]  # [B, 1]
        first = jnp.where(absent, vector.astype(tokens[m].dtype), tokens[m][:, 0])
        tokens[m], mask[m] = tokens[m].at[:, 0].set(first), mask[m].at[:, :1].set(mask[m][:, :1] | absent)
    return tokens, mask


def options(module_class: type[nn.Module]) -> dict[str, Any]:
    """Returns the options of an encoder or strategy with their defaults: what its config may set."""
    hidden = SUPPLIED | {"parent", "name"}
    return {field.name: field.default for field in dataclasses.fields(module_class) if field.name not in hidden}


def build(
    config: Mapping[str, Any],
    spec: Mapping[str, Mapping[str, Any]],
    tasks: Mapping[str, int],
    *,
    axis_name: str | None = None,
    dtype: Any = jnp.float32,
    frozen: Collection[str] = (),
    objectives: Mapping[str, Any] = flax.core.FrozenDict(),
    auxiliaries: Mapping[str, type[nn.Module]] = flax.core.FrozenDict(),
) -> FusionModel:
    """Returns the model that `config.model` describes.

    Args:
      config: `width`, `encoders.<modality>` = {name, **options, **ENCODER_OPTIONS}, `fusion` = {name, **options}.
      spec: what the data says of each modality: {"vocabulary": ids}, {"rate": Hz}, {"categories": (n, ...)},
        {"entities": n, "relations": n} or {}.
      tasks: number of outputs per task.
      axis_name: the device axis that batch normalisation adds over, None outside pmap.
      dtype: of the computation; parameters, statistics and logits are float32.
      frozen: modalities whose encoders are as in evaluation; who takes steps leaves them as they are (`freezing`).
      objectives: the section `objectives` of a config.
      auxiliaries: classes of those objectives that are modules, by name.

    Raises:
      UserError: no encoder, a modality the data does not have, an unknown name or option, or an encoder that needs
        what the data does not say of the modality.
    """
    if not config["encoders"]:
        raise UserError("model.encoders is empty; give an encoder to at least one modality")
    supplied = {"width": config["width"], "axis_name": axis_name, "dtype": dtype}
    encoders, shares, joins = {}, {}, {}
    for m, encoder in config["encoders"].items():
        if m not in spec:
            raise UserError(f"model.encoders.{m}: the data has no such modality; it has {', '.join(sorted(spec))}")
        own = {key: value for key, value in encoder.items() if key not in ENCODER_OPTIONS}
        if encoder.get("share"):
            shares[m] = encoder["share"]
        else:
            encoders[m] = build_module(ENCODERS, own, f"model.encoders.{m}", {**supplied, **spec[m]})
        if encoder.get("join"):
            joins[m] = tuple(encoder["join"])
    fusion = build_module(FUSIONS, config["fusion"], "model.fusion", supplied)
    known = {**supplied, "modalities": tuple(sorted({*encoders, *shares}))}
    modules = {
        name: build_module(auxiliaries, {"name": name, **section}, f"objectives.{name}", known)
        for name, section in objectives.items()
        if name in auxiliaries
    }
    return FusionModel(
        encoders=flax.core.FrozenDict(encoders),
        fusion=fusion,
        tasks=tuple(sorted(tasks.items())),
        shares=flax.core.FrozenDict(shares),
        joins=flax.core.FrozenDict(joins),
        frozen=tuple(sorted(frozen)),
        auxiliaries=flax.core.FrozenDict(modules),
        unimodal="heads"
        if {"unimodal", "gradient_blending"} & set(objectives)
        else "probes" * ("ogm_ge" in objectives),
        uncertain="uncertainty" in objectives,
    )


def build_module(
    classes: Mapping[str, type[nn.Module]], config: Mapping[str, Any], path: str, supplied: Mapping[str, Any]
) -> nn.Module:
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k != "weight"}
    name = given.pop("name")
    if name not in classes:
        raise UserError(f"{path}.name={name!r} is unknown: {nearest(name, classes)}")
    known = options(classes[name])
    for key in given:
        if key not in known:
            raise UserError(f"{path}.{key} is no option of {name}: {nearest(key, known)}")
    taken = {field.name for field in dataclasses.fields(classes[name])} & SUPPLIED
    if missing := taken - set(supplied):
        raise UserError(f"{path}: {name} needs {', '.join(sorted(missing))}, which this modality does not have")
    return classes[name](**given, **{k: supplied[k] for k in taken})
