"""What a run does with its modalities: known answers of models that are trained for a few steps only."""

import math

import jax
import numpy as np
import pytest

from mmfusion.analysis.probing import attention, attribution
from mmfusion.analysis.probing.probe import Probe, compared_metric, permute_rows, probe_run, sample_rows
from mmfusion.training.evaluation import collect, score
from mmfusion.training.loop import train
from mmfusion.training.restore import open_run
from tests import tiny

pytestmark = pytest.mark.usefixtures("traced_once")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_dir):
    """`trained("gmu")` -> the directory of a tiny run of that strategy."""
    made = {}

    def trained(fusion):
        if fusion not in made:
            made[fusion] = tmp_path_factory.mktemp(fusion)
            train(tiny.config(f"fusion={fusion}", {"data.dir": data_dir, "steps": 4}), made[fusion])
        return made[fusion]

    return trained


def probe_of(workdir):
    run = open_run(workdir, ["test"])
    return Probe(run), sample_rows(run.dataset.splits["test"], 20)


@pytest.mark.loop
def test_two_halves_are_the_whole(trained):
    probe, raw = probe_of(trained("co_attention"))
    run = probe.run
    encoded = probe.encode(raw)
    assert {m: x.shape[2] for m, x in encoded.inputs.items()} == {"image": 8, "text": 8}
    batch = run.setup.partitioner.put_batch(jax.tree.map(np.asarray, raw))
    whole = jax.device_get(run.setup.compile_eval_step()(run.state.params, run.state.batch_stats, batch))
    np.testing.assert_allclose(probe.fuse(encoded)["logits"]["label"], whole["logits"]["label"], atol=1e-5)


@pytest.mark.loop
def test_pairs_have_the_examples_on_their_diagonal_and_mixtures_beside_it(trained):
    probe, raw = probe_of(trained("co_attention"))
    encoded = probe.encode(raw)
    table = probe.pairs(encoded, "image")["label"]  # [n, n, C]: picture i with sentence j
    own = probe.fuse(encoded)["logits"]["label"]
    np.testing.assert_allclose(table[np.arange(20), np.arange(20)], own, atol=1e-5)
    turned = np.roll(np.arange(20), 1)
    other = probe.fuse(permute_rows(encoded, {"image": turned}))["logits"]["label"]
    np.testing.assert_allclose(table[turned, np.arange(20)], other, atol=1e-5)
    assert np.abs(other - own).max() > 1e-4


@pytest.mark.loop
def test_subsets_are_what_evaluation_says_of_them(trained):
    workdir = trained("co_attention")
    run = open_run(workdir, ["test"])
    found = probe_run(workdir)["subsets"]
    assert set(found) == {"", "image", "text", "image+text"}
    run_eval = run.setup.compile_eval_step()
    for names, value in found.items():
        kept = tuple(filter(None, names.split("+")))
        rows = collect(run_eval, run.state, run.dataset.splits["test"], run.setup, batch_size=16, modalities=kept)
        assert score(rows, run.setup.tasks)["accuracy"] == pytest.approx(value), names


@pytest.mark.loop
def test_an_additive_strategy_has_no_interaction_and_values_add_up(trained):
    found = probe_run(trained("mean"))
    assert found["metric"] == "accuracy" and found["rows"] == 64
    pairs = found["interaction"]["image"]
    assert len(pairs["whole"]) == 3
    np.testing.assert_allclose(pairs["whole"], pairs["additive"])
    subsets = found["subsets"]
    assert sum(found["shapley"].values()) == pytest.approx(subsets["image+text"] - subsets[""])
    for m in ("image", "text"):
        for name, scores in found["corruption"][m].items():
            assert len(scores) == len(found["severities"]) == 11, name
            assert scores[0] == pytest.approx(subsets["image+text"])  # all 64 rows of this test split
    assert found["missing"]["0.0"] == pytest.approx(subsets["image+text"])
    assert found["cost"]["flops"] > 1e4 and found["cost"]["memory"] > 1e4
    calibration = found["calibration"]["label"]
    assert calibration["temperature"] > 0
    assert {*calibration} == {"temperature", "before", "after"}
    assert all(math.isfinite(share) for share in found["perceptual"].values())


@pytest.mark.loop
def test_rows_are_the_same_for_every_run(trained):
    (_, one), (_, other) = (probe_of(trained(name)) for name in ("mean", "co_attention"))
    np.testing.assert_array_equal(one.id, other.id)


def test_a_loss_is_not_what_runs_are_compared_by():
    config = tiny.config()
    assert compared_metric(config) == "accuracy"
    with config.unlocked():
        config.select = "loss"
    assert compared_metric(config) == "accuracy"
    with config.unlocked():
        config.select = "macro_f1"
    assert compared_metric(config) == "macro_f1"


@pytest.mark.loop
def test_examples_show_what_the_model_saw(trained):
    shown = attention.examples(trained("co_attention"), 5)
    assert len(shown) == 5
    for one in shown:
        assert one.inputs["image"].shape == (32, 32, 3) and one.inputs["image"].dtype == np.uint8
        assert all(isinstance(word, str) for word in one.inputs["text"])
        assert {one.target, one.predicted} <= {"false", "true", "0", "1", "no", "yes"}
        weights = one.attention["text", "image"]  # [N_query, N_key]
        assert weights.shape[0] == len(one.inputs["text"])
        np.testing.assert_allclose(weights.sum(axis=1), 1.0, atol=1e-3)
    assert attribution.subsets(["a"]) == [(), ("a",)]
