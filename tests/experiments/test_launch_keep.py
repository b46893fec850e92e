"""`train_tpu.sh keep` by both ways to a TPU, under preemptions and faults, with a fake gcloud."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launchers import API, DELETE, ENGINE, FOLDER, environment, fake, lines, script
from tests.processes import ROOT

pytestmark = pytest.mark.process  # each test runs a script

WAYS = pytest.mark.parametrize("way", [API, ENGINE], ids=["api", "engine"])
# A fake of both APIs. It keeps what exists in a file, and what was asked in another; variables say what fails.
GCLOUD = r"""#!/usr/bin/env bash
count() { echo x >> "$HOME/$1"; wc -l < "$HOME/$1"; }
nth() { local n; n=$(count "$1"); shift; if [ "$n" -le "$#" ]; then echo "${!n}"; else echo "${!#}"; fi; }
echo "$*" >> "$HOME/requests"
IFS=, read -ra states <<< "${STATES:-ACTIVE}"
IFS=, read -ra ended <<< "${ENDED:-0}"
case "$*" in
  *"instance-templates"*|*"resource-policies"*) ;;
  *" create "*)
    [ -z "${SLOW_CREATE:-}" ] || sleep "$SLOW_CREATE"
    [ "$(count created)" -gt "${REFUSED:-0}" ] || exit 1
    touch "$HOME/exists" ;;
  *" describe "*|*instanceStatus*)
    if [ -n "${NO_DESCRIBE:-}" ]; then echo "PERMISSION_DENIED" >&2; exit 1; fi
    state=$(nth described "${states[@]}")
    case "$state:$*" in
      NONE:*) exit 1 ;;
      ACTIVE:*instanceStatus*) printf 'RUNNING\nRUNNING\n' ;;
      SUSPENDED:*instanceStatus*) printf 'RUNNING\nTERMINATED\n' ;;
      PROVISIONING:*instanceStatus*) printf 'RUNNING\nSTAGING\n' ;;
      *) echo "$state" ;;
    esac ;;
  *" list-instances "*) printf 'h-0\n'; [[ "$*" == *--limit=1* ]] || printf 'h-1\n' ;;
  *" list "*)
    [ -z "${NO_LIST:-}" ] || exit 1
    [ ! -e "$HOME/exists" ] || echo t ;;
  *"cat mmfusion/status"*)
    [ -z "${HANG:-}" ] || { touch "$HOME/hanging"; exec sleep 60; }
    status=$(nth looked "${ended[@]}"); [ "$status" != - ] || exit 1; echo "$status" ;;
  *"tail -n 1000"*) echo "the last line" ;;
  *" h-1 "*) ;; # fails and counts like h-0
  *experiments.train*) [ "$(count ran)" -ne "${RUN_FAILS:-0}" ] ;;
  *" delete "*)
    [ -z "${SLOW_DELETE:-}" ] || { touch "$HOME/deleting"; sleep "$SLOW_DELETE"; }
    [ "$(count deleted)" -gt "${DELETE_FAILS:-0}" ] || exit 1
    [ -e "$HOME/exists" ] || exit 1
    rm "$HOME/exists" ;;
