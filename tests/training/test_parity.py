"""However a run is spread, its numbers are the same: devices, hosts, micro-batches, steps a call, `pmap` or `jit`.

Under SGD, since Adam hides a gradient that is scaled wrongly; with dropout and augmentation on, absent modalities, and
unreadable rows that come in runs, so that devices and micro-batches differ in how many they count.
"""

import functools
import os
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mmfusion.distributed import sharding
from tests import storage, ways
from tests.processes import Started

Result = dict[str, np.ndarray]
EIGHT = (  # the ways that one process runs; the others are those of thorough tests
    ("pmap", "jit", "mesh"),
    (
        "concat accumulated scanned",
        "weighted accumulated",
        "partly labelled accumulated",
        "batch norm",
        "batch norm jit",
        "loop 1 2 1",
    ),
)
HOSTS = (
    ("pmap",),
    ("jit", "loop", "loop failing", "loop going back", "loop in a bucket", "loop blended fsdp"),
)
FLAGS = os.environ.get("XLA_FLAGS", "")
TWO = "--xla_force_host_platform_device_count=2"


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Result]:
    """`one("jit")` -> what that way gives on one device, in this process."""
    results: dict[str, Result] = {}

    def one(way: str) -> Result:
        if way not in results:
            results[way] = ways.run(way, tmp_path_factory.mktemp("one"))
        return results[way]

    return one


def start(output: Path, names: tuple[str, ...], *flags: str, **environment: str) -> Started:
    return Started("tests.ways", [str(output), *names, *flags], merged=True, **environment)


def finish(process: Started, output: Path) -> dict[str, Result]:
    said, _ = process.communicate(timeout=500)
    assert process.poll() == 0, said[-3000:]
    results: dict[str, Result] = {}
    with np.load(output) as arrays:
        for name, array in arrays.items():
            way, _, key = name.partition("/")
            results.setdefault(way, {})[key] = array
    return results


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Result]:
    """`eight("jit")` -> what that way gives on eight devices."""

    @functools.cache
    def run(names: tuple[str, ...]) -> dict[str, Result]:
        output = tmp_path_factory.mktemp("eight") / "result.npz"
        return finish(start(output, names, XLA_FLAGS=f"{FLAGS} --xla_force_host_platform_device_count=8"), output)

    return lambda way: run(next(names for names in EIGHT if way in names))[way]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Result]]:
    """`hosts("jit")` -> what that way gives in two processes of two devices each."""

    @functools.cache
    def run(names: tuple[str, ...]) -> list[dict[str, Result]]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        folder = tmp_path_factory.mktemp("hosts")
        outputs = [folder / f"{host}.npz" for host in range(2)]
        with storage.serving() as address:
            given = ["--hosts=2", f"--port={port}", f"--storage={address}"]
            processes = [
                start(output, names, f"--host={host}", *given, XLA_FLAGS=f"{FLAGS} {TWO}")
                for host, output in enumerate(outputs)
            ]
            try:
                return [finish(process, output) for process, output in zip(processes, outputs, strict=True)]
            finally:
                for process in processes:
                    process.kill()

    return lambda way: [host[way] for host in run(next(names for names in HOSTS if way in names))]


def agree(result: Result, reference: Result, but: tuple[str, ...] = ()) -> None:
    """Asserts that everything is equal to float tolerance, but what is named."""
    assert result.keys() == reference.keys()
    for name, expected in reference.items():
        if name not in but:
            np.testing.assert_allclose(result[name], expected, rtol=2e-5, atol=2e-6, err_msg=name)


@pytest.mark.loop
def test_the_data_is_as_uneven_as_the_test_claims(one: Callable[[str], Result]):
    config = ways.synthetic.config({})
    train = ways.synthetic.dataset(config, ways.ROWS).splits["train"]
    ids = one("pmap")["ids"]  # [steps, B]
    weights = train.arrays.weight[ids].reshape(ways.STEPS, 8, -1).sum(2)  # [steps, devices]
    assert (weights.min(1) < weights.max(1)).all()
    for modality in ("image", "text"):
        present = train.arrays.present[modality][train.arrays.weight > 0]
        assert 0.6 < present.mean() < 0.9
    assert one("pmap")["losses"].std() > 0.01


@pytest.mark.thorough
@pytest.mark.loop
def test_one_device(one: Callable[[str], Result]):
    agree(one("jit"), one("pmap"))


@pytest.mark.thorough(but=("concat accumulated scanned",))
@pytest.mark.loop
@pytest.mark.parametrize(
    "way", ["concat accumulated", "concat accumulated scanned", "concat two a call", "concat four a call scanned"]
)
def test_micro_batches_and_steps_per_call(one: Callable[[str], Result], way: str):
    agree(one(way), one("concat"))


@pytest.mark.loop
@pytest.mark.thorough
def test_weights_of_rows_change_the_loss_alike_in_micro_batches(one: Callable[[str], Result]):
    agree(one("weighted accumulated"), one("weighted"))
    assert np.abs(one("weighted")["losses"] - one("concat")["losses"]).min() > 1e-3
    examples = ways.SCORES.index("examples")
    assert one("weighted")["scores"][examples] == one("concat")["scores"][examples]  # also rows of weight 0


