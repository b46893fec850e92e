"""Prediction of 1 and of 256 rows by a trained run of the quickstart, from pixels and a sentence to probabilities."""

import json
import pickle
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmark import networks
from experiments.benchmark.contender import Contender, Options, timed
from experiments.benchmark.rows import OURS, Comparison, Goal

PEERS = ("torch eager", "onnxruntime")


def comparisons(options: Options, folder: Path) -> Iterator[Comparison]:
    """Yields the rows of this group."""
    for count, bound in ((1, 1.0), (256, 1.2)):
        arguments = {"folder": str(folder), "count": count, "seconds": options.seconds}
        peers = [
            Contender(name, "experiments.benchmark.peers.prediction:predict",
                      {**arguments, "runtime": name.split()[0]}, peer=True)
            for name in PEERS
        ]  # fmt: skip
        ours = Contender(OURS, f"{__name__}:predict", {**arguments, "rows": options.size(8000, 500)})
        yield Comparison(
            f"predict {count} row{'s' * (count > 1)}", "ms", (ours, *peers), (Goal(bound, ("torch eager",)),), 1e3
        )


def predict(folder: str, count: int, seconds: float, rows: int) -> tuple[dict[str, Any], Any]:
    """A contender: `mmfusion.load(run).predict`. It saves the parameters, the vocabulary and the rows for the peers."""
    from experiments import cli

    cli.prepare_worker()
    import mmfusion

    changes = {"steps": 1, "eval_every": 1, "checkpoint_every": 1, "data.train": f"train[:{rows}]"}
    with tempfile.TemporaryDirectory() as workdir:
        mmfusion.train("configs/quickstart.py", f"{workdir}/run", changes=changes)
        model = mmfusion.load(f"{workdir}/run")
        state = model._run.state  # the public `params` leave out the running statistics of batch normalisation
        arrays = networks.flat(state.params) | networks.flat(state.batch_stats)
        np.savez(Path(folder) / "run.npz", **arrays)
        vocabulary = model._run.dataset.reader.fitted["text"].get_vocab()
        (Path(folder) / "vocabulary.json").write_text(json.dumps(vocabulary))
        random = np.random.default_rng(0)
        given = [
            {"image": random.integers(0, 256, (32, 32, 3), np.uint8), "text": "the red circle is above the blue square"}
            for _ in range(count)
        ]
        (Path(folder) / f"rows{count}.pickle").write_bytes(pickle.dumps(given))
        probabilities = model.predict(given, calibrated=False).probabilities
        run = timed(lambda: model.predict(given, calibrated=False), seconds)
        return {"losses": [float(probabilities[0, 1]), float(probabilities[:, 1].mean())]}, run
