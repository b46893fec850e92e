"""Ablation plans and their execution: trials, invariants of a plan, and files that trials write."""

import dataclasses
import functools
import json
import os
import signal
import threading
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from mmfusion import config as configs
from mmfusion.analysis import baselines, floors, run_ablation
from mmfusion.analysis import outcome as outcomes
from mmfusion.analysis.ablation import plan as plans
from mmfusion.analysis.ablation import runner
from mmfusion.analysis.claims.selection import MethodResult
from mmfusion.analysis.ensembles import MEAN, STACKED
from mmfusion.analysis.example_scores import Examples
from mmfusion.analysis.probing import pid
from mmfusion.analysis.report import tables
from mmfusion.analysis.run_ablation import Request
from mmfusion.errors import Preempted, UserError
from mmfusion.objectives import Task
from mmfusion.training import outputs
from tests import planted, tiny
from tests.errors import rejects


def make(fusion, seed, modalities, **changes):
    arg = [f"seed={seed}"] + [f"fusion={fusion}"] * bool(fusion) + [f"modalities={modalities}"] * bool(modalities)
    return tiny.config(",".join(arg), changes)


def test_plan_crosses_methods_seeds_and_varied_values():
    plan = plans.build(make, ["gmu", "concat"], 2, {"optim.learning_rate": [1e-3, 3e-4], "model.width": [8, 16]})
    methods = [f"{name} model.width={width}" for name in ("gmu", "concat", "image alone", "text alone")
               for width in (8, 16)]  # fmt: skip
    assert {trial.method for trial in plan.trials} == set(methods)
    assert len(plan.trials) == 2 * 8 * 2
    # All of the first seed run first, so each strategy compiles once early.
    assert [trial.config["seed"] for trial in plan.trials] == [0] * 16 + [1] * 16
    for trial in plan.trials:
        assert trial.unimodal_baseline == ("alone" in trial.method)
        assert trial.hyperparameters == {"optim.learning_rate": trial.config["optim"]["learning_rate"]}
        assert f"model.width={trial.config['model']['width']}" in trial.method
        assert set(trial.name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._=-")
    baselines = {trial.method.split()[0]: trial for trial in plan.trials if trial.unimodal_baseline}
    assert set(baselines["image"].config["model"]["encoders"]) == {"image"}


def test_plan_of_one_modality_has_no_unimodal_baseline():
    plan = plans.build(functools.partial(_only, "image"), ["gmu"], 1, {})
    assert [trial.method for trial in plan.trials] == ["gmu"]


def _only(modality, fusion, seed, _):
    return make(fusion, seed, modality)


@pytest.mark.parametrize(
    ("fusions", "seeds", "vary", "path", "fact"),
    [
        ([], 1, {}, "", "no trials"),
        (["gmu"], 0, {}, "", "no trials"),
        (["gmu"], 1, {"optim.learning_rate": []}, "", "no trials"),
        (["gmu", "gmu"], 1, {}, "", "twice"),
        (["gmu"], 1, {"optim.learning_rat": [1e-3]}, "--vary", "gmu"),
        (["concat"], 1, {"model.fusion.heads": [2]}, "--vary", "concat"),
        (["concat"], 1, {"data.name": ["a", "b"]}, "--vary", "test set"),
        (["concat"], 1, {"data.fold": [0, 1]}, "--vary", "test set"),
        (["concat"], 1, {"data.targets.label.kind": ["x"]}, "--vary", "test set"),
    ],
)
def test_plan_rejects_invalid_arguments(fusions, seeds, vary, path, fact):
    with rejects(path, next(iter(vary)) if path else None, says=fact):
        plans.build(make, fusions, seeds, vary)


def test_plan_runs_every_method_and_seed_in_every_fold():
    plan = plans.build(functools.partial(make, **{"data.folds": 3}), ["gmu", "concat"], 2, {}, folds=[0, 1, 2])
    assert len(plan.trials) == len({trial.name for trial in plan.trials}) == 3 * 2 * 4
    assert [plans.fold_of(trial) for trial in plan.trials] == [0] * 8 + [1] * 8 + [2] * 8  # data is opened once a fold
    assert plan.trials[-1].name == "text-alone_seed=1_fold=2" and plan.trials[-1].config["data"]["fold"] == 2
    assert {plans.fold_of(trial) for trial in plans.build(make, ["gmu"], 1, {}).trials} == {None}


def test_ablation_tests_on_every_fold_and_takes_no_other():
    request = Request(functools.partial(make, **{"data.folds": 3, "data.test": "test"}), ["gmu"], 1)
    planned, _, _ = run_ablation.make_plan(request, run_ablation.Silent())
    assert [plans.fold_of(trial) for trial in planned.trials] == [0] * 3 + [1] * 3 + [2] * 3
    request = Request(functools.partial(make, **{"data.folds": 3, "data.fold": 2, "data.test": "test"}), ["gmu"], 1)
    with rejects("config.data.fold", 2, says="every fold"):
        run_ablation.make_plan(request, run_ablation.Silent())


def test_plan_save_rejects_another_plan_or_code(tmp_path, monkeypatch):
    plan = plans.build(make, ["gmu"], 1, {})
    assert plans.save(plan, tmp_path / "a") == plans.save(plan, tmp_path / "a") == plan
    extended = plans.build(make, ["gmu", "concat"], 2, {})  # seeds and methods may be added
    assert plans.save(extended, tmp_path / "a") == plans.save(extended, tmp_path / "a") == extended
    with rejects(tmp_path / "a", None, says="concat_seed=0 is not in this plan"):
        plans.save(plan, tmp_path / "a")
    with rejects(tmp_path / "a", None, says="gmu_seed=0 differs from this plan"):
        plans.save(plans.build(functools.partial(make, steps=4), ["gmu"], 1, {}), tmp_path / "a")
    monkeypatch.setattr(plans, "code_digest", lambda: "other")
    with rejects(tmp_path / "a", None, says="now other"):
        plans.save(plans.build(make, ["gmu", "concat"], 2, {}), tmp_path / "a")


def test_plan_varies_any_config_key():
    plan = plans.build(make, ["concat", "gmu"], 1, {"model.encoders.image.name": ["cnn", "resnet18"]})
    assert [trial.method for trial in plan.trials] == [
        *(f"{name} model.encoders.image.name={kind}" for name in ("concat", "gmu", "image alone")
          for kind in ("cnn", "resnet18")), "text alone",
    ]  # fmt: skip
    assert [(trial.fusion, trial.variation) for trial in plan.trials[:2]] == [
        ("concat", f"model.encoders.image.name={kind}") for kind in ("cnn", "resnet18")
    ]
    by_name = {trial.name: configs.from_json(trial.config) for trial in plan.trials}
    encoder = by_name["gmu-model.encoders.image.name=resnet18_seed=0"].model.encoders.image
    assert encoder.to_dict() == {"name": "resnet18", **configs.choice_keys("model.encoders.image", "resnet18")}

    tuned = plans.build(make, ["gmu"], 1, {"optim.learning_rate": [1e-3, 1e-2], "optim.name": ["adamw", "sgd"]})
    assert {trial.method for trial in tuned.trials} == {"gmu", "image alone", "text alone"}
    assert {(trial.config["optim"]["name"], trial.config["optim"]["learning_rate"]) for trial in tuned.trials} == {
        (name, rate) for name in ("adamw", "sgd") for rate in (1e-3, 1e-2)
    }
    subsets = plans.build(make, ["gmu"], 1, {"modalities": ["image", "image+text"]})
    found = [
        (trial.method, sorted(trial.config["data"]["modalities"]), trial.unimodal_baseline) for trial in subsets.trials
    ]
    assert found == [
        ("gmu modalities=image", ["image"], True), ("gmu modalities=image+text", ["image", "text"], False),
        ("image alone", ["image"], True), ("text alone", ["text"], True),
    ]  # fmt: skip
    with_objectives = plans.build(make, ["gmu"], 1, {"objectives": ["none", "mvae", "unimodal+ogm_ge"]})
    assert [(trial.method, sorted(trial.config["objectives"])) for trial in with_objectives.trials] == [
        ("gmu objectives=none", []), ("gmu objectives=mvae", ["mvae"]),
        ("gmu objectives=unimodal+ogm_ge", ["ogm_ge", "unimodal"]), ("image alone", []), ("text alone", []),
    ]  # fmt: skip
    with rejects("config.objectives.mva", "mva", "mvae"):
        plans.build(make, ["gmu"], 1, {"objectives": ["mva"]})


def write_trial_file(directory, trial, name, content):
    folder = runner.trial_directory(directory, trial)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content))


