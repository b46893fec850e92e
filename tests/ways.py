"""Trains and evaluates the synthetic run with different partitionings, whose results must agree.

The command `python -m tests.ways OUTPUT.npz WAY...` runs them in a process with other devices or with other hosts:
`--host=I --hosts=N --port=P` for one of several hosts, and `--storage=URL` for emulated buckets.
"""

import argparse
import contextlib
import errno
import functools
import json
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from orbax.checkpoint import CheckpointManager

from mmfusion.config import defaults
from mmfusion.data import pipeline
from mmfusion.data.dataset import Dataset
from mmfusion.distributed import hosts, mesh, sharding
from mmfusion.errors import Preempted
from mmfusion.training import loop
from mmfusion.training.evaluation import collect, score
from mmfusion.training.run import read_calls
from mmfusion.training.setup import TrainSetup, build_setup, shared_setups
from mmfusion.training.state import TrainState
from tests import spoiled, storage, synthetic, tiny

STEPS = 5
ROWS = {"train": 200, "valid": 45, "test": 45}  # training spans more than one epoch; no evaluation batch is full
SCORES = ("loss", "accuracy", "auroc", "ece", "examples")
CONCAT = {"fusion": "concat", "model.encoders.text.tokens": "mean"}
PARTLY = {**CONCAT, "steps": 4, "partly": True}
BATCH_NORM = {**CONCAT, "model.encoders.image.norm": "batch"}
LOOP = {**CONCAT, "log_every": 1, "eval_every": 2, "checkpoint_every": 1, "data.max_bad_fraction": 0.5}
# Differences from one device with `pmap` and one step per call: config changes, and
#   scanned: loops are compiled as scans;
#   attempts: (devices, last step) of each attempt, which resumes the previous one;
#   partly: two tasks, of which rows have both labels, one, or none;
#   blended: gradient blending with one head per modality;
#   failing: number of checkpoint saves that fail;
#   spoiled: updates whose weights are NaN on the first host at the first read;
#   bucket: the run is in a bucket, and the newest checkpoint is corrupted before each further attempt.
WAYS: dict[str, dict[str, Any]] = {
    "pmap": {"parallel.mode": "pmap"},
    "jit": {"parallel.mode": "jit"},
    "mesh": {"parallel.mode": "jit", "parallel.mesh.fsdp": 2, "parallel.mesh.model": 2},
    "concat accumulated scanned": {**CONCAT, "steps": 4, "optim.accumulate": 4, "scanned": True},
    "concat": {**CONCAT, "steps": 4},
    "concat accumulated": {**CONCAT, "steps": 4, "optim.accumulate": 2},
    "concat two a call": {**CONCAT, "steps": 4, "parallel.steps_per_call": 2},
    "concat four a call scanned": {**CONCAT, "steps": 4, "parallel.steps_per_call": 4, "scanned": True},
    "weighted": {**CONCAT, "steps": 4, "data.weight_feature": "importance"},
    "weighted accumulated": {**CONCAT, "steps": 4, "data.weight_feature": "importance", "optim.accumulate": 2},
    "partly labelled": PARTLY,
    "partly labelled accumulated": {**PARTLY, "optim.accumulate": 4},
    "batch norm": BATCH_NORM,
    "batch norm jit": {**BATCH_NORM, "parallel.mode": "jit"},
    "loop": LOOP,
    "loop 1 2 1": {**LOOP, "attempts": ((1, 2), (2, 4), (1, STEPS))},
    "loop failing": {**LOOP, "failing": 2},
    "loop going back": {
        **LOOP,
        "recovery.max_consecutive_bad_steps": 2,
        "recovery.rollbacks": 1,
        "recovery.lr_factor": 1.0,
        "spoiled": (3, 4),
    },
    "loop in a bucket": {**LOOP, "attempts": ((0, 3), (0, STEPS)), "bucket": True},
    "loop blended": {**LOOP, "blended": True},
    "loop blended fsdp": {**LOOP, "blended": True, "parallel.mode": "jit", "parallel.mesh.fsdp": 2},
}


def run(way: str, folder: Path) -> dict[str, np.ndarray]:
    """Returns the results of a partitioning: parameters and statistics by path, losses, ids, scores.

    Args:
      way: a key of `WAYS`; a `loop` runs `mmfusion.training.loop.train`.
      folder: the parent directory of the run of a `loop`.
    """
    changes = {"steps": STEPS, "model.dtype": "float32", **WAYS[way]}
    fusion, scanned = changes.pop("fusion", "cross_attention"), changes.pop("scanned", False)
    blended, attempts = changes.pop("blended", False), changes.pop("attempts", ((0, STEPS),))
    failing, bucket = changes.pop("failing", 0), changes.pop("bucket", False)
    partly = changes.pop("partly", False)
    updates = {step for step in changes.pop("spoiled", ()) if jax.process_index() == 0}
    config = synthetic.config(changes, fusion)
    if partly:
        partly_labelled(config)
    if blended:
        with config.unlocked():
            config.objectives.gradient_blending = defaults.objective("gradient_blending")
    dataset = synthetic.dataset(config, ROWS, in_memory="loop" not in way)
    platform = mock.patch.object(mesh.Partitioner, "platform", "tpu" if scanned else "cpu")
    with platform, mock.patch.object(sharding, "MIN_SIZE", 1):  # so that these small arrays are sharded
        if "loop" in way:
            saves = mock.patch.object(CheckpointManager, "save", Failing(CheckpointManager.save, failing))
            batches = mock.patch.object(pipeline, "train_batches", spoiled.train_batches(updates, times=1))
            with saves, batches:
                return _loop(config, dataset, epath.Path("gs://bucket" if bucket else folder) / way, attempts)
        return _steps(config, dataset, build_setup(config, dataset))


