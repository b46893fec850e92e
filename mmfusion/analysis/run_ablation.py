"""An ablation from its plan to its report: tune, train every trial, probe the selected trials, make the claims.

The command `ablate` and `mmfusion.ablate` share `run_ablation`.
"""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
from ml_collections import ConfigDict

from mmfusion import config as configs
from mmfusion.analysis import floors, report
from mmfusion.analysis import outcome as outcomes
from mmfusion.analysis.ablation import budget, plan, runner, scheduling, tuning
from mmfusion.analysis.ablation.leases import Leases, Taking, Unshared
from mmfusion.analysis.ablation.plan import MakeConfig, Plan, Trial
from mmfusion.analysis.ablation.remote_copy import RemoteCopy
from mmfusion.analysis.ablation.runner import Events, Stage
from mmfusion.analysis.ablation.tuning import Search
from mmfusion.analysis.baselines import TRIALS
from mmfusion.analysis.outcome import Outcome
from mmfusion.analysis.probing.probe import compared_metric
from mmfusion.data import trust
from mmfusion.data.opening import fold_numbers
from mmfusion.errors import UserError

REPORT, CHOICE = "report", "choice"  # the leases of the tables and the report, and of what the search chooses


class Progress(Protocol):
    """Receives the progress of an ablation; `show` must exhaust the events, as iterating them runs the stage."""

    def matched(self, matches: Mapping[str, budget.Match], kind: str, target: int) -> None: ...

    def show(self, title: str, trials: Sequence[Trial], directory: Path, events: Events, stage: Stage) -> None: ...

    def waiting(self, unfinished: int, trials: int, then: str) -> None: ...