def result(rows):
    scores = {"accuracy": 0.5, "loss": 1.0}
    return {"valid": scores, "test": scores, "parameters": 1, "steps": 8, "best_step": 8, "data": {"rows": rows}}


def test_outcome_rejects_trials_on_different_data(tmp_path):
    plan = plans.build(make, ["gmu", "concat"], 2, {})
    for trial in plan.trials:
        write_trial_file(tmp_path, trial, "result.json", result("old"))
    outcome = outcomes.conclude(plan, tmp_path, "accuracy", [], {}, {})
    assert not outcome.errors and len((tmp_path / "runs.csv").read_text().splitlines()) == 1 + len(plan.trials)
    write_trial_file(tmp_path, plan.trials[-1], "result.json", result("new"))
    with pytest.raises(UserError, match=r"the data changed .*: gmu_seed=0 and text-alone_seed=1 differ"):
        outcomes.conclude(plan, tmp_path, "accuracy", [], {}, {})


def test_outcome_judges_fusion_against_ensembles_and_baselines_on_new_data(tmp_path):
    """The image and the text are right on other rows, and their mean is right on all; `gmu` is as good as the mean."""
    plan = plans.build(make, ["gmu"], 6, {})
    ids, target = np.arange(40), np.arange(40) % 2
    sure, image = np.eye(2)[target] * 4.0, np.arange(40) < 20
    logits = {"gmu": sure, "image alone": np.where(image[:, None], sure, 1 - sure / 4)}
    logits["text alone"] = np.where(image[:, None], 1 - sure / 4, sure)
    for trial in plan.trials:
        output = logits[trial.method]
        correct = (output.argmax(axis=1) == target).mean()
        content = result("same") | {"valid": {"accuracy": correct}, "test": {"accuracy": correct}, "best_step": 2}
        write_trial_file(tmp_path, trial, "result.json", content)
        rows = {
            "id": ids, "any_present": ids >= 0, "logits": {"label": output}, "targets": {"label": target},
            "metric_weight": {"label": np.ones(40)},
        }  # fmt: skip
        folder = runner.trial_directory(tmp_path, trial)
        lines = [json.dumps({"split": "valid", "step": step, "accuracy": correct}) for step in (2, 4, 6, 8)]
        (folder / "metrics.jsonl").write_text("\n".join(lines))  # trained out
        outputs.write(folder, {"valid": rows, "test": rows}, {"label": Task("classification", 2)})
    name = "rbf_svm, image"
    classical = MethodResult(name, True, {}, (), tuple(range(6)), (), (0.5,) * 6, (0.5,) * 6, None)
    examples = {name: Examples(ids, np.arange(40) % 2.0)}
    made = outcomes.conclude(plan, tmp_path, "accuracy", [classical], {}, {}, examples=examples)
    means = {row.method: row.mean for row in made.methods}
    assert means == {"gmu": 1, "image alone": 0.5, "text alone": 0.5, MEAN: 1, STACKED: 1, name: 0.5}
    fusion = next(one for one in made.claims.statements if one.about == "fusion")
    assert fusion.verdict == "equivalent" and "best unimodal baseline (ensemble" in fusion.text
    assert "On new data: cannot tell" in fusion.text and "40 test examples" in fusion.text
    groups = {group: [line.result.method for line in lines] for group, lines in tables.lines(made, plan).items()}
    assert groups[tables.ENSEMBLES] == [MEAN, STACKED] and groups[tables.CLASSICAL] == [name]
    saved = json.loads((tmp_path / "claims.json").read_text())["methods"]
    assert [one["method"] for one in saved][-3:] == [MEAN, STACKED, name]

    weak = dataclasses.replace(classical, valid=(1.5,) * 6, test=(0.5,) * 6)  # the best baseline on validation
    made = outcomes.conclude(plan, tmp_path, "accuracy", [weak], {}, {}, examples=examples)
    assert "On new data: better" in made.claims.statements[0].text


