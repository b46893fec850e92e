"""Classical baselines, on small datasets with known results."""

import dataclasses
import math

import numpy as np
import pytest
from sklearn import linear_model
from threadpoolctl import threadpool_limits

from mmfusion.analysis import baselines as module
from mmfusion.analysis import features as feature_module
from mmfusion.analysis.baselines import baselines
from mmfusion.analysis.features import features
from mmfusion.analysis.probing import gaussian_pid, pid
from mmfusion.data.batch import Batch
from mmfusion.data.dataset import Dataset
from mmfusion.data.decoding import Reader
from mmfusion.data.split import Split
from tests import synthetic
from tests.errors import rejects

IMAGE = {"kind": "image", "feature": "image", "size": (2, 2), "channels": 1}
TEXT = {"kind": "text", "feature": "sentence", "length": 4}
AUDIO = {"kind": "audio", "feature": "audio", "rate": 8000, "seconds": 0.1}


def bits(seed, rows=240):
    return np.random.default_rng(seed).integers(0, 2, (2, rows))


def arrays(seed, target, bright, word):
    """Returns a split's arrays: the image mean encodes bit `bright`, the last of four tokens bit `word`."""
    random, n = np.random.default_rng(seed), len(bright)
    images = 60 + 120 * bright[:, None, None, None] + random.integers(0, 40, (n, 2, 2, 1))
    ids = np.concatenate([random.integers(2, 6, (n, 3)), 6 + word[:, None]], axis=1)
    return Batch(
        inputs={"image": images.astype(np.uint8), "text": ids.astype(np.int32)},
        mask={"image": np.ones((n, 1), bool), "text": np.ones((n, 4), bool)},
        present={"image": np.ones(n, bool), "text": np.ones(n, bool)},
        targets={"label": target},
        weight=np.ones(n, np.float32),
        id=np.arange(n, dtype=np.int32),
    )


def dataset(label, kind="classification", classes=2):
    """Returns three splits with the target `label(bright, word)`."""
    reader = Reader({"image": IMAGE, "text": TEXT}, {"label": {"kind": kind}}, {"label": classes}, {})
    splits = {}
    for seed, name in enumerate(("train", "valid", "test")):
        bright, word = bits(seed)
        batch = arrays(seed, label(bright, word), bright, word)
        splits[name] = Split(name, np.arange(len(bright)), (), reader, batch, {})
    return Dataset(splits, reader, {"label": ()}, {}, "bits", "bits", {}, "bits")


def replace_arrays(data, split, **fields):
    """Returns the dataset with the given arrays replaced in one split."""
    batch = data.splits[split].arrays.replace(**fields)
    replaced = dataclasses.replace(data.splits[split], ids=np.arange(len(batch.id)), arrays=batch)
    return dataclasses.replace(data, splits={**data.splits, split: replaced})


def noisy(bright, word):
    """Returns labels that equal the image bit, and the text bit in 20 % of the rows, so that grid values differ."""
    return np.where(np.random.default_rng(7).random(len(bright)) < 0.2, word, bright)


def test_baselines_predict_an_image_label_from_the_image_only():
    found = baselines(dataset(lambda bright, word: bright), "label", "accuracy", trials=2)
    names = ("linear_svm", "logistic_regression", "naive_bayes", "rbf_svm", "gradient_boosting")
    subsets = (("image",), ("text",), ("image", "text"))
    assert [(b.name, b.modalities) for b in found] == [("majority", ()), *((n, s) for s in subsets for n in names)]
    for one in found[1:]:
        if "image" in one.modalities:
            assert one.test > 0.97, one
            assert one.valid > 0.97, one
        else:
            assert one.test == pytest.approx(0.5, abs=0.12), one
        assert one.seconds > 0


def test_baselines_need_two_modalities_and_nonlinearity_for_xor():
    found = baselines(dataset(lambda bright, word: bright ^ word), "label", "accuracy", trials=3)
    for one in found:
        if one.name in ("gradient_boosting", "rbf_svm") and len(one.modalities) == 2:
            assert one.test > 0.95, one
        elif one.name in ("linear_svm", "logistic_regression") or len(one.modalities) == 1:
            assert one.test == pytest.approx(0.5, abs=0.12), one


@pytest.fixture
def svm_only(monkeypatch):
    monkeypatch.setitem(module.MODELS, "classification", module.MODELS["classification"][:2])


