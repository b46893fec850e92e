"""Features of frozen encoders, computed once instead of in each step."""

import json

import flax.core
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from mmfusion import config as configs
from mmfusion.analysis.probing.probe import probe_run
from mmfusion.config import defaults
from mmfusion.data.batch import Batch
from mmfusion.models.encoders.images import PerImage
from mmfusion.models.fusion import FUSIONS
from mmfusion.models.model import FusionModel
from mmfusion.models.pretrained.learning_layers import compute_features, learning_layers, without_learning
from mmfusion.optim import freezing
from mmfusion.training import frozen_encoder, frozen_features
from mmfusion.training.loop import train
from mmfusion.training.restore import open_run
from mmfusion.training.setup import make_optimizer, preprocessing
from tests import planted, tiny
from tests.errors import rejects
from tests.models.test_pretrained import CASES, encoder_of, inputs_of, load, tensors_of

pytestmark = pytest.mark.usefixtures("traced_once")

KEPT = ("vgg-timm-False", "convnext-timm-False", "vit-timm-False", "bert-transformers-all-False", "vit-timm-True")
VIT = {"patch": 4, "layers": 2, "hidden": 8, "heads": 2}


@pytest.fixture
def table(tmp_path):
    """A table of 60 rows with an image and a text, some without one."""
    folder = tmp_path / "data"
    folder.mkdir()
    lines = []
    for i in range(60):
        (folder / f"{i}.png").write_bytes(planted.png(4 * i))
        lines.append({"image": None if i % 7 == 3 else f"{i}.png", "text": f"row {i % 9}", "label": f"c{i % 2}"})
    path = folder / "table.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture
def config(table, tmp_path):
    """`config(**changes)`: a published vision transformer, frozen, and a text encoder that learns."""
    save_file(tensors_of("vit-timm"), tmp_path / "vit.safetensors")

    def make(**changes):
        result = planted.config("image+text", data__name=str(table), data__cache=str(tmp_path / "cache"))
        with result.unlocked():
            source = str(tmp_path / "vit.safetensors")
            result.model.encoders.image = defaults.encoder("image", "vit_ti", init=source, freeze=4, **VIT)
        for path, value in {"steps": 4, "optim.name": "sgd", **changes}.items():
            if path == "optim.name":
                with result.unlocked():
                    result.optim = defaults.optimizer(value, 0.1)
            else:
                tiny.put(result, path.replace("__", "."), value)
        return result.lock()

    return make


def losses(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if "loss" in k or "grad" in k or "ids" in k} for line in lines]


def assert_same_run(first, second):
    assert losses(first) == losses(second)
    states = [jax.device_get(open_run(workdir, []).state) for workdir in (first, second)]
    jax.tree.map(np.testing.assert_array_equal, *states)
    results = [json.loads((workdir / "result.json").read_text()) for workdir in (first, second)]
    assert results[0]["test"] == results[1]["test"]


@pytest.mark.unit
@pytest.mark.thorough(but=KEPT)
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_learning_layers_on_features_equal_the_encoder(case, whole):
    encoder, loaded = load(case)
    encoder, (x, mask) = encoder_of(case), (np.concatenate([one, one]) for one in inputs_of(case))
    present = np.arange(len(x)) > 0  # the first row lacks it
    names = {"inputs": {"m": x}, "mask": {"m": mask}, "present": {"m": present}, "targets": {}}
    batch = Batch(**names, weight=np.ones(len(x), np.float32), id=np.arange(len(x), dtype=np.int32))
    variables = {"params": {"encoders_m": loaded.params}, "batch_stats": {"encoders_m": loaded.batch_stats}}
    layers = learning_layers(encoder, loaded.params, whole)
    model, reading = (
        FusionModel(flax.core.FrozenDict({"m": one}), FUSIONS["mean"](encoder.width), ()) for one in (encoder, layers)
    )
    expected = model.apply(variables, batch, train=False, method="encode")
    features, features_mask = compute_features(model, variables, batch, "m", layers.layer)
    read = batch.replace(inputs={"m": features}, mask={"m": features_mask})
    found = reading.apply(variables, read, train=False, method="encode")
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    if not whole:
        frozen = {**variables, "params": {"encoders_m": without_learning(loaded.params)}}
        again = compute_features(model, frozen, batch, "m", layers.layer)
        jax.tree.map(np.testing.assert_array_equal, again, (features, features_mask))
    assert not found[1]["m"][0].any() and found[1]["m"][1:].any(axis=1).all()


