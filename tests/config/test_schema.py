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
from mmfusion.training import restore
from tests import tiny

SHIPPED = {
    path.stem: importlib.import_module(f"configs.{path.stem}")
    for path in pathlib.Path(quickstart.__file__).parent.glob("*.py")
    if path.stem != "__init__"
}


def check(config, devices=1):
    configs.check(config, devices)


def changed(path, value, arg=""):
    """The quickstart with one value changed, whatever its type; a new key where there is none."""
    config = quickstart.get_config(arg)
    *sections, name = path.split(".")
    section = config
    for part in sections:
        section = section[part]
    with config.unlocked(), config.ignore_type():
        section[name] = value
    return config


def test_every_shipped_config_passes():
    assert "quickstart" in SHIPPED
    for module in SHIPPED.values():
        first = next(iter(module.get_config("").data.modalities))
        for arg in ("", "fusion=gmu,seed=3", f"modalities={first}"):
            config = module.get_config(arg)
            check(config, devices=8)
            assert config.is_locked
    assert list(quickstart.get_config("modalities=text").model.encoders) == ["text"]
    assert quickstart.get_config("seed=3").seed == 3
    fused = quickstart.get_config("encoders=RUNS,modalities=text").model.encoders
    assert (fused.text.init, fused.text.freeze > 10**6) == ("run:RUNS/text", True)
    alone = SHIPPED["xray_ct"].get_config("modalities=ct").model.encoders
    assert (list(alone), alone.ct.join) == (["ct"], ())
    three = SHIPPED["three_images"].get_config().unlock()
    three.model.encoders.colour.share = three.model.encoders.deep.share = "gray"
    defaults.keep_modalities(three, "colour+deep")
    left = three.model.encoders
    assert (sorted(left), left.colour.share, left.deep.share) == (["colour", "deep"], "", "colour")
    assert av_digits.get_config("variant=clean").data.name == "av_digits/clean"


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        # unknown keys
        ("step", 5, r"config\.step is no key of a config: did you mean steps"),
        ("data.dirr", "x", r"config\.data\.dirr is no key of a config: did you mean dir"),
        ("model.fusion.head", 2, r"config\.model\.fusion\.head is not read by 'co_attention': did you mean heads"),
        ("model.encoders.text.cells", "gru", r"encoders\.text\.cells is not read by 'rnn': did you mean cell"),
        ("optim.momentum", 0.9, r"config\.optim\.momentum is not read by 'adamw'"),
        ("optim.schedule.gamma", 0.9, r"config\.optim\.schedule\.gamma is not read by 'warmup_cosine'"),
        ("data.modalities.image.rate", 8000, r"data\.modalities\.image\.rate is not read by 'image'"),
        ("data.modalities.image.augment.flop", 1.0, r"augment\.flop is not read by .*did you mean flip"),
        # unknown choices
        ("model.fusion.name", "cross_atention", r"model\.fusion\.name='cross_atention'.*mean cross_attention or"),
        ("model.encoders.image.name", "resnet19", r"image\.name='resnet19'.*did you mean resnet18"),
        ("optim.name", "adamW", r"config\.optim\.name='adamW' is unknown: did you mean adam"),
        ("optim.schedule.name", "cosine", r"schedule\.name='cosine' is unknown: did you mean warmup_cosine"),
        ("data.name", "shapes/mach", r"config\.data\.name='shapes/mach' .*shapes/match"),
        ("data.name", "mnst", r"config\.data\.name='mnst' .*did you mean mnist"),
        ("select", "acuracy", r"config\.select='acuracy' is unknown: did you mean accuracy"),
        ("select", "rmse", r"config\.select='rmse' is unknown: choose one of accuracy, auroc"),
        ("model.dtype", "float16", r"config\.model\.dtype='float16' is unknown: did you mean bfloat16 or float32"),
        ("parallel.mode", "pmapp", r"config\.parallel\.mode='pmapp' is unknown: did you mean pmap"),
        ("data.modalities.text.tokenizer", "words", r"text\.tokenizer='words' is unknown: did you mean word"),
        ("data.modalities.image.kind", "picture", r"image\.kind='picture' is unknown: choose one of audio"),
        ("data.targets.label.kind", "classify", r"targets\.label\.kind='classify' is unknown: did you mean classif"),
        # wrong types
        ("steps", 1.5, r"config\.steps=1\.5 must be of type int, like \d+"),
        ("steps", True, r"config\.steps=True must be of type int"),
        ("data.name", 3, r"config\.data\.name=3 must be of type str"),
        ("optim.learning_rate", "big", r"config\.optim\.learning_rate='big' must be of type float"),
        ("optim.learning_rate", None, r"config\.optim\.learning_rate=None must be of type float"),
        ("model.encoders.image.channels", 8, r"image\.channels=8 must be of type tuple"),
        ("model.encoders.image.channels", (8, "x", 8), r"image\.channels=\(8, 'x', 8\) must be of type tuple"),
        ("data.modalities.image.size", (32, 32.5), r"image\.size=\(32, 32\.5\) must be of type tuple, like \(32, 32\)"),
        # numbers that cannot be
        ("optim.learning_rate", -0.1, r"config\.optim\.learning_rate=-0\.1 must be"),
        ("optim.learning_rate", 0.0, r"config\.optim\.learning_rate=0\.0 must be above 0"),
        ("optim.learning_rate", float("nan"), r"config\.optim\.learning_rate=nan must be a finite number"),
        ("optim.weight_decay", -1.0, r"config\.optim\.weight_decay=-1\.0 must be .*not negative"),
        ("optim.schedule.warmup_steps", -1, r"warmup_steps=-1 must be .*not negative"),
        ("batch_size", 0, r"config\.batch_size=0 must be above 0"),
        ("parallel.mesh.fsdp", 2, r"parallel\.mesh divides the state, which takes --config\.parallel\.mode=jit"),
        ("parallel.mesh.model", 0, r"parallel\.mesh\.model=0 must be above 0"),
        ("parallel.mesh.data", 3, r"parallel\.mesh: 3 x 1 x 1 are not the \d+ devices"),
        ("parallel.mesh.data", -2, r"parallel\.mesh\.data=-2 must be .*not negative"),
        ("recovery.lr_factor", 0.0, r"recovery\.lr_factor=0\.0 must be above 0 and at most 1"),
        ("recovery.max_consecutive_bad_steps", 0, r"recovery\.max_consecutive_bad_steps=0 must be above 0"),
        ("seed", 2**32, r"config\.seed=\d+ must be below"),
        ("data.valid_fraction", 1.0, r"config\.data\.valid_fraction=1\.0 must be at least 0 and below 1"),
        ("data.valid_fraction", 0.0, r"config\.data\.valid_fraction must be above 0, or config\.data\.valid must name"),
        ("model.encoders.text.dropout", 1.0, r"text\.dropout=1\.0 must be at least 0 and below 1"),
        ("model.encoders.image.strides", (2, 0, 2), r"image\.strides=0 must be above 0"),
        ("data.modalities.image.channels", 5, r"1 to 4 channels"),
        ("data.modalities.image.mean", (0.5, 0.5), r"image\.mean and \.std must have 1 or 3 numbers"),
        ("data.modalities.image.std", (0.0,), r"image\.std must be above 0"),
        ("data.modalities.text.vocabulary_size", 2, r"text\.vocabulary_size must be at least 3"),
        ("data.modalities.text.length", 0, r"text\.length=0 must be above 0"),
        # parts that do not fit each other
        ("model.encoders.text.name", "cnn", r"encoders\.text\.name='cnn': does not read text; choose one of bow, text"),
        ("data.modalities", ConfigDict(), r"config\.data\.modalities is empty"),
        ("data.targets", ConfigDict(), r"config\.data\.targets is empty"),
    ],
)  # fmt: skip
def test_what_is_wrong_where_and_what_would_be_right(path, value, says):
    config = changed(path, value)
    if path == "model.encoders.text.name":
        config = quickstart.get_config()
        configs.choose(config, "model.encoders.text", value)
    with pytest.raises(UserError, match=says) as error:
        check(config)
    assert "\n" not in str(error.value)


