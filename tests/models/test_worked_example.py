"""Convolution, ReLU, pooling, concatenation, dense layer and softmax against values computed by hand.

The example follows an article on image and text fusion that explains its network this way. Its own values were
not available (its convolution contains misprints), so the values here are new.
"""

import flax.linen as nn
import numpy as np
import pytest

from mmfusion.models.convolution import conv
from mmfusion.models.encoders.classic import pool
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


def test_worked_example_matches_the_values_by_hand():
    x = np.array(IMAGE, np.float32)[None, :, :, None]
    kernel = np.array(KERNEL, np.float32)[:, :, None, None]
    layer = conv(1, 3, 1, np.float32, padding=0)
    convolved = layer.apply({"params": {"kernel": kernel, "bias": np.zeros(1, np.float32)}}, x)
    np.testing.assert_array_equal(convolved[0, :, :, 0], CONVOLVED)
    rectified = nn.relu(convolved)
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
