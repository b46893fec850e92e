"""The loss of `tmc` against its formula in float64 NumPy and SciPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from mmfusion.data.batch import Batch
from mmfusion.models.build import build
from mmfusion.objectives import Task, build_objectives
from mmfusion.objectives.evidence import evidential_loss
from mmfusion.training.state import init_state
from mmfusion.training.step import StepSpec, train_step
from tests.errors import rejects

CLASSES, WIDTH = 3, 4
TASKS = {"label": Task("classification", CLASSES)}
RANDOM = np.random.default_rng(0)
PRESENT = {"a": np.array([1, 1, 0, 1], bool), "b": np.array([1, 0, 1, 1], bool)}
BATCH = Batch(
    inputs={m: RANDOM.normal(size=(4, WIDTH)).astype(np.float32)[:, None] for m in PRESENT},
    mask={m: mask[:, None] for m, mask in PRESENT.items()},
    present=PRESENT,
    targets={"label": np.array([0, 2, 1, 1], np.int32)},
    weight=np.array([1, 2, 1, 0.5], np.float32),
    id=np.arange(4, dtype=np.int32),
)


def reference(alpha, target, annealing):
    """The authors' loss of one example: ψ(S) - ψ(α_y) + λ KL(Dir(α') | Dir(1)), with α' = α but α'_y = 1."""
    digamma, gammaln = scipy.special.digamma, scipy.special.gammaln
    expected = digamma(alpha.sum()) - digamma(alpha[target])
    wrong = alpha.copy()
    wrong[target] = 1.0
    divergence = gammaln(wrong.sum()) - gammaln(wrong).sum() - gammaln(len(wrong))
    divergence += ((wrong - 1) * (digamma(wrong) - digamma(wrong.sum()))).sum()
    return expected + annealing * divergence


def combined(alphas):
    """Dempster's rule of two opinions by belief and uncertainty; of a single one it is that."""
    if len(alphas) == 1:
        return alphas[0]
    (b, u), (c, v) = (((alpha - 1) / alpha.sum(), CLASSES / alpha.sum()) for alpha in alphas)
    conflict = np.outer(b, c).sum() - b @ c
    belief, uncertainty = (b * c + b * v + c * u) / (1 - conflict), u * v / (1 - conflict)
    return belief * CLASSES / uncertainty + 1


def model_of(**options):
    config = {"width": WIDTH, "encoders": {m: {"name": "mlp"} for m in PRESENT}, "fusion": {"name": "tmc", **options}}
    return build(config, {m: {} for m in PRESENT}, {"label": CLASSES})


@functools.cache
def stepped(**options):
    """Returns the model, its initial state, and a function from a step number to the metrics of that step."""
    model, optimizer = model_of(**options), optax.inject_hyperparams(optax.sgd)(learning_rate=0.0)
    objectives = build_objectives(model, TASKS)
    spec = StepSpec(model, optax.with_extra_args_support(optimizer), objectives, lambda batch, key: batch)
    state = init_state(model, optimizer, BATCH, spec.preprocess, jnp.uint32(0), objectives)
    step = jax.jit(functools.partial(train_step, spec=spec))
    return model, state, lambda number: step(state.replace(step=jnp.int32(number)), BATCH, jnp.float32(0.0))[1]


def test_evidential_loss_matches_its_formula():
    alpha = np.exp(RANDOM.uniform(0, 3, size=(5, CLASSES)))
    targets = np.array([0, 1, 2, 0, 1])
    for annealing in (0.0, 0.3, 1.0):
        found = evidential_loss(jnp.float32(np.log(alpha)), np.eye(CLASSES)[targets], annealing)
        expected = [reference(a, y, annealing) for a, y in zip(alpha, targets, strict=True)]
        np.testing.assert_allclose(found, expected, rtol=2e-5)


@pytest.mark.parametrize(("step", "annealing"), [(0, 0.0), (125, 0.25), (900, 1.0)])
def test_tmc_trains_each_modality_and_the_fusion_by_the_evidential_loss(step, annealing):
    """From the heads' logits: evidence softplus(l), α = 1 + evidence, absent modalities left out."""
    model, state, metrics = stepped()
    _, caught = model.apply({"params": state.params}, BATCH, train=False, capture_intermediates=True)
    heads = {m: np.float64(caught["intermediates"][f"heads_label_{m}"]["__call__"][0]) for m in PRESENT}
    total = 0.0
    for row, weight in enumerate(BATCH.weight):
        alphas = [1 + np.log1p(np.exp(heads[m][row])) for m in PRESENT if PRESENT[m][row]]
        losses = [reference(alpha, BATCH.targets["label"][row], annealing) for alpha in (*alphas, combined(alphas))]
        total += weight * sum(losses)
    found = metrics(step)
    assert found["loss"] == pytest.approx(total / BATCH.weight.sum(), rel=1e-5)
    assert found["objective/tmc"] == pytest.approx(found["loss"], rel=1e-6)
    assert found["task/label"] < found["loss"]  # the cross-entropy, a measure


def test_tmc_with_the_loss_of_the_task_minimises_cross_entropy_of_the_mean():
    _, _, metrics = stepped(loss="task")
    found = metrics(900)
    assert found["loss"] == pytest.approx(found["task/label"] + found["objective/unimodal"], rel=1e-6)
    assert found["task/label"] == pytest.approx(stepped()[2](0)["task/label"], rel=1e-6)


def test_tmc_rejects_another_loss_than_cross_entropy_and_invalid_options():
    focal = {"label": Task("classification", CLASSES, loss="focal")}
    with rejects("tmc.loss", "digamma", says="label has the loss 'focal'; choose task"):
        build_objectives(model_of(), focal)
    build_objectives(model_of(loss="task"), focal)
    for key, value in (("loss", "mse"), ("anneal", -1)):
        with rejects(f"tmc.{key}", value):
            jax.eval_shape(
                lambda key=key, value=value: model_of(**{key: value}).init(jax.random.key(0), BATCH, train=False)
            )
