"""Checks of the sections `data` and `model.encoders`."""

import pytest

from configs import quickstart
from mmfusion.config import defaults
from tests import tiny
from tests.config.test_schema import SHIPPED, check, quickstart_with
from tests.errors import rejects


def test_share_rejects_images_with_different_channels():
    config = SHIPPED["three_images"].get_config().unlock()
    config.model.encoders.colour.share = "gray"
    with rejects("config.model.encoders.colour.share", "gray", says="channels=3 and channels=1"):
        check(config)
    check(SHIPPED["xray_ct"].get_config("joined=False,shared=True"))
    with rejects("config arguments", says="joined=False"):
        SHIPPED["xray_ct"].get_config("shared=True")


@pytest.mark.parametrize(
    ("application", "one", "other", "fact"),
    [
        ("recommendation", "text", "behaviour", "vocabulary"),
        ("interaction", "speech", "second", "rate=8000 and rate=16000"),
    ],
)
def test_share_rejects_inputs_with_different_encodings(application, one, other, fact):
    config = SHIPPED["applications"].get_config(f"application={application}").unlock()
    if other == "second":
        config.data.modalities.second = config.data.modalities[one].copy_and_resolve_references()
        config.data.modalities.second.rate = 2 * config.data.modalities[one].rate
        config.model.encoders.second = config.model.encoders[one].copy_and_resolve_references()
    config.model.encoders[one].share = other
    with rejects(f"config.model.encoders.{one}.share", other, says=fact):
        check(config)


def test_layer_decay_requires_sequential_layers():
    config = SHIPPED["xray_ct"].get_config().unlock()
    config.model.encoders.xray.layer_decay = 0.5
    with rejects("config.model.encoders.xray.layer_decay", 0.5, says="cnn_rnn"):
        check(config)


@pytest.mark.parametrize(
    ("path", "value", "suggestion", "fact"),
    [
        ("image.layer_decay", 0.0, "", "above 0 and at most 1"),
        ("image.layer_decay", 1.5, "", "above 0 and at most 1"),
        ("image.freeze", -1, "", "at least 0"),
        ("image.share", "text", "", "image and text"),
        ("image.share", "imag", "text", ""),
        ("image.share", "image", "text", ""),
        ("image.join", (1,), "", "tuple"),
    ],
)
def test_encoder_options_reject_invalid_values(path, value, suggestion, fact):
    with rejects(f"config.model.encoders.{path}", value, suggestion, says=fact):
        check(quickstart_with(f"model.encoders.{path}", value))


def test_join_rejects_modalities_of_different_types():
    with rejects("config.model.encoders.image.join", "text", says="image and text"):
        check(quickstart_with("model.encoders.image.join", ("text",)))


def test_join_and_share_require_consistent_encoder_sections():
    config = quickstart.get_config()
    with config.unlocked():
        config.data.modalities.second = config.data.modalities.image
        config.model.encoders.image.join = ("second",)
    check(config)
    with config.unlocked():
        config.model.encoders.second = defaults.encoder("image", "cnn")
    with rejects("config.model.encoders.second", None, says="the encoder of image reads it"):
        check(config)
    with config.unlocked():
        config.model.encoders.image.join = ("second", "second")
        del config.model.encoders["second"]
    with rejects("config.model.encoders.image.join", ("second", "second"), says="twice"):
        check(config)
    with config.unlocked():
        config.model.encoders.second = defaults.encoder("image", "cnn_rnn")
        config.model.encoders.image.join = ()
        config.model.encoders.image.share = "second"
    with rejects("config.model.encoders.image.share", "second", says="norm=batch"):
        check(config)
    with config.unlocked():
        config.model.encoders.second = defaults.encoder("image", "cnn")
        config.model.encoders.image.share = "second"
    check(config)
    with config.unlocked():
        config.model.encoders.image.freeze = 3
    with rejects("config.model.encoders.image", None, says="the weights are second's"):
        check(config)
    with config.unlocked():
        config.model.encoders.image.freeze = 0
        config.model.encoders.second.share = "image"
    with rejects("config.model.encoders.image.share", "second", says="name 'image'"):
        check(config)


@pytest.mark.parametrize("name", ["joint", "learned", "left_image", "Image", "2d"])
def test_modality_names_reject_reserved_and_invalid_names(name):
    config = quickstart.get_config()
    with config.unlocked():
        for section in (config.data.modalities, config.model.encoders):
            section[name] = section["image"]
            del section["image"]
    with rejects(f"config.data.modalities.{name}", None, says="lowercase"):
        check(config)


def test_encoders_must_match_the_modalities():
    config = quickstart.get_config()
    with config.unlocked():
        del config.model.encoders["text"]
    with rejects("config.model.encoders", None, says="encoders of image, and config.data.modalities has image, text"):
        check(config)


@pytest.mark.parametrize(
    ("changes", "key", "fact"),
    [
        ({"folds": 1}, "folds", "at least 2"),
        ({"folds": 3, "fold": 3}, "fold", "below 3"),
        ({"fold": 1}, "fold", "no effect without"),
        ({"folds": 3, "fold_by": "group"}, "fold_by", "cannot be combined with config.data.folds"),
        ({"fold_by": "group", "time": "date"}, "time", "cannot be combined with config.data.fold_by"),
        ({"folds": 3, "test": "test[:50%]"}, "test", "leave it 'test'"),
        ({"fold_by": "group", "test_fraction": 0.1}, "test_fraction", "tables only"),
        ({"name": "my.csv", "folds": 3, "test_fraction": 0.1}, "test_fraction", "leave it 0.2"),
        ({"time": "date", "valid": "validation", "group": ""}, "valid", "no effect with config.data.time"),
        ({"time": "date"}, "group", "no effect with config.data.time"),
        ({"time": "date", "group": "", "test_fraction": 0.0}, "test_fraction", "above 0"),
        ({"fold_by": "group", "valid": "validation"}, "group", "config.data.valid"),
    ],
)
def test_division_rejects_keys_without_effect(changes, key, fact):
    config = quickstart.get_config()
    for name, value in changes.items():
        tiny.put(config, f"data.{name}", value)
    with rejects(f"config.data.{key}", config.data[key], says=fact):
        check(config)


def test_division_keeps_keys_that_have_an_effect():
    for changes in (
        {"folds": 3, "fold": 2, "valid": "validation"},
        {"fold_by": "group", "fold": 7},
        {"time": "date", "test_fraction": 0.3, "group": ""},
    ):
        config = quickstart.get_config()
        for name, value in changes.items():
            tiny.put(config, f"data.{name}", value)
        check(config)
