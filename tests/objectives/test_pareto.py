"""MMPareto: the gradients of separate losses, and how an encoder's two are combined."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import numpy as np
import pytest

from configs import quickstart
from mmfusion import config as configs
from mmfusion.config import defaults
from mmfusion.objectives.base import Objective
from mmfusion.objectives.pareto import MMPareto
from mmfusion.training.setup import build_setup
from tests import synthetic, ways
from tests.errors import rejects

RANDOM = np.random.default_rng(0)
SGD = {"parallel.mode": "jit", "model.encoders.text.tokens": "mean", "batch_size": 16}


@dataclasses.dataclass(frozen=True)
class Summed(Objective):
    """Separate losses whose gradients are added up: the same as without it."""

    unimodal_heads: ClassVar[str] = "heads"
    separates_losses: ClassVar[bool] = True

    def combine_gradients(self, grads: Mapping[str, Any]) -> Any:
        assert list(grads) == ["", "image", "text"]
        return jax.tree.map(lambda *parts: sum(parts), *grads.values())


def after_a_step(objective: str, accumulate: int = 1, **options: Any) -> Any:
    config = synthetic.config({**SGD, "optim.accumulate": accumulate}, "concat")
    with config.unlocked():
        del config.objectives.mvae
        config.optim = defaults.optimizer("momentum", 0.3, schedule="constant", clip_norm=0.0)
        config.optim.accumulate = accumulate
        config.objectives.tried = defaults.objective(objective, **options)
    dataset = synthetic.dataset(config, ways.ROWS)
    setup = build_setup(config, dataset)
    batch = setup.partitioner.put_batch(dataset.splits["train"].take(np.arange(16)))
    state, metrics = setup.compile_train_step()(setup.init_state(0), (batch,), np.float32([0.3]))
    return jax.device_get(state.params), jax.device_get(metrics)


@pytest.mark.thorough(but=("2",))
@pytest.mark.parametrize("accumulate", [1, 2])
def test_separate_losses_have_the_gradients_of_their_sum(accumulate):
    params, metrics = after_a_step("tests.objectives.test_pareto:Summed", accumulate)
    expected, reference = after_a_step("mmfusion.objectives.unimodal:Unimodal", accumulate)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), params, expected)
    np.testing.assert_allclose(metrics["loss"], reference["loss"], rtol=1e-5)


def gradients(joint: Any, own: Any, head: Any) -> dict[str, Any]:
    """Gradients of two encoders and two heads; the text's own loss leaves the image's encoder alone, and so on."""
    none = jax.tree.map(np.zeros_like, joint)
    return {
        "": {"encoders_image": joint, "encoders_text": own, "heads_label": head},
        "image": {"encoders_image": own, "encoders_text": none, "heads_label": head * 2},
        "text": {"encoders_image": none, "encoders_text": own, "heads_label": head * 3},
    }


def random_tree() -> dict[str, np.ndarray]:
    return {"kernel": RANDOM.normal(size=(3, 4)), "bias": RANDOM.normal(size=4)}


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def test_mmpareto_scales_the_sum_where_the_losses_agree():
    joint = random_tree()
    own = jax.tree.map(lambda x: 0.5 * x, joint)
    found = MMPareto(gamma=2.0).combine_gradients(gradients(joint, own, np.ones(2)))
    for name, x in found["encoders_image"].items():
        np.testing.assert_allclose(x, 2 * (joint[name] + own[name]), rtol=1e-5)
    np.testing.assert_allclose(found["heads_label"], np.full(2, 6.0))  # no encoder: the plain sum


def test_mmpareto_takes_the_smallest_norm_where_they_conflict_and_restores_the_norm_of_the_sum():
    joint = random_tree()
    own = jax.tree.map(lambda x: -0.7 * x + 0.3 * RANDOM.normal(size=x.shape), joint)
    assert flat(joint) @ flat(own) < 0
    found = MMPareto(gamma=1.5).combine_gradients(gradients(joint, own, np.ones(2)))["encoders_image"]
    shares = np.linspace(0, 1, 100_001)
    best = shares[np.linalg.norm(np.outer(shares, flat(joint)) + np.outer(1 - shares, flat(own)), axis=1).argmin()]
    for name in joint:
        new = 2 * (best * joint[name] + (1 - best) * own[name])
        scale = 1.5 * max(np.linalg.norm(joint[name] + own[name]) / np.linalg.norm(new), 1.0)
        np.testing.assert_allclose(found[name], scale * new, rtol=1e-3, atol=1e-3)
    whole = flat(found)
    assert whole @ flat(joint) > 0 and whole @ flat(own) > 0  # neither loss is raised


def test_mmpareto_changes_the_encoders_only():
    params, _ = after_a_step("mmfusion.objectives.pareto:MMPareto")
    expected, _ = after_a_step("mmfusion.objectives.unimodal:Unimodal")
    for name in params:
        same = all(
            np.allclose(a, b, rtol=1e-5, atol=1e-6)
            for a, b in zip(jax.tree.leaves(params[name]), jax.tree.leaves(expected[name]), strict=True)
        )
        assert same != name.startswith("encoders_"), name


@pytest.mark.parametrize(
    ("objectives", "options", "path"),
    [("mmpareto", {"gamma": 0.0}, "mmpareto.gamma"), ("mmpareto+gradient_blending", {}, "mmpareto")],
)
def test_mmpareto_refuses_a_factor_of_zero_and_other_weights_of_its_losses(objectives, options, path):
    config = quickstart.get_config(f"fusion=concat,objectives={objectives}")
    with config.unlocked():
        config.objectives.mmpareto.update(options)
    with rejects(f"config.objectives.{path}"):
        configs.check(config, 1)
