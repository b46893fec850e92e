"""Equal tuning: one search space, the same settings for every method, and a choice by validation alone."""

import dataclasses
import json
import math
import sys
from concurrent import futures

import numpy as np
import pytest

from mmfusion.analysis import floors, report, run_ablation
from mmfusion.analysis import outcome as outcomes
from mmfusion.analysis.ablation import leases, runner, search_space, tuning
from mmfusion.analysis.ablation import plan as plans
from mmfusion.analysis.run_ablation import Execution, Request
from tests.analysis.ablation.test_ablation import make
from tests.errors import rejects

RATE, DECAY, DROPOUT = search_space.SPACE
PROBE = json.dumps({"sign": 1, "metric": "accuracy", "subsets": {"image": None}, "interaction": {}, "perceptual": {}})


def search(fusions=("gmu", "co_attention"), *, vary=None, count=4, seeds=1, changes=None):
    return tuning.plan_search(make, fusions, vary or {}, count, seeds, changes or {}, "accuracy")


def test_settings_cover_the_space_evenly_and_extend_each_other():
    space = search_space.space({"model.width": "8,16,24"})
    drawn = search_space.settings(space, 64)
    rates = np.log([setting[RATE] for setting in drawn])
    low, high = math.log(3e-4), math.log(1e-2)
    counts, _ = np.histogram(rates, 8, (low - 1e-2, high + 1e-2))
    assert counts.sum() == 64 and counts.min() >= 6  # 8 of each in the mean, by the logarithm
    assert all(0 <= setting[DROPOUT] <= 0.5 for setting in drawn)
    assert min([setting["model.width"] for setting in drawn].count(width) for width in (8, 16, 24)) >= 18
    assert search_space.settings(space, 5) == drawn[:5] == search_space.settings(space, 64)[:5]


def test_search_space_is_changed_by_key():
    space = search_space.space({RATE: "1e-5..1e-3:log", DROPOUT: "none", "optim.name": "adamw,sgd"})
    assert {key: str(found) for key, found in space.items()} == {
        RATE: "1e-05 to 0.001 (log)", DECAY: "1e-05 to 0.1 (log)", "optim.name": "adamw, sgd",
    }  # fmt: skip
    for text in ("1..1", "2..1", "0..1:log", "a..1", "1..inf", "0..1:lin", "nan..1"):
        with rejects("--space", f"{RATE}={text}", says="LOW..HIGH"):
            search_space.space({RATE: text})
    with rejects("--space", f"{RATE},{DECAY},{DROPOUT}", says="no key"):
        search_space.space(dict.fromkeys(search_space.SPACE, "none"))


def test_search_gives_every_method_the_same_settings_and_seeds_of_its_own():
    found = search(count=4, seeds=2)
    assert found.methods == ["gmu", "co_attention", "image alone", "text alone"]
    drawn = search_space.settings(search_space.space({}), 4)
    for method in found.methods:
        trials = [trial for trial in found.plan.trials if trial.method == method]
        assert [trial.config["seed"] for trial in trials] == [1000] * 4 + [1001] * 4
        assert [trial.hyperparameters for trial in trials] == drawn * 2
        for trial, setting in zip(trials, drawn * 2, strict=True):
            assert trial.config["optim"]["learning_rate"] == setting[RATE]
            sections = list(trial.config["model"]["encoders"].values())
            sections += [trial.config["model"]["fusion"]] if method == "co_attention" else []
            assert {section["dropout"] for section in sections} == {setting[DROPOUT]}
    assert len({trial.name for trial in found.plan.trials}) == 4 * 4 * 2


def test_search_ignores_keys_that_a_method_lacks():
    changes = {**dict.fromkeys(search_space.SPACE, "none"), "model.fusion.layers": "1,2"}
    found = search(changes=changes)
    tried = {method: [t.hyperparameters for t in found.plan.trials if t.method == method] for method in found.methods}
    assert tried["gmu"] == [{}]  # its four settings are the same
    assert [one["model.fusion.layers"] for one in tried["co_attention"]] in ([1, 2], [2, 1])
    with rejects("--space", "model.fusion.layer", says="no method"):
        search(changes={"model.fusion.layer": "1,2"})


