"""Benchmark of the training loop against the compiled step: the overhead of reading, transferring and logging."""

import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from configs import quickstart
from mmfusion import config as configs
from mmfusion.data import dataset as datasets
from mmfusion.data import pipeline
from mmfusion.training.loop import train
from mmfusion.training.setup import build_setup

STEPS, ROUNDS = 150, 5


def loop_overhead() -> list[dict[str, Any]]:
    """Returns one row: examples per second of the training loop, and of the compiled step on one resident batch.

    The two alternate in one process; the ratio is that of the medians over rounds.
    """
    config = quickstart.get_config()
    with config.unlocked():
        config.steps = config.eval_every = config.checkpoint_every = STEPS
    dataset = datasets.load(configs.read(config).data, seed=config.seed)
    loop, step = [], []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(ROUNDS):
            loop.append(train(config, Path(folder) / str(i))["examples_per_second"])
            step.append(_step_rate(config, dataset))
    ours, reference = float(np.median(loop)), float(np.median(step))
    return [
        {
            "name": "loop_overhead", "ours": ours, "reference": reference, "unit": "examples/s",
            "ratio": ours / reference, "goal": ">= 0.95", "loop": loop, "bare": step,
        }
    ]  # fmt: skip


def _step_rate(config: Any, dataset: datasets.Dataset) -> float:
    setup = build_setup(config, dataset)
    state, call = setup.init_state(config.seed), setup.compile_train_step()
    batch = next(pipeline.train_batches(dataset.splits["train"], seed=0, batch_size=config.batch_size, first=0, last=1))
    resident, rates = (setup.partitioner.put_batch(batch),), setup.partitioner.replicate(np.array([1e-3], np.float32))
    state, metrics = call(state, resident, rates)
    jax.block_until_ready(metrics)
    start = time.monotonic()
    for _ in range(STEPS):
        state, metrics = call(state, resident, rates)
    jax.block_until_ready(metrics)
    return STEPS * config.batch_size / (time.monotonic() - start)
