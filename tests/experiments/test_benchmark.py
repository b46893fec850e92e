"""The benchmark: contenders in processes, rows and their goals, growth, the report. No time is asserted."""

import json
import os
import sys

import numpy as np
import pytest
from PIL import Image

from experiments.benchmark import float64, gpu, growth, limits, networks, report, rows
from experiments.benchmark.contender import NOT_MEASURED, Contender, Options, measure
from experiments.benchmark.rows import OURS, Goal

HERE = "tests.experiments.test_benchmark"
OPTIONS = Options(cores=(0,), rounds=3, quick=True)


def counting(start):
    """A contender whose rounds are start, start + 1, ..., and that prints what is no part of the protocol."""
    print("a library's greeting")
    numbers = iter(range(start, start + 9))
    return {"losses": [0.5, 0.25], "cores": sorted(os.sched_getaffinity(0))}, lambda: float(next(numbers))


def failing():
    raise ValueError("no such network")


@pytest.mark.process
def test_contenders_take_turns_in_processes_and_a_failure_stops_no_other():
    contenders = [
        Contender(OURS, f"{HERE}:counting", {"start": 3}),
        Contender("peer", f"{HERE}:counting", {"start": 6}, peer=True),
        Contender("broken", f"{HERE}:failing"),
        Contender("fresh", f"{HERE}:counting", {"start": 0}, fresh=True),
    ]
    found = measure(contenders, OPTIONS)
    assert found[OURS]["values"] == [3, 4, 5] and found[OURS]["facts"] == {"losses": [0.5, 0.25], "cores": [0]}
    assert found[OURS]["peak_mb"] > 5
    assert found["peer"] == {"values": [], "error": NOT_MEASURED}
    assert found["broken"]["error"] == "status 1: ValueError: no such network" and not found["broken"]["values"]
    assert len(found["fresh"]["values"]) == 3 and found["fresh"]["facts"] == found[OURS]["facts"]
    with_peers = measure(contenders[:2], Options(cores=(0,), peers=sys.executable, rounds=1))
    assert with_peers["peer"]["values"] == [6]


def row(ours, **others):
    columns = {name.replace("_", " "): {"values": values} for name, values in {OURS: ours, **others}.items()}
    goals = (Goal(1.5, ("one", "two")), Goal(1.0, ("absent",)), Goal(2.0))
    return rows.row("a step", "ms a step", columns, goals, limit=0.5)


def test_goals_are_judged_against_the_fastest_of_those_named():
    made = row([1.0, 2.0, 4.0], one=[3.0], two=[2.9], three=[1.0])
    assert [goal["reached"] for goal in made["goals"]] == [False, NOT_MEASURED, True]
    assert [goal["text"] for goal in made["goals"]] == ["≥ 1.5× one and two", "≥ 1× absent", "≤ 2 ms"]
    assert rows.best(made["columns"]) == "three" and rows.ratio(made["columns"], "one") == 1.5
    assert row([1.0], one=[3.0], two=[1.5])["goals"][0]["reached"] is True


def test_report_marks_what_falls_short_and_what_was_not_measured(tmp_path):
    short, unmeasured = row([2.0, 3.0], one=[3.0], absent=[9.0]), rows.row("b", "s", {OURS: {"values": []}}, (Goal(1),))
    fast = rows.row("c", "s", {OURS: {"values": [1.0]}}, (Goal(2.0),))
    columns = {"49": {"values": [1.0]}, "98": {"values": [4.0]}, "196": {"values": [16.0]}}
    group = {
        "rows": [short, unmeasured, fast, growth.series("merged, tokens", "ms", columns)], "cores": [0, 1],
        "seconds": 9.0, "peers": {"torch": "2.13.0"},
        "command": "python -m experiments.benchmark", "processor": "a processor",
        "environment": {
            "versions": dict.fromkeys(("python", "jax", "flax", "optax", "numpy"), "1.0"),
            "commit": {"id": "0123456789abcdef", "dirty": True},
        },
    }  # fmt: skip
    report.write({"steps": group}, tmp_path)
    text = (tmp_path / "BENCHMARK.md").read_text()
    assert "| a step | ms a step | 2.5 ± 20% | 3 (one) | 1.20 | 20% |" in text and text.count("| **short** |") == 1
    assert "| c | s | 1 |  |  |  | ≤ 2 s |  |" in text
    assert f"| b | s | {NOT_MEASURED} |  |  |  | ≤ 1 s | {NOT_MEASURED} |" in text
    assert "| merged, tokens | 1 | 4 | 16 | 2.00 | 2.00 |" in text
    assert "cores 0, 1; python 1.0" in text and "torch 2.13.0; commit 0123456789ab with changes." in text
    assert "ViT-B/16 + BERT-base + cross-attention: ms a step" in text and text.count(NOT_MEASURED) > len(gpu.ROWS)
    for name in ("ratios.png", "growth.png"):
        pixels = np.asarray(Image.open(tmp_path / "benchmark" / name).convert("L"))
        assert 0.003 < (pixels < 200).mean() < 0.5, name  # neither blank nor black


