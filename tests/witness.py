"""Records what training computes, so that two versions of the package can be compared number by number.

    python -m tests.witness BEFORE.json            # in a checkout of the one version
    python -m tests.witness AFTER.json --against=BEFORE.json   # in a checkout of the other

Run from the repository's root. It knows the command line of `experiments.train` and the files that a run leaves, and
nothing of the package, which may change in between. A case that the file has already is not run again, so a recording
that was interrupted continues. What needs archives that were fetched by hand needs `--archives`. Programs are compiled
anew each time unless `JAX_COMPILATION_CACHE_DIR` names a folder.

Where the same sums are taken in another order, bits differ, and a case is `close` as long as no number differs by more
than 1e-6. A case is `rounding` where only this is more: a bias before batch normalisation has a gradient of rounding
errors alone, Adam makes whole steps of them, and running means, which lag behind, let validation see them. Such a bias
may then be anything, and validation may differ by up to 1e-2.
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
FLOOR = 1e-3  # differences of smaller numbers are relative to this: sums of float32 near one have no more digits
LAGGING = 1e-2  # the same of validation, where `noise` finds biases that follow from rounding alone
NOISE = 1e-6  # a root mean square of gradients below it is of rounding errors: the least of any other array is 1e-6
TIMEOUT = 1800  # seconds
CLOCK = re.compile(r"second|time")  # in the names of numbers that the clock says
# The same for both versions: each program does the same work then, and compiles in half the time.
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
READING = threading.Lock()  # Orbax reads for one thread at a time

Record = dict[str, Any]
Train = Callable[[list[str], int], tuple[int, str]]  # flags, devices -> exit status, what it wrote to standard error


# Running


def environment(devices: int) -> dict[str, str]:
    """Returns the variables that every run has beside this process's own."""
    quick = f"{QUICK} " if importlib.metadata.version("jax").startswith("0.10.") else ""
    return {**ENVIRONMENT, "XLA_FLAGS": f"{quick}--xla_force_host_platform_device_count={devices}"}


def train_in_process(flags: list[str], devices: int) -> tuple[int, str]:
    """Runs `python -m experiments.train` by itself."""
    done = subprocess.run(
        [sys.executable, "-m", "experiments.train", *flags],
        cwd=ROOT, env={**os.environ, **environment(devices)}, capture_output=True, text=True, timeout=TIMEOUT,
        check=False,
    )  # fmt: skip
    return done.returncode, done.stderr


def flags_of(config: str, changes: Changes, workdir: Path) -> list[str]:
    """Returns the flags of a run; `config` is like `quickstart:fusion=concat`."""
    name, colon, arg = config.partition(":")
    overrides = [f"--config.{path}={value}" for path, value in changes.items() if value is not None]
    return [f"--config=configs/{name}.py{colon}{arg}", f"--workdir={workdir}", *overrides]


def record_case(case: Case, folder: Path, places: Changes, train: Train = train_in_process) -> Record:
    """Runs a case and returns what it left.

    Args:
      case: what to run.
      folder: an empty one, in which the runs work.
      places: config paths of where the data is.
      train: what runs the command line.
    """
    filled = lambda text: text.replace("{before}", str(folder / "before")) if isinstance(text, str) else text  # noqa: E731
    for name, (config, changes) in case.before.items():
        status, said = train(flags_of(config, {**changes, **places}, folder / "before" / name), case.devices)
        if status:
            raise RuntimeError(f"{case.name}: the run before it ended with status {status}: {said[-2000:]}")
    changes = {path: filled(value) for path, value in {**case.changes, **places}.items()}
    flags = lambda workdir: flags_of(filled(case.config), changes, workdir)  # noqa: E731
    status, said = train(flags(folder / "run"), case.devices)
    record = read_run(folder / "run", status, said)
    if case.resume and not status:
        shutil.copytree(folder / "run", folder / "resumed")
        forget_after(folder / "resumed", case.resume)
        status, said = train(flags(folder / "resumed"), case.devices)
        record["resumed"] = read_run(folder / "resumed", status, said)
    return record


def forget_after(workdir: Path, step: int) -> None:
    """Makes a run look as if it was killed right after it saved a step."""
    (workdir / "result.json").unlink()
    for checkpoint in (workdir / "checkpoints").iterdir():
        if checkpoint.name.isdigit() and int(checkpoint.name) > step:
            shutil.rmtree(checkpoint)
    if not (workdir / "checkpoints" / str(step)).is_dir():
        raise RuntimeError(f"{workdir} has no checkpoint of step {step} to continue from")


