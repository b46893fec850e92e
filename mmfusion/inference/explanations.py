"""Attributes predictions to pixels, words, columns and so on by integrated gradients.

B batch · N positions · T tokens or time · F columns, bands or features · C classes
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmfusion.data.batch import Batch
from mmfusion.data.table import category_counts
from mmfusion.data.targets import Scale
from mmfusion.inference import rows as input_rows
from mmfusion.inference.integrated_gradients import integrated_gradients
from mmfusion.inference.rows import Row
from mmfusion.models.encoders.audio import SpecAugment
from mmfusion.models.model import FusionModel, Outputs
from mmfusion.training.restore import Run

BATCH = 16  # rows per batch; gradients take several times the memory of a prediction
NOT_FINITE = "its gradients are not finite"
CHANNELS_LAST = ("image", "images", "video")  # modality types whose attributions are summed over channels

Layers = dict[str, jax.Array]  # "MODALITY/NUMBER" -> output of a layer that stands in for the input


@dataclasses.dataclass(frozen=True)
class Attribution:
    """What one output for one row is attributed to, relative to a baseline.

    The attributions of all modalities sum to `value - baseline`, up to `gap`.

    Attributes:
      output: the most probable class, whose log odds are explained; for regression the task, or `log TASK` if the model
        predicts the logarithm.
      value: log p / (1 - p) of the class, not calibrated; or the value in the units of the data (or its logarithm).
      baseline: the same for the baseline.
      gap: the difference of the sum and `value - baseline`, in the same units.
      modalities: per present modality the attributions, float32, zeros at padded positions: image `[H, W]`, images and
        video `[K, H, W]`, text `[T]`, table `[F]`, embedding `[D]`, sequence `[T, D]`, graph `[N, F + N]`, knowledge
        `[N]`, audio `[T, F]` of the spectrogram, or of the samples `[S]` if the encoder reads those.
    """

    output: str
    value: float
    baseline: float
    gap: float
    modalities: dict[str, np.ndarray]

    def total(self, modality: str) -> float:
        """Returns the sum over a modality."""
        return float(self.modalities[modality].sum(dtype=np.float64))


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What the predictions for one row are attributed to.

    Attributes:
      inputs: per present modality its decoded input, as in `Batch`.
      masks: per present modality the mask of its positions `[N]`.
      tasks: per task its attribution.
      attention: (query modality, key modality) -> weights `[N_query, N_key]`, averaged over heads; empty for strategies
        without attention.
      spectrograms: per audio modality that is read as one, its standardised log-mel spectrogram `[T, F]`.
      unattributed: present modalities whose encoder has no layer to attribute to, so that their share is 0.
      error: why the row could not be explained; the other attributes are empty then.
    """

    inputs: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    masks: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    tasks: dict[str, Attribution] = dataclasses.field(default_factory=dict)
    attention: dict[tuple[str, str], np.ndarray] = dataclasses.field(default_factory=dict)
    spectrograms: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    unattributed: tuple[str, ...] = ()
    error: str = ""


