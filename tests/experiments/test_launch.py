"""Commands that the launchers run and print, and hostile settings and flags."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.launchers import API, FOLDER, environment, fake, lines, pasted, script
from tests.processes import ROOT

pytestmark = pytest.mark.process  # each test runs a script

SCRIPTS = [*ROOT.glob("experiments/*/*.sh"), ROOT / ".ci" / "run"]
GKE = {"IMAGE": "registry/image:1", "TPU": "tpu-v6e-slice", "TOPOLOGY": "4x4", "HOSTS": "4", "CHIPS": "4"}
SLURM = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_JOB_ID": "7"}
# Flags that are code, markup or another number of words to a shell, to YAML or to Kubernetes.
HOSTILE = [
    "--config=c.py", "--workdir=gs://b/d e", "--a=$(touch PWNED) `touch PWNED` $HOME $(JOB_COMPLETION_INDEX) $$",
    "--b=it's \"x\" \\n \\", "--c=one\ntwo: three\n---\n- four", "--d={a, b}: [c] # d", "--e=MANIFEST\nEND",
    "--f=é*?~!", "", "--g=\ttab; touch PWNED & x > PWNED",
]  # fmt: skip


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_pass_shellcheck(path: Path):
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0
    shellcheck = Path(sys.executable).with_name("shellcheck")
    found = subprocess.run([shellcheck, "-x", path], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize(
    ("name", "setting", "settings"),
    [
        *(("train_gke.sh", setting, GKE) for setting in ("HOSTS", "CHIPS", "TOPOLOGY", "TPU", "IMAGE", "QUEUE")),
        *(("train_tpu.sh", setting, {**API, "TYPE": "ct6e-standard-4t"}) for setting in ("TOPOLOGY", "ZONE", "EVERY")),
        *(("train_tpu.sh", "TYPE", {**API, "TYPE": kind}) for kind in ("ct6e-standard-{}t", "v6e-{}", "{}")),
    ],
)
@pytest.mark.parametrize("value", ["a[$(touch PWNED)]", "1\nkind: Pod", '"x": y'])
def test_settings_are_never_code(name: str, setting: str, settings: dict[str, str], value: str, tmp_path: Path):
    template = settings.get(setting, "{}")
    value = template.format(value) if "{}" in template else value
    arguments = ["create", "t"] if name == "train_tpu.sh" else ["run-1", "--config=c.py"]
    path = fake(tmp_path / "bin", "python", "#!/bin/sh\necho started\n")
    process = subprocess.run(
        [FOLDER / name, "--dry-run", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False,
        env=environment(**{**settings, setting: value, "PATH": path}),
    )  # fmt: skip
    assert (process.returncode, process.stdout) == (2, ""), process.stdout
    assert "expected" in process.stderr
    assert not list(tmp_path.glob("**/PWNED"))


@pytest.mark.parametrize("setting", ["HOSTS", "CHIPS", "TOPOLOGY"])
def test_train_gke_reads_no_octal_numbers(setting: str):
    process = script("train_gke.sh", "run-1", "--config=c.py", **{**GKE, setting: "010"})
    assert process.returncode == 2 and f"{setting}='010': expected" in process.stderr


@pytest.mark.parametrize("name", ["true: x", "a\nb", "-f", "UPPER", "a" * 41, "$(touch PWNED)", ""])
@pytest.mark.parametrize(("launcher", "settings"), [("train_gke.sh", GKE), ("train_tpu.sh", API)])
def test_names_are_labels(name: str, launcher: str, settings: dict[str, str]):
    process = script(launcher, *(["run"] if launcher == "train_tpu.sh" else []), name, "--config=c.py", **settings)
    assert process.returncode == 2 and "lower-case letters, digits and hyphens" in process.stderr


def test_train_gke_writes_a_job_manifest(tmp_path: Path):
    (call,) = pasted("\n".join(lines("train_gke.sh", "true", "--config=c.py", **GKE)), ["kubectl"], tmp_path)
    assert call == ["kubectl", "apply", "-f", "-"]
    job_set = manifest("train_gke.sh", "true", "--config=c.py", **GKE)
    assert job_set["metadata"]["name"] == "true"  # a string, not a truth value
    assert "labels" not in job_set["metadata"]
    job = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["completions"], job["parallelism"]) == (4, 4)
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice", "cloud.google.com/gke-tpu-topology": "4x4",
    }  # fmt: skip
    (container,) = pod["containers"]
    assert container["command"] == ["python", "-m", "experiments.train", "--distributed=auto"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    process = script("train_gke.sh", "run-1", "--config=c.py", **{**GKE, "HOSTS": "2"})
    assert process.returncode == 2 and "TOPOLOGY=4x4 is not HOSTS=2 x CHIPS=4" in process.stderr


def test_train_gke_adds_a_queue_and_spot_nodes():
    job_set = manifest("train_gke.sh", "run-1", "--config=c.py", **GKE, QUEUE="team-a", SPOT="1")
    assert job_set["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "team-a"}
    pod = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert pod["tolerations"][0]["effect"] == "NoSchedule"


def manifest(*arguments: str, **settings: str) -> dict:
    """Returns the manifest that a dry run prints."""
    first, *text, last = lines(*arguments, **settings)
    assert (first, last) == ("kubectl apply -f - <<'MANIFEST'", "MANIFEST")
    return yaml.safe_load("\n".join(text))


def test_train_gke_passes_flags_unchanged():
    job_set = manifest("train_gke.sh", "run-1", *HOSTILE, **GKE)
    (container,) = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    # Kubernetes reads $$ as $, and would replace $(NAME).
    assert [argument.replace("$$", "$") for argument in container["args"]] == HOSTILE
    assert "$(" not in "".join(container["args"]).replace("$$", "")
    process = script("train_gke.sh", "run-1", os.fsdecode(b"--a=\xff"), **GKE)
    assert process.returncode == 2 and "not UTF-8" in process.stderr


def test_train_slurm_dry_run_can_be_pasted(tmp_path: Path):
    printed = lines("train_slurm.sh", *HOSTILE)
    (call,) = pasted("\n".join(printed), ["srun"], tmp_path)
    assert call == [
        "srun", "--kill-on-bad-exit=1", "python", "-m", "experiments.train", "--distributed=auto", *HOSTILE,
    ]  # fmt: skip
    assert printed[-1] == "# after exit status 75, 134, 137 or 143, at most 100 times: scontrol requeue JOB"
    assert script("train_slurm.sh").returncode == 2


def test_ablate_slurm_dry_run_can_be_pasted(tmp_path: Path):
    (call,) = pasted("\n".join(lines("ablate_slurm.sh", *HOSTILE)), ["python"], tmp_path)
    assert call == ["python", "-m", "experiments.ablate", *HOSTILE]


def test_ablate_tpu_dry_run_can_be_pasted(tmp_path: Path):
    text = "\n".join(lines("ablate_tpu.sh", "one two", *HOSTILE, **API))
    calls = pasted(text, ["gcloud"], tmp_path)
    assert [call[5] for call in calls] == ["one", "two"]
    for i, call in enumerate(calls):
        assert remote_arguments(call[-1], tmp_path / str(i)) == ["-m", "experiments.ablate", *HOSTILE]
    assert script("ablate_tpu.sh", "one", **API).returncode == 2
    assert script("ablate_tpu.sh", "one -two", "--seeds=6", **API).returncode == 2


@pytest.mark.parametrize("kind", ["v5litepod-8", "ct6e-standard-8t"])
def test_train_tpu_run_passes_flags_unchanged(kind: str, tmp_path: Path):
    (line,) = lines("train_tpu.sh", "run", "t", *HOSTILE, **{**API, "TYPE": kind})
    *_, call = pasted(line, ["gcloud"], tmp_path)
    assert remote_arguments(call[-1], tmp_path / "host") == [
        "-m", "experiments.train", "--distributed=auto", *HOSTILE,
    ]  # fmt: skip
    assert (tmp_path / "host" / "mmfusion" / "status").read_text() == "75\n"


def remote_arguments(command: str, home: Path) -> list[str]:
    """Runs the command of `gcloud ... ssh` here, with a Python that fails, and returns the arguments of that one."""
    folder = home / "mmfusion" / "env" / "bin"
    folder.mkdir(parents=True)
    body = f"#!{sys.executable} -IS\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\nsys.exit(75)\n"
    fake(folder, "python", body)
    line = f"{command.removeprefix('--command=')}\nwhile [ ! -s status ]; do sleep 0.02; done"
    subprocess.run(["bash", "-c", line], cwd=home, check=True, timeout=20)
    assert not list(home.glob("**/PWNED"))
    return json.loads((home / "mmfusion" / "run.log").read_text())


@pytest.mark.parametrize(
    ("status", "restarts", "requeued"),
    [(75, 0, True), (137, 99, True), (143, 0, True), (137, 100, False), (2, 0, False)],
)
def test_train_slurm_requeues_resumable_runs(status: int, restarts: int, requeued: bool, tmp_path: Path):
    path = fake(tmp_path, "srun", f"#!/usr/bin/env bash\nexit {status}\n")
    fake(tmp_path, "scontrol", f'#!/usr/bin/env bash\necho "$@" > {tmp_path}/requests\n')
    job = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts), "PATH": path}
    assert script("train_slurm.sh", "--config=c.py", **job).returncode == status
    assert (tmp_path / "requests").exists() == requeued


@pytest.mark.parametrize(
    ("status", "restarts", "requests"), [(0, 0, ""), (75, 0, "requeue 7_3\n"), (75, 100, ""), (2, 0, "")]
)
def test_ablate_slurm_runs_and_requeues(status: int, restarts: int, requests: str, tmp_path: Path):
    path = fake(tmp_path, "python", f'#!/bin/sh\necho "$@"\nexit {status}\n')
    fake(tmp_path, "scontrol", f'#!/bin/sh\necho "$@" > {tmp_path}/requests\n')
    process = script("ablate_slurm.sh", "--seeds=6", **SLURM, SLURM_RESTART_COUNT=str(restarts), PATH=path)
    assert process.stdout.split() == ["-m", "experiments.ablate", "--seeds=6"]
    assert process.returncode == status
    found = (tmp_path / "requests").read_text() if (tmp_path / "requests").exists() else ""
    assert found == requests


def test_ablate_slurm_refuses_what_is_no_array():
    process = script("ablate_slurm.sh", "--seeds=6")
    assert process.returncode == 2 and "sbatch --array=0-31%8" in process.stderr


@pytest.mark.parametrize("name", ["train_slurm.sh", "ablate_slurm.sh"])
def test_slurm_scripts_are_requeued_and_warned(name: str):
    options = [line.split() for line in (FOLDER / name).read_text().splitlines() if line.startswith("#SBATCH")]
    found = dict(option.partition("=")[::2] for _, option in options)
    assert found.keys() >= {"--requeue", "--signal", "--open-mode"} and found["--open-mode"] == "append"
    assert found["--signal"].endswith("TERM@120")
