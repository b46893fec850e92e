import importlib
import json
import pathlib

import pytest
from ml_collections import ConfigDict

from configs import av_digits, quickstart
from mmfusion import config as configs
from mmfusion.config import defaults
from mmfusion.errors import nearest
from mmfusion.tracking import run_dir
from mmfusion.training import directory
from tests import tiny
from tests.errors import rejects

SHIPPED = {
    path.stem: importlib.import_module(f"configs.{path.stem}")
    for path in pathlib.Path(quickstart.__file__).parent.glob("*.py")
    if path.stem not in ("__init__", "table")  # which needs a table
}


def check(config, devices=1):
    configs.check(config, devices)


def quickstart_with(path, value, arg=""):
    """Returns the quickstart config with one value set, of any type; adds the key if it does not exist."""
    config = quickstart.get_config(arg)
    *sections, name = path.split(".")
    section = config
    for part in sections:
        section = section[part]
    with config.unlocked(), config.ignore_type():
        section[name] = value
    return config


def test_check_passes_every_shipped_config():
    assert "quickstart" in SHIPPED
    for module in SHIPPED.values():
        first = next(iter(module.get_config("").data.modalities))
        for arg in ("", "fusion=gmu,seed=3", f"modalities={first}"):
            config = module.get_config(arg)
            check(config, devices=8)
            assert config.is_locked
    assert list(quickstart.get_config("modalities=text").model.encoders) == ["text"]
    assert quickstart.get_config("seed=3").seed == 3
    pretrained = quickstart.get_config("encoders=RUNS,modalities=text").model.encoders
    assert (pretrained.text.init, pretrained.text.freeze > 10**6) == ("run:RUNS/text", True)
    unimodal = SHIPPED["xray_ct"].get_config("modalities=ct").model.encoders
    assert (list(unimodal), unimodal.ct.join) == (["ct"], ())
    three = SHIPPED["three_images"].get_config().unlock()
    three.model.encoders.colour.share = three.model.encoders.deep.share = "gray"
    defaults.keep_modalities(three, "colour+deep")
    encoders = three.model.encoders
    assert (sorted(encoders), encoders.colour.share, encoders.deep.share) == (["colour", "deep"], "", "colour")
    assert av_digits.get_config("variant=clean").data.name == "av_digits/clean"


@pytest.mark.parametrize(
    ("path", "owner", "suggestion"),
    [
        ("step", "", "steps"),
        ("data.dirr", "", "dir"),
        ("model.fusion.head", "co_attention", "heads"),
        ("model.encoders.text.cells", "rnn", "cell"),
        ("optim.momentum", "adamw", "weight_decay"),
        ("optim.schedule.gamma", "warmup_cosine", "warmup_steps"),
        ("data.modalities.image.rate", "image", "feature"),
        ("data.modalities.image.augment.flop", "augment", "flip"),
        ("objectives.mixup.alfa", "mixup", "alpha"),
    ],
)
def test_check_rejects_an_unknown_key_with_a_suggestion(path, owner, suggestion):
    with rejects(f"config.{path}", None, suggestion, says=owner):
        check(quickstart_with(path, 1, "objectives=mixup"))


