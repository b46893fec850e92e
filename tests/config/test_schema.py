import importlib
import json
import pathlib

import pytest
from ml_collections import ConfigDict

from configs import av_digits, quickstart
from mmfusion import config as configs
from mmfusion.config import defaults
from mmfusion.errors import UserError, nearest
from mmfusion.tracking import run_dir
from mmfusion.training import directory
from tests import tiny

SHIPPED = {
    path.stem: importlib.import_module(f"configs.{path.stem}")
    for path in pathlib.Path(quickstart.__file__).parent.glob("*.py")
    if path.stem != "__init__"
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
    ("path", "message", "suggestion"),
    [
        ("step", "no such key", "steps"),
        ("data.dirr", "no such key", "dir"),
        ("model.fusion.head", "not read by 'co_attention'", "heads"),
        ("model.encoders.text.cells", "not read by 'rnn'", "cell"),
        ("optim.momentum", "not read by 'adamw'", "weight_decay"),
        ("optim.schedule.gamma", "not read by 'warmup_cosine'", "warmup_steps"),
        ("data.modalities.image.rate", "not read by 'image'", "feature"),
        ("data.modalities.image.augment.flop", "not read by 'augment'", "flip"),
        ("objectives.mixup.alfa", "not read by 'mixup'", "alpha"),
    ],
)  # fmt: skip
def test_check_rejects_an_unknown_key_with_a_suggestion(path, message, suggestion):
    with pytest.raises(UserError, match=message) as error:
        check(quickstart_with(path, 1, "objectives=mixup"))
    assert (error.value.path, error.value.value) == (f"config.{path}", None)
    assert suggestion in error.value.choices and suggestion in str(error.value)


@pytest.mark.parametrize(
    ("path", "value", "noun", "suggestion"),
    [
        ("model.fusion.name", "cross_atention", "name", "cross_attention"),
        ("model.encoders.image.name", "resnet19", "name", "resnet18"),
        ("optim.name", "adamW", "optimizer", "adam"),
        ("optim.schedule.name", "cosine", "schedule", "warmup_cosine"),
        ("data.name", "shapes/mach", "variant", "shapes/match"),
        ("data.name", "mnst", "dataset", "mnist"),
        ("select", "acuracy", "metric", "accuracy"),
        ("select", "rmse", "metric", "auroc"),
        ("model.dtype", "float16", "value", "bfloat16"),
        ("parallel.mode", "pmapp", "value", "pmap"),
        ("data.modalities.text.tokenizer", "words", "tokenizer", "word"),
        ("data.modalities.image.kind", "picture", "name", "audio"),
        ("data.targets.label.kind", "classify", "type of target", "classification"),
        ("data.targets.label.loss", "focl", "loss", "focal"),
    ],
)  # fmt: skip
def test_check_rejects_an_unknown_choice_with_a_suggestion(path, value, noun, suggestion):
    with pytest.raises(UserError) as error:
        check(quickstart_with(path, value))
    assert suggestion in str(error.value)
    if path != "data.name":  # raised by the sources
        assert (error.value.path, error.value.value) == (f"config.{path}", value)
        assert error.value.message == f"unknown {noun}" and suggestion in error.value.choices


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        # Invalid types.
        ("steps", 1.5, "must be of type int, like 1000"),
        ("steps", True, "must be of type int, like 1000"),
        ("data.name", 3, "must be of type str, like ''"),
        ("deterministic", 1, "must be of type bool, like False"),
        ("optim.learning_rate", "big", "must be of type float, like 0.001"),
        ("optim.learning_rate", None, "must be of type float, like 0.001, not None"),
        ("model.encoders.image.channels", 8, "must be of type tuple, like (32, 64, 64)"),
        ("model.encoders.image.channels", (8, "x", 8), "must be of type tuple, like (32, 64, 64)"),
        ("data.modalities.image.size", (32, 32.5), "must be of type tuple, like (32, 32)"),
        # Out of range.
        ("optim.learning_rate", -0.1, "must be above 0"),
        ("optim.learning_rate", 0.0, "must be above 0"),
        ("optim.learning_rate", float("nan"), "must be a finite number"),
        ("data.memory_gb", float("inf"), "must be a finite number"),
        ("optim.weight_decay", -1.0, "must be a finite number and not negative"),
        ("optim.weight_decay", float("nan"), "must be a finite number and not negative"),
        ("optim.schedule.warmup_steps", -1, "must be a finite number and not negative"),
        ("optim.accumulate", 0, "must be at least 1"),
        ("optim.clip_norm", -1.0, "must be at least 0"),
        ("batch_size", 0, "must be at least 1"),
        ("log_every", 0, "must be at least 1"),
        ("model.width", 0, "must be at least 1"),
        ("parallel.mesh.model", 0, "must be at least 1"),
        ("parallel.mesh.data", -2, "must be at least -1"),
        ("recovery.lr_factor", 0.0, "must be above 0 and at most 1"),
        ("recovery.lr_factor", 1.5, "must be above 0 and at most 1"),
        ("recovery.max_consecutive_bad_steps", 0, "must be at least 1"),
        ("seed", 2**32, "must be at least 0 and at most 4294967295"),
        ("seed", -1, "must be at least 0 and at most 4294967295"),
        ("data.valid_fraction", 1.0, "must be at least 0 and below 1"),
        ("data.missing", 1.0, "must be at least 0 and below 1"),
        ("data.valid_fraction", 0.0, "must be above 0, or config.data.valid must name a split"),
        ("data.targets.label.label_smoothing", 1.0, "must be at least 0 and below 1"),
        ("model.encoders.text.dropout", 1.0, "must be at least 0 and below 1"),
        ("model.encoders.image.strides", (2, 0, 2), "must be above 0"),
        ("model.fusion.heads", 0, "must be above 0"),
        ("data.modalities.image.channels", 5, "must be 1 to 4 channels"),
        ("data.modalities.image.size", (32,), "must be (H, W) in pixels"),
        ("data.modalities.image.mean", (0.5, 0.5), "must have 1 or 3 numbers"),
        ("data.modalities.image.std", (0.0,), "must be above 0"),
        ("data.modalities.text.vocabulary_size", 2, "must be at least 3"),
        ("data.modalities.text.length", 0, "must be above 0"),
    ],
)  # fmt: skip
def test_check_rejects_values_of_invalid_type_or_range(path, value, message):
    with pytest.raises(UserError) as error:
        check(quickstart_with(path, value))
    assert (error.value.message, error.value.path) == (message, f"config.{path}")
    assert repr(error.value.value) == repr(value)
    assert "\n" not in str(error.value)


