"""Encoders initialised from a weights file or another run, and frozen for some or all steps."""

import functools
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from mmfusion.config import defaults
from mmfusion.models.pretrained import weights
from mmfusion.training.loop import train
from mmfusion.training.restore import open_run
from tests import planted, tiny
from tests.errors import rejects
from tests.models.test_pretrained import tensors_of

pytestmark = pytest.mark.usefixtures("traced_once")


@pytest.fixture
def rows(monkeypatch):
    planted.plant(monkeypatch, train=[planted.row(i) for i in range(40)], test=[planted.row(i) for i in range(10)])


def config(**changes):
    return planted.config("image+text", **changes)


def encoder_of(workdir, modality="image"):
    return jax.device_get(open_run(workdir, []).state.params[f"encoders_{modality}"])


@pytest.mark.loop
def test_warm_start_from_a_run_keeps_a_frozen_encoder(rows, tmp_path):
    train(config(), tmp_path / "first")
    initial = encoder_of(tmp_path / "first")
    frozen = {
        "model__encoders__image__init": f"run:{tmp_path / 'first'}",
        "model__encoders__image__freeze": 2,  # equals the run's steps
        "seed": 5,
    }
    train(config(**frozen), tmp_path / "frozen")
    jax.tree.map(np.testing.assert_array_equal, encoder_of(tmp_path / "frozen"), initial)
    assert not np.allclose(
        encoder_of(tmp_path / "frozen", "text")["embed"]["embedding"],
        encoder_of(tmp_path / "first", "text")["embed"]["embedding"],
    )

    train(config(**{**frozen, "model__encoders__image__freeze": 1}), tmp_path / "unfrozen")
    changes = jax.tree.map(lambda a, b: np.abs(a - b).max(), encoder_of(tmp_path / "unfrozen"), initial)
    assert all(0 < leaf < 0.01 for leaf in jax.tree.leaves(changes))


@pytest.mark.loop
@pytest.mark.parametrize("fusion", ["late_mean", pytest.param("concat", marks=pytest.mark.thorough)])
def test_warm_start_from_unimodal_runs_copies_encoders_and_heads(rows, tmp_path, fusion):
    """Encoders, and heads under decision-level fusion, are initialised from the unimodal runs; encoders are frozen."""
    for modality in ("image", "text"):
        unimodal = planted.config(modality)
        with unimodal.unlocked():
            unimodal.model.fusion = defaults.fusion(fusion)
        train(unimodal, tmp_path / "runs" / modality)
    fused = config(**{f"model__encoders__{m}__init": f"run:{tmp_path}/runs/{m}" for m in ("image", "text")})
    with fused.unlocked():
        fused.model.fusion = defaults.fusion(fusion)
        for section in fused.model.encoders.values():
            section.freeze = 10**9
        fused.steps = fused.eval_every = 1
        fused.optim.learning_rate = 1e-12  # so that the heads keep their initial values
    train(fused, tmp_path / "fused")
    params = open_run(tmp_path / "fused", []).state.params
    for modality in ("image", "text"):
        expected = open_run(tmp_path / "runs" / modality, []).state.params
        assert_close = functools.partial(jax.tree.map, functools.partial(np.testing.assert_allclose, atol=1e-6))
        assert_close(params[f"encoders_{modality}"], expected[f"encoders_{modality}"])
        if fusion == "late_mean":
            assert_close(params[f"heads_label_{modality}"], expected[f"heads_label_{modality}"])


@pytest.mark.loop
def test_warm_start_rejects_another_vocabulary(rows, tmp_path, monkeypatch):
    train(config(), tmp_path / "first")
    others = [planted.row(i, text=f"zebra {i} colour{i % 7}") for i in range(40)]
    planted.plant(monkeypatch, train=others, test=others[:10])
    with rejects("config.model.encoders.text.init", f"run:{tmp_path / 'first'}", says="another vocabulary"):
        train(config(model__encoders__text__init=f"run:{tmp_path / 'first'}"), tmp_path / "second")
    train(config(model__encoders__image__init=f"run:{tmp_path / 'first'}"), tmp_path / "third")


@pytest.mark.loop
def test_warm_start_rejects_other_layers_and_missing_runs(rows, tmp_path):
    train(config(), tmp_path / "first")
    other = {"model__encoders__image__init": f"run:{tmp_path / 'first'}", "model__encoders__image__channels": (8,)}
    with rejects("config.model.encoders.image.init", f"run:{tmp_path / 'first'}", says="other layers"):
        train(config(**other), tmp_path / "second")
    for init in (f"run:{tmp_path / 'nothing'}", "run:", "../nothing", "nothing.safetensors"):
        with rejects("config.model.encoders.text.init", init):
            train(config(model__encoders__text__init=init), tmp_path / "third")
        assert not (tmp_path / "third").exists()  # so that it may be corrected


@pytest.mark.loop
def test_warm_start_loads_published_weights(rows, tmp_path, capsys):
    save_file(tensors_of("vit-timm"), tmp_path / "vit.safetensors")
    with (run_config := config()).unlocked():
        options = {"patch": 4, "layers": 2, "hidden": 8, "heads": 2}
        file = str(tmp_path / "vit.safetensors")
        run_config.model.encoders.image = defaults.encoder("image", "vit_ti", init=file, freeze=2, **options)
    train(run_config, tmp_path / "run")
    output = "".join(capsys.readouterr().out.split())  # without line breaks, which may split words
    assert "initimage:" in output
    assert "notused:head.bias,head.weight" in output
    encoder = encoder_of(tmp_path / "run")
    np.testing.assert_array_equal(
        encoder["patches"]["kernel"], tensors_of("vit-timm")["patch_embed.proj.weight"].transpose(2, 3, 1, 0)
    )
    assert encoder["positions"].shape == (5, 8)  # resized to an 8 × 8 image
    tiny.put(run_config, "steps", 1)
    tiny.put(run_config, "eval_every", 1)
    train(run_config, tmp_path / "shorter")
    changes = jax.tree.map(lambda a, b: bool((a != b).any()), encoder, encoder_of(tmp_path / "shorter"))
    trained = {layer for layer, leaves in changes.items() if any(jax.tree.leaves(leaves))}
    assert trained == {"project", "norm"}  # layers without published weights

    with run_config.unlocked():
        tiny.put(run_config, "model.encoders.image.hidden", 16)
    with rejects("init", file, says="does not fit"):
        train(run_config, tmp_path / "invalid")


@pytest.mark.thorough
@pytest.mark.loop
def test_warm_start_reads_weights_once_and_resumes_without_them(rows, tmp_path, monkeypatch):
    save_file(tensors_of("vit-timm"), tmp_path / "vit.safetensors")
    with (run_config := config()).unlocked():
        options = {"patch": 4, "layers": 2, "hidden": 8, "heads": 2}
        run_config.model.encoders.image = defaults.encoder(
            "image", "vit_ti", init=str(tmp_path / "vit.safetensors"), **options
        )
    train(run_config, tmp_path / "run")
    (tmp_path / "vit.safetensors").unlink()
    monkeypatch.setattr(weights, "read", None)
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == train(run_config, tmp_path / "run")
    open_run(tmp_path / "run", [])
