"""Encoders that begin at weights of a file or of another run, and that are frozen for some steps or for all."""

import functools
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from mmfusion.config import defaults
from mmfusion.errors import UserError
from mmfusion.models.pretrained import weights
from mmfusion.training.loop import train
from mmfusion.training.restore import open_run
from tests import planted, tiny
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
def test_an_encoder_begins_at_another_runs_and_stays_where_it_is_frozen(rows, tmp_path):
    train(config(), tmp_path / "first")
    begun = encoder_of(tmp_path / "first")
    frozen = {
        "model__encoders__image__init": f"run:{tmp_path / 'first'}",
        "model__encoders__image__freeze": 2,  # as many as the run has steps
        "seed": 5,
    }
    train(config(**frozen), tmp_path / "frozen")
    jax.tree.map(np.testing.assert_array_equal, encoder_of(tmp_path / "frozen"), begun)
    assert not np.allclose(
        encoder_of(tmp_path / "frozen", "text")["embed"]["embedding"],
        encoder_of(tmp_path / "first", "text")["embed"]["embedding"],
    )

    train(config(**{**frozen, "model__encoders__image__freeze": 1}), tmp_path / "thawed")
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), encoder_of(tmp_path / "thawed"), begun)
    assert all(0 < leaf < 0.01 for leaf in jax.tree.leaves(moved))


@pytest.mark.loop
@pytest.mark.parametrize("fusion", ["late_mean", pytest.param("concat", marks=pytest.mark.thorough)])
def test_independent_then_fused(rows, tmp_path, fusion):
    """Encoders, and of decisions the heads, begin as each modality's own run left them; the encoders stay."""
    for modality in ("image", "text"):
        alone = planted.config(modality)
        with alone.unlocked():
            alone.model.fusion = defaults.fusion(fusion)
        train(alone, tmp_path / "runs" / modality)
    fused = config(**{f"model__encoders__{m}__init": f"run:{tmp_path}/runs/{m}" for m in ("image", "text")})
    with fused.unlocked():
        fused.model.fusion = defaults.fusion(fusion)
        for section in fused.model.encoders.values():
            section.freeze = 10**9
        fused.steps = fused.eval_every = 1
        fused.optim.learning_rate = 1e-12  # so that the heads are seen where they begin
    train(fused, tmp_path / "fused")
    params = open_run(tmp_path / "fused", []).state.params
    for modality in ("image", "text"):
        own = open_run(tmp_path / "runs" / modality, []).state.params
        same = functools.partial(jax.tree.map, functools.partial(np.testing.assert_allclose, atol=1e-6))
        same(params[f"encoders_{modality}"], own[f"encoders_{modality}"])
        if fusion == "late_mean":
            same(params[f"heads_label_{modality}"], own[f"heads_label_{modality}"])


@pytest.mark.loop
def test_numbers_of_another_vocabulary_are_told(rows, tmp_path, monkeypatch):
    train(config(), tmp_path / "first")
    others = [planted.row(i, text=f"zebra {i} colour{i % 7}") for i in range(40)]
    planted.plant(monkeypatch, train=others, test=others[:10])
    with pytest.raises(UserError, match="'text' has another vocabulary, whose numbers mean other things"):
        train(config(model__encoders__text__init=f"run:{tmp_path / 'first'}"), tmp_path / "second")
    train(config(model__encoders__image__init=f"run:{tmp_path / 'first'}"), tmp_path / "third")


@pytest.mark.loop
def test_a_run_whose_encoder_has_other_layers_is_told(rows, tmp_path):
    train(config(), tmp_path / "first")
    other = {"model__encoders__image__init": f"run:{tmp_path / 'first'}", "model__encoders__image__channels": (8,)}
    with pytest.raises(UserError, match="has other layers"):
        train(config(**other), tmp_path / "second")
    text = {"model__encoders__text__init": f"run:{tmp_path / 'nothing'}"}
    with pytest.raises(UserError, match="is no run directory"):
        train(config(**text), tmp_path / "third")
    assert not list((tmp_path / "third").glob("checkpoints/*"))


@pytest.mark.loop
def test_published_weights_are_where_a_run_begins(rows, tmp_path, capsys):
    save_file(tensors_of("vit-timm"), tmp_path / "vit.safetensors")
    with (start := config()).unlocked():
        options = {"patch": 4, "layers": 2, "hidden": 8, "heads": 2}
        file = str(tmp_path / "vit.safetensors")
        start.model.encoders.image = defaults.encoder("image", "vit_ti", init=file, freeze=2, **options)
    train(start, tmp_path / "run")
    said = "".join(capsys.readouterr().out.split())  # lines are folded, and words with them
    assert "initimage:" in said
    assert "notused:head.bias,head.weight" in said
    found = encoder_of(tmp_path / "run")
    np.testing.assert_array_equal(
        found["patches"]["kernel"], tensors_of("vit-timm")["patch_embed.proj.weight"].transpose(2, 3, 1, 0)
    )
    assert found["positions"].shape == (5, 8)  # of a picture of 8 by 8, resized
    tiny.put(start, "steps", 1)
    tiny.put(start, "eval_every", 1)
    train(start, tmp_path / "shorter")
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), found, encoder_of(tmp_path / "shorter"))
    learning = {layer for layer, leaves in moved.items() if any(jax.tree.leaves(leaves))}
    assert learning == {"project", "norm"}  # which no publication has

    with start.unlocked():
        tiny.put(start, "model.encoders.image.hidden", 16)
    with pytest.raises(UserError, match="does not fit"):
        train(start, tmp_path / "wrong")


@pytest.mark.loop
def test_weights_are_read_once_and_a_run_goes_on_without_them(rows, tmp_path, monkeypatch):
    save_file(tensors_of("vit-timm"), tmp_path / "vit.safetensors")
    with (start := config()).unlocked():
        options = {"patch": 4, "layers": 2, "hidden": 8, "heads": 2}
        start.model.encoders.image = defaults.encoder(
            "image", "vit_ti", init=str(tmp_path / "vit.safetensors"), **options
        )
    train(start, tmp_path / "run")
    (tmp_path / "vit.safetensors").unlink()
    monkeypatch.setattr(weights, "read", None)
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == train(start, tmp_path / "run")
    open_run(tmp_path / "run", [])
