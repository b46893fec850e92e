import hashlib
from collections import Counter

import numpy as np
import pytest

from mmfusion import config as configs
from mmfusion.data import dataset, text
from mmfusion.data.holdout import holdout_split
from mmfusion.data.split import check_bad
from tests import planted
from tests.errors import rejects


def load(config=None, **options):
    return dataset.load(configs.read(config or planted.config()).data, seed=0, **options)


def vocabulary(data):
    return set(text.from_json(data.fitted["text"]).get_vocab())


def digest(values):
    return hashlib.sha256(np.asarray(values, "<i8").tobytes()).hexdigest()[:16]


# --- Splits ---


def test_holdout_split_is_platform_independent():
    mask = holdout_split(range(10_000), 0.1)
    assert digest(np.flatnonzero(mask)) == "e7ac0415722508c5"
    assert abs(mask.mean() - 0.1) < 0.01
    named = holdout_split([f"train-{i:05d}" for i in range(10_000)], 0.1)
    assert digest(np.flatnonzero(named)) == "1058f4f397183217"


def test_holdout_split_does_not_depend_on_row_order_and_grows_with_the_fraction():
    groups, classes = [f"g{i}" for i in range(500)], [i % 3 for i in range(500)]
    mask = holdout_split(groups, 0.2, classes)
    np.testing.assert_array_equal(mask, holdout_split(groups[::-1], 0.2, classes[::-1])[::-1])
    assert mask[holdout_split(groups, 0.1, classes)].all()


def test_holdout_split_is_stratified_by_class():
    classes = ["common"] * 900 + ["rare"] * 90 + ["rarer"] * 10 + ["few"] * 4
    held_out = Counter(np.array(classes)[holdout_split(range(len(classes)), 0.1, classes)])
    assert held_out == {"common": 90, "rare": 9, "rarer": 1}
    # From five rows on, a class is in both parts, whatever the fraction.
    for fraction in (0.01, 0.99):
        mask = holdout_split(range(5), fraction, ["a"] * 5)
        assert 0 < mask.sum() < 5


def test_holdout_split_holds_out_one_of_few_groups():
    for groups in ([f"speaker{i // 20}" for i in range(200)], ["a", "a", "b"]):
        mask = holdout_split(groups, 0.1, range(len(groups)))
        held_out = {group for group, held in zip(groups, mask, strict=True) if held}
        assert len(held_out) == 1
        assert mask.sum() == groups.count(held_out.pop())
    assert not holdout_split(["a", "a"], 0.1).any()


