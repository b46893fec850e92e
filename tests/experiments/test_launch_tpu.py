"""Commands of `train_tpu.sh` by both ways to a TPU."""

import subprocess
from collections.abc import Sequence

import pytest

from tests.launchers import API, DELETE, ENGINE, lines, script
from tests.processes import ROOT

pytestmark = pytest.mark.process  # each test runs a script

SSH = "gcloud compute tpus tpu-vm ssh t --zone=us-central1-a"
HOSTS = (
    "for host in $(gcloud compute instance-groups managed list-instances t --zone=us-central1-a "
    "'--format=value(instance.basename())' --sort-by=instance{}); do gcloud compute "
)


def test_create_requests_the_type():
    (line,) = lines("train_tpu.sh", "create", "t", **API, SPOT="1", PROJECT="p")
    assert line == (
        "gcloud compute tpus queued-resources create t --node-id=t --zone=us-central1-a --project=p "
        "--accelerator-type=v5litepod-8 --runtime-version=v2-alpha-tpuv5-lite --spot"
    )
    for kind, version in (("v4-8", "tpu-ubuntu2204-base"), ("v5p-8", "v2-alpha-tpuv5"), ("v6e-8", "v2-alpha-tpuv6e")):
        assert f"--runtime-version={version}" in lines("train_tpu.sh", "create", "t", **{**API, "TYPE": kind})[0]
    assert "--runtime-version=mine" in lines("train_tpu.sh", "create", "t", **API, VERSION="mine")[0]


def test_create_on_compute_engine_requests_a_group_of_connected_hosts():
    template, policy, group = lines("train_tpu.sh", "create", "t", **ENGINE, SPOT="1", PROJECT="p")
    assert template == (
        "gcloud compute instance-templates create t --project=p --machine-type=ct6e-standard-4t "
        "--image-family=ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e --image-project=ubuntu-os-accelerator-images "
        "--boot-disk-size=100GB --maintenance-policy=TERMINATE --scopes=cloud-platform --provisioning-model=SPOT "
        "--instance-termination-action=STOP"
    )
    assert policy == (
        "gcloud compute resource-policies create workload-policy t --region=us-central1 --project=p "
        "--type=HIGH_THROUGHPUT --accelerator-topology=2x4"
    )
    assert group == (
        "gcloud compute instance-groups managed create t --zone=us-central1-a --project=p --template=t --size=2 "
        "--default-action-on-vm-failure=do-nothing --workload-policy=regions/us-central1/resourcePolicies/t"
    )


def test_create_on_compute_engine_needs_no_policy_for_one_host():
    template, group = lines("train_tpu.sh", "create", "t", ZONE="us-central1-a", TYPE="tpu7x-standard-4t")
    assert "--image-family=ubuntu-accel-2404-amd64-tpu-tpu7x" in template and "SPOT" not in template
    assert "--size=1 " in group and "workload-policy" not in group


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"TYPE": "v9-1"}, "ends at v6e; use a machine type"),
        ({"TYPE": "v7x-8"}, "ends at v6e; use a machine type"),
        ({"TYPE": "v3-8"}, "set VERSION too"),
        ({"TYPE": "tpu7x-8"}, "expected a machine type, such as tpu7x-standard-4t"),
        ({"TYPE": "ct5lp-hightpu-4t"}, "v4 and v5e are served by GKE and, as v4-N and v5litepod-N, by"),
        ({"TYPE": "n2-standard-4t"}, "set VERSION too"),
        ({"TYPE": "v6e-8", "TOPOLOGY": "2x4"}, "already says how many chips"),
        ({"TYPE": "ct6e-standard-4t", "TOPOLOGY": "3x3"}, "TOPOLOGY=3x3 has 9 chips, which hosts of 4"),
        ({"TYPE": "ct6e-standard-8t", "TOPOLOGY": "2x2"}, "TOPOLOGY=2x2 has 4 chips, which hosts of 8"),
    ],
)
def test_types_say_who_serves_them(settings: dict[str, str], message: str):
    process = script("train_tpu.sh", "--dry-run", "create", "t", **{**API, **settings})
    assert (process.returncode, process.stdout) == (2, "") and message in process.stderr


def test_setup_installs_on_every_host():
    archive, copy, install = lines("train_tpu.sh", "setup", "t", **API, TMPDIR="/somewhere")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert archive == (
        f"git -C {ROOT} archive --output=/somewhere/mmfusion-t.tar.gz --format=tar.gz "
        f"--add-virtual-file=COMMIT:{head.strip()} HEAD"
    )
    assert copy == "gcloud compute tpus tpu-vm scp /somewhere/mmfusion-t.tar.gz t: --zone=us-central1-a --worker=all"
    assert install.startswith(f"{SSH} --worker=all '--command=mkdir -p mmfusion && tar xzf mmfusion-t.tar.gz -C ")
    assert "uv pip install --python env/bin/python -r requirements.txt" in install
    _, copy, install = lines("train_tpu.sh", "setup", "t", **ENGINE, TMPDIR="/somewhere")
    assert copy == f'{HOSTS.format("")}scp /somewhere/mmfusion-t.tar.gz "$host:" --zone=us-central1-a; done'
    assert install.startswith(f"""{HOSTS.format("")}ssh "$host" --zone=us-central1-a '--command=mkdir -p mmfusion""")


@pytest.mark.parametrize(
    ("command", "api", "engine"),
    [
        (["follow"], f"{SSH} --worker=0 '--command=tail -n 100 -F mmfusion/run.log'",
         f"""{HOSTS.format(" --limit=1")}ssh "$host" --zone=us-central1-a """
         "'--command=tail -n 100 -F mmfusion/run.log'; done"),
        (["status"], f"{SSH} --worker=all '--command=cat mmfusion/status 2> /dev/null || echo running'",
         f"""{HOSTS.format("")}ssh "$host" --zone=us-central1-a """
         "'--command=cat mmfusion/status 2> /dev/null || echo running'; done"),
        (["fetch", "gs://b/d", "o"], *["gcloud storage cp --recursive gs://b/d o"] * 2),
        (["fetch", "a/$d", "o p"],
         "gcloud compute tpus tpu-vm scp --recurse 't:a/$d' 'o p' --zone=us-central1-a --worker=0",
         f"""{HOSTS.format(" --limit=1")}scp --recurse "$host:"'a/$d' 'o p' --zone=us-central1-a; done"""),
    ],
)  # fmt: skip
def test_commands_on_hosts_are_printed(command: Sequence[str], api: str, engine: str):
    name, *arguments = command
    assert lines("train_tpu.sh", name, "t", *arguments, **API) == [api]
    assert lines("train_tpu.sh", name, "t", *arguments, **ENGINE) == [engine]


def test_delete_prints_everything_that_create_made():
    assert lines("train_tpu.sh", "delete", "t", **API) == [DELETE[API["TYPE"]]]
    assert lines("train_tpu.sh", "delete", "t", **ENGINE) == [
        DELETE[ENGINE["TYPE"]],
        "gcloud compute instance-templates delete t --quiet",
        "gcloud compute resource-policies delete t --region=us-central1 --quiet",
    ]


@pytest.mark.parametrize(
    "arguments", [[], ["create"], ["jump", "t"], ["run", "t"], ["fetch", "t", "gs://b"], ["delete", "t", "more"]]
)
def test_usage_is_printed_on_invalid_arguments(arguments: Sequence[str]):
    process = script("train_tpu.sh", *arguments, **API)
    assert (process.returncode, process.stdout) == (2, "")
    assert "usage:" in process.stderr
