"""The scores of examples are those that the metrics average, of the examples that all runs have."""

import types

import numpy as np
import pytest

from mmfusion import metrics
from mmfusion.analysis import example_scores
from mmfusion.analysis.ablation import runner
from mmfusion.data.targets import Scale
from mmfusion.objectives import Task
from mmfusion.training import outputs

pytestmark = pytest.mark.usefixtures("traced_once")

RANDOM = np.random.default_rng(0)
N = 20


def collected(kind: str, ids: np.ndarray) -> dict:
    """Returns what `evaluation.collect` does, in another order than that of the ids; one row has no modality."""
    n = len(ids)
    outputs = 1 if kind == "regression" else 3
    return {
        "id": ids,
        "any_present": np.arange(n) != 4,
        "logits": {"y": RANDOM.normal(size=(n, outputs)).astype(np.float32)},
        "targets": {"y": RANDOM.normal(size=n) if kind == "regression" else RANDOM.integers(0, 3, n)},
        "metric_weight": {"y": (np.arange(n) != 7).astype(np.float32)},
    }


def plan_of(kind: str, names: list[str]) -> types.SimpleNamespace:
    config = {"data": {"targets": {"y": {"kind": kind}}}}
    return types.SimpleNamespace(trials=[types.SimpleNamespace(name=name, config=config) for name in names])


@pytest.mark.parametrize(("kind", "metric"), example_scores.MEANS)
def test_scores_of_examples_average_to_the_metric(kind, metric, tmp_path):
    plan = plan_of(kind, ["a", "b"])
    task = Task(kind, 1 if kind == "regression" else 3, scale=Scale(2.0, 3.0) if kind == "regression" else Scale())
    expected = {}
    for trial, ids in zip(plan.trials, (RANDOM.permutation(N), RANDOM.permutation(N + 3)), strict=True):
        folder = runner.trial_directory(tmp_path, trial)
        folder.mkdir(parents=True)
        (folder / runner.RESULT).write_text("{}")
        rows = collected(kind, ids)
        outputs.write(folder, {"valid": rows, "test": rows}, {"y": task})
        logits, targets = rows["logits"]["y"], rows["targets"]["y"]
        if kind == "regression":
            logits, targets = task.scale.invert(logits[:, 0]), task.scale.invert(targets)
        expected[trial.name] = ids, logits, targets
    found = example_scores.common(example_scores.of_runs(plan, tmp_path, metric))
    dropped = {int(ids[i]) for ids, *_ in expected.values() for i in (4, 7)}  # no modality, no label
    common = np.array([i for i in range(N) if i not in dropped])
    score = getattr(metrics, kind)
    for name, (ids, logits, targets) in expected.items():
        at = np.argsort(ids)[common]
        assert found[name].shape == common.shape
        assert found[name].mean() == pytest.approx(score(logits[at], targets[at], np.ones(len(at)))[metric], rel=1e-6)


def test_scores_of_examples_need_a_mean_and_outputs(tmp_path):
    plan = plan_of("classification", ["a"])
    assert example_scores.of_runs(plan, tmp_path, "macro_f1") == {}  # no mean over examples
    assert example_scores.of_runs(plan, tmp_path, "accuracy") == {}  # nothing has run
    folder = runner.trial_directory(tmp_path, plan.trials[0])
    folder.mkdir(parents=True)
    (folder / runner.RESULT).write_text("{}")
    assert example_scores.of_runs(plan, tmp_path, "accuracy") == {}  # a run of an earlier version


def test_common_examples_are_those_that_all_have():
    found = {
        "a": example_scores.Examples(np.array([1, 3, 4]), np.array([0.1, 0.3, 0.4])),
        "b": example_scores.Examples(np.array([0, 3, 4, 9]), np.array([0.0, 3.0, 4.0, 9.0])),
    }
    scores = example_scores.common(found)
    assert scores["a"].tolist() == [0.3, 0.4] and scores["b"].tolist() == [3.0, 4.0]
    assert example_scores.common({}) == {}


def test_outputs_that_no_run_has_are_scored_as_those_of_runs(tmp_path):
    arrays = {"test/id": np.arange(3), "test/y/output": np.eye(3), "test/y/target": np.array([0, 2, 2]),
              "test/y/weight": np.array([1.0, 1.0, 0.0])}  # fmt: skip
    found = example_scores.of_runs(plan_of("classification", ["a"]), tmp_path, "accuracy", {"ensemble": arrays})
    assert found.keys() == {"ensemble"} and found["ensemble"].scores.tolist() == [1.0, 0.0]
