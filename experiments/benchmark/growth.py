"""How time and memory grow: with tokens, modalities, streamed examples, devices and processes."""

import dataclasses
import functools
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmark import networks, plan
from experiments.benchmark.contender import Contender, Options, timed
from experiments.benchmark.rows import Goal, median, row, run_contenders

TOKENS, MODALITIES, DEVICES = (49, 100, 196, 400, 676, 1024), (2, 3, 4, 5, 6), (1, 2, 4, 8)
EXAMPLES = (10_000, 100_000, 1_000_000)
FUSIONS = ("cross_attention", "merged_attention", "bottleneck", "perceiver")
BATCH, WIDTH = 8, 64


def measured(options: Options, folder: Path) -> Iterator[dict[str, Any]]:
    """Yields the rows of this group: series, with a column for each x."""
    del folder
    sizes = TOKENS[:: 3 if options.quick else 1]
    for fusion in FUSIONS[: options.size(4, 1)]:
        yield from _series(
            f"{fusion}, tokens of each of two modalities", sizes, options,
            lambda n, fusion=fusion: ("fuse", {"fusion": fusion, "tokens": n, "modalities": 2}),
        )  # fmt: skip
    for fusion in FUSIONS[: options.size(4, 1)]:
        yield from _series(
            f"{fusion}, modalities of 64 tokens", MODALITIES[:: 2 if options.quick else 1], options,
            lambda m, fusion=fusion: ("fuse", {"fusion": fusion, "tokens": 64, "modalities": m}),
        )  # fmt: skip
    counts = EXAMPLES if not options.quick else (1000, 4000)
    yield from _streamed(counts, options)
    devices = DEVICES if not options.quick else (1, 2)
    flag = "--xla_force_host_platform_device_count="
    yield from _series(
        "quickstart step, forced devices", devices, options,
        lambda n: ("step_on_devices", {"size": 64}), lambda n: {"XLA_FLAGS": f"{flag}{n}"},
    )  # fmt: skip
    yield from _series(
        "quickstart step, processes", (1, 2), options, lambda n: ("step_on_hosts", {"size": 64, "hosts": n}),
        lambda n: {"JAX_PLATFORMS": "cpu"},  # with which JAX has collectives between processes
    )  # fmt: skip

    counts = (1, 2, 4, 8) if not options.quick else (1, 2)
    once, cell = (
        dataclasses.replace(options, rounds=1),
        {"steps": options.size(100, 2), "rows": options.size(4000, 300)},
    )
    yield from _series(
        "plan of one strategy, seeds", counts, once,
        lambda n: ("plan:whole_plan", {"fusions": plan.FUSIONS[:1], "seeds": n, **cell}), unit="s",
    )  # fmt: skip
    yield from _series(
        "plan of one seed, strategies", counts, once,
        lambda n: ("plan:whole_plan", {"fusions": plan.FUSIONS[:n], "seeds": 1, **cell}), unit="s",
    )  # fmt: skip


def _series(
    name: str, sizes: Sequence[int], options: Options, of: Any, environment: Any = None, unit: str = "ms"
) -> Iterator[dict[str, Any]]:
    """Yields a row of times, and one of megabytes of temporary arrays if the contenders tell them.

    Args:
      name: of the row; after the comma, what the sizes count.
      sizes: the columns.
      options: how to measure.
      of: size -> the contender's function, in this module or `module:function` of another, and its arguments.
      environment: size -> variables of its process.
      unit: `ms` or `s`.
    """
    contenders = []
    for size in sizes:
        function, arguments = of(size)
        changes = environment(size) if environment else {}
        if ":" in function:
            target = f"experiments.benchmark.{function}"
        else:
            target, arguments = f"{__name__}:{function}", {**arguments, "seconds": options.seconds / 4}
        contenders.append(Contender(str(size), target, arguments, environment=changes))
    results = run_contenders(contenders, options, scale=1e3 if unit == "ms" else 1.0)
    yield series(name, unit, results)
    memory = {
        size: {"values": [result["facts"]["temporary_mb"]]}
        for size, result in results.items() if "temporary_mb" in result.get("facts", {})
    }  # fmt: skip
    if memory:
        yield series(f"temporary memory, {name}", "MB", memory)


def series(name: str, unit: str, columns: dict[str, Any], goals: Sequence[Goal] = ()) -> dict[str, Any]:
    """Returns a row whose columns are sizes, with the exponent of their growth."""
    points = [(float(size), median(column)) for size, column in columns.items() if median(column)]
    return {**row(name, unit, columns, goals), "series": True, "exponent": exponent(points)}


def exponent(points: Sequence[tuple[float, float | None]]) -> dict[str, float] | None:
    """Returns the exponents b of y = a x^b by least squares of the logarithms: of all points, of the last three."""
    if len(points) < 2:
        return None
    x, y = np.log(np.array(points, float).T)
    return {"all": float(np.polyfit(x, y, 1)[0]), "last": float(np.polyfit(x[-3:], y[-3:], 1)[0])}


