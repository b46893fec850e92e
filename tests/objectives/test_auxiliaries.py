"""Auxiliary objectives in training: logged losses, weights, and imputation of absent modalities."""

import contextlib
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import quickstart
from mmfusion import config as configs
from mmfusion import rng
from mmfusion.config import defaults
from mmfusion.data import dataset as datasets
from mmfusion.data.batch import Batch
from mmfusion.distributed import preemption
from mmfusion.distributed.signals import Stop
from mmfusion.errors import Preempted
from mmfusion.inference.evaluate import evaluate
from mmfusion.objectives import OBJECTIVES, Task, mixing, task_loss
from mmfusion.objectives.base import Context
from mmfusion.objectives.supervised import task_terms
from mmfusion.objectives.weighting import GradNorm, Uncertainty
from mmfusion.training.loop import train
from mmfusion.training.restore import open_run
from mmfusion.training.setup import build_setup
from mmfusion.training.step import train_step
from tests import planted
from tests.errors import rejects

pytestmark = pytest.mark.usefixtures("traced_once")


@pytest.fixture
def rows(monkeypatch):
    planted.plant(monkeypatch, train=[planted.row(i) for i in range(60)], test=[planted.row(i) for i in range(20)])


def config(*names, fusion="mean", **changes):
    result = planted.config(**{"modalities": "image+text", "steps": 4, **changes})
    defaults.add_objectives(result, "+".join(names))
    with result.unlocked():
        result.model.fusion = defaults.fusion(fusion)
        for name in names:
            result.objectives[name].update(
                {k: 4 for k in ("hidden", "shared", "latent") if k in result.objectives[name]}
            )
    return result


def logged(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "grad_norm" in line]


MODULES = [("contrastive", "cca", "adversarial", "mvae"), ("mmvae",), ("gan",)]


@pytest.mark.loop
@pytest.mark.parametrize(
    "names", [pytest.param(names, marks=pytest.mark.thorough if i else ()) for i, names in enumerate(MODULES)]
)
def test_objectives_log_their_losses(rows, tmp_path, names):
    train(config(*names), tmp_path / "run")
    for line in logged(tmp_path / "run"):
        assert all(np.isfinite(line[f"objective/{name}"]) for name in names)
        assert line["skipped"] == 0
    assert open_run(tmp_path / "run", []).config.objectives.keys() == set(names)


@pytest.mark.thorough
@pytest.mark.loop
def test_objectives_add_their_weighted_loss_to_the_task_loss(rows, tmp_path):
    weighted = config("contrastive")
    with weighted.unlocked():
        weighted.objectives.contrastive.weight = 0.25
    first = [
        logged(tmp_path / name)[0]
        for name, run_config in (("plain", config()), ("with", weighted))
        if train(run_config, tmp_path / name)
    ]
    assert first[1]["loss"] == pytest.approx(first[0]["loss"] + 0.25 * first[1]["objective/contrastive"], rel=1e-4)


@pytest.mark.loop
@pytest.mark.thorough
def test_imputation_changes_evaluation_with_a_missing_modality(rows, tmp_path):
    imputing = config("mvae", fusion="concat")
    train(imputing, tmp_path / "imputed")
    with imputing.unlocked():
        imputing.objectives.mvae.fill = False
    train(imputing, tmp_path / "empty")
    complete, incomplete = (
        [evaluate(tmp_path / name, modalities=kept)["loss"] for name in ("imputed", "empty")]
        for kept in (None, ["image"])
    )
    assert complete[0] == pytest.approx(complete[1], abs=1e-6)  # no modality is absent, so both runs are equal
    assert abs(incomplete[0] - incomplete[1]) > 2e-5


def test_config_argument_objectives_accepts_known_and_valid_ones():
    two_objectives = quickstart.get_config("objectives=contrastive+mvae")
    assert list(two_objectives.objectives) == ["contrastive", "mvae"]
    configs.check(two_objectives, 1)
    with rejects("config.objectives.contrast", "contrast", "contrastive"):
        quickstart.get_config("objectives=contrast")
    with two_objectives.unlocked():
        two_objectives.objectives.contrastive.temprature = 1.0
    with rejects("config.objectives.contrastive.temprature", None, "temperature"):
        configs.check(two_objectives, 1)
    unimodal = quickstart.get_config("objectives=contrastive+cca+gan+unimodal,modalities=text")
    assert list(unimodal.objectives) == ["unimodal"]  # the others need two modalities
    configs.check(unimodal, 1)
    with unimodal.unlocked():
        unimodal.objectives.cca = defaults.objective("cca")
    with rejects("config.objectives.cca", None, says="needs 2 modalities, the config has 1"):
        configs.check(unimodal, 1)
    conflicting = quickstart.get_config("objectives=mvae+gan")
    with rejects("config.objectives.gan.fill", None, says="gan and mvae"):
        configs.check(conflicting, 1)


