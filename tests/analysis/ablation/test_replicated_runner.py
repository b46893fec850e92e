"""Trials of a method as replicas in one program: grouping, written files and errors."""

import functools
import json

import jax
import pytest

from mmfusion.analysis.ablation import plan, replicated_runner, runner
from mmfusion.errors import Preempted, UserError
from tests.analysis.ablation.test_ablation import make


@pytest.fixture
def ablation_plan(data_dir):
    make_config = functools.partial(make, **{"data.dir": data_dir, "steps": 4, "parallel.mode": "jit"})
    return plan.build(make_config, ["concat", "mean"], 2, {"optim.learning_rate": [1e-3, 3e-3]})


def test_groups_differ_in_seed_and_learning_rate_only(ablation_plan):
    found = replicated_runner.groups(ablation_plan.trials)
    assert [{trial.method for trial in group} for group in found] == [
        {"concat"}, {"mean"}, {"image alone"}, {"text alone"},
    ]  # fmt: skip
    assert [len(group) for group in found] == [4, 4, 4, 4]


@pytest.mark.process
def test_replicated_runner_writes_each_trials_files(ablation_plan, tmp_path):
    trials = [
        trial
        for trial in ablation_plan.trials
        if trial.method == "concat" and trial.hyperparameters == ablation_plan.trials[0].hyperparameters
    ]
    assert len(trials) == 2
    assert {trial.name: error for trial, error in replicated_runner.run(tmp_path, trials)} == {
        trial.name: "" for trial in trials
    }
    assert all(runner.is_done(tmp_path, trial) for trial in trials)
    for trial in trials:
        assert (runner.trial_directory(tmp_path, trial) / "log.txt").read_text().count("test") > 0
    assert not list(replicated_runner.run(tmp_path, trials))


def test_replicated_runner_halves_groups_on_oom_and_isolates_trial_errors(ablation_plan, tmp_path, monkeypatch):
    trials = [trial for trial in ablation_plan.trials if trial.method == "concat"]
    sizes = []

    def train_two_at_most(runs, around):
        sizes.append(len(runs))
        if len(runs) > 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")
        return [UserError("wrong"), Preempted("saved")] if len(sizes) == 2 else [{}, {}]

    monkeypatch.setattr(replicated_runner, "train_replicas", train_two_at_most)
    ended = replicated_runner.run(tmp_path, trials)
    assert next(ended) == (trials[0], "UserError: wrong")
    with pytest.raises(Preempted):
        next(ended)
    failed = runner.trial_directory(tmp_path, trials[0]) / "failed.json"
    assert json.loads(failed.read_text()) == {"error": "UserError: wrong"}
    assert [(trial, error) for trial, error in replicated_runner.run(tmp_path, trials[:2])] == [
        (trial, "") for trial in trials[:2]
    ]
    assert sizes == [4, 2, 2]
    assert not failed.exists()


def test_replicated_runner_continues_after_a_failed_group(ablation_plan, tmp_path, monkeypatch):
    calls = []

    def train_replicas(runs, around):
        calls.append(len(runs))
        if len(calls) == 1:
            raise TypeError("no such shape")
        return [{}] * len(runs)

    monkeypatch.setattr(replicated_runner, "train_replicas", train_replicas)
    ended = [error for _, error in replicated_runner.run(tmp_path, ablation_plan.trials)]
    assert ended == ["TypeError: no such shape"] * 4 + [""] * 12