@pytest.mark.loop
def test_frozen_features_give_the_same_run_to_the_bit(config, tmp_path, capsys, monkeypatch):
    train(config(data__cache="off"), tmp_path / "plain")
    train(config(), tmp_path / "first")
    output = " ".join(capsys.readouterr().out.split())
    assert "encoding 60 rows of image" in output and "data image: features of its frozen encoder, 5×8 a row" in output
    assert_same_run(tmp_path / "plain", tmp_path / "first")
    monkeypatch.setattr(frozen_features.Encoder, "chunks", None)  # the second run computes nothing
    train(config(), tmp_path / "second")
    assert_same_run(tmp_path / "plain", tmp_path / "second")


@pytest.mark.loop
def test_frozen_features_depend_on_which_rows_lack_the_modality(config, tmp_path):
    missing = {"data__missing": 0.6, "data__allow_leakage": True}
    train(config(**missing), tmp_path / "both")
    for name, cache in (("plain", "off"), ("cached", str(tmp_path / "cache"))):
        alone = config(**missing, data__cache=cache).unlock()
        defaults.keep_modalities(alone, "image")  # which no row loses then
        train(alone.lock(), tmp_path / name)
    assert_same_run(tmp_path / "plain", tmp_path / "cached")


@pytest.mark.unit
def test_updates_of_what_never_learns_are_zero_for_any_gradient(config):
    run = configs.read(config(**{"optim.name": "adam"}))
    optimizer = make_optimizer(run, freezing.make(run.model.encoders, run.steps))
    params = {"encoders_image": {"patches": np.ones((2, 2)), "project": np.ones((2, 2))}, "fusion": np.ones(2)}
    updates, _ = optimizer.update(params, optimizer.init(params), params, step=0)
    assert not updates["encoders_image"]["patches"].any()
    assert updates["encoders_image"]["project"].all() and updates["fusion"].all()


@pytest.mark.unit
def test_layers_of_a_wholly_frozen_encoder_of_several_images_are_none():
    encoder, loaded = load("vit-timm")
    assert learning_layers(PerImage(encoder), loaded.params, True).layer == ""


@pytest.mark.loop
def test_frozen_features_of_another_run_are_its_tokens(config, tmp_path):
    train(config(), tmp_path / "other")
    other = {"model__encoders__image__init": f"run:{tmp_path / 'other'}", "seed": 3}
    train(config(data__cache="off", **other), tmp_path / "plain")
    train(config(**other), tmp_path / "cached")
    assert_same_run(tmp_path / "plain", tmp_path / "cached")


@pytest.mark.thorough
@pytest.mark.loop
def test_probe_reads_frozen_features_also_of_corrupted_rows(config, tmp_path, monkeypatch):
    probed = []
    for name, changes in (("plain", {"data__cache": "off"}), ("first", {}), ("second", {})):
        train(config(**changes), tmp_path / name)
        if name == "second":
            monkeypatch.setattr(frozen_features.Encoder, "chunks", None)  # all is kept
        probed.append(probe_run(tmp_path / name))
        flops = probed[-1].pop("cost")["flops"]
        probed[-1]["cost"] = flops
    plain, first, second = probed
    assert str(first) == str(second)  # NaN equals itself
    assert first.pop("cost") < plain.pop("cost") / 2
    assert str(first) == str(plain)
    assert len(first["corruption"]["image"]) > 1


@pytest.mark.loop
def test_frozen_features_are_shared_by_runs_of_one_modality_and_of_other_encoders(config, tmp_path, monkeypatch):
    train(config(), tmp_path / "first")
    monkeypatch.setattr(frozen_features.Encoder, "chunks", None)
    train(config(model__encoders__text__dropout=0.1, seed=5), tmp_path / "other")  # the same rows, another model
    alone = config().unlock()
    defaults.keep_modalities(alone, "image")
    alone.data.allow_leakage = True
    train(alone.lock(), tmp_path / "alone")
    with pytest.raises(TypeError):  # other weights have other features
        tensors = {name: tensor + 0.01 for name, tensor in tensors_of("vit-timm").items()}
        save_file(tensors, tmp_path / "vit.safetensors")
        train(config(), tmp_path / "changed")


