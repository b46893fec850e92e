"""Measures how fast a table with paths of images is read: the first time, against a bare loop of decoding, and again.

`python -m experiments.benchmark.reading [--rows=20000] [--size=32] [--rounds=3] [--output=FILE.json]`

The bare loop opens each file with Pillow and makes it an array, by a pool of as many processes. Both read files that
are in the page cache, and take turns. Memory is that of all processes, of the first and second reading: private pages,
and with the pages of mapped files, which the kernel takes back when others need them.
"""

import concurrent.futures
import csv
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags
from PIL import Image

from experiments import cli

ROWS = flags.DEFINE_integer("rows", 20_000, "rows of the table", lower_bound=100)
SIZE = flags.DEFINE_integer("size", 32, "height and width of the images", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 3, "how often each is measured", lower_bound=1)
OUTPUT = flags.DEFINE_string("output", "", "a JSON file to write; empty: none")
SAMPLE_SECONDS = 0.2  # between samples of memory
LOAD = """
import json, sys, time
from configs import table
from mmfusion import config
from mmfusion.data import dataset
values = table.get_config(f"data={sys.argv[1]},label=label")
with values.unlocked():
    values.data.cache = sys.argv[2]
    values.data.modalities.photo.size = (int(sys.argv[3]),) * 2
start = time.monotonic()
data = dataset.load(config.read(values).data, seed=0)
seconds = time.monotonic() - start
rows = sum(len(split) for split in data.splits.values())
total = sum(int(split.arrays.inputs["photo"][::97].sum()) for split in data.splits.values())
print("RESULT", json.dumps([seconds, rows, total]))
"""


def write_table(folder: Path, rows: int, size: int) -> Path:
    """Writes a CSV file with a label and the path of a PNG file per row; returns its path."""
    random = np.random.default_rng(0)
    base = random.integers(0, 256, (64, size // 8 + 1, size // 8 + 1, 3), np.uint8)
    pictures = [Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC) for pixels in base]
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["photo", "label"])
        for i in range(rows):
            if i % 1000 == 0:
                (folder / f"{i // 1000}").mkdir()
            name = f"{i // 1000}/{i}.png"
            noise = random.integers(0, 8, (size, size, 3), np.uint8)
            Image.fromarray((np.asarray(pictures[i % 64]) & 0xF8) | noise).save(folder / name)
            writer.writerow([name, i % 10])
    return folder / "table.csv"


def decode_bare(paths: Sequence[str]) -> int:
    """Returns the number of bytes of decoded images."""
    return sum(np.asarray(Image.open(path)).nbytes for path in paths)


def bare_seconds(paths: Sequence[str], processes: int) -> float:
    """Returns the time of a pool of processes that decode the files, from before it starts until it ends."""
    chunks = [paths[first : first + 256] for first in range(0, len(paths), 256)]
    start = time.monotonic()
    with concurrent.futures.ProcessPoolExecutor(processes, multiprocessing.get_context("fork")) as pool:
        list(pool.map(decode_bare, chunks))
    return time.monotonic() - start


def load_seconds(table: Path, cache: Path, size: int) -> tuple[float, int, float, float]:
    """Returns the time of `dataset.load` in a process of its own, the rows, and the peaks of memory in GB."""
    command = [sys.executable, "-c", LOAD, str(table), str(cache), str(size)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        private, mapped = 0.0, 0.0
        while process.poll() is None:
            now = [memory(pid) for pid in descendants(process.pid)]
            private, mapped = max(private, sum(p for p, _ in now)), max(mapped, sum(m for _, m in now))
            time.sleep(SAMPLE_SECONDS)
        output = process.stdout.read() if process.stdout else ""
    if process.returncode:
        sys.exit(output or "the process failed")
    seconds, rows, _ = json.loads(re.findall("RESULT (.*)", output)[0])
    return seconds, rows, private, mapped


def descendants(root: int) -> list[int]:
    """Returns a process and its descendants."""
    found = [root]
    for pid in found:
        try:
            found += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        except OSError:
            continue  # it has ended
    return found


def memory(pid: int) -> tuple[float, float]:
    """Returns the private pages of a process, and its share of all, in GB."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0.0, 0.0
    kilobytes = {name: int(value) for name, value in re.findall(r"^(\w+): +(\d+) kB", text, re.MULTILINE)}
    return (kilobytes["Pss_Anon"]) / 1e6, kilobytes["Pss"] / 1e6


def main(argv: Sequence[str]) -> None:
    cli.parse(argv)
    processes = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        print(f"writing {ROWS.value:,} images of {SIZE.value} x {SIZE.value} pixels", flush=True)
        table = write_table(folder, ROWS.value, SIZE.value)
        paths = [str(folder / f"{i // 1000}/{i}.png") for i in range(ROWS.value)]
        bare_seconds(paths, processes)  # reads the files into the page cache
        bare, first, second, peaks = [], [], [], []
        for _ in range(ROUNDS.value):
            bare.append(bare_seconds(paths, processes))
            shutil.rmtree(folder / "cache", ignore_errors=True)
            for times in (first, second):
                seconds, _, *peak = load_seconds(table, folder / "cache", SIZE.value)
                times.append(seconds)
                peaks.append(peak)
    result = {
        "rows": ROWS.value, "size": SIZE.value, "processes": processes, "bare_seconds": bare, "first_seconds": first,
        "second_seconds": second, "rate_ratio": float(np.median(bare) / np.median(first)),
        "peak_private_gb": max(p for p, _ in peaks), "peak_gb": max(m for _, m in peaks),
    }  # fmt: skip
    for name, times in (("bare loop", bare), ("first reading", first), ("second reading", second)):
        spread = f"{min(times):.2f} to {max(times):.2f} s"
        print(f"{name:15} {np.median(times):7.2f} s ({spread}), {ROWS.value / np.median(times):9,.0f} rows/s")
    print(f"first reading / bare loop: {result['rate_ratio']:.2f} of its rate, with {processes} processes")
    print(f"peak memory: {result['peak_private_gb']:.2f} GB private, {result['peak_gb']:.2f} GB with mapped files")
    if OUTPUT.value:
        Path(OUTPUT.value).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    cli.run(main)