@pytest.mark.parametrize(
    ("select", "best_step", "scores", "expected"),
    [
        ("accuracy", 4, [0.4, 0.5, 0.5, 0.5, 0.5], set()),
        ("accuracy", 10, [0.4, 0.5, 0.5, 0.5, 0.5], {"gmu"}),  # selection by another metric
        ("accuracy", 8, [0.4, 0.45, 0.47, 0.48, 0.5], {"gmu"}),
        ("last", 10, [0.4, 0.5, 0.5, 0.5, 0.5], set()),
        ("last", 10, [0.4, 0.5, 0.5, 0.5, 0.501], {"gmu"}),
    ],
)
def test_outcome_judges_training_by_the_validations_of_each_run(tmp_path, select, best_step, scores, expected):
    plan = plans.build(functools.partial(make, select=select), ["gmu"], 2, {})
    for trial in plan.trials:
        late = trial.method == "gmu"
        content = {**result("same"), "steps": 10, "best_step": best_step if late else 4}
        content["data"]["examples"] = {"test": 20}
        write_trial_file(tmp_path, trial, "result.json", content)
        lines = [{"split": "valid", "step": 2 * (i + 1), "accuracy": score, "loss": 1.0}
                 for i, score in enumerate(scores if late else [0.5] * 5)]  # fmt: skip
        lines = [{"split": "train", "step": 1, "accuracy": 9.0}, *lines, {"split": "test", "step": 10, "accuracy": 9.0}]
        path = runner.trial_directory(tmp_path, trial) / "metrics.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9, "sp')
    outcome = outcomes.conclude(plan, tmp_path, "accuracy", [], {}, {})
    assert {one.method for one in outcome.claims.undertrained} == expected
    content = json.loads((tmp_path / "claims.json").read_text())
    assert content["scope"] == {"strategies": 1, "trials": 0, "settings": 1, "test_examples": 20}
    assert content["tuning"] == {} and {one["method"] for one in content["undertrained"]} == expected


