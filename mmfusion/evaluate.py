"""A run, a split, a subset of modalities -> metrics."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from mmfusion import config as configs
from mmfusion import metrics, parallel
from mmfusion.assemble import Parts, assemble
from mmfusion.checkpoint import Checkpoints
from mmfusion.data import dataset as datasets
from mmfusion.data import pipeline
from mmfusion.data.batch import Batch
from mmfusion.data.dataset import Dataset, Split
from mmfusion.errors import UserError, nearest
from mmfusion.objectives import Task


def collect(
    run_eval: Callable[..., Any],
    state: Any,
    split: Split,
    parts: Parts,
    *,
    batch_size: int,
    workers: int = 0,
    modalities: Collection[str] | None = None,
    max_bad_fraction: float = 1.0,
) -> dict[str, Any]:
    """Runs a whole split through the model.

    Args:
      run_eval: what `Parts.eval_step` returned.
      state: anything with `params` and `batch_stats` on the devices.
      split: the rows.
      parts: of the run.
      batch_size: over all devices and hosts.
      workers: processes that read a streamed split.
      modalities: those that stay; the others count as absent in every row. None keeps all.
      max_bad_fraction: share of rows that may be unreadable.

    Returns:
      `logits`, `targets`, `loss` and `loss_weight` per task, `weight` and `id`, all `[n, ...]` of every host's rows,
      padding and unreadable rows left out.

    Raises:
      UserError: too many rows cannot be read.
    """
    spread = parts.parallel
    batches = pipeline.eval_batches(split, batch_size=batch_size, host=spread.host, hosts=spread.hosts, workers=workers)
    batches = (without(batch, modalities) for batch in batches)
    results = []
    for _, batch in pipeline.to_device(batches, spread.put_batch):
        results.append(jax.device_get(run_eval(state.params, state.batch_stats, batch)))
    every = jax.tree.map(lambda *parts: np.concatenate(parts), *results)
    unreadable = every["id"][(every["weight"] == 0) & (every["id"] >= 0)]
    datasets.check_bad(split, unreadable.tolist(), max_bad_fraction)
    return jax.tree.map(lambda x: x[every["weight"] > 0], every)


def without(batch: Batch, modalities: Collection[str] | None) -> Batch:
    """Returns the batch with every modality absent but `modalities`; None keeps all."""
    if modalities is None:
        return batch
    return batch.replace(present={m: p & (m in modalities) for m, p in batch.present.items()})


def score(collected: Mapping[str, Any], tasks: Mapping[str, Task]) -> dict[str, Any]:
    """Returns the metrics of what `collect` returned: of the one task, or `TASK/metric` of each, and `loss` of all."""
    scores: dict[str, Any] = {"loss": 0.0, "examples": int(collected["weight"].sum())}
    for task, spec in tasks.items():
        logits, targets = collected["logits"][task], collected["targets"][task]
        if spec.kind == "regression":
            logits = logits[:, 0]
        weight = collected["loss_weight"][task]
        loss = float(np.sum(weight * collected["loss"][task], dtype=np.float64) / max(weight.sum(), 1e-9))
        own = {**SCORES[spec.kind](logits, targets, collected["weight"]), "loss": loss}
        scores["loss"] += spec.weight * loss
        if len(tasks) == 1:
            scores |= own
        else:
            scores |= {f"{task}/{name}": value for name, value in own.items()}
    return scores


def head_losses(collected: Mapping[str, Any], tasks: Mapping[str, Task]) -> dict[str, float]:
    """Returns the loss, over all tasks, of the `joint` head and of each modality's, on the rows that have it."""
    sums: dict[str, float] = {}
    for task, spec in tasks.items():
        for head, losses in {"joint": collected["loss"][task], **collected["unimodal"][task]}.items():
            weight = collected["loss_weight"][task] * collected["present"].get(head, 1.0)
            mean = float(np.sum(weight * losses, dtype=np.float64) / max(weight.sum(), 1e-9))
            sums[head] = sums.get(head, 0.0) + spec.weight * mean
    return sums


SCORES = {
    "classification": metrics.classification,
    "multilabel": metrics.multilabel,
    "regression": metrics.regression,
}


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained run, opened: its config, data, parts and the state of its best checkpoint."""

    config: ConfigDict
    dataset: Dataset
    parts: Parts
    state: Any
    step: int


def read_config(workdir: str | Path) -> ConfigDict:
    """Returns the config of a run directory, local or in a bucket; raises UserError where it is none."""
    path = epath.Path(workdir) / "config.json"
    if not path.is_file():
        raise UserError(f"{workdir} is no run directory: it has no config.json; train into it first")
    return configs.from_json(configs.read_json(path))


def open_run(
    workdir: str | Path, splits: Collection[str], overrides: Callable[[ConfigDict], None] | None = None
) -> Run:
    """Opens a run directory at its best checkpoint.

    Args:
      workdir: of the run.
      splits: which to load; none gives a dataset without splits.
      overrides: changes the config in place, such as where the data is now.

    Raises:
      UserError: no run, no checkpoint, or a checkpoint of another architecture.
    """
    workdir = epath.Path(workdir)
    config = read_config(workdir)
    if overrides:
        overrides(config)
    with config.unlocked():
        config.parallel.update(parallel.fitting(config.parallel, config.batch_size))
    if not (workdir / "checkpoints").is_dir():
        raise UserError(f"{workdir} has no checkpoints yet")
    checkpoints = Checkpoints(workdir / "checkpoints", readonly=True)

    def read(step: int) -> Run:
        saved = checkpoints.meta(step)["data"]
        dataset = datasets.load(config.data, seed=config.seed, splits=tuple(splits), saved=saved)
        parts = assemble(config, dataset)
        state, _ = checkpoints.restore(step, parts.state_shapes())
        return Run(config, dataset, parts, parts.parallel.put_state(state), step)

    run = checkpoints.first_sound(read, best=True)
    checkpoints.close()
    if run is None:
        raise UserError(f"{workdir} has no checkpoint yet")
    return run


def evaluate(
    workdir: str | Path,
    split: str = "test",
    modalities: Collection[str] | None = None,
    overrides: Callable[[ConfigDict], None] | None = None,
) -> dict[str, Any]:
    """Returns the metrics of a run's best checkpoint on a split, with only `modalities` present (None: all).

    Raises:
      UserError: no such run, split or modality.
    """
    if split not in ("train", "valid", "test"):
        raise UserError(f"split {split!r}: {nearest(split, ('train', 'valid', 'test'))}")
    known = read_config(workdir).data.modalities
    for m in modalities or ():
        if m not in known:
            raise UserError(f"modality {m!r} is not in this run: {nearest(m, known)}")
    run = open_run(workdir, [split], overrides)
    rows = collect(
        run.parts.eval_step(),
        run.state,
        run.dataset.splits[split],
        run.parts,
        batch_size=run.config.batch_size,
        workers=run.config.data.workers,
        modalities=modalities,
        max_bad_fraction=run.config.data.max_bad_fraction,
    )
    return {
        "split": split,
        "modalities": sorted(modalities or known),
        "step": run.step,
        **score(rows, run.parts.tasks),
    }
