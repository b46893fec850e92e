"""A worked example of an image-and-text network, and the one that an article prints, against values by hand.

The article explains convolution, ReLU, pooling, a dense layer, softmax, a recurrence and attention. Its convolution
of `ARTICLE_IMAGE` prints `002 / 030 / 202`, which is neither the cross-correlation, as every deep-learning library
computes it, nor the convolution of its formula, whose kernel is flipped. `CROSS_CORRELATED` and `FLIPPED` are right.
Both pool to fives, the printed one to threes; in either case the logits are equal, so that its softmax is right.
"""

import flax.linen as nn
import jax
import numpy as np
import pytest

from mmfusion.models.convolution import conv
from mmfusion.models.encoders.classic import pool
from mmfusion.models.encoders.text import CELLS
from mmfusion.models.layers import Attention
from mmfusion.objectives import Task, task_loss

IMAGE = [
    [1, 0, 2, 1, 0, 1],
    [0, 1, 3, 0, 1, 2],
    [2, 1, 0, 1, 3, 0],
    [1, 0, 1, 2, 0, 1],
    [0, 2, 1, 0, 1, 3],
    [3, 1, 0, 2, 1, 0],
]
KERNEL = [[1, 0, -1]] * 3  # left column minus right column; cross-correlation, so the kernel is not flipped
CONVOLVED = [[-2, 0, 1, -1], [-1, -1, 0, 0], [1, 0, -2, -1], [2, -1, 0, 0]]
RECTIFIED = [[0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0], [2, 0, 0, 0]]
POOLED = [[0, 1], [2, 0]]
TEXT = [1, -1]  # features of a review, as of an LSTM
WEIGHTS = [[1, 0], [0, 1], [1, 0], [0, 1], [1, 0], [0, 1]]  # applied to [0, 1, 2, 0, 1, -1]
BIAS = [0, 0.5]
LOGITS = [3, 0.5]  # 2 + 1, and 1 - 1 + 0.5
PROBABILITIES = [0.92414182, 0.07585818]  # e^3 and e^0.5 divided by their sum

ARTICLE_IMAGE = [[0, 0, 1, 0, 0], [0, 1, 1, 1, 0], [1, 1, 0, 1, 1], [0, 1, 1, 0, 0], [0, 0, 1, 0, 0]]
ARTICLE_KERNEL = [[1, 0, 1], [1, 1, 0], [0, 1, 1]]
CROSS_CORRELATED = [[3, 3, 5], [5, 4, 2], [3, 5, 2]]  # top left: 1 (row 0) + 1 (row 1) + 1 (row 2)
FLIPPED = [[3, 5, 3], [3, 4, 5], [5, 2, 2]]
PRINTED = [[0, 0, 2], [0, 3, 0], [2, 0, 2]]


def convolved(image, kernel):
    x, kernel = np.array(image, np.float32)[None, :, :, None], np.array(kernel, np.float32)[:, :, None, None]
    layer = conv(1, 3, 1, np.float32, padding=0)
    return layer.apply({"params": {"kernel": kernel, "bias": np.zeros(1, np.float32)}}, x)


def test_worked_example_matches_the_values_by_hand():
    feature_map = convolved(IMAGE, KERNEL)
    np.testing.assert_array_equal(feature_map[0, :, :, 0], CONVOLVED)
    rectified = nn.relu(feature_map)
    np.testing.assert_array_equal(rectified[0, :, :, 0], RECTIFIED)
    pooled = pool(rectified, 2, 2, "example")
    np.testing.assert_array_equal(pooled[0, :, :, 0], POOLED)
    joined = np.concatenate([np.asarray(pooled).reshape(1, -1), np.array([TEXT], np.float32)], axis=1)
    head = {"params": {"kernel": np.array(WEIGHTS, np.float32), "bias": np.array(BIAS, np.float32)}}
    logits = nn.Dense(2).apply(head, joined)
    np.testing.assert_array_equal(logits[0], LOGITS)
    np.testing.assert_allclose(nn.softmax(logits)[0], PROBABILITIES, atol=1e-6)
    loss = task_loss(logits, np.array([0], np.int32), Task("classification", 2))
    assert loss[0] == pytest.approx(0.0788897, abs=1e-5)  # -log 0.92414182


