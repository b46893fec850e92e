"""Runs in one program are what they are by themselves."""

import contextlib
import functools
import json
import threading

import jax
import numpy as np
import pytest

from mmfusion import config as configs
from mmfusion.checkpoints.manager import Checkpoints
from mmfusion.errors import UserError
from mmfusion.models.convolution import as_patches, conv
from mmfusion.training.loop import train
from mmfusion.training.replicas import replica, train_replicas
from tests import tiny

pytestmark = pytest.mark.usefixtures("traced_once")

RUNS = {"a": (0, 0.1), "b": (1, 0.1), "c": (0, 0.03)}  # seed and learning rate


@pytest.fixture
def config_of(data_dir):
    def config_of(name, **changes):
        seed, rate = RUNS[name]
        config = tiny.config(f"fusion=concat,seed={seed}", {"data.dir": data_dir, **changes})
        with config.unlocked():
            configs.choose(config, "optim", "momentum")
            config.optim.learning_rate = rate
            config.optim.schedule.warmup_steps = 1
        return config

    return config_of


def params(workdir):
    checkpoints = Checkpoints(workdir / "checkpoints")
    step = checkpoints.newest()
    state = checkpoints._manager.restore(step)["state"]  # whatever its shape
    checkpoints.close()
    return step, state["params"]


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.loop
def test_together_is_as_alone(config_of, tmp_path):
    each = {name: config_of(name) for name in RUNS}
    for config in each.values():
        with config.unlocked():
            configs.choose(config, "model.encoders.text", "rnn")
            config.model.encoders.text.update(embedding=8, hidden=8, dropout=0.1)
    results = train_replicas([replica(config, tmp_path / name, threading.Event()) for name, config in each.items()])
    for (name, config), result in zip(each.items(), results, strict=True):
        alone = train(config, tmp_path / f"{name} alone")
        assert result["test"]["loss"] == pytest.approx(alone["test"]["loss"], abs=1e-4)
        assert result["best_step"] == alone["best_step"]
        (step, ours), (other, theirs) = params(tmp_path / name), params(tmp_path / f"{name} alone")
        assert step == other == config.steps
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), ours, theirs)
        for mine, reference in zip(lines(tmp_path / name), lines(tmp_path / f"{name} alone"), strict=True):
            assert mine["step"] == reference["step"]
            assert mine["loss"] == pytest.approx(reference["loss"], abs=1e-4)
    assert len({result["test"]["loss"] for result in results}) == 3


@pytest.mark.loop
def test_a_run_that_ends_early_leaves_the_others(config_of, tmp_path):
    done = train(config_of("a"), tmp_path / "a")
    calls = []

    @contextlib.contextmanager
    def around(number):
        calls.append(number)
        yield

    belongs_to_a = replica(config_of("c"), tmp_path / "a", threading.Event())
    stop = threading.Event()
    again, other, stopped = (replica(config_of(n), tmp_path / d, s) for n, d, s in (
        ("a", "a", threading.Event()), ("b", "b", threading.Event()), ("c", "c", stop),
    ))  # fmt: skip
    stop.set()
    results = train_replicas([belongs_to_a, again, other, stopped], around)
    assert isinstance(results[0], UserError) and "belongs to another run" in str(results[0])
    assert results[1] == done
    assert results[2]["steps"] == 8
    assert "saved at step" in str(results[3])
    assert calls.count(0) == calls.count(1) == 1 and calls.count(2) == 9
    continued = train(config_of("c"), tmp_path / "c")
    alone = train(config_of("c"), tmp_path / "c alone")
    assert continued["test"]["loss"] == pytest.approx(alone["test"]["loss"], abs=1e-4)


@pytest.mark.parametrize(
    ("kernel", "stride", "groups", "padding"),
    [(3, 1, 1, None), (3, 2, 2, None), (5, 4, 1, None), ((1, 5), 1, 4, None), (2, 2, 1, 0), ((3, 1, 2), 2, 1, None)],
)
def test_a_convolution_as_patches_is_one(kernel, stride, groups, padding):
    sides = (9, 8) if isinstance(kernel, int) else (5, 6, 7)[: len(kernel)]
    x = np.random.default_rng(0).normal(size=(2, *sides, 4)).astype(np.float32)
    module = conv(8, kernel, stride, np.float32, padding=padding, groups=groups)
    variables = module.init(jax.random.key(0), x)

    def loss(variables, x):
        out = module.apply(variables, x)
        return (out**2).sum(), out

    def both():
        return jax.grad(loss, argnums=(0, 1), has_aux=True)(variables, x)

    plain = both()
    with as_patches():
        patches = both()
        text = jax.make_jaxpr(lambda: module.apply(variables, x))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), plain, patches)
    assert "dot_general" in str(text)


@pytest.mark.parametrize(("sides", "kernel"), [((2, 2), 3), ((1, 4), 3), ((3, 9), 7)])
def test_a_map_smaller_than_the_kernel_is_convolved_as_patches(sides, kernel):
    x = np.random.default_rng(0).normal(size=(2, *sides, 3)).astype(np.float32)
    module = conv(4, kernel, 1, np.float32, bias=False)
    weights = np.float64(module.init(jax.random.key(0), x)["params"]["kernel"])
    around = np.pad(np.float64(x), ((0, 0), *[(kernel // 2,) * 2] * 2, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(around, (kernel, kernel), (1, 2))  # [B, H, W, C, k, k]
    expected = np.einsum("bhwckl,klco->bhwo", windows, weights)
    apply = functools.partial(module.apply, {"params": {"kernel": np.float32(weights)}})
    np.testing.assert_allclose(apply(x), expected, rtol=1e-5, atol=1e-5)
    assert "dot_general" in str(jax.make_jaxpr(apply)(x))