def test_search_crosses_varied_values_of_the_optimizer_and_refuses_tuned_keys():
    found = search(("gmu",), vary={"optim.name": ["adamw", "sgd"], "model.width": [8, 16]}, count=2)
    assert "gmu model.width=8" in found.methods
    trials = [trial for trial in found.plan.trials if trial.method == "gmu model.width=16"]
    assert [trial.config["optim"]["name"] for trial in trials] == ["adamw", "adamw", "sgd", "sgd"]
    assert found.record()["space"]["optim.name"] == "adamw, sgd" and len(found.settings) == 2
    assert len({trial.name for trial in trials}) == 4 and {trial.config["model"]["width"] for trial in trials} == {16}
    for key in (RATE, "model.fusion.dropout"):
        with rejects("--vary", key, says="--tune"):
            search(vary={key: [0.1]})
    search(vary={"model.fusion.dropout": [0.1]}, fusions=("co_attention",), changes={DROPOUT: "none"})


def results(found, scores):
    """Returns the results of a search: method -> a score per trial, in order; None: it failed."""
    of = {}
    for method in found.methods:
        trials = [trial for trial in found.plan.trials if trial.method == method]
        for trial, score in zip(trials, scores[method], strict=True):
            if score is not None:  # test scores in the opposite order must not matter
                of[trial.name] = {"valid": {"accuracy": score}, "test": {"accuracy": 1 - score}}
    return of


def test_choice_is_the_best_mean_validation_score_of_settings_without_failures(tmp_path):
    found = search(("gmu",), count=3, seeds=2)
    tuning.start(tmp_path, found)
    scores = {
        "gmu": [0.6, 0.8, 0.9, 0.6, 0.6, None],  # 0.6, 0.7, failed with one seed
        "image alone": [0.5, 0.5, 0.4, 0.5, 0.5, 0.4],  # the first two are equal
        "text alone": [None, math.nan, None, 0.5, 0.5, None],
    }
    chosen = tuning.choose(found, tmp_path, results(found, scores))
    drawn = search_space.settings(found.space, 3)
    assert chosen["gmu"] == tuning.Chosen(drawn[1], pytest.approx(0.7), 3, 1)
    assert chosen["image alone"] == tuning.Chosen(drawn[0], 0.5, 3, 0)
    assert chosen["text alone"] == tuning.Chosen({}, None, 3, 3)
    better = {method: [0.1, 0.1, 0.9] * 2 for method in scores}
    assert tuning.choose(found, tmp_path, results(found, better)) == chosen == tuning.chosen(tmp_path)

    base = plans.build(make, ["gmu"], 2, {})
    planned = tuning.tuned_plan(base, chosen)
    assert [trial.name for trial in planned.trials] == [trial.name for trial in base.trials]
    by_name = {trial.name: trial for trial in planned.trials}
    assert by_name["gmu_seed=1"].config["optim"]["learning_rate"] == drawn[1][RATE]
    assert by_name["gmu_seed=1"].hyperparameters == drawn[1]
    untuned = next(trial for trial in base.trials if trial.name == "text-alone_seed=1")
    assert by_name["text-alone_seed=1"] == untuned  # the config's own values


def test_choice_among_varied_values_leaves_one_trial_per_seed(tmp_path):
    found = search(("gmu",), vary={"optim.name": ["adamw", "sgd"]}, count=2)
    tuning.start(tmp_path, found)
    scores = {method: [0.1, 0.2, 0.3, 0.9] for method in found.methods}
    planned = tuning.tuned_plan(
        plans.build(make, ["gmu"], 2, {"optim.name": ["adamw", "sgd"]}),
        tuning.choose(found, tmp_path, results(found, scores)),
    )
    assert [trial.name for trial in planned.trials] == [
        f"{method}_seed={seed}" for seed in (0, 1) for method in ("gmu", "image-alone", "text-alone")
    ]
    best = next(trial for trial in found.plan.trials if trial.name == "gmu_setting=3_seed=1000")
    assert planned.trials[0].config == {**best.config, "seed": 0} and best.config["optim"]["name"] == "sgd"