class Explainer:
    """Explains the predictions of a run; the programs are compiled once.

    The method is integrated gradients (Sundararajan et al. 2017, arXiv:1703.01365): the output's gradient, averaged
    over the straight line from a baseline to the input, times their difference. The baseline is zero in what the
    encoders read: an image of the mean colour, the mean of each column or dimension, the mean spectrum, or silence. For
    words, categories and entities it is the zero embedding. The baseline has the row's modalities and padding.
    """

    def __init__(self, run: Run):
        self._run = run
        self._variables = {"params": run.state.params, "batch_stats": run.state.batch_stats}

    def explain(self, rows: Sequence[Row], folder: str | Path = ".", *, batch_size: int = BATCH) -> list[Explanation]:
        """Returns an explanation per row; for the rows see `TrainedModel`.

        Args:
          rows: values by modality or feature name.
          folder: the folder that file paths are relative to.
          batch_size: rows per batch, which changes no result.
        """
        result: list[Explanation] = []
        size = max(1, min(batch_size, len(rows)))
        for batch, errors in input_rows.batches(self._run.dataset.reader, rows, size, folder):
            result += self._explain_batch(batch, errors)
        return result

    def _explain_batch(self, batch: Batch, errors: Sequence[str]) -> list[Explanation]:
        batch = batch.replace(targets={}, row_weight=None)
        read, layers, logits, attention = self._encode(self._variables, batch)
        inputs = {m: x for m, x in read.inputs.items() if jnp.issubdtype(x.dtype, jnp.floating)}
        line_end = {"inputs": inputs, "layers": {key: x.astype(jnp.float32) for key, x in layers.items()}}
        baseline = jax.tree.map(jnp.zeros_like, line_end)
        results = {}
        for task, integrate in self._integrate.items():
            chosen = np.asarray(logits[task]).argmax(axis=1)  # [B]
            results[task] = (chosen, integrate((self._variables, read, chosen), line_end, baseline))
        kinds = {m: options["kind"] for m, options in self._run.dataset.reader.modalities.items()}
        spectra = {m: layers[f"{m}/0"] for m in kinds if kinds[m] == "audio" and f"{m}/0" in layers}
        shown = jax.device_get((attention, spectra))
        return [
            Explanation(error=error) if error else self._row(i, batch, results, *shown)
            for i, error in enumerate(errors)
        ]

    def _row(
        self,
        i: int,
        batch: Batch,
        results: Mapping[str, Any],
        attention: Mapping[tuple[str, str], np.ndarray],
        spectrograms: Mapping[str, np.ndarray],
    ) -> Explanation:
        """Returns the explanation of a readable row from the chosen outputs and integrated gradients of each task."""
        reader = self._run.dataset.reader
        present = [m for m in reader.modalities if batch.present[m][i]]
        tasks, attributed = {}, set(present)
        for task, (chosen, result) in results.items():
            if not np.isfinite([result.value[i], result.baseline[i], result.gap[i]]).all():
                return Explanation(error=NOT_FINITE)
            inputs, layers = (
                {key: x[i] for key, x in result.attributions[part].items()} for part in ("inputs", "layers")
            )
            shares = {
                m: _reduce(reader.modalities[m]["kind"], m, inputs, layers, reader.fitted.get(m)) for m in present
            }
            attributed &= {m for m, share in shares.items() if share is not None}
            names = self._run.dataset.class_names[task]
            attribution = Attribution(
                output=names[chosen[i]] if names else task,
                value=float(result.value[i]),
                baseline=float(result.baseline[i]),
                gap=float(result.gap[i]),
                modalities={m: share for m, share in shares.items() if share is not None},
            )
            tasks[task] = attribution if names else _in_units_of_data(attribution, self._run.setup.tasks[task].scale)
        return Explanation(
            inputs={m: np.asarray(batch.inputs[m][i]) for m in present},
            masks={m: np.asarray(batch.mask[m][i]) for m in present},
            tasks=tasks,
            attention={pair: weights[i] for pair, weights in attention.items()},
            spectrograms={m: x[i].astype(np.float32) for m, x in spectrograms.items() if m in present},
            unattributed=tuple(sorted(set(present) - attributed)),
        )

    @functools.cached_property
    def _encode(self) -> Callable[..., Any]:
        """Compiled (variables, batch) -> the batch as encoders read it, layers, logits, attention."""

        @jax.jit
        def encode(variables: Any, batch: Batch) -> Any:
            read = self._run.setup.preprocess(batch, None)
            outputs, layers = self._apply(variables, read)
            attention = {pair: x.astype(jnp.float32).mean(axis=1) for pair, x in outputs.attention.items()}
            return read, layers, outputs.logits, attention

        return encode

    @functools.cached_property
    def _integrate(self) -> dict[str, Callable[..., Any]]:
        """Per task the function that integrates the gradients of the chosen outputs `[B]`."""

        def output(context: Any, at: Any, *, task: str) -> jax.Array:
            variables, batch, chosen = context
            batch = batch.replace(inputs={**batch.inputs, **at["inputs"]})
            outputs, _ = self._apply(variables, batch, at["layers"])
            return log_odds(outputs.logits[task], chosen, self._run.setup.tasks[task].kind)

        return {task: integrated_gradients(functools.partial(output, task=task)) for task in self._run.setup.tasks}

    def _apply(self, variables: Any, batch: Batch, replaced: Layers | None = None) -> tuple[Outputs, Layers]:
        kinds = {m: options["kind"] for m, options in self._run.dataset.reader.modalities.items()}
        return apply_with_layers(self._run.setup.model, variables, batch, kinds, replaced)