def test_another_encoder_keeps_what_is_said_of_any():
    config = SHIPPED["xray_ct"].get_config().unlock()
    config.model.encoders.xray.update(init="weights.safetensors", freeze=3)
    configs.choose(config, "model.encoders.xray", "resnet18")
    assert config.model.encoders.xray.join == ("ct",)
    assert (config.model.encoders.xray.init, config.model.encoders.xray.freeze) == ("weights.safetensors", 3)
    config.model.encoders.xray.init = ""
    check(config)


def test_a_missing_key_is_named():
    for path in ("steps", "data.dir", "model.fusion.heads", "model.encoders.text.cell", "optim.clip_norm"):
        config = quickstart.get_config()
        *sections, name = path.split(".")
        section = config
        for part in sections:
            section = section[part]
        with config.unlocked():
            del section[name]
        with pytest.raises(UserError, match=rf"config\.{path} is missing"):
            check(config)


@pytest.mark.parametrize(
    ("batch", "devices", "accumulate", "says"),
    [
        (60, 8, 1, "batch_size=60 does not divide over 8 devices x 1 micro-batches: choose 56 or 64"),
        (64, 1, 3, "batch_size=64 does not divide over 1 devices x 3 micro-batches: choose 63 or 66"),
        (4, 8, 1, "choose 8"),
    ],
)
def test_a_batch_divides_over_devices_and_micro_batches(batch, devices, accumulate, says):
    config = quickstart.get_config()
    tiny.put(config, "batch_size", batch)
    tiny.put(config, "optim.accumulate", accumulate)
    with pytest.raises(UserError, match=says) as error:
        check(config, devices)
    assert "choose 0" not in str(error.value)
    tiny.put(config, "batch_size", 16 * 3)
    check(config, devices)