def test_directory_is_refused_with_another_search(tmp_path):
    tuning.start(tmp_path / "a", search())
    tuning.start(tmp_path / "a", search())
    tuning.start(tmp_path / "a", search(("gmu", "concat")))  # more strategies may follow
    with rejects(tmp_path / "a", None, says="trials 4, and now 8"):
        tuning.start(tmp_path / "a", search(count=8))
    with rejects(tmp_path / "a", None, says="space"):
        tuning.start(tmp_path / "a", search(changes={DROPOUT: "0..0.3"}))
    with rejects(tmp_path / "a", None, says="--tune=4"):
        tuning.start(tmp_path / "a", None)
    tuning.start(tmp_path / "b", None)
    plans.save(plans.build(make, ["gmu"], 1, {}), tmp_path / "b")
    with rejects(tmp_path / "b", None, says="without --tune"):
        tuning.start(tmp_path / "b", search())


def test_request_refuses_invalid_tuning():
    for change, path in (({"tune": -1}, "--tune"), ({"tune": 2, "tune_seeds": 0}, "--tune_seeds"),
                         ({"space": {RATE: "none"}}, "--space"), ({"tune": 2, "seeds": 1001}, "--seeds")):  # fmt: skip
        with rejects(path, says=""):
            Request(**{"make": make, "fusions": ["gmu"], "seeds": 2, **change})


def test_tuning_is_refused_with_folds():
    def with_folds(*args):
        return make(*args, **{"data.folds": 3, "data.test": "test"})

    with rejects("--tune", 2, says="validation rows of one fold are test rows of another"):
        run_ablation.make_plan(Request(with_folds, ["gmu"], 1, tune=2), run_ablation.Silent())


class Trained:
    """Replaces training: a run's score falls with the distance of its learning rate from 1e-3."""

    def __init__(self):
        self.names, self.failing = [], set()

    def __call__(self, trial, folder):
        self.names.append(trial.name)
        if trial.name in self.failing:
            raise ValueError("no memory")
        score = 1 - abs(math.log(trial.config["optim"]["learning_rate"] / 1e-3)) / 10
        of = {"accuracy": score, "loss": 1.0}
        content = {"valid": of, "test": of, "parameters": 1, "steps": 8, "best_step": 4, "data": {"rows": "r"}}
        (folder / runner.RESULT).write_text(json.dumps(content))


@pytest.fixture
def trained(monkeypatch):
    trained = Trained()
    monkeypatch.setattr(runner, "TRAINING", runner.Stage(trained, runner.RESULT))
    probing = runner.Stage(lambda trial, folder: (folder / "probe.json").write_text(PROBE), "probe.json")
    monkeypatch.setattr(outcomes, "probing_stage", lambda metric: probing)
    monkeypatch.setattr(floors, "classical_baselines", lambda *_: floors.Classical([], {}, {}))
    monkeypatch.setattr(report, "write", lambda *_: None)
    return trained


