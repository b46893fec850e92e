"""The loop against the bare step: what reading, gathering, transferring and logging cost together."""

import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from configs import quickstart
from mmfusion.data import dataset as datasets
from mmfusion.data import pipeline
from mmfusion.training.loop import train
from mmfusion.training.setup import build_setup

STEPS, ROUNDS = 150, 5


def loop_overhead() -> list[dict[str, Any]]:
    """Returns a row: examples/s of the training loop, and of the compiled step alone on one resident batch.

    The two alternate in one process, and the ratio is of the medians over the rounds.
    """
    config = quickstart.get_config()
    with config.unlocked():
        config.steps = config.eval_every = config.checkpoint_every = STEPS
    dataset = datasets.load(config.data, seed=config.seed)
    loop, bare = [], []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(ROUNDS):
            loop.append(train(config, Path(folder) / str(i))["examples_per_second"])
            bare.append(_bare(config, dataset))
    ours, reference = float(np.median(loop)), float(np.median(bare))
    return [
        {
            "name": "loop_overhead", "ours": ours, "reference": reference, "unit": "examples/s",
            "ratio": ours / reference, "goal": ">= 0.95", "loop": loop, "bare": bare,
        }
    ]  # fmt: skip


def _bare(config: Any, dataset: datasets.Dataset) -> float:
    setup = build_setup(config, dataset)
    state, call = setup.init_state(config.seed), setup.train_step()
    batch = next(pipeline.train_batches(dataset.splits["train"], seed=0, batch_size=config.batch_size, first=0, last=1))
    resident, rates = (setup.partitioner.put_batch(batch),), setup.partitioner.replicate(np.array([1e-3], np.float32))
    state, metrics = call(state, resident, rates)
    jax.block_until_ready(metrics)
    began = time.monotonic()
    for _ in range(STEPS):
        state, metrics = call(state, resident, rates)
    jax.block_until_ready(metrics)
    return STEPS * config.batch_size / (time.monotonic() - began)
