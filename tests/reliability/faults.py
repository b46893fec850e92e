"""Faults from outside: killed runs, corrupt files, failing writes, non-finite values."""

import contextlib
import dataclasses
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmfusion.errors import UserError
from tests.reliability import runs
from tests.reliability.runs import CASES

HOSTS = dataclasses.replace(
    CASES[0], changes=(*runs.SHORT, *runs.IMAGES, *runs.WORDS, "--config.optim.name=sgd", "--config.seed=3")
)
PATIENCE, HUNG = 400, -1  # seconds until a process counts as hung (hosts wait 300 for each other); its status
PRELOADED = Path(__file__).with_name("fault.c")
Outcome = tuple[bool, str]  # whether the run survived, and what happened if not


def kills(count: int, folder: Path, locations: Sequence[str]) -> Iterator[Outcome]:
    """Kills runs at random moments, every third with SIGTERM, and compares each with an undisturbed one."""
    draw, injected, lengths = np.random.default_rng(0), 0, {}
    for case in CASES:
        runs.whole(case, folder / case.name, locations)
        start_time = time.monotonic()  # a second run: the first one compiles programs for the others
        runs.whole(case, folder / "again", locations)
        lengths[case.name] = time.monotonic() - start_time
        shutil.rmtree(folder / "again")
    for number in range(10**6):
        case, workdir, killed, found = CASES[number % len(CASES)], folder / f"killed {number}", 0, []
        while True:
            process = runs.start(case, workdir, locations)
            process.join(draw.uniform(0, 1.2 * lengths[case.name]) if injected + killed < count else None)
            if process.exitcode is not None:
                break
            killed += 1
            if (injected + killed) % 3:
                process.kill()
            else:
                process.terminate()  # it saves a checkpoint, or ends first
            process.join(300)
            if process.exitcode not in (-signal.SIGKILL, -signal.SIGTERM, 75, 0):
                found.append(f"exit {process.exitcode} of a signal: {runs.last_error(workdir)}")
        if process.exitcode:
            found.append(f"exit {process.exitcode}: {runs.last_error(workdir)}")
        else:
            found += runs.differences(folder / case.name, workdir)
        injected += killed
        yield from [(not found, f"{case.name}: {'; '.join(found)}")] * killed
        shutil.rmtree(workdir, ignore_errors=True)
        if injected >= count:
            return


def bit_flips(count: int, folder: Path, locations: Sequence[str]) -> Iterator[Outcome]:
    """Flips a bit in a file of the newest checkpoint: the restored state is what was saved, in it or an older one."""
    from mmfusion.checkpoints.manager import Checkpoints
    from mmfusion.config import read
    from mmfusion.data import dataset as datasets
    from mmfusion.training.restore import read_config
    from mmfusion.training.setup import build_setup

    runs.whole(CASES[0], folder / "run", locations)
    config = read(read_config(folder / "run"))
    like = build_setup(config, datasets.load(config.data, seed=config.seed, splits=())).state_shapes()
    steps = Checkpoints(folder / "run" / "checkpoints", readonly=True).steps()
    original = {step: runs.load_verified(folder / "run" / "checkpoints" / str(step))[0] for step in steps}
    draw = np.random.default_rng(0)
    for number in range(count):
        copy = folder / f"copy {number}" / "checkpoints"
        shutil.copytree(folder / "run" / "checkpoints", copy)
        newest = copy / str(max(steps))  # the one that is restored
        files = [path for path in sorted(newest.rglob("*")) if path.is_file() and path.stat().st_size]
        path = files[draw.integers(len(files))]
        data = bytearray(path.read_bytes())
        data[draw.integers(len(data))] ^= 1 << int(draw.integers(8))
        path.write_bytes(data)
        try:
            checkpoints = Checkpoints(copy)
            state, meta = checkpoints.first_valid(lambda step, c=checkpoints: c.restore(step, like))
            checkpoints.close()
            same = _same(state, original[meta["step"]])
            yield same, f"{path.relative_to(copy)}: step {meta['step']} is not what was saved"
        except Exception as error:
            yield False, f"{path.relative_to(copy)}: {error!r}"
        shutil.rmtree(copy.parent)


def _same(state: Any, original: dict[str, np.ndarray]) -> bool:
    import jax

    leaves = jax.tree_util.tree_leaves_with_path(state)
    found = {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x) for path, x in leaves}
    return found.keys() == original.keys() and all(np.array_equal(x, original[path]) for path, x in found.items())


