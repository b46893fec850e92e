"""The training loop against its compiled step: the overhead of reading, transferring and logging."""

import itertools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmark.contender import Contender, Options
from experiments.benchmark.rows import OURS, Comparison, Goal


def comparisons(options: Options, folder: Path) -> Iterator[Comparison]:
    """Yields the row of this group."""
    arguments = {"steps": options.size(150, 4), "rows": options.size(8000, 200)}
    yield Comparison(
        "loop of the quickstart", "ms a step",
        (Contender(OURS, f"{__name__}:loop", arguments), Contender("bare step", f"{__name__}:bare", arguments)),
        (Goal(0.97, ("bare step",)),), 1e3,
    )  # fmt: skip


def config(steps: int, rows: int) -> Any:
    """Returns the quickstart with so many steps, no validation before the last."""
    from configs import quickstart

    made = quickstart.get_config()
    with made.unlocked():
        made.steps = made.eval_every = made.checkpoint_every = steps
        made.data.train = f"train[:{rows}]"
    return made


def loop(steps: int, rows: int) -> tuple[dict[str, Any], Any]:
    """A contender: each round is a run; the value is a step's seconds in its loop, without compiling and testing."""
    from experiments import cli

    cli.prepare_worker()
    from mmfusion import config as configs
    from mmfusion.data import dataset as datasets
    from mmfusion.training.loop import train

    made = config(steps, rows)
    dataset = datasets.load(configs.read(made).data, seed=made.seed)

    def one_round() -> float:
        with tempfile.TemporaryDirectory() as folder:
            return made.batch_size / train(made, Path(folder) / "run", dataset=dataset)["examples_per_second"]

    one_round()
    return {}, one_round


def bare(steps: int, rows: int) -> tuple[dict[str, Any], Any]:
    """A contender: the compiled step on one resident batch of the same data."""
    from experiments import cli

    cli.prepare_worker()
    import jax

    from mmfusion import config as configs
    from mmfusion.data import dataset as datasets
    from mmfusion.data import pipeline
    from mmfusion.training.setup import build_setup

    made = config(steps, rows)
    dataset = datasets.load(configs.read(made).data, seed=made.seed)
    setup = build_setup(made, dataset)
    state, call = setup.init_state(made.seed), setup.compile_train_step()
    batches = pipeline.train_batches(dataset.splits["train"], seed=0, batch_size=made.batch_size, first=0, last=1)
    resident = (setup.partitioner.put_batch(next(batches)),)
    rates = setup.partitioner.replicate(np.array([1e-3], np.float32))

    def one_round() -> float:
        nonlocal state
        start = time.perf_counter()
        for _ in itertools.repeat(None, steps):
            state, metrics = call(state, resident, rates)
        jax.block_until_ready(metrics)
        return (time.perf_counter() - start) / steps

    one_round()
    return {}, one_round
