"""Ensembles of hand-made outputs of single modalities, with known results."""

import io
import types

import numpy as np
import pytest
from scipy import special

from mmfusion.analysis import ensembles as module
from mmfusion.analysis.ablation import runner
from mmfusion.analysis.claims.selection import MethodResult
from mmfusion.analysis.ensembles import MEAN, STACKED, ensembles
from mmfusion.training import outputs

pytestmark = pytest.mark.usefixtures("traced_once")


def trial(name, method, modality, *, fusion="", kind="classification"):
    config = {"data": {"targets": {"y": {"kind": kind}}, "modalities": dict.fromkeys(modality.split("+"))}}
    return types.SimpleNamespace(
        name=name, method=method, config=config, fusion=fusion, unimodal_baseline="+" not in modality
    )


def result(method, runs, valid=0.5, failed=(), folds=()):
    """Returns the result of runs `{seed: trial name}`."""
    scores = (valid,) * len(runs)
    seeds, names = tuple(runs), tuple(runs.values())
    return MethodResult(method, True, {}, names, seeds, failed, scores, scores, 1, folds=folds, test_over_train=0.5)


def write(directory, name, output, target, ids=None, valid=None):
    """Writes a run's outputs for test, and the same (or others) for validation."""
    arrays = {}
    for split, own in (("valid", output if valid is None else valid), ("test", output)):
        arrays |= {
            f"{split}/id": np.arange(len(target)) if ids is None else np.asarray(ids),
            f"{split}/y/output": np.asarray(own, np.float32),
            f"{split}/y/target": np.asarray(target),
            f"{split}/y/weight": np.ones(len(target), np.float32),
        }
    folder = runner.trial_directory(directory, types.SimpleNamespace(name=name))
    folder.mkdir(parents=True)
    content = io.BytesIO()
    np.savez(content, **arrays)
    (folder / outputs.FILE).write_bytes(content.getvalue())


def of_two(directory, image, text, target, kind="classification", metric="accuracy", higher=True, **options):
    """Returns the ensembles of one seed of two modalities, by name, and the test outputs of the mean."""
    plan = types.SimpleNamespace(
        trials=[trial("i", "image alone", "image", kind=kind), trial("t", "text alone", "text", kind=kind)]
    )
    for name, output in (("i", image), ("t", text)):
        write(directory, name, output, target, **options)
    rows = [result("image alone", {0: "i"}), result("text alone", {0: "t"})]
    found = ensembles(plan, rows, directory, metric, higher, trials=3)
    return {row.method: row for row in found.results}, found.outputs[f"{MEAN}_seed=0"]["test/y/output"]


def test_mean_ensemble_averages_probabilities(tmp_path):
    image, text = [[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]], [[0.3, 0.7], [0.1, 0.9], [0.3, 0.7]]
    rows, outcome = of_two(tmp_path, np.log(image), 5 + np.log(text), [0, 1, 1])  # a shift of logits changes nothing
    np.testing.assert_allclose(np.exp(outcome), [[0.6, 0.4], [0.35, 0.65], [0.25, 0.75]], rtol=1e-6)
    assert rows[MEAN].test == (1.0,) and rows[MEAN].valid == (1.0,) and rows[MEAN].unimodal_baseline


def test_mean_ensemble_averages_sigmoids_and_values(tmp_path):
    image, text = special.logit([[0.9, 0.2], [0.5, 0.4]]), special.logit([[0.3, 0.2], [0.7, 0.9]])
    _, outcome = of_two(tmp_path / "labels", image, text, [[1.0, 0], [1, 0]], kind="multilabel")
    np.testing.assert_allclose(special.expit(outcome), [[0.6, 0.2], [0.6, 0.65]], rtol=1e-6)
    rows, outcome = of_two(
        tmp_path / "values", [1.0, 2.0], [3.0, 6.0], [2.0, 5.0], kind="regression", metric="mae", higher=False
    )
    np.testing.assert_allclose(outcome, [2.0, 4.0])
    assert rows[MEAN].test == (0.5,)


def test_rows_that_a_member_lacks_have_the_others_output(tmp_path):
    plan = types.SimpleNamespace(trials=[trial("i", "image alone", "image"), trial("t", "text alone", "text")])
    write(tmp_path, "i", np.log([[0.9, 0.1], [0.8, 0.2]]), [0, 0], ids=[3, 5])
    write(tmp_path, "t", np.log([[0.2, 0.8], [0.4, 0.6]]), [0, 1], ids=[5, 9])
    rows = [result("image alone", {0: "i"}), result("text alone", {0: "t"})]
    arrays = ensembles(plan, rows, tmp_path, "accuracy", True).outputs[f"{MEAN}_seed=0"]
    np.testing.assert_array_equal(arrays["test/id"], [3, 5, 9])
    np.testing.assert_array_equal(arrays["test/y/target"], [0, 0, 1])
    np.testing.assert_allclose(np.exp(arrays["test/y/output"]), [[0.9, 0.1], [0.5, 0.5], [0.4, 0.6]], rtol=1e-6)


def signs(rows, seed):
    """Returns log-probabilities of two modalities that each encode one bit, and the bits."""
    random = np.random.default_rng(seed)
    bits = random.integers(0, 2, (2, rows))
    tables = [np.stack([1 - bit, bit], axis=1) * 2.0 + random.normal(0, 0.1, (rows, 2)) for bit in bits]
    return tables, bits