@pytest.mark.loop
@pytest.mark.parametrize("fusion", ["concat", pytest.param("late_mean", marks=pytest.mark.thorough)])
def test_ogm_ge_scores_each_modality(rows, tmp_path, fusion):
    """Scores come from unimodal heads, or from the heads of a decision-level strategy."""
    run_config = config("ogm_ge", "unimodal", fusion=fusion)
    train(run_config, tmp_path / "run")
    for line in logged(tmp_path / "run"):
        assert all(0 < line[f"score/{m}"] < 1 for m in ("image", "text"))
    heads = [name for name in open_run(tmp_path / "run", []).state.params if name.startswith("unimodal")]
    assert len(heads) == (2 if fusion == "concat" else 0)


@pytest.mark.loop
@pytest.mark.parametrize(
    ("fusion", "objectives", "tasks"),
    [
        ("concat", ("uncertainty",), "label+amount"),
        pytest.param("concat", (), "label", marks=pytest.mark.thorough),
        pytest.param("late_mean", (), "label", marks=pytest.mark.thorough),
    ],
)
def test_unimodal_probes_do_not_change_the_model(rows, tmp_path, fusion, objectives, tasks):
    """Without gradient modulation, the parameters equal those of a run without probes."""
    probed = config("ogm_ge", *objectives, fusion=fusion, tasks=tasks)
    with probed.unlocked():
        probed.objectives.ogm_ge.update(alpha=0.0, noise=False)
        probed.optim.clip_norm = 0.1  # for the model's gradients and the probes' gradients separately
    train(probed, tmp_path / "probed")
    plain = config(*objectives, fusion=fusion, tasks=tasks)
    with plain.unlocked():
        plain.optim.clip_norm = 0.1
    train(plain, tmp_path / "plain")
    states = [open_run(tmp_path / name, []).state.params for name in ("probed", "plain")]
    for name in states[1]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), states[0][name], states[1][name])


@pytest.mark.loop
def test_uncertainty_learns_task_weights(rows, tmp_path):
    run_config = config("uncertainty", tasks="label+amount")
    train(run_config, tmp_path / "run")
    for line in logged(tmp_path / "run"):
        assert line["task/label"] > 0 and line["task/amount"] > 0
    assert [line["weight/label"], line["weight/amount"]] != [1.0, 0.5]
    assert [logged(tmp_path / "run")[0][f"weight/{task}"] for task in ("label", "amount")] == [1.0, 0.5]
    params = open_run(tmp_path / "run", []).state.params
    assert {float(params[f"log_variance_{task}"]) != 0 for task in ("label", "amount")} == {True}


@pytest.mark.parametrize(("kind", "minimum"), [("classification", np.log(1.6)), ("regression", np.log(0.8))])
def test_uncertainty_has_its_minimum_at_the_losses_variance(kind, minimum):
    """L / s² + v / 2 has its minimum at s² = 2L; for a regression, L / (2 s²) + v / 2 at s² = L."""
    spec, uncertainty = Task(kind, 2 if kind == "classification" else 1), Uncertainty()
    terms = [*task_terms({"task": spec}, log_losses=False), *uncertainty.terms("", None, {"task": spec})]
    rows = np.ones(4, np.float32)
    batch = Batch({}, {}, {}, {"task": np.zeros(4, np.int32)}, rows, np.arange(4))

    def loss(v):
        params = {"log_variance_task": v}
        context = Context(batch, None, params, {})
        precision = uncertainty.coefficients({}, params, terms)["task/task"]
        return precision * 0.8 + terms[-1].total(context) / terms[-1].count(batch)

    assert loss(0.0) == pytest.approx(0.8 if kind == "classification" else 0.4)
    assert jax.grad(loss)(jnp.float32(minimum)) == pytest.approx(0, abs=1e-6)


