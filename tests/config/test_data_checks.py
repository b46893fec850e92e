"""Checks of the sections `data` and `model.encoders`."""

import pytest

from configs import quickstart
from mmfusion.config import defaults
from mmfusion.errors import UserError
from tests.config.test_schema import SHIPPED, check, quickstart_with


def test_share_rejects_images_with_different_channels():
    config = SHIPPED["three_images"].get_config().unlock()
    config.model.encoders.colour.share = "gray"
    with pytest.raises(UserError, match="one encoder cannot read channels=3 and channels=1") as error:
        check(config)
    assert (error.value.path, error.value.value) == ("config.model.encoders.colour.share", "gray")
    check(SHIPPED["xray_ct"].get_config("joined=False,shared=True"))
    with pytest.raises(UserError, match="are not joined"):
        SHIPPED["xray_ct"].get_config("shared=True")


@pytest.mark.parametrize(
    ("application", "one", "other", "message"),
    [
        ("recommendation", "text", "behaviour", "each text has a vocabulary of its own"),
        ("interaction", "speech", "second", "one encoder cannot read rate=8000 and rate=16000"),
    ],
)
def test_share_rejects_inputs_with_different_encodings(application, one, other, message):
    config = SHIPPED["applications"].get_config(f"application={application}").unlock()
    if other == "second":
        config.data.modalities.second = config.data.modalities[one].copy_and_resolve_references()
        config.data.modalities.second.rate = 2 * config.data.modalities[one].rate
        config.model.encoders.second = config.model.encoders[one].copy_and_resolve_references()
    config.model.encoders[one].share = other
    with pytest.raises(UserError, match=message) as error:
        check(config)
    assert (error.value.path, error.value.value) == (f"config.model.encoders.{one}.share", other)


def test_layer_decay_requires_sequential_layers():
    config = SHIPPED["xray_ct"].get_config().unlock()
    config.model.encoders.xray.layer_decay = 0.5
    with pytest.raises(UserError, match="the layers of cnn_rnn are not sequential") as error:
        check(config)
    assert (error.value.path, error.value.value) == ("config.model.encoders.xray.layer_decay", 0.5)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("image.layer_decay", 0.0, "must be above 0 and at most 1"),
        ("image.layer_decay", 1.5, "must be above 0 and at most 1"),
        ("image.freeze", -1, "must be at least 0"),
        ("image.share", "text", "one encoder cannot read image and text"),
        ("image.share", "imag", "unknown modality"),
        ("image.share", "image", "unknown modality"),
        ("image.join", (1,), "must be of type tuple, like ()"),
    ],
)
def test_encoder_options_reject_invalid_values(path, value, message):
    with pytest.raises(UserError) as error:
        check(quickstart_with(f"model.encoders.{path}", value))
    assert (error.value.message, error.value.path, error.value.value) == (
        message,
        f"config.model.encoders.{path}",
        value,
    )


def test_join_rejects_modalities_of_different_types():
    with pytest.raises(UserError) as error:
        check(quickstart_with("model.encoders.image.join", ("text",)))
    assert error.value.message == "one encoder cannot read image and text"
    assert (error.value.path, error.value.value) == ("config.model.encoders.image.join", "text")


def test_join_and_share_require_consistent_encoder_sections():
    config = quickstart.get_config()
    with config.unlocked():
        config.data.modalities.second = config.data.modalities.image
        config.model.encoders.image.join = ("second",)
    check(config)
    with config.unlocked():
        config.model.encoders.second = defaults.encoder("image", "cnn")
    with pytest.raises(UserError, match=r"encoders\.second: the encoder of image reads it, too: leave it out here"):
        check(config)
    with config.unlocked():
        config.model.encoders.image.join = ("second", "second")
        del config.model.encoders["second"]
    with pytest.raises(UserError, match="names a modality twice"):
        check(config)
    with config.unlocked():
        config.model.encoders.second = defaults.encoder("image", "cnn_rnn")
        config.model.encoders.image.join = ()
        config.model.encoders.image.share = "second"
    with pytest.raises(
        UserError,
        match="norm=batch keeps one mean and variance for both modalities: set norm=group or layer for second",
    ):
        check(config)
    with config.unlocked():
        config.model.encoders.second = defaults.encoder("image", "cnn")
        config.model.encoders.image.share = "second"
    check(config)
    with config.unlocked():
        config.model.encoders.image.freeze = 3
    with pytest.raises(
        UserError, match=r"encoders\.image: the weights are second's: set init, freeze and layer_decay there"
    ):
        check(config)
    with config.unlocked():
        config.model.encoders.image.freeze = 0
        config.model.encoders.second.share = "image"
    with pytest.raises(UserError, match="shares another's encoder: name 'image'"):
        check(config)


@pytest.mark.parametrize("name", ["joint", "learned", "left_image", "Image", "2d"])
def test_modality_names_reject_reserved_and_invalid_names(name):
    config = quickstart.get_config()
    with config.unlocked():
        for section in (config.data.modalities, config.model.encoders):
            section[name] = section["image"]
            del section["image"]
    with pytest.raises(UserError, match="a modality's name is lowercase letters and digits") as error:
        check(config)
    assert error.value.path == f"config.data.modalities.{name}"


def test_encoders_must_match_the_modalities():
    config = quickstart.get_config()
    with config.unlocked():
        del config.model.encoders["text"]
    with pytest.raises(
        UserError, match=r"has encoders of image, and config\.data\.modalities has image, text: they must"
    ) as error:
        check(config)
    assert error.value.path == "config.model.encoders"
