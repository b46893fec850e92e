"""Measures one accelerator: correctness first, then step times, attention, LSTM, utilisation, replicas and memory.

`python -m experiments.benchmark.gpu --output=FILE.json` (or `gpu.sh`, which finds the packages). `--tiny` takes small
sizes, to check it on a CPU. Each result is written as soon as it is there. `python -m experiments.benchmark` shows the
file as part of `BENCHMARK.md`.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmark import float64, networks
from experiments.benchmark.contender import NOT_MEASURED

DTYPES = ("float32", "bfloat16")
SEEDS, CALLS = 32, (1, 8)
STEPS = {"article": 128, "quickstart": 64, "easy_vqa": 64, "resnet18": 32}
# Dense bfloat16 operations a second that the makers state, by a part of the device's name.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L4": 121e12, "TPU v4": 275e12, "TPU v5 lite": 197e12}
ROWS = {
    "correct": "largest difference from float64, relative",
    **{f"step/{name}/{dtype}/{k}": f"{name} step, batch {size}, {dtype}, {k} a call, ms"
       for name, size in STEPS.items() for dtype in DTYPES for k in CALLS},
    **{f"{layer}/{dtype}": f"{layer}, {dtype}: ours, torch, ms" for layer in ("attention", "lstm") for dtype in DTYPES},
    "peak": "matrix product, bfloat16, TFLOP/s",
    "mfu": "ViT-B/16 + BERT-base + cross-attention: ms a step, FLOPs utilisation of the stated and the measured peak",
    "replicas": f"{SEEDS} seeds as one program: times as fast as one after another, largest difference of a loss",
    "memory": "peak memory so far on the device, MB, after each of the above",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="gpu.json")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", default="", help="groups, separated by commas")
    parser.add_argument("--seconds", type=float, default=420.0, help="after so many, nothing new is begun")
    args = parser.parse_args()
    from experiments import cli

    cli.prepare_worker()
    import jax

    device = jax.devices()[0]
    made = {"device": device.device_kind, "platform": device.platform, "jax": jax.__version__, "tiny": args.tiny}
    results: dict[str, Any] = {**made, "rows": {}, "errors": {}, "seconds": {}}
    memory, begun = {}, time.monotonic()
    for name, measure in GROUPS.items():
        if args.only and name not in args.only.split(","):
            continue
        start = time.monotonic()
        if start - begun > args.seconds:
            results["errors"][name] = "no time was left"
            continue
        try:
            for row, found in measure(args.tiny):
                results["rows"][row] = found
                print(row, found, flush=True)
        except Exception as error:  # one group that fails does not stop the others
            results["errors"][name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            print(name, results["errors"][name], flush=True)
            if name == "correct":  # wrong results need no times
                break
        finally:
            memory[name] = (device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 1e6
            results["rows"]["memory"] = memory
            results["seconds"][name] = time.monotonic() - start
            Path(args.output).write_text(json.dumps(results, indent=2) + "\n")


def markdown(results: Mapping[str, Any]) -> str:
    """Returns the section of `BENCHMARK.md`; what was not measured says so."""
    from experiments.benchmark.rows import table

    rows, errors = results.get("rows", {}), results.get("errors", {})
    where = f"{results['device']}, jax {results['jax']}" if results else NOT_MEASURED
    cells = []
    for key, title in ROWS.items():
        default = errors.get(key.partition("/")[0], NOT_MEASURED)
        cells.append([title, _shown(rows[key]) if key in rows else default])
    return f"## Accelerator\n\n{where}; `experiments/benchmark/gpu.sh`\n\n" + table(("row", "value"), cells)


def _shown(found: Any) -> str:
    if isinstance(found, Mapping):
        return ", ".join(f"{name} {_shown(value)}" for name, value in found.items())
    return f"{found:.4g}" if isinstance(found, float) else str(found)


def seconds_a_call(run: Callable[[], Any], tiny: bool) -> float:
    """Returns the median seconds of a call over five rounds of about a fifth of a second."""
    import jax

    jax.block_until_ready(run())
    start = time.perf_counter()
    jax.block_until_ready(run())
    count = 1 if tiny else max(3, round(0.2 / max(time.perf_counter() - start, 1e-6)))
    rounds = []
    for _ in range(2 if tiny else 5):
        start = time.perf_counter()
        for _ in range(count):
            result = run()
        jax.block_until_ready(result)
        rounds.append((time.perf_counter() - start) / count)
    return float(np.median(rounds))


def correct(tiny: bool) -> Iterator[tuple[str, Any]]:
    """Yields the differences of attention and an LSTM from float64 in NumPy, and of a step's loss from the CPU's.

    Raises:
      AssertionError: one is too large for its dtype.
    """
    import jax

    differences = {}
    for dtype, bound in (("float32", 2e-5), ("bfloat16", 3e-2)):
        with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
            for layer, reference in (("attention", float64.attention), ("lstm", float64.lstm)):
                params, apply, inputs = make_layer(layer, dtype, 2, 16)
                expected = reference(networks.flat(params), *map(np.asarray, inputs))
                found = np.asarray(apply(params, *inputs), np.float64)
                error = np.abs(found - expected).max() / np.abs(expected).max()
                differences[f"{layer} {dtype}"] = float(error)
                assert error < bound, f"{layer} in {dtype} differs by {error:.2g} from float64"
    with jax.default_matmul_precision("highest"):
        losses = {}
        for platform in ("cpu", jax.devices()[0].platform):
            with jax.default_device(jax.devices(platform)[0]):
                losses[platform] = first_losses("article" if tiny else "quickstart", 8)
    found, expected = (np.array(x) for x in (losses[jax.devices()[0].platform], losses["cpu"]))
    differences["losses of three steps from the CPU"] = float(np.abs(found / expected - 1).max())
    assert differences["losses of three steps from the CPU"] < 1e-3, differences
    yield "correct", differences


def make_layer(layer: str, dtype: str, batch: int, length: int, width: int = 64) -> tuple[Any, Any, tuple]:
    """Returns parameters, a compiled function of them and inputs to the output, and the inputs of a layer."""
    import jax
    import jax.numpy as jnp

    from mmfusion.models.encoders.text import RNN
    from mmfusion.models.layers import Attention

    random = np.random.default_rng(0)
    mask = jnp.asarray(np.arange(length) < random.integers(length // 2, length + 1, batch)[:, None])
    if layer == "attention":
        x = jnp.asarray(random.standard_normal((batch, length, width)), dtype)
        module, inputs = Attention(4, width, jnp.dtype(dtype)), (x, mask)
        call = lambda params, x, mask: module.apply({"params": params}, x, x, mask)[0]  # noqa: E731
        params = module.init(jax.random.key(0), x, x, mask)["params"]
    else:
        x = jnp.asarray(random.integers(2, 100, (batch, length)), jnp.int32)
        module, inputs = RNN(width, 100, dtype=jnp.dtype(dtype)), (x, mask)
        call = lambda params, x, mask: module.apply({"params": params}, x, mask, train=False)[0]  # noqa: E731
        params = module.init(jax.random.key(0), x, mask, train=False)["params"]
    return params, jax.jit(call), inputs


def make_step(network: str, size: int, dtype: str, k: int = 1, seed: int = 0) -> tuple[Any, Any, tuple, Any]:
    """Returns the setup, the state, K batches on the device, and their learning rates."""
    setup = networks.setup(network, size, {"model.dtype": dtype, "parallel.devices": 1})
    host = networks.batches(network, size, k)
    batches = tuple(setup.partitioner.put_batch(networks.as_batch(arrays)) for arrays in host)
    rates = setup.partitioner.replicate(np.full(k, networks.NETWORKS[network]["rate"], np.float32))
    return setup, setup.init_state(seed), batches, rates


def first_losses(network: str, size: int) -> list[float]:
    """Returns the losses of three steps on one batch, on the default device."""
    import jax

    setup = networks.setup(network, size, {"model.dtype": "float32", "parallel.devices": 1, "parallel.mode": "jit"})
    state, batch = setup.init_on_host(0), networks.as_batch(networks.batches(network, size, 1)[0])
    step, losses = jax.jit(setup.step), []
    for _ in range(3):
        state, metrics = step(state, batch, np.float32(1e-3))
        losses.append(float(metrics["loss"]))
    return losses


def steps(tiny: bool) -> Iterator[tuple[str, Any]]:
    """Yields milliseconds a step by network, dtype and steps per call."""
    for name, size in STEPS.items() if not tiny else [("article", 4)]:
        for dtype in DTYPES:
            for k in CALLS if not tiny else CALLS[:1]:
                yield f"step/{name}/{dtype}/{k}", _step_ms(*make_step(name, size, dtype, k), k, tiny)


def _step_ms(setup: Any, state: Any, batches: tuple, rates: Any, k: int, tiny: bool) -> float:
    call = setup.compile_train_step()

    def run() -> Any:
        nonlocal state
        state, metrics = call(state, batches, rates)
        return metrics

    return 1e3 * seconds_a_call(run, tiny) / k


def layers(tiny: bool) -> Iterator[tuple[str, Any]]:
    """Yields milliseconds of attention and an LSTM, forward and backward, of ours and of PyTorch where it is."""
    import jax

    batch, length, width = (2, 16, 64) if tiny else (32, 512, 512)
    for layer in ("attention", "lstm"):
        for dtype in DTYPES:
            sizes = (batch, length, width) if layer == "attention" else (batch, min(length, 64), 64)
            params, call, inputs = make_layer(layer, dtype, *sizes)
            step = jax.jit(jax.grad(lambda p, *x, call=call: call(p, *x).astype("float32").sum()))
            found = {"ours": 1e3 * seconds_a_call(lambda: step(params, *inputs), tiny)}  # noqa: B023
            found["torch"] = _torch_layer(layer, dtype, *sizes, tiny=tiny)
            yield f"{layer}/{dtype}", found


def _torch_layer(layer: str, dtype: str, batch: int, length: int, width: int, *, tiny: bool) -> float | str:
    try:
        import torch

        from experiments.benchmark.peers import torch_networks
    except ImportError:
        return NOT_MEASURED
    if not torch.cuda.is_available() and not tiny:
        return NOT_MEASURED
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if layer == "attention":
        module, mask = torch_networks.Attention(width), torch.ones(batch, length, dtype=torch.bool, device=device)
        x = torch.randn(batch, length, width, device=device, dtype=getattr(torch, dtype))
        inputs: tuple = (x, x, mask)
    else:
        module = torch_networks.Recurrent(width, 100, 64)
        ids = torch.randint(2, 100, (batch, length), device=device)
        inputs = (ids, torch.ones_like(ids, dtype=torch.bool))
    module = module.to(device, getattr(torch, dtype))

    def run() -> None:
        module.zero_grad(set_to_none=True)
        module(*inputs).float().sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()

    return 1e3 * seconds_a_call(run, tiny)


def utilisation(tiny: bool) -> Iterator[tuple[str, Any]]:
    """Yields the rate of a large matrix product, and the step of two large encoders with its FLOPs utilisation."""
    import jax
    import jax.numpy as jnp

    from experiments.benchmark.limits import count_flops

    size = 256 if tiny else 8192
    matrix = jnp.ones((size, size), jnp.bfloat16)
    multiply = jax.jit(lambda x: x @ x)
    peak = 2 * size**3 / seconds_a_call(lambda: multiply(matrix), tiny)
    yield "peak", peak / 1e12
    setup, state, batches, rates = large(tiny)
    operations = count_flops(setup.compile_train_step(), state, batches, rates)
    ms = _step_ms(setup, state, batches, rates, 1, tiny)
    stated = next((value for name, value in PEAKS.items() if name in jax.devices()[0].device_kind), None)
    rate = operations / (ms / 1e3)
    yield "mfu", {"ms": ms, "stated": rate / stated if stated else NOT_MEASURED, "measured": rate / peak}


def large(tiny: bool) -> tuple[Any, Any, tuple, Any]:
    """Returns what `make_step` does for ViT-B/16 + BERT-base + cross-attention on 224×224 images and 128 tokens."""
    from mmfusion.config import defaults
    from mmfusion.training.setup import build_setup

    made = networks.config("resnet18", 1)
    small = {"layers": 1, "hidden": 64, "heads": 2} if tiny else {}
    with made.unlocked():
        made.parallel.devices = 1
        made.model.dtype = "bfloat16"
        made.model.width = 64 if tiny else 768
        made.model.encoders.image = defaults.encoder("image", "vit_b", **small)
        made.model.encoders.text = defaults.encoder("text", "bert", **small, **({"mlp": 64} if tiny else {}))
        made.data.modalities.image.size = (32, 32) if tiny else (224, 224)
        made.data.modalities.text.update({"vocabulary_size": 100 if tiny else 30_522, "length": 16 if tiny else 128})
    setup = build_setup(made, networks.dataset(made, 10))
    rows, side, length = (2, 32, 16) if tiny else (64, 224, 128)
    random = np.random.default_rng(0)
    arrays = {
        "image": random.integers(0, 256, (rows, side, side, 3), np.uint8), "mask": np.ones((rows, length), bool),
        "text": random.integers(2, 100, (rows, length)).astype(np.int32),
        "label": random.integers(0, 10, rows).astype(np.int32),
    }  # fmt: skip
    batches = (setup.partitioner.put_batch(networks.as_batch(arrays)),)
    return setup, setup.init_state(0), batches, setup.partitioner.replicate(np.full(1, 1e-4, np.float32))


def replicas(tiny: bool) -> Iterator[tuple[str, Any]]:
    """Yields how much faster runs of several seeds are as one vmapped program, and how much a loss differs."""
    from mmfusion.models.convolution import as_patches

    count, size = (2, 4) if tiny else (SEEDS, 64)
    setup, _, batches, rates = make_step("article" if tiny else "quickstart", size, "float32")

    def step(*args: Any) -> Any:  # as `training.replicas`, whose imports a plain image lacks
        with as_patches():
            return setup.step(*args)

    single, together = setup.compile_train_step(), setup.partitioner.compile_train(step, replicas=count)
    alone, states = ([setup.init_state(seed) for seed in range(count)] for _ in range(2))  # a step donates its state
    expected, found = [], []
    for _ in range(3):
        results = [single(state, batches, rates) for state in alone]
        alone = [state for state, _ in results]
        expected.append([float(metrics["loss"][0]) for _, metrics in results])
        results = together(tuple(states), (batches,) * count, (rates,) * count)
        states = [state for state, _ in results]
        found.append([float(metrics["loss"][0]) for _, metrics in results])
    difference = float(np.abs(np.array(found) / np.array(expected) - 1).max())

    def one_after_another() -> Any:
        nonlocal alone
        results = [single(state, batches, rates) for state in alone]
        alone = [state for state, _ in results]
        return results[-1][1]

    def as_one() -> Any:
        nonlocal states
        results = together(tuple(states), (batches,) * count, (rates,) * count)
        states = [state for state, _ in results]
        return results[-1][1]

    ratio = seconds_a_call(one_after_another, tiny) / seconds_a_call(as_one, tiny)
    yield "replicas", {"ratio": ratio, "difference": difference}


GROUPS = {"correct": correct, "step": steps, "layers": layers, "mfu": utilisation, "replicas": replicas}

if __name__ == "__main__":
    main()
