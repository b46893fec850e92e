"""An ablation from its plan to its report: train every trial, probe the selected trials, make the claims.

`ablate` is the public function; the command `ablate` and it share `run_ablation`.
"""

import contextlib
import dataclasses
import functools
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
from ml_collections import ConfigDict

from mmfusion import config as configs
from mmfusion.analysis import outcome as outcomes
from mmfusion.analysis import report
from mmfusion.analysis.ablation import budget, plan, runner, scheduling
from mmfusion.analysis.ablation.leases import Leases, Taking, Unshared
from mmfusion.analysis.ablation.plan import MakeConfig, Plan, Trial, trial_source
from mmfusion.analysis.ablation.remote_copy import RemoteCopy
from mmfusion.analysis.ablation.runner import Events, Stage
from mmfusion.analysis.claims.claims import Claims
from mmfusion.analysis.outcome import Outcome
from mmfusion.analysis.probing.probe import compared_metric
from mmfusion.config import defaults
from mmfusion.config.files import load_file, set_values
from mmfusion.config.published import adopt
from mmfusion.data import trust
from mmfusion.data.opening import fold_numbers
from mmfusion.errors import UserError
from mmfusion.models.fusion import fusion_classes

REPORT = "report"  # the lease of the tables and the report


class Progress(Protocol):
    """Receives the progress of an ablation; `show` must exhaust the events, as iterating them runs the stage."""

    def matched(self, matches: Mapping[str, budget.Match], kind: str, target: int) -> None: ...

    def show(self, title: str, trials: Sequence[Trial], directory: Path, events: Events, stage: Stage) -> None: ...

    def waiting(self, unfinished: int, trials: int) -> None: ...


class Silent:
    """A `Progress` that shows nothing."""

    def matched(self, matches: Mapping[str, budget.Match], kind: str, target: int) -> None:
        """Does nothing."""

    def show(self, title: str, trials: Sequence[Trial], directory: Path, events: Events, stage: Stage) -> None:
        """Exhausts the events."""
        for _ in events:
            pass

    def waiting(self, unfinished: int, trials: int) -> None:
        """Does nothing."""


@dataclasses.dataclass(frozen=True)
class Request:
    """The methods that an ablation compares.

    Attributes:
      make: (strategy or "", seed, modalities or "") -> config.
      fusions: names of strategies.
      seeds: the number of seeds per method, and with folds per fold.
      vary: config key -> values; keys of the optimizer are selected on validation, other keys define further methods.
      match: the cost to equalise by choice of width, `parameters` or `flops`; `none` keeps the config's width.
      metric: the metric to select and compare by; "": the config's.
      published: name -> a published score to show in the report.
      equivalence: the share of a score below which methods count as equivalent.
    """

    make: MakeConfig
    fusions: Sequence[str]
    seeds: int
    vary: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    match: str = "none"
    metric: str = ""
    published: Mapping[str, float] = dataclasses.field(default_factory=dict)
    equivalence: float = 0.01

    def __post_init__(self):
        if self.seeds < 1:
            raise UserError("must be at least 1", path="--seeds", value=self.seeds)
        if not 0 <= self.equivalence < 1:
            raise UserError("must be a share of the score, in [0, 1)", path="--equivalence", value=self.equivalence)


def _no_preparation() -> None:
    """Does nothing."""


@dataclasses.dataclass(frozen=True)
class Execution:
    """Where and how an ablation runs.

    Attributes:
      directory: the directory of the trials and the report.
      jobs: the number of processes on CPU; 0: this process. Of tasks of a cluster; 0: as many as it has room for.
      engine: `ray` or `ray:ADDRESS` runs the trials on a cluster; "": on this machine.
      resources: what a task of a cluster needs, such as `{"CPU": 1, "GPU": 0.5}`.
      shard: `i/n`, the share of the trials to run here; "": every trial that no other worker holds a lease of.
      remote: the bucket directory of which `directory` is a copy; "": none.
      prepare_worker: called first in each process; importable by name.
      progress: receives the finished trials.
      command: the command line, for the report.
      train_command: trial -> the command that trains it alone, for the report.
      latex: whether to also write the table as `table.tex`.
    """

    directory: Path
    jobs: int = 0
    engine: str = ""
    resources: Mapping[str, float] = dataclasses.field(default_factory=dict)
    shard: str = ""
    remote: str = ""
    prepare_worker: Callable[[], None] = _no_preparation
    progress: Progress = dataclasses.field(default_factory=Silent)
    command: str = ""
    train_command: Callable[[Trial], str] = lambda trial: ""
    latex: bool = False


