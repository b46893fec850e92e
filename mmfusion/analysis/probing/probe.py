"""What a trained run does beyond its test score: with modalities missing, mixed up or corrupted, and how sure it is.

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
from mmfusion.analysis.gate.contract_checks import Given
from mmfusion.analysis.probing import attribution, calibration, corruption, emap
from mmfusion.data.batch import Batch
from mmfusion.data.dataset import Split
from mmfusion.data.missing import drop_modalities
from mmfusion.training.eval_step import eval_step
from mmfusion.training.evaluation import collect, score, without
from mmfusion.training.restore import Run, open_run

ROWS, CORRUPTED = 2048, 512  # test examples that are mixed up, and that are corrupted, the same of every run
PAIRED, DRAWS = 256, 3  # examples whose modalities are paired in every way, and how often others are drawn
PERMUTATIONS = 5
RATES = (0.0, 0.25, 0.5, 0.75)  # at which modalities are lost
SEVERITIES = tuple(round(0.1 * i, 1) for i in range(11))
CHUNK = 64  # rows at a time


def probe_run(workdir: Path, metric: str = "") -> dict[str, Any]:
    """Returns what a finished run's best checkpoint does on the test split, as JSON values; more is always better.

    What is drawn, is drawn by the run's seed.

    Args:
      workdir: of the run.
      metric: to measure; empty: the one that runs are compared by.

    Returns:
      `metric`: that was measured, and `sign`: -1 where less of it is better, and it was turned.
      `subsets`: it with only these modalities present, over the whole split; `shapley` values of these.
      `rows`, `paired`, `corrupted`: how many examples are mixed up or lost, paired in every way, and corrupted.
      `missing`: rate at which each modality is lost -> the metric.
      `perceptual`: see `contribution`; empty where the metric is not above 0.
      `interaction`: modality -> the metric, and that of the additive projection, per draw.
      `corruption`: modality -> name -> the metric at each of `severities`.
      `calibration`: of single-label tasks, before and after the temperature fitted on validation.
      `cost`: of the train step, see `step_cost`.
    """
    run = open_run(workdir, ["valid", "test"])
    probe = Probe(run, metric)
    encoded = probe.encode(sample_rows(run.dataset.splits["test"], ROWS))
    raw = sample_rows(run.dataset.splits["test"], CORRUPTED)
    run_eval = run.setup.compile_eval_step()
    whole = {split: _whole(run, run_eval, split) for split in ("valid", "test")}
    names = sorted(encoded.inputs)
    subsets = {kept: probe.value(scored) for kept, scored in _subsets(probe, run_eval, whole["test"])}
    missing = {rate: probe.value(probe.fuse(drop_modalities(encoded, rate))) for rate in RATES}
    return {
        "metric": probe.metric,
        "sign": probe.sign,
        "subsets": {"+".join(kept): value for kept, value in subsets.items()},
        "shapley": attribution.shapley(subsets),
        "rows": len(encoded.id),
        "paired": min(PAIRED, len(encoded.id)),
        "corrupted": len(raw.id),
        "missing": {str(rate): value for rate, value in missing.items()},
        "perceptual": _perceptual(probe, encoded, names),
        "interaction": _interactions(probe, encoded, names),
        "severities": SEVERITIES,
        "corruption": _corruptions(probe, raw),
        "calibration": {
            task: _calibration(*((whole[s]["logits"][task], whole[s]["targets"][task]) for s in ("valid", "test")))
            for task, spec in run.setup.tasks.items()
            if spec.kind == "classification"
        },
        "cost": step_cost(run),
    }


def step_cost(run: Run) -> dict[str, float | None]:
    """Returns what a train step takes: `flops` an example as XLA counts them before it optimises, and `memory`.

    `memory` is the bytes of arguments and temporaries of the program compiled for this device, whose own count of
    operations is another.
    """
    batch = jax.tree.map(lambda x: np.resize(x, (run.config.batch_size, *x.shape[1:])), run.setup.example)
    partitioner = run.setup.partitioner
    rates = partitioner.replicate(np.zeros(1, np.float32))
    lowered = run.setup.compile_train_step().lower(run.state, (partitioner.put_batch(batch),), rates)
    flops = (lowered.cost_analysis() or {}).get("flops")
    share = partitioner.num_devices if partitioner.mode == "pmap" else 1  # that is a program of one device's rows
    memory = lowered.compile().memory_analysis()
    return {
        "flops": None if flops is None else flops * share / run.config.batch_size,
        "memory": memory.temp_size_in_bytes + memory.argument_size_in_bytes,
    }


def compared_metric(config: ConfigDict) -> str:
    """Returns the metric that runs of a config are compared by: the one that chooses, or for a loss the first there is.

    A loss is not comparable where strategies add losses of their own.
    """
    metrics = configs.selectable(config)
    return next(iter(metrics)) if config.select.rpartition("/")[2] == "loss" else config.select


def sample_rows(split: Split, rows: int) -> Batch:
    """Returns at most so many rows of a split as one host batch, drawn by a fixed seed, those of weight 0 left out."""
    return _readable(split.take(np.sort(np.random.default_rng(0).permutation(len(split))[:rows])))


def _readable(batch: Batch) -> Batch:
    return jax.tree.map(lambda x: x[batch.weight > 0], batch)


class Probe:
    """A run in two halves: encoders to tokens, and tokens to logits, each compiled once."""

    def __init__(self, run: Run, metric: str = ""):
        self.run = run
        self.metric = metric or compared_metric(run.config_dict)
        self.sign = 1 if configs.selectable(run.config_dict)[self.metric] else -1
        self._variables = {"params": run.state.params, "batch_stats": run.state.batch_stats}
        model, tasks = run.setup.model, run.setup.tasks
        given = model.clone(
            encoders=flax.core.FrozenDict({m: Given() for m in model.modalities}),
            shares=flax.core.FrozenDict(), joins=flax.core.FrozenDict(),
        )  # fmt: skip

        def encode(variables: dict, batch: Batch, modalities: tuple[str, ...]) -> Batch:
            tokens, mask = model.apply(variables, run.setup.preprocess(batch, None), train=False, method="encode")
            tokens, mask = ({m: every[m] for m in modalities} for every in (tokens, mask))
            return batch.replace(inputs=tokens, mask=mask, present={m: real.any(axis=1) for m, real in mask.items()})

        def fuse(variables: dict, batch: Batch) -> dict[str, Any]:
            return eval_step(
                variables["params"], variables["batch_stats"], batch,
                model=given, tasks=tasks, preprocess=lambda rows, _: rows, axis_name=None,
            )  # fmt: skip

        def pairs(variables: dict, ones: Batch, others: Batch) -> dict[str, jax.Array]:
            def first(i: jax.Array) -> dict[str, jax.Array]:
                partitioner = jax.tree.map(lambda x: jnp.broadcast_to(x[i], (others.id.shape[0], *x.shape[1:])), ones)
                out: Any = given.apply(variables, _joined(partitioner, others), train=False)
                return out.logits

            return jax.lax.map(first, jnp.arange(ones.id.shape[0]))

        self._encode = jax.jit(encode, static_argnums=2)
        self._fuse, self._pairs = jax.jit(fuse), jax.jit(pairs)

    def encode(self, raw: Batch, modalities: Sequence[str] = ()) -> Batch:
        """Returns a host batch of some modalities (none: all), whose inputs are tokens `[n, N, D]` with their masks."""
        names = tuple(modalities or self.run.setup.model.modalities)
        return _in_chunks(lambda batch: self._encode(self._variables, batch, names), raw)

    def fuse(self, encoded: Batch) -> dict[str, Any]:
        """Returns what `evaluate.collect` does, of a batch that is encoded."""
        return _in_chunks(lambda batch: self._fuse(self._variables, batch), encoded)

    def pairs(self, encoded: Batch, modality: str) -> dict[str, np.ndarray]:
        """Returns logits `[n, n, C]` by task: one modality of row i with all others of row j."""
        ones, others = _part(encoded, [modality]), _part(encoded, [m for m in encoded.inputs if m != modality])
        return jax.device_get(self._pairs(self._variables, ones, others))

    def value(self, collected: Mapping[str, Any]) -> float:
        """Returns the metric of what `fuse` returned, turned so that more is better; NaN where it is undefined."""
        number = score(collected, self.run.setup.tasks)[self.metric]
        return math.nan if number is None else self.sign * number


def permute_rows(encoded: Batch, rows: Mapping[str, np.ndarray]) -> Batch:
    """Returns the batch with each modality's part taken from the rows `[n]` given for it."""
    batch = encoded
    for m, places in rows.items():
        batch = _joined(jax.tree.map(lambda x, p=places: x[p], _part(encoded, [m])), batch)
    return batch