def test_the_choosing_metric_is_one_of_the_targets():
    config = quickstart.get_config()
    with config.unlocked():
        config.data.targets.size = defaults.target("regression", "size")
    with pytest.raises(UserError, match=r"config\.select='accuracy' is unknown: did you mean label/accuracy"):
        check(config)
    for name, higher in (("label/accuracy", True), ("size/rmse", False), ("size/r2", True), ("loss", False)):
        tiny.put(config, "select", name)
        check(config)
        assert configs.selectable(config)[name] is higher


@pytest.mark.parametrize("fusion", ["tmc", "qmf"])
def test_what_needs_classes_refuses_other_tasks(fusion):
    config = tiny.config(f"fusion={fusion}")
    with config.unlocked():
        config.data.targets.label = defaults.target("regression", "label")
        config.select = "mae"
    with pytest.raises(UserError, match=f"name='{fusion}' is for classes .* data.targets.label is regression"):
        check(config)


def test_no_more_devices_than_there_are():
    config = changed("parallel.devices", 2)
    check(config, devices=4)
    with pytest.raises(UserError, match=r"config\.parallel\.devices=2, but this machine has 1"):
        check(config)


def test_choosing_brings_its_own_options_and_keeps_the_rest():
    config = quickstart.get_config()
    rate = config.optim.learning_rate
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
    assert config.optim.learning_rate == rate
    assert config.optim.schedule.to_dict() == {"name": "step", "boundaries": (0.5, 0.75), "factor": 0.1}
    assert "cell" not in config.model.encoders.text


def test_arguments_have_their_defaults_types():
    args = configs.parse_arg("a=3,b=0.5,c=x=y,d=true", a=1, b=1.0, c="", d=False, e="kept")
    assert args.to_dict() == {"a": 3, "b": 0.5, "c": "x=y", "d": True, "e": "kept"}
    assert configs.parse_arg("", a=1).to_dict() == {"a": 1}


@pytest.mark.parametrize(
    ("arg", "says"),
    [
        ("seed=x", "argument seed='x' is not of type int"),
        ("seed=1.5", "argument seed='1.5' is not of type int"),
        ("seeds=1", "'seeds=1' is not key=value of a known key: did you mean seed"),
        ("seed", "'seed' is not key=value"),
        ("seed=1,left over", "'left over' is not key=value"),
        ("fusion=gum", "config.model.fusion.name='gum': unknown name; did you mean sum or gmu"),
        ("modalities=image+txt", r"modalities='image\+txt': did you mean text"),
    ],
)
def test_a_wrong_argument_is_named(arg, says):
    with pytest.raises(UserError, match=says):
        quickstart.get_config(arg)


def test_a_wrong_option_in_a_config_file_is_named():
    with pytest.raises(UserError, match="option 'head' of 'co_attention': did you mean heads"):
        defaults.fusion("co_attention", head=2)
    with pytest.raises(UserError, match="option 'sizes' of 'image': did you mean size"):
        defaults.modality("image", "picture", sizes=(8, 8))


def test_json_keeps_every_value_and_type():
    config = quickstart.get_config("fusion=gmu")
    again = configs.from_json(configs.to_json(config))
    assert again == config
    assert again.is_locked
    assert again.data.modalities.image.size == (32, 32)
    check(again)


def test_an_option_that_is_newer_than_a_saved_config_is_at_its_default(tmp_path):
    config = quickstart.get_config("fusion=co_attention")
    older = configs.to_json(config)
    del older["model"]["encoders"]["image"]["kernel"], older["model"]["fusion"]["heads"]
    assert configs.from_json(older) == config
    (tmp_path / "config.json").write_text(json.dumps(older))
    place = run_dir.RunDir(str(tmp_path), tmp_path, tmp_path / "checkpoints")
    restore.check_owner(place, config)
    with config.unlocked():
        config.model.encoders.image.kernel = 5
    with pytest.raises(UserError, match=r"its config\.model\.encoders\.image\.kernel is 3, here it is 5"):
        restore.check_owner(place, config)


@pytest.mark.parametrize("content", ["", '{"seed": 0, "ste', "\0\0", "[1", "[1]", "null"])
def test_torn_json_is_the_users(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json cannot be read as JSON"):
        configs.read_json(tmp_path / "config.json")


def test_the_nearest_names_or_the_first_of_many():
    assert nearest("adm", ["sgd", "adam", "adamw"]) == "did you mean adam or adamw?"
    assert nearest("x", ["b", "a"]) == "choose one of a, b"
    assert nearest("?", [f"name{i:03d}" for i in range(250)]).endswith("name029 and 220 more")