@pytest.mark.parametrize(
    ("path", "value", "suggestion"),
    [
        ("model.fusion.name", "cross_atention", "cross_attention"),
        ("model.encoders.image.name", "resnet19", "resnet18"),
        ("optim.name", "adamW", "adam"),
        ("optim.schedule.name", "cosine", "warmup_cosine"),
        ("data.name", "shapes/mach", "shapes/match"),
        ("data.name", "mnst", "mnist"),
        ("select", "acuracy", "accuracy"),
        ("select", "rmse", "auroc"),
        ("model.dtype", "float16", "bfloat16"),
        ("parallel.mode", "pmapp", "pmap"),
        ("data.modalities.text.tokenizer", "words", "word"),
        ("data.modalities.image.kind", "picture", "audio"),
        ("data.targets.label.kind", "classify", "classification"),
        ("data.targets.label.loss", "focl", "focal"),
    ],
)
def test_check_rejects_an_unknown_choice_with_a_suggestion(path, value, suggestion):
    with rejects(f"config.{path}", value, suggestion):
        check(quickstart_with(path, value))


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        # Invalid types.
        ("steps", 1.5, "of type int"),
        ("steps", True, "of type int"),
        ("data.name", 3, "of type str"),
        ("deterministic", 1, "of type bool"),
        ("optim.learning_rate", "big", "of type float"),
        ("optim.learning_rate", None, "not None"),
        ("model.encoders.image.channels", 8, "of type tuple"),
        ("model.encoders.image.channels", (8, "x", 8), "of type tuple"),
        ("data.modalities.image.size", (32, 32.5), "of type tuple"),
        # Out of range.
        ("optim.learning_rate", -0.1, "above 0"),
        ("optim.learning_rate", 0.0, "above 0"),
        ("optim.learning_rate", float("nan"), "finite"),
        ("data.memory_gb", float("inf"), "finite"),
        ("optim.weight_decay", -1.0, "not negative"),
        ("optim.weight_decay", float("nan"), "not negative"),
        ("optim.schedule.warmup_steps", -1, "not negative"),
        ("optim.accumulate", 0, "at least 1"),
        ("optim.clip_norm", -1.0, "at least 0"),
        ("batch_size", 0, "at least 1"),
        ("log_every", 0, "at least 1"),
        ("model.width", 0, "at least 1"),
        ("parallel.mesh.model", 0, "at least 1"),
        ("parallel.mesh.data", -2, "at least -1"),
        ("recovery.lr_factor", 0.0, "above 0 and at most 1"),
        ("recovery.lr_factor", 1.5, "above 0 and at most 1"),
        ("recovery.max_consecutive_bad_steps", 0, "at least 1"),
        ("seed", 2**32, "at least 0 and at most 4294967295"),
        ("seed", -1, "at least 0 and at most 4294967295"),
        ("data.valid_fraction", 1.0, "at least 0 and below 1"),
        ("data.missing", 1.0, "at least 0 and below 1"),
        ("data.valid_fraction", 0.0, "config.data.valid"),
        ("data.targets.label.label_smoothing", 1.0, "at least 0 and below 1"),
        ("model.encoders.text.dropout", 1.0, "at least 0 and below 1"),
        ("model.encoders.image.strides", (2, 0, 2), "above 0"),
        ("model.fusion.heads", 0, "above 0"),
        ("data.modalities.image.channels", 0, "at least 1"),
        ("data.modalities.image.range", (0,), "low < high"),
        ("data.modalities.image.range", (5, 5), "low < high"),
        ("data.modalities.image.range", (-1, 0, 1), "low < high"),
        ("data.modalities.image.range", (0, float("inf")), "finite"),
        ("data.modalities.image.range", (0, "x"), "of type tuple"),
        ("data.modalities.image.size", (32,), "(H, W)"),
        ("data.modalities.image.mean", (0.5, 0.5), "1 or 3"),
        ("data.modalities.image.std", (0.0,), "above 0"),
        ("data.modalities.text.vocabulary_size", 2, "at least 3"),
        ("data.modalities.text.length", 0, "above 0"),
    ],
)  # fmt: skip
def test_check_rejects_values_of_invalid_type_or_range(path, value, expected):
    with rejects(f"config.{path}", value, says=expected):
        check(quickstart_with(path, value))


def test_check_allows_images_of_many_channels_and_a_negative_range():
    config = quickstart.get_config()
    tiny.put(config, "data.modalities.image.channels", 13)
    tiny.put(config, "data.modalities.image.range", (-1000.5, 3000))
    check(config)


def test_check_allows_zero_where_it_disables_an_option():
    for path in ("optim.clip_norm", "recovery.rollbacks", "recovery.spike_threshold", "model.encoders.image.freeze"):
        check(quickstart_with(path, type(configs.flat(configs.to_json(quickstart.get_config()))[path])(0)))
    config = quickstart.get_config("objectives=gan")
    tiny.put(config, "objectives.gan.noise", 0)
    check(config)


@pytest.mark.parametrize(
    ("path", "value", "error_path", "fact"),
    [
        ("parallel.mesh.fsdp", 2, "parallel.mesh", "--config.parallel.mode=jit"),
        ("parallel.mesh.data", 3, "parallel.mesh", "3 x 1 x 1 are not the 1 devices"),
        ("data.modalities", ConfigDict(), "data.modalities", "one modality"),
        ("data.targets", ConfigDict(), "data.targets", "one target"),
    ],
)
def test_check_rejects_inconsistent_sections(path, value, error_path, fact):
    with rejects(f"config.{error_path}", None, says=fact):
        check(quickstart_with(path, value))


def test_check_lists_the_encoders_of_a_modality_type():
    config = quickstart.get_config()
    configs.choose(config, "model.encoders.text", "cnn")
    with rejects("config.model.encoders.text.name", "cnn", "textcnn") as error:
        check(config)
    assert {"bow", "rnn", "textcnn"} <= set(error.value.choices) and "cnn" not in error.value.choices


