"""Cells of a plan in PyTorch: each a process that trains a strategy with a seed and tests it, one on each core."""

import concurrent.futures
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np


def cells(fusions: Sequence[str], seeds: int, steps: int, rows: int, arrays: str) -> tuple[dict[str, Any], Any]:
    """A contender: with both modalities, and with each alone, as the plan has."""
    cores = sorted(os.sched_getaffinity(0))
    jobs = [(fusion, seed) for seed in range(seeds) for fusion in (*fusions, "image", "text")]

    def run(numbered: tuple[int, tuple[str, int]]) -> float:
        number, (fusion, seed) = numbered
        command = [sys.executable, "-m", __name__, fusion, str(seed), str(steps), arrays]
        core = cores[number % len(cores)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True,
                              preexec_fn=lambda: os.sched_setaffinity(0, {core}))  # fmt: skip
        return float(done.stdout)

    def one_round() -> float:
        start = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(len(cores)) as pool:
            list(pool.map(run, enumerate(jobs)))
        return (time.perf_counter() - start) / len(jobs)

    run((0, jobs[0]))
    return {"cells": len(jobs)}, one_round


def train(fusion: str, seed: str, steps: str, path: str) -> float:
    """Trains a cell and returns its test accuracy."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    from experiments.benchmark.peers import torch_networks, torch_peer

    torch.set_num_threads(1)
    torch.manual_seed(int(seed))
    with np.load(path, allow_pickle=False) as file:
        data = dict(file)

    def split(name: str) -> tuple[Any, ...]:
        arrays = {key: data[f"{name}/{key}"] for key in ("image", "text", "mask", "label")}
        return torch_peer.tensors(arrays, channels_last=True)

    network = torch_peer.network("quickstart")
    if fusion != "co_attention":
        network.fusion = {
            "concat": torch_networks.Concat, "cross_attention": torch_networks.CrossAttention,
            "image": torch_networks.Alone, "text": torch_networks.Alone,
        }[fusion](64)  # fmt: skip
        if fusion in ("image", "text"):
            network.fusion.modality = fusion
    network = network.to(memory_format=torch.channels_last)
    adam = torch_peer.optimizer(network, 1.5e-3, 0.98, fused=True)
    rows = split("train")
    for step in range(int(steps)):
        taken = torch.randint(len(rows[0]), (64,), generator=torch.Generator().manual_seed(step))
        *inputs, label = (x[taken] for x in rows)
        adam.zero_grad(set_to_none=True)
        F.cross_entropy(network(*inputs), label).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        adam.step()
    network.eval()
    with torch.inference_mode():
        *inputs, label = split("test")
        return float((network(*inputs).argmax(1) == label).float().mean())


if __name__ == "__main__":
    print(train(*sys.argv[1:]))