def run_ablation(request: Request, execution: Execution) -> Outcome | None:
    """Runs or resumes an ablation, together with any others that run the same one in the same directory.

    Returns:
      The outcome; None while other shards have unfinished trials.

    Raises:
      UserError: nothing to run, an invalid key, or a directory of another ablation.
      Preempted: SIGTERM was received, and running trials saved a checkpoint; or another worker took over a trial.
    """
    planned, metric = make_plan(request, execution.progress)
    own = runner.shard(planned.trials, execution.shard or "0/1")
    shared = RemoteCopy(execution.remote, execution.directory)
    shared.fetch(planned.trials)
    saved = plan.save(planned, execution.directory)
    for trial in saved.trials:
        trust.remember(trial.config)
    shared.upload()
    leases = Leases(execution.remote or execution.directory)
    with contextlib.nullcontext(Unshared()) if execution.shard else leases as taking:
        if not _run_trials(saved, own, metric, shared, execution, taking):
            return None
        with taking.holding(REPORT):  # what takes long there is read from files by the other workers
            shared.fetch(saved.trials)
            return _conclude(saved, metric, shared, request, execution)


def _conclude(saved: Plan, metric: str, shared: RemoteCopy, request: Request, execution: Execution) -> Outcome:
    """Writes the tables and the report of the finished trials."""
    example = request.make(request.fusions[0], 0, "")
    folds = tuple(dict.fromkeys(fold for trial in saved.trials if (fold := plan.fold_of(trial)) is not None))
    rows, information = outcomes.classical_baselines(example, metric, request.seeds, execution.directory, folds)
    outcome = outcomes.conclude(
        saved, execution.directory, metric, rows, information, request.published, request.equivalence
    )
    report.write(outcome, saved, execution.directory, execution.command, execution.train_command, execution.latex)
    shared.upload()
    return outcome


def make_plan(request: Request, progress: Progress) -> tuple[Plan, str]:
    """Returns the plan of an ablation, with validated configs, and the metric that methods are compared by."""
    example, make = request.make(request.fusions[0], 0, ""), request.make
    metric = request.metric or compared_metric(example)
    metrics = configs.selectable(example)
    if metric not in metrics:
        raise UserError("no such metric", path="--metric", value=metric, choices=metrics)
    if request.match != "none":
        make, target, matches = budget.match_widths(make, request.fusions, request.match)
        progress.matched(matches, request.match, target)
    planned = plan.build(make, request.fusions, request.seeds, request.vary, _folds(example))
    for trial in planned.trials:
        configs.check(configs.from_json(trial.config), jax.device_count())
    return planned, metric


def _folds(example: ConfigDict) -> list[int]:
    """Returns the folds of a config's data, each of which is tested on; empty without folds."""
    data = configs.read(example).data
    if not (data.folds or data.fold_by):
        return []
    configs.check(example, jax.device_count())
    folds = fold_numbers(data)
    if data.fold not in (0, folds[0]):
        message = "an ablation tests on every fold; leave it out"
        raise UserError(message, path="config.data.fold", value=data.fold)
    return folds


def _run_trials(
    saved: Plan, own: Sequence[Trial], metric: str, shared: RemoteCopy, execution: Execution, taking: Taking
) -> bool:
    """Trains and probes the trials of this shard; returns whether the trials of all shards are finished."""
    directory, probing = execution.directory, outcomes.probing_stage(metric)

    with scheduling.executor(
        directory, execution.jobs, execution.prepare_worker, execution.engine, execution.resources, execution.remote
    ) as executor:

        def show(title: str, trials: Sequence[Trial], stage: Stage) -> None:
            events = scheduling.run(trials, stage, directory, executor, taking, shared)
            execution.progress.show(title, trials, directory, events, stage)

        def probe(trials: Sequence[Trial]) -> None:
            names = {trial.name for trial in trials}
            selected = outcomes.selected_trials(saved, directory, metric)
            show("probe", [trial for trial in selected if trial.name in names], probing)

        show("train", own, runner.TRAINING)
        shared.fetch(saved.trials)
        if outcomes.unfinished(saved, directory):
            probe(own)
            shared.fetch(saved.trials)  # other shards may have finished meanwhile
        if unfinished := outcomes.unfinished(saved, directory):
            execution.progress.waiting(len(unfinished), len(saved.trials))
            return False
        probe(saved.trials)
        return True


def cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


