"""An out-of-tree encoder and fusion strategy, as in the READMEs."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

import mmfusion.models
from experiments import cli
from mmfusion import config as configs
from mmfusion.models.build import module_options
from mmfusion.models.encoders import ENCODERS
from mmfusion.models.fusion import FUSIONS
from mmfusion.optim import layerwise_lr_decay
from mmfusion.registry import lookup
from mmfusion.training.loop import train
from mmfusion.training.restore import read_config
from tests.errors import rejects

FOLDER = Path(mmfusion.models.__path__[0])
READMES = {name: (FOLDER / name / "README.md").read_text(encoding="utf-8") for name in ("encoders", "fusion")}
ENCODER = "extension.encoders:PixelRows"
REGISTRIES = {"encoders": ENCODERS, "fusion": FUSIONS}


@pytest.fixture(scope="module", autouse=True)
def extension_package(tmp_path_factory):
    """Installs the package `extension` with the modules `encoders` and `fusion` of the READMEs."""
    package = tmp_path_factory.mktemp("path") / "extension"
    package.mkdir()
    for name, page in READMES.items():
        (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
        assert len(example.splitlines()) <= 25
        (package / f"{name}.py").write_text(example)
    (package / "broken.py").write_text("import nothing_of_that_name")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(package.parent)
        yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "extension"]:
        sys.modules.pop(name)


@pytest.fixture
def config(tiny_config):
    config = tiny_config("fusion=extension.fusion:GatedProduct", {"steps": 2, "eval_every": 2, "checkpoint_every": 2})
    configs.choose(config, "model.encoders.image", ENCODER)
    return config


@pytest.mark.parametrize("name", READMES)
def test_readme_tables_contain_every_class(name):
    missing = [key for key in REGISTRIES[name] if f"`{key}`" not in READMES[name]]
    assert missing == []


def test_readme_options_exist_in_their_strategies():
    table = READMES["fusion"].partition("| option |")[2].partition("\n\n")[0]
    rows = [line.split("|")[1:3] for line in table.splitlines()[2:]]
    assert len(rows) > 10
    for options, strategies in rows:
        for strategy in re.findall(r"`(\w+)`", re.sub(r"\(.*?\)", "", strategies)):
            existing = module_options(FUSIONS[strategy])
            assert any(option in existing for option in re.findall(r"`(\w+)`", options)), (strategy, options)


@pytest.mark.loop
def test_out_of_tree_classes_can_be_trained(config, tmp_path):
    with config.unlocked():
        config.model.encoders.image.hidden = 8
    configs.check(config, devices=1)
    result = train(config, tmp_path)
    assert np.isfinite(result["test"]["loss"])
    assert read_config(tmp_path) == config


def test_out_of_tree_encoder_has_a_layer_order(config):
    config.model.encoders.image.layer_decay = 0.5
    configs.check(config, devices=1)
    updates = {"encoders_image": {"rows": np.ones(2), "project": np.ones(2), "norm": np.ones(2)}}
    transformation = layerwise_lr_decay(config.model.encoders)
    scaled = transformation.update(updates, transformation.init(updates))[0]["encoders_image"]
    assert {layer: float(x[0]) for layer, x in scaled.items()} == {"rows": 0.5, "project": 1.0, "norm": 1.0}


@pytest.mark.parametrize(
    ("path", "name", "suggestion", "fact"),
    [
        ("model.fusion", "extension.fusion:Gated", "extension.fusion:GatedProduct", ""),
        ("model.fusion", "extension.none:GatedProduct", "", "extension.none"),
        ("model.fusion", "extension.broken:GatedProduct", "", "nothing_of_that_name"),
        ("model.fusion", "gum", "gmu", ""),
        ("model.fusion", "extension.encoders:PixelRows", "", "`declares`"),
        ("model.encoders.image", "extension.fusion:GatedProduct", "", "`reads`"),
        ("model.encoders.image", "pathlib:Path", "", "`reads`"),
    ],
)
def test_lookup_rejects_unknown_names(config, path, name, suggestion, fact):
    with rejects(f"config.{path}.name", name, suggestion, says=fact):
        configs.choose(config, path, name)


def test_out_of_tree_encoder_must_read_its_modality(config):
    configs.choose(config, "model.encoders.text", "extension.encoders:PixelRows")
    with rejects("config.model.encoders.text.name", "extension.encoders:PixelRows", says="text"):
        configs.check(config, devices=1)


def test_config_arguments_and_flags_accept_out_of_tree_classes():
    name = "extension.fusion:GatedProduct"
    config = cli.make_config(f"configs/quickstart.py:fusion={name}", [f"--config.model.encoders.image.name={ENCODER}"])
    assert (config.model.fusion.name, config.model.encoders.image.name) == (name, ENCODER)


def test_lookup_returns_registered_classes():
    assert lookup(FUSIONS, "gmu", "--fusions") is FUSIONS["gmu"]
