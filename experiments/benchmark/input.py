"""Input: batches of rows in memory, streamed records of PNG images, and loading a prepared dataset."""

import itertools
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmark.contender import Contender, Options, timed_items
from experiments.benchmark.rows import OURS, Comparison, Goal

BATCH, BATCHES, CHUNK = 64, 100, 256
LOADER = "torch DataLoader"


def comparisons(options: Options, folder: Path) -> Iterator[Comparison]:
    """Yields the rows of this group."""
    arguments = {"folder": str(folder), "rows": options.size(20_000, 500), "batches": options.size(BATCHES, 5)}
    ours, peers = "experiments.benchmark.input", "experiments.benchmark.peers.loaders"
    yield Comparison(
        "batches of 64 rows in memory", "µs a row",
        (Contender(OURS, f"{ours}:in_memory", arguments), Contender("bare gather", f"{ours}:gather", arguments),
         Contender(LOADER, f"{peers}:in_memory", arguments, peer=True)),
        (Goal(0.7, ("bare gather",)), Goal(1.5, (LOADER,))), 1e6,
    )  # fmt: skip
    for workers in (0, 2):
        streamed = {**arguments, "workers": workers}
        yield Comparison(
            f"streamed PNG records, workers={workers}", "µs a row",
            (Contender(OURS, f"{ours}:streamed", streamed), Contender("bare decode", f"{ours}:decode", arguments),
             Contender(LOADER, f"{peers}:streamed", streamed, peer=True)),
            (Goal(1.5, (LOADER,)), Goal(0.7, ("bare decode",))), 1e6,
        )  # fmt: skip
    yield Comparison(
        "loading a prepared dataset for the first time", "µs a row",
        (Contender(OURS, f"{ours}:load_first", arguments),
         Contender("bare read + decode + tokens", f"{ours}:read", arguments)),
        (Goal(0.9, ("bare read + decode + tokens",)),), 1e6,
    )  # fmt: skip
    every = {"rows": options.size(48_000, 500)}
    yield Comparison(
        "loading 50,000 rows again", "s", (Contender(OURS, f"{ours}:load_again", every),), (Goal(1.0),)
    )  # fmt: skip


def config(rows: int, **changes: Any) -> Any:
    """Returns the data section of the quickstart with so many training rows."""
    from configs import quickstart
    from mmfusion import config as configs

    made = quickstart.get_config()
    with made.unlocked():
        made.data.train = f"train[:{rows}]"
        for key, value in changes.items():
            made.data[key] = value
    return configs.read(made).data


def in_memory(folder: str, rows: int, batches: int) -> tuple[dict[str, Any], Any]:
    """A contender; it saves its arrays for the others."""
    from mmfusion.data import dataset

    split = dataset.load(config(rows), seed=0, splits=("train",)).splits["train"]
    arrays: Any = split.arrays
    np.savez(Path(folder) / "arrays.npz", image=arrays.inputs["image"], text=arrays.inputs["text"],
             mask=arrays.mask["text"], label=arrays.targets["label"])  # fmt: skip
    return {"rows": len(split)}, batches_of(split, 0, batches)


def streamed(folder: str, rows: int, batches: int, workers: int) -> tuple[dict[str, Any], Any]:
    """A contender; it saves its records for the others."""
    from mmfusion.data import dataset
    from mmfusion.data import rows as row_sequences

    split = dataset.load(config(rows, memory_gb=0.0, cache="off"), seed=0, splits=("train",)).splits["train"]
    assert split.arrays is None
    records = list(row_sequences.iterate(split.source, split.ids))
    images = [record["image"] for record in records]
    (Path(folder) / "records.bin").write_bytes(b"".join(images))
    np.save(Path(folder) / "offsets.npy", np.cumsum([0, *map(len, images)]))
    vocabulary = split.reader.fitted["text"].get_vocab()
    others = {"text": [str(r["sentence"]) for r in records], "label": [int(r["label"]) for r in records]}
    (Path(folder) / "records.json").write_text(json.dumps({"vocabulary": vocabulary, **others}, default=bytes.decode))
    return {"rows": len(split)}, batches_of(split, workers, batches)


