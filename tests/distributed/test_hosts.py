"""The train command on two hosts of two devices each, where one is stopped, killed or given other arguments."""

import functools
import json
import os
import signal
import socket
import time

import numpy as np
import pytest

from experiments import cli
from mmfusion.data import sources
from mmfusion.data.builders.shapes.shapes_dataset_builder import VARIANTS
from mmfusion.distributed import hosts
from tests.errors import rejects
from tests.processes import Started

STEPS = 120  # seconds, so that the signal comes in between
LOST = (hosts.LOST_HOST_STATUS, -signal.SIGABRT)  # both are 134 in a shell
SGD = {"optim.schedule.warmup_steps": 1, "steps": STEPS, "checkpoint_every": 20, "eval_every": STEPS}


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def start(flags, workdir, count=2, last=(), module="experiments.train"):
    """Starts the hosts of a command; `last` holds further flags of the last host."""
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
    output = [process.communicate(timeout=240)[0] for process in processes]
    return [process.poll() for process in processes], output


def losses(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if line["split"] == "train"]


@pytest.mark.spread
def test_hosts_all_stop_on_a_signal_to_one_and_resume(tiny_flags, command, tmp_path):
    flags = [*tiny_flags(SGD), "--config.optim.name=sgd"]
    done = command("experiments.train", *flags, f"--workdir={tmp_path / 'one'}")
    assert done.returncode == 0, done.stderr

    def interrupt(how, which, lines):
        """Starts both hosts, and sends one of them a signal once so many lines are logged."""
        two = start(flags, tmp_path / "two")
        path, deadline = tmp_path / "two" / "metrics.jsonl", time.monotonic() + 200
        while not (path.exists() and path.read_text().count("\n") >= lines) and time.monotonic() < deadline:
            time.sleep(0.02)
        two[which].send_signal(how)
        return finish(two)

    statuses, output = interrupt(signal.SIGTERM, 1, 1)
    assert statuses == [75, 75], output
    assert "saved at step" in output[0] and "saved at step" in output[1]
    before = len(losses(tmp_path / "two"))
    assert before < STEPS
    began = time.monotonic()
    statuses, output = interrupt(signal.SIGKILL, 0, before + 1)  # it runs the coordination service
    assert statuses[0] == -signal.SIGKILL and statuses[1] in LOST, output
    assert time.monotonic() - began < 100
    assert len(losses(tmp_path / "two")) < STEPS
    statuses, output = finish(start(flags, tmp_path / "two"))
    assert statuses == [0, 0], output
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=2e-5)


@pytest.mark.process
@pytest.mark.thorough
def test_hosts_evaluate_a_run_together_and_refuse_different_commands(tiny_flags, command, tmp_path):
    flags = tiny_flags({"steps": 2, "eval_every": 2})
    done = command("experiments.train", *flags, f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    statuses, output = finish(start([], tmp_path / "run", module="experiments.evaluate"))
    assert statuses == [0, 0], output
    assert "accuracy" in output[0] and "accuracy" not in output[1]
    statuses, wrong = finish(start([], tmp_path / "run", last=["--split=valid"], module="experiments.evaluate"))
    assert statuses == [2, 2] and "hosts 1 have another command than host 0" in wrong[0], wrong
    (evaluated,), result = (
        json.loads((tmp_path / "run" / name).read_text()) for name in ("evaluation.json", "result.json")
    )
    assert evaluated["accuracy"] == pytest.approx(result["test"]["accuracy"])


@pytest.mark.process
@pytest.mark.thorough(but=("--workdir={}/other-give all hosts a shared folder",))
@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("--config.nokey=5", "nokey"),  # found before the model is built
        ("--workdir=/proc/none", "/proc/none"),  # while the hosts take turns
        ("--workdir={}/other", "give all hosts a shared folder"),
    ],
)
def test_hosts_all_stop_with_the_reason_when_one_fails(tiny_flags, tmp_path, wrong, says):
    began = time.monotonic()
    statuses, output = finish(start(tiny_flags(SGD), tmp_path / "run", last=[wrong.format(tmp_path)]))
    assert time.monotonic() - began < 100  # and not the five minutes that a barrier waits
    assert statuses == [2, 2], output
    assert "error: host 1 failed, so this host stops too: " in output[0] and says in output[0] and says in output[1]
    assert "Traceback" not in output[0] + output[1]


@pytest.mark.process
@pytest.mark.thorough
def test_hosts_all_stop_with_what_differs_where_one_has_other_rows(tiny_flags, tmp_path, monkeypatch):
    variants = {n: (*how, tuple(x // 10 + 16 for x in sizes), what) for n, (*how, sizes, what) in VARIANTS.items()}
    monkeypatch.setitem(VARIANTS, "match", variants["match"])
    sources.open_source("shapes/match", "train", data_dir=str(tmp_path / "data"), manual_dir="", seed=0)
    last = [f"--config.data.dir={tmp_path / 'data'}"]
    statuses, output = finish(start(tiny_flags(SGD), tmp_path / "run", last=last))
    assert statuses == [2, 2], output
    for text in output:
        assert "rows of train is all:" in text and "on host 1 and all:" in text and "Traceback" not in text
    assert not (tmp_path / "run").exists()


def test_hosts_exit_with_a_status_to_retry_when_another_is_lost(monkeypatch, capsys):
    left = []
    monkeypatch.setattr(hosts, "is_multihost", lambda: True)
    monkeypatch.setattr(hosts, "abort_all", lambda status, message: left.append(status))
    for error in (RuntimeError("Gloo all-reduce failed: Connection closed by peer"), RuntimeError("out of memory")):
        with pytest.raises(RuntimeError):
            cli.run(functools.partial(_raise, error))
    assert left == [hosts.LOST_HOST_STATUS, 1, 1]  # the real `abort_all` does not return
    assert "error: another host was lost: run the same command again on all hosts (Gloo" in capsys.readouterr().err


def _raise(error, _):
    raise error


def test_hosts_initialize_rejects_other_addresses():
    for wrong in ("somewhere", "localhost:1,a,2", "localhost:1,0"):
        with rejects("--distributed", wrong, says="HOST:PORT,PROCESS,PROCESSES"):
            hosts.initialize(wrong)
    hosts.initialize("")


@pytest.mark.thorough
@pytest.mark.process
@pytest.mark.spread
def test_hosts_succeed_when_one_is_lost_after_the_shutdown_barrier():
    port = free_port()
    two = [Started("tests.distributed.lose_host", [str(port), str(host)]) for host in range(2)]
    for host in two:
        host.communicate(100)
    assert [host.poll() for host in two] == [0, -signal.SIGKILL]


@pytest.mark.process
@pytest.mark.spread
def test_hosts_connect_makes_all_connections():
    """Gloo gives up on a host that is 30 seconds late, so the axes of a step are connected before it is compiled."""
    port = free_port()
    devices = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    statuses, output = finish(
        [
            Started("tests.distributed.connect_hosts", [str(port), str(host)], merged=True, XLA_FLAGS=devices)
            for host in range(2)
        ]
    )
    assert statuses == [0, 0], output
    for counts in map(json.loads, output):
        assert counts[0] > 0 and set(counts) == {counts[0]}