class Silent:
    """A `Progress` that shows nothing."""

    def matched(self, matches: Mapping[str, budget.Match], kind: str, target: int) -> None:
        """Does nothing."""

    def show(self, title: str, trials: Sequence[Trial], directory: Path, events: Events, stage: Stage) -> None:
        """Exhausts the events."""
        for _ in events:
            pass

    def waiting(self, unfinished: int, trials: int, then: str) -> None:
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
      tune: the number of settings of the search space that each method is tuned with; 0: none is tuned.
      tune_seeds: the number of seeds of each setting.
      space: changes of the search space, see `search_space.space`.
    """

    make: MakeConfig
    fusions: Sequence[str]
    seeds: int
    vary: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    match: str = "none"
    metric: str = ""
    published: Mapping[str, float] = dataclasses.field(default_factory=dict)
    equivalence: float = 0.01
    tune: int = 0
    tune_seeds: int = 1
    space: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.seeds < 1:
            raise UserError("must be at least 1", path="--seeds", value=self.seeds)
        if not 0 <= self.equivalence < 1:
            raise UserError("must be a share of the score, in [0, 1)", path="--equivalence", value=self.equivalence)
        if self.tune < 0:
            raise UserError("must be 0 or more", path="--tune", value=self.tune)
        if self.tune_seeds < 1:
            raise UserError("must be at least 1", path="--tune_seeds", value=self.tune_seeds)
        if self.space and not self.tune:
            raise UserError("needs --tune=N", path="--space", value=",".join(self.space))
        if self.tune and self.seeds > tuning.FIRST_SEED:
            message = f"must be at most {tuning.FIRST_SEED} with --tune, whose seeds follow"
            raise UserError(message, path="--seeds", value=self.seeds)


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

    def __post_init__(self):
        if self.engine and self.engine.partition(":")[0] != "ray":
            raise UserError("no such engine", path="--engine", value=self.engine, choices=["ray"])


def run_ablation(request: Request, execution: Execution) -> Outcome | None:
    """Runs or resumes an ablation, together with any others that run the same one in the same directory.

    Returns:
      The outcome; None while other shards have unfinished trials.

    Raises:
      UserError: nothing to run, an invalid key, or a directory of another ablation.
      Preempted: SIGTERM was received, and running trials saved a checkpoint; or another worker took over a trial.
    """
    planned, metric, search = make_plan(request, execution.progress)
    RemoteCopy(execution.remote, execution.directory).fetch(())
    tuning.start(execution.directory, search)
    saved = None if search else _save(planned, execution)  # before a lease: it may refuse the directory
    leases = Leases(execution.remote or execution.directory)
    with contextlib.nullcontext(Unshared()) if execution.shard else leases as taking:
        if search:
            chosen = _tune(search, execution, taking)
            if chosen is None:
                return None
            planned = tuning.tuned_plan(planned, chosen)
        shared = saved or _save(planned, execution)
        if not _run_trials(planned, metric, shared, execution, taking):
            return None
        with taking.holding(REPORT):  # what takes long there is read from files by the other workers
            shared.fetch(planned.trials)
            return _conclude(planned, search, metric, shared, request, execution)


def _save(planned: Plan, execution: Execution) -> RemoteCopy:
    """Saves a plan in its directory, with what other machines finished of it; returns the copy in the bucket."""
    shared = RemoteCopy(execution.remote, execution.directory)
    shared.fetch(planned.trials)
    plan.save(planned, execution.directory)
    for trial in planned.trials:
        trust.remember(trial.config)
    shared.upload()
    return shared


def _tune(search: Search, execution: Execution, taking: Taking) -> dict[str, tuning.Chosen] | None:
    """Runs what is left of the search; returns what it chose, None while other shards have unfinished trials of it."""
    directory, remote = execution.directory / tuning.FOLDER, execution.remote and f"{execution.remote}/{tuning.FOLDER}"
    below = dataclasses.replace(execution, directory=directory, remote=remote)
    shared = _save(search.plan, below)
    known = tuning.chosen(execution.directory)  # a failed trial of these methods is not run again
    left = [trial for trial in search.plan.trials if trial.method not in known]
    own = [trial for trial in runner.shard(search.plan.trials, execution.shard or "0/1") if trial in left]
    if left:
        with _executor(below) as executor:
            events = scheduling.run(own, runner.TRAINING, directory, executor, taking, shared)
            execution.progress.show("tune", own, directory, events, runner.TRAINING)
        shared.fetch(search.plan.trials)
    if unfinished := outcomes.unfinished(dataclasses.replace(search.plan, trials=tuple(left)), directory):
        then = "run this one again when they have ended, as the others wait for what the search chooses"
        execution.progress.waiting(len(unfinished), len(search.plan.trials), then)
        return None
    copy = RemoteCopy(execution.remote, execution.directory)
    with taking.holding(CHOICE):
        copy.fetch(())  # another worker may have chosen meanwhile
        results, _ = outcomes.read_outputs(search.plan, directory)
        chosen = tuning.choose(search, execution.directory, results)
        copy.upload()
    return chosen


def _conclude(
    saved: Plan, search: Search | None, metric: str, shared: RemoteCopy, request: Request, execution: Execution
) -> Outcome:
    """Writes the tables and the report of the finished trials."""
    example = request.make(request.fusions[0], 0, "")
    folds = tuple(dict.fromkeys(fold for trial in saved.trials if (fold := plan.fold_of(trial)) is not None))
    trials = request.tune or TRIALS
    found = floors.classical_baselines(example, metric, request.seeds, execution.directory, folds, trials)
    outcome = outcomes.conclude(
        saved, execution.directory, metric, found.results, found.information, request.published, request.equivalence,
        found.examples, search, trials,
    )  # fmt: skip
    report.write(outcome, saved, execution.directory, execution.command, execution.train_command, execution.latex)
    shared.upload()
    return outcome


def make_plan(request: Request, progress: Progress) -> tuple[Plan, str, Search | None]:
    """Returns the plan of an ablation before it is tuned, the metric that methods are compared by, and the search.

    The configs of both plans are valid.
    """
    example, make = request.make(request.fusions[0], 0, ""), request.make
    metric = request.metric or compared_metric(example)
    metrics = configs.selectable(example)
    if metric not in metrics:
        raise UserError("no such metric", path="--metric", value=metric, choices=metrics)
    folds = _folds(example)
    if folds and request.tune:
        message = (
            "cannot be combined with folds, as the validation rows of one fold are test rows of another; "
            "--vary=optim.learning_rate=... selects in each fold"
        )
        raise UserError(message, path="--tune", value=request.tune)
    if request.match != "none":
        make, target, matches = budget.match_widths(make, request.fusions, request.match)
        progress.matched(matches, request.match, target)
    planned, search = plan.build(make, request.fusions, request.seeds, request.vary, folds), None
    if request.tune:
        search = tuning.plan_search(
            make, request.fusions, request.vary, request.tune, request.tune_seeds, request.space, metric
        )
    for trial in (*planned.trials, *(search.plan.trials if search else ())):
        configs.check(configs.from_json(trial.config), jax.device_count())
    return planned, metric, search


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


def _executor(execution: Execution) -> contextlib.AbstractContextManager[scheduling.Executor]:
    return scheduling.executor(
        execution.directory, execution.jobs, execution.prepare_worker, execution.engine, execution.resources,
        execution.remote,
    )  # fmt: skip


def _run_trials(saved: Plan, metric: str, shared: RemoteCopy, execution: Execution, taking: Taking) -> bool:
    """Trains and probes the trials of this shard; returns whether the trials of all shards are finished."""
    directory, probing = execution.directory, outcomes.probing_stage(metric)
    own = runner.shard(saved.trials, execution.shard or "0/1")

    with _executor(execution) as executor:

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
            execution.progress.waiting(len(unfinished), len(saved.trials), "the last one writes the report")
            return False
        probe(saved.trials)
        return True


def cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
