import jax
import numpy as np
import pytest

from mmfusion.data.batch import Batch
from mmfusion.models.build import build
from mmfusion.models.summary import summarize

ROWS, TIME, VOCABULARY, WIDTH, EMBEDDING, HIDDEN, CLASSES = 2, 5, 7, 8, 4, 6, 3


def summary(encoder, fusion):
    config = {"width": WIDTH, "encoders": {"text": encoder}, "fusion": {"name": fusion}}
    model = build(config, {"text": {"vocabulary": VOCABULARY}}, {"label": CLASSES})
    token_ids = np.ones((ROWS, TIME), np.int32)
    batch = Batch(
        inputs={"text": token_ids},
        mask={"text": token_ids > 0},
        present={"text": np.ones(ROWS, bool)},
        targets={},
        weight=np.ones(ROWS, np.float32),
        id=np.arange(ROWS),
    )
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), batch, train=False))
    total = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    return {row.path: row for row in summarize(model, variables, batch)}, total


def test_summary_counts_every_step_of_an_lstm():
    rows, total = summary({"name": "rnn", "embedding": EMBEDDING, "hidden": HIDDEN}, "concat")
    assert {path: row.shape for path, row in rows.items()} == {
        "encoders.text": (ROWS, TIME, WIDTH),
        "fusion": (ROWS, WIDTH),
        "heads.label": (ROWS, CLASSES),
    }
    lstm = 4 * HIDDEN * (EMBEDDING + HIDDEN)
    tokens = (HIDDEN + 1) * WIDTH + 2 * WIDTH  # projected and normalised
    assert rows["encoders.text"].parameters == VOCABULARY * EMBEDDING + lstm + 4 * HIDDEN + tokens
    assert rows["fusion"].parameters == 2 * WIDTH * (WIDTH + 1)
    assert rows["heads.label"].parameters == CLASSES * (WIDTH + 1)
    assert sum(row.parameters for row in rows.values()) == total
    products = {"encoders.text": TIME * (lstm + HIDDEN * WIDTH), "fusion": 2 * WIDTH**2, "heads.label": WIDTH * CLASSES}
    for path, row in rows.items():
        assert row.flops == pytest.approx(products[path] / sum(products.values()))


def test_summary_of_decision_level_fusion_has_no_fusion_cost():
    rows, total = summary({"name": "bow"}, "late_mean")
    assert rows["fusion"].shape == (ROWS, CLASSES)
    assert (rows["fusion"].parameters, rows["fusion"].flops) == (0, 0.0)
    assert rows["heads.label"].parameters == CLASSES * (WIDTH + 1)
    assert rows["heads.label"].flops == 1.0
    assert sum(row.parameters for row in rows.values()) == total


def test_summary_counts_convolutions():
    config = {
        "width": WIDTH,
        "encoders": {"image": {"name": "cnn", "channels": (5,), "strides": (2,)}},
        "fusion": {"name": "late_mean"},
    }
    model = build(config, {"image": {}}, {"label": CLASSES})
    batch = Batch(
        inputs={"image": np.zeros((ROWS, 8, 8, 2), np.float32)},
        mask={"image": np.ones((ROWS, 1), bool)},
        present={"image": np.ones(ROWS, bool)},
        targets={},
        weight=np.ones(ROWS, np.float32),
        id=np.arange(ROWS),
    )
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), batch, train=False))
    head = summarize(model, variables, batch)[-1]
    convolution = 16 * (3 * 3 * 2 * 5 + 5 * WIDTH)  # 4×4 positions, with their projection
    assert head.flops == pytest.approx(WIDTH * CLASSES / (WIDTH * CLASSES + convolution))
