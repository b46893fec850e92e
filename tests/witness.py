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
import dataclasses
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
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.witness_cases import Case, Changes, cases

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 1e-6  # relative
FLOOR = 1e-3  # smallest denominator of relative differences: float32 sums near one have no more digits
LAGGING = 1e-2  # tolerance of validation if `noise` finds biases with gradients of rounding errors
NOISE = 1e-6  # gradients with a smaller root mean square are rounding errors: all other arrays have at least 1e-6
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


# Comparing

ROUNDING_ONLY = "rounding alone"  # the part of a record with rounding differences only
VALIDATED = ("valid", "scores", "batch_stats")  # the parts affected by them


@dataclasses.dataclass
class Comparison:
    """Differences of a case between two recordings.

    Attributes:
      noise: names of parameters, without `params/`, whose gradients are rounding errors, see `noise`.
      equal: whether all values in both recordings are bit-identical.
      worst: part of the record -> largest relative difference, and its location.
      wrong: differences that no tolerance allows.
      warnings: names that only one recording has, and differences of descriptive values.
    """

    noise: frozenset[str] = frozenset()
    equal: bool = True
    worst: dict[str, tuple[float, str]] = dataclasses.field(default_factory=dict)
    wrong: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)

    def fits(self, tolerance: float, *, rounding: bool = True) -> bool:
        """Returns whether `wrong` is empty and all differences are within the tolerance.

        Args:
          tolerance: relative tolerance.
          rounding: whether to allow differences caused by `noise`.
        """
        allowed = {ROUNDING_ONLY: math.inf, **dict.fromkeys(VALIDATED, LAGGING)} if rounding and self.noise else {}
        return not self.wrong and all(
            worst <= max(tolerance, allowed.get(part.removeprefix("resumed "), 0.0))
            for part, (worst, _) in self.worst.items()
        )

    def number(self, part: str, before: Any, after: Any, where: str, *, floor: float = FLOOR) -> None:
        """Records the difference of two numbers; None is a non-finite number."""
        if same(before, after):
            return
        self.equal = False
        self._record_worst(part, relative(before, after, floor), where)

    def array(self, part: str, before: list[Any], after: list[Any], where: str) -> None:
        """Records the difference of two arrays, given by `describe`."""
        if list(before[:3]) == list(after[:3]):
            return
        self.equal = False
        if list(before[:2]) != list(after[:2]):
            self.wrong.append(f"{where} was {before[1]}{before[0]} and is {after[1]}{after[0]}")
            return
        if re.sub(r"^params/|.*/(mu|nu)/", "", where) in self.noise:
            part = ROUNDING_ONLY
        # The Cauchy-Schwarz bound of the sum; the sum itself may be small because terms cancel.
        largest = max(before[4], after[4]) * math.sqrt(math.prod(before[0]))
        self._record_worst(part, relative(before[3], after[3], max(largest, 1e-12)), f"sum of {where}")
        self._record_worst(part, relative(before[4], after[4], 1e-12), f"norm of {where}")

    def exact(self, before: Any, after: Any, where: str) -> None:
        """Records values that must be equal."""
        if before != after:
            self.equal = False
            self.wrong.append(f"{where} was {_short(before)} and is {_short(after)}")

    def only(self, before: Iterable[str], after: Iterable[str], kind: str) -> None:
        """Adds a warning about names in only one of two recordings."""
        for names, when in ((set(before) - set(after), "before"), (set(after) - set(before), "after")):
            if names:
                shown = ", ".join(sorted(names)[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
                self.warnings.append(f"{kind} only {when}: {shown}")

    def _record_worst(self, part: str, difference: float, where: str) -> None:
        if difference > self.worst.get(part, (-1.0, ""))[0]:
            self.worst[part] = (difference, where)


def compare_cases(before: Record, after: Record) -> Comparison:
    """Returns the differences between two records of one case."""
    result = Comparison(noise(before["state"]))
    _compare_runs(result, before, after, "")
    if "resumed" in before and "resumed" in after:
        _compare_runs(result, before["resumed"], after["resumed"], "resumed ")
    return result


def noise(state: Mapping[str, Any]) -> frozenset[str]:
    """Returns the parameters whose gradients are rounding errors, by Adam's second moment."""
    second_moments = {path.split("/nu/")[1]: x for path, x in state.items() if "/nu/" in path}
    small = [name for name, x in second_moments.items() if x[3] <= NOISE**2 * math.prod(x[0])]
    # Exactly zero means an unused parameter, not a rounding error.
    return frozenset(name for name in small if second_moments[name][3] > 0)


def _compare_runs(result: Comparison, before: Record, after: Record, kind: str) -> None:
    result.exact(before["status"], after["status"], f"{kind}exit status")
    if before["error"] != after["error"]:
        result.warnings.append(f"error was {before['error']!r} and is {after['error']!r}")
    for split in ("train", "valid"):
        _compare_series(result, before[split], after[split], kind + split)
    _compare_facts(result, before["result"], after["result"], kind)
    _compare_states(result, before["state"], after["state"], kind)


def _compare_series(result: Comparison, before: Mapping[str, Any], after: Mapping[str, Any], part: str) -> None:
    result.only(before, after, f"metrics of {part}")
    steps = before.get("step", [])
    result.exact(steps, after.get("step", []), f"steps of {part}")
    for name in [name for name in before if name in after]:
        if len(before[name]) != len(after[name]):
            continue  # reported by the steps
        if name in ("ids", "step"):
            result.exact(before[name], after[name], f"{part} {name}")
            continue
        for step, one, other in zip(steps, before[name], after[name], strict=True):
            result.number(part, one, other, f"{name} of step {step}")


def _compare_facts(result: Comparison, before: Mapping[str, Any], after: Mapping[str, Any], kind: str) -> None:
    result.only(before, after, f"{kind}results")
    for name in [name for name in before if name in after]:
        one, other = before[name], after[name]
        if name.startswith(("data/name", "data/fingerprint", "data/rows", "data/content", "device")):
            if one != other:
                result.warnings.append(f"{name} was {one} and is {other}")
        elif name.startswith(("valid/", "test/")):
            result.number(f"{kind}scores", one, other, name)
        else:
            result.exact(one, other, f"{kind}{name}")


def _compare_states(result: Comparison, before: Mapping[str, Any], after: Mapping[str, Any], kind: str) -> None:
    """Compares arrays by path, and renamed arrays of the optimizer state by their parameter."""
    result.only(before, after, f"{kind}arrays")
    gone, new = sorted(set(before) - set(after)), sorted(set(after) - set(before))
    renamed = {_parameter_key(path): path for path in new}
    pairs = {path: path for path in before if path in after}
    pairs |= {path: renamed[_parameter_key(path)] for path in gone if _parameter_key(path) in renamed}
    for path, new_path in pairs.items():
        result.array(kind + path.split("/")[0], before[path], after[new_path], path)
    # Other removed arrays must exist under a new name with the same content if they are parameters or optimizer state.
    digests = {after[path][2] for path in new}
    for path in [path for path in gone if path not in pairs and before[path][2] not in digests]:
        if path.startswith(("params/", "opt_state/")):
            result.equal = False
            result.wrong.append(f"{kind}{path} is gone, and no new array is the same")
        else:
            result.warnings.append(f"{kind}{path} is gone, and no new array is the same")


def _parameter_key(path: str) -> str:
    found = re.search(r"/(mu|nu|trace)/.*", path)  # Adam and Lion, or momentum
    return found[0] if found else path


def same(one: Any, other: Any) -> bool:
    """Returns whether two JSON values are equal, with NaN equal to itself."""
    return one == other or (one != one and other != other)


def relative(one: Any, other: Any, floor: float) -> float:
    """Returns the difference relative to the larger number or `floor`; infinite if one is None or not finite."""
    if not all(isinstance(x, (int, float)) and math.isfinite(x) for x in (one, other)):
        return 0.0 if same(one, other) else math.inf
    return abs(one - other) / max(abs(one), abs(other), floor)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 80 else f"{text[:77]}..."


def report_lines(name: str, comparison: Comparison, tolerance: float = TOLERANCE) -> list[str]:
    """Returns the lines of the report on a case."""
    fit = next(
        kind
        for kind, applies in (
            ("equal", comparison.equal),
            ("close", comparison.fits(tolerance, rounding=False)),
            ("rounding", comparison.fits(tolerance)),
            ("DIFFERENT", True),
        )
        if applies
    )
    worst = "  ".join(f"{part} {value:.1e}" for part, (value, _) in comparison.worst.items())
    lines = [f"{fit:9}  {name}  {worst}".rstrip()]
    lines += [f"           {part}: {value:.2e} in {where}" for part, (value, where) in comparison.worst.items()]
    lines += [f"           wrong: {line}" for line in comparison.wrong]
    return lines + [f"           warning: {line}" for line in comparison.warnings]


def compare(
    before: Mapping[str, Any], after: Mapping[str, Any], selected: Iterable[str], tolerance: float = TOLERANCE
) -> bool:
    """Prints the differences between two recordings, and returns whether they agree within the tolerance."""
    selected = list(selected)
    for key in sorted({*before["environment"], *after["environment"]} - {"commit"}):
        if before["environment"].get(key) != after["environment"].get(key):
            old, new = (one["environment"].get(key) for one in (before, after))
            print(f"warning: {key} was {old!r} and is {new!r}")
    counts, agreed = dict.fromkeys(("equal", "close", "rounding", "DIFFERENT"), 0), True
    for name in selected:
        if name in before["cases"] and name in after["cases"]:
            comparison = compare_cases(before["cases"][name], after["cases"][name])
            lines = report_lines(name, comparison, tolerance)
            counts[lines[0].split()[0]] += 1
            agreed = agreed and comparison.fits(tolerance)
            print("\n".join(lines))
    for one, other, when in ((before, after, "before"), (after, before, "after")):
        for name in [name for name in selected if name in one["cases"] and name not in other["cases"]]:
            print(f"warning: only {when}: {name}")
    print(", ".join(f"{count} {kind}" for kind, count in counts.items()), "to within", tolerance)
    return agreed


# The command


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
