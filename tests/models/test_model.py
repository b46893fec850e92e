import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from mmfusion.data import image
from mmfusion.data.batch import Batch
from mmfusion.data.preprocess import make_preprocess
from mmfusion.models.build import ENCODER_KWARGS, build, module_options
from mmfusion.models.encoders import ENCODERS
from mmfusion.models.fusion import FUSIONS
from mmfusion.models.layers import masked_mean
from mmfusion.objectives import Task, build_objectives
from mmfusion.objectives.unimodal import UnimodalLoss
from tests.errors import rejects
from tests.models.random_variables import quick_jit, random_variables

RANDOM = np.random.default_rng(0)
SPEC = {"text": {"vocabulary": 7}, "image": {}, "audio": {"rate": 1000}}
TASKS = {"label": 3, "angle": 1}
ENCODER_CONFIGS = {
    "text": {"name": "bow", "tokens": "all"},
    "image": {"name": "cnn", "channels": [4, 4], "strides": (2, 2), "norm": "batch"},
}


def config(fusion, encoders=None, **fusion_options):
    return ml_collections.ConfigDict(
        {"width": 8, "encoders": encoders or ENCODER_CONFIGS, "fusion": {"name": fusion, **fusion_options}}
    )


def make_batch(rows=4):
    token_ids = np.array([[3, 4, 2], [5, 0, 0], [1, 2, 0], [6, 6, 2]], np.int32)[:rows]
    return Batch(
        inputs={"text": token_ids, "image": RANDOM.normal(size=(rows, 8, 8, 1)).astype(np.float32)},
        mask={"text": token_ids > 0, "image": np.ones((rows, 1), bool)},
        present={"text": np.ones(rows, bool), "image": np.ones(rows, bool)},
        targets={},
        weight=np.ones(rows, np.float32),
        id=np.arange(rows, dtype=np.int32),
    )


BATCH = make_batch()


def prepare(fusion, **fusion_options):
    model = build(config(fusion, **fusion_options), SPEC, TASKS)
    return model, random_variables(model, BATCH, train=False)


@pytest.mark.parametrize("fusion", ["co_attention", "late_mean"])
def test_model_satisfies_the_contract(fusion):
    model, variables = prepare(fusion)

    def loss(params, batch):
        outputs, _ = model.apply({**variables, "params": params}, batch, train=True, mutable=["batch_stats"])
        return sum((logits**2).sum() for logits in outputs.logits.values()), outputs

    step = quick_jit(jax.grad(loss, has_aux=True))
    gradient, outputs = step(variables["params"], BATCH)
    assert {task: logits.shape for task, logits in outputs.logits.items()} == {"label": (4, 3), "angle": (4, 1)}
    assert outputs.features.shape == (4, 8)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradient))

    # The stored values of an absent image change neither outputs nor gradients.
    present = {**BATCH.present, "image": np.array([True, True, False, True])}
    results = []
    for content in (np.nan, 0.0, 9.0):
        pixels = BATCH.inputs["image"].copy()
        pixels[2] = content
        results.append(
            step(variables["params"], BATCH.replace(inputs={**BATCH.inputs, "image": pixels}, present=present))
        )
    jax.tree.map(np.testing.assert_array_equal, results[0], results[1])
    jax.tree.map(np.testing.assert_array_equal, results[0], results[2])
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(results[0]))

    # A padding row equals a row without modalities.
    padded = BATCH.replace(weight=np.array([1, 1, 1, 0], np.float32))
    missing = BATCH.replace(present={m: np.array([True, True, True, False]) for m in BATCH.present})
    one, other = step(variables["params"], padded)[1], step(variables["params"], missing)[1]
    jax.tree.map(np.testing.assert_array_equal, one, other)
    if fusion == "late_mean":
        np.testing.assert_array_equal(one.logits["label"][3], 0.0)

    all_absent = BATCH.replace(present={m: np.zeros(4, bool) for m in BATCH.present})
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(step(variables["params"], all_absent)))

    evaluated = jax.eval_shape(lambda v, b: model.apply(v, b, train=False), variables, BATCH)
    jax.tree.map(lambda a, b: np.testing.assert_equal((a.shape, a.dtype), (b.shape, b.dtype)), evaluated, outputs)


