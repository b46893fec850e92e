"""Manifests of Kubernetes and SkyPilot: their fields, what they do after each exit status, and their commands."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments import cli
from mmfusion.distributed import hosts
from tests.launchers import FOLDER, environment, fake, lines
from tests.processes import ROOT

pytestmark = pytest.mark.process  # most tests run a script

GKE = {"IMAGE": "r/i:1", "TPU": "tpu7x", "TOPOLOGY": "2x2x2", "HOSTS": "2", "QUEUE": "team", "SPOT": "1"}
# Fields that the manifests may use, as in the API of Kubernetes 1.33 (batch/v1), the JobSet API v1alpha2 and the YAML
# reference of SkyPilot 0.14: a type, the values allowed, or the fields of an object or of each item of a list.
POD_FAILURE_POLICY = {
    "rules": [
        {
            "action": {"FailJob", "FailIndex", "Ignore", "Count"},
            "onExitCodes": {"containerName": str, "operator": {"In", "NotIn"}, "values": [int]},
            "onPodConditions": [{"type": {"DisruptionTarget"}, "status": {"True"}}],
        }
    ]
}
POD = {
    "restartPolicy": {"Never"},  # podFailurePolicy and backoffLimitPerIndex require it
    "terminationGracePeriodSeconds": int,
    "nodeSelector": dict,
    "tolerations": [{"key": str, "operator": {"Equal"}, "value": str, "effect": {"NoSchedule"}}],
    "containers": [
        {
            "name": str,
            "image": str,
            "command": [str],
            "args": [str],
            "resources": {"requests": dict, "limits": dict},
            "volumeMounts": [{"name": str, "mountPath": str}],
        }
    ],
    "volumes": [{"name": str, "persistentVolumeClaim": {"claimName": str}}],
}
JOB_SPEC = {
    "completionMode": {"Indexed"},
    "completions": int,
    "parallelism": int,
    "backoffLimit": int,
    "backoffLimitPerIndex": int,
    "podReplacementPolicy": {"Failed"},  # the only value beside a podFailurePolicy
    "podFailurePolicy": POD_FAILURE_POLICY,
    "template": {"spec": POD},
}
METADATA = {"name": str, "labels": dict, "annotations": dict}
JOB = {"apiVersion": {"batch/v1"}, "kind": {"Job"}, "metadata": METADATA, "spec": JOB_SPEC}
JOB_SET_RULE = {
    "name": str,
    "action": {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"},
    "onJobFailureReasons": [{"BackoffLimitExceeded", "DeadlineExceeded", "PodFailurePolicy"}],
}
JOB_SET = {
    "apiVersion": {"jobset.x-k8s.io/v1alpha2"},
    "kind": {"JobSet"},
    "metadata": METADATA,
    "spec": {
        "failurePolicy": {"maxRestarts": int, "rules": [JOB_SET_RULE]},
        "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": JOB_SPEC}}],
    },
}
RECOVERY = {
    "strategy": {"FAILOVER", "EAGER_NEXT_REGION"},
    "max_restarts_on_errors": int,
    "recover_on_exit_codes": [int],
}
SKY = {
    "name": str,
    "workdir": str,
    "pool": {"workers": int},
    "resources": {
        "infra": str, "accelerators": str, "cpus": str, "memory": str, "use_spot": bool, "job_recovery": RECOVERY,
    },
    "envs": dict,
    "setup": str,
    "run": str,
}  # fmt: skip


def misfits(value: Any, spec: Any, path: str = "") -> list[str]:
    """Returns the paths of fields that do not exist or have another type or value than allowed."""
    if isinstance(spec, dict) and isinstance(value, dict):
        known = [p for key in value for p in (misfits(value[key], spec[key], f"{path}.{key}") if key in spec else ())]
        return known + [f"{path}.{key}" for key in value if key not in spec]
    if isinstance(spec, list) and isinstance(value, list):
        return [p for i, item in enumerate(value) for p in misfits(item, spec[0], f"{path}[{i}]")]
    allowed = value in spec if isinstance(spec, set) else isinstance(spec, type) and type(value) is spec
    return [] if allowed else [path]


def load(name: str) -> dict:
    return yaml.safe_load((FOLDER / name).read_text())


@pytest.fixture(scope="module")
def job_set() -> dict:
    return yaml.safe_load("\n".join(lines("train_gke.sh", "run-1", "--config=c.py", **GKE)[1:-1]))


def action(job: dict, status: int, *, disrupted: bool = False) -> str:
    """Returns what a job does after a failed pod: the action of the first rule that matches, or Count."""
    for rule in job["podFailurePolicy"]["rules"]:
        codes, conditions = rule.get("onExitCodes"), rule.get("onPodConditions")
        if codes and (status in codes["values"]) == (codes["operator"] == "In"):
            return rule["action"]
        if conditions and disrupted:
            return rule["action"]
    return "Count"


def check_job(job: dict) -> None:
    """Checks what the API requires of fields together."""
    (container,) = job["template"]["spec"]["containers"]
    for rule in job["podFailurePolicy"]["rules"]:
        assert ("onExitCodes" in rule) != ("onPodConditions" in rule)
        if codes := rule.get("onExitCodes"):
            assert codes["containerName"] == container["name"]
            assert 0 not in codes["values"] and codes["values"] == sorted(set(codes["values"]))
        assert rule["action"] != "FailIndex" or "backoffLimitPerIndex" in job
    assert "backoffLimitPerIndex" not in job or job["completionMode"] == "Indexed"
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    mounted = {mount["name"] for mount in container.get("volumeMounts", ())}
    assert mounted == {volume["name"] for volume in job["template"]["spec"].get("volumes", ())}


def test_misfits_are_found():
    value = {
        "apiVersion": "batch/v1",
        "kind": "Pod",
        "metadata": {"name": 1, "nmae": "x"},
        "spec": {"completions": "8"},
    }
    assert misfits(value, JOB) == [".kind", ".metadata.name", ".metadata.nmae", ".spec.completions"]


def test_ablation_job_has_fields_of_the_api():
    job = load("ablate_kubernetes.yaml")
    assert misfits(job, JOB) == []
    check_job(job["spec"])
    assert job["metadata"]["labels"].keys() == {"kueue.x-k8s.io/queue-name"}
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["requests"].keys() == {"cpu", "memory"}  # what Kueue counts


@pytest.mark.parametrize(
    ("status", "disrupted", "expected"),
    [
        (cli.USER_ERROR, False, "FailIndex"),  # at once
        (cli.USER_ERROR, True, "FailIndex"),
        (cli.TRY_AGAIN, False, "Count"),  # again, up to backoffLimitPerIndex
        (cli.TRY_AGAIN, True, "Ignore"),  # again, without counting
        (137, True, "Ignore"),
        (137, False, "Count"),
        (cli.FAILED, False, "Count"),
    ],
)
def test_ablation_job_retries_what_can_succeed(status: int, disrupted: bool, expected: str):
    spec = load("ablate_kubernetes.yaml")["spec"]
    assert action(spec, status, disrupted=disrupted) == expected and spec["backoffLimitPerIndex"] > 1


def test_train_gke_has_fields_of_the_api(job_set: dict):
    assert misfits(job_set, JOB_SET) == []
    (replicated,) = job_set["spec"]["replicatedJobs"]
    check_job(replicated["template"]["spec"])


def test_train_gke_restarts_all_hosts_unless_it_is_hopeless(job_set: dict):
    job = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["backoffLimit"] == 0  # one failed host fails the job, and the JobSet restarts it
    for status in (cli.FAILED, cli.USER_ERROR):
        assert action(job, status) == "FailJob"
    for status in (cli.TRY_AGAIN, hosts.LOST_HOST_STATUS, 137, 143):
        assert action(job, status) == "Count"
    policy = job_set["spec"]["failurePolicy"]
    assert policy["maxRestarts"] >= 100
    (rule,) = policy["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])


@pytest.mark.parametrize("name", ["train_sky.yaml", "ablate_sky.yaml", "ablate_sky_pool.yaml"])
def test_sky_files_have_documented_fields(name: str):
    task = load(name)
    assert misfits(task, SKY) == []
    assert task["resources"]["use_spot"]
    for part in ("setup", "run"):
        assert subprocess.run(["bash", "-n", "-c", task.get(part, "")], check=False).returncode == 0


@pytest.mark.parametrize("name", ["train_sky.yaml", "ablate_sky.yaml"])
def test_sky_jobs_recover_from_what_can_succeed(name: str):
    recovery = load(name)["resources"]["job_recovery"]
    assert recovery["max_restarts_on_errors"] == 0
    assert {cli.TRY_AGAIN, 137, 143} <= set(recovery["recover_on_exit_codes"])
    assert not {cli.DONE, cli.FAILED, cli.USER_ERROR} & set(recovery["recover_on_exit_codes"])


def test_sky_jobs_fit_their_pool():
    job, pool = load("ablate_sky.yaml")["resources"], load("ablate_sky_pool.yaml")["resources"]
    assert {key: job[key] for key in pool} == pool


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("train_sky.yaml", ["-m", "experiments.train"]),
        ("ablate_sky.yaml", ["-m", "experiments.ablate", "--seeds=6"]),
    ],
)
def test_sky_jobs_pass_their_variables_unchanged(name: str, expected: list[str], tmp_path: Path):
    (tmp_path / "env").mkdir()
    fake(tmp_path / "env" / "bin", "python", '#!/usr/bin/env bash\nprintf "%s\\0" "$@"\n')
    values = {"CONFIG": "c.py:a=$(touch PWNED) 'x\n*", "WORKDIR": "gs://b/d e"}
    task = load(name)
    assert task["envs"] == dict.fromkeys(values)  # required
    settings = environment(**values)
    run = subprocess.run(["bash", "-c", task["run"]], cwd=tmp_path, env=settings, capture_output=True, check=True)
    arguments = run.stdout.decode().split("\0")[:-1]
    assert arguments == [*expected, f"--config={values['CONFIG']}", f"--workdir={values['WORKDIR']}"]
    assert not (tmp_path / "PWNED").exists()


def test_manifests_give_flags_that_exist():
    found = re.findall(
        r"--([a-z]+)[= ]", (FOLDER / "ablate_kubernetes.yaml").read_text() + load("ablate_sky.yaml")["run"]
    )
    defined = re.findall(r'DEFINE_\w+\(\s*"(\w+)"', (ROOT / "experiments" / "ablate.py").read_text())
    assert {"workdir", "seeds"} <= set(found) <= {*defined, "config"}


@pytest.mark.thorough
def test_manifests_pass_the_schemas_of_kubernetes(job_set: dict):
    validate = pytest.importorskip("kubernetes_validate").validate
    (replicated,) = job_set["spec"]["replicatedJobs"]
    of_set = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "train"}, **replicated["template"]}
    for job in (load("ablate_kubernetes.yaml"), of_set):
        validate(job, "1.33", strict=True)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["train_sky.yaml", "ablate_sky.yaml", "ablate_sky_pool.yaml"])
def test_sky_files_pass_the_schema_of_skypilot(name: str, tmp_path: Path):
    pytest.importorskip("sky.task")
    code = (
        "import sky, sys, yaml; task = yaml.safe_load(open(sys.argv[1]));"
        "task['envs'] = dict.fromkeys(task.get('envs', ()), 'x'); sky.Task.from_yaml_config(task)"
    )
    settings = {**os.environ, "HOME": str(tmp_path), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    subprocess.run([sys.executable, "-c", code, FOLDER / name], cwd=ROOT, env=settings, check=True)
