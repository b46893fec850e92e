"""Every strategy against its formula in NumPy."""

import jax
import numpy as np
import pytest

from mmfusion.errors import UserError
from mmfusion.models.fusion import FUSIONS
from tests.models import attention_renderings, decision_renderings, renderings
from tests.models.inputs import COUNTS, MASK, TOKENS, WIDTH, make, take, without
from tests.models.random_variables import random_variables

CLOSED_FORM_MASK = {m: np.vstack([MASK[m], MASK[m][:1], MASK[m][:1]]) for m in MASK}
for row, gone in enumerate([("text",), ("audio", "image"), ("text", "audio", "image")], start=2):
    for m in gone:
        CLOSED_FORM_MASK[m][row] = False


RENDERED = {
    **{name: (rendering, {}) for name, rendering in renderings.FEATURE.items()},
    **attention_renderings.FEATURE,
    "mag, beta 0.1": (renderings.mag, {"beta": 0.1}),
}


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.thorough), 3])
@pytest.mark.parametrize("case", RENDERED)
def test_is_its_formula(case, count):
    """Rows whole, padded, without one modality, without two, and without any, each against NumPy in float64."""
    names = sorted(list(COUNTS)[:count])
    tokens = {m: np.concatenate([TOKENS[m], TOKENS[m][:2] + 1]) for m in names}
    mask = {m: CLOSED_FORM_MASK[m] for m in names}
    rendering, more = RENDERED[case]
    fusion = make(case.partition(",")[0], **more)
    variables = random_variables(fusion, tokens, mask, train=False)
    out = jax.jit(lambda v: fusion.apply(v, tokens, mask, train=False).features)(variables)
    params = jax.tree.map(np.float64, variables["params"])
    for row in range(5):
        present = {m: np.float64(tokens[m][row, mask[m][row]]) for m in names if mask[m][row].any()}
        expected = np.broadcast_to(rendering(params, present, names, **more), WIDTH)
        np.testing.assert_allclose(out[row], expected, rtol=2e-5, atol=2e-5)


def test_film_looks_around_in_a_square_grid():
    tokens, mask = take(3)
    mask = without(mask, "image", 1)
    film = FUSIONS["film"](width=WIDTH, kernel=3, main="image")
    variables = random_variables(film, tokens, mask, train=False)
    out = jax.jit(lambda v: film.apply(v, tokens, mask, train=False).features)(variables)
    params = jax.tree.map(np.float64, variables["params"])
    for row in range(3):
        present = {m: np.float64(tokens[m][row, mask[m][row]]) for m in tokens if mask[m][row].any()}
        expected = renderings.film(params, present, ["image", "audio", "text"])
        np.testing.assert_allclose(out[row], expected, rtol=2e-5, atol=2e-5)
    film = FUSIONS["film"](width=WIDTH, kernel=3, main="text")
    with pytest.raises(UserError, match="kernel=3 needs a square grid of tokens, and text has 5"):
        jax.eval_shape(lambda: film.init(jax.random.key(0), tokens, mask, train=False))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(
    ("name", "more"), [*((name, {}) for name in decision_renderings.DECISION), ("qmf", {"temperature": 3.0})]
)
def test_decision_is_its_formula(name, more, count):
    width = {"width": WIDTH} if FUSIONS[name].declares.level == "mixed" else {}
    fusion = FUSIONS[name](**width, **more)
    names = sorted("abc"[:count])
    present = {m: np.array([True, m != "a", m == "c", False]) for m in names}
    random = np.random.default_rng(1)
    logits = {m: random.normal(size=(4, 4)).astype(np.float32) for m in names}
    features = {m: random.normal(size=(4, WIDTH)).astype(np.float32) for m in names}
    pooled = {"features": features} if FUSIONS[name].declares.level == "mixed" else {}
    variables = random_variables(fusion, logits, present, **pooled, train=False)
    out = np.float64(jax.jit(lambda v: fusion.apply(v, logits, present, **pooled, train=False))(variables))
    params = jax.tree.map(np.float64, variables.get("params", {}))
    for row in range(4):
        there = [m for m in names if present[m][row]]
        given = [{m: np.float64(x[m][row]) for m in there} for x in (logits, features)]
        expected = np.broadcast_to(decision_renderings.DECISION[name](params, *given, names, **more), 4)
        if name == "product_of_experts":  # a product of probabilities tells logits up to a constant
            out[row], expected = out[row] - out[row].mean(), expected - expected.mean()
        np.testing.assert_allclose(out[row], expected, rtol=2e-5, atol=2e-5)


def test_every_strategy_is_rendered():
    assert set(FUSIONS) <= {*RENDERED, *decision_renderings.DECISION}, "write its formula in NumPy beside the others"