@pytest.mark.thorough
def test_model_jit_equals_eager():
    model, variables = prepare("concat")
    eager = model.apply(variables, BATCH, train=False)
    compiled = jax.jit(lambda v, b: model.apply(v, b, train=False))(variables, BATCH)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), eager, compiled)


def test_model_on_two_devices_equals_one_global_batch():
    """The shards have unequal padding; batch normalisation and dropout are enabled."""
    batch = BATCH.replace(weight=np.array([1, 1, 1, 0], np.float32))
    variables = prepare("concat", dropout=0.5)[1]

    def logits(batch, axis_name):
        model = build(config("concat", dropout=0.5), SPEC, TASKS, axis_name=axis_name)
        rows = {"rows": {"id": batch.id}}
        rngs = {"dropout": jax.random.key(3)}
        return model.apply({**variables, **rows}, batch, train=True, mutable=["batch_stats"], rngs=rngs)

    expected, stats = jax.jit(lambda b: logits(b, None))(batch)
    shards = jax.tree.map(lambda a: a.reshape(2, 2, *a.shape[1:]), batch)
    sharded, shard_stats = jax.jit(jax.vmap(lambda b: logits(b, "data"), axis_name="data"))(shards)
    for task in TASKS:
        joined = sharded.logits[task].reshape(expected.logits[task].shape)
        np.testing.assert_allclose(joined[:3], expected.logits[task][:3], atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b, atol=1e-6), shard_stats, stats)
    assert np.abs(expected.logits["label"] - model_without_dropout(variables, batch)).max() > 1e-3


def model_without_dropout(variables, batch):
    model = build(config("concat"), SPEC, TASKS)
    return model.apply(variables, batch, train=True, mutable=["batch_stats"])[0].logits["label"]


def test_model_in_bfloat16_has_float32_params_and_logits():
    model = build(config("co_attention", heads=2), SPEC, TASKS, dtype=jnp.bfloat16)
    shapes = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), BATCH, train=False))
    outputs, variables = shapes
    assert {logits.dtype for logits in outputs.logits.values()} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    text, _ = jax.eval_shape(
        lambda: model.encoders["text"].init_with_output(
            jax.random.key(0), BATCH.inputs["text"], BATCH.mask["text"], train=False
        )
    )[0]
    assert text.dtype == jnp.bfloat16


TWO_IMAGES = {"left": {}, "right": {}}


def make_image_pair(rows=4):
    images = RANDOM.normal(size=(2, rows, 8, 8, 1)).astype(np.float32)
    real = np.ones((rows, 1), bool)
    return Batch(
        inputs=dict(zip(TWO_IMAGES, images, strict=True)),
        mask=dict.fromkeys(TWO_IMAGES, real),
        present=dict.fromkeys(TWO_IMAGES, np.ones(rows, bool)),
        targets={},
        weight=np.ones(rows, np.float32),
        id=np.arange(rows, dtype=np.int32),
    )


PAIR = make_image_pair()
CNN = {"name": "cnn", "channels": (4,), "strides": (4,)}


def test_shared_encoder_has_one_set_of_weights():
    model = build(config("concat", {"left": CNN, "right": {**CNN, "share": "left"}}), TWO_IMAGES, TASKS)
    assert model.modalities == ["left", "right"]
    variables = random_variables(model, PAIR, train=False)
    assert [name for name in variables["params"] if name.startswith("encoders")] == ["encoders_left"]
    both = PAIR.replace(inputs={"left": PAIR.inputs["left"], "right": PAIR.inputs["left"]})
    tokens, _ = model.apply(variables, both, train=False, method="encode")
    np.testing.assert_array_equal(tokens["left"], tokens["right"])
    outputs = quick_jit(lambda b: model.apply(variables, b, train=False))(PAIR)
    assert set(outputs.present) == {"left", "right"}