# Reading what a run left


def read_run(workdir: Path, status: int, said: str) -> Record:
    """Returns a record of a run: JSON values.

    `train` and `valid` have a list for each metric, `result` numbers by path, `state` for each array of the newest
    checkpoint its shape, dtype, digest, sum and norm.
    """
    record: Record = {"status": status, "error": _last_line(said.replace(f"{workdir}", "RUN")) if status else ""}
    metrics = workdir / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    for split in ("train", "valid"):
        record[split] = columns([flat(line) for line in lines if line["split"] == split])
    result = workdir / "result.json"
    record["result"] = facts(json.loads(result.read_text())) if result.exists() else {}
    record["state"] = read_state(workdir / "checkpoints")
    return record


def columns(lines: list[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Returns a list for each name, with None for lines that lack it, without those that the clock says."""
    names = dict.fromkeys(name for line in lines for name in line if not CLOCK.search(name) and name != "split")
    return {name: [line.get(name) for line in lines] for name in names}


def facts(result: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what `result.json` says of the scores, the run and the data, by path."""
    wanted = ("valid", "test", "parameters", "best_step", "skipped", "spikes", "rollbacks", "steps", "data", "device")
    return flat({name: result[name] for name in wanted if name in result})


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Returns nested JSON values by path; an empty list or object is a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    inner = {key: one for name, x in items for key, one in flat(x, f"{path}/{name}" if path else str(name)).items()}
    return inner or {path: value}


def read_state(checkpoints: Path) -> dict[str, list[Any]]:
    """Returns what `describe` says of each array of the newest checkpoint; empty where there is none."""
    steps = [int(one.name) for one in checkpoints.iterdir() if one.name.isdigit()] if checkpoints.is_dir() else []
    if not steps:
        return {}
    items = [item for item in (checkpoints / str(max(steps))).iterdir() if (item / "_METADATA").exists()]
    (item,) = items  # the one that holds arrays, whatever its name
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
    numbers = array.astype(np.float64)
    return [list(array.shape), str(array.dtype), digest, float(numbers.sum()), float(np.linalg.norm(numbers.ravel()))]


def _last_line(said: str) -> str:
    lines = [line for line in said.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


# Comparing

ALONE = "rounding alone"  # the part of a record that follows from it
VALIDATED = ("valid", "scores", "batch_stats")  # the parts that see it


@dataclasses.dataclass
class Comparison:
    """How a case differs between two recordings.

    Attributes:
      noise: names of parameters, without `params/`, that follow from rounding errors alone, see `noise`.
      equal: whether every number that both have is the same to the bit.
      worst: part of the record -> largest relative difference, and where it is.
      wrong: what differs and must not, whatever the tolerance.
      warnings: what one of them alone has, and what only names things.
    """

    noise: frozenset[str] = frozenset()
    equal: bool = True
    worst: dict[str, tuple[float, str]] = dataclasses.field(default_factory=dict)
    wrong: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)

    def fits(self, tolerance: float, *, rounding: bool = True) -> bool:
        """Returns whether nothing is wrong and no difference is above the tolerance.

        Args:
          tolerance: relative.
          rounding: whether to allow for what follows from `noise`.
        """
        allowed = {ALONE: math.inf, **dict.fromkeys(VALIDATED, LAGGING)} if rounding and self.noise else {}
        return not self.wrong and all(
            worst <= max(tolerance, allowed.get(part.removeprefix("resumed "), 0.0))
            for part, (worst, _) in self.worst.items()
        )

    def number(self, part: str, before: Any, after: Any, where: str, *, floor: float = FLOOR) -> None:
        """Notes how two numbers differ; None is one that was not finite."""
        if same(before, after):
            return
        self.equal = False
        self._note(part, relative(before, after, floor), where)

    def array(self, part: str, before: list[Any], after: list[Any], where: str) -> None:
        """Notes how two arrays differ that `describe` describes."""
        if list(before[:3]) == list(after[:3]):
            return
        self.equal = False
        if list(before[:2]) != list(after[:2]):
            self.wrong.append(f"{where} was {before[1]}{before[0]} and is {after[1]}{after[0]}")
            return
        if re.sub(r"^params/|.*/(mu|nu)/", "", where) in self.noise:
            part = ALONE
        # By Cauchy and Schwarz no sum is larger than this: where terms cancel, its own size says nothing.
        largest = max(before[4], after[4]) * math.sqrt(math.prod(before[0]))
        self._note(part, relative(before[3], after[3], max(largest, 1e-12)), f"sum of {where}")
        self._note(part, relative(before[4], after[4], 1e-12), f"norm of {where}")

    def exact(self, before: Any, after: Any, where: str) -> None:
        """Notes what must be the same."""
        if before != after:
            self.equal = False
            self.wrong.append(f"{where} was {_short(before)} and is {_short(after)}")

    def only(self, before: Iterable[str], after: Iterable[str], what: str) -> None:
        """Warns of names that one of two has alone."""
        for names, when in ((set(before) - set(after), "before"), (set(after) - set(before), "after")):
            if names:
                shown = ", ".join(sorted(names)[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
                self.warnings.append(f"{what} only {when}: {shown}")

    def _note(self, part: str, difference: float, where: str) -> None:
        if difference > self.worst.get(part, (-1.0, ""))[0]:
            self.worst[part] = (difference, where)


def compare_cases(before: Record, after: Record) -> Comparison:
    """Returns how two records of one case differ."""
    result = Comparison(noise(before["state"]))
    _compare_runs(result, before, after, "")
    if "resumed" in before and "resumed" in after:
        _compare_runs(result, before["resumed"], after["resumed"], "resumed ")
    return result


def noise(state: Mapping[str, Any]) -> frozenset[str]:
    """Returns the parameters whose gradients are rounding errors, by Adam's mean of their squares."""
    seen = {path.split("/nu/")[1]: x for path, x in state.items() if "/nu/" in path}
    small = [name for name, x in seen.items() if x[3] <= NOISE**2 * math.prod(x[0])]
    # Where it is exactly zero, it is no error but a parameter that nothing reads.
    return frozenset(name for name in small if seen[name][3] > 0)


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
            continue  # the steps say so
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
    """Compares arrays by path, and those of the optimizer that moved, by what they are of."""
    result.only(before, after, f"{kind}arrays")
    gone, new = sorted(set(before) - set(after)), sorted(set(after) - set(before))
    moved = {_of_what(path): path for path in new}
    pairs = {path: path for path in before if path in after}
    pairs |= {path: moved[_of_what(path)] for path in gone if _of_what(path) in moved}
    for path, path_now in pairs.items():
        result.array(kind + path.split("/")[0], before[path], after[path_now], path)
    # The others have new names, or none: their contents must be found again, at least of what is learned.
    digests = {after[path][2] for path in new}
    for path in [path for path in gone if path not in pairs and before[path][2] not in digests]:
        if path.startswith(("params/", "opt_state/")):
            result.equal = False
            result.wrong.append(f"{kind}{path} is gone, and no new array is the same")
        else:
            result.warnings.append(f"{kind}{path} is gone, and no new array is the same")


def _of_what(path: str) -> str:
    found = re.search(r"/(mu|nu|trace)/.*", path)  # of Adam and Lion, and of momentum
    return found[0] if found else path


def same(one: Any, other: Any) -> bool:
    """Returns whether two JSON values are the same, NaN as itself."""
    return one == other or (one != one and other != other)


def relative(one: Any, other: Any, floor: float) -> float:
    """Returns how much two numbers differ, relative to the larger one or to `floor`; infinite where one is none."""
    if not all(isinstance(x, (int, float)) and math.isfinite(x) for x in (one, other)):
        return 0.0 if same(one, other) else math.inf
    return abs(one - other) / max(abs(one), abs(other), floor)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 80 else f"{text[:77]}..."


def told(name: str, comparison: Comparison, tolerance: float = TOLERANCE) -> list[str]:
    """Returns a case's lines."""
    fit = next(
        kind
        for kind, holds in (
            ("equal", comparison.equal),
            ("close", comparison.fits(tolerance, rounding=False)),
            ("rounding", comparison.fits(tolerance)),
            ("DIFFERENT", True),
        )
        if holds
    )
    worst = "  ".join(f"{part} {value:.1e}" for part, (value, _) in comparison.worst.items())
    lines = [f"{fit:9}  {name}  {worst}".rstrip()]
    lines += [f"           {part}: {value:.2e} in {where}" for part, (value, where) in comparison.worst.items()]
    lines += [f"           wrong: {line}" for line in comparison.wrong]
    return lines + [f"           warning: {line}" for line in comparison.warnings]


def compare(
    before: Mapping[str, Any], after: Mapping[str, Any], chosen: Iterable[str], tolerance: float = TOLERANCE
) -> bool:
    """Prints how two recordings differ, and returns whether they agree within the tolerance."""
    chosen = list(chosen)
    for key in sorted({*before["environment"], *after["environment"]} - {"commit"}):
        if before["environment"].get(key) != after["environment"].get(key):
            was, now = (one["environment"].get(key) for one in (before, after))
            print(f"warning: {key} was {was!r} and is {now!r}")
    counts, agreed = dict.fromkeys(("equal", "close", "rounding", "DIFFERENT"), 0), True
    for name in chosen:
        if name in before["cases"] and name in after["cases"]:
            comparison = compare_cases(before["cases"][name], after["cases"][name])
            lines = told(name, comparison, tolerance)
            counts[lines[0].split()[0]] += 1
            agreed = agreed and comparison.fits(tolerance)
            print("\n".join(lines))
    for one, other, when in ((before, after, "before"), (after, before, "after")):
        for name in [name for name in chosen if name in one["cases"] and name not in other["cases"]]:
            print(f"warning: only {when}: {name}")
    print(", ".join(f"{count} {kind}" for kind, count in counts.items()), "to within", tolerance)
    return agreed


# The command


def load(path: Path) -> dict[str, Any]:
    """Returns a recording, or an empty one where there is none yet."""
    return json.loads(path.read_text()) if path.exists() else {"environment": described(), "cases": {}}


def save(path: Path, recording: Mapping[str, Any]) -> None:
    """Writes a recording, one line a case, whole or not at all."""
    rows = [f"{json.dumps(name)}: {json.dumps(record)}" for name, record in recording["cases"].items()]
    text = f'{{"environment": {json.dumps(recording["environment"])},\n"cases": {{\n' + ",\n".join(rows) + "\n}}\n"
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_text(text)
    unfinished.replace(path)


def described() -> dict[str, str]:
    """Returns what two recordings should have in common, and the commit that each is of."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint")
    versions = {name: importlib.metadata.version(name) for name in packages}
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {**environment(1), **versions, "python": sys.version.split()[0], "commit": git.stdout.strip()}


def record_all(path: Path, chosen: list[Case], places: Changes, jobs: int, folder: Path) -> bool:
    """Runs the cases that a recording lacks, and returns whether all could be recorded."""
    recording, lock, failed = load(path), threading.Lock(), []
    waiting = [case for case in chosen if case.name not in recording["cases"]]

    def record(number: int, case: Case) -> None:
        began, place = time.monotonic(), folder / re.sub(r"\W+", "-", case.name)
        try:
            result = record_case(case, place, places)
        except Exception as error:
            failed.append(case.name)
            print(f"[{number}/{len(waiting)}] {case.name}: NOT RECORDED: {error}", flush=True)
            return
        finally:
            shutil.rmtree(place, ignore_errors=True)
        losses = result["train"].get("loss") or [math.nan]
        with lock:
            recording["cases"][case.name] = result
            save(path, recording)
        said = (
            f"status {result['status']}: {result['error']}" if result["status"] else f"loss {losses[0]} to {losses[-1]}"
        )
        resumed = result.get("resumed")
        if resumed is not None:
            said += f"; resumed {told('', compare_cases(without(result, 'resumed'), resumed))[0].strip()}"
        print(f"[{number}/{len(waiting)}] {case.name}: {time.monotonic() - began:.0f} s, {said}", flush=True)

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        list(pool.map(record, range(1, len(waiting) + 1), waiting))
    return not failed


def without(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns a mapping without one of its names."""
    return {key: value for key, value in values.items() if key != name}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="the recording, which is continued where it exists")
    parser.add_argument("--only", action="append", help="cases whose name has this in it; may be given several times")
    parser.add_argument("--against", type=Path, help="an earlier recording, to compare with")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="relative difference that is close")
    parser.add_argument("--no-run", action="store_true", help="compare what there is")
    parser.add_argument("--data-dir", default=os.environ.get("WITNESS_DATA", ""), help="where datasets are prepared")
    parser.add_argument("--archives", default=os.environ.get("WITNESS_ARCHIVES", ""), help="a folder of archives")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    args = parser.parse_args()
    places = {"data.dir": args.data_dir or None, "data.manual_dir": args.archives or None}
    chosen = [one for one in cases() if not args.only or any(part in one.name for part in args.only)]
    fine = True
    if not args.no_run:
        possible = [one for one in chosen if args.archives or not one.archives]
        if len(possible) < len(chosen):
            print(f"{len(chosen) - len(possible)} cases need --archives and are left out", flush=True)
        with tempfile.TemporaryDirectory(prefix="witness-") as folder:
            fine = record_all(args.output, possible, places, args.jobs, Path(folder))
    if args.against:
        fine = compare(load(args.against), load(args.output), [one.name for one in chosen], args.tolerance) and fine
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