def _part(batch: Batch, modalities: Sequence[str]) -> Batch:
    keep = lambda parts: {m: parts[m] for m in modalities}  # noqa: E731
    return batch.replace(inputs=keep(batch.inputs), mask=keep(batch.mask), present=keep(batch.present))


def _joined(ones: Batch, others: Batch) -> Batch:
    """Returns the second batch with the modalities of the first added, or in place of its own."""
    return others.replace(
        inputs=others.inputs | ones.inputs, mask=others.mask | ones.mask, present=others.present | ones.present
    )


def _whole(
    run: Run, run_eval: Callable[..., Any], split: str, modalities: Sequence[str] | None = None
) -> dict[str, Any]:
    return collect(
        run_eval, run.state, run.dataset.splits[split], run.setup, batch_size=run.config.batch_size,
        workers=run.config.data.workers, modalities=modalities, max_bad_fraction=run.config.data.max_bad_fraction,
    )  # fmt: skip


def _subsets(
    probe: Probe, run_eval: Callable[..., Any], whole: dict[str, Any]
) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Yields each subset of the modalities, and what the test split gives with only these present."""
    run, every = probe.run, tuple(sorted(probe.run.dataset.reader.modalities))
    yield every, whole
    subsets = [kept for kept in attribution.subsets(every) if kept != every]
    if run.setup.model.joins:  # what is read together is told apart before the encoder
        yield from ((kept, _whole(run, run_eval, "test", kept)) for kept in subsets)
        return
    parts, split = {kept: [] for kept in subsets}, run.dataset.splits["test"]
    for start in range(0, len(split), ROWS):
        encoded = probe.encode(_readable(split.take(np.arange(start, min(start + ROWS, len(split))))))
        for kept, collected in parts.items():
            collected.append(probe.fuse(without(encoded, kept)))
    for kept, collected in parts.items():
        yield kept, jax.tree.map(lambda *x: np.concatenate(x), *collected)


def _perceptual(probe: Probe, encoded: Batch, names: Sequence[str]) -> dict[str, float]:
    def permuted(rows: Mapping[str, np.ndarray]) -> float:
        return probe.value(probe.fuse(permute_rows(encoded, rows)))

    if not probe.value(probe.fuse(encoded)) > 0:
        return {}
    return attribution.perceptual(permuted, names, len(encoded.id), PERMUTATIONS, seed=probe.run.config.seed)


def _interactions(probe: Probe, encoded: Batch, names: Sequence[str]) -> dict[str, dict[str, list[float]]]:
    result = {}
    for m in names[: {1: 0, 2: 1}.get(len(names))]:  # of two, the one against the other says all
        result[m] = {"whole": [], "additive": []}
        for draw in range(DRAWS):
            rows = np.random.default_rng([1, draw, probe.run.config.seed]).permutation(len(encoded.id))[:PAIRED]
            batch = jax.tree.map(lambda x, p=rows: x[p], encoded)
            as_it_is = probe.fuse(batch)
            added = {task: emap.emap(table) for task, table in probe.pairs(batch, m).items()}
            result[m]["whole"].append(probe.value(as_it_is))
            result[m]["additive"].append(probe.value({**as_it_is, "logits": added}))
    return result


def _corruptions(probe: Probe, raw: Batch) -> dict[str, dict[str, list[float]]]:
    reader, encoded = probe.run.dataset.reader, probe.encode(raw)
    reads = {other: m for m, others in probe.run.setup.model.joins.items() for other in others}

    def at(m: str, name: str, severity: float) -> float:
        worse = corruption.corrupt(
            raw, m, reader.modalities[m]["kind"], name, severity, seed=0, fitted=reader.fitted.get(m)
        )
        return probe.value(probe.fuse(_joined(probe.encode(worse, [reads.get(m, m)]), encoded)))

    return {
        m: {name: [at(m, name, s) for s in SEVERITIES] for name in corruption.CORRUPTIONS[options["kind"]]}
        for m, options in sorted(reader.modalities.items())
    }


def _calibration(valid: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
    """Returns the temperature fitted on validation logits `[n, C]` and targets `[n]`, and the test's calibration."""
    heat = calibration.temperature(*valid)
    result: dict[str, Any] = {"temperature": heat}
    for what, logits in (("before", test[0]), ("after", test[0] / heat)):
        bins = calibration.reliability(logits, test[1])
        result[what] = {
            "nll": calibration.nll(logits, test[1]),
            "ece": bins.error,
            "ece_equal_mass": calibration.reliability(logits, test[1], equal_mass=True).error,
            "bins": {name: value.tolist() for name, value in dataclasses.asdict(bins).items()},
        }
    return result


def _in_chunks(function: Callable[[Batch], Any], batch: Batch) -> Any:
    """Returns what a compiled function of a batch gives, computed in chunks of one size, the last one padded."""
    rows = len(batch.id)
    results = []
    for start in range(0, rows, CHUNK):
        places = np.minimum(np.arange(start, start + CHUNK), rows - 1)
        results.append(jax.device_get(function(jax.tree.map(lambda x, p=places: x[p], batch))))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:rows], *results)
