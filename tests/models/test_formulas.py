"""Every fusion strategy against its NumPy reference implementation."""

import jax
import numpy as np
import pytest

from mmfusion.models.fusion import FUSIONS
from tests.errors import rejects
from tests.models import attention_renderings, decision_renderings, renderings
from tests.models.inputs import COUNTS, MASK, TOKENS, WIDTH, make, take, without
from tests.models.random_variables import random_variables

CLOSED_FORM_MASK = {m: np.vstack([MASK[m], MASK[m][:1], MASK[m][:1]]) for m in MASK}
for row, absent in enumerate([("text",), ("audio", "image"), ("text", "audio", "image")], start=2):
    for m in absent:
        CLOSED_FORM_MASK[m][row] = False


REFERENCES = {
    **{name: (reference, {}) for name, reference in renderings.FEATURE.items()},
    **attention_renderings.FEATURE,
    "embracenet, mean": (renderings.embracenet, {"evaluation": "mean"}),
    "mag, beta 0.1": (renderings.mag, {"beta": 0.1}),
}


@pytest.mark.thorough(but=(*(f"{case}-3" for case in REFERENCES), "concat-1", "cross_attention-1"))
@pytest.mark.parametrize("count", (1, 2, 3))
@pytest.mark.parametrize("case", REFERENCES)
def test_fusion_matches_its_reference_implementation(case, count):
    """Rows are complete, padded, and without one, two or all modalities."""
    names = sorted(list(COUNTS)[:count])
    tokens = {m: np.concatenate([TOKENS[m], TOKENS[m][:2] + 1]) for m in names}
    mask = {m: CLOSED_FORM_MASK[m] for m in names}
    reference, options = REFERENCES[case]
    fusion = make(case.partition(",")[0], **options)
    variables = random_variables(fusion, tokens, mask, train=False)
    out = jax.jit(lambda v: fusion.apply(v, tokens, mask, train=False).features)(variables)
    params = jax.tree.map(np.float64, variables["params"])
    for row in range(5):
        present = {m: np.float64(tokens[m][row, mask[m][row]]) for m in names if mask[m][row].any()}
        expected = np.broadcast_to(reference(params, present, names, **options), WIDTH)
        np.testing.assert_allclose(out[row], expected, rtol=2e-5, atol=2e-5)


def test_film_with_3x3_kernel_matches_its_reference():
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
    with rejects("film.kernel", 3, says="text has 5"):
        jax.eval_shape(lambda: film.init(jax.random.key(0), tokens, mask, train=False))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in decision_renderings.DECISION), ("qmf", {"temperature": 3.0, "centred": False})],
)
def test_decision_fusion_matches_its_reference_implementation(name, options, count):
    width = {"width": WIDTH} if FUSIONS[name].declares.level == "mixed" else {}
    fusion = FUSIONS[name](**width, **options)
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
        present_names = [m for m in names if present[m][row]]
        inputs = [{m: np.float64(x[m][row]) for m in present_names} for x in (logits, features)]
        expected = np.broadcast_to(decision_renderings.DECISION[name](params, *inputs, names, **options), 4)
        if name == "product_of_experts":  # probabilities determine logits up to a constant
            out[row], expected = out[row] - out[row].mean(), expected - expected.mean()
        np.testing.assert_allclose(out[row], expected, rtol=2e-5, atol=2e-5)


def test_references_cover_every_fusion_strategy():
    covered = {case.partition(",")[0] for case in REFERENCES} | decision_renderings.DECISION.keys()
    assert set(FUSIONS) <= covered, "add a NumPy reference implementation"
