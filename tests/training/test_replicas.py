"""Replicas trained in one program equal separate runs."""

import contextlib
import functools
import json

import jax
import numpy as np
import pytest

from mmfusion import config as configs
from mmfusion.checkpoints.manager import Checkpoints
from mmfusion.distributed.signals import Stop
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
        seed, learning_rate = RUNS[name]
        config = tiny.config(f"fusion=concat,seed={seed}", {"data.dir": data_dir, **changes})
        with config.unlocked():
            configs.choose(config, "optim", "momentum")
            config.optim.learning_rate = learning_rate
            config.optim.schedule.warmup_steps = 1
        return config

    return config_of


def params(workdir):
    checkpoints = Checkpoints(workdir / "checkpoints")
    step = checkpoints.newest()
    state = checkpoints._manager.restore(step)["state"]  # of any structure
    checkpoints.close()
    return step, state["params"]


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.loop
def test_replicas_match_separate_runs(config_of, tmp_path):
    run_configs = {name: config_of(name) for name in RUNS}
    for config in run_configs.values():
        with config.unlocked():
            configs.choose(config, "model.encoders.text", "rnn")
            config.model.encoders.text.update(embedding=8, hidden=8, dropout=0.1)
    results = train_replicas([replica(config, tmp_path / name, Stop()) for name, config in run_configs.items()])
    for (name, config), result in zip(run_configs.items(), results, strict=True):
        separate = train(config, tmp_path / f"{name} separate")
        assert result["test"]["loss"] == pytest.approx(separate["test"]["loss"], abs=1e-4)
        assert result["best_step"] == separate["best_step"]
        (step, found), (other, expected) = params(tmp_path / name), params(tmp_path / f"{name} separate")
        assert step == other == config.steps
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), found, expected)
        for line, reference in zip(lines(tmp_path / name), lines(tmp_path / f"{name} separate"), strict=True):
            assert line["step"] == reference["step"]
            assert line["loss"] == pytest.approx(reference["loss"], abs=1e-4)
    assert len({result["test"]["loss"] for result in results}) == 3


@pytest.mark.thorough
@pytest.mark.loop
def test_replicas_continue_when_one_run_ends_early(config_of, tmp_path):
    finished = train(config_of("a"), tmp_path / "a")
    calls = []

    @contextlib.contextmanager
    def around(index):
        calls.append(index)
        yield

    conflicting = replica(config_of("c"), tmp_path / "a", Stop())
    stop = Stop()
    repeated, other, stopped = (replica(config_of(n), tmp_path / d, s) for n, d, s in (
        ("a", "a", Stop()), ("b", "b", Stop()), ("c", "c", stop),
    ))  # fmt: skip
    stop.set()
    results = train_replicas([conflicting, repeated, other, stopped], around)
    assert isinstance(results[0], UserError) and results[0].path == str(tmp_path / "a")
    assert results[1] == finished
    assert results[2]["steps"] == 8
    assert "saved at step" in str(results[3])
    assert calls.count(0) == calls.count(1) == 1 and calls.count(2) == 9
    continued = train(config_of("c"), tmp_path / "c")
    separate = train(config_of("c"), tmp_path / "c separate")
    assert continued["test"]["loss"] == pytest.approx(separate["test"]["loss"], abs=1e-4)


@pytest.mark.thorough(but=("3-2-2-None", "kernel5-2-1-None"))
@pytest.mark.parametrize(
    ("kernel", "stride", "groups", "padding"),
    [(3, 1, 1, None), (3, 2, 2, None), (5, 4, 1, None), ((1, 5), 1, 4, None), (2, 2, 1, 0), ((3, 1, 2), 2, 1, None)],
)
def test_convolution_as_patches_equals_convolution(kernel, stride, groups, padding):
    sides = (9, 8) if isinstance(kernel, int) else (5, 6, 7)[: len(kernel)]
    x = np.random.default_rng(0).normal(size=(2, *sides, 4)).astype(np.float32)
    module = conv(8, kernel, stride, np.float32, padding=padding, groups=groups)
    variables = module.init(jax.random.key(0), x)

    def loss(variables, x):
        out = module.apply(variables, x)
        return (out**2).sum(), out

    def gradients_and_output():
        return jax.grad(loss, argnums=(0, 1), has_aux=True)(variables, x)

    plain = gradients_and_output()
    with as_patches():
        patches = gradients_and_output()
        text = jax.make_jaxpr(lambda: module.apply(variables, x))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), plain, patches)
    assert "dot_general" in str(text)


@pytest.mark.parametrize(("sides", "kernel"), [((2, 2), 3), ((1, 4), 3), ((3, 9), 7)])
def test_convolution_of_maps_smaller_than_the_kernel_uses_patches(sides, kernel):
    x = np.random.default_rng(0).normal(size=(2, *sides, 3)).astype(np.float32)
    module = conv(4, kernel, 1, np.float32, bias=False)
    weights = np.float64(module.init(jax.random.key(0), x)["params"]["kernel"])
    padded = np.pad(np.float64(x), ((0, 0), *[(kernel // 2,) * 2] * 2, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (kernel, kernel), (1, 2))  # [B, H, W, C, k, k]
    expected = np.einsum("bhwckl,klco->bhwo", windows, weights)
    apply = functools.partial(module.apply, {"params": {"kernel": np.float32(weights)}})
    np.testing.assert_allclose(apply(x), expected, rtol=1e-5, atol=1e-5)
    assert "dot_general" in str(jax.make_jaxpr(apply)(x))