def test_choose_keeps_declared_keys_of_an_encoder():
    config = SHIPPED["xray_ct"].get_config().unlock()
    config.model.encoders.xray.update(init="weights.safetensors", freeze=3)
    configs.choose(config, "model.encoders.xray", "resnet18")
    assert config.model.encoders.xray.join == ("ct",)
    assert (config.model.encoders.xray.init, config.model.encoders.xray.freeze) == ("weights.safetensors", 3)
    config.model.encoders.xray.init = ""
    check(config)


def test_check_rejects_a_missing_key():
    for path in ("steps", "data.dir", "model.fusion.heads", "model.encoders.text.cell", "optim.clip_norm"):
        config = quickstart.get_config()
        *sections, name = path.split(".")
        section = config
        for part in sections:
            section = section[part]
        with config.unlocked():
            del section[name]
        with rejects(f"config.{path}", None, says="is missing"):
            check(config)


@pytest.mark.parametrize(
    ("batch_size", "devices", "accumulate", "fact"),
    [
        (60, 8, 1, "8 devices x 1 micro-batches: choose 56 or 64"),
        (64, 1, 3, "1 devices x 3 micro-batches: choose 63 or 66"),
        (4, 8, 1, "choose 8"),
    ],
)
def test_check_requires_a_divisible_batch_size(batch_size, devices, accumulate, fact):
    config = quickstart.get_config()
    tiny.put(config, "batch_size", batch_size)
    tiny.put(config, "optim.accumulate", accumulate)
    with rejects("config.batch_size", batch_size, says=fact):
        check(config, devices)
    tiny.put(config, "batch_size", 16 * 3)
    check(config, devices)


def test_select_must_be_a_metric_of_the_targets():
    config = quickstart.get_config()
    with config.unlocked():
        config.data.targets.size = defaults.target("regression", "size")
    with rejects("config.select", "accuracy", "label/accuracy"):
        check(config)
    for name, higher in (("label/accuracy", True), ("size/rmse", False), ("size/r2", True), ("loss", False)):
        tiny.put(config, "select", name)
        check(config)
        assert configs.selectable(config)[name] is higher


def test_select_last_needs_no_metric():
    config = quickstart_with("select", "last")
    check(config)
    assert configs.selected_metric(config) == "accuracy"
    tiny.put(config, "early_stopping", 3)
    with rejects("config.early_stopping", 3, says="config.select is 'last'"):
        check(config)
    config = quickstart_with("select", "last")
    configs.choose(config, "optim.schedule", "plateau")
    with rejects("config.optim.schedule.name", "plateau", says="config.select is 'last'"):
        check(config)


def test_sentiment_metrics_are_selectable_where_a_target_has_them():
    config = tiny.config()
    with config.unlocked():
        config.data.targets.label = defaults.target("regression", "label")
        config.select = "acc7"
    with rejects("config.select", "acc7", "mae"):
        check(config)
    tiny.put(config, "data.targets.label.metrics", ("sentiment",))
    check(config)
    assert configs.selectable(config)["acc2_nonzero"] is True
    tiny.put(config, "data.targets.label.metrics", ("sentimental",))
    with rejects("config.data.targets.label.metrics", "sentimental", "sentiment"):
        check(config)


@pytest.mark.parametrize("value", ["balanced", ("balanced",), (1, 2.5)])
def test_class_weights_may_be_balanced(value):
    config = quickstart_with("data.targets.label.class_weights", value)
    check(config)
    check(configs.from_json(configs.to_json(config)))


@pytest.mark.parametrize("value", ["balance", ("balance",), ("balanced", 1.0)])
def test_class_weights_reject_other_words(value):
    with rejects("config.data.targets.label.class_weights", value, says="tuple"):
        check(quickstart_with("data.targets.label.class_weights", value))


def test_balanced_classes_need_exclusive_classes():
    config = tiny.config()
    with config.unlocked():
        config.data.targets.label = defaults.target("multilabel", "label", classes=3, class_weights="balanced")
    with rejects("config.data.targets.label.class_weights", "balanced", says="one weight per label"):
        check(config)
    tiny.put(config, "data.targets.label.class_weights", ())
    tiny.put(config, "data.sampler", "balanced")
    with rejects("config.data.sampler", "balanced", says="has 0"):
        check(config)