def test_joined_images_are_channels_of_one_encoder():
    model = build(config("concat", {"left": {**CNN, "join": ("right",)}}), TWO_IMAGES, TASKS)
    assert model.modalities == ["left"]
    variables = random_variables(model, PAIR, train=False)
    assert variables["params"]["encoders_left"]["Conv_0"]["kernel"].shape[2] == 2
    single = build(config("concat", {"left": CNN}), TWO_IMAGES, TASKS)
    stacked = np.concatenate([PAIR.inputs["left"], PAIR.inputs["right"]], axis=-1)
    expected = single.apply(variables, PAIR.replace(inputs={**PAIR.inputs, "left": stacked}), train=False).logits
    jax.tree.map(np.testing.assert_array_equal, model.apply(variables, PAIR, train=False).logits, expected)

    # An absent image is replaced by zeros, whatever its values; without both images there is no token.
    right_present = np.array([True, False, True, False])
    present = {"left": np.array([True, True, False, False]), "right": right_present}
    with_nan = np.where(right_present[:, None, None, None], PAIR.inputs["right"], np.nan)
    incomplete = PAIR.replace(inputs={**PAIR.inputs, "right": with_nan}, present=present)
    tokens, mask = model.apply(variables, incomplete, train=False, method="encode")
    np.testing.assert_array_equal(mask["left"].any(axis=1), [True, True, True, False])
    zeros = [np.where(rows[:, None, None, None], PAIR.inputs[m], 0) for m, rows in present.items()]
    expected_tokens, _ = single.apply(
        variables, PAIR.replace(inputs={"left": np.concatenate(zeros, -1)}), train=False, method="encode"
    )
    np.testing.assert_allclose(tokens["left"][:3], expected_tokens["left"][:3], atol=1e-6)
    np.testing.assert_array_equal(tokens["left"][3], 0)


def test_joined_images_must_have_the_same_size():
    model = build(config("concat", {"left": {**CNN, "join": ("right",)}}), TWO_IMAGES, TASKS)
    other = PAIR.replace(inputs={**PAIR.inputs, "right": np.zeros((4, 8, 4, 1), np.float32)})
    with rejects("config.model.encoders.left.join", None, says="left (8, 8), right (8, 4)"):
        jax.eval_shape(lambda: model.init(jax.random.key(0), other, train=False))


def test_frozen_encoder_runs_in_evaluation_mode():
    encoders = {m: {**CNN, "norm": "batch", "dropout": 0.5} for m in TWO_IMAGES}
    model = build(config("concat", encoders), TWO_IMAGES, TASKS, frozen=["left"])
    variables = random_variables(model, PAIR, train=False)

    tokens, changed = model.apply(
        {**variables, "rows": {"id": PAIR.id}}, PAIR, train=True, mutable=["batch_stats"],
        rngs={"dropout": jax.random.key(0)}, method="encode",
    )  # fmt: skip
    evaluated = model.apply(variables, PAIR, train=False, method="encode")
    equal = {m: np.allclose(tokens[0][m], evaluated[0][m], atol=1e-6) for m in TWO_IMAGES}
    assert equal == {"left": True, "right": False}
    before, after = variables["batch_stats"], changed["batch_stats"]
    jax.tree.map(np.testing.assert_array_equal, after["encoders_left"], before["encoders_left"])
    assert not np.allclose(jax.tree.leaves(after["encoders_right"])[0], jax.tree.leaves(before["encoders_right"])[0])


def test_frozen_encoder_is_frozen_for_every_sharing_modality():
    encoders = {"left": {**CNN, "norm": "batch", "dropout": 0.5}, "right": {**CNN, "share": "left"}}
    model = build(config("concat", encoders), TWO_IMAGES, TASKS, frozen=["left"])
    variables = random_variables(model, PAIR, train=False)
    apply = functools.partial(model.apply, {**variables, "rows": {"id": PAIR.id}}, PAIR, method="encode")
    (tokens, _), changed = apply(train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(0)})
    jax.tree.map(np.testing.assert_array_equal, tokens, apply(train=False)[0])
    jax.tree.map(np.testing.assert_array_equal, changed["batch_stats"], variables["batch_stats"])


