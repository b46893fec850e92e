"""A plan of strategies and seeds: by the ablation runner, one command after another, and in PyTorch processes."""

import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmark.contender import ROOT, Contender, Options
from experiments.benchmark.rows import OURS, Comparison, Goal

# Twelve strategies of every family; PyTorch has the second list.
FUSIONS = ("concat", "mean", "gmu", "low_rank_tensor", "mlb", "film", "co_attention", "cross_attention",
           "merged_attention", "bottleneck", "perceiver", "late_mean")  # fmt: skip
COMMON = ("concat", "co_attention", "cross_attention")
SEEDS, STEPS = 9, 200


def comparisons(options: Options, folder: Path) -> Iterator[Comparison]:
    """Yields the rows of this group, of which a cell is a training run of 200 steps of the quickstart."""
    sizes = {"steps": options.size(STEPS, 4), "rows": options.size(8000, 300)}
    arrays = str(folder / "cells.npz")
    shared = {"fusions": COMMON[: options.size(3, 1)], "seeds": options.size(3, 1), **sizes}
    yield Comparison(
        f"{len(shared['fusions'])} strategies × {shared['seeds']} seeds", "s a cell",
        (Contender(OURS, f"{__name__}:by_runner", {**shared, "arrays": arrays}),
         Contender("one by one", f"{__name__}:one_by_one", shared),
         Contender("torch processes", "experiments.benchmark.peers.cells:cells",
                   {**shared, "arrays": arrays}, peer=True)),
        (Goal(5.0, ("one by one",)), Goal(1.0, ("torch processes",))),
    )  # fmt: skip
    whole = {"fusions": FUSIONS[: options.size(12, 2)], "seeds": options.size(SEEDS, 1), **sizes}
    yield Comparison(
        f"{len(whole['fusions'])} strategies × {whole['seeds']} seeds", "s a cell",
        (Contender(OURS, f"{__name__}:by_runner", whole),
         Contender("one by one", f"{__name__}:one_by_one", {**whole, "seeds": 1})), (Goal(5.0, ("one by one",)),),
    )  # fmt: skip


def gate(options: Options, folder: Path) -> Iterator[Comparison]:
    """Yields the row of the known-answer gate, which takes many minutes."""
    fusions = "concat" if options.quick else "all"
    yield Comparison(
        "known-answer gate, every strategy", "min", (Contender(OURS, f"{__name__}:run_gate", {"fusions": fusions}),),
        (Goal(15.0),), 1 / 60,
    )  # fmt: skip


def by_runner(
    fusions: Sequence[str], seeds: int, steps: int, rows: int, arrays: str = ""
) -> tuple[dict[str, Any], Any]:
    """A contender: the runner, with a process for each core. It compiles beforehand; a round is the whole plan.

    It saves the decoded splits as `arrays` for the peers.
    """
    from mmfusion.analysis.ablation import plan

    if arrays:
        save_arrays(arrays, rows)
    trials = plan.build(functools.partial(_config, steps, rows), fusions, seeds, {}).trials
    run_plan(trials[: len(trials) // seeds])  # of the first seed
    return {"cells": len(trials)}, lambda: run_plan(trials) / len(trials)


def whole_plan(fusions: Sequence[str], seeds: int, steps: int, rows: int) -> tuple[dict[str, Any], Any]:
    """A contender as `by_runner`, whose value is the whole plan's seconds."""
    facts, seconds_a_cell = by_runner(fusions, seeds, steps, rows)
    return facts, lambda: facts["cells"] * seconds_a_cell()


def run_plan(trials: Sequence[Any]) -> float:
    """Returns the seconds that the runner takes for trials."""
    from experiments import cli
    from mmfusion.analysis.ablation import runner

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        jobs = len(os.sched_getaffinity(0))
        errors = [error for _, error in runner.run(trials, Path(folder), jobs, cli.prepare_worker)]
        assert not any(errors), errors
        return time.perf_counter() - start


def one_by_one(fusions: Sequence[str], seeds: int, steps: int, rows: int) -> tuple[dict[str, Any], Any]:
    """A contender: `experiments.train` for one cell after another."""
    from mmfusion.analysis.ablation import plan

    trials = plan.build(functools.partial(_config, steps, rows), fusions, seeds, {}).trials

    def one_round() -> float:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            for trial in trials:
                _train(trial.config, Path(folder) / trial.name, steps, rows)
        return (time.perf_counter() - start) / len(trials)

    return {"cells": len(trials)}, one_round


def _train(values: Any, folder: Path, steps: int, rows: int) -> None:
    from mmfusion import config as configs

    config = configs.from_json(values)
    arg = f"fusion={config.model.fusion.name},seed={config.seed},modalities={'+'.join(config.data.modalities)}"
    changes = _changes(steps, rows)
    subprocess.run(
        [sys.executable, "-m", "experiments.train", f"--config=configs/quickstart.py:{arg}", f"--workdir={folder}",
         *(f"--config.{key}={value}" for key, value in changes.items())],
        check=True, stdout=subprocess.DEVNULL, cwd=ROOT,
    )  # fmt: skip


def _config(steps: int, rows: int, fusion: str, seed: int, modalities: str) -> Any:
    from configs import quickstart

    given = {"fusion": fusion, "seed": str(seed), "modalities": modalities}
    config = quickstart.get_config(",".join(f"{key}={value}" for key, value in given.items() if value))
    with config.unlocked():
        config.update_from_flattened_dict(_changes(steps, rows))
    return config


def _changes(steps: int, rows: int) -> dict[str, Any]:
    every = {"steps": steps, "eval_every": steps, "checkpoint_every": steps}
    return {**every, "data.train": f"train[:{rows}]", "data.test": f"test[:{min(rows, 1000)}]"}


def run_gate(fusions: str) -> tuple[dict[str, Any], Any]:
    """A contender: the command `gate` with a process for each core; one round."""

    def one_round() -> float:
        jobs, start = len(os.sched_getaffinity(0)), time.perf_counter()
        command = [sys.executable, "-m", "experiments.gate", f"--fusions={fusions}", f"--jobs={jobs}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
        return time.perf_counter() - start

    return {}, one_round


def save_arrays(path: str, rows: int) -> None:
    """Saves the decoded splits of the quickstart for the peers' cells."""
    from mmfusion import config as configs
    from mmfusion.data import dataset as datasets

    made = _config(1, rows, "concat", 0, "")
    arrays = {}
    for name, split in datasets.load(configs.read(made).data, seed=0).splits.items():
        batch: Any = split.arrays
        arrays |= {f"{name}/image": batch.inputs["image"], f"{name}/text": batch.inputs["text"],
                   f"{name}/mask": batch.mask["text"], f"{name}/label": batch.targets["label"]}  # fmt: skip
    np.savez(path, **arrays)
