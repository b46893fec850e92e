"""From starting a process: to an imported package, to the first step, and through a whole run of one step."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.benchmark import networks
from experiments.benchmark.contender import Contender, Options
from experiments.benchmark.rows import OURS, Comparison, Goal


def comparisons(options: Options, folder: Path) -> Iterator[Comparison]:
    """Yields the rows of this group."""
    ours, torch = "experiments.benchmark.start", "experiments.benchmark.peers.torch_peer"
    yield Comparison(
        "import mmfusion and its train", "s",
        (Contender(OURS, f"{ours}:imported", fresh=True), Contender("jax alone", f"{ours}:imported_jax", fresh=True),
         Contender("torch alone", f"{torch}:imported", peer=True, fresh=True)),
        (Goal(1.2),),
    )  # fmt: skip
    step = {"network": "quickstart", "size": 64}
    for name, goals in (("warm", (Goal(2.5),)), ("cold", ())):
        yield Comparison(
            f"process to first step of the quickstart, {name}", "s",
            (Contender(OURS, f"{ours}:first_step", {**step, "cold": name == "cold"}, fresh=True),
             Contender("torch eager", f"{torch}:first_step", step, peer=True, fresh=True)),
            goals,
        )  # fmt: skip
    argv = ("--config=configs/quickstart.py", "--config.steps=1", "--config.batch_size=64",
            f"--config.data.train=train[:{options.size(48_000, 500)}]")  # fmt: skip
    yield Comparison(
        "a run of one step of the quickstart, warm", "s",
        (Contender(OURS, f"{ours}:one_step_run", {"argv": argv}),), (Goal(5.0),),
    )  # fmt: skip


def imported() -> tuple[dict[str, Any], Any]:
    """A contender that is ready once `mmfusion.train` can be called."""
    import mmfusion

    return {"function": repr(mmfusion.train)}, float


def imported_jax() -> tuple[dict[str, Any], Any]:
    """A contender that is ready once JAX is imported."""
    import jax

    return {"jax": jax.__version__}, float


def first_step(network: str, size: int, cold: bool) -> tuple[dict[str, Any], Any]:
    """A contender that is ready once it has initialised, compiled and taken a step; `cold`: without cached programs."""
    from experiments import cli

    cli.prepare_worker()
    import jax
    import numpy as np

    if cold:
        jax.config.update("jax_enable_compilation_cache", False)
    setup = networks.setup(network, size)
    state, call = setup.init_state(0), setup.compile_train_step()
    batch = setup.partitioner.put_batch(networks.as_batch(networks.batches(network, size, 1)[0]))
    _, metrics = call(state, (batch,), setup.partitioner.replicate(np.array([1e-3], np.float32)))
    return {"losses": [float(metrics["loss"][0])]}, float


def one_step_run(argv: list[str]) -> tuple[dict[str, Any], Any]:
    """A contender: each round is the command `train` in a new process and a new directory."""
    import subprocess
    import sys
    import tempfile
    import time

    def one_round() -> float:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "experiments.train", *argv, f"--workdir={folder}/run"]
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            return time.perf_counter() - start

    one_round()  # fills the cache of compiled programs
    return {}, one_round
