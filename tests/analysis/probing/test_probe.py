"""Probes of a run's use of its modalities: known properties of models trained for a few steps."""

import math

import jax
import numpy as np
import pytest

from mmfusion.analysis.probing import attention
from mmfusion.analysis.probing.probe import Probe, compared_metric, permute_rows, probe_run, sample_rows
from mmfusion.inference import shapley
from mmfusion.training.evaluation import collect, score
from mmfusion.training.loop import train
from mmfusion.training.restore import open_run
from tests import tiny

pytestmark = pytest.mark.usefixtures("traced_once")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_dir):
    """`trained("gmu")` -> the directory of a tiny run of that strategy."""
    workdirs = {}

    def trained(fusion):
        if fusion not in workdirs:
            workdirs[fusion] = tmp_path_factory.mktemp(fusion)
            train(tiny.config(f"fusion={fusion}", {"data.dir": data_dir, "steps": 4}), workdirs[fusion])
        return workdirs[fusion]

    return trained


def probe_of(workdir):
    run = open_run(workdir, ["test"])
    return Probe(run), sample_rows(run.dataset.splits["test"], 20)


@pytest.mark.loop
def test_probe_encode_and_fuse_equal_the_model(trained):
    probe, raw = probe_of(trained("co_attention"))
    run = probe.run
    encoded = probe.encode(raw)
    assert {m: x.shape[2] for m, x in encoded.inputs.items()} == {"image": 8, "text": 8}
    batch = run.setup.partitioner.put_batch(jax.tree.map(np.asarray, raw))
    evaluated = jax.device_get(run.setup.compile_eval_step()(run.state.params, run.state.batch_stats, batch))
    np.testing.assert_allclose(probe.fuse(encoded)["logits"]["label"], evaluated["logits"]["label"], atol=1e-5)


@pytest.mark.loop
def test_probe_pairs_have_the_examples_on_the_diagonal(trained):
    probe, raw = probe_of(trained("co_attention"))
    encoded = probe.encode(raw)
    table = probe.pairs(encoded, "image")["label"]  # [n, n, C]: image i with text j
    logits = probe.fuse(encoded)["logits"]["label"]
    np.testing.assert_allclose(table[np.arange(20), np.arange(20)], logits, atol=1e-5)
    permutation = np.roll(np.arange(20), 1)
    permuted_logits = probe.fuse(permute_rows(encoded, {"image": permutation}))["logits"]["label"]
    np.testing.assert_allclose(table[permutation, np.arange(20)], permuted_logits, atol=1e-5)
    assert np.abs(permuted_logits - logits).max() > 1e-4


@pytest.mark.loop
def test_probe_subset_scores_equal_evaluation(trained):
    workdir = trained("co_attention")
    run = open_run(workdir, ["test"])
    found = probe_run(workdir)["subsets"]
    assert set(found) == {"", "image", "text", "image+text"}
    run_eval = run.setup.compile_eval_step()
    for names, value in found.items():
        kept = tuple(filter(None, names.split("+")))
        rows = collect(run_eval, run.state, run.dataset.splits["test"], run.setup, batch_size=16, modalities=kept)
        assert score(rows, run.setup.tasks)["accuracy"] == pytest.approx(value), names


@pytest.mark.thorough
@pytest.mark.loop
def test_probe_of_an_additive_strategy_has_no_interaction(trained):
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
def test_sample_rows_are_the_same_for_every_run(trained):
    (_, one), (_, other) = (probe_of(trained(name)) for name in ("mean", "co_attention"))
    np.testing.assert_array_equal(one.id, other.id)


def test_compared_metric_is_never_the_loss():
    config = tiny.config()
    assert compared_metric(config) == "accuracy"
    with config.unlocked():
        config.select = "loss"
    assert compared_metric(config) == "accuracy"
    with config.unlocked():
        config.select = "macro_f1"
    assert compared_metric(config) == "macro_f1"


@pytest.mark.loop
def test_attention_examples_contain_decoded_inputs_and_weights(trained):
    examples = attention.examples(trained("co_attention"), 5)
    assert len(examples) == 5
    for example in examples:
        assert example.inputs["image"].shape == (32, 32, 3) and example.inputs["image"].dtype == np.uint8
        assert all(isinstance(word, str) for word in example.inputs["text"])
        assert {example.target, example.predicted} <= {"false", "true", "0", "1", "no", "yes"}
        weights = example.attention["text", "image"]  # [N_query, N_key]
        assert weights.shape[0] == len(example.inputs["text"])
        np.testing.assert_allclose(weights.sum(axis=1), 1.0, atol=1e-3)
    assert shapley.subsets(["a"]) == [(), ("a",)]
