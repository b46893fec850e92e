"""A run, a split, a subset of modalities -> metrics."""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from mmfusion import metrics
from mmfusion.config.fields import RunConfig
from mmfusion.data import pipeline
from mmfusion.data.batch import Batch
from mmfusion.data.split import Split, check_bad
from mmfusion.objectives import Task
from mmfusion.training.setup import TrainSetup

EARLY = 0.05  # share of the steps after which a regression is to explain more than the mean does


def collect(
    run_eval: Callable[..., Any],
    state: Any,
    split: Split,
    setup: TrainSetup,
    *,
    batch_size: int,
    workers: int = 0,
    modalities: Collection[str] | None = None,
    max_bad_fraction: float = 1.0,
) -> dict[str, Any]:
    """Runs a whole split through the model.

    Args:
      run_eval: what `TrainSetup.compile_eval_step` returned.
      state: anything with `params` and `batch_stats` on the devices.
      split: the rows.
      setup: of the run.
      batch_size: over all devices and hosts.
      workers: processes that read a streamed split.
      modalities: those that stay; the others count as absent in every row. None keeps all.
      max_bad_fraction: share of rows that may be unreadable.

    Returns:
      `logits`, `targets`, `loss`, `loss_weight` and `metric_weight` per task, `weight`, `any_present` and `id`, all
      `[n, ...]` of every host's rows, padding and unreadable rows left out.

    Raises:
      UserError: too many rows cannot be read.
    """
    partitioner = setup.partitioner
    batches = pipeline.eval_batches(
        split, batch_size=batch_size, host=partitioner.host_index, hosts=partitioner.num_hosts, workers=workers
    )
    batches = (without(batch, modalities) for batch in batches)
    results = []
    for _, batch in pipeline.to_device(batches, partitioner.put_batch):
        results.append(jax.device_get(run_eval(state.params, state.batch_stats, batch)))
    every = jax.tree.map(lambda *parts: np.concatenate(parts), *results)
    unreadable = every["id"][(every["weight"] == 0) & (every["id"] >= 0)]
    check_bad(split, unreadable.tolist(), max_bad_fraction)
    return jax.tree.map(lambda x: x[every["weight"] > 0], every)


def without(batch: Batch, modalities: Collection[str] | None) -> Batch:
    """Returns the batch with every modality absent but `modalities`; None keeps all."""
    if modalities is None:
        return batch
    return batch.replace(present={m: p & (m in modalities) for m, p in batch.present.items()})


def score(collected: Mapping[str, Any], tasks: Mapping[str, Task], *, skip_empty: bool = False) -> dict[str, Any]:
    """Returns the metrics of what `collect` returned: of the one task, or `TASK/metric` of each, and `loss` of all.

    A task's metrics are over the rows that have a label of it, `examples` of them; without any they are None, and its
    loss does not count in that of all.

    Args:
      collected: the outputs.
      tasks: of the run.
      skip_empty: whether a row without any modality does not count, as `predict` has an error for it; `rows` is then
        the number of rows, and `examples` of those that count.
    """
    scores: dict[str, Any] = {}
    if skip_empty:
        scores["rows"] = len(collected["weight"])
        collected = jax.tree.map(lambda x: x[collected["any_present"]], collected)
    scores |= {"loss": None, "examples": int(collected["weight"].sum())}
    for task, spec in tasks.items():
        logits, targets = collected["logits"][task], collected["targets"][task]
        if spec.kind == "regression":
            logits, targets = spec.scale.invert(logits[:, 0]), spec.scale.invert(targets)
        labelled, weight = collected["metric_weight"][task], collected["loss_weight"][task]
        loss = None
        if labelled.any():
            loss = float(np.sum(weight * collected["loss"][task], dtype=np.float64) / max(weight.sum(), 1e-9))
            scores["loss"] = (scores["loss"] or 0.0) + spec.weight * loss
        own = {"examples": int(labelled.sum()), **SCORES[spec.kind](logits, targets, labelled), "loss": loss}
        for group in spec.metrics:
            own |= metrics.REGRESSION_SCORES[group](logits, targets, labelled)
        if len(tasks) == 1:
            scores |= own
        else:
            scores |= {f"{task}/{name}": value for name, value in own.items()}
    return scores


def selection_value(scores: Mapping[str, Any], metric: str, higher_is_better: bool) -> float:
    """Returns the validation score to choose by, higher is better; NaN where it is undefined."""
    value = scores[metric]
    if value is None:
        return float("nan")
    return value if higher_is_better else -value


def worse_than_mean(
    scores: Mapping[str, Any], tasks: Mapping[str, Task], step: int, config: RunConfig
) -> Iterator[str]:
    """Yields a warning for each regression task with R² < 0, once: at the first validation from 5 % of the steps on."""
    previous = (step - 1) // config.eval_every * config.eval_every  # step of the validation before
    if not previous < EARLY * config.steps <= step:
        return
    for task, spec in tasks.items():
        r2 = scores["r2" if len(tasks) == 1 else f"{task}/r2"] if spec.kind == "regression" else None
        if r2 is not None and r2 < 0:
            yield (
                f"train  warning: the prediction of {task!r} explains less than the mean of its targets would (R2 "
                f"{r2:.2f} at step {step}): try another learning rate, or config.data.targets.{task}.scale"
            )


def head_losses(collected: Mapping[str, Any], tasks: Mapping[str, Task]) -> dict[str, float]:
    """Returns the loss, over all tasks, of the `joint` head and of each modality's, on the rows that have it."""
    sums: dict[str, float] = {}
    for task, spec in tasks.items():
        for head, losses in {"joint": collected["loss"][task], **collected["unimodal"][task]}.items():
            weight = collected["loss_weight"][task] * collected["present"].get(head, collected["any_present"])
            mean = float(np.sum(weight * losses, dtype=np.float64) / max(weight.sum(), 1e-9))
            sums[head] = sums.get(head, 0.0) + spec.weight * mean
    return sums


SCORES = {
    "classification": metrics.classification,
    "multilabel": metrics.multilabel,
    "regression": metrics.regression,
}
