"""Probes of a trained run: missing, permuted and corrupted modalities, additive projection, calibration and cost.

n examples · M modalities · N tokens · D width · C outputs
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mmfusion import config as configs
from mmfusion.analysis.gate.token_model import Given
from mmfusion.analysis.probing import attribution, calibration, confidence, corruption, emap
from mmfusion.data.batch import Batch
from mmfusion.data.missing import drop_modalities
from mmfusion.data.split import Split
from mmfusion.inference import shapley
from mmfusion.training import uncertainty
from mmfusion.training.eval_step import eval_step
from mmfusion.training.evaluation import collect, score, without
from mmfusion.training.frozen_features import Reading, cached
from mmfusion.training.restore import Run, open_run

ROWS, CORRUPTED = 2048, 512  # test examples to permute, and to corrupt; the same for every run
PAIRED, DRAWS = 256, 3  # examples of one additive projection, and the number of samples of them
PERMUTATIONS = 5
RATES = (0.0, 0.25, 0.5, 0.75)  # of missing modalities
IMBALANCED = 0.75  # the rate at which one modality is missing, and the others never
SEVERITIES = tuple(round(0.1 * i, 1) for i in range(11))
CHUNK = 64  # rows per call of a compiled function


def probe_run(workdir: Path, metric: str = "") -> dict[str, Any]:
    """Returns the probes of a finished run's best checkpoint on the test split, as JSON values.

    Scores are signed so that higher is better. Permutations and samples of pairs depend on the run's seed.

    Args:
      workdir: the run's directory.
      metric: the metric to measure; "": the one that runs are compared by.

    Returns:
      `metric`, and `sign`: -1 if a lower value of the metric is better, and its values were negated.
      `subsets`: the metric with only these modalities present, on the full split; `shapley`: their Shapley values.
      `rows`, `paired`, `corrupted`: the number of examples that are permuted or masked, paired, and corrupted.
      `missing`: rate of missing modalities -> the metric.
      `imbalanced`: modality -> the metric where it alone is missing, at a rate of 0.75.
      `perceptual`: see `attribution.perceptual`; empty if the metric is not above 0.
      `interaction`: modality -> the metric of the model and of its additive projection, one value per sample.
      `severities`, and `corruption`: modality -> name -> the metric at each severity.
      `detection`: modality -> name -> the AUROC of telling examples corrupted at severity 1 by their confidence, for
        the task of the metric; empty if that is no single-label task.
      `calibration`: of single-label tasks, before and after scaling by the temperature fitted on validation, and
        `selective`, the error rate among the most confident predictions.
      `cost`: see `step_cost`.
    """
    run = open_run(workdir, ["valid", "test"])
    probe = Probe(run, metric)
    encoded = probe.encode(sample_rows(probe.reading.dataset.splits["test"], ROWS))
    raw = sample_rows(run.dataset.splits["test"], CORRUPTED)
    full = {split: _evaluate(probe, split) for split in ("valid", "test")}
    names = sorted(encoded.inputs)
    subsets = {kept: probe.value(scored) for kept, scored in _subsets(probe, full["test"])}
    missing = {rate: probe.value(probe.fuse(drop_modalities(encoded, rate))) for rate in RATES}
    corruptions, detections = _corruptions(probe, raw)
    return {
        "metric": probe.metric,
        "sign": probe.sign,
        "subsets": {"+".join(kept): value for kept, value in subsets.items()},
        "shapley": shapley.shapley(subsets),
        "rows": len(encoded.id),
        "paired": min(PAIRED, len(encoded.id)),
        "corrupted": len(raw.id),
        "missing": {str(rate): value for rate, value in missing.items()},
        "imbalanced": {m: probe.value(probe.fuse(drop_modalities(encoded, IMBALANCED, [m]))) for m in names},
        "perceptual": _perceptual(probe, encoded, names),
        "interaction": _interactions(probe, encoded, names),
        "severities": SEVERITIES,
        "corruption": corruptions,
        "detection": detections,
        "calibration": {
            task: _calibration(*(_labelled(full[split], task) for split in ("valid", "test")))
            for task, spec in run.setup.tasks.items()
            if spec.kind == "classification"
        },
        "cost": step_cost(run, probe.reading),
    }


def step_cost(run: Run, reading: Reading) -> dict[str, float | None]:
    """Returns the cost of a train step: `flops` per example, as XLA counts them before optimisation, and `memory`.

    `memory` is the bytes of arguments and temporaries of the program compiled for this device, whose FLOPs differ.
    Encoders whose features were computed before cost nothing.
    """
    batch = jax.tree.map(lambda x: np.resize(x, (run.config.batch_size, *x.shape[1:])), reading.example)
    partitioner = run.setup.partitioner
    rates = partitioner.replicate(np.zeros(1, np.float32))
    lowered = reading.setup.compile_train_step().lower(run.state, (partitioner.put_batch(batch),), rates)
    flops = (lowered.cost_analysis() or {}).get("flops")
    share = partitioner.num_devices if partitioner.mode == "pmap" else 1  # pmap lowers the program of one device
    memory = lowered.compile().memory_analysis()
    return {
        "flops": None if flops is None else flops * share / run.config.batch_size,
        "memory": memory.temp_size_in_bytes + memory.argument_size_in_bytes,
    }


def compared_metric(config: ConfigDict) -> str:
    """Returns the metric that runs of a config are compared by: `select`, or the first if that is none or a loss.

    Losses are not comparable, as strategies may add terms of their own.
    """
    metric = configs.selected_metric(config)
    return next(iter(configs.selectable(config))) if metric.rpartition("/")[2] == "loss" else metric


def sample_rows(split: Split, rows: int) -> Batch:
    """Returns at most `rows` readable rows of a split as one host batch, sampled with a fixed seed."""
    return _readable(split.take(np.sort(np.random.default_rng(0).permutation(len(split))[:rows])))


def _readable(batch: Batch) -> Batch:
    return jax.tree.map(lambda x: x[batch.weight > 0], batch)


class Probe:
    """A run split into two compiled functions: inputs to tokens, and tokens to logits."""

    def __init__(self, run: Run, metric: str = ""):
        self.run, self.reading = run, cached(run.config, run.dataset, run.setup, run.state)
        self.metric = metric or compared_metric(run.config_dict)
        self.sign = 1 if configs.selectable(run.config_dict)[self.metric] else -1
        self._variables = {"params": run.state.params, "batch_stats": run.state.batch_stats}
        model: Any = self.reading.setup.spec.model
        preprocess, tasks = self.reading.setup.spec.preprocess, run.setup.tasks
        without_encoders = model.clone(
            encoders=flax.core.FrozenDict({m: Given() for m in model.modalities}),
            shares=flax.core.FrozenDict(), joins=flax.core.FrozenDict(),
        )  # fmt: skip

        def encode(variables: dict, batch: Batch, modalities: tuple[str, ...]) -> Batch:
            tokens, mask = model.apply(variables, preprocess(batch, None), train=False, method="encode")
            tokens, mask = ({m: tree[m] for m in modalities} for tree in (tokens, mask))
            return batch.replace(inputs=tokens, mask=mask, present={m: real.any(axis=1) for m, real in mask.items()})

        def fuse(variables: dict, batch: Batch) -> dict[str, Any]:
            return eval_step(
                variables["params"], variables["batch_stats"], batch,
                model=without_encoders, tasks=tasks, preprocess=lambda rows, _: rows, axis_name=None,
            )  # fmt: skip

        def pairs(variables: dict, first: Batch, rest: Batch) -> dict[str, jax.Array]:
            def with_all(i: jax.Array) -> dict[str, jax.Array]:
                repeated = jax.tree.map(lambda x: jnp.broadcast_to(x[i], (rest.id.shape[0], *x.shape[1:])), first)
                out: Any = without_encoders.apply(variables, _update(rest, repeated), train=False)
                return out.logits

            return jax.lax.map(with_all, jnp.arange(first.id.shape[0]))

        self._encode = jax.jit(encode, static_argnums=2)
        self._fuse, self._pairs = jax.jit(fuse), jax.jit(pairs)

    def encode(self, batch: Batch, modalities: Sequence[str] = ()) -> Batch:
        """Returns a host batch of the given modalities (empty: all), with tokens `[n, N, D]` and masks as inputs.

        The batch is what `reading.dataset` has, or `reading.read` returns.
        """
        names = tuple(modalities or self.run.setup.model.modalities)
        return _in_chunks(lambda rows: self._encode(self._variables, rows, names), batch)

    def fuse(self, encoded: Batch) -> dict[str, Any]:
        """Returns the outputs of `evaluation.collect` for an encoded batch."""
        return _in_chunks(lambda batch: self._fuse(self._variables, batch), encoded)

    def pairs(self, encoded: Batch, modality: str) -> dict[str, np.ndarray]:
        """Returns logits `[n, n, C]` by task: one modality of row i with all other modalities of row j."""
        first, rest = _keep(encoded, [modality]), _keep(encoded, [m for m in encoded.inputs if m != modality])
        return jax.device_get(self._pairs(self._variables, first, rest))

    def value(self, collected: Mapping[str, Any]) -> float:
        """Returns the metric of the outputs of `fuse`, signed so that higher is better; NaN where undefined."""
        value = score(collected, self.run.setup.tasks)[self.metric]
        return math.nan if value is None else self.sign * value


def permute_rows(encoded: Batch, rows: Mapping[str, np.ndarray]) -> Batch:
    """Returns the batch with each modality's rows reordered by the row indices `[n]` given for it."""
    batch = encoded
    for m, positions in rows.items():
        batch = _update(batch, jax.tree.map(lambda x, p=positions: x[p], _keep(encoded, [m])))
    return batch