@pytest.mark.thorough
@pytest.mark.loop
def test_gradnorm_weights_are_independent_of_micro_batches(rows, tmp_path):
    runs = {}
    for accumulate in (1, 2):
        run_config = config("gradnorm", tasks="label+amount", fusion="concat", **{"optim.accumulate": accumulate})
        train(run_config, tmp_path / str(accumulate))
        runs[accumulate] = [
            [line["weight/label"], line["weight/amount"]] for line in logged(tmp_path / str(accumulate))
        ]
    np.testing.assert_allclose(runs[1], runs[2], rtol=1e-4)
    assert runs[1][0] == [1, 1]
    assert abs(runs[1][-1][0] - 1) > 1e-3
    np.testing.assert_allclose(np.sum(runs[1], axis=1), 2, rtol=1e-5)


@pytest.mark.thorough
def test_gradnorm_receives_global_losses_and_feature_gradients(rows):
    run_config = config("gradnorm", tasks="label+amount", fusion="concat")
    dataset = datasets.load(configs.read(run_config).data, seed=0)
    setup, batch = build_setup(run_config, dataset), dataset.splits["train"].take(np.arange(6))
    state = setup.init_on_host(0)

    class RecordingGradNorm(GradNorm):
        def balance(self, weights, losses, norms):
            return {"tasks": losses, "first": norms}  # returns its arguments for inspection

    def step(axis_name):
        objectives = dataclasses.replace(setup.spec.objectives, by_name={"gradnorm": RecordingGradNorm()})
        return functools.partial(
            train_step, spec=dataclasses.replace(setup.spec, objectives=objectives, axis_name=axis_name)
        )

    received = jax.jit(step(None))(state, batch, jnp.float32(0.1))[0].loss_weights["gradnorm"]
    halves = jax.tree.map(lambda x: x.reshape(2, 3, *x.shape[1:]), batch)
    on_two_devices = jax.vmap(step("data"), (None, 0, None), axis_name="data")
    per_device = jax.jit(on_two_devices)(state, halves, jnp.float32(0.1))[0].loss_weights["gradnorm"]
    jax.tree.map(lambda two, one: np.testing.assert_allclose(two, [one, one], rtol=1e-5), per_device, received)
    outputs = setup.model.apply({"params": state.params}, setup.preprocess(batch, None), train=False)
    for task, spec in setup.tasks.items():
        head = state.params[f"heads_{task}"]

        def loss(features, task=task, spec=spec, head=head):
            return task_loss(features @ head["kernel"] + head["bias"], batch.targets[task], spec).mean()

        value, slope = jax.value_and_grad(loss)(outputs.features)
        assert received["tasks"][task] == pytest.approx(float(value), rel=1e-4)
        assert received["first"][task] == pytest.approx(float(jnp.linalg.norm(slope)), rel=1e-4)


@pytest.mark.loop
def test_gradient_blending_reweights_heads_and_resumes_identically(rows, tmp_path):
    run_config = config("gradient_blending", fusion="concat", steps=8)
    uninterrupted = train(run_config, tmp_path / "uninterrupted")
    weights = [
        [line[f"weight/{head}"] for head in ("joint", "image", "text")] for line in logged(tmp_path / "uninterrupted")
    ]
    assert weights[0] == weights[1] == [1, 1, 1]
    assert weights[2] == weights[3]
    assert any(head_weights != [1, 1, 1] for head_weights in weights)
    np.testing.assert_allclose(np.sum(weights, axis=1), 3, rtol=1e-5)

    def stop_immediately():
        stop = Stop()
        stop.set()
        return contextlib.nullcontext(stop)

    for _ in range(4):
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Preempted):
            patch.setattr(preemption, "stop_on_signal", stop_immediately)
            train(run_config, tmp_path / "preempted")
    resumed = train(run_config, tmp_path / "preempted")
    assert resumed["test"] == uninterrupted["test"]
    assert [line["loss"] for line in logged(tmp_path / "preempted")] == [
        line["loss"] for line in logged(tmp_path / "uninterrupted")
    ]


def test_check_rejects_conflicting_weighting_objectives():
    for names, changes, fact in (
        (("gradnorm",), {}, "2 tasks"),
        (("gradnorm",), {"tasks": "label+amount", "fusion": "late_mean"}, "'late_mean' is of decision level"),
        (("gradnorm", "uncertainty"), {"tasks": "label+amount", "fusion": "concat"}, "uncertainty"),
        (("gradient_blending", "unimodal"), {}, "unimodal"),
    ):
        with rejects(f"config.objectives.{names[0]}", None, says=fact):
            configs.check(config(*names, **changes), 1)