def test_check_allows_zero_where_it_disables_an_option():
    for path in ("optim.clip_norm", "recovery.rollbacks", "recovery.spike_threshold", "model.encoders.image.freeze"):
        check(quickstart_with(path, type(configs.flat(configs.to_json(quickstart.get_config()))[path])(0)))
    config = quickstart.get_config("objectives=gan")
    tiny.put(config, "objectives.gan.noise", 0)
    check(config)


@pytest.mark.parametrize(
    ("path", "value", "error_path", "message"),
    [
        ("parallel.mesh.fsdp", 2, "parallel.mesh", "fsdp and model divide the state, which needs .*mode=jit"),
        ("parallel.mesh.data", 3, "parallel.mesh", "3 x 1 x 1 are not the 1 devices"),
        ("data.modalities", ConfigDict(), "data.modalities", "must have at least one modality"),
        ("data.targets", ConfigDict(), "data.targets", "must have at least one target"),
    ],
)
def test_check_rejects_inconsistent_sections(path, value, error_path, message):
    with pytest.raises(UserError, match=message) as error:
        check(quickstart_with(path, value))
    assert error.value.path == f"config.{error_path}"


def test_check_lists_the_encoders_of_a_modality_type():
    config = quickstart.get_config()
    configs.choose(config, "model.encoders.text", "cnn")
    with pytest.raises(UserError, match="does not read text") as error:
        check(config)
    assert (error.value.path, error.value.value) == ("config.model.encoders.text.name", "cnn")
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
        with pytest.raises(UserError, match="is missing") as error:
            check(config)
        assert error.value.path == f"config.{path}"


@pytest.mark.parametrize(
    ("batch_size", "devices", "accumulate", "message"),
    [
        (60, 8, 1, "does not divide over 8 devices x 1 micro-batches: choose 56 or 64"),
        (64, 1, 3, "does not divide over 1 devices x 3 micro-batches: choose 63 or 66"),
        (4, 8, 1, "choose 8"),
    ],
)
def test_check_requires_a_divisible_batch_size(batch_size, devices, accumulate, message):
    config = quickstart.get_config()
    tiny.put(config, "batch_size", batch_size)
    tiny.put(config, "optim.accumulate", accumulate)
    with pytest.raises(UserError, match=message) as error:
        check(config, devices)
    assert (error.value.path, error.value.value) == ("config.batch_size", batch_size)
    assert "choose 0" not in str(error.value)
    tiny.put(config, "batch_size", 16 * 3)
    check(config, devices)