@pytest.mark.parametrize(
    ("kernel", "expected"), [(ARTICLE_KERNEL, CROSS_CORRELATED), (np.flip(ARTICLE_KERNEL), FLIPPED)]
)
def test_articles_example_matches_the_values_by_hand(kernel, expected):
    feature_map = convolved(ARTICLE_IMAGE, kernel)
    np.testing.assert_array_equal(feature_map[0, :, :, 0], expected)
    assert expected != PRINTED
    rectified = nn.relu(feature_map)
    np.testing.assert_array_equal(rectified, feature_map)  # no value is negative
    pooled = pool(rectified, 2, 1, "example")
    np.testing.assert_array_equal(pooled[0, :, :, 0], [[5, 5], [5, 5]])
    dense = {"params": {"kernel": np.full((4, 2), 0.5, np.float32), "bias": np.zeros(2, np.float32)}}
    logits = nn.Dense(2).apply(dense, pooled.reshape(1, 4))
    np.testing.assert_array_equal(logits, [[10, 10]])  # 4 · 5 / 2; of the printed map 4 · 3 / 2
    np.testing.assert_array_equal(nn.softmax(logits), [[0.5, 0.5]])


@pytest.mark.parametrize(("activation", "states"), [(nn.sigmoid, (3 / 4, 1 / 5)), (nn.tanh, (4 / 5, -255 / 257))])
def test_articles_recurrence_matches_the_values_by_hand(activation, states):
    """h = sigmoid(W [h, x] + b), y = softmax(V h); the cell of the encoder `rnn` has tanh, as Elman networks do.

    With x = ln 3, 0 and b = 0, sigmoid(ln 3) = 3/4 and tanh(ln 3) = 8/10. The weight of h makes the second
    pre-activation -ln 4 and -ln 16: sigmoid(-ln 4) = 1/5, tanh(-ln 16) = (1/16 - 16) / (1/16 + 16).
    """
    of_state = -np.log(4 if activation is nn.sigmoid else 16) / states[0]
    params = {"i": {"kernel": [[1.0]], "bias": [0.0]}, "h": {"kernel": [[of_state]]}}
    variables = {"params": jax.tree.map(np.float32, params, is_leaf=lambda x: isinstance(x, list))}
    fields = {} if activation is nn.tanh else {"activation_fn": activation}
    cell, h = CELLS["vanilla"](1, **fields), np.zeros((1, 1), np.float32)
    for x, expected in zip((np.log(3), 0.0), states, strict=True):
        h, _ = cell.apply(variables, h, np.full((1, 1), x, np.float32))
        np.testing.assert_allclose(h, [[expected]], rtol=1e-6)
    of_output = np.array([[np.log(3) / states[1], 0]], np.float32)
    np.testing.assert_allclose(nn.softmax(h @ of_output), [[0.75, 0.25]], rtol=1e-6)


def test_articles_attention_matches_the_values_by_hand():
    """Score w · q · kᵀ and output softmax(score) · input: ours with w = 1 / √4 and projections that change nothing."""
    inputs = np.eye(4, dtype=np.float32)[None, :2]  # two tokens, keys and values at once
    query = np.float32(np.log(3)) * np.array([[[2, 0, 1, 0]]], np.float32)  # scores ln 3 and 0
    identity = {"kernel": np.eye(4, dtype=np.float32), "bias": np.zeros(4, np.float32)}
    params = {"query": identity, "key": {"kernel": identity["kernel"]}, "value": identity, "out": identity}
    out, weights = Attention(1, 4).apply({"params": params}, query, inputs, np.ones((1, 2), bool))
    np.testing.assert_allclose(weights[0, 0], [[0.75, 0.25]], rtol=1e-6)
    np.testing.assert_allclose(out[0], [[0.75, 0.25, 0, 0]], rtol=1e-6)
