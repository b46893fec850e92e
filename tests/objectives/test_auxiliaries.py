"""Auxiliary objectives in a run: what each logs, that weights weigh, and what fills in for an absent modality."""

import contextlib
import dataclasses
import functools
import json
import threading

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
from mmfusion.errors import Preempted, UserError
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
@pytest.mark.parametrize("names", MODULES)
def test_each_logs_its_own_loss(rows, tmp_path, names):
    train(config(*names), tmp_path / "run")
    for line in logged(tmp_path / "run"):
        assert all(np.isfinite(line[f"objective/{name}"]) for name in names)
        assert line["skipped"] == 0
    assert open_run(tmp_path / "run", []).config.objectives.keys() == set(names)


@pytest.mark.loop
def test_the_loss_is_the_tasks_and_the_weighted_objectives(rows, tmp_path):
    weighed = config("contrastive")
    with weighed.unlocked():
        weighed.objectives.contrastive.weight = 0.25
    first = [
        logged(tmp_path / name)[0]
        for name, made in (("plain", config()), ("with", weighed))
        if train(made, tmp_path / name)
    ]
    assert first[1]["loss"] == pytest.approx(first[0]["loss"] + 0.25 * first[1]["objective/contrastive"], rel=1e-4)


@pytest.mark.loop
def test_what_is_filled_in_changes_what_a_missing_modality_does(rows, tmp_path):
    filled = config("mvae", fusion="concat")
    train(filled, tmp_path / "filled")
    with filled.unlocked():
        filled.objectives.mvae.fill = False
    train(filled, tmp_path / "empty")
    whole, part = (
        [evaluate(tmp_path / name, modalities=kept)["loss"] for name in ("filled", "empty")]
        for kept in (None, ["image"])
    )
    assert whole[0] == pytest.approx(whole[1], abs=1e-6)  # nothing is absent: the same run
    assert abs(part[0] - part[1]) > 2e-5


def test_every_config_takes_objectives_and_wrong_ones_are_told():
    given = quickstart.get_config("objectives=contrastive+mvae")
    assert list(given.objectives) == ["contrastive", "mvae"]
    configs.check(given, 1)
    with pytest.raises(UserError, match=r"config\.objectives\.contrast=.*did you mean contrastive"):
        quickstart.get_config("objectives=contrast")
    with given.unlocked():
        given.objectives.contrastive.temprature = 1.0
    with pytest.raises(UserError, match="did you mean temperature") as error:
        configs.check(given, 1)
    assert error.value.path == "config.objectives.contrastive.temprature"
    alone = quickstart.get_config("objectives=contrastive+cca+gan+unimodal,modalities=text")
    assert list(alone.objectives) == ["unimodal"]  # the others say nothing of one modality
    configs.check(alone, 1)
    with alone.unlocked():
        alone.objectives.cca = defaults.objective("cca")
    with pytest.raises(UserError, match=r"objectives\.cca: needs 2 modalities, the config has 1"):
        configs.check(alone, 1)
    both = quickstart.get_config("objectives=mvae+gan")
    with pytest.raises(UserError, match="gan and mvae cannot both fill in"):
        configs.check(both, 1)


@pytest.mark.loop
@pytest.mark.parametrize("fusion", ["concat", pytest.param("late_mean", marks=pytest.mark.thorough)])
def test_modalities_are_scored_alone(rows, tmp_path, fusion):
    """By heads of their own, or by those that a decision-level strategy has."""
    made = config("ogm_ge", "unimodal", fusion=fusion)
    train(made, tmp_path / "run")
    for line in logged(tmp_path / "run"):
        assert all(0 < line[f"score/{m}"] < 1 for m in ("image", "text"))
    heads = [name for name in open_run(tmp_path / "run", []).state.params if name.startswith("unimodal")]
    assert len(heads) == (2 if fusion == "concat" else 0)


@pytest.mark.loop
@pytest.mark.parametrize(
    ("fusion", "beside", "tasks"),
    [
        ("concat", ("uncertainty",), "label+amount"),
        pytest.param("concat", (), "label", marks=pytest.mark.thorough),
        pytest.param("late_mean", (), "label", marks=pytest.mark.thorough),
    ],
)
def test_probes_leave_the_encoders_alone(rows, tmp_path, fusion, beside, tasks):
    """What only watches changes nothing: with the gradients as they are, the run is the one without probes."""
    watched = config("ogm_ge", *beside, fusion=fusion, tasks=tasks)
    with watched.unlocked():
        watched.objectives.ogm_ge.update(alpha=0.0, noise=False)
        watched.optim.clip_norm = 0.1  # of the model's gradients, and of the probes' own
    train(watched, tmp_path / "watched")
    plain = config(*beside, fusion=fusion, tasks=tasks)
    with plain.unlocked():
        plain.optim.clip_norm = 0.1
    train(plain, tmp_path / "plain")
    states = [open_run(tmp_path / name, []).state.params for name in ("watched", "plain")]
    for name in states[1]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), states[0][name], states[1][name])