def test_holdout_split_takes_whole_groups_of_train_only(monkeypatch):
    rows = [planted.row(i) for i in range(60)]
    planted.plant(monkeypatch, train=rows, test=rows[:20])
    data = load(planted.config(data__group="group"))
    train, valid = data.splits["train"], data.splits["valid"]
    assert sorted([*train.ids, *valid.ids]) == list(range(60))
    assert 4 < len(valid) < 30
    assert not {rows[i]["group"] for i in train.ids} & {rows[i]["group"] for i in valid.ids}
    assert {len({i // 2 for i in split.ids}) * 2 for split in (train, valid)} == {len(train), len(valid)}
    assert data.splits["test"].ids.tolist() == list(range(20))
    assert valid.source is rows


def test_holdout_split_keeps_shapes_groups_together(data_dir):
    config = planted.config("image", data__name="shapes/match", data__dir=data_dir, data__group="group")
    with config.unlocked():
        config.data.valid_fraction, config.data.train, config.data.test = 0.1, "train[:2000]", "test[:100]"
    splits = dataset.load(configs.read(config).data, seed=0).splits
    groups = {name: {split.source[int(i)]["group"] for i in split.ids} for name, split in splits.items()}
    assert len(splits["train"]) + len(splits["valid"]) == 2000
    assert 100 < len(splits["valid"]) < 300
    assert not groups["train"] & groups["valid"]
    assert not groups["test"] & (groups["train"] | groups["valid"])


def test_load_uses_the_official_validation_split(monkeypatch):
    rows = [planted.row(i) for i in range(40)]
    planted.plant(monkeypatch, train=rows, validation=rows[:7], test=rows[:9])
    splits = load(planted.config(data__valid="validation", data__valid_fraction=0.0)).splits
    assert {name: split.ids.tolist() for name, split in splits.items()} == {
        "train": list(range(40)), "valid": list(range(7)), "test": list(range(9))
    }  # fmt: skip


@pytest.mark.parametrize(
    ("train", "test", "changes", "path", "value"),
    [
        (20, 0, {}, "config.data.name", "planted"),
        (1, 5, {"data__valid_fraction": 0.999}, "config.data.train", "train"),
    ],
)
def test_load_rejects_an_empty_split(train, test, changes, path, value, monkeypatch):
    rows = [planted.row(i) for i in range(20)]
    planted.plant(monkeypatch, train=rows[:train], test=rows[:test])
    with rejects(path, value, says="test" if test == 0 else "empty"):
        load(planted.config(**changes))


# --- Vocabulary ---


def test_vocabulary_is_fitted_on_train_rows_only(monkeypatch):
    rows = [planted.row(i, text=f"row own{i}") for i in range(40)]
    planted.plant(monkeypatch, train=rows, test=[planted.row(i, text="row tested") for i in range(9)])
    data = load()
    known = vocabulary(data)
    assert known == {"[PAD]", "[OOV]", "row"} | {f"own{i}" for i in data.splits["train"].ids}
    for split in ("valid", "test"):
        ids = data.splits[split].take(np.arange(4)).inputs["text"]
        assert (ids[:, 1] == text.OOV).all()
    assert (data.splits["train"].take(np.arange(4)).inputs["text"][:, 1] != text.OOV).all()
    assert data.encoder_kwargs() == {"text": {"vocabulary": len(known)}, "audio": {"rate": 1000}, "image": {}}


def test_load_of_a_saved_run_keeps_vocabulary_and_classes(monkeypatch):
    rows = [planted.row(i) for i in range(40)]
    planted.plant(monkeypatch, train=rows, test=rows[:9])
    original = load()
    planted.plant(monkeypatch, test=[planted.row(i, text="row other words") for i in range(9)], names={})
    resumed = load(splits=("test",), saved=original.saved())
    assert vocabulary(resumed) == vocabulary(original)
    assert resumed.class_names == original.class_names
    assert list(resumed.splits) == ["test"]
    without_splits = load(splits=(), saved=original.saved())
    assert (without_splits.splits, without_splits.reader.outputs) == ({}, {"label": 2})


# --- Classes and features ---


def test_classes_come_from_the_dataset_or_the_config(monkeypatch):
    rows = [planted.row(i) for i in range(20)]
    planted.plant(monkeypatch, train=rows, test=rows)
    data = load(planted.config(tasks="label+tags+amount"))
    assert data.class_names == {"label": ("no", "yes"), "tags": ("0", "1", "2"), "amount": ()}
    assert data.reader.outputs == {"label": 2, "tags": 3, "amount": 1}
    with rejects("config.data.targets.label.classes", 3, says="0 or 2"):
        load(planted.config(data__targets__label__classes=3))
    planted.plant(monkeypatch, train=rows, test=rows, names={})
    with rejects("config.data.targets.label.classes", 0):
        load()


@pytest.mark.parametrize(
    "path",
    ["data.modalities.image.feature", "data.targets.label.feature", "data.group"],
)
def test_load_lists_the_features_when_one_is_missing(path, monkeypatch):
    rows = [planted.row(i) for i in range(20)]
    planted.plant(monkeypatch, train=rows, test=rows)
    with rejects(f"config.{path}", "photo", "tags") as error:
        load(planted.config(**{path.replace(".", "__"): "photo"}))
    assert error.value.choices == ["amount", "audio", "group", "image", "label", "tags", "text"]


# --- Fingerprint ---


def test_fingerprint_depends_on_the_data_not_on_directories_or_memory(monkeypatch):
    rows = [planted.row(i) for i in range(40)]
    planted.plant(monkeypatch, train=rows, test=rows)
    fingerprint = load().fingerprint
    assert load(planted.config(data__memory_gb=0.0, data__workers=1, data__manual_dir="/x")).fingerprint == fingerprint
    others = [
        load(planted.config(data__valid_fraction=0.4)),
        load(planted.config(data__modalities__image__size=(4, 4))),
        load(planted.config(data__targets__label__label_smoothing=0.1)),
    ]
    planted.plant(monkeypatch, train=rows, test=rows[1:])
    others.append(load())
    assert len({fingerprint, *(data.fingerprint for data in others)}) == 5


def test_check_unchanged_compares_stored_rows(monkeypatch):
    rows = [planted.row(i) for i in range(40)]
    planted.plant(monkeypatch, train=rows, test=rows)
    saved = load().saved()
    load().check_unchanged(saved, "DIR")
    changed = [*rows[:-1], planted.row(39, image=planted.png(7))]
    planted.plant(monkeypatch, train=rows, test=changed)
    load().check_unchanged(saved, "DIR")  # test rows may change
    assert load().content != saved["content"]
    planted.plant(monkeypatch, train=changed, test=rows)
    with rejects("DIR", None, says=saved["content"]["train"]):
        load().check_unchanged(saved, "DIR")


def test_content_hash_covers_type_and_value_of_every_feature(monkeypatch):
    def content(value):
        rows = [{**planted.row(i), "more": value} for i in range(40)]
        planted.plant(monkeypatch, train=rows, test=rows)
        return load().content["train"]

    values = [
        b"ab", "ab", ["ab"], [b"ab", b"c"], [b"a", b"bc"], ["a", "b"], {"ab": 1}, {"ab": 2}, {"a": 1}, None, 1, 1.0,
        np.zeros(4, np.int32), np.zeros(2, np.int64), np.zeros((2, 2), np.int32), np.array([b"ab", "c"], object),
        np.array([b"ab", b"d"], object), np.array(b"ab", object), np.float32(1), np.float32(2),
    ]  # fmt: skip
    assert len({content(value) for value in values}) == len(values)
    assert content({"a": 1, "b": 2}) == content({"b": 2, "a": 1})


# --- Unreadable rows ---


def test_unreadable_rows_keep_their_position_with_weight_0(monkeypatch):
    rows = [planted.row(i) for i in range(40)]
    rows[7] = planted.row(7, image=b"no image")
    rows[9] = planted.row(9, audio=planted.wav(0.1)[:90])
    planted.plant(monkeypatch, train=[planted.row(i) for i in range(40)], test=rows)
    test = load(planted.config(data__max_bad_fraction=0.05)).splits["test"]
    assert test.bad == {
        7: "row 7, image: not an image",
        9: f"row 9, audio: truncated: 90 of {len(rows[8]['audio'])} bytes",
    }
    batch = test.take(np.array([6, 7, 8, 9, -1]))
    assert batch.id.tolist() == [6, 7, 8, 9, -1]
    assert batch.weight.tolist() == [1, 0, 1, 0, 0]
    assert not any(batch.inputs[m][[1, 3, 4]].any() or batch.present[m][[1, 3, 4]].any() for m in batch.inputs)
    with rejects("config.data.max_bad_fraction", 0.049, says="2 of 40 rows of split 'test'") as error:
        load(planted.config(data__max_bad_fraction=0.049))
    assert "row 7, image: not an image" in error.value.message


def test_check_bad_reports_rows_found_by_another_process(monkeypatch):
    rows = [planted.row(i) for i in range(40)]
    rows[7] = planted.row(7, image=b"no image")
    planted.plant(monkeypatch, train=[planted.row(i) for i in range(40)], test=rows)
    test = load(planted.config(data__memory_gb=0.0)).splits["test"]
    assert test.bad == {}
    check_bad(test, {7}, 0.1)
    assert test.bad == {7: "row 7, image: not an image"}
    with rejects("config.data.max_bad_fraction", 0.0, says="row 7, image: not an image"):
        check_bad(test, {7}, 0.0)


@pytest.mark.parametrize("modality", ["image", "text", "audio"])
def test_load_rejects_a_modality_absent_in_every_row(modality, monkeypatch):
    rows = [planted.row(i) for i in range(20)]
    planted.plant(monkeypatch, train=rows, test=[{**row, modality: ""} for row in rows])
    with rejects(f"config.data.modalities.{modality}", None, says="split 'test'"):
        load()
