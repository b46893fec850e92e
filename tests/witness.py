"""Records the results of training runs, so that two versions of the package can be compared value by value.

    python -m tests.witness BEFORE.json            # in a checkout of one version
    python -m tests.witness AFTER.json --against=BEFORE.json   # in a checkout of the other

Run it from the repository's root. It uses only the command line of `experiments.train` and the files of a run, not the
package, which may change in between. Cases that the file already contains are skipped, so an interrupted recording can
be continued. Cases with manually downloaded archives need `--archives`. Programs are recompiled each time unless
`JAX_COMPILATION_CACHE_DIR` is set.

A different order of summation changes bits; a case is `close` if no value differs by more than 1e-6. A case is
`rounding` if larger differences have only this cause: the gradient of a bias before batch normalisation consists of
rounding errors, which Adam scales to full steps, and running means, which lag behind, make them visible in validation.
Such a bias may differ by any amount, and validation by up to 1e-2.
"""

import argparse
import concurrent.futures
import hashlib
import importlib.metadata
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.witness_cases import Case, Changes, cases
from tests.witness_comparison import TOLERANCE, compare, compare_cases, report_lines

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 1800  # seconds
CLOCK = re.compile(r"second|time")  # in the names of timings
# The same for both versions, and half the compilation time.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
QUICK = (
    "--xla_cpu_parallel_codegen_split_count=1 --xla_cpu_use_fusion_emitters=false "
    "--xla_llvm_disable_expensive_passes=true"
)
READING = threading.Lock()  # Orbax reads are not thread-safe

Record = dict[str, Any]
Train = Callable[[list[str], int], tuple[int, str]]  # flags, devices -> exit status, stderr


# Running


def environment(devices: int) -> dict[str, str]:
    """Returns the environment variables of every run, in addition to this process's."""
    quick = f"{QUICK} " if importlib.metadata.version("jax").startswith("0.10.") else ""
    return {**ENVIRONMENT, "XLA_FLAGS": f"{quick}--xla_force_host_platform_device_count={devices}"}


def train_in_process(flags: list[str], devices: int) -> tuple[int, str]:
    """Runs `python -m experiments.train` in a subprocess."""
    process = subprocess.run(
        [sys.executable, "-m", "experiments.train", *flags],
        cwd=ROOT, env={**os.environ, **environment(devices)}, capture_output=True, text=True, timeout=TIMEOUT,
        check=False,
    )  # fmt: skip
    return process.returncode, process.stderr


def flags_of(config: str, changes: Changes, workdir: Path) -> list[str]:
    """Returns the flags of a run; `config` is like `quickstart:fusion=concat`."""
    name, colon, arg = config.partition(":")
    overrides = [f"--config.{path}={value}" for path, value in changes.items() if value is not None]
    return [f"--config=configs/{name}.py{colon}{arg}", f"--workdir={workdir}", *overrides]


def record_case(case: Case, folder: Path, data_paths: Changes, train: Train = train_in_process) -> Record:
    """Runs a case and returns its record.

    Args:
      case: the case.
      folder: an empty directory for the runs.
      data_paths: config values of the data directories, by path.
      train: function that runs the command line.
    """
    filled = lambda text: text.replace("{before}", str(folder / "before")) if isinstance(text, str) else text  # noqa: E731
    for name, (config, changes) in case.before.items():
        status, stderr = train(flags_of(config, {**changes, **data_paths}, folder / "before" / name), case.devices)
        if status:
            raise RuntimeError(f"{case.name}: the run before it ended with status {status}: {stderr[-2000:]}")
    changes = {path: filled(value) for path, value in {**case.changes, **data_paths}.items()}
    flags = lambda workdir: flags_of(filled(case.config), changes, workdir)  # noqa: E731
    status, stderr = train(flags(folder / "run"), case.devices)
    record = read_run(folder / "run", status, stderr)
    if case.resume and not status:
        shutil.copytree(folder / "run", folder / "resumed")
        forget_after(folder / "resumed", case.resume)
        status, stderr = train(flags(folder / "resumed"), case.devices)
        record["resumed"] = read_run(folder / "resumed", status, stderr)
    return record


def forget_after(workdir: Path, step: int) -> None:
    """Changes a run's files to those after a kill right after a step was saved."""
    (workdir / "result.json").unlink()
    for checkpoint in (workdir / "checkpoints").iterdir():
        if checkpoint.name.isdigit() and int(checkpoint.name) > step:
            shutil.rmtree(checkpoint)
    if not (workdir / "checkpoints" / str(step)).is_dir():
        raise RuntimeError(f"{workdir} has no checkpoint of step {step} to continue from")


# Reading a run's files


def read_run(workdir: Path, status: int, stderr: str) -> Record:
    """Returns a record of a run as JSON values.

    `train` and `valid` contain a list per metric, `result` values by path, and `state` the shape, dtype, digest, sum
    and norm of each array of the newest checkpoint.
    """
    record: Record = {"status": status, "error": _last_line(stderr.replace(f"{workdir}", "RUN")) if status else ""}
    metrics = workdir / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    for split in ("train", "valid"):
        record[split] = columns([flat(line) for line in lines if line["split"] == split])
    result = workdir / "result.json"
    record["result"] = facts(json.loads(result.read_text())) if result.exists() else {}
    record["state"] = read_state(workdir / "checkpoints")
    return record


