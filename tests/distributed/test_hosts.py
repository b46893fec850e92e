"""The train command in two processes of two devices each: one is stopped or killed, and both go on."""

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from experiments import cli
from mmfusion.distributed import hosts
from mmfusion.errors import UserError
from tests.processes import Started

STEPS = 200  # seconds, so that the signal comes in between
SGD = {"optim.schedule.warmup_steps": 1, "steps": STEPS, "checkpoint_every": 20, "eval_every": STEPS}


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def start(flags, workdir, count=2, last=(), module="experiments.train"):
    """Starts the hosts of a command; `last` are more flags of the last one."""
    port = free_port()
    return [
        Started(
            module,
            [
                *(*flags, f"--workdir={workdir}", f"--distributed=localhost:{port},{host},{count}"),
                *(last if host == count - 1 else ()),
            ],
            merged=True,
            XLA_FLAGS=f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2",
        )
        for host in range(count)
    ]


def finish(processes):
    said = [process.communicate(timeout=240)[0] for process in processes]
    return [process.poll() for process in processes], said


def losses(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if line["split"] == "train"]


@pytest.mark.spread
def test_a_signal_to_one_host_ends_both_and_they_go_on(tiny_flags, command, tmp_path):
    flags = [flag for flag in tiny_flags(SGD) if "model.fusion" not in flag]
    flags += ["--config.optim.name=sgd", "--config.model.fusion.name=concat"]
    done = command("experiments.train", *flags, f"--workdir={tmp_path / 'one'}")
    assert done.returncode == 0, done.stderr

    def interrupt(how, which, lines):
        """Starts both, and sends one of them a signal when so many lines are logged."""
        two = start(flags, tmp_path / "two")
        path, deadline = tmp_path / "two" / "metrics.jsonl", time.monotonic() + 200
        while not (path.exists() and path.read_text().count("\n") >= lines) and time.monotonic() < deadline:
            time.sleep(0.02)
        two[which].send_signal(how)
        return finish(two)

    statuses, said = interrupt(signal.SIGTERM, 1, 1)
    assert statuses == [75, 75], said
    assert "saved at step" in said[0] and "saved at step" in said[1]
    before = len(losses(tmp_path / "two"))
    assert before < STEPS
    began = time.monotonic()
    statuses, said = interrupt(signal.SIGKILL, 0, before + 1)  # whose service the other one needs
    assert statuses[0] == -signal.SIGKILL and statuses[1] in (hosts.LOST_HOST_STATUS, -signal.SIGABRT), (
        said
    )  # 134 in a shell
    assert time.monotonic() - began < 100
    assert len(losses(tmp_path / "two")) < STEPS
    statuses, said = interrupt(signal.SIGKILL, 1, len(losses(tmp_path / "two")) + 1)  # which serves nobody
    assert statuses[0] in (hosts.LOST_HOST_STATUS, -signal.SIGABRT) and statuses[1] == -signal.SIGKILL, said
    assert len(losses(tmp_path / "two")) < STEPS
    statuses, said = finish(start(flags, tmp_path / "two"))
    assert statuses == [0, 0], said
    statuses, said = finish(start([], tmp_path / "two", module="experiments.evaluate"))
    assert statuses == [0, 0], said
    assert "accuracy" in said[0] and "accuracy" not in said[1]
    statuses, wrong = finish(start([], tmp_path / "two", last=["--split=valid"], module="experiments.evaluate"))
    assert statuses == [2, 2] and "hosts 1 have another command than host 0" in wrong[0], wrong
    evaluated, result = (
        json.loads((tmp_path / "two" / name).read_text()) for name in ("evaluation.json", "result.json")
    )
    assert evaluated["accuracy"] == result["test"]["accuracy"]
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=2e-5)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("--config.nokey=5", "nokey"),  # found before anything is built
        ("--workdir=/proc/none", "/proc/none"),  # in the middle of what all do together
        ("--workdir={}/other", "give all hosts a folder that they share"),
    ],
)
def test_where_one_host_fails_all_end_and_say_why(tiny_flags, tmp_path, wrong, says):
    flags = [flag for flag in tiny_flags(SGD) if "model.fusion" not in flag]
    began = time.monotonic()
    statuses, said = finish(
        start([*flags, "--config.model.fusion.name=concat"], tmp_path / "run", last=[wrong.format(tmp_path)])
    )
    assert time.monotonic() - began < 100  # and not the five minutes that a barrier waits
    assert statuses == [2, 2], said
    assert "error: host 1 failed, and this one ends with it: " in said[0] and says in said[0] and says in said[1]
    assert "Traceback" not in said[0] + said[1]


def test_a_host_that_misses_another_ends_with_a_status_that_scripts_run_again(monkeypatch, capsys):
    left = []
    monkeypatch.setattr(hosts, "is_multihost", lambda: True)
    monkeypatch.setattr(hosts, "abort_all", lambda status, said: left.append(status))
    for error in (RuntimeError("Gloo all-reduce failed: Connection closed by peer"), RuntimeError("out of memory")):
        with pytest.raises(RuntimeError):
            cli.run(functools.partial(_raise, error))
    assert left == [hosts.LOST_HOST_STATUS, 1, 1]  # `leave` does not come back, where it is not replaced
    assert "error: another host was lost: run the same command again on all of them (Gloo" in capsys.readouterr().err


def _raise(error, _):
    raise error


def test_what_is_no_address_is_told():
    for wrong in ("somewhere", "localhost:1,a,2", "localhost:1,0"):
        with pytest.raises(UserError, match="is neither auto nor HOST:PORT,PROCESS,PROCESSES"):
            hosts.initialize(wrong)
    hosts.initialize("")


@pytest.mark.spread
def test_who_is_lost_when_all_is_done_harms_nobody():
    port = free_port()  # processes of their own: those of `Started` end without what JAX does at its end
    two = [subprocess.Popen([sys.executable, "-m", "tests.parting", str(port), str(host)]) for host in range(2)]
    assert [host.wait(100) for host in two] == [0, -signal.SIGKILL]


@pytest.mark.spread
def test_whoever_met_needs_no_further_connection():
    """Those of Gloo fail where a host is 30 seconds late; what a step sums over is connected before it is compiled."""
    port = free_port()
    devices = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    statuses, said = finish(
        [Started("tests.meeting", [str(port), str(host)], merged=True, XLA_FLAGS=devices) for host in range(2)]
    )
    assert statuses == [0, 0], said
    for counts in map(json.loads, said):
        assert counts[0] > 0 and set(counts) == {counts[0]}