def test_majority_baseline_scores_the_class_frequency(svm_only):
    data = dataset(lambda bright, word: bright | word, classes=3)
    labels = data.splits["test"].arrays.targets["label"]
    majority, *others = baselines(data, "label", "nll")
    assert (majority.name, majority.modalities, majority.selected) == ("majority", (), {})
    assert majority.test == pytest.approx((labels == 1).mean())
    assert {one.metric for one in (majority, *others)} == {"accuracy"}  # a linear SVM has no likelihood
    assert {one.metric for one in baselines(data, "label", "brier")} == {"accuracy"}
    assert others[-1].test > 0.97  # the third class, which never occurs, is never predicted
    assert baselines(dataset(lambda bright, word: bright | word), "label", "auroc")[0].test == 0.5


def test_baselines_select_on_validation_not_on_test_labels(svm_only):
    data = dataset(noisy)
    labels = data.splits["test"].arrays.targets["label"]
    found = baselines(data, "label", "accuracy")
    scrambled = baselines(replace_arrays(data, "test", targets={"label": 1 - labels}), "label", "accuracy")
    assert [dataclasses.replace(one, test=0.0) for one in found] == [
        dataclasses.replace(one, test=0.0) for one in scrambled
    ]
    assert [one.test for one in scrambled[1:]] == pytest.approx([1 - one.test for one in found[1:]])


@pytest.mark.parametrize(("metric", "best"), [("r2", max), ("loss", min)])
def test_baselines_select_in_the_direction_of_the_metric(monkeypatch, metric, best):
    data = dataset(
        lambda bright, word: (bright + word + 0.1 * np.arange(len(word)) % 1).astype(np.float32), "regression"
    )
    mean, ridge = module.MODELS["regression"][:2]
    values = (1.0, 100.0, 10_000.0)
    per_value = []
    for value in values:
        monkeypatch.setitem(
            module.MODELS, "regression", (mean, ridge._replace(estimator=linear_model.Ridge(alpha=value)))
        )
        per_value.append(baselines(data, "label", metric, trials=1)[-1])
    monkeypatch.setitem(module.MODELS, "regression", (mean, ridge))
    monkeypatch.setattr(
        module, "draw", lambda _, space, trials: [{"alpha": v} for v in values[::-1]] if space else [{}]
    )
    assert len({one.valid for one in per_value}) == 3
    best_one = dataclasses.replace(best(per_value, key=lambda one: one.valid), trials=3)
    assert baselines(data, "label", metric)[-1] == best_one
    assert per_value[0].metric == ("r2" if metric == "r2" else "rmse")


def test_baselines_support_regression_and_multilabel_targets():
    found = baselines(
        dataset(lambda bright, word: (3 * bright).astype(np.float32), "regression", 1), "label", "r2", trials=2
    )
    scores = {(one.name, one.modalities): one.test for one in found}
    assert scores["ridge", ("image",)] > 0.95 and scores["rbf_svm", ("image",)] > 0.95
    assert scores["gradient_boosting", ("image", "text")] > 0.95
    assert max(scores["mean", ()], scores["ridge", ("text",)]) < 0.05
    labels = dataset(lambda *both: np.stack([*both, 0 * both[0]], axis=1).astype(np.float32), "multilabel", 3)
    scores = {(one.name, one.modalities): one.test for one in baselines(labels, "label", "accuracy", trials=2)}
    for name in ("linear_svm", "logistic_regression", "rbf_svm", "gradient_boosting"):
        assert scores[name, ("image", "text")] > 0.97
    assert scores["linear_svm", ("image",)] == pytest.approx(2.5 / 3, abs=0.05)
    assert scores["majority", ()] == pytest.approx(2 / 3, abs=0.05)
    constant = baselines(
        dataset(lambda bright, word: bright.astype(np.float32), "regression", 1), "label", "pearson", models=["mean"]
    )
    assert math.isnan(constant[0].test)


