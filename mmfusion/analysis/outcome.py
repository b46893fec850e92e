"""The outcome of an ablation: which trials to probe, and the tables and claims that follow from the finished ones."""

import csv
import dataclasses
import functools
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mmfusion import config as configs
from mmfusion.analysis import baselines
from mmfusion.analysis.ablation import runner
from mmfusion.analysis.ablation.plan import Plan, Trial, code_digest
from mmfusion.analysis.claims import selection
from mmfusion.analysis.claims.claims import Claims, claims
from mmfusion.analysis.claims.selection import MethodResult
from mmfusion.analysis.probing import pid
from mmfusion.data.dataset import load
from mmfusion.errors import UserError
from mmfusion.files import to_builtin, write_json, write_text

PROBE_MODULES = tuple(f"probing/{name}" for name in ("probe", "calibration", "attribution", "corruption", "emap"))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of an ablation.

    Attributes:
      metric: the metric that methods are compared by.
      higher: whether a higher value is better.
      methods: one result per method.
      claims: about the methods.
      results: trial name -> its `result.json`, for trials that finished.
      probes: trial name -> the output of the probing stage, for trials that were probed.
      errors: trial name -> its error.
      published: name -> a score that others report, shown beside these; no claim uses it.
    """

    metric: str
    higher: bool
    methods: tuple[MethodResult, ...]
    claims: Claims
    results: dict[str, dict[str, Any]]
    probes: dict[str, dict[str, Any]]
    errors: dict[str, str]
    published: dict[str, float]


def selected_trials(plan: Plan, directory: Path, metric: str) -> list[Trial]:
    """Returns the trials of each strategy at the hyperparameters that validation selected, if they have a score.

    A strategy with unfinished trials is left out: its hyperparameters are not selected yet.
    """
    results, _ = read_outputs(plan, directory)
    pending = {trial.method for trial in unfinished(plan, directory)}
    names = {
        name
        for result in selection.method_results(plan.trials, results, metric)
        if not result.unimodal_baseline and result.method not in pending
        for name in result.trials
    }
    return [trial for trial in plan.trials if trial.name in names]


def unfinished(plan: Plan, directory: Path) -> list[Trial]:
    """Returns the trials that have neither a result nor an error yet."""
    results, errors = read_outputs(plan, directory)
    return [trial for trial in plan.trials if trial.name not in results and trial.name not in errors]


def read_outputs(plan: Plan, directory: Path, name: str = runner.RESULT) -> tuple[dict[str, dict], dict[str, str]]:
    """Returns a stage's output by trial name, and the errors of the trials without it."""
    outputs, errors = {}, {}
    for trial in plan.trials:
        folder = runner.trial_directory(directory, trial)
        if (folder / name).exists():
            outputs[trial.name] = configs.read_json(folder / name)
        elif (folder / runner.FAILED).exists():
            errors[trial.name] = configs.read_json(folder / runner.FAILED)["error"]
    return outputs, errors


def classical_baselines(
    config: ConfigDict, metric: str, seeds: int, directory: Path
) -> tuple[list[MethodResult], dict[str, Any]]:
    """Returns the results of classical baselines, and the partial information decomposition of two modalities in bits.

    Both are computed once and kept in `baselines_METRIC.json`. A baseline does not depend on the seed: its score stands
    for every seed. Baselines that cannot be scored by the metric are left out.

    Args:
      config: of a trial with all modalities.
      metric: that is compared.
      seeds: of the plan.
      directory: of the ablation.
    """
    path = directory / f"baselines_{metric.replace('/', '_')}.json"
    prefix, _, name = metric.rpartition("/")
    task = prefix or next(iter(config.data.targets))
    if not path.exists():
        dataset = load(configs.read(config).data, seed=0)
        found = baselines.baselines(dataset, task, name)
        content: dict[str, Any] = {
            "rows": dataset.rows,
            "baselines": [dataclasses.asdict(baseline) for baseline in found],
            "information": {},
        }
        if len(config.data.modalities) == 2 and config.data.targets[task].kind == "classification":
            train, permuted = pid.of_dataset(dataset, task)
            content["information"] = {"train": dataclasses.asdict(train), "chance": dataclasses.asdict(permuted)}
        write_json(path, to_builtin(content))
    kept = configs.read_json(path)
    results = [
        MethodResult(
            method=f"{one['name']}, {'+'.join(one['modalities'])}" if one["modalities"] else one["name"],
            unimodal_baseline=len(one["modalities"]) < len(config.data.modalities),
            selected=one["selected"],
            trials=(),
            seeds=tuple(range(seeds)),
            failed_seeds=(),
            valid=(one["valid"],) * seeds,
            test=(one["test"],) * seeds,
            parameters=None,
        )
        for one in kept["baselines"]
        if one["metric"] == name and None not in (one["valid"], one["test"])
    ]
    return results, kept["information"]