def test_stacked_ensemble_weighs_what_the_mean_cannot(tmp_path):
    """The image tells the label; the text, which is as sure, tells its opposite in half of the rows."""
    (image, text), (bright, _) = signs(300, 0)
    rows, _ = of_two(tmp_path, image, 3 * text, bright)
    assert rows[STACKED].test[0] > 0.97 > 0.6 > rows[MEAN].test[0]
    assert rows[STACKED].valid[0] > 0.97 and rows[STACKED].selected.keys() == {"regularization"}


def test_validation_score_of_the_stacked_ensemble_is_of_rows_left_out(tmp_path):
    """On pure noise a model fitted on few rows is right on most of them, and by chance on others."""
    random = np.random.default_rng(0)
    noise, target = random.normal(size=(2, 100, 25)), random.integers(0, 2, 100)
    plan = types.SimpleNamespace(trials=[trial("i", "image alone", "image"), trial("t", "text alone", "text")])
    for name, output in zip("it", noise, strict=True):
        write(tmp_path, name, output, target)
    rows = [result("image alone", {0: "i"}), result("text alone", {0: "t"})]
    _, stacked = ensembles(plan, rows, tmp_path, "accuracy", True).results
    assert stacked.valid[0] < 0.65
    assert stacked.test[0] > stacked.valid[0] + 0.15  # the test rows here are the validation rows


def test_stacked_ensemble_supports_regression_and_several_labels(tmp_path):
    (image, text), (bright, word) = signs(200, 1)
    rows, _ = of_two(tmp_path / "values", image[:, 1], text[:, 1], 3.0 * bright - word, kind="regression", metric="r2")
    assert rows[STACKED].test[0] > 0.95 > rows[MEAN].test[0]
    rows, _ = of_two(tmp_path / "labels", image - 1, text - 1, np.stack([bright, word], 1) * 1.0, kind="multilabel")
    assert rows[STACKED].test[0] > 0.97 > rows[MEAN].test[0]


def test_seeds_that_lack_a_member_have_failed(tmp_path):
    plan = types.SimpleNamespace(
        trials=[trial(f"{m[0]}{seed}", f"{m} alone", m) for m in ("image", "text") for seed in range(3)]
        + [trial("x0", "gmu", "image+text", fusion="gmu"), trial("y0", "gmu modalities=image", "image", fusion="gmu")]
    )
    (image, text), (bright, _) = signs(60, 2)
    for name in ("i0", "i2", "t0", "t1"):  # t2 has a result and no outputs
        write(tmp_path, name, image if name[0] == "i" else text, bright)
    rows = [
        result("image alone", {0: "i0", 2: "i2"}, failed=(1,)),
        result("text alone", {0: "t0", 1: "t1", 2: "t2"}),
        result("gmu modalities=image", {0: "y0"}),
    ]
    found = ensembles(plan, rows, tmp_path, "accuracy", True)
    assert [(row.method, row.seeds, row.failed_seeds) for row in found.results] == [
        (MEAN, (0,), (1, 2)), (STACKED, (0,), (1, 2)),
    ]  # fmt: skip
    assert found.results[0].trials == (f"{MEAN}_seed=0",) and found.outputs.keys() == {
        f"{name}_seed=0" for name in (MEAN, STACKED)
    }
    assert not ensembles(plan, rows, tmp_path, "loss", True).results
    assert not ensembles(plan, rows[:1], tmp_path, "accuracy", True).results  # of one modality
    assert not ensembles(plan, rows, tmp_path / "empty", "accuracy", True).results


def test_ensembles_are_made_in_each_fold_of_the_best_variation(tmp_path):
    names = [f"{m[0]}{fold}" for m in ("image", "text") for fold in range(3)]
    plan = types.SimpleNamespace(
        trials=[trial(name, "image alone" if name[0] == "i" else "text alone", {"i": "image", "t": "text"}[name[0]])
                for name in names] + [trial("w0", "image alone width=2", "image")]
    )  # fmt: skip
    (image, text), (bright, _) = signs(60, 3)
    for name in names:
        write(tmp_path, name, image if name[0] == "i" else text, bright)
    rows = [
        MethodResult(f"{m} alone", True, {}, tuple(f"{m[0]}{fold}" for fold in range(3)), (0,) * 3, (), (0.9,) * 3,
                     (0.9,) * 3, 1, folds=(0, 1, 2), test_over_train=0.5) for m in ("image", "text")
    ]  # fmt: skip
    worse = result("image alone width=2", {0: "w0"}, valid=0.1, folds=(0,))
    mean, stacked = ensembles(plan, [*rows, worse], tmp_path, "accuracy", True).results
    assert mean.folds == stacked.folds == (0, 1, 2) and mean.seeds == (0, 0, 0) and mean.test_over_train == 0.5


def test_stacked_ensemble_of_a_single_class_has_failed(tmp_path):
    rows, _ = of_two(tmp_path, np.zeros((20, 2)), np.zeros((20, 2)), np.zeros(20, int))
    assert rows[STACKED].failed_seeds == (0,) and rows[MEAN].seeds == (0,)


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_columns_of_an_absent_member_are_its_validation_mean(kind):
    valid = np.log([[[0.5, 0.5], [0.2, 0.8]], [[0.3, 0.7], [0.4, 0.6]]])
    valid = valid if kind == "classification" else valid[:, :, :1]
    split = valid.copy()
    split[1, 0] = np.nan
    columns = module._columns(split, valid, kind)
    width = valid.shape[2]
    np.testing.assert_allclose(columns[0, width:], valid[1].mean(axis=0))
    np.testing.assert_allclose(columns[1], valid[:, 1].ravel())
