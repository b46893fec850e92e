"""Starts the scripts of `experiments/launch`, with fakes of the programs that they run."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.processes import ROOT

FOLDER = ROOT / "experiments" / "launch"
API = {"ZONE": "us-central1-a", "TYPE": "v5litepod-8"}  # the Cloud TPU API
ENGINE = {"ZONE": "us-central1-a", "TYPE": "ct6e-standard-4t", "TOPOLOGY": "2x4"}  # Compute Engine
DELETE = {  # what ends the cost, by type
    "v5litepod-8": "gcloud compute tpus queued-resources delete t --zone=us-central1-a --force --quiet",
    "ct6e-standard-4t": "gcloud compute instance-groups managed delete t --zone=us-central1-a --quiet",
}
SETTINGS = (
    "SPOT", "PROJECT", "VERSION", "ZONE", "TYPE", "TOPOLOGY", "EVERY", "QUEUE", "IMAGE", "TPU", "HOSTS", "CHIPS",
    "XDG_STATE_HOME",
)  # fmt: skip
RECORDER = f"""#!{sys.executable} -IS
import json, os, sys
with open(os.environ["RECORD"], "a") as record:
    print(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]), file=record)
print("host-0")
"""


def environment(**settings: str) -> dict[str, str]:
    """Returns the environment of a script: ours without settings of the launchers and accounts, and the given ones."""
    clean = {key: value for key, value in os.environ.items() if key not in SETTINGS and not key.startswith("SLURM_")}
    return {**clean, "CLOUDSDK_CONFIG": "/dev/null/none", "KUBECONFIG": "/dev/null/none", **settings}


def script(name: str, *arguments: str, **settings: str) -> subprocess.CompletedProcess:
    """Runs a launcher to its end."""
    return subprocess.run(
        [FOLDER / name, *arguments], cwd=ROOT, env=environment(**settings), capture_output=True, text=True, check=False,
        timeout=60,
    )  # fmt: skip


def lines(name: str, *arguments: str, **settings: str) -> list[str]:
    """Returns what a dry run prints."""
    process = script(name, "--dry-run", *arguments, **settings)
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


def fake(folder: Path, name: str, body: str) -> str:
    """Puts a program on a PATH, which is returned."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(body)
    (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def pasted(text: str, programs: Sequence[str], folder: Path) -> list[list[str]]:
    """Returns the programs and arguments that bash runs when what a dry run printed is pasted into it."""
    for program in programs:
        path = fake(folder / "recorders", program, RECORDER)
    record = folder / "record"
    record.touch()
    settings = environment(PATH=path, RECORD=str(record))
    subprocess.run(["bash", "-euc", text], cwd=folder, env=settings, capture_output=True, check=True)
    return [json.loads(line) for line in record.read_text().splitlines()]