def test_exponents_are_those_of_a_power_law():
    found = growth.exponent([(x, 3 * x**1.5) for x in (49.0, 100.0, 400.0, 1024.0)])
    np.testing.assert_allclose([found["all"], found["last"]], 1.5)
    assert growth.exponent([(1.0, 2.0)]) is None


def test_flops_are_those_of_products_convolutions_and_every_trip_of_a_loop():
    import jax
    import jax.numpy as jnp

    a, b = jnp.ones((3, 5)), jnp.ones((5, 5))
    assert limits.count_flops(lambda a, b: jnp.sin(a @ b), a, b) == 2 * 3 * 5 * 5
    assert limits.count_flops(lambda a, b: jax.lax.scan(lambda x, _: (x @ b, None), a, length=7), a, b) == 7 * 150
    x, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 4))

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    forward = 2 * (2 * 8 * 8 * 4) * 27
    assert limits.count_flops(convolve, x, kernel) == forward


def test_batches_are_the_same_in_every_process_and_padded():
    first, again = (networks.batches("quickstart", 4, 2)[1] for _ in range(2))
    np.testing.assert_array_equal(first["image"], again["image"])
    assert first["mask"].sum() < first["mask"].size and (first["text"][~first["mask"]] == 0).all()


@pytest.mark.parametrize("layer", ["attention", "lstm"])
def test_float64_references_agree_with_the_layers(layer):
    params, apply, inputs = gpu.make_layer(layer, "float32", 2, 6)
    expected = getattr(float64, layer)(networks.flat(params), *map(np.asarray, inputs))
    np.testing.assert_allclose(np.asarray(apply(params, *inputs)), expected, atol=2e-5)


def test_gpu_table_shows_what_was_measured():
    results = {"device": "a GPU", "jax": "1", "rows": {"peak": 700.0, "mfu": {"ms": 9.0, "stated": 0.5}},
               "errors": {"replicas": "RuntimeError: no memory"}}  # fmt: skip
    text = report.accelerator_text(results)
    assert "TFLOP/s | 700 |" in text and "| ms 9, stated 0.5 |" in text and "| RuntimeError: no memory |" in text
    assert f"article step, batch 128, float32, 1 a call, ms | {NOT_MEASURED} |" in text


@pytest.mark.thorough
@pytest.mark.process
def test_gpu_script_runs_on_a_cpu_with_tiny_sizes(tmp_path):
    import subprocess

    from tests.processes import ROOT

    environment = {**os.environ, "OUT": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    path = f"{os.path.dirname(sys.executable)}:{environment['PATH']}"
    subprocess.run(["bash", ROOT / "experiments/benchmark/gpu.sh", "--tiny"], env={**environment, "PATH": path},
                   check=True, cwd=tmp_path)  # fmt: skip
    found = json.loads((tmp_path / "BENCHMARK_GPU.json").read_text())
    assert not found["errors"] and found["rows"].keys() >= {"correct", "peak", "mfu", "replicas", "memory"}
    assert found["rows"]["replicas"]["difference"] < 1e-3


@pytest.mark.thorough
@pytest.mark.parametrize("network", networks.NETWORKS)
def test_torch_peer_computes_the_same_losses(network, tmp_path):
    pytest.importorskip("torch")
    from experiments.benchmark import steps
    from experiments.benchmark.peers import torch_peer

    arguments = {"network": network, "size": 8, "parameters": str(tmp_path / "parameters.npz"), "seconds": 0.0}
    ours, _ = steps.step(**arguments)
    theirs, _ = torch_peer.step(**arguments, variant="eager")
    if network == "article":
        np.testing.assert_allclose(theirs["losses"], ours["losses"], rtol=1e-5)
    # AdamW's first step hardly depends on a gradient's size, so that rounding of those near 0 grows from there.
    np.testing.assert_allclose(theirs["losses"][:2], ours["losses"][:2], rtol=3e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("layer", ["lstm", "gru", "attention"])
def test_torch_peer_computes_the_same_layer_and_gradients(layer, tmp_path):
    pytest.importorskip("torch")
    from experiments.benchmark import steps
    from experiments.benchmark.peers import torch_peer

    arguments = {"layer": layer, "parameters": str(tmp_path / "parameters.npz"), "seconds": 0.0}
    ours, _ = steps.layer(**arguments)
    theirs, _ = torch_peer.layer(**arguments, variant="eager")
    np.testing.assert_allclose(theirs["losses"], ours["losses"], rtol=1e-4)


@pytest.mark.process
def test_benchmark_refuses_unknown_groups_cores_and_interpreters(command, tmp_path):
    for flag, message in (
        ("--rows=stepps", "error: --rows='stepps': no such group"), ("--cores=99", "error: --cores='99': no such core"),
        ("--peers=/nowhere/python", "is not a Python interpreter"), ("--output=/nowhere", "there is no such folder"),
    ):  # fmt: skip
        process = command("experiments.benchmark", flag)
        assert process.returncode == 2 and message in process.stderr, process.stderr