def columns(lines: list[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Returns a list per name, with None for lines without it; timings are excluded."""
    names = dict.fromkeys(name for line in lines for name in line if not CLOCK.search(name) and name != "split")
    return {name: [line.get(name) for line in lines] for name in names}


def facts(result: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the scores and the facts about run and data in `result.json`, by path."""
    names = ("valid", "test", "parameters", "best_step", "skipped", "spikes", "rollbacks", "steps", "data", "device")
    return flat({name: result[name] for name in names if name in result})


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Returns nested JSON values by path; an empty list or object is a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    inner = {key: one for name, x in items for key, one in flat(x, f"{path}/{name}" if path else str(name)).items()}
    return inner or {path: value}


def read_state(checkpoints: Path) -> dict[str, list[Any]]:
    """Returns `describe` of each array of the newest checkpoint; empty if there is no checkpoint."""
    steps = [int(one.name) for one in checkpoints.iterdir() if one.name.isdigit()] if checkpoints.is_dir() else []
    if not steps:
        return {}
    items = [item for item in (checkpoints / str(max(steps))).iterdir() if (item / "_METADATA").exists()]
    (item,) = items  # the item with arrays, whatever its name
    with READING:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        import jax
        import orbax.checkpoint as ocp

        with ocp.StandardCheckpointer() as checkpointer:
            state = checkpointer.restore(item.absolute())
        leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): describe(np.asarray(leaf)) for path, leaf in leaves}


def describe(array: np.ndarray) -> list[Any]:
    """Returns an array's shape, dtype, digest of its bytes, and sum and Euclidean norm in float64."""
    digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]
    values = array.astype(np.float64)
    return [list(array.shape), str(array.dtype), digest, float(values.sum()), float(np.linalg.norm(values.ravel()))]


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def load(path: Path) -> dict[str, Any]:
    """Returns a recording, or an empty one if the file does not exist."""
    return json.loads(path.read_text()) if path.exists() else {"environment": describe_environment(), "cases": {}}


def save(path: Path, recording: Mapping[str, Any]) -> None:
    """Writes a recording atomically, with one line per case."""
    rows = [f"{json.dumps(name)}: {json.dumps(record)}" for name, record in recording["cases"].items()]
    text = f'{{"environment": {json.dumps(recording["environment"])},\n"cases": {{\n' + ",\n".join(rows) + "\n}}\n"
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_text(text)
    unfinished.replace(path)


def describe_environment() -> dict[str, str]:
    """Returns the versions and variables that two recordings should share, and the commit."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint")
    versions = {name: importlib.metadata.version(name) for name in packages}
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {**environment(1), **versions, "python": sys.version.split()[0], "commit": git.stdout.strip()}


def record_all(path: Path, selected: list[Case], data_paths: Changes, jobs: int, folder: Path) -> bool:
    """Runs the cases that a recording does not contain, and returns whether all succeeded."""
    recording, lock, failed = load(path), threading.Lock(), []
    missing = [case for case in selected if case.name not in recording["cases"]]

    def record(index: int, case: Case) -> None:
        start, workdir = time.monotonic(), folder / re.sub(r"\W+", "-", case.name)
        try:
            result = record_case(case, workdir, data_paths)
        except Exception as error:
            failed.append(case.name)
            print(f"[{index}/{len(missing)}] {case.name}: NOT RECORDED: {error}", flush=True)
            return
        finally:
            shutil.rmtree(workdir, ignore_errors=True)
        losses = result["train"].get("loss") or [math.nan]
        with lock:
            recording["cases"][case.name] = result
            save(path, recording)
        summary = (
            f"status {result['status']}: {result['error']}" if result["status"] else f"loss {losses[0]} to {losses[-1]}"
        )
        resumed = result.get("resumed")
        if resumed is not None:
            summary += f"; resumed {report_lines('', compare_cases(without(result, 'resumed'), resumed))[0].strip()}"
        print(f"[{index}/{len(missing)}] {case.name}: {time.monotonic() - start:.0f} s, {summary}", flush=True)

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        list(pool.map(record, range(1, len(missing) + 1), missing))
    return not failed


def without(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns a mapping without one key."""
    return {key: value for key, value in values.items() if key != name}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="the recording, which is continued if it exists")
    parser.add_argument("--only", action="append", help="cases whose name contains this; may be repeated")
    parser.add_argument("--against", type=Path, help="an earlier recording to compare with")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="relative tolerance of `close`")
    parser.add_argument("--no-run", action="store_true", help="only compare existing recordings")
    parser.add_argument("--data-dir", default=os.environ.get("WITNESS_DATA", ""), help="directory of prepared datasets")
    parser.add_argument("--archives", default=os.environ.get("WITNESS_ARCHIVES", ""), help="directory of archives")
    parser.add_argument("--jobs", type=int, default=1, help="number of parallel runs")
    args = parser.parse_args()
    data_paths = {"data.dir": args.data_dir or None, "data.manual_dir": args.archives or None}
    selected = [one for one in cases() if not args.only or any(part in one.name for part in args.only)]
    success = True
    if not args.no_run:
        possible = [one for one in selected if args.archives or not one.archives]
        if len(possible) < len(selected):
            print(f"{len(selected) - len(possible)} cases need --archives and are left out", flush=True)
        with tempfile.TemporaryDirectory(prefix="witness-") as folder:
            success = record_all(args.output, possible, data_paths, args.jobs, Path(folder))
    if args.against:
        success = (
            compare(load(args.against), load(args.output), [one.name for one in selected], args.tolerance) and success
        )
    sys.exit(0 if success else 1)


if __name__ == "__main__":
    main()