@pytest.mark.loop
def test_tasks_are_weighed_by_what_is_learned(rows, tmp_path):
    made = config("uncertainty", tasks="label+amount")
    train(made, tmp_path / "run")
    for line in logged(tmp_path / "run"):
        assert line["task/label"] > 0 and line["task/amount"] > 0
    assert [line["weight/label"], line["weight/amount"]] != [1.0, 0.5]
    assert [logged(tmp_path / "run")[0][f"weight/{task}"] for task in ("label", "amount")] == [1.0, 0.5]
    found = open_run(tmp_path / "run", []).state.params
    assert {float(found[f"log_variance_{task}"]) != 0 for task in ("label", "amount")} == {True}


@pytest.mark.parametrize(("kind", "settles"), [("classification", np.log(1.6)), ("regression", np.log(0.8))])
def test_uncertainty_settles_at_the_variance_that_the_loss_has(kind, settles):
    """L / s² + v / 2, or L / (2 s²) + v / 2 for a regression: the minimum is at twice the loss, or at the loss."""
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
    assert jax.grad(loss)(jnp.float32(settles)) == pytest.approx(0, abs=1e-6)


@pytest.mark.loop
def test_gradnorm_weighs_the_tasks_the_same_in_micro_batches(rows, tmp_path):
    runs = {}
    for accumulate in (1, 2):
        made = config("gradnorm", tasks="label+amount", fusion="concat", **{"optim.accumulate": accumulate})
        train(made, tmp_path / str(accumulate))
        runs[accumulate] = [
            [line["weight/label"], line["weight/amount"]] for line in logged(tmp_path / str(accumulate))
        ]
    np.testing.assert_allclose(runs[1], runs[2], rtol=1e-4)
    assert runs[1][0] == [1, 1]
    assert abs(runs[1][-1][0] - 1) > 1e-3
    np.testing.assert_allclose(np.sum(runs[1], axis=1), 2, rtol=1e-5)


def test_gradnorm_is_given_the_gradients_at_the_features_of_all_devices(rows):
    made = config("gradnorm", tasks="label+amount", fusion="concat")
    dataset = datasets.load(configs.read(made).data, seed=0)
    setup, batch = build_setup(made, dataset), dataset.splits["train"].take(np.arange(6))
    state = setup.init_on_host(0)

    class Seen(GradNorm):
        def balance(self, weights, losses, norms):
            return {"tasks": losses, "first": norms}  # what it was given, for us to see

    def step(axis_name):
        objectives = dataclasses.replace(setup.spec.objectives, by_name={"gradnorm": Seen()})
        return functools.partial(
            train_step, spec=dataclasses.replace(setup.spec, objectives=objectives, axis_name=axis_name)
        )

    seen = jax.jit(step(None))(state, batch, jnp.float32(0.1))[0].loss_weights["gradnorm"]
    halves = jax.tree.map(lambda x: x.reshape(2, 3, *x.shape[1:]), batch)
    of_two = jax.vmap(step("data"), (None, 0, None), axis_name="data")
    each = jax.jit(of_two)(state, halves, jnp.float32(0.1))[0].loss_weights["gradnorm"]
    jax.tree.map(lambda two, one: np.testing.assert_allclose(two, [one, one], rtol=1e-5), each, seen)
    outputs = setup.model.apply({"params": state.params}, setup.preprocess(batch, None), train=False)
    for task, spec in setup.tasks.items():
        head = state.params[f"heads_{task}"]

        def loss(features, task=task, spec=spec, head=head):
            return task_loss(features @ head["kernel"] + head["bias"], batch.targets[task], spec).mean()

        value, slope = jax.value_and_grad(loss)(outputs.features)
        assert seen["tasks"][task] == pytest.approx(float(value), rel=1e-4)
        assert seen["first"][task] == pytest.approx(float(jnp.linalg.norm(slope)), rel=1e-4)


@pytest.mark.loop
def test_heads_are_blended_and_a_run_that_stops_goes_on_the_same(rows, tmp_path):
    made = config("gradient_blending", fusion="concat", steps=8)
    whole = train(made, tmp_path / "whole")
    weights = [[line[f"weight/{head}"] for head in ("joint", "image", "text")] for line in logged(tmp_path / "whole")]
    assert weights[0] == weights[1] == [1, 1, 1]
    assert weights[2] == weights[3]
    assert any(each != [1, 1, 1] for each in weights)
    np.testing.assert_allclose(np.sum(weights, axis=1), 3, rtol=1e-5)

    def stop_at_once():
        stop = threading.Event()
        stop.set()
        return contextlib.nullcontext(stop)

    for _ in range(4):
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Preempted):
            patch.setattr(preemption, "stop_on_sigterm", stop_at_once)
            train(made, tmp_path / "broken")
    again = train(made, tmp_path / "broken")
    assert again["test"] == whole["test"]
    assert [line["loss"] for line in logged(tmp_path / "broken")] == [
        line["loss"] for line in logged(tmp_path / "whole")
    ]


