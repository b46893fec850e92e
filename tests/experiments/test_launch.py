"""Commands that the launchers run, and `train_tpu.sh keep` under preemptions, with a fake gcloud."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from tests.processes import ROOT

pytestmark = pytest.mark.process  # each test runs a script

FOLDER = ROOT / "experiments" / "launch"
SCRIPTS = [*ROOT.glob("experiments/*/*.sh"), ROOT / ".ci" / "run"]
TPU = {"ZONE": "us-central1-a", "TYPE": "v5litepod-8"}
SSH = "gcloud compute tpus tpu-vm ssh t --zone=us-central1-a"


def script(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    clean = {key: value for key, value in os.environ.items() if key not in ("SPOT", "PROJECT", "VERSION", *TPU)}
    return subprocess.run(
        [FOLDER / name, *arguments], cwd=ROOT, env={**clean, **environment}, capture_output=True, text=True, check=False
    )


def lines(name: str, *arguments: str, **environment: str) -> list[str]:
    process = script(name, "--dry-run", *arguments, **environment)
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_pass_shellcheck(path: Path):
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0
    shellcheck = Path(sys.executable).with_name("shellcheck")
    found = subprocess.run([shellcheck, path], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_train_tpu_create_requests_the_type():
    (line,) = lines("train_tpu.sh", "create", "t", **TPU, SPOT="1", PROJECT="p")
    assert line == (
        "gcloud compute tpus queued-resources create t --node-id=t --zone=us-central1-a --project=p "
        "--accelerator-type=v5litepod-8 --runtime-version=v2-alpha-tpuv5-lite --spot"
    )
    for kind, version in (("v4-8", "tpu-ubuntu2204-base"), ("v5p-8", "v2-alpha-tpuv5"), ("v6e-8", "v2-alpha-tpuv6e")):
        assert f"--runtime-version={version}" in lines("train_tpu.sh", "create", "t", **{**TPU, "TYPE": kind})[0]
    assert (
        "--runtime-version=mine" in lines("train_tpu.sh", "create", "t", **{**TPU, "TYPE": "v9-1"}, VERSION="mine")[0]
    )


def test_train_tpu_setup_installs_on_every_host():
    archive, copy, install = lines("train_tpu.sh", "setup", "t", **TPU, TMPDIR="/somewhere")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert archive == (
        f"git -C {ROOT} archive --output=/somewhere/mmfusion.tar.gz --format=tar.gz "
        f"--add-virtual-file=COMMIT:{head.strip()} HEAD"
    )
    assert copy == "gcloud compute tpus tpu-vm scp /somewhere/mmfusion.tar.gz t: --zone=us-central1-a --worker=all"
    assert install.startswith(f"{SSH} --worker=all '--command=mkdir -p mmfusion && tar xzf mmfusion.tar.gz -C mmfusion")
    assert "uv pip install --python env/bin/python -r requirements.txt" in install


def test_train_tpu_run_passes_flags_unchanged(tmp_path: Path):
    flags = ["--config=configs/X.py:fusion=film", "--workdir=gs://b/d", '--config.data.name=it\'s "a b" $HOME']
    (line,) = lines("train_tpu.sh", "run", "t", *flags, **TPU)
    # Runs the remote shell command locally, with a fake Python.
    (tmp_path / "mmfusion" / "env" / "bin").mkdir(parents=True)
    python = tmp_path / "mmfusion" / "env" / "bin" / "python"
    python.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\nexit 75\n')
    python.chmod(0o755)
    fake = 'gcloud() { local last="${@: -1}"; bash -c "${last#--command=}"; }\n'
    subprocess.run(["bash", "-c", f"{fake}{line}\nwait; sleep 1"], cwd=tmp_path, check=True)
    arguments = (tmp_path / "mmfusion" / "run.log").read_text().splitlines()
    assert arguments == ["-m", "experiments.train", "--distributed=auto", *flags]
    assert (tmp_path / "mmfusion" / "status").read_text() == "75\n"


def test_train_tpu_prints_follow_status_fetch_and_delete_commands():
    assert lines("train_tpu.sh", "follow", "t", **TPU) == [
        f"{SSH} --worker=0 '--command=tail -n 100 -F mmfusion/run.log'"
    ]
    assert lines("train_tpu.sh", "status", "t", **TPU) == [
        f"{SSH} --worker=all '--command=cat mmfusion/status 2> /dev/null || echo running'"
    ]
    assert lines("train_tpu.sh", "fetch", "t", "gs://b/d", "out", **TPU) == [
        "gcloud storage cp --recursive gs://b/d out"
    ]
    assert lines("train_tpu.sh", "fetch", "t", "mmfusion/d", "out", **TPU) == [
        "gcloud compute tpus tpu-vm scp --recurse t:mmfusion/d out --zone=us-central1-a --worker=0"
    ]
    assert lines("train_tpu.sh", "delete", "t", **TPU) == [
        "gcloud compute tpus queued-resources delete t --zone=us-central1-a --force --quiet"
    ]


# A fake gcloud: the first request is refused, the second TPU is preempted, and the run on the third stops once. Its
# first restart fails, and so does the first deletion of the TPU.
GCLOUD = r"""#!/usr/bin/env bash
count() { echo x >> "$HOME/$1"; wc -l < "$HOME/$1"; }
echo "$*" >> "$HOME/requests"
case "$*" in
  *"queued-resources create"*) [ -z "$REFUSED" ] && [ "$(count created)" -ne 1 ] ;;
  *"queued-resources describe"*)
    states=(PROVISIONING ACTIVE ACTIVE "" SUSPENDED ACTIVE ACTIVE ACTIVE ACTIVE ACTIVE)  # "": no output
    echo "${states[$(($(count described) - 1))]}" ;;
  *"cat mmfusion/status"*)
    ended=("" 75 75 134 0)
    echo "${ended[$(($(count looked) - 1))]}" ;;
  *experiments.train*) [ "$(count ran)" -ne 3 ] ;;
  *"queued-resources delete"*) [ "$(count deleted)" -ne 3 ] ;;
