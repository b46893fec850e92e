"""Declarations of config keys, and typed dataclasses read from configs."""

import dataclasses

import pytest

from mmfusion import config as configs
from mmfusion.config import keys
from tests import key_reads, tiny
from tests.config.test_schema import SHIPPED


def as_dict(section):
    """Returns a typed section as plain values, like `ConfigDict.to_dict`."""
    if isinstance(section, keys.Choice):
        return {name: as_dict(value) for name, value in section.to_dict().items()}
    if dataclasses.is_dataclass(section):
        return {field.name: as_dict(getattr(section, field.name)) for field in dataclasses.fields(section)}
    return {name: as_dict(value) for name, value in section.items()} if isinstance(section, dict) else section


@pytest.mark.parametrize("name", SHIPPED)
def test_read_keeps_every_value(name):
    config = SHIPPED[name].get_config("objectives=contrastive+modality_dropout")
    assert as_dict(configs.read(config)) == config.to_dict()


def test_read_uses_defaults_for_missing_keys_and_declared_types():
    config = tiny.config(changes={"optim.learning_rate": 1, "model.encoders.image.join": ["other"]})
    with config.unlocked():
        del config.recovery["rollbacks"]
    run = configs.read(config)
    assert run.recovery.rollbacks == 0
    assert repr(run.optim.learning_rate) == "1.0"
    assert run.model.encoders["image"].join == ("other",)
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.steps = 3  # pyright: ignore


def test_read_does_not_modify_the_config():
    config = tiny.config()
    before = config.to_dict()
    configs.read(config).data.modalities["image"].options["augment"]["flip"] = 0.9
    assert config.to_dict() == before


def test_declared_defaults_have_their_type_and_are_allowed():
    for path, field in keys.declared_keys(configs.RunConfig):
        key = keys.key_of(field)
        assert key and key.doc and not key.doc.endswith("."), path
        assert type(field.default).__name__ == getattr(field.type, "__name__", ""), path
        if isinstance(field.default, (int, float)):
            assert key.allows(field.default), path
        assert not key.choices or field.default in key.choices


@pytest.mark.parametrize(
    ("key", "allowed", "valid", "invalid"),
    [
        (keys.Key("", minimum=1), "at least 1", 1, 0),
        (keys.Key("", above=0, maximum=1), "above 0 and at most 1", 1, 0),
        (keys.Key("", minimum=0, below=1), "at least 0 and below 1", 0, 1),
        (keys.Key(""), "", -5, float("nan")),
        (keys.Key(""), "", 0, float("inf")),
    ],
)
def test_key_allows_values_in_its_range(key, allowed, valid, invalid):
    assert key.allowed() == allowed
    assert key.allows(valid) and not key.allows(invalid)


def test_recorded_reads_include_the_typed_config():
    config = tiny.config()
    with key_reads.recorded_reads(config) as read:
        run = configs.read(config)
        assert read == set()
        assert (run.steps, run.parallel.mesh.fsdp, run.optim.options["b1"]) == (8, 1, 0.9)
        assert (run.optim.to_dict()["b2"], run.optim.schedule.options.get("none")) == (0.98, None)
        assert repr(run) and dataclasses.replace(run, seed=1) != run
    assert read == {
        "steps", "parallel", "parallel.mesh", "parallel.mesh.fsdp", "optim", "optim.options", "optim.b1", "optim.b2",
        "optim.schedule", "optim.schedule.options", "optim.schedule.none",
    }  # fmt: skip
    assert configs.read(config).steps == 8 and "__getattribute__" not in vars(configs.RunConfig)