def test_features_are_fitted_on_the_train_split_only():
    data = dataset(lambda bright, word: bright)
    test = data.splits["test"].arrays
    inputs = {"image": 255 - test.inputs["image"] // 2, "text": test.inputs["text"] + 100}
    before = features(data, "label", seed=0, max_rows=500).tables
    for split in ("valid", "test"):
        after = features(replace_arrays(data, split, inputs=inputs), "label", seed=0, max_rows=500).tables
        for m in before:
            np.testing.assert_array_equal(before[m]["train"].toarray(), after[m]["train"].toarray())
        assert after["text"][split].nnz == 0  # tokens that do not occur in the train split
        assert np.abs((before["image"][split] - after["image"][split]).toarray()).max() > 0.1
    same_inputs = replace_arrays(data, "test", inputs=data.splits["train"].arrays.inputs)
    copied = features(same_inputs, "label", 0, 500).tables
    for m in before:
        np.testing.assert_array_equal(copied[m]["test"].toarray(), before[m]["train"].toarray())


def test_features_of_an_absent_modality_are_zero():
    random = np.random.default_rng(0)
    batch = dataset(lambda bright, word: bright).splits["train"].arrays
    batch = batch.replace(
        inputs={**batch.inputs, "audio": random.normal(0, 0.1, (240, 800)).astype(np.float32)},
        mask={**batch.mask, "audio": np.ones((240, 800), bool)},
        present={m: random.random(240) < 0.6 for m in ("image", "text", "audio")},
    )
    modalities = {"image": IMAGE, "text": TEXT, "audio": AUDIO}
    reader = Reader(modalities, {"label": {"kind": "classification"}}, {"label": 2}, {})
    splits = {s: Split(s, np.arange(240), (), reader, batch, {}) for s in ("train", "valid", "test")}
    found = features(Dataset(splits, reader, {}, {}, "absent", "absent", {}, "absent"), "label", 0, 500)
    assert [*found.tables] == [*modalities]
    for m, by_split in found.tables.items():
        for table in by_split.values():
            np.testing.assert_array_equal(np.abs(table.toarray()).max(axis=1) > 0, batch.present[m])


def test_features_ignore_padding():
    audio = np.random.default_rng(0).normal(0, 0.1, (3, 800)).astype(np.float32)
    mask = np.repeat(np.arange(800)[None] < 400, 3, axis=0)
    padded = feature_module._describe_audio(np.where(mask, audio, np.float32(0.5)), mask, AUDIO)
    np.testing.assert_allclose(padded, feature_module._describe_audio(audio[:, :400], mask[:, :400], AUDIO), rtol=1e-5)
    assert not feature_module._describe_audio(audio, np.zeros_like(mask), AUDIO).any()
    ids, text_mask = np.array([[5, 6, 9, 9], [7, 9, 9, 9]]), np.array([[1, 1, 0, 0], [1, 0, 0, 0]], bool)
    assert feature_module._describe_text(ids, text_mask, TEXT).tolist() == ["5 6", "7"]


def test_baselines_classify_the_pitch_of_audio(svm_only):
    reader = Reader({"audio": AUDIO}, {"label": {"kind": "classification"}}, {"label": 2}, {})
    splits = {}
    for seed, name in enumerate(("train", "valid", "test")):
        high = bits(seed, 60)[0]
        phase = np.random.default_rng(seed).uniform(0, 6, (60, 1))
        audio = 0.1 * np.sin(phase + 2 * np.pi * (400 + 400 * high[:, None]) * np.arange(800) / 8000)
        batch = Batch(
            inputs={"audio": audio.astype(np.float32)}, mask={"audio": np.ones((60, 800), bool)},
            present={"audio": np.ones(60, bool)}, targets={"label": high}, weight=np.ones(60), id=np.arange(60),
        )  # fmt: skip
        splits[name] = Split(name, np.arange(60), (), reader, batch, {})
    found = baselines(Dataset(splits, reader, {}, {}, "tones", "tones", {}, "tones"), "label", "accuracy")
    assert [one.modalities for one in found] == [(), ("audio",)]  # a single modality is also the set of all modalities
    assert found[-1].test == 1.0


@pytest.mark.thorough
def test_baselines_of_streamed_splits_equal_in_memory_ones(svm_only):
    sizes = {"train": 300, "valid": 60, "test": 60}
    loaded, streamed = (synthetic.dataset(synthetic.config(), sizes, in_memory=kept) for kept in (True, False))
    for most in (100, 1000):
        one, other = (features(data, "label", 0, most) for data in (loaded, streamed))
        for split in sizes:
            np.testing.assert_array_equal(one.targets[split], other.targets[split])
            np.testing.assert_array_equal(one.ids[split], other.ids[split])
            for m in one.tables:
                np.testing.assert_array_equal(one.tables[m][split].toarray(), other.tables[m][split].toarray())
    readable = {split: int(loaded.splits[split].arrays.weight.sum()) for split in sizes}
    assert {split: len(labels) for split, labels in one.targets.items()} == readable
    assert readable["test"] < sizes["test"]
    assert baselines(loaded, "label", "macro_f1") == baselines(streamed, "label", "macro_f1")


def test_baselines_sample_at_most_max_rows_by_seed(svm_only):
    data = dataset(noisy)
    kept = np.sort(np.random.default_rng(3).permutation(240)[:30])
    train = data.splits["train"]
    subset = dataclasses.replace(
        data, splits={**data.splits, "train": dataclasses.replace(train, ids=kept, arrays=train.take(kept))}
    )
    found = baselines(data, "label", "accuracy", seed=3, max_rows=30)
    assert found == baselines(subset, "label", "accuracy", seed=3)
    assert found != baselines(data, "label", "accuracy", seed=3)
    assert found != baselines(data, "label", "accuracy", seed=4, max_rows=30)


def test_baselines_are_deterministic_given_the_seed():
    data = dataset(noisy)
    one, other = (baselines(data, "label", "macro_recall", seed=1, max_rows=100, trials=2) for _ in range(2))
    assert one == other


def test_baselines_are_the_same_to_the_bit_with_one_thread_and_two(monkeypatch):
    """Two threads of BLAS sum in another order, and boosting turns the last bits of features into other trees."""
    random = np.random.default_rng(0)
    reader = Reader({"image": {**IMAGE, "size": (32, 32)}}, {"label": {"kind": "classification"}}, {"label": 2}, {})
    splits = {}
    for name, rows in (("train", 2_000), ("valid", 50), ("test", 50)):
        images = random.integers(0, 256, (rows, 32, 32, 1)).astype(np.uint8)
        batch = Batch(
            inputs={"image": images}, mask={"image": np.ones((rows, 1), bool)}, present={"image": np.ones(rows, bool)},
            targets={"label": random.integers(0, 2, rows)}, weight=np.ones(rows), id=np.arange(rows),
        )  # fmt: skip
        splits[name] = Split(name, np.arange(rows), (), reader, batch, {})
    data, found = Dataset(splits, reader, {"label": ()}, {}, "noise", "noise", {}, "noise"), {}
    trees = module.MODELS["classification"][-1]
    monkeypatch.setitem(
        module.MODELS, "classification", (trees._replace(space={"max_iter": (5, 5)}, search_rows=2_000),) * 2
    )
    for threads in (1, 2):
        with threadpool_limits(threads):
            table = features(data, "label", 0, 2_000).tables["image"]["train"].toarray()
            found[threads] = table, baselines(data, "label", "accuracy", trials=1)[-1].outputs
    for one, two in zip(found[1], found[2], strict=True):
        np.testing.assert_array_equal(one, two)


def test_settings_are_the_default_and_then_cover_the_space_evenly_in_logarithms():
    space = {"C": (0.01, 100.0), "max_iter": (4, 64)}
    estimator = linear_model.LogisticRegression(max_iter=7)
    first, *settings = module.draw(estimator, space, 9)
    assert first == {"C": 1.0, "max_iter": 7}
    assert module.draw(estimator, space, 3) == [first, *settings[:2]] and module.draw(estimator, {}, 9) == [{}]
    for name, (low, high) in space.items():
        positions = np.log([setting[name] / low for setting in settings]) / np.log(high / low)
        assert positions.min() >= 0 and positions.max() <= 1
        assert sorted((positions * 2).astype(int)) == [0] * 4 + [1] * 4
    assert all(isinstance(setting["max_iter"], int) for setting in settings)


def test_every_model_is_tuned_with_the_same_number_of_settings_in_its_space():
    for kind, (first, *models) in module.MODELS.items():
        assert first.space == {} and {"rbf_svm", "gradient_boosting"} < {model.name for model in models}, kind
        for model in models:
            settings = module.draw(model.estimator, model.space, 5)
            assert len({tuple(setting.values()) for setting in settings}) == 5
            for setting in settings[1:]:
                assert all(low <= setting[name] <= high for name, (low, high) in model.space.items())
    found = baselines(dataset(noisy), "label", "accuracy", models=["linear_svm", "naive_bayes"], trials=3)
    assert {one.trials for one in found} == {3}


def test_slow_baselines_compare_settings_on_fewer_rows_than_they_are_fitted_on(monkeypatch):
    first, svm = (module.MODELS["classification"][i] for i in (0, 5))
    assert svm.name == "rbf_svm" and svm.search_rows < svm.max_rows < module.MAX_ROWS
    fitted = []
    monkeypatch.setattr(svm.estimator.__class__, "fit", _recording(svm.estimator.__class__.fit, fitted))
    monkeypatch.setitem(module.MODELS, "classification", (first, svm._replace(search_rows=50, max_rows=100)))
    found = baselines(dataset(lambda bright, word: bright), "label", "accuracy", trials=2)[-1]
    assert fitted[-3:] == [50, 50, 100] and found.rows == 100 and found.test > 0.97
    rare = np.zeros(240, int)
    rare[7] = 1
    assert 7 in module._subsample(rare, 5, 0, "classification")  # a class is never lost


def _recording(fit, rows):
    def recorded(self, x, y):
        rows.append(len(y))
        return fit(self, x, y)

    return recorded


def test_baselines_keep_the_outputs_of_test_rows_with_one_of_their_modalities(svm_only):
    present = {"image": np.arange(240) >= 100, "text": np.arange(240) >= 40}
    data = replace_arrays(dataset(lambda bright, word: bright), "test", present=present)
    majority, image, text, both = baselines(data, "label", "accuracy", trials=1)
    for one, first in ((majority, 40), (image, 100), (text, 40), (both, 40)):
        np.testing.assert_array_equal(one.ids, np.arange(first, 240))
        assert one.test == pytest.approx((one.outputs.argmax(axis=1) == one.targets).mean())
    nowhere = {"image": np.zeros(240, bool), "text": np.ones(240, bool)}
    _, image, *_ = baselines(replace_arrays(data, "test", present=nowhere), "label", "accuracy", trials=1)
    assert math.isnan(image.test) and len(image.ids) == 0


def test_baselines_reject_unknown_names_and_absent_modalities():
    data = dataset(lambda bright, word: bright)
    with rejects("task", "labels", "label"):
        baselines(data, "labels", "accuracy")
    with rejects("metric", "acuracy", "accuracy"):
        baselines(data, "label", "acuracy")
    absent = {"image": np.zeros(240, bool), "text": np.ones(240, bool)}
    with rejects("modality", "image", says="0 training rows"):
        baselines(replace_arrays(data, "train", present=absent), "label", "accuracy")


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("label", "dominant"),
    [
        (lambda bright, word: bright, "unique_1"),
        (lambda bright, word: bright ^ word, "synergy"),
    ],
    ids=["unique", "synergy"],
)
def test_information_decomposition_of_datasets_finds_the_dominant_part(label, dominant, monkeypatch):
    monkeypatch.setattr(pid, "CLUSTERS", 2)
    data = dataset(label)
    tokens = data.splits["train"].arrays.inputs["text"]
    # Only the informative token.
    inputs = {**data.splits["train"].arrays.inputs, "text": np.repeat(tokens[:, 3:], 4, axis=1)}
    data = replace_arrays(data, "train", inputs=inputs)
    found, baseline = pid.of_dataset(data, "label")
    bits = dataclasses.asdict(found)
    assert bits.pop(dominant) == pytest.approx(1.0, abs=0.05)
    assert max(bits.values()) < 0.05
    assert max(dataclasses.asdict(baseline).values()) < 0.05