def test_ablation_tunes_and_then_runs_the_chosen_settings_with_fresh_seeds(tmp_path, trained):
    request = Request(make, ["gmu"], 2, tune=4)
    trained.failing = {"text-alone_setting=0_seed=1000"}
    outcome = run_ablation.run_ablation(request, Execution(tmp_path))
    assert len(trained.names) == 3 * 4 + 3 * 2
    drawn = search_space.settings(search_space.space({}), 4)
    best = min(drawn, key=lambda setting: abs(math.log(setting[RATE] / 1e-3)))
    assert {row.method: row.selected for row in outcome.methods} == dict.fromkeys(
        ("gmu", "image alone", "text alone"), best
    )
    assert [row.seeds for row in outcome.methods] == [(0, 1)] * 3
    assert outcome.errors == {"text-alone_setting=0_seed=1000": "tuning: ValueError: no memory"}
    content = json.loads((tmp_path / "claims.json").read_text())["tuning"]
    assert content["chosen"]["text alone"]["failed"] == 1 and content["trials"] == 4 and content["seeds"] == [1000]
    assert [path.name for path in sorted((tmp_path / "trials").iterdir())] == [
        f"{method}_seed={seed}" for method in ("gmu", "image-alone", "text-alone") for seed in (0, 1)
    ]

    trained.names, trained.failing = [], set()
    with rejects(tmp_path, None, says="trials 4, and now 8"):
        run_ablation.run_ablation(dataclasses.replace(request, tune=8), Execution(tmp_path))
    assert not trained.names
    again = run_ablation.run_ablation(dataclasses.replace(request, seeds=3), Execution(tmp_path))
    assert sorted(trained.names) == ["gmu_seed=2", "image-alone_seed=2", "text-alone_seed=2"]  # nothing is tuned again
    assert again.methods[0].selected == best
    trained.names = []
    run_ablation.run_ablation(dataclasses.replace(request, seeds=3, fusions=["gmu", "mean"]), Execution(tmp_path))
    assert sorted(trained.names) == sorted(
        [f"mean_seed={seed}" for seed in range(3)] + [f"mean_setting={i}_seed=1000" for i in range(4)]
    )


def test_shards_wait_for_the_search_and_end_in_the_same_tables(tmp_path, trained):
    request = Request(make, ["gmu"], 2, tune=3)
    run_ablation.run_ablation(request, Execution(tmp_path / "alone"))
    told = []

    class Progress(run_ablation.Silent):
        def waiting(self, unfinished, trials, then):
            told.append((unfinished, trials, then.partition(" ")[0]))

    def run(shard):
        return run_ablation.run_ablation(request, Execution(tmp_path / "b", shard=shard, progress=Progress()))

    assert run("0/2") is None and told == [(4, 9, "run")]
    assert run("1/2") is None and told[1:] == [(3, 6, "the")]
    assert run("0/2") is not None
    for name in ("claims.json", "runs.csv", "tuning.json"):
        assert (tmp_path / "b" / name).read_text() == (tmp_path / "alone" / name).read_text()


def test_workers_at_the_same_time_share_the_search(tmp_path, trained, monkeypatch):
    monkeypatch.setattr(leases, "POLL", 0.05)
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # threads that redirect it do not restore it in order
    request = Request(make, ["gmu"], 2, tune=4)
    alone = run_ablation.run_ablation(request, Execution(tmp_path / "alone"))
    expected, trained.names = sorted(trained.names), []
    with futures.ThreadPoolExecutor(3) as threads:
        runs = [threads.submit(run_ablation.run_ablation, request, Execution(tmp_path / "both")) for _ in range(3)]
        found = [run.result() for run in runs]
    assert sorted(trained.names) == expected  # each trial once
    assert all(outcome.methods == alone.methods for outcome in found)
    for name in ("claims.json", "runs.csv", "tuning.json"):
        assert (tmp_path / "both" / name).read_text() == (tmp_path / "alone" / name).read_text()


def test_machines_share_the_search_in_a_bucket(tmp_path, trained, monkeypatch):
    from fsspec.implementations.memory import MemoryFileSystem

    monkeypatch.setattr(MemoryFileSystem, "store", {})
    request = Request(make, ["gmu"], 1, tune=2)
    first = run_ablation.run_ablation(request, Execution(tmp_path / "a", remote="memory://bucket/x"))
    assert len(trained.names) == 3 * 2 + 3
    second = run_ablation.run_ablation(request, Execution(tmp_path / "b", remote="memory://bucket/x"))
    assert len(trained.names) == 3 * 2 + 3 and second.methods == first.methods
    for name in ("claims.json", "runs.csv", "tuning.json"):
        assert (tmp_path / "b" / name).read_text() == (tmp_path / "a" / name).read_text()