def fuse(fusion: str, tokens: int, modalities: int, seconds: float) -> tuple[dict[str, Any], Any]:
    """A contender: the gradients of a fusion strategy's features with regard to its parameters and its tokens."""
    from experiments import cli

    cli.prepare_worker()
    import jax
    import jax.numpy as jnp

    from mmfusion.models.fusion import FUSIONS as REGISTRY
    from mmfusion.registry import lookup

    random, names = np.random.default_rng(0), [f"m{i}" for i in range(modalities)]
    given = {name: jnp.asarray(random.standard_normal((BATCH, tokens, WIDTH)), jnp.float32) for name in names}
    mask = {name: jnp.ones((BATCH, tokens), bool) for name in names}
    module = lookup(REGISTRY, fusion, "fusion")(width=WIDTH)
    params = module.init(jax.random.key(0), given, mask, train=False)

    def loss(params: Any, given: Any) -> jax.Array:
        return module.apply(params, given, mask, train=False).features.sum()

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(params, given).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes / 1e6
    return {"temporary_mb": temporary}, timed(lambda: jax.block_until_ready(compiled(params, given)), seconds)


def _streamed(counts: Sequence[int], options: Options) -> Iterator[dict[str, Any]]:
    """Yields the time a row and the peak memory of one pass over so many rows that are not kept."""
    one_pass = dataclasses.replace(options, rounds=1)
    contenders = [Contender(str(n), f"{__name__}:stream", {"examples": n}) for n in counts]
    results = run_contenders(contenders, one_pass, scale=1e6)
    yield series("one pass, streamed examples", "µs a row", results)
    yield series(
        "peak memory of one pass, streamed examples",
        "MB",
        {n: {"values": [result["peak_mb"]]} for n, result in results.items() if "peak_mb" in result},
    )


class Generated:
    """Raw rows that are made when they are read: a vector and a label."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"vector": np.full(16, row % 7, np.float32), "label": row % 2}


def stream(examples: int) -> tuple[dict[str, Any], Any]:
    """A contender: reads every row of one epoch through the input pipeline, in batches of 64."""
    from mmfusion.config import defaults
    from mmfusion.data import pipeline
    from mmfusion.data.decoding import Reader
    from mmfusion.data.modalities import modality_type
    from mmfusion.data.split import Split

    options = defaults.modality("embedding", "vector").to_dict()
    fitted = modality_type("embedding").fit([{"vector": Generated(4)[i]["vector"]} for i in range(4)], options)
    reader = Reader({"vector": options}, {"label": defaults.target("classification", "label").to_dict()}, {"label": 2},
                    {"vector": modality_type("embedding").load(fitted)})  # fmt: skip
    split = Split("train", np.arange(examples), Generated(examples), reader, None, {})

    def one_round() -> float:
        start, steps = time.perf_counter(), examples // 64
        for _ in pipeline.train_batches(split, seed=0, batch_size=64, first=0, last=steps):
            pass
        return (time.perf_counter() - start) / (steps * 64)

    return {}, one_round


def step_on_devices(size: int, seconds: float) -> tuple[dict[str, Any], Any]:
    """A contender: the train step over all devices of this process."""
    from experiments import cli

    cli.prepare_worker()
    import jax

    losses, run = _make_step(size)
    return {"devices": jax.device_count(), "losses": losses}, timed(run, seconds)


def _make_step(size: int) -> tuple[list[float], Any]:
    import jax

    setup = networks.setup("quickstart", size)
    state, call = setup.init_state(0), setup.compile_train_step()
    share, host = size // setup.partitioner.num_hosts, setup.partitioner.host_index
    batches = []
    for arrays in networks.batches("quickstart", size):
        own = jax.tree.map(lambda x: x[host * share : (host + 1) * share], networks.as_batch(arrays))
        batches.append((setup.partitioner.put_batch(own),))
    rate = setup.partitioner.replicate(np.array([1e-3], np.float32))
    losses = []
    for batch in batches:
        state, metrics = call(state, batch, rate)
        losses.append(float(metrics["loss"][0]))

    def run() -> None:
        nonlocal state
        state, metrics = call(state, batches[0], rate)
        jax.block_until_ready(metrics)

    return losses, run


def step_on_hosts(size: int, hosts: int, seconds: float) -> tuple[dict[str, Any], Any]:
    """A contender: the train step of one process, or of this one and another that it starts."""
    from experiments import cli
    from mmfusion.distributed.hosts import initialize

    cli.prepare_worker()
    count = 20
    if hosts == 1:
        losses, run = _make_step(size)
        return {"losses": losses}, functools.partial(_timed_steps, run, count)
    port = _free_port()
    command = [sys.executable, "-c", f"from {__name__} import follow; follow({size}, {port}, {count})"]
    follower = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)
    initialize(f"localhost:{port},0,2")
    losses, run = _make_step(size)

    def one_round() -> float:
        assert follower.stdin
        follower.stdin.write("\n")
        follower.stdin.flush()
        return _timed_steps(run, count)

    return {"losses": losses}, one_round


def follow(size: int, port: int, count: int) -> None:
    """The second of two processes: takes the steps of a round for each line that it reads."""
    from experiments import cli
    from mmfusion.distributed.hosts import initialize

    cli.prepare_worker()
    initialize(f"localhost:{port},1,2")
    _, run = _make_step(size)
    for _ in sys.stdin:
        _timed_steps(run, count)


def _timed_steps(run: Any, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        run()
    return (time.perf_counter() - start) / count


def _free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]