def log_odds(logits: jax.Array, chosen: jax.Array, kind: str) -> jax.Array:
    """Returns the log odds `[B]`, log p / (1 - p), of the chosen classes `[B]`, or the value of a regression task.

    With the softmax of logits `[B, C]` it is the logit less the logsumexp of the others. Unlike the logit alone, it
    does not change with a number that is added to all logits, which changes no probability.
    """
    own = jnp.take_along_axis(logits, chosen[:, None], axis=1)[:, 0]
    if kind != "classification" or logits.shape[1] == 1:
        return own
    is_own = jnp.arange(logits.shape[1]) == chosen[:, None]
    return own - jax.nn.logsumexp(jnp.where(is_own, -jnp.inf, logits), axis=1)


def apply_with_layers(
    model: FusionModel, variables: Any, batch: Batch, kinds: Mapping[str, str], replaced: Layers | None = None
) -> tuple[Outputs, Layers]:
    """Applies a model and returns its outputs and those of the layers that stand in for inputs.

    These are embeddings of token ids `[B, T, D]`, of entities `[B, N, D]`, of a categorical column `[B, D]` or of all
    of them `[B, C, D]`, and standardised spectrograms `[B, T, F]`.

    Args:
      model: the model.
      variables: its parameters and batch statistics.
      batch: a preprocessed batch.
      kinds: per modality its type.
      replaced: outputs to use in place of those of the layers.
    """
    owners: dict[tuple[str, ...], list[str]] = {}  # path of an encoder -> the modalities that it encodes, in order
    for m in model.modalities:
        owners.setdefault((f"encoders_{model.shares.get(m, m)}",), []).append(m)
    calls: Counter = Counter()
    encoding: list[tuple[str, tuple[int, ...]]] = []  # the modality that is being encoded, and the shape of its mask
    found: Layers = {}

    def intercept(apply: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if context.method_name != "__call__":
            return apply(*args, **kwargs)
        if module.path in owners:
            modality = owners[module.path][calls[module.path]]
            calls[module.path] += 1
            encoding.append((modality, args[1].shape))
            result = apply(*args, **kwargs)
            encoding.pop()
            return result
        result = apply(*args, **kwargs)
        if not encoding or not _stands_in(module, args, kinds[encoding[-1][0]], encoding[-1][1]):
            return result
        key = f"{encoding[-1][0]}/{sum(key.startswith(f'{encoding[-1][0]}/') for key in found)}"
        found[key] = result
        return result if replaced is None else replaced[key].astype(result.dtype)

    with nn.intercept_methods(intercept):
        outputs: Any = model.apply(variables, batch, train=False)
    return outputs, found


def _stands_in(module: nn.Module, args: Sequence[Any], kind: str, mask_shape: tuple[int, ...]) -> bool:
    """Returns whether a layer's output stands in for the input: embeddings of positions, say, have other shapes."""
    if kind == "audio":
        return isinstance(module, SpecAugment)
    if not isinstance(module, nn.Embed):
        return False
    ids = args[0]
    return ids.shape[:1] == mask_shape[:1] and ids.ndim <= 2 if kind == "table" else ids.shape == mask_shape


def _reduce(
    kind: str, modality: str, inputs: Mapping[str, np.ndarray], layers: Mapping[str, np.ndarray], fitted: Any
) -> np.ndarray | None:
    """Returns a modality's attributions in one row, float32; None if its encoder has no layer to attribute to."""
    count = sum(key.rpartition("/")[0] == modality for key in layers)
    own = [layers[f"{modality}/{number}"] for number in range(count)]
    if kind == "table":
        columns = [i for i, size in enumerate(category_counts(fitted)) if size]
        embedded = np.concatenate([np.atleast_1d(x.sum(axis=-1)) for x in own] or [np.zeros(0)])
        if len(embedded) != len(columns):
            return None
        share = inputs[modality].copy()
        share[columns] += embedded
    elif kind == "audio" and own:
        share = own[0]
    elif own:
        share = np.sum([x.sum(axis=-1) for x in own], axis=0)
    elif modality in inputs:
        share = inputs[modality].sum(axis=-1) if kind in CHANNELS_LAST else inputs[modality]
    else:
        return None
    return share.astype(np.float32)


def _in_units_of_data(attribution: Attribution, scale: Scale) -> Attribution:
    """Returns the attribution of a regression output, which is linear in the value or in its logarithm."""
    return Attribution(
        output=f"log {attribution.output}" if scale.log else attribution.output,
        value=attribution.value * scale.std + scale.mean,
        baseline=attribution.baseline * scale.std + scale.mean,
        gap=attribution.gap * scale.std,
        modalities={m: share * np.float32(scale.std) for m, share in attribution.modalities.items()},
    )