esac
"""
FLAGS = ("--config=c.py", "--workdir=gs://b/d")
STEPS = {
    "create": " create t ", "delete": " delete t ", "scp": " scp ", "setup": "uv venv", "run": "experiments.train",
    "poll": "cat mmfusion/status",
}  # fmt: skip
START = ["create", "scp", "setup", "run"]


class Keep:
    """`train_tpu.sh keep t` with a fake gcloud in a home of its own."""

    def __init__(self, home: Path, way: dict[str, str], *flags: str, every: str = "0", **faults: object):
        self.home = home
        settings = {key: str(value) for key, value in faults.items()}
        path = fake(home / "bin", "gcloud", GCLOUD)
        settings |= {"HOME": str(home), "TMPDIR": str(home), "PATH": path, "EVERY": every, **way}
        self.process = subprocess.Popen(
            [FOLDER / "train_tpu.sh", "keep", "t", *(flags or FLAGS)], cwd=ROOT, env=environment(**settings),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def end(self) -> int:
        """Waits for the end and returns the exit status; sets `errors`."""
        try:
            _, self.errors = self.process.communicate(timeout=60)
        finally:
            with contextlib.suppress(ProcessLookupError):  # it has ended, and so have its children
                os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.returncode

    def wait_for(self, condition: Callable[[], bool]) -> None:
        while not condition():
            assert self.process.poll() is None, self.process.communicate()[1]
            time.sleep(0.02)

    def steps(self) -> list[str]:
        """Returns what was asked of gcloud, once for all hosts."""
        requests = self.home / "requests"
        asked = requests.read_text().splitlines() if requests.exists() else []
        asked = [line for line in asked if "h-1" not in line and "templates" not in line and "policies" not in line]
        return [name for line in asked for name, part in STEPS.items() if part in line]

    def exists(self) -> bool:
        return (self.home / "exists").exists()

    def delete_file(self) -> Path:
        return self.home / ".local" / "state" / "mmfusion" / "delete-tpu-t.sh"


@WAYS
def test_create_ends_when_describing_fails(way: dict[str, str], tmp_path: Path):
    path = fake(tmp_path / "bin", "gcloud", GCLOUD)
    process = script("train_tpu.sh", "create", "t", **way, EVERY="0", HOME=str(tmp_path), PATH=path, NO_DESCRIBE="1")
    assert process.returncode == 1
    assert process.stderr.count("PERMISSION_DENIED") == 10  # gcloud's reason is shown
    assert "its state could not be read, 10 times in a row" in process.stderr
    after = process.stderr.partition("it may exist and cost money; this deletes it:\n")[2]
    assert after.splitlines()[0] == DELETE[way["TYPE"]]


@WAYS
def test_create_ends_when_the_tpu_is_lost(way: dict[str, str], tmp_path: Path):
    path = fake(tmp_path / "bin", "gcloud", GCLOUD)
    settings = {**way, "EVERY": "0", "HOME": str(tmp_path), "PATH": path, "STATES": "PROVISIONING,SUSPENDED"}
    process = script("train_tpu.sh", "create", "t", **settings)
    assert process.returncode == 1 and "state SUSPENDED" in process.stderr
    assert DELETE[way["TYPE"]] in process.stderr


@WAYS
def test_keep_survives_refusals_preemptions_and_stops(way: dict[str, str], tmp_path: Path):
    # The first request is refused, the second TPU is preempted, and the run on the third stops once and loses a host
    # once. Its first restart fails, and so does the first deletion of the second TPU.
    keep = Keep(
        tmp_path, way, REFUSED=1, DELETE_FAILS=2, RUN_FAILS=3, ENDED="-,75,75,134,0",
        STATES="PROVISIONING,ACTIVE,ACTIVE,NONE,SUSPENDED,ACTIVE",
    )  # fmt: skip
    assert keep.end() == 0, keep.errors
    assert keep.steps() == [
        *("create", "delete"),  # refused: nothing to delete
        *(*START, "poll", "delete", "delete"),  # runs until preempted
        *(*START, *["poll", "run"] * 3, "poll", "delete"),  # stops, loses a host, finishes
    ]
    assert not keep.exists() and not keep.delete_file().exists()


@WAYS
def test_keep_dry_run_prints_each_step(way: dict[str, str], tmp_path: Path):
    commands = lines("train_tpu.sh", "keep", "t", *FLAGS, **way, HOME=str(tmp_path))
    found = [name for line in commands for name, part in STEPS.items() if part in line]
    assert list(tmp_path.iterdir()) == []
    assert list(dict.fromkeys(found)) == ["create", "scp", "setup", "run", "delete"]


@WAYS
def test_keep_gives_up_after_five_failures(way: dict[str, str], tmp_path: Path):
    keep = Keep(tmp_path, way, REFUSED=9)
    assert (keep.end(), keep.steps()) == (1, ["create", "delete"] * 5)
    assert "could not be started, 5 times in a row" in keep.errors


@pytest.mark.parametrize("status", [1, 2])
def test_keep_deletes_the_tpu_of_a_failed_run(status: int, tmp_path: Path):
    keep = Keep(tmp_path, API, ENDED=f"-,{status}")
    assert keep.end() == status and not keep.exists()
    assert f"the run failed with exit status {status}" in keep.errors and "the last line" in keep.errors
    assert (tmp_path / ".local/state/mmfusion/tpu-t.log").read_text() == "the last line\n"


def test_keep_ends_a_run_that_stops_for_ever(tmp_path: Path):
    keep = Keep(tmp_path, API, ENDED="134")
    assert keep.end() == 75 and not keep.exists()
    assert keep.steps().count("run") == 10 and "a host was lost 10 times" in keep.errors


@WAYS
def test_keep_prints_the_command_when_it_cannot_delete(way: dict[str, str], tmp_path: Path):
    keep = Keep(tmp_path, way, DELETE_FAILS=9)
    assert keep.end() == 1 and keep.exists()
    assert keep.steps().count("delete") == 5
    _, printed = keep.errors.split(f"STILL COSTS MONEY. Run this (it is also in {keep.delete_file()}):\n")
    assert printed.splitlines() == lines("train_tpu.sh", "delete", "t", **way)
    # The file deletes the TPU when gcloud works again.
    settings = environment(HOME=str(tmp_path), PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    subprocess.run(["bash", keep.delete_file()], env=settings, check=True)
    assert not keep.exists()


@pytest.mark.thorough(but=("SIGINT-api", "SIGTERM-engine", "SIGHUP-api"))
@WAYS
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_keep_deletes_the_tpu_when_it_is_stopped(way: dict[str, str], number: signal.Signals, tmp_path: Path):
    keep = Keep(tmp_path, way, every="60", ENDED="-")
    keep.wait_for(lambda: keep.steps()[-1:] == ["run"])
    start = time.monotonic()
    keep.process.send_signal(number)
    assert keep.end() == 128 + number and not keep.exists()
    assert time.monotonic() - start < 10  # not after EVERY seconds
    assert keep.steps().count("delete") == 1 and not keep.delete_file().exists()


def test_keep_waits_for_a_request_before_it_deletes(tmp_path: Path):
    keep = Keep(tmp_path, API, SLOW_CREATE=1)
    keep.wait_for(lambda: "create" in keep.steps())
    time.sleep(0.2)
    os.killpg(keep.process.pid, signal.SIGTERM)  # gcloud receives it too
    assert keep.end() == 143 and not keep.exists()
    assert (tmp_path / "created").exists() and keep.steps() == ["create", "delete"]


def test_keep_does_not_wait_for_a_hanging_connection(tmp_path: Path):
    keep = Keep(tmp_path, API, HANG=1)
    keep.wait_for((tmp_path / "hanging").exists)
    keep.process.send_signal(signal.SIGTERM)
    start = time.monotonic()
    assert keep.process.wait(timeout=30) == 143 and not keep.exists()
    assert time.monotonic() - start < 10
    os.killpg(keep.process.pid, signal.SIGKILL)  # what is left of the connection


def test_keep_deletes_through_a_second_signal(tmp_path: Path):
    keep = Keep(tmp_path, API, every="60", ENDED="-", SLOW_DELETE=1)
    keep.wait_for(lambda: keep.steps()[-1:] == ["run"])
    keep.process.send_signal(signal.SIGINT)
    keep.wait_for((tmp_path / "deleting").exists)
    os.killpg(keep.process.pid, signal.SIGINT)
    os.killpg(keep.process.pid, signal.SIGTERM)
    assert keep.end() == 130 and not keep.exists()


def test_keep_leaves_the_command_when_it_is_killed(tmp_path: Path):
    keep = Keep(tmp_path, API, every="60", ENDED="-")
    keep.wait_for(lambda: keep.steps()[-1:] == ["run"])
    os.killpg(keep.process.pid, signal.SIGKILL)
    assert keep.end() == -9 and keep.exists()
    assert keep.delete_file().read_text().splitlines()[-1] == DELETE[API["TYPE"]]
    again = Keep(tmp_path, API)
    assert again.end() == 2 and keep.exists()
    assert "exists already: choose another name, or delete it:\n" + DELETE[API["TYPE"]] in again.errors


def test_keep_does_not_share_a_name(tmp_path: Path):
    first = Keep(tmp_path, API, every="60", SLOW_CREATE=1)
    first.wait_for(lambda: "create" in first.steps())
    second = Keep(tmp_path, API)
    assert second.end() == 2 and "another keep of t is running" in second.errors
    assert first.delete_file().exists()
    first.process.send_signal(signal.SIGTERM)
    assert first.end() == 143 and not first.exists()


def test_keep_requests_nothing_when_it_cannot_look_up_the_name(tmp_path: Path):
    keep = Keep(tmp_path, API, NO_LIST=1)
    assert (keep.end(), keep.steps()) == (1, []) and "could not be looked up" in keep.errors


def test_keep_requests_nothing_when_it_cannot_leave_the_command(tmp_path: Path):
    (tmp_path / ".local").write_text("not a folder")
    keep = Keep(tmp_path, API)
    assert (keep.end(), keep.steps()) == (2, []) and "no folder" in keep.errors


def test_keep_requires_a_bucket(tmp_path: Path):
    keep = Keep(tmp_path, API, "--config=c.py", "--workdir=/mnt/d")
    assert (keep.end(), keep.steps()) == (2, [])
    assert "keep needs --workdir=gs://BUCKET/DIR" in keep.errors
