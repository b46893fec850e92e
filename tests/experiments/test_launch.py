"""What the launchers run, and how `train_tpu.sh keep` gets a run through preemptions, with a fake gcloud."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from tests.processes import ROOT

pytestmark = pytest.mark.process  # each runs a script

FOLDER = ROOT / "experiments" / "launch"
SCRIPTS = [*ROOT.glob("experiments/*/*.sh"), ROOT / ".ci" / "run"]
PLACE = {"ZONE": "us-central1-a", "TYPE": "v5litepod-8"}
SSH = "gcloud compute tpus tpu-vm ssh t --zone=us-central1-a"


def script(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    clean = {key: value for key, value in os.environ.items() if key not in ("SPOT", "PROJECT", "VERSION", *PLACE)}
    return subprocess.run(
        [FOLDER / name, *arguments], cwd=ROOT, env={**clean, **environment}, capture_output=True, text=True, check=False
    )


def lines(name: str, *arguments: str, **environment: str) -> list[str]:
    done = script(name, "--dry-run", *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_pass_shellcheck(path: Path):
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0
    shellcheck = Path(sys.executable).with_name("shellcheck")
    found = subprocess.run([shellcheck, path], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_train_tpu_create_requests_the_type():
    (line,) = lines("train_tpu.sh", "create", "t", **PLACE, SPOT="1", PROJECT="p")
    assert line == (
        "gcloud compute tpus queued-resources create t --node-id=t --zone=us-central1-a --project=p "
        "--accelerator-type=v5litepod-8 --runtime-version=v2-alpha-tpuv5-lite --spot"
    )
    for kind, version in (("v4-8", "tpu-ubuntu2204-base"), ("v5p-8", "v2-alpha-tpuv5"), ("v6e-8", "v2-alpha-tpuv6e")):
        assert f"--runtime-version={version}" in lines("train_tpu.sh", "create", "t", **{**PLACE, "TYPE": kind})[0]
    assert (
        "--runtime-version=mine" in lines("train_tpu.sh", "create", "t", **{**PLACE, "TYPE": "v9-1"}, VERSION="mine")[0]
    )


def test_train_tpu_setup_reaches_every_host():
    archive, copy, install = lines("train_tpu.sh", "setup", "t", **PLACE, TMPDIR="/somewhere")
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
    (line,) = lines("train_tpu.sh", "run", "t", *flags, **PLACE)
    # what the host's shell gets is run here, with a stand-in for its Python
    (tmp_path / "mmfusion" / "env" / "bin").mkdir(parents=True)
    python = tmp_path / "mmfusion" / "env" / "bin" / "python"
    python.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\nexit 75\n')
    python.chmod(0o755)
    fake = 'gcloud() { local last="${@: -1}"; bash -c "${last#--command=}"; }\n'
    subprocess.run(["bash", "-c", f"{fake}{line}\nwait; sleep 1"], cwd=tmp_path, check=True)
    said = (tmp_path / "mmfusion" / "run.log").read_text().splitlines()
    assert said == ["-m", "experiments.train", "--distributed=auto", *flags]
    assert (tmp_path / "mmfusion" / "status").read_text() == "75\n"


def test_train_tpu_follow_status_fetch_delete():
    assert lines("train_tpu.sh", "follow", "t", **PLACE) == [
        f"{SSH} --worker=0 '--command=tail -n 100 -F mmfusion/run.log'"
    ]
    assert lines("train_tpu.sh", "status", "t", **PLACE) == [
        f"{SSH} --worker=all '--command=cat mmfusion/status 2> /dev/null || echo running'"
    ]
    assert lines("train_tpu.sh", "fetch", "t", "gs://b/d", "out", **PLACE) == [
        "gcloud storage cp --recursive gs://b/d out"
    ]
    assert lines("train_tpu.sh", "fetch", "t", "mmfusion/d", "out", **PLACE) == [
        "gcloud compute tpus tpu-vm scp --recurse t:mmfusion/d out --zone=us-central1-a --worker=0"
    ]
    assert lines("train_tpu.sh", "delete", "t", **PLACE) == [
        "gcloud compute tpus queued-resources delete t --zone=us-central1-a --force --quiet"
    ]


# What gcloud would answer: the first request is refused, the next TPU is preempted, the last one's run is stopped once,
# and cannot be begun again at the first try, nor given back at the first.
GCLOUD = r"""#!/usr/bin/env bash
count() { echo x >> "$HOME/$1"; wc -l < "$HOME/$1"; }
echo "$*" >> "$HOME/asked"
case "$*" in
  *"queued-resources create"*) [ -z "$REFUSED" ] && [ "$(count created)" -ne 1 ] ;;
  *"queued-resources describe"*)
    states=(PROVISIONING ACTIVE ACTIVE "" SUSPENDED ACTIVE ACTIVE ACTIVE ACTIVE ACTIVE)  # "": no answer
    echo "${states[$(($(count described) - 1))]}" ;;
  *"cat mmfusion/status"*)
    ended=("" 75 75 134 0)
    echo "${ended[$(($(count looked) - 1))]}" ;;
  *experiments.train*) [ "$(count ran)" -ne 3 ] ;;
  *"queued-resources delete"*) [ "$(count deleted)" -ne 3 ] ;;