RANDOM_OBJECTIVES = ("mixup", "cutmix", "modality_dropout")


@pytest.mark.loop
@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "fusion"),
    [
        ("mixup", "concat"),
        ("mixup", "late_mean"),
        ("cutmix", "concat"),
        ("modality_dropout", "concat"),
    ],
)
def test_random_objectives_change_training_but_not_evaluation(rows, tmp_path, name, fusion):
    modalities = "image" if name == "cutmix" else "image+text"
    run_configs = {used: config(*([name] * used), fusion=fusion, modalities=modalities) for used in (False, True)}
    results = [train(run_configs[used], tmp_path / str(used)) for used in (False, True)]
    assert results[0]["test"]["loss"] != results[1]["test"]["loss"]
    evaluated = evaluate(tmp_path / "True")
    assert evaluated["loss"] == pytest.approx(results[1]["test"]["loss"], rel=1e-5)


@pytest.mark.thorough
def test_mixup_mixes_the_loss_of_every_head_and_micro_batch(rows):
    run_config = config(
        "mixup", "unimodal", fusion="concat",
        **{"data.targets.label.class_weights": (1.0, 3.0), "parallel.mode": "jit", "optim.clip_norm": 0.0},
    )  # fmt: skip
    dataset = datasets.load(configs.read(run_config).data, seed=0)
    setup, batch = build_setup(run_config, dataset), dataset.splits["train"].take(np.arange(8))
    state = setup.init_on_host(0)
    specs = [dataclasses.replace(setup.spec, micro_batches=k) for k in (1, 2)]
    metrics = [jax.jit(functools.partial(train_step, spec=s))(state, batch, jnp.float32(0.1))[1] for s in specs]
    for name in ("loss", "accuracy", "objective/unimodal", "grad_norm"):
        assert float(metrics[0][name]) == pytest.approx(float(metrics[1][name]), rel=1e-5)

    coefficients, _ = mixing.draw(
        batch, setup.spec.objectives.by_name["mixup"].alpha, rng.key(state.seed, "mixing", state.step)
    )
    variables = {"params": state.params, "rows": {"id": batch.id, "mix": coefficients}}
    inputs = setup.preprocess(batch, rng.key(state.seed, "augment", state.step))
    outputs = setup.model.apply(variables, inputs, train=True, rngs={"dropout": jax.random.key(0)})
    target, share = batch.targets["label"], np.asarray(coefficients)
    weight = np.array([1.0, 3.0])[target]
    assert share.min() < 1 and len(set(target[:2].tolist())) == 2

    def loss(logits):
        own, other = (-np.asarray(jax.nn.log_softmax(logits))[np.arange(8), t] for t in (target, target[batch.partner]))
        return (share * weight * own + (1 - share) * weight[batch.partner] * other).sum() / weight.sum()

    unimodal = sum(loss(logits) for logits in outputs.unimodal["label"].values())
    assert float(metrics[0]["objective/unimodal"]) == pytest.approx(unimodal, rel=1e-5)
    assert float(metrics[0]["loss"]) == pytest.approx(loss(outputs.logits["label"]) + unimodal, rel=1e-5)
    predicted = np.asarray(outputs.logits["label"].argmax(-1))
    accuracy = (share * (predicted == target) + (1 - share) * (predicted == target[batch.partner])).mean()
    assert float(metrics[0]["accuracy"]) == pytest.approx(accuracy, rel=1e-5)


def test_auxiliary_tests_cover_every_objective():
    covered = {name for names in MODULES for name in names} | set(RANDOM_OBJECTIVES)
    covered |= {"ogm_ge", "unimodal", "uncertainty", "gradnorm", "gradient_blending", "mmpareto"}
    assert covered == set(OBJECTIVES)
    with rejects("config.objectives.ogm_ge", None, says="classification"):
        configs.check(config("ogm_ge", tasks="amount", modalities="image+text"), 1)
    for key, value, says in (("modulate", "kernels", ""), ("scores", "heads", ""), ("until", 3, "after start=4")):
        invalid = config("ogm_ge")
        with invalid.unlocked():
            invalid.objectives.ogm_ge.update({"start": 4, key: value})
        with rejects(f"config.objectives.ogm_ge.{key}", value, says=says):
            configs.check(invalid, 1)
