"""Which leaves are held, and when."""

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from mmfusion.optim import freezing

LAYERS = {"conv0": {"kernel": 0}, "norm": {"scale": 0}, "tokens": {"project": {"kernel": 0}}}
PARAMS = {"encoders_image": LAYERS, "encoders_text": {"embed": 0}, "log_variance_label": 0}


def make(*, init, freeze, total=10):
    image = ConfigDict({"init": init, "freeze": freeze})
    return freezing.make({"image": image, "text": ConfigDict({"init": "", "freeze": 0})}, total)


def held(frozen, step):
    """Returns the held leaves of the image's layers."""
    answer = frozen.frozen_mask(PARAMS, jnp.int32(step))
    assert jax.tree.leaves([answer["encoders_text"], answer["log_variance_label"]]) == [False, False]
    return [layer for layer, leaves in answer["encoders_image"].items() if all(jax.tree.leaves(leaves))]


def test_all_layers_wait_for_their_step():
    for init in ("", "run:DIR"):
        frozen = make(init=init, freeze=3)
        assert held(frozen, 2) == ["conv0", "norm", "tokens"]
        assert held(frozen, 3) == []


def test_what_no_publication_has_learns_from_the_first_step():
    assert held(make(init="owner/name", freeze=3), 0) == ["conv0", "norm"]


@pytest.mark.parametrize(
    ("init", "freeze", "learning"),
    [
        ("", 9, {"conv0", "norm", "tokens"}),  # it will, and its moments are kept until then
        ("", 10, set()),
        ("owner/name", 10, {"tokens"}),
    ],
)
def test_no_gradient_is_computed_for_what_never_learns(init, freeze, learning):
    frozen, params = make(init=init, freeze=freeze), jax.tree.map(jnp.float32, PARAMS)
    gradient = jax.grad(lambda params: sum(jax.tree.leaves(frozen.stop_gradient(params))))(params)
    assert {layer for layer, leaves in gradient["encoders_image"].items() if any(jax.tree.leaves(leaves))} == learning
    assert jax.tree.leaves([gradient["encoders_text"], gradient["log_variance_label"]]) == [1, 1]


def test_what_never_learns():
    assert make(init="", freeze=9).always == frozenset()
    assert make(init="", freeze=10).always == {"encoders_image"}
    assert not freezing.make({"text": ConfigDict({"init": "", "freeze": 0})}, 10)