esac
"""


def keep(home: Path, *flags: str, refused: str = "") -> tuple[subprocess.CompletedProcess, list[str]]:
    tool = home / "bin" / "gcloud"
    tool.parent.mkdir()
    tool.write_text(GCLOUD)
    tool.chmod(0o755)
    path = f"{tool.parent}:{os.environ['PATH']}"
    here = {"HOME": str(home), "TMPDIR": str(home), "PATH": path, "REFUSED": refused}
    done = script("train_tpu.sh", "keep", "t", *flags, **PLACE, **here, EVERY="0")
    asked = (home / "asked").read_text().splitlines() if (home / "asked").exists() else []
    return done, [_kind(line) for line in asked if "describe" not in line]


def _kind(line: str) -> str:
    for part in ("create", "delete", "scp", "uv venv", "experiments.train", "cat mmfusion/status"):
        if part in line:
            return part
    return line


def test_train_tpu_keep_survives_refusals_preemptions_and_stops(tmp_path: Path):
    done, asked = keep(tmp_path, "--config=c.py", "--workdir=gs://b/d")
    assert done.returncode == 0, done.stderr
    begin = ["create", "scp", "uv venv", "experiments.train"]
    look = "cat mmfusion/status"
    assert asked == [
        *("create", "delete"),  # refused
        *(*begin, look, "delete"),  # runs, is preempted
        *(*begin, *[look, "experiments.train"] * 3, look, "delete", "delete"),  # stops itself, loses a host, ends
    ]


def test_train_tpu_keep_dry_run_prints_each_step():
    said = lines("train_tpu.sh", "keep", "t", "--config=c.py", "--workdir=gs://b/d", **PLACE)
    assert [_kind(line) for line in said if " archive " not in line] == [
        "create", "scp", "uv venv", "experiments.train", "delete",
    ]  # fmt: skip


def test_train_tpu_keep_gives_up_after_five_failures(tmp_path: Path):
    done, asked = keep(tmp_path, "--config=c.py", "--workdir=gs://b/d", refused="always")
    assert (done.returncode, asked) == (1, ["create", "delete"] * 5)
    assert "could not be started, 5 times in a row" in done.stderr


def test_train_tpu_keep_requires_a_bucket(tmp_path: Path):
    done, asked = keep(tmp_path, "--config=c.py", "--workdir=/mnt/d")
    assert (done.returncode, asked) == (2, [])
    assert "keep needs --workdir=gs://BUCKET/DIR" in done.stderr


@pytest.mark.parametrize(
    "arguments", [[], ["create"], ["jump", "t"], ["run", "t"], ["fetch", "t", "gs://b"], ["delete", "t", "more"]]
)
def test_train_tpu_wrong_usage_prints_usage(arguments: Sequence[str]):
    done = script("train_tpu.sh", *arguments, **PLACE)
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage:" in done.stderr
    done = script("train_tpu.sh", "create", "t", ZONE="z", TYPE="v9-1")
    assert done.returncode == 2 and "set VERSION too" in done.stderr


def test_train_gke_manifest():
    chosen = {"IMAGE": "registry/image:1", "TPU": "tpu-v5-lite-podslice", "TOPOLOGY": "4x4", "HOSTS": "4", "CHIPS": "4"}
    flags = ["--config=c.py", '--config.data.name=a "b" \\c']
    command, *manifest = lines("train_gke.sh", "run-1", *flags, **chosen)
    assert command == "kubectl apply -f -"
    job = yaml.safe_load("\n".join(manifest))["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["completions"], job["parallelism"]) == (4, 4)
    pod = job["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"
    (container,) = pod["containers"]
    assert container["command"] == ["python", "-m", "experiments.train", "--distributed=auto"]
    assert container["args"] == flags
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    wrong = script("train_gke.sh", "run-1", *flags, **{**chosen, "HOSTS": "2"})
    assert wrong.returncode == 2 and "TOPOLOGY=4x4 is not HOSTS=2 x CHIPS=4" in wrong.stderr


def test_train_slurm_command():
    assert lines("train_slurm.sh", "--config=c.py") == [
        "srun --kill-on-bad-exit=1 python -m experiments.train --distributed=auto --config=c.py",
        "scontrol requeue JOB # after exit 75, 134, 137 or 143, at most 100 times",
    ]
    assert script("train_slurm.sh").returncode == 2


@pytest.mark.parametrize(
    ("status", "before", "again"), [(75, 0, True), (137, 99, True), (143, 0, True), (137, 100, False), (2, 0, False)]
)
def test_train_slurm_requeues_resumable_runs(status: int, before: int, again: bool, tmp_path: Path):
    for name, does in (("srun", f"exit {status}"), ("scontrol", f'echo "$@" > {tmp_path}/asked')):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(before), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    assert script("train_slurm.sh", "--config=c.py", **job).returncode == status
    assert (tmp_path / "asked").exists() == again


def test_ablation_launchers_give_each_machine_its_shard(tmp_path):
    done = subprocess.run(
        [FOLDER / "ablate_tpu.sh", "--dry-run", "one two", "--fusions=all", "--workdir=/shared/a b"],
        env={**os.environ, "ZONE": "z"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert [f"--shard={i}/2" in line for i, line in enumerate(done.stdout.splitlines())] == [True, True]
    assert r"/shared/a\ b" in done.stdout
    assert subprocess.run([FOLDER / "ablate_tpu.sh", "one"], capture_output=True, check=False).returncode == 2
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    slurm = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "4"}
    done = subprocess.run(
        [FOLDER / "ablate_slurm.sh", "--seeds=6"], capture_output=True, text=True, check=True,
        env={**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.stdout.split() == ["-m", "experiments.ablate", "--shard=2/4", "--seeds=6"]