def test_select_must_be_a_metric_of_the_targets():
    config = quickstart.get_config()
    with config.unlocked():
        config.data.targets.size = defaults.target("regression", "size")
    with pytest.raises(UserError, match="did you mean label/accuracy") as error:
        check(config)
    assert (error.value.path, error.value.value) == ("config.select", "accuracy")
    assert {"label/accuracy", "size/rmse", "loss"} <= set(error.value.choices)
    for name, higher in (("label/accuracy", True), ("size/rmse", False), ("size/r2", True), ("loss", False)):
        tiny.put(config, "select", name)
        check(config)
        assert configs.selectable(config)[name] is higher


@pytest.mark.parametrize("fusion", ["tmc", "qmf"])
def test_check_requires_classification_for_tmc_and_qmf(fusion):
    config = tiny.config(f"fusion={fusion}")
    with config.unlocked():
        config.data.targets.label = defaults.target("regression", "label")
        config.select = "mae"
    with pytest.raises(UserError, match=r"needs exclusive classes, and data\.targets\.label is regression") as error:
        check(config)
    assert (error.value.path, error.value.value) == ("config.model.fusion.name", fusion)


def test_check_rejects_more_devices_than_available():
    config = quickstart_with("parallel.devices", 2)
    check(config, devices=4)
    with pytest.raises(UserError, match="this machine has 1") as error:
        check(config)
    assert (error.value.path, error.value.value) == ("config.parallel.devices", 2)


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
    ("arg", "path", "value", "message"),
    [
        ("seed=x", "config argument seed", "x", "not of type int"),
        ("seed=1.5", "config argument seed", "1.5", "not of type int"),
        ("seeds=1", "config argument", "seeds", "unknown argument"),
        ("seed", "config argument", "seed", "must be key=value"),
        ("seed=1,left over", "config argument", "left over", "must be key=value"),
        ("fusion=gum", "config.model.fusion.name", "gum", "unknown name"),
        ("modalities=image+txt", "config argument modalities", "txt", "unknown modality"),
        ("objectives=mixp", "config.objectives.mixp", "mixp", "unknown name"),
    ],
)
def test_config_arguments_reject_invalid_ones(arg, path, value, message):
    with pytest.raises(UserError, match=message) as error:
        quickstart.get_config(arg)
    assert (error.value.path, error.value.value) == (path, value)


def test_defaults_reject_an_unknown_option():
    with pytest.raises(UserError, match="co_attention has no such option; did you mean heads") as error:
        defaults.fusion("co_attention", head=2)
    assert error.value.path == "option head" and "heads" in error.value.choices
    with pytest.raises(UserError, match="image has no such option") as error:
        defaults.modality("image", "image", sizes=(8, 8))
    assert error.value.path == "option sizes" and "size" in error.value.choices


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
    assert configs.from_json(older) == config
    (tmp_path / "config.json").write_text(json.dumps(older))
    workdir = run_dir.RunDir(str(tmp_path), tmp_path, tmp_path / "checkpoints")
    directory.check_owner(workdir, config)
    with config.unlocked():
        config.model.encoders.image.kernel = 5
    with pytest.raises(UserError, match=r"its config\.model\.encoders\.image\.kernel is 3, here it is 5"):
        directory.check_owner(workdir, config)


@pytest.mark.parametrize("content", ["", '{"seed": 0, "ste', "\0\0", "[1", "[1]", "null"])
def test_read_json_rejects_a_truncated_file(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match="cannot be read as JSON") as error:
        configs.read_json(tmp_path / "config.json")
    assert error.value.path == str(tmp_path / "config.json")


def test_nearest_suggests_similar_names_or_lists_choices():
    assert nearest("adm", ["sgd", "adam", "adamw"]) == "did you mean adam or adamw?"
    assert nearest("x", ["b", "a"]) == "choose one of a, b"
    assert nearest("?", [f"name{i:03d}" for i in range(250)]).endswith("name029 and 220 more")