def test_outcome_over_folds_expects_the_same_data_within_a_fold(tmp_path):
    plan = plans.build(functools.partial(make, **{"data.folds": 3}), ["gmu", "concat"], 1, {}, folds=[0, 1, 2])
    for i, trial in enumerate(plan.trials):
        content = result(f"rows of fold {plans.fold_of(trial)}")
        content["data"]["examples"] = {"train": 40, "valid": 4, "test": 20}
        content["test"] = content["valid"] = {"accuracy": 0.5 + (i % 7) / 100, "loss": 1.0}
        write_trial_file(tmp_path, trial, "result.json", content)
    outcome = outcomes.conclude(plan, tmp_path, "accuracy", [], {}, {})
    assert [row.folds for row in outcome.methods] == [(0, 1, 2)] * 4 and outcome.methods[0].test_over_train == 0.5
    content = json.loads((tmp_path / "claims.json").read_text())
    assert content["statistics_over"] == "folds" and "corrected resampled t" in content["rule"]
    assert {one["comparison"]["over"] for one in content["against_reference"]} == {"folds"}
    assert (tmp_path / "runs.csv").read_text().splitlines()[0].startswith("trial,method,seed,fold,")
    write_trial_file(tmp_path, plan.trials[-1], "result.json", result("new"))
    with pytest.raises(UserError, match=r"the data changed .*: gmu_seed=0_fold=2 and text-alone_seed=0_fold=2 differ"):
        outcomes.conclude(plan, tmp_path, "accuracy", [], {}, {})


ARRAYS = (np.array([5, 2, 7]), np.eye(2)[[0, 1, 1]], np.array([1, 1, 1]))  # ids, outputs and targets


