"""Fusion strategies, layers and information decomposition against published implementations; see the scripts here."""

import dataclasses
from pathlib import Path

import flax.traverse_util
import jax
import numpy as np
import pytest

from mmfusion.analysis.probing import pid
from mmfusion.models import layers
from mmfusion.models.fusion import FUSIONS

FIXTURES = dict(np.load(Path(__file__).with_name("fixtures.npz")))
WIDTH, HEADS = 8, 2
SMOOTHED = 2e-3  # our signed square root is smoothed at zero: |x| + 1e-4 under the root
STRATEGIES = {
    "multiplicative": ("multiplicative", {}, 1e-5),
    "gat": ("gat", {"layers": 1, "heads": HEADS}, 1e-5),
    "attention_pool": ("attention_pool", {}, 1e-5),
    "mlb": ("mlb", {}, 1e-5),
    "mfb": ("mfb", {}, SMOOTHED),
    "mfh": ("mfh", {}, SMOOTHED),
    "block_term": ("block", {"chunks": 2, "rank": 3}, SMOOTHED),
    "low_rank_tensor": ("low_rank_tensor", {"rank": 4}, 1e-5),
}


def fixture(case):
    arrays = {key.removeprefix(f"{case}/"): value for key, value in FIXTURES.items() if key.startswith(f"{case}/")}
    params = {key.removeprefix("params/"): value for key, value in arrays.items() if key.startswith("params/")}
    return flax.traverse_util.unflatten_dict(params, sep="/"), arrays


def assert_same_tree(module, params, *args, **kwargs):
    """Asserts that the fixture has exactly the module's parameters and shapes."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *args, **kwargs))["params"]
    assert jax.tree.map(lambda x: x.shape, shapes) == jax.tree.map(lambda x: x.shape, params)


@pytest.mark.parametrize("case", STRATEGIES)
def test_fusion_equals_the_published_implementation(case):
    name, options, tolerance = STRATEGIES[case]
    params, arrays = fixture(case)
    tokens = {m: x if (x := arrays[m]).ndim == 3 else x[:, None] for m in "abc" if m in arrays}
    mask = {m: np.ones(x.shape[:2], bool) for m, x in tokens.items()}
    fusion = FUSIONS[name](width=WIDTH, **options)
    assert_same_tree(fusion, params, tokens, mask, train=False)
    out = fusion.apply({"params": params}, tokens, mask, train=False).features
    np.testing.assert_allclose(out, arrays["output"], rtol=tolerance, atol=tolerance)


def test_attention_equals_torch():
    params, arrays = fixture("attention")
    module = layers.Attention(HEADS, WIDTH)
    inputs = (arrays["queries"], arrays["keys"], arrays["mask"])
    assert_same_tree(module, params, *inputs)
    out, weights = module.apply({"params": params}, *inputs)
    np.testing.assert_allclose(out, arrays["output"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(weights, arrays["weights"], rtol=1e-5, atol=1e-5)


def test_transformer_block_equals_torch():
    params, arrays = fixture("block")
    module = layers.TransformerBlock(HEADS, WIDTH)
    assert_same_tree(module, params, arrays["tokens"], arrays["mask"], train=False)
    out, _ = module.apply({"params": params}, arrays["tokens"], arrays["mask"], train=False)
    np.testing.assert_allclose(out, arrays["output"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", range(8))
def test_information_decomposition_equals_dit(case):
    tables = np.load(Path(__file__).with_name("information.npz"))  # made by `make_information.py`
    found = dataclasses.astuple(pid.decompose(tables[f"{case}/table"]))
    expected = tables[f"{case}/parts"]
    np.testing.assert_allclose(found, expected, atol=2e-3)
    assert found[0] > expected[0] - 1e-5  # redundancy is a maximum, which dit's optimizer may not reach