def test_gaussian_decomposition_of_a_dataset_finds_the_informative_modality():
    found, chance = gaussian_pid.of_dataset(dataset(lambda bright, word: bright), "label")
    assert found.unique["image"] > 10 * max(abs(found.unique["text"]), abs(found.redundant))
    assert max(chance.unique.values()) < 0.2 < found.unique["image"]


def test_baselines_command_fits_the_named_models(tiny_flags, command, tmp_path):
    flags = [*tiny_flags(), "--config.data.train=train[:200]", "--config.data.test=test[:40]"]
    process = command("experiments.baselines", *flags, "--models=naive_bayes", f"--output={tmp_path}/table.md")
    assert process.returncode == 0, process.stderr
    header, _, *rows, _, footer = (tmp_path / "table.md").read_text().splitlines()
    assert header == "| model | modalities | selected on validation | validation | test | seconds |"
    assert [row.split(" | ")[:2] for row in rows] == [["| naive_bayes", m] for m in ("image", "text", "image + text")]
    assert all(0 <= float(row.split(" | ")[4]) <= 1 for row in rows)
    assert footer.startswith("accuracy of 'label', shapes/match")
    process = command("experiments.baselines", *flags, "--models=linear_svn")
    assert (process.returncode, process.stderr) == (
        2,
        "error: --models='linear_svn': no such model; did you mean linear_svm?\n",
    )