def test_classical_baselines_are_fitted_in_each_fold(tmp_path, monkeypatch):
    fitted = []

    def fit(dataset, task, metric, trials):
        fitted.append(dataset.splits["test"].ids.tolist())
        score = len(fitted) / 10
        one = baselines.Baseline("linear_svm", ("text",), metric, {"C": score}, score, score, 0.0, trials)
        return [dataclasses.replace(one, **dict(zip(floors.ARRAYS, ARRAYS, strict=True)))]

    planted.plant(monkeypatch, train=[planted.row(i) for i in range(30)])
    monkeypatch.setattr(baselines, "baselines", fit)
    config = planted.config("text+image", data__folds=3, select="accuracy")
    monkeypatch.setattr(floors.pid, "of_dataset", lambda *_: (pid.Decomposition(0.0, 0.0, 0.0, 0.0),) * 2)
    ((found,), _, examples) = floors.classical_baselines(config, "accuracy", 2, tmp_path, (0, 1, 2))
    assert not examples
    assert sorted(row for fold in fitted for row in fold) == list(range(30))
    assert found.test == (0.1, 0.1, 0.2, 0.2, 0.3, 0.3) and found.folds == (0, 0, 1, 1, 2, 2)
    assert found.seeds == (0, 1) * 3 and found.selected == {"C": "by fold"} and 0.5 < found.test_over_train < 0.8
    floors.classical_baselines(config, "accuracy", 2, tmp_path, (0, 1, 2))
    assert len(fitted) == 3  # read from their files
    again = floors.classical_baselines(config, "accuracy", 2, tmp_path)
    assert floors.classical_baselines(config, "accuracy", 2, tmp_path).examples.keys() == {"linear_svm, text"}
    kept = again.examples["linear_svm, text"]
    assert kept.ids.tolist() == [2, 5, 7] and kept.scores.tolist() == [1.0, 0.0, 1.0] and len(fitted) == 4
    floors.classical_baselines(config, "accuracy", 2, tmp_path, trials=9)
    assert len(fitted) == 5  # with another number of settings


def test_selected_trials_exclude_strategies_with_unfinished_trials(tmp_path):
    plan = plans.build(make, ["gmu", "concat"], 2, {})
    for trial in plan.trials:
        if trial.name != "gmu_seed=1":
            write_trial_file(tmp_path, trial, "result.json", result("same"))
    assert [trial.name for trial in outcomes.unfinished(plan, tmp_path)] == ["gmu_seed=1"]
    selected = outcomes.selected_trials(plan, tmp_path, "accuracy")
    assert [trial.name for trial in selected] == ["concat_seed=0", "concat_seed=1"]
    write_trial_file(
        tmp_path, next(trial for trial in plan.trials if trial.name == "gmu_seed=1"), "failed.json", {"error": "no"}
    )
    assert {trial.name for trial in outcomes.selected_trials(plan, tmp_path, "accuracy")} == {
        "concat_seed=0", "concat_seed=1", "gmu_seed=0",
    }  # fmt: skip
    assert outcomes.conclude(plan, tmp_path, "accuracy", [], {}, {}).errors == {"gmu_seed=1": "no"}


def test_outcome_reports_failed_probes(tmp_path):
    plan = plans.build(make, ["gmu"], 2, {})
    for trial in plan.trials:
        write_trial_file(tmp_path, trial, "result.json", result("same"))
    write_trial_file(tmp_path, plan.trials[0], "failed.json", {"error": "no memory"})
    assert outcomes.conclude(plan, tmp_path, "accuracy", [], {}, {}).errors == {"gmu_seed=0": "probing: no memory"}


def test_shards_partition_the_trials():
    trials = list(range(7))
    shards = [runner.shard(trials, f"{i}/3") for i in range(3)]
    assert sorted(trial for shard in shards for trial in shard) == trials
    assert runner.shard(trials, "0/1") == trials
    for invalid in ("3/3", "1", "a/b", "-1/2", "0/0"):
        with rejects("--shard", invalid, says="must be i/n"):
            runner.shard(trials, invalid)


def do_nothing():
    pass