def failing_writes(count: int, folder: Path, locations: Sequence[str]) -> Iterator[Outcome]:
    """Lets each write call of a run fail once (evenly spaced calls if there are more): one error line, nothing lost.

    Runs differ in their last few calls; calls that a run does not reach are not counted.
    """
    if shutil.which("cc") is None:
        raise UserError("failing_writes needs a C compiler, cc")
    library = folder / "fault.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, PRELOADED, "-ldl"], check=True)
    case, counter = runs.SHORTEST, folder / "counter"
    environment = {"FAULT_UNDER": str(folder / "runs"), "FAULT_COUNT": str(counter)}
    (folder / "runs").mkdir()

    def begin(workdir: Path, at: int) -> int:
        counter.write_bytes(bytes(8))
        process = runs.start(case, workdir, locations, FAULT_AT=str(at), **environment)
        process.join(PATIENCE)
        if process.exitcode is None:
            process.kill()
            process.join()
            return HUNG
        return process.exitcode

    with runs.preloaded(library):
        unbroken = folder / "runs" / "unbroken"
        if begin(unbroken, 0):
            raise RuntimeError(runs.last_error(unbroken))
        calls = int.from_bytes(counter.read_bytes(), "little")
        some = min(count, calls)
        for at in np.ceil((np.arange(some) + 0.5) / some * calls).astype(int).tolist():
            workdir = folder / "runs" / f"call {at}"
            status = begin(workdir, at)
            line = runs.last_error(workdir)
            if int.from_bytes(counter.read_bytes(), "little") < at:
                continue
            if status == 2 and not line.startswith("error: "):
                yield False, f"call {at} of {calls}: {line}"
            elif status not in (0, 2):
                yield False, f"call {at} of {calls}: exit {status}: {line}"
            else:
                again = begin(workdir, 0)
                found = (
                    runs.differences(unbroken, workdir) if not again else [f"exit {again}: {runs.last_error(workdir)}"]
                )
                yield not found, f"call {at} of {calls}, and then: {'; '.join(found)}"
            shutil.rmtree(workdir, ignore_errors=True)


def nan_planted(count: int, folder: Path, locations: Sequence[str]) -> Iterator[Outcome]:
    """Plants NaN in batches of a run: each of these steps is skipped and counted, and the run finishes."""
    from unittest import mock

    from mmfusion import config as configs
    from mmfusion.data import pipeline
    from mmfusion.training.loop import train

    config = runs.cli.make_config(CASES[0].source, (*CASES[0].changes, "--config.log_every=1", *locations))
    configs.check(config, 1)
    planted = set((np.random.default_rng(0).permutation(config.steps)[:count] + 1).tolist())
    original = pipeline.train_batches

    def spoiled(*args: Any, first: int, **options: Any) -> Iterator[Any]:
        for step, batch in enumerate(original(*args, first=first, **options), start=first + 1):
            yield batch.replace(weight=batch.weight * np.nan) if step in planted else batch

    with mock.patch.object(pipeline, "train_batches", spoiled):
        result = train(config, folder / "run")
    lines = [line for line in runs.reproduce.steps(folder / "run") if line["split"] == "train"]
    for step in sorted(planted):
        skipped = lines[step - 1]["skipped"] == 1.0 and lines[step - 1]["loss"] is None
        well = result["skipped"] == len(planted) and np.isfinite(result["test"]["loss"])
        yield skipped and well, f"update {step}: {lines[step - 1]}"


def killed_hosts(count: int, folder: Path, locations: Sequence[str]) -> Iterator[Outcome]:
    """Kills one of two hosts at random moments: the other ends by itself, and both resume to the same values."""
    flags = [f"--config={HOSTS.source}", *HOSTS.changes, *locations]
    start_time = time.monotonic()
    _together(flags, folder / "unbroken", kill=None, seconds=600)
    length = time.monotonic() - start_time
    draw = np.random.default_rng(0)
    for number in range(count):
        workdir, ended = folder / f"killed {number}", ""
        while ended == "":  # again if the run ended before the kill
            shutil.rmtree(workdir, ignore_errors=True)
            ended = _together(flags, workdir, kill=int(draw.integers(2)), seconds=draw.uniform(0, length))
        if ended is None:
            yield False, f"the other host did not end within {PATIENCE} seconds"
            continue
        _together(flags, workdir, kill=None, seconds=600)
        found = runs.differences(folder / "unbroken", workdir)
        yield not found, f"{ended}; {'; '.join(found)}"
        shutil.rmtree(workdir)


