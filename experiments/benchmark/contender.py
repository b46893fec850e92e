"""One side of a comparison, in a process of its own that is pinned to the cores of the comparison.

`python -m experiments.benchmark.contender MODULE:FUNCTION JSON` calls the function with the arguments in JSON, which
returns facts and a function that runs one round. The process prints a line of JSON with the facts, and then one for
each line that it reads: the round's value, and the peak memory so far. Nothing is imported here but the standard
library, so that any interpreter can run it.
"""

import dataclasses
import importlib
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).parents[2]
NOT_MEASURED = "not measured"
Round = Callable[[], float | dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Contender:
    """A side of a comparison.

    Attributes:
      name: of the row's column.
      target: `module:function`, see above; without a colon, a module that is run as a command.
      arguments: of the function, or of the command under `argv`.
      peer: whether the interpreter of the peers runs it.
      fresh: a round is a new process: the seconds until it is ready, or until a command has ended.
      environment: variables that differ.
    """

    name: str
    target: str
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    peer: bool = False
    fresh: bool = False
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Options:
    """How everything is measured.

    Attributes:
      cores: that every process is pinned to.
      peers: the interpreter of the peers; empty: they are not measured.
      rounds: number of rounds.
      seconds: of a round, about.
      quick: small sizes, to check that the command works.
    """

    cores: tuple[int, ...]
    peers: str = ""
    rounds: int = 7
    seconds: float = 1.0
    quick: bool = False

    def size(self, full: int, quick: int) -> int:
        """Returns the full size, or that of a quick check."""
        return quick if self.quick else full


def measure(contenders: Sequence[Contender], options: Options) -> dict[str, dict[str, Any]]:
    """Returns by name the `values` of the rounds, `facts` and `peak_mb`, or why it was not measured as `error`.

    The contenders start one after the other, so that the first may leave files for the others, and take turns then. All
    wait while one runs.
    """
    results: dict[str, dict[str, Any]] = {one.name: {"values": []} for one in contenders}
    running: dict[str, _Process] = {}
    try:
        for one in contenders:
            if one.peer and not options.peers:
                results[one.name]["error"] = NOT_MEASURED
            elif not one.fresh:
                _attempt(results[one.name], lambda one=one: _start(one, options, running, results))
        for _ in range(options.rounds):
            for one in contenders:
                if "error" not in results[one.name]:
                    _attempt(results[one.name], lambda one=one: _round(one, options, running, results))
    finally:
        for process in running.values():
            process.stop()
    return results


def _attempt(result: dict[str, Any], run: Callable[[], None]) -> None:
    try:
        run()
    except RuntimeError as error:  # one that fails does not stop the others
        result["error"] = str(error)


def _start(one: Contender, options: Options, running: dict[str, "_Process"], results: dict[str, Any]) -> None:
    running[one.name] = process = _Process(one, options)
    results[one.name]["facts"] = process.read()


def _round(one: Contender, options: Options, running: dict[str, "_Process"], results: dict[str, Any]) -> None:
    result = results[one.name]
    if not one.fresh:
        answer = running[one.name].ask()
        result["peak_mb"] = answer.pop("peak_mb")
        result["values"].append(answer.pop("value"))
        result.setdefault("facts", {}).update(answer)
        return
    start = time.perf_counter()
    process = _Process(one, options)
    try:
        if ":" in one.target:
            result["facts"] = process.read()
        else:
            process.wait()
        result["values"].append(time.perf_counter() - start)
    finally:
        process.stop()


class _Process:
    def __init__(self, one: Contender, options: Options):
        python = options.peers if one.peer else sys.executable
        if ":" in one.target:
            command = [python, "-m", __name__, one.target, json.dumps(one.arguments)]
        else:
            command = [python, "-m", one.target, *one.arguments["argv"]]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by `stop`)
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, options.cores)  # the process inherits it from this thread
        try:
            self._process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
                env=environment(options, one.environment),
            )  # fmt: skip
        finally:
            os.sched_setaffinity(0, before)
        assert self._process.stdin and self._process.stdout
        self._input: TextIO = self._process.stdin
        self._output: TextIO = self._process.stdout

    def read(self) -> dict[str, Any]:
        line = self._output.readline()
        if not line:
            raise RuntimeError(self._failure())
        return json.loads(line)

    def ask(self) -> dict[str, Any]:
        self._input.write("\n")
        self._input.flush()
        return self.read()

    def wait(self) -> None:
        self._process.communicate()
        if self._process.returncode:
            raise RuntimeError(self._failure())

    def stop(self) -> None:
        """Ends the process: without input it exits by itself."""
        self._input.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._output.close()
        self._errors.close()

    def _failure(self) -> str:
        self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines() or ["no message"]
        return f"status {self._process.returncode}: {lines[-1]}"


def environment(options: Options, changes: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment of a process: threads for the cores that it is pinned to, and this folder's code."""
    threads = str(len(options.cores))
    values = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONPATH": str(ROOT)}
    values["TF_NUM_INTRAOP_THREADS"] = values["TF_NUM_INTEROP_THREADS"] = threads
    return {**values, "TF_CPP_MIN_LOG_LEVEL": "3", **changes}


def timed(run: Callable[[], Any], seconds: float) -> Callable[[], float]:
    """Returns a round of a function that is called repeatedly: the seconds of a call."""
    start = time.perf_counter()
    run()
    once = time.perf_counter() - start
    count = max(1, round(seconds / max(once, 1e-9)))

    def one_round() -> float:
        start = time.perf_counter()
        for _ in range(count):
            run()
        return (time.perf_counter() - start) / count

    return one_round


def timed_items(items: Iterator[Any], count: int, prefetched: int = 32, pause: float = 0.5) -> Callable[[], float]:
    """Returns a round of an endless iterator: the seconds of one of `count` items.

    What the iterator had prefetched while others were measured does not count; after a round it has the time to
    prefetch again, so that it does not run beside the next contender.
    """
    next(items)

    def one_round() -> float:
        for _ in itertools.islice(items, prefetched):
            pass
        start = time.perf_counter()
        for _ in itertools.islice(items, count):
            pass
        seconds = (time.perf_counter() - start) / count
        time.sleep(pause)
        return seconds

    return one_round


def main() -> None:
    target, arguments = sys.argv[1:]
    output = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is not part of the protocol
    module, _, name = target.partition(":")
    facts, run = getattr(importlib.import_module(module), name)(**json.loads(arguments))
    print(json.dumps(facts), file=output)
    for _ in sys.stdin:
        value = run()
        answer = value if isinstance(value, dict) else {"value": value}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({**answer, "peak_mb": peak}), file=output)


if __name__ == "__main__":
    main()