def test_joined_images_share_their_augmentation():
    options = {"kind": "image", **image.OPTIONS, "mean": (0.5,), "std": (0.25,)}
    options["augment"] = {**options["augment"], "flip": 0.5, "crop": 2, "rotate": 20.0}
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 1), np.uint8)
    batch = make_image_pair(8).replace(inputs=dict.fromkeys(TWO_IMAGES, pixels))
    for owner, shared in (({"right": "left"}, True), ({}, False)):
        inputs = make_preprocess(dict.fromkeys(TWO_IMAGES, options), owner)(batch, jax.random.key(0)).inputs
        assert np.allclose(inputs["left"], inputs["right"]) == shared
        assert not np.allclose(inputs["left"], (pixels / 255 - 0.5) / 0.25)


@pytest.mark.parametrize("kind", [*ENCODERS.values(), *FUSIONS.values()])
def test_module_options_are_the_configurable_fields(kind):
    found = module_options(kind)
    assert not set(found) & (ENCODER_KWARGS | {"parent", "name"})
    assert dataclasses.MISSING not in found.values(), "an option needs a default"


def test_module_options_have_their_defaults():
    assert module_options(ENCODERS["cnn"])["strides"] == (2, 2, 2)
    assert module_options(FUSIONS["mean"]) == {}


def test_build_passes_encoder_kwargs_to_every_module():
    encoders = {**ENCODER_CONFIGS, "audio": {"name": "logmel_cnn"}}
    model = build(config("gmu", encoders), SPEC, TASKS, axis_name="data")
    assert model.encoders["text"].vocabulary == 7
    assert model.encoders["audio"].rate == 1000
    assert model.encoders["image"].axis_name == "data"
    assert model.encoders["image"].channels == (4, 4)
    hash(model)


@pytest.mark.parametrize(
    ("changes", "path", "value", "suggestion", "fact"),
    [
        ({"encoders": {}}, "encoders", None, "", "empty"),
        ({"encoders": {"video": {"name": "cnn"}}}, "encoders.video", None, "image", ""),
        ({"encoders": {"image": {"name": "cnnn"}}}, "encoders.image.name", "cnnn", "cnn", ""),
        ({"encoders": {"image": {"name": "rnn"}}}, "encoders.image", None, "", "rnn needs vocabulary"),
        ({"encoders": {"image": {"name": "cnn", "norms": "batch"}}}, "encoders.image.norms", None, "norm", ""),
        ({"fusion": {"name": "gnu"}}, "fusion.name", "gnu", "gmu", ""),
        ({"fusion": {"name": "mean", "layers": 2}}, "fusion.layers", None, "", "mean"),
        ({"fusion": {"name": "concat", "width": 2}}, "fusion.width", None, "", "concat"),
    ],
)
def test_build_rejects_invalid_configs(changes, path, value, suggestion, fact):
    with rejects(f"config.model.{path}", value, suggestion, says=fact):
        build({**config("mean").to_dict(), **changes}, SPEC, TASKS)


def test_central_trains_a_head_on_each_branch():
    """The joint loss and the branches' are added; a branch is its two layers alone, in float64."""
    model, variables = prepare("central")
    outputs, caught = model.apply(variables, BATCH, train=False, capture_intermediates=True, mutable=["intermediates"])
    params = jax.tree.map(np.float64, variables["params"])
    encoders = caught["intermediates"]
    for m in ("image", "text"):
        tokens, mask = encoders[f"encoders_{m}"]["__call__"][0]
        hidden = masked_mean(tokens, mask)
        for layer in range(2):
            dense = params["fusion"][f"branch{layer}_{m}"]
            hidden = np.maximum(hidden @ dense["kernel"] + dense["bias"], 0)
        for task in TASKS:
            head = params[f"unimodal_{task}_{m}"]
            np.testing.assert_allclose(outputs.unimodal[task][m], hidden @ head["kernel"] + head["bias"], atol=1e-5)
    tasks = {"label": Task("classification", 3), "angle": Task("regression", 1)}
    for options, expected in (({}, 4), ({"branch_losses": False}, 0)):
        model, _ = prepare("central", **options)
        terms = [term for term in build_objectives(model, tasks).terms if isinstance(term, UnimodalLoss)]
        assert [term.weight for term in terms] == [1.0] * expected and not any(term.probe for term in terms)
    with_probes = model.clone(unimodal="probes", fusion=FUSIONS["central"](width=8))
    assert not with_probes.uses_probes  # the branches' heads are scored
