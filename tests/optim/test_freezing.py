"""Which parameters are frozen, and until which step."""

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


def frozen_layers(frozen, step):
    """Returns the names of the frozen layers of the image encoder."""
    mask = frozen.frozen_mask(PARAMS, jnp.int32(step))
    assert jax.tree.leaves([mask["encoders_text"], mask["log_variance_label"]]) == [False, False]
    return [layer for layer, leaves in mask["encoders_image"].items() if all(jax.tree.leaves(leaves))]


def test_frozen_mask_covers_all_layers_until_the_step():
    for init in ("", "run:DIR"):
        frozen = make(init=init, freeze=3)
        assert frozen_layers(frozen, 2) == ["conv0", "norm", "tokens"]
        assert frozen_layers(frozen, 3) == []


def test_frozen_mask_excludes_layers_without_published_weights():
    assert frozen_layers(make(init="owner/name", freeze=3), 0) == ["conv0", "norm"]


@pytest.mark.parametrize(
    ("init", "freeze", "trained"),
    [
        ("", 9, {"conv0", "norm", "tokens"}),  # trained in the last step, so its gradient is computed
        ("", 10, set()),
        ("owner/name", 10, {"tokens"}),
    ],
)
def test_stop_gradient_applies_to_always_frozen_layers_only(init, freeze, trained):
    frozen, params = make(init=init, freeze=freeze), jax.tree.map(jnp.float32, PARAMS)
    gradient = jax.grad(lambda params: sum(jax.tree.leaves(frozen.stop_gradient(params))))(params)
    assert {layer for layer, leaves in gradient["encoders_image"].items() if any(jax.tree.leaves(leaves))} == trained
    assert jax.tree.leaves([gradient["encoders_text"], gradient["log_variance_label"]]) == [1, 1]


def test_always_frozen_encoders_are_frozen_for_all_steps():
    assert make(init="", freeze=9).always == frozenset()
    assert make(init="", freeze=10).always == {"encoders_image"}
    assert not freezing.make({"text": ConfigDict({"init": "", "freeze": 0})}, 10)