def test_weights_that_contradict_are_refused():
    for names, changes, says in (
        (("gradnorm",), {}, "objectives.gradnorm: needs 2 tasks"),
        (("gradnorm",), {"tasks": "label+amount", "fusion": "late_mean"}, "'late_mean' is of decision level"),
        (("gradnorm", "uncertainty"), {"tasks": "label+amount", "fusion": "concat"}, "cannot be combined with"),
        (("gradient_blending", "unimodal"), {}, "cannot be combined with"),
    ):
        with pytest.raises(UserError, match=says):
            configs.check(config(*names, **changes), 1)


AT_RANDOM = ("mixup", "cutmix", "modality_dropout")


@pytest.mark.loop
@pytest.mark.parametrize(
    ("name", "fusion"),
    [
        ("mixup", "concat"),
        pytest.param("mixup", "late_mean", marks=pytest.mark.thorough),
        pytest.param("cutmix", "concat", marks=pytest.mark.thorough),
        ("modality_dropout", "concat"),
    ],
)
def test_what_is_done_at_random_changes_the_run_and_not_its_evaluation(rows, tmp_path, name, fusion):
    modalities = "image" if name == "cutmix" else "image+text"
    made = {word: config(*([name] * word), fusion=fusion, modalities=modalities) for word in (False, True)}
    results = [train(made[word], tmp_path / str(word)) for word in (False, True)]
    assert results[0]["test"]["loss"] != results[1]["test"]["loss"]
    again = evaluate(tmp_path / "True")
    assert again["loss"] == pytest.approx(results[1]["test"]["loss"], rel=1e-5)


def test_mixed_rows_answer_for_both_in_every_head_and_in_micro_batches(rows):
    made = config(
        "mixup", "unimodal", fusion="concat",
        **{"data.targets.label.class_weights": (1.0, 3.0), "parallel.mode": "jit", "optim.clip_norm": 0.0},
    )  # fmt: skip
    dataset = datasets.load(configs.read(made).data, seed=0)
    setup, batch = build_setup(made, dataset), dataset.splits["train"].take(np.arange(8))
    state = setup.init_on_host(0)
    specs = [dataclasses.replace(setup.spec, micro_batches=k) for k in (1, 2)]
    numbers = [jax.jit(functools.partial(train_step, spec=s))(state, batch, jnp.float32(0.1))[1] for s in specs]
    for name in ("loss", "accuracy", "objective/unimodal", "grad_norm"):
        assert float(numbers[0][name]) == pytest.approx(float(numbers[1][name]), rel=1e-5)

    drawn, _ = mixing.draw(
        batch, setup.spec.objectives.by_name["mixup"].alpha, rng.key(state.seed, "mixing", state.step)
    )
    variables = {"params": state.params, "rows": {"id": batch.id, "mix": drawn}}
    inputs = setup.preprocess(batch, rng.key(state.seed, "augment", state.step))
    outputs = setup.model.apply(variables, inputs, train=True, rngs={"dropout": jax.random.key(0)})
    target, share = batch.targets["label"], np.asarray(drawn)
    weight = np.array([1.0, 3.0])[target]
    assert share.min() < 1 and len(set(target[:2].tolist())) == 2

    def loss(logits):
        own, other = (-np.asarray(jax.nn.log_softmax(logits))[np.arange(8), t] for t in (target, target[batch.partner]))
        return (share * weight * own + (1 - share) * weight[batch.partner] * other).sum() / weight.sum()

    alone = sum(loss(logits) for logits in outputs.unimodal["label"].values())
    assert float(numbers[0]["objective/unimodal"]) == pytest.approx(alone, rel=1e-5)
    assert float(numbers[0]["loss"]) == pytest.approx(loss(outputs.logits["label"]) + alone, rel=1e-5)
    right = np.asarray(outputs.logits["label"].argmax(-1))
    hit = (share * (right == target) + (1 - share) * (right == target[batch.partner])).mean()
    assert float(numbers[0]["accuracy"]) == pytest.approx(hit, rel=1e-5)


def test_every_objective_is_tried_here():
    tried = {name for names in MODULES for name in names} | set(AT_RANDOM)
    tried |= {"ogm_ge", "unimodal", "uncertainty", "gradnorm", "gradient_blending"}
    assert tried == set(OBJECTIVES)
    with pytest.raises(UserError, match="ogm_ge: needs a target of kind classification"):
        configs.check(config("ogm_ge", tasks="amount", modalities="image+text"), 1)