def conclude(
    plan: Plan,
    directory: Path,
    metric: str,
    classical: Sequence[MethodResult],
    information: Mapping[str, Any],
    published: Mapping[str, float],
) -> Outcome:
    """Makes the claims that the finished trials support, and writes `runs.csv` and `claims.json`.

    Args:
      plan: of the ablation in `directory`.
      directory: receives the files.
      metric: that methods are selected and compared by.
      classical: results of classical baselines.
      information: the decomposition that `classical_baselines` returns.
      published: scores that others report.

    Raises:
      UserError: the data changed between two trials.
    """
    results, errors = read_outputs(plan, directory)
    _check_data(plan, results, directory)
    probes, probe_errors = read_outputs(plan, directory, probing_stage(metric).output)
    higher = selection.direction(plan.trials, metric)
    methods = tuple(selection.method_results(plan.trials, results, metric))
    probed = {name for result in methods if not result.unimodal_baseline for name in result.trials}
    errors |= {name: f"probing: {error}" for name, error in probe_errors.items() if name in probed}
    made = claims(methods, classical, probes, information, metric, higher)
    _write_runs(plan, results, errors, directory / "runs.csv")
    outcome = Outcome(metric, higher, (*methods, *classical), made, results, probes, errors, dict(published))
    content = {
        "metric": metric,
        "higher_is_better": higher,
        "published": outcome.published,
        "methods": [dataclasses.asdict(result) for result in outcome.methods],
        **dataclasses.asdict(made),
    }
    write_json(directory / "claims.json", to_builtin(content))
    return outcome


def probing_stage(metric: str) -> runner.Stage:
    """Returns the stage that probes a finished trial; its output is named by the metric and the probing code."""
    output = f"probe_{metric.replace('/', '_')}_{code_digest(PROBE_MODULES)}.json"
    return runner.Stage(functools.partial(_probe_trial, metric=metric, output=output), output)


def _probe_trial(trial: Trial, folder: Path, metric: str, output: str) -> None:
    from mmfusion.analysis.probing.probe import probe_run

    del trial
    write_json(folder / output, to_builtin(probe_run(folder, metric)))


def _check_data(plan: Plan, results: Mapping[str, Mapping[str, Any]], directory: Path) -> None:
    """Raises UserError where trials, or the classical baselines, used other data than the first trial."""
    first: dict[int, tuple[str, str]] = {}  # pairing -> a trial and the digest of its rows
    for trial in plan.trials:
        if trial.name in results:
            pairing = trial.config["seed"] if trial.config["data"]["name"].startswith("pair:") else 0
            rows = results[trial.name]["data"]["rows"]
            name, expected = first.setdefault(pairing, (trial.name, rows))
            if rows != expected:
                raise UserError(_data_changed(name, trial.name))
    for path in directory.glob("baselines_*.json"):
        if 0 in first and configs.read_json(path)["rows"] != first[0][1]:
            raise UserError(_data_changed(first[0][0], path.name))


def _data_changed(name: str, other: str) -> str:
    return f"the data changed while the ablation ran: {name} and {other} differ; start again in another --workdir"


def _write_runs(plan: Plan, results: Mapping[str, Mapping[str, Any]], errors: Mapping[str, str], path: Path) -> None:
    """Writes a line per trial; nothing in it depends on when or where it ran."""
    scores = sorted(
        {
            (split, name)
            for result in results.values()
            for split in ("valid", "test")
            for name, value in result[split].items()
            if value is None or isinstance(value, int | float)
        }
    )
    keys = sorted({key for trial in plan.trials for key in trial.hyperparameters})
    totals = ("parameters", "steps", "best_step")
    file = io.StringIO()
    lines = csv.writer(file, lineterminator="\n")
    heads = [f"{split}/{name}" for split, name in scores]
    lines.writerow(["trial", "method", "seed", *keys, *heads, *totals, "error"])
    for trial in plan.trials:
        result = results.get(trial.name)
        numbers = [""] * (len(scores) + len(totals))
        if result:
            numbers = [*(result[split].get(name) for split, name in scores), *(result[key] for key in totals)]
        values = [trial.hyperparameters.get(key, "") for key in keys]
        error = errors.get(trial.name, "")
        lines.writerow([trial.name, trial.method, trial.config["seed"], *values, *numbers, error])
    write_text(path, file.getvalue())
