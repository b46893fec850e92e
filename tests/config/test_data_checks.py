"""What a config may say of its data, and which encoder may read what."""

import pytest

from configs import quickstart
from mmfusion.config import defaults
from mmfusion.errors import UserError
from tests.config.test_schema import SHIPPED, changed, check


def test_one_encoder_reads_pictures_of_one_form():
    config = SHIPPED["three_images"].get_config().unlock()
    config.model.encoders.colour.share = "gray"
    with pytest.raises(UserError, match=r"share='gray': one encoder cannot read a channels of 3 and of 1"):
        check(config)
    check(SHIPPED["xray_ct"].get_config("joined=False,shared=True"))
    with pytest.raises(UserError, match="are not joined"):
        SHIPPED["xray_ct"].get_config("shared=True")


@pytest.mark.parametrize(
    ("application", "one", "other", "says"),
    [
        ("recommendation", "text", "behaviour", "each text learns its own word vocabulary"),
        ("interaction", "speech", "second", "one encoder cannot read a rate of 8000 and of 16000"),
    ],
)
def test_one_encoder_reads_what_means_the_same(application, one, other, says):
    config = SHIPPED["applications"].get_config(f"application={application}").unlock()
    if other == "second":
        config.data.modalities.second = config.data.modalities[one].copy_and_resolve_references()
        config.data.modalities.second.rate = 2 * config.data.modalities[one].rate
        config.model.encoders.second = config.model.encoders[one].copy_and_resolve_references()
    config.model.encoders[one].share = other
    with pytest.raises(UserError, match=says):
        check(config)


def test_layers_in_no_order_have_no_decay():
    config = SHIPPED["xray_ct"].get_config().unlock()
    config.model.encoders.xray.layer_decay = 0.5
    with pytest.raises(UserError, match=r"xray\.layer_decay: the layers of cnn_rnn are not sequential"):
        check(config)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("image.layer_decay", 0.0, r"image\.layer_decay=0\.0 must be above 0 and at most 1"),
        ("image.layer_decay", 1.5, r"image\.layer_decay=1\.5 must be above 0 and at most 1"),
        ("image.freeze", -1, r"image\.freeze=-1 must be .*not negative"),
        ("image.share", "text", r"image\.share='text': one encoder cannot read image and text together"),
        ("image.share", "imag", r"image\.share='imag' is unknown"),
        ("image.share", "image", r"image\.share='image' is unknown"),
        ("image.join", ("text",), r"image\.join='text': one encoder cannot read image and text together"),
        ("image.join", (1,), r"image\.join=\(1,\) must be of type tuple"),
    ],
)
def test_what_encoders_cannot_do_together(path, value, says):
    with pytest.raises(UserError, match=says):
        check(changed(f"model.encoders.{path}", value))


def test_what_is_joined_or_shared_needs_an_encoder_of_its_own_or_none():
    config = quickstart.get_config()
    with config.unlocked():
        config.data.modalities.second = config.data.modalities.image
        config.model.encoders.image.join = ("second",)
    check(config)
    with config.unlocked():
        config.model.encoders.second = defaults.encoder("image", "cnn")
    with pytest.raises(UserError, match=r"encoders\.second is read by the encoder of image: leave it out here"):
        check(config)
    with config.unlocked():
        config.model.encoders.image.join = ("second", "second")
        del config.model.encoders["second"]
    with pytest.raises(UserError, match="names one modality twice"):
        check(config)
    with config.unlocked():
        config.model.encoders.second = defaults.encoder("image", "cnn_rnn")
        config.model.encoders.image.join = ()
        config.model.encoders.image.share = "second"
    with pytest.raises(UserError, match="norm=batch keeps one mean and variance for both: choose group or layer"):
        check(config)
    with config.unlocked():
        config.model.encoders.second = defaults.encoder("image", "cnn")
        config.model.encoders.image.share = "second"
    check(config)
    with config.unlocked():
        config.model.encoders.image.freeze = 3
    with pytest.raises(UserError, match="image has second's weights: set init, freeze and layer_decay there"):
        check(config)
    with config.unlocked():
        config.model.encoders.image.freeze = 0
        config.model.encoders.second.share = "image"
    with pytest.raises(UserError, match="shares another's"):
        check(config)


@pytest.mark.parametrize("name", ["joint", "learned", "left_image", "Image", "2d"])
def test_names_of_modalities_that_strategies_could_take_for_others_are_refused(name):
    config = quickstart.get_config()
    with config.unlocked():
        for section in (config.data.modalities, config.model.encoders):
            section[name] = section["image"]
            del section["image"]
    with pytest.raises(UserError, match=rf"config\.data\.modalities\.{name}: a modality's name is small letters"):
        check(config)


def test_encoders_and_modalities_must_be_the_same():
    config = quickstart.get_config()
    with config.unlocked():
        del config.model.encoders["text"]
    with pytest.raises(UserError, match=r"modalities has image, text, config\.model\.encoders has image: they must"):
        check(config)