@pytest.mark.thorough
@pytest.mark.loop
def test_labels_that_rows_lack_are_masked_alike_in_micro_batches(one: Callable[[str], Result]):
    agree(one("partly labelled accumulated"), one("partly labelled"))
    config = ways.partly_labelled(ways.synthetic.config({}))
    train = ways.synthetic.dataset(config, ways.ROWS).splits["train"].arrays
    ids = one("partly labelled")["ids"]  # [steps, B], -1 without any label
    assert 0 < (ids < 0).mean() < 0.3
    for task in ("label", "amount"):
        counts = (
            np.where(ids < 0, 0, train.metric_weight(task)[ids]).reshape(len(ids), 8, -1).sum(2)
        )  # [steps, devices]
        assert (counts.min(1) < counts.max(1)).all()


@pytest.mark.process
@pytest.mark.thorough(but=("pmap-pmap", "jit-pmap"))
@pytest.mark.parametrize(
    ("way", "alone"),
    [
        ("pmap", "pmap"), ("jit", "pmap"), ("concat accumulated scanned", "concat"),
        ("weighted accumulated", "weighted"), ("partly labelled accumulated", "partly labelled"),
    ],
)  # fmt: skip
def test_eight_devices(eight: Callable[[str], Result], one: Callable[[str], Result], way: str, alone: str):
    agree(eight(way), one(alone))


@pytest.mark.process
def test_a_divided_state_is_the_same_and_takes_less_of_each_device(
    eight: Callable[[str], Result], one: Callable[[str], Result]
):
    agree(eight("mesh"), one("pmap"), but=("held",))
    assert (one("pmap")["held"] == 1).all() and (eight("jit")["held"] == 1).all()
    assert (eight("mesh")["held"] > 0.25).all()  # a half, and a quarter of attention and of words' vectors
    assert (eight("mesh")["held"] < 0.45).all()  # while it is drawn, too


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("params/encoders_image/block0/attention/query/kernel", (64, 128), ("fsdp", "model")),
        ("opt_state/0/mu/encoders_image/block0/attention/out/kernel", (128, 64), ("model", "fsdp")),
        ("params/encoders_text/block3/mlp_in/kernel", (128, 512), ("fsdp", "model")),
        ("params/encoders_text/block3/mlp_in/bias", (8192,), ("model",)),
        ("params/encoders_text/block3/mlp_out/kernel", (512, 128), ("model", "fsdp")),
        ("params/encoders_text/embed/embedding", (1001, 64), (None, "fsdp")),  # an odd number of words stays whole
        ("params/encoders_image/conv/kernel", (3, 3, 64, 128), (None, None, None, "fsdp")),
        ("params/heads_label/kernel", (64, 10), ()),  # too small to be worth it
        ("step", (), ()),
    ],
)
def test_what_the_mesh_divides(path: str, shape: tuple[int, ...], expected: tuple[str | None, ...]):
    mesh = SimpleNamespace(shape={"data": 1, "fsdp": 2, "model": 2})
    assert tuple(sharding.spec(path, shape, mesh)) == expected


@pytest.mark.process
@pytest.mark.thorough
@pytest.mark.parametrize("way", ["batch norm", "batch norm jit"])
def test_batch_normalisation_counts_all_devices_rows(
    eight: Callable[[str], Result], one: Callable[[str], Result], way: str
):
    agree(eight(way), one("batch norm"))
    moved = [x for name, x in one("batch norm").items() if "batch_stats" in name and "mean" in name]
    assert moved
    assert all(np.abs(x).max() > 1e-3 for x in moved)


@pytest.mark.process
def test_evaluation_counts_every_row_once_on_one_and_on_eight_devices(
    eight: Callable[[str], Result], one: Callable[[str], Result]
):
    readable = [i for i in range(ways.ROWS["test"]) if i % 32 >= 4]
    for result in (one("pmap"), eight("pmap"), eight("jit")):
        assert result["evaluated"].tolist() == readable
        assert result["scores"][ways.SCORES.index("examples")] == len(readable)


@pytest.mark.process
@pytest.mark.thorough(but=("pmap",))
@pytest.mark.parametrize("way", ["pmap", "jit"])
def test_two_hosts(hosts: Callable[[str], list[Result]], one: Callable[[str], Result], way: str):
    for host in hosts(way):
        agree(host, one("pmap"), but=("ids",))
    np.testing.assert_array_equal(np.concatenate([host["ids"] for host in hosts(way)], axis=1), one("pmap")["ids"])


@pytest.mark.process
@pytest.mark.thorough
@pytest.mark.parametrize(
    ("way", "alone"),
    [("loop", "loop"), *((way, "loop blended" if "blended" in way else "loop") for way in HOSTS[1][2:])],
)
def test_the_loop_of_two_hosts_is_the_loop_of_one(
    hosts: Callable[[str], list[Result]], one: Callable[[str], Result], way: str, alone: str
):
    for host in hosts(way):
        agree(host, one(alone), but=("read", "rollbacks"))  # rows that are read are each host's own
        assert host["rollbacks"] == (way == "loop going back")
    assert (one(alone)["weights"].std() > 0) == (alone == "loop blended")


@pytest.mark.process
@pytest.mark.thorough
def test_a_run_goes_on_with_more_devices_and_with_fewer(eight: Callable[[str], Result], one: Callable[[str], Result]):
    agree(eight("loop 1 2 1"), one("loop"), but=("read",))
    np.testing.assert_array_equal(eight("loop 1 2 1")["examples"], one("loop")["examples"])


@pytest.mark.process
@pytest.mark.thorough
def test_a_host_reads_only_its_share(hosts: Callable[[str], list[Result]], one: Callable[[str], Result]):
    shares = [host["read"] for host in hosts("loop")]
    assert [len(share) for share in shares] == [ways.STEPS * 32] * 2
    np.testing.assert_array_equal(np.sort(np.concatenate(shares)), one("loop")["read"])
