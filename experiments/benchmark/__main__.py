"""Measures speed against other libraries and the machine's limits, and writes `BENCHMARK.md` with plots.

`python -m experiments.benchmark [--rows=steps,input] [--peers=PYTHON] [--cores=0]`. Groups: steps, input, start, loop,
predict, plan, gate, growth (default: all). PYTHON is an interpreter with requirements-benchmark.txt; without it the
columns of other libraries say "not measured".
"""

import json
import os
import shlex
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments import cli
from mmfusion.errors import UserError

ROWS = flags.DEFINE_list("rows", [], "groups of rows; those not named stay as they were measured before")
PEERS = flags.DEFINE_string("peers", "", "a Python interpreter with the packages of requirements-benchmark.txt")
CORES = flags.DEFINE_list("cores", ["0"], "the cores that every process is pinned to")
ROUNDS = flags.DEFINE_integer("rounds", 7, "rounds of each comparison", lower_bound=1)
SECONDS = flags.DEFINE_float("seconds", 1.0, "seconds of a contender's round, about", lower_bound=0.0)
OUTPUT = flags.DEFINE_string("output", "experiments/results", "the folder of BENCHMARK.md and BENCHMARK.json")
QUICK = flags.DEFINE_bool("quick", False, "small sizes, to check that everything runs; the numbers mean nothing")

GROUPS = ("steps", "input", "start", "loop", "predict", "plan", "gate", "growth")
LONG = {"gate": 1, "plan": 1}  # rounds of groups that take many minutes
PACKAGES = ("torch", "keras", "tensorflow-cpu", "onnxruntime")


def main(argv: Sequence[str]) -> None:
    cli.parse(argv)
    for name in ROWS.value:
        if name not in GROUPS:
            raise UserError("no such group", path="--rows", value=name, choices=GROUPS)
    folder = Path(OUTPUT.value)
    if not folder.is_dir():
        raise UserError("there is no such folder", path="--output", value=OUTPUT.value)
    cores, peers = _cores(), _peers()

    from rich.console import Console

    from experiments.benchmark import report
    from experiments.benchmark.contender import Options
    from mmfusion.files import write_json
    from mmfusion.tracking import provenance

    json_file, console = folder / "BENCHMARK.json", Console(highlight=False, soft_wrap=True)
    for name in ROWS.value or GROUPS:
        rounds = min(ROUNDS.value, LONG.get(name, ROUNDS.value))
        options = Options(cores, PEERS.value, rounds, SECONDS.value, QUICK.value)
        start, rows = time.monotonic(), []
        with tempfile.TemporaryDirectory() as temporary:
            for row in _measured(name, options, Path(temporary)):
                rows.append(row)
                console.print(" | ".join([name, *report.summary(row)]))
        measured = json.loads(json_file.read_text()) if json_file.exists() else {}
        measured[name] = {
            "rows": rows, "cores": list(cores), "peers": peers, "seconds": time.monotonic() - start,
            "command": shlex.join(["python", "-m", "experiments.benchmark", *_shown(argv[1:], name)]),
            "processor": _processor(), "environment": provenance.environment(),
        }  # fmt: skip
        measured = {group: measured[group] for group in GROUPS if group in measured}
        write_json(json_file, measured)  # after each group, so that an interrupted command loses one at most
        report.write(measured, folder)


def _measured(name: str, options: Any, folder: Path) -> Iterator[dict[str, Any]]:
    import importlib

    from experiments.benchmark import rows

    if name == "growth":
        from experiments.benchmark import growth

        yield from growth.measured(options, folder)
        return
    module = importlib.import_module(f"experiments.benchmark.{'plan' if name == 'gate' else name}")
    for comparison in module.gate(options, folder) if name == "gate" else module.comparisons(options, folder):
        yield from rows.run(comparison, options)


def _cores() -> tuple[int, ...]:
    available = os.sched_getaffinity(0)
    for core in CORES.value:
        if not core.isdecimal() or int(core) not in available:
            raise UserError("no such core", path="--cores", value=core, choices=sorted(map(str, available)))
    return tuple(map(int, CORES.value))


def _peers() -> dict[str, str | None]:
    """Returns the versions of the peers' packages."""
    if not PEERS.value:
        return {}
    code = (
        "import importlib.metadata as m, json\n"
        "installed = {d.metadata['Name'].lower().replace('_', '-'): d.version for d in m.distributions()}\n"
        f"print(json.dumps({{name: installed.get(name) for name in {PACKAGES}}}))"
    )
    try:
        return json.loads(subprocess.run([PEERS.value, "-c", code], capture_output=True, check=True).stdout)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError("is not a Python interpreter that runs", path="--peers", value=PEERS.value) from error


def _shown(argv: Sequence[str], group: str) -> list[str]:
    """Returns the flags that measured a group, without the folder that its results are in."""
    kept = [arg for arg in argv if not arg.startswith(("--rows", "--output", "--peers"))]
    return [f"--rows={group}", *(["--peers=PYTHON"] if PEERS.value else []), *kept]


def _processor() -> str:
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
             if line.startswith("model name")]  # fmt: skip
    return f"{names[0] if names else 'an unknown processor'} ({os.cpu_count()} cores)"


if __name__ == "__main__":
    cli.run(main)