def _together(flags: Sequence[str], workdir: Path, kill: int | None, seconds: float) -> str | None:
    """Runs two hosts of two devices each, and returns how the host that is not killed ended.

    None if it did not end by itself; "" if no host was killed.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "experiments.train", *flags, f"--workdir={workdir}"]
    with open(f"{workdir}.log", "ab") as log:
        hosts = [
            subprocess.Popen([*command, f"--distributed={address},{i},2"], env=environment, stdout=log, stderr=log)
            for i in range(2)
        ]
        try:
            if kill is None:
                statuses = [host.wait(seconds) for host in hosts]
                if any(statuses):
                    raise RuntimeError(f"exit {statuses}: {runs.last_error(workdir)}")
                return ""
            with contextlib.suppress(subprocess.TimeoutExpired):
                hosts[kill].wait(seconds)
            late = hosts[kill].poll() is not None  # it ended before the kill
            hosts[kill].kill()
            status = hosts[1 - kill].wait(PATIENCE)
            return "" if late else f"the other host ended with {status}"
        except subprocess.TimeoutExpired:
            return None
        finally:
            for host in hosts:
                host.kill()
                host.wait()


def killed_ablations(count: int, folder: Path, locations: Sequence[str]) -> Iterator[Outcome]:
    """Kills ablations at random moments, and compares their tables with those of an undisturbed one."""
    flags = ["--config=configs/quickstart.py", "--fusions=mean,concat", "--seeds=2", *runs.SHORT]
    command = [sys.executable, "-m", "experiments.ablate", *flags, *runs.IMAGES, *runs.WORDS, *locations]

    def start(workdir: Path, seconds: float | None) -> bool:
        """Returns whether it ended before the kill."""
        with open(f"{workdir}.log", "ab") as log:
            process = subprocess.Popen([*command, f"--workdir={workdir}"], stdout=log, stderr=log)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return False
        if process.returncode:
            raise RuntimeError(f"exit {process.returncode}: {runs.last_error(workdir)}")
        return True

    start_time = time.monotonic()
    start(folder / "unbroken", None)
    length, injected, draw = time.monotonic() - start_time, 0, np.random.default_rng(0)
    tables = ("runs.csv", "claims.json")
    while injected < count:
        workdir, killed = folder / f"killed {injected}", 0
        while not start(workdir, draw.uniform(0, length / 2) if injected + killed < count else None):
            killed += 1
        found = [name for name in tables if (folder / "unbroken" / name).read_bytes() != (workdir / name).read_bytes()]
        yield from [(not found, f"{killed} kills: {', '.join(found)} differ")] * killed
        injected += killed


def soak(seconds: int, folder: Path, locations: Sequence[str]) -> Iterator[Outcome]:
    """Trains for a time and samples the process's memory: its last quarter must not exceed its second."""
    steps = 10**7
    case = dataclasses.replace(
        CASES[0], changes=(*CASES[0].changes, f"--config.steps={steps}", "--config.eval_every=500",
                           "--config.checkpoint_every=500", "--config.log_every=100"),
    )  # fmt: skip
    process, log = runs.start(case, folder / "run", locations), folder / "run" / "metrics.jsonl"
    while process.is_alive() and not (log.exists() and '"valid"' in log.read_text(encoding="utf-8")):
        time.sleep(0.2)  # until all programs are compiled
    memory, until = [], time.monotonic() + seconds
    while time.monotonic() < until and process.is_alive():
        time.sleep(max(0.05, seconds / 400))
        status = Path(f"/proc/{process.pid}/status").read_text()
        memory.append(int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024)
    alive = process.is_alive()
    process.terminate()
    process.join(120)
    early, late = _quarters(memory)
    yield (
        alive and process.exitcode == 75 and flat(memory),
        (f"exit {process.exitcode}, {early:.0f} MB in the second quarter, {late:.0f} MB in the last"),
    )


def _quarters(memory: Sequence[float]) -> tuple[float, float]:
    quarter = len(memory) // 4
    return float(np.median(memory[quarter : 2 * quarter])), float(np.median(memory[3 * quarter :]))


def flat(memory: Sequence[float]) -> bool:
    """Returns whether memory samples `[n]` in MB rise by less than 2 % and 8 MB after their first half."""
    early, late = _quarters(memory)
    return late <= 1.02 * early + 8