@dataclasses.dataclass(frozen=True)
class AblationResult:
    """A finished ablation; `report.html` in its directory shows the figures.

    Attributes:
      directory: the ablation's directory.
      outcome: methods, claims, results, probes and errors.
    """

    directory: Path
    outcome: Outcome

    @property
    def claims(self) -> Claims:
        """The claims: `statements`, each with `text`, `verdict` and evidence; `none` is the reason for having none."""
        return self.outcome.claims

    @property
    def table(self) -> list[dict[str, Any]]:
        """One dict per method, best mean test score first.

        Keys: `method`, `mean` and `std` over seeds (None with no finished seed, or with fewer than two), `test` (a
        score per run), `seeds`, `folds` (of each run; empty without folds), `chosen` (the values selected on
        validation) and `parameters`. With folds, mean and std are over the means of the folds.
        """
        rows = [
            {
                "method": row.method,
                "mean": row.mean if row.test else None,
                "std": statistics.stdev(row.units) if len(row.units) > 1 else None,
                "test": list(row.test),
                "seeds": list(row.seeds),
                "folds": list(row.folds),
                "chosen": dict(row.selected),
                "parameters": row.parameters,
            }
            for row in self.outcome.methods
        ]
        sign = -1 if self.outcome.higher else 1
        return sorted(rows, key=lambda row: (row["mean"] is None, sign * (row["mean"] or 0.0)))

    @property
    def errors(self) -> dict[str, str]:
        """The error of each run that failed."""
        return self.outcome.errors


def ablate(
    config: ConfigDict | str | Path,
    fusions: Sequence[str] | str,
    seeds: int,
    workdir: str | Path,
    *,
    changes: Mapping[str, Any] | None = None,
    vary: Mapping[str, Sequence[Any]] | None = None,
    match: str = "none",
    metric: str = "",
    equivalence: float = 0.01,
    jobs: int = 0,
) -> AblationResult:
    """Compares fusion strategies over seeds; the same call resumes an interrupted ablation.

    Every strategy and each modality alone is trained with the same seeds. A varied learning rate is selected on
    validation for each method. Fewer than six seeds support no claim. A config whose data has folds
    (`data.folds`, `data.fold_by`) is tested on each of them with every seed, and judged over folds.

    Args:
      config: a config, or a config file, `path/to/X.py[:arg=value,...]`.
      fusions: names of strategies, or `all`.
      seeds: the number of seeds per method.
      workdir: the ablation's directory.
      changes: values by dotted path that all runs share, such as `{"steps": 100}`.
      vary: config key -> values, such as `{"optim.learning_rate": [1e-3, 3e-4]}`.
      match: `parameters` or `flops` chooses widths at which all strategies cost the same.
      metric: the metric to select and compare by; "": the config's.
      equivalence: the share of a score below which methods count as equivalent.
      jobs: the number of processes on CPU; 0 runs in this process. A script that starts processes needs the usual
        `if __name__ == "__main__":` of multiprocessing.

    Raises:
      UserError: an unknown strategy or key, or a directory of another ablation.
    """
    names = list(fusion_classes(fusions))
    given = config if isinstance(config, ConfigDict) else str(config)
    make = functools.partial(trial_config, given, dict(changes or {}))
    request = Request(make, names, seeds, vary or {}, match, metric, equivalence=equivalence)
    source = "config" if isinstance(config, ConfigDict) else repr(given)
    command = f"mmfusion.ablate({source}, fusions={names}, seeds={seeds}, workdir={str(workdir)!r})"
    execution = Execution(Path(workdir), jobs, command=command)
    outcome = run_ablation(request, execution)
    assert outcome is not None  # None only with other shards
    return AblationResult(Path(workdir), outcome)


def trial_config(
    config: ConfigDict | str, changes: Mapping[str, Any], fusion: str, seed: int, modalities: str
) -> ConfigDict:
    """Returns the config of one run of an ablation.

    Args:
      config: a config, or `FILE[:key=value,...]`.
      changes: values by dotted path.
      fusion: the strategy; "": the config's own.
      seed: the seed.
      modalities: names joined by `+`, such as `image+text`; "": all.

    Raises:
      UserError: the source sets the strategy or the seed.
    """
    if isinstance(config, ConfigDict):
        result = config.copy_and_resolve_references()
        if fusion and result.model.fusion.name != fusion:
            configs.choose(result, "model.fusion", fusion)
        with result.unlocked():
            result.seed = seed
    else:
        result = load_file(trial_source(config, fusion, seed))
    # The options of the compared strategies do not apply to a unimodal baseline.
    set_values(result, {k: v for k, v in changes.items() if fusion or not k.startswith("model.fusion.")})
    adopt(result)
    defaults.keep_modalities(result, modalities)
    return result.lock()