def kill_first_process():
    """Kills the first worker process that calls it."""
    marker = Path(os.environ["MMFUSION_TESTS_MARKER"])
    try:
        marker.touch(exist_ok=False)  # two processes may start at the same moment
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.process
def test_runner_continues_after_failed_and_killed_trials(tmp_path, data_dir, monkeypatch):
    make_config = functools.partial(make, **{"data.dir": data_dir, "steps": 4})
    valid = [trial for trial in plans.build(make_config, ["concat"], 1, {}).trials if not trial.unimodal_baseline]
    unknown_data = {**valid[0].config["data"], "name": "shapes/none"}
    trials = [
        *valid,
        *(dataclasses.replace(c, name=f"none-{c.name}", config={**c.config, "data": unknown_data}) for c in valid),
    ]
    assert len(trials) == 2
    monkeypatch.setenv("MMFUSION_TESTS_MARKER", str(tmp_path / "marker"))
    ended = {trial.name: error for trial, error in runner.run(trials, tmp_path, 2, kill_first_process)}
    assert set(ended) == {trial.name for trial in trials}
    killed = [name for name, error in ended.items() if error == "its process ended with status -9"]
    assert len(killed) == 1
    for trial in trials:
        folder = runner.trial_directory(tmp_path, trial)
        if trial.name in killed:
            continue
        if "none" in trial.name:
            assert "UserError" in json.loads((folder / "failed.json").read_text())["error"]
        else:
            assert runner.is_done(tmp_path, trial) and not (folder / "failed.json").exists()

    # A second call finishes the killed trial, fails again on the invalid ones and leaves finished trials untouched.
    done = {trial.name: (runner.trial_directory(tmp_path, trial) / "result.json").stat().st_mtime_ns
            for trial in trials if runner.is_done(tmp_path, trial)}  # fmt: skip
    second = {trial.name: error for trial, error in runner.run(trials, tmp_path, 1, do_nothing)}
    assert not set(second) & set(done)
    for trial in trials:
        assert runner.is_done(tmp_path, trial) == ("none" not in trial.name)
        if trial.name in done:
            assert (runner.trial_directory(tmp_path, trial) / "result.json").stat().st_mtime_ns == done[trial.name]
    assert (
        list(runner.run([trial for trial in trials if runner.is_done(tmp_path, trial)], tmp_path, 2, do_nothing)) == []
    )


def wait_for_sigterm(trial, folder):
    """Runs until SIGTERM, then writes a file."""
    signal.signal(signal.SIGTERM, lambda number, frame: (folder / "saved").touch())
    (folder / "started").touch()
    while not (folder / "saved").exists():
        time.sleep(0.01)
    raise Preempted("saved")


@pytest.mark.process
def test_pool_forwards_sigterm_to_running_trials(tmp_path):
    trials = [types.SimpleNamespace(name=name) for name in ("a", "b", "c")]
    folders = [runner.trial_directory(tmp_path, trial) for trial in trials]

    def stop():
        while not all((folder / "started").exists() for folder in folders[:2]):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=stop, daemon=True).start()
    stage = runner.Stage(wait_for_sigterm, "result.json")
    with pytest.raises(Preempted), runner.preempted_by_signal():
        list(runner.run(trials, tmp_path, 2, do_nothing, stage))
    assert [(folder / "saved").exists() for folder in folders] == [True, True, False]
    assert signal.getsignal(signal.SIGTERM) is before


def test_plan_seeds_pair_initialisation_and_example_order(data_dir):
    from mmfusion.data import dataset as datasets
    from mmfusion.data import pipeline
    from mmfusion.training.setup import build_setup

    plan = plans.build(functools.partial(make, **{"data.dir": data_dir}), ["gmu", "concat"], 2, {})
    params_and_ids = {}
    for trial in plan.trials:
        if not trial.unimodal_baseline:
            config = configs.from_json(trial.config)
            dataset = datasets.load(configs.read(config).data, seed=config.seed)
            params = jax.device_get(build_setup(config, dataset).init_state(config.seed).params)
            batch = next(
                pipeline.train_batches(dataset.splits["train"], seed=config.seed, batch_size=16, first=0, last=1)
            )
            encoders = {m: params[f"encoders_{m}"] for m in ("image", "text")}
            params_and_ids[trial.method, config.seed] = encoders, batch.id
    jax.tree.map(np.testing.assert_array_equal, params_and_ids["gmu", 0], params_and_ids["concat", 0])
    assert not np.array_equal(params_and_ids["gmu", 0][1], params_and_ids["gmu", 1][1])


def test_clear_programs_clears_jax_caches_above_the_limit(monkeypatch):
    cleared = []
    monkeypatch.setattr(jax, "clear_caches", lambda: cleared.append(1))
    runner.clear_programs(10**6)
    assert not cleared
    runner.clear_programs(10)
    assert cleared