@pytest.mark.parametrize("fusion", ["tmc", "qmf"])
def test_check_requires_classification_for_tmc_and_qmf(fusion):
    config = tiny.config(f"fusion={fusion}")
    with config.unlocked():
        config.data.targets.label = defaults.target("regression", "label")
        config.select = "mae"
    with rejects("config.model.fusion.name", fusion, says="data.targets.label is regression"):
        check(config)


def test_check_rejects_more_devices_than_available():
    config = quickstart_with("parallel.devices", 2)
    check(config, devices=4)
    with rejects("config.parallel.devices", 2, says="has 1"):
        check(config)


def test_choose_replaces_options_and_keeps_declared_keys():
    config = quickstart.get_config()
    learning_rate = config.optim.learning_rate
    for path, name in (
        ("model.fusion", "gmu"),
        ("optim", "sgd"),
        ("optim.schedule", "step"),
        ("model.encoders.text", "bow"),
    ):
        configs.choose(config, path, name)
    check(config)
    assert config.model.fusion.to_dict() == {"name": "gmu"}
    assert set(config.optim) == {"name", "learning_rate", "clip_norm", "accumulate", "schedule", "weight_decay"}
    assert config.optim.learning_rate == learning_rate
    assert config.optim.schedule.to_dict() == {"name": "step", "boundaries": (0.5, 0.75), "factor": 0.1}
    assert "cell" not in config.model.encoders.text


def test_config_arguments_have_the_types_of_their_defaults():
    args = configs.parse_arg("a=3,b=0.5,c=x=y,d=true", a=1, b=1.0, c="", d=False, e="kept")
    assert args.to_dict() == {"a": 3, "b": 0.5, "c": "x=y", "d": True, "e": "kept"}
    assert configs.parse_arg("", a=1).to_dict() == {"a": 1}


@pytest.mark.parametrize(
    ("arg", "path", "value", "suggestion"),
    [
        ("seed=x", "config argument seed", "x", ""),
        ("seed=1.5", "config argument seed", "1.5", ""),
        ("seeds=1", "config argument", "seeds", "seed"),
        ("seed", "config argument", "seed", ""),
        ("seed=1,left over", "config argument", "left over", ""),
        ("fusion=gum", "config.model.fusion.name", "gum", "gmu"),
        ("modalities=image+txt", "config argument modalities", "txt", "text"),
        ("objectives=mixp", "config.objectives.mixp", "mixp", "mixup"),
    ],
)
def test_config_arguments_reject_invalid_ones(arg, path, value, suggestion):
    with rejects(path, value, suggestion):
        quickstart.get_config(arg)


def test_defaults_reject_an_unknown_option():
    with rejects("option head", None, "heads", says="co_attention"):
        defaults.fusion("co_attention", head=2)
    with rejects("option sizes", None, "size", says="image"):
        defaults.modality("image", "image", sizes=(8, 8))


def test_from_json_keeps_every_value_and_type():
    config = quickstart.get_config("fusion=gmu")
    restored = configs.from_json(configs.to_json(config))
    assert restored == config
    assert restored.is_locked
    assert restored.data.modalities.image.size == (32, 32)
    check(restored)


def test_from_json_sets_newer_options_to_their_defaults(tmp_path):
    config = quickstart.get_config("fusion=co_attention")
    older = configs.to_json(config)
    del older["model"]["encoders"]["image"]["kernel"], older["model"]["fusion"]["heads"]
    del older["data"]["targets"]["label"]["gamma"], older["early_stopping"], older["data"]["sampler"]
    assert configs.from_json(older) == config
    (tmp_path / "config.json").write_text(json.dumps(older))
    workdir = run_dir.RunDir(str(tmp_path), tmp_path, tmp_path / "checkpoints")
    directory.check_owner(workdir, config)
    with config.unlocked():
        config.model.encoders.image.kernel = 5
    with rejects(tmp_path, says="config.model.encoders.image.kernel is 3, here it is 5"):
        directory.check_owner(workdir, config)


@pytest.mark.parametrize("content", ["", '{"seed": 0, "ste', "\0\0", "[1", "[1]", "null"])
def test_read_json_rejects_a_truncated_file(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with rejects(tmp_path / "config.json"):
        configs.read_json(tmp_path / "config.json")


def test_nearest_suggests_similar_names_or_lists_choices():
    assert nearest("adm", ["sgd", "adam", "adamw"]) == "did you mean adam or adamw?"
    assert nearest("x", ["b", "a"]) == "choose one of a, b"
    assert nearest("?", [f"name{i:03d}" for i in range(250)]).endswith("name029 and 220 more")