def _keep(batch: Batch, modalities: Sequence[str]) -> Batch:
    keep = lambda tree: {m: tree[m] for m in modalities}  # noqa: E731
    return batch.replace(inputs=keep(batch.inputs), mask=keep(batch.mask), present=keep(batch.present))


def _update(batch: Batch, other: Batch) -> Batch:
    """Returns the batch with the modalities of another batch added or replaced."""
    return batch.replace(
        inputs=batch.inputs | other.inputs, mask=batch.mask | other.mask, present=batch.present | other.present
    )


def _evaluate(probe: Probe, split: str, modalities: Sequence[str] | None = None) -> dict[str, Any]:
    run, setup = probe.run, probe.reading.setup
    return collect(
        setup.compile_eval_step(), run.state, probe.reading.dataset.splits[split], setup,
        batch_size=run.config.batch_size, workers=run.config.data.workers, modalities=modalities,
        max_bad_fraction=run.config.data.max_bad_fraction,
    )  # fmt: skip


def _subsets(probe: Probe, full: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Yields each subset of the modalities and the outputs on the test split with only these modalities present."""
    run, modalities = probe.run, tuple(sorted(probe.run.dataset.reader.modalities))
    yield modalities, full
    subsets = [kept for kept in shapley.subsets(modalities) if kept != modalities]
    if run.setup.model.joins:  # joined modalities share tokens, so they must be masked before the encoder
        yield from ((kept, _evaluate(probe, "test", kept)) for kept in subsets)
        return
    outputs, split = {kept: [] for kept in subsets}, probe.reading.dataset.splits["test"]
    for start in range(0, len(split), ROWS):
        encoded = probe.encode(_readable(split.take(np.arange(start, min(start + ROWS, len(split))))))
        for kept, chunks in outputs.items():
            chunks.append(probe.fuse(without(encoded, kept)))
    for kept, chunks in outputs.items():
        yield kept, jax.tree.map(lambda *x: np.concatenate(x), *chunks)


def _perceptual(probe: Probe, encoded: Batch, names: Sequence[str]) -> dict[str, float]:
    def permuted(rows: Mapping[str, np.ndarray]) -> float:
        return probe.value(probe.fuse(permute_rows(encoded, rows)))

    if not probe.value(probe.fuse(encoded)) > 0:
        return {}
    return attribution.perceptual(permuted, names, len(encoded.id), PERMUTATIONS, seed=probe.run.config.seed)


def _interactions(probe: Probe, encoded: Batch, names: Sequence[str]) -> dict[str, dict[str, list[float]]]:
    result = {}
    for m in names[: {1: 0, 2: 1}.get(len(names))]:  # two modalities have one additive projection
        result[m] = {"whole": [], "additive": []}
        for draw in range(DRAWS):
            rows = np.random.default_rng([1, draw, probe.run.config.seed]).permutation(len(encoded.id))[:PAIRED]
            batch = jax.tree.map(lambda x, p=rows: x[p], encoded)
            collected = probe.fuse(batch)
            additive = {task: emap.emap(table) for task, table in probe.pairs(batch, m).items()}
            result[m]["whole"].append(probe.value(collected))
            result[m]["additive"].append(probe.value({**collected, "logits": additive}))
    return result


def _corruptions(probe: Probe, raw: Batch) -> tuple[dict[str, dict[str, list[float]]], dict[str, dict[str, float]]]:
    """Returns the metric at each severity, and how well confidence tells the examples of the greatest one."""
    reader, encoded = probe.run.dataset.reader, probe.encode(probe.reading.read(raw))
    joined_to = {other: m for m, others in probe.run.setup.model.joins.items() for other in others}

    def at(m: str, name: str, severity: float) -> dict[str, Any]:
        corrupted = corruption.corrupt(
            raw, m, reader.modalities[m]["kind"], name, severity, seed=0, fitted=reader.fitted.get(m)
        )
        return probe.fuse(_update(encoded, probe.encode(probe.reading.read(corrupted), [joined_to.get(m, m)])))

    outputs = {
        m: {name: [at(m, name, s) for s in SEVERITIES] for name in corruption.CORRUPTIONS[options["kind"]]}
        for m, options in sorted(reader.modalities.items())
    }
    scores = {
        m: {name: [probe.value(each) for each in found] for name, found in kinds.items()}
        for m, kinds in outputs.items()
    }
    task = probe.metric.rpartition("/")[0] or next(iter(probe.run.setup.tasks))
    if probe.run.setup.tasks[task].kind != "classification":
        return scores, {}
    clean = probe.fuse(encoded)["logits"][task]
    return scores, {
        m: {name: confidence.detection(clean, found[-1]["logits"][task]) for name, found in kinds.items()}
        for m, kinds in outputs.items()
    }


def _labelled(collected: Mapping[str, Any], task: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the logits and targets of the rows that have a label of the task."""
    kept = collected["metric_weight"][task] > 0
    return collected["logits"][task][kept], collected["targets"][task][kept]


def _calibration(valid: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
    """Returns the temperature fitted on validation logits `[n, C]` and targets `[n]`, and the calibration on test."""
    temperature = uncertainty.temperature(*valid)
    selective = confidence.risk_coverage(*test)
    result: dict[str, Any] = {"temperature": temperature, "selective": dataclasses.asdict(selective)}
    for when, logits in (("before", test[0]), ("after", test[0] / temperature)):
        bins = calibration.reliability(logits, test[1])
        result[when] = {
            "nll": uncertainty.nll(logits, test[1]),
            "ece": bins.error,
            "ece_equal_mass": calibration.reliability(logits, test[1], equal_mass=True).error,
            "bins": {name: value.tolist() for name, value in dataclasses.asdict(bins).items()},
        }
    return result


def _in_chunks(function: Callable[[Batch], Any], batch: Batch) -> Any:
    """Returns the outputs of a compiled function, computed in chunks of equal size; the last chunk is padded."""
    rows = len(batch.id)
    results = []
    for start in range(0, rows, CHUNK):
        positions = np.minimum(np.arange(start, start + CHUNK), rows - 1)
        results.append(jax.device_get(function(jax.tree.map(lambda x, p=positions: x[p], batch))))
    return jax.tree.map(lambda *chunks: np.concatenate(chunks)[:rows], *results)
