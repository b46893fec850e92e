"""What a fusion strategy has to beat beside each modality alone: classical baselines, fitted once and kept in files."""

import dataclasses
import io
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from mmfusion import config as configs
from mmfusion.analysis import baselines
from mmfusion.analysis.baselines import TRIALS, Baseline
from mmfusion.analysis.claims import selection
from mmfusion.analysis.claims.selection import MethodResult
from mmfusion.analysis.example_scores import MEANS, Examples
from mmfusion.analysis.probing import gaussian_pid, pid
from mmfusion.data.dataset import Dataset, load
from mmfusion.files import to_builtin, write_bytes, write_json

ARRAYS = ("ids", "outputs", "targets")  # of a baseline; its scores of every example are kept in their place


class Classical(NamedTuple):
    """Classical baselines of an ablation.

    Attributes:
      results: their results.
      information: `estimator`, and the bits of each part of the information in training (`train`), and of permuted
        labels (`chance`); empty with one modality, and where the target is no single label.
      examples: method -> the scores of its test examples; empty with folds, and where the metric is no mean of them.
    """

    results: list[MethodResult]
    information: dict[str, Any]
    examples: dict[str, Examples]


def classical_baselines(
    config: ConfigDict, metric: str, seeds: int, directory: Path, folds: Sequence[int] = (), trials: int = TRIALS
) -> Classical:
    """Returns the results of classical baselines, and the partial information decomposition of the modalities.

    Both are computed once and cached in `baselines_METRIC.json`, in each fold by itself, with the scores of every test
    example in `baselines_METRIC.npz`; the decomposition is in bits, and that of the first fold. A baseline's score does
    not depend on the seed, and is repeated for every seed. Baselines that the metric cannot score are left out.

    Args:
      config: the config of a trial with all modalities.
      metric: the metric that methods are compared by.
      seeds: the number of seeds of the plan.
      directory: the ablation's directory.
      folds: the folds of the plan; empty without folds.
      trials: the number of settings that each baseline is tuned with.
    """
    found = [_cached(config, metric, directory, fold, trials) for fold in folds or (None,)]
    contents = [content for content, _ in found]
    name = metric.rpartition("/")[2]
    sizes = [content.get("examples", {}) for content in contents]
    ratio = statistics.fmean(each["test"] / each["train"] for each in sizes) if folds else 0.0
    results = [
        MethodResult(
            method=_method(rows[0]["name"], rows[0]["modalities"]),
            unimodal_baseline=len(rows[0]["modalities"]) < len(config.data.modalities),
            selected=selection.common([row["selected"] for row in rows]),
            trials=(),
            seeds=tuple(range(seeds)) * len(rows),
            failed_seeds=(),
            valid=tuple(row["valid"] for row in rows for _ in range(seeds)),
            test=tuple(row["test"] for row in rows for _ in range(seeds)),
            parameters=None,
            folds=tuple(fold for fold in folds for _ in range(seeds)),
            test_over_train=ratio,
        )
        for rows in zip(*(content["baselines"] for content in contents), strict=True)
        if all(row["metric"] == name and None not in (row["valid"], row["test"]) for row in rows)
    ]
    return Classical(results, contents[0]["information"], {} if folds else found[0][1])


def _method(name: str, modalities: Sequence[str]) -> str:
    return ", ".join(filter(None, [name, "+".join(modalities)]))


def _cached(
    config: ConfigDict, metric: str, directory: Path, fold: int | None, trials: int
) -> tuple[dict[str, Any], dict[str, Examples]]:
    """Returns the baselines and the decomposition, and scores of examples, from their files if there are any.

    They are those of a fold; of all data without folds.
    """
    suffix = "" if fold is None else f"_fold={fold}"
    path = directory / f"baselines_{metric.replace('/', '_')}{suffix}.json"
    prefix, _, name = metric.rpartition("/")
    task = prefix or next(iter(config.data.targets))
    kind = config.data.targets[task].kind
    if not path.exists() or configs.read_json(path).get("trials") != trials:
        if fold is not None:
            config = config.copy_and_resolve_references()
            with config.unlocked():
                config.data.fold = fold
        dataset = load(configs.read(config).data, seed=0)
        found = baselines.baselines(dataset, task, name, trials=trials)
        content: dict[str, Any] = {
            "rows": dataset.rows,
            "fold": fold,
            "examples": {split: len(rows) for split, rows in dataset.splits.items()},
            "trials": trials,
            "baselines": [_without_arrays(baseline) for baseline in found],
            "information": {},
        }
        if len(config.data.modalities) > 1 and kind == "classification":
            content["information"] = _information(dataset, task)
        _write_examples(path.with_suffix(".npz"), found, kind)
        write_json(path, to_builtin(content))
    return configs.read_json(path), _read_examples(path.with_suffix(".npz"))


def _information(dataset: Dataset, task: str) -> dict[str, Any]:
    """Returns the decomposition by clusters of the features of two modalities, of more from Gaussian covariances."""
    names = sorted(dataset.reader.modalities)
    if len(names) == 2:
        keys = ("unique_1", "unique_2")
        found = [dataclasses.asdict(each) for each in pid.of_dataset(dataset, task)]
        unique = [[each[key] for key in keys] for each in found]
        estimator = "k-means features"
    else:
        found = [dataclasses.asdict(each) for each in gaussian_pid.of_dataset(dataset, task)]
        unique = [[each["unique"][name] for name in names] for each in found]
        estimator = "Gaussian features"
    parts = [
        {
            "redundant": each["redundant"],
            **{f"unique {name}": value for name, value in zip(names, values, strict=True)},
            "synergistic": each["synergy"],
        }
        for each, values in zip(found, unique, strict=True)
    ]
    return {"estimator": estimator, "train": parts[0], "chance": parts[1]}


def _without_arrays(baseline: Baseline) -> dict[str, Any]:
    names = (field.name for field in dataclasses.fields(baseline))
    return {name: getattr(baseline, name) for name in names if name not in ARRAYS}


def _write_examples(path: Path, found: Sequence[Baseline], kind: str) -> None:
    """Writes the id and the score of every test example, `METHOD/id` and `METHOD/score`, in the order of the ids."""
    arrays = {}
    for baseline in found:
        score = MEANS.get((kind, baseline.metric))
        if score and not math.isnan(baseline.test):
            order = np.argsort(baseline.ids, kind="stable")
            method = _method(baseline.name, baseline.modalities)
            arrays[f"{method}/id"] = baseline.ids[order]
            arrays[f"{method}/score"] = score(baseline.outputs, baseline.targets)[order]
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    write_bytes(path, content.getvalue())


def _read_examples(path: Path) -> dict[str, Examples]:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        names = [name.removesuffix("/id") for name in arrays if name.endswith("/id")]
        return {name: Examples(arrays[f"{name}/id"], arrays[f"{name}/score"]) for name in names}