def partly_labelled(config: ConfigDict) -> ConfigDict:
    """Returns a config of `synthetic` with two tasks, of which its rows have both labels, one, or none."""
    with config.unlocked():
        config.data.targets.label.feature = "sparse"
        config.data.targets.amount = defaults.target("regression", "amount", weight=0.5)
    return config


def _steps(config: ConfigDict, dataset: Dataset, setup: TrainSetup) -> dict[str, np.ndarray]:
    k = max(1, config.parallel.steps_per_call)
    initial_share = share(setup.init_sharded(config.seed))
    state, run_train = setup.init_state(config.seed), setup.compile_train_step()
    learning_rates = setup.partitioner.replicate(np.full(k, config.optim.learning_rate, np.float32))
    losses, ids = [], []
    for batches, devices in read_calls(dataset.splits["train"], config, setup, first=0, k=k):
        state, metrics = run_train(state, devices, learning_rates)
        losses += jax.device_get(metrics["loss"]).tolist()
        ids += [batch.id for batch in batches]
    leaves = jax.tree_util.tree_leaves_with_path({"params": state.params, "batch_stats": state.batch_stats})
    result = {jax.tree_util.keystr(path): setup.partitioner.to_host(x) for path, x in leaves}
    rows = collect(setup.compile_eval_step(), state, dataset.splits["test"], setup, batch_size=config.batch_size)
    scores = score(rows, setup.tasks)
    scores = {name.removeprefix("label/"): value for name, value in scores.items()}
    return result | {
        "held": np.array([initial_share, share(state)]),
        "losses": np.array(losses),
        "ids": np.array(ids),
        "evaluated": rows["id"],
        "scores": np.array([scores[name] for name in SCORES]),
    }


def share(state: TrainState) -> float:
    """Returns the fraction of a state's bytes on one device."""
    leaves = jax.tree.leaves(state)
    return sum(x.addressable_shards[0].data.nbytes for x in leaves) / sum(x.nbytes for x in leaves)


def _loop(
    config: ConfigDict, dataset: Dataset, workdir: epath.Path, attempts: tuple[tuple[int, int], ...]
) -> dict[str, np.ndarray]:
    """Trains in the loop on streamed data, and records the rows that this host reads."""
    rows_read = []
    for split in dataset.splits.values():
        object.__setattr__(split, "source", RecordingRows(split.source, rows_read if split.name == "train" else []))
    with mock.patch("mmfusion.training.loop.datasets.load", lambda *_, **__: dataset):
        for devices, last in attempts[:-1]:
            tiny.put(config, "parallel.devices", devices)
            stopping = mock.patch.object(
                mesh.Partitioner, "should_stop", lambda _, stop, step, k, last=last: step >= last
            )
            with stopping, contextlib.suppress(Preempted):
                loop.train(config, workdir)
            if "://" in str(workdir) and not jax.process_index():
                newest = workdir / "checkpoints" / str(last) / "meta" / "metadata"
                newest.write_text(newest.read_text().replace("step", "stop"))
            hosts.barrier()
        tiny.put(config, "parallel.devices", attempts[-1][0])
        result = loop.train(config, workdir)
    hosts.barrier()  # until the primary host has written all files
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {
        "examples": np.array([line["ids"] for line in lines if "ids" in line]),
        "losses": np.array([line["loss"] for line in lines]),
        "weights": np.array([line.get("weight/joint", 1) for line in lines if "grad_norm" in line]),
        "scores": np.array([result["test"][name] for name in SCORES]),
        "best": np.array(result["best_step"]),
        "rollbacks": np.array(result["rollbacks"]),
        "read": np.array(sorted(rows_read)),
    }


class Failing:
    """A manager's `save` that fails with a full disk the first few times."""

    def __init__(self, save: Any, times: int):
        self.save, self.times = save, times

    def __get__(self, manager: CheckpointManager, _: type) -> Any:
        return functools.partial(self, manager)

    def __call__(self, manager: CheckpointManager, *args: Any, **kwargs: Any) -> bool:
        if self.times:
            self.times -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.save(manager, *args, **kwargs)


class RecordingRows(list):
    """Rows that record the indices of reads."""

    def __init__(self, rows: list[Any], reads: list[int]):
        super().__init__(rows)
        self.reads = reads

    def __getitem__(self, index: int) -> Any:
        self.reads.append(index)
        return super().__getitem__(index)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("ways", nargs="+", choices=WAYS)
    for name in ("host", "hosts", "port"):
        parser.add_argument(f"--{name}", type=int, default=0)
    parser.add_argument("--storage", default="")
    args = parser.parse_args()
    if args.hosts:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{args.port}", args.hosts, args.host)
    with storage.asked_by_clients(args.storage), shared_setups():
        results = {way: run(way, args.output.parent) for way in args.ways}
    np.savez(args.output, **{f"{way}/{name}": x for way, result in results.items() for name, x in result.items()})


if __name__ == "__main__":
    main()