@pytest.mark.loop
def test_frozen_features_resume_where_a_process_was_killed(config, tmp_path, monkeypatch):
    monkeypatch.setattr(frozen_encoder, "CHUNK_BYTES", 1)  # a chunk for each batch of 8 rows
    calls, original = [], frozen_features.Encoder.chunks

    def chunks(self, split, first, last, views):
        if len(calls) == 3:
            raise RuntimeError("killed")
        calls.append((split.name, first))
        return original(self, split, first, last, views)

    monkeypatch.setattr(frozen_features.Encoder, "chunks", chunks)
    with pytest.raises(RuntimeError, match="killed"):
        train(config(), tmp_path / "run")
    done, left = list(calls), []
    monkeypatch.setattr(
        frozen_features.Encoder, "chunks", lambda *args: (left.append((args[1].name, args[2])), original(*args))[1]
    )
    train(config(), tmp_path / "run")
    assert not {*done} & {*left} and len(done) + len(left) == 5 + 2 + 2  # of 34, 14 and 12 rows
    train(config(data__cache="off"), tmp_path / "plain")
    assert_same_run(tmp_path / "plain", tmp_path / "run")


@pytest.mark.loop
@pytest.mark.parametrize("augmented", [False, True])
def test_frozen_features_of_smaller_dtypes_and_of_augmented_views(config, tmp_path, monkeypatch, augmented):
    kept, original = {}, frozen_features._arrays

    def arrays(*args):
        found = original(*args)
        kept.update(found[0])
        return found

    monkeypatch.setattr(frozen_features, "_arrays", arrays)
    views = {"data__cache_views": 3, "data__modalities__image__augment__brightness": 0.5} if augmented else {}
    train(config(data__cache_dtype="bfloat16", **views), tmp_path / "run")
    features, _ = kept["train"]
    assert features.dtype.name == "bfloat16" and features.shape == (34, 4 if augmented else 1, 5, 8)
    assert kept["test"][0].shape == (12, 1, 5, 8)  # rows are augmented in training only
    if augmented:
        assert (features[:, 1] != features[:, 2]).any(axis=(1, 2)).sum() > 20
        positions = np.arange(8)
        batch = Batch({"image": features[:8], "text": np.zeros((8, 6), np.int32)}, {}, {}, {}, np.ones(8), positions)
        pick = preprocessing(open_run(tmp_path / "run", []).config, ("image",))
        drawn = [np.asarray(pick(batch, jax.random.key(k)).inputs["image"]) for k in range(20)]
        views_of = [
            [int(np.flatnonzero((features[i] == one[i]).all(axis=(1, 2)))[-1]) for i in range(8)] for one in drawn
        ]
        assert {1, 2, 3} == {view for row in views_of for view in row}


@pytest.mark.loop
@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"data__modalities__image__augment__brightness": 0.5}, "its inputs are augmented"),
        ({"data__memory_gb": 0.0}, "rows are streamed"),
        ({"data__cache": "off"}, "config.data.cache is 'off'"),
    ],
)
def test_frozen_encoder_runs_in_each_step_where_features_would_differ(config, tmp_path, capsys, changes, reason):
    train(config(**changes), tmp_path / "run")
    output = " ".join(capsys.readouterr().out.split())
    assert f"data image: encoded in each step, as its features are not kept: {reason}" in output
    with rejects("config.data.cache_dtype", "float16", says="cannot be kept"):
        train(config(data__cache_dtype="float16", **changes), tmp_path / "other")


@pytest.mark.loop
def test_parameters_that_never_learn_have_no_moments(config, tmp_path):
    train(config(**{"optim.name": "adam", "steps": 4}), tmp_path / "run")
    state = open_run(tmp_path / "run", []).state
    moments = {path[-2:] for path in map(_names, jax.tree_util.tree_leaves_with_path(state.opt_state))}
    assert ("project", "kernel") in moments and ("patches", "kernel") not in moments
    assert "patches" in state.params["encoders_image"]


def _names(item):
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in item[0])