esac
"""


def keep(home: Path, *flags: str, refused: str = "") -> tuple[subprocess.CompletedProcess, list[str]]:
    gcloud = home / "bin" / "gcloud"
    gcloud.parent.mkdir()
    gcloud.write_text(GCLOUD)
    gcloud.chmod(0o755)
    path = f"{gcloud.parent}:{os.environ['PATH']}"
    environment = {"HOME": str(home), "TMPDIR": str(home), "PATH": path, "REFUSED": refused}
    process = script("train_tpu.sh", "keep", "t", *flags, **TPU, **environment, EVERY="0")
    requests = (home / "requests").read_text().splitlines() if (home / "requests").exists() else []
    return process, [_command_type(line) for line in requests if "describe" not in line]


def _command_type(line: str) -> str:
    for part in ("create", "delete", "scp", "uv venv", "experiments.train", "cat mmfusion/status"):
        if part in line:
            return part
    return line


def test_train_tpu_keep_survives_refusals_preemptions_and_stops(tmp_path: Path):
    process, requests = keep(tmp_path, "--config=c.py", "--workdir=gs://b/d")
    assert process.returncode == 0, process.stderr
    start = ["create", "scp", "uv venv", "experiments.train"]
    poll = "cat mmfusion/status"
    assert requests == [
        *("create", "delete"),  # refused
        *(*start, poll, "delete"),  # runs until preempted
        *(*start, *[poll, "experiments.train"] * 3, poll, "delete", "delete"),  # stops, loses a host, finishes
    ]


def test_train_tpu_keep_dry_run_prints_each_step():
    commands = lines("train_tpu.sh", "keep", "t", "--config=c.py", "--workdir=gs://b/d", **TPU)
    assert [_command_type(line) for line in commands if " archive " not in line] == [
        "create", "scp", "uv venv", "experiments.train", "delete",
    ]  # fmt: skip


def test_train_tpu_keep_gives_up_after_five_failures(tmp_path: Path):
    process, requests = keep(tmp_path, "--config=c.py", "--workdir=gs://b/d", refused="always")
    assert (process.returncode, requests) == (1, ["create", "delete"] * 5)
    assert "could not be started, 5 times in a row" in process.stderr


def test_train_tpu_keep_requires_a_bucket(tmp_path: Path):
    process, requests = keep(tmp_path, "--config=c.py", "--workdir=/mnt/d")
    assert (process.returncode, requests) == (2, [])
    assert "keep needs --workdir=gs://BUCKET/DIR" in process.stderr


@pytest.mark.parametrize(
    "arguments", [[], ["create"], ["jump", "t"], ["run", "t"], ["fetch", "t", "gs://b"], ["delete", "t", "more"]]
)
def test_train_tpu_prints_usage_on_invalid_arguments(arguments: Sequence[str]):
    process = script("train_tpu.sh", *arguments, **TPU)
    assert (process.returncode, process.stdout) == (2, "")
    assert "usage:" in process.stderr
    process = script("train_tpu.sh", "create", "t", ZONE="z", TYPE="v9-1")
    assert process.returncode == 2 and "set VERSION too" in process.stderr


def test_train_gke_writes_a_job_manifest():
    settings = {
        "IMAGE": "registry/image:1",
        "TPU": "tpu-v5-lite-podslice",
        "TOPOLOGY": "4x4",
        "HOSTS": "4",
        "CHIPS": "4",
    }
    flags = ["--config=c.py", '--config.data.name=a "b" \\c']
    command, *manifest = lines("train_gke.sh", "run-1", *flags, **settings)
    assert command == "kubectl apply -f -"
    job = yaml.safe_load("\n".join(manifest))["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["completions"], job["parallelism"]) == (4, 4)
    pod = job["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"
    (container,) = pod["containers"]
    assert container["command"] == ["python", "-m", "experiments.train", "--distributed=auto"]
    assert container["args"] == flags
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    process = script("train_gke.sh", "run-1", *flags, **{**settings, "HOSTS": "2"})
    assert process.returncode == 2 and "TOPOLOGY=4x4 is not HOSTS=2 x CHIPS=4" in process.stderr


def test_train_slurm_runs_srun_and_requeue():
    assert lines("train_slurm.sh", "--config=c.py") == [
        "srun --kill-on-bad-exit=1 python -m experiments.train --distributed=auto --config=c.py",
        "scontrol requeue JOB # after exit 75, 134, 137 or 143, at most 100 times",
    ]
    assert script("train_slurm.sh").returncode == 2


@pytest.mark.parametrize(
    ("status", "restarts", "requeued"),
    [(75, 0, True), (137, 99, True), (143, 0, True), (137, 100, False), (2, 0, False)],
)
def test_train_slurm_requeues_resumable_runs(status: int, restarts: int, requeued: bool, tmp_path: Path):
    for name, body in (("srun", f"exit {status}"), ("scontrol", f'echo "$@" > {tmp_path}/requests')):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    assert script("train_slurm.sh", "--config=c.py", **job).returncode == status
    assert (tmp_path / "requests").exists() == requeued


def test_ablation_launchers_give_each_machine_its_shard(tmp_path):
    process = subprocess.run(
        [FOLDER / "ablate_tpu.sh", "--dry-run", "one two", "--fusions=all", "--workdir=/shared/a b"],
        env={**os.environ, "ZONE": "z"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert [f"--shard={i}/2" in line for i, line in enumerate(process.stdout.splitlines())] == [True, True]
    assert r"/shared/a\ b" in process.stdout
    assert subprocess.run([FOLDER / "ablate_tpu.sh", "one"], capture_output=True, check=False).returncode == 2
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    slurm = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "4"}
    process = subprocess.run(
        [FOLDER / "ablate_slurm.sh", "--seeds=6"], capture_output=True, text=True, check=True,
        env={**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert process.stdout.split() == ["-m", "experiments.ablate", "--shard=2/4", "--seeds=6"]