def batches_of(split: Any, workers: int, count: int) -> Any:
    """Returns a round: seconds a row of so many batches of one endless iterator."""
    from mmfusion.data import pipeline

    endless = pipeline.train_batches(split, seed=0, batch_size=BATCH, first=0, last=10**9, workers=workers)
    one_batch = timed_items(endless, count)
    return lambda: one_batch() / BATCH


def gather(folder: str, rows: int, batches: int) -> tuple[dict[str, Any], Any]:
    """A contender: the rows of a permutation taken from the same arrays, and nothing else."""
    with np.load(Path(folder) / "arrays.npz", allow_pickle=False) as file:
        arrays = dict(file)
    positions = np.random.default_rng(0).permutation(len(arrays["label"]))

    def one_round() -> float:
        start = time.perf_counter()
        for i in range(batches):
            taken = positions[np.arange(i * BATCH, (i + 1) * BATCH) % len(positions)]
            _ = {name: array[taken] for name, array in arrays.items()}
        return (time.perf_counter() - start) / (batches * BATCH)

    return {}, one_round


def decode(folder: str, rows: int, batches: int) -> tuple[dict[str, Any], Any]:
    """A contender: PNG images in memory decoded into arrays, and nothing else."""
    content, offsets = (
        (Path(folder) / "records.bin").read_bytes(),
        np.load(Path(folder) / "offsets.npy", allow_pickle=False),
    )
    images = [content[a:b] for a, b in itertools.pairwise(offsets[: BATCH * 8 + 1].tolist())]

    def one_round() -> float:
        start = time.perf_counter()
        for i in range(batches):
            _decode([images[(i * BATCH + j) % len(images)] for j in range(BATCH)])
        return (time.perf_counter() - start) / (batches * BATCH)

    return {}, one_round


def _decode(images: list[bytes]) -> np.ndarray:
    import io

    from PIL import Image

    result = np.empty((len(images), 32, 32, 3), np.uint8)
    for i, image in enumerate(images):
        result[i] = Image.open(io.BytesIO(image))
    return result


def load_first(folder: str, rows: int, batches: int) -> tuple[dict[str, Any], Any]:
    """A contender: each round loads a copy of the prepared dataset that nothing was kept of."""
    from mmfusion.data import dataset

    prepared = dataset.load(config(rows), seed=0, splits=("train",))  # prepares it, imports and compiles
    home = _home()

    def one_round() -> float:
        with tempfile.TemporaryDirectory() as copied:
            shutil.copytree(home, Path(copied) / "shapes")
            start = time.perf_counter()
            dataset.load(config(rows, dir=copied), seed=0, splits=("train",))
            return (time.perf_counter() - start) / len(prepared.splits["train"])

    return {}, one_round


def _home() -> Path:
    from mmfusion.data.preparation import prepared_builder

    return Path(prepared_builder("shapes/match", "", "").data_dir).parents[1]


def read(folder: str, rows: int, batches: int) -> tuple[dict[str, Any], Any]:
    """A contender: the stored records read, their images decoded and their texts split into ids."""
    from mmfusion.data import rows as row_sequences
    from mmfusion.data import sources, text

    source = sources.open_source("shapes/match", f"train[:{rows}]", data_dir="", manual_dir="", seed=0)
    records = list(row_sequences.iterate(source.rows, np.arange(min(rows, 500))))
    tokenizer = text.train_tokenizer([text.as_string(r["sentence"]) for r in records], "word", 100)

    def one_round() -> float:
        start, ids = time.perf_counter(), np.arange(len(source.rows))
        for first in range(0, len(ids), CHUNK):
            chunk = list(row_sequences.iterate(source.rows, ids[first : first + CHUNK]))
            _decode([record["image"] for record in chunk])
            tokenizer.encode_batch([text.as_string(record["sentence"]) for record in chunk])
        return (time.perf_counter() - start) / len(ids)

    return {}, one_round


def load_again(rows: int) -> tuple[dict[str, Any], Any]:
    """A contender: loads both splits as a second run does."""
    from mmfusion.data import dataset

    loaded = dataset.load(config(rows), seed=0)

    def one_round() -> float:
        start = time.perf_counter()
        dataset.load(config(rows), seed=0)
        return time.perf_counter() - start

    return {"rows": sum(map(len, loaded.splits.values()))}, one_round
