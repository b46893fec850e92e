"""The outcome of an ablation: the trials to probe, and the tables and claims of the finished trials."""

import csv
import dataclasses
import functools
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmfusion import config as configs
from mmfusion.analysis import example_scores
from mmfusion.analysis.ablation import runner, tuning
from mmfusion.analysis.ablation.history import validations
from mmfusion.analysis.ablation.plan import Plan, Trial, code_digest, fold_of
from mmfusion.analysis.ablation.tuning import Search
from mmfusion.analysis.baselines import TRIALS
from mmfusion.analysis.claims import selection
from mmfusion.analysis.claims.claims import Claims, claims
from mmfusion.analysis.claims.differences import Scope
from mmfusion.analysis.claims.selection import MethodResult
from mmfusion.analysis.claims.significance import FOLDS, SEEDS
from mmfusion.analysis.claims.undertrained import Training
from mmfusion.analysis.ensembles import ensembles
from mmfusion.analysis.example_scores import Examples
from mmfusion.config.schema import LAST
from mmfusion.data import trust
from mmfusion.errors import UserError
from mmfusion.files import to_builtin, write_json, write_text

PROBE_MODULES = tuple(
    f"probing/{name}" for name in ("probe", "calibration", "attribution", "confidence", "corruption", "emap")
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of an ablation.

    Attributes:
      metric: the metric that methods are compared by.
      higher: whether a higher value is better.
      methods: one result per method.
      claims: the claims about the methods.
      results: trial name -> its `result.json`, for trials that finished.
      probes: trial name -> the output of the probing stage, for trials that were probed.
      errors: trial name -> its error.
      published: name -> a published score, shown in the report; no claim uses it.
      tuning: the content of `tuning.json`; empty if methods were not tuned.
    """

    metric: str
    higher: bool
    methods: tuple[MethodResult, ...]
    claims: Claims
    results: dict[str, dict[str, Any]]
    probes: dict[str, dict[str, Any]]
    errors: dict[str, str]
    published: dict[str, float]
    tuning: dict[str, Any] = dataclasses.field(default_factory=dict)


def selected_trials(plan: Plan, directory: Path, metric: str) -> list[Trial]:
    """Returns each strategy's trials at the hyperparameters that validation selected, if they have a score.

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


def conclude(
    plan: Plan,
    directory: Path,
    metric: str,
    classical: Sequence[MethodResult],
    information: Mapping[str, Any],
    published: Mapping[str, float],
    equivalence: float = 0.01,
    examples: Mapping[str, Examples] | None = None,
    search: Search | None = None,
    trials: int = TRIALS,
) -> Outcome:
    """Returns the claims that the finished trials support, and writes `runs.csv` and `claims.json`.

    Args:
      plan: the plan of the ablation in `directory`.
      directory: the directory for the files.
      metric: the metric that methods are selected and compared by.
      classical: results of classical baselines.
      information: the decomposition that `floors.classical_baselines` returns.
      published: name -> a published score.
      equivalence: the share of a score below which methods count as equivalent.
      examples: classical baseline -> the scores of its test examples.
      search: what the methods were tuned by; None if they were not tuned.
      trials: the number of settings of an ensemble's stacking model.

    Raises:
      UserError: the data changed between two trials.
    """
    results, errors = read_outputs(plan, directory)
    searched, search_errors = read_outputs(search.plan, directory / tuning.FOLDER) if search else ({}, {})
    both = (*(search.plan.trials if search else ()), *plan.trials)
    _check_data(dataclasses.replace(plan, trials=both), {**searched, **results}, directory)
    probes, probe_errors = read_outputs(plan, directory, probing_stage(metric).output)
    higher = selection.direction(plan.trials, metric)
    methods = tuple(selection.method_results(plan.trials, results, metric))
    probed = {name for result in methods if not result.unimodal_baseline for name in result.trials}
    errors |= {name: f"probing: {error}" for name, error in probe_errors.items() if name in probed}
    errors |= {name: f"tuning: {error}" for name, error in search_errors.items()}
    found = ensembles(plan, methods, directory, metric, higher, trials)
    scores = example_scores.of_runs(plan, directory, metric, found.outputs)
    of_examples = example_scores.common({**scores, **(examples or {})} if scores else {})
    scope = _scope(plan, results, directory, metric, equivalence, search)
    scope = dataclasses.replace(scope, examples=of_examples)
    supported = claims((*methods, *found.results), classical, probes, information, metric, higher, scope)
    _write_runs(plan, results, errors, directory / "runs.csv")
    tuned = configs.read_json(directory / tuning.RECORD) if search else {}
    outcome = Outcome(
        metric, higher, (*methods, *found.results, *classical), supported, results, probes, errors, dict(published),
        tuned,
    )  # fmt: skip
    content = {
        "metric": metric,
        "higher_is_better": higher,
        "statistics_over": FOLDS if any(fold_of(trial) is not None for trial in plan.trials) else SEEDS,
        "published": outcome.published,
        "tuning": outcome.tuning,
        "methods": [dataclasses.asdict(result) for result in outcome.methods],
        **dataclasses.asdict(supported),
    }
    write_json(directory / "claims.json", to_builtin(content))
    return outcome


def probing_stage(metric: str) -> runner.Stage:
    """Returns the stage that probes a finished trial; its output file is named by the metric and the probing code."""
    output = f"probe_{metric.replace('/', '_')}_{code_digest(PROBE_MODULES)}.json"
    return runner.Stage(functools.partial(_probe_trial, metric=metric, output=output), output)


def _probe_trial(trial: Trial, folder: Path, metric: str, output: str) -> None:
    from mmfusion.analysis.probing.probe import probe_run

    trust.remember(trial.config)  # the plan's, which is the user's; the run was maybe trained by another process
    write_json(folder / output, to_builtin(probe_run(folder, metric)))


def _scope(
    plan: Plan,
    results: Mapping[str, Mapping[str, Any]],
    directory: Path,
    metric: str,
    equivalence: float,
    search: Search | None,
) -> Scope:
    """Returns what comparisons need beside scores: the examples, how methods were tuned, and how runs were trained."""
    settings: dict[str, set[str]] = {}
    for trial in plan.trials:
        settings.setdefault(trial.method, set()).add(repr(trial.hyperparameters))
    chosen = tuning.chosen(directory) if search else {}
    finished = [trial for trial in plan.trials if trial.name in results]
    examples = {fold_of(trial): results[trial.name]["data"].get("examples", {}) for trial in finished}
    return Scope(
        equivalence=equivalence,
        tuned=min(map(len, settings.values())),
        trials=min((chosen[method].settings for method in settings), default=0) if search else 0,
        untuned=tuple(tuning.untuned(chosen, list(settings))),
        test_examples=sum(counts.get("test", 0) for counts in examples.values()),
        training={trial.name: _training(trial, results[trial.name], directory, metric) for trial in finished},
    )


def _training(trial: Trial, result: Mapping[str, Any], directory: Path, metric: str) -> Training:
    """Returns how a run was trained; where `select` is `last`, its best step is that of the compared metric."""
    history = tuple(validations(runner.trial_directory(directory, trial), metric))
    best_step = result["best_step"]
    if trial.config["select"] == LAST and history:
        sign = 1 if selection.direction([trial], metric) else -1
        best_step = max(history, key=lambda point: sign * point[1])[0]  # the first of equal ones
    return Training(result["steps"], best_step, history)


def _check_data(plan: Plan, results: Mapping[str, Mapping[str, Any]], directory: Path) -> None:
    """Raises UserError if a trial or the classical baselines used other data than the first trial."""
    first: dict[Any, tuple[str, str]] = {}  # (pairing seed, fold) -> a trial and the digest of its rows
    for trial in plan.trials:
        if trial.name in results:
            pairing = trial.config["seed"] if trial.config["data"]["name"].startswith("pair:") else 0
            rows = results[trial.name]["data"]["rows"]
            name, expected = first.setdefault((pairing, fold_of(trial)), (trial.name, rows))
            if rows != expected:
                raise UserError(_data_changed(name, trial.name))
    for path in directory.glob("baselines_*.json"):
        content = configs.read_json(path)
        name, expected = first.get((0, content.get("fold")), ("", content["rows"]))
        if content["rows"] != expected:
            raise UserError(_data_changed(name, path.name))


def _data_changed(name: str, other: str) -> str:
    return f"the data changed while the ablation ran: {name} and {other} differ; start again in another --workdir"


def _write_runs(plan: Plan, results: Mapping[str, Mapping[str, Any]], errors: Mapping[str, str], path: Path) -> None:
    """Writes a line per trial, which does not depend on when or where the trial ran."""
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
    writer = csv.writer(file, lineterminator="\n")
    heads = [f"{split}/{name}" for split, name in scores]
    has_folds = any(fold_of(trial) is not None for trial in plan.trials)
    writer.writerow(["trial", "method", "seed", *["fold"] * has_folds, *keys, *heads, *totals, "error"])
    for trial in plan.trials:
        result = results.get(trial.name)
        cells = [""] * (len(scores) + len(totals))
        if result:
            cells = [*(result[split].get(name) for split, name in scores), *(result[key] for key in totals)]
        values = [trial.hyperparameters.get(key, "") for key in keys]
        error = errors.get(trial.name, "")
        cell = [trial.config["seed"], *[fold_of(trial)] * has_folds]
        writer.writerow([trial.name, trial.method, *cell, *values, *cells, error])
    write_text(path, file.getvalue())
