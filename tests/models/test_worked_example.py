"""Convolution, ReLU, pooling, concatenation, dense and softmax, each worked out by hand.

The kind of example with which an article on fusing images and text explains its network. Its own numbers, of which the
convolution's are printed wrong in places, were not at hand; these are ours, and right.
"""

import flax.linen as nn
import numpy as np
import pytest

from mmfusion.models.convolution import conv
from mmfusion.models.encoders.classic import pool
from mmfusion.objectives import Task, task_loss

PICTURE = [
    [1, 0, 2, 1, 0, 1],
    [0, 1, 3, 0, 1, 2],
    [2, 1, 0, 1, 3, 0],
    [1, 0, 1, 2, 0, 1],
    [0, 2, 1, 0, 1, 3],
    [3, 1, 0, 2, 1, 0],
]
KERNEL = [[1, 0, -1]] * 3  # the left column of three less the right one, as a network does it: not turned around
CONVOLVED = [[-2, 0, 1, -1], [-1, -1, 0, 0], [1, 0, -2, -1], [2, -1, 0, 0]]
RECTIFIED = [[0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0], [2, 0, 0, 0]]
POOLED = [[0, 1], [2, 0]]
TEXT = [1, -1]  # what an LSTM might say of a review
WEIGHTS = [[1, 0], [0, 1], [1, 0], [0, 1], [1, 0], [0, 1]]  # of [0, 1, 2, 0, 1, -1]
BIAS = [0, 0.5]
LOGITS = [3, 0.5]  # 2 + 1, and 1 - 1 + 0.5
SHARES = [0.92414182, 0.07585818]  # e^3 and e^0.5 over their sum


def test_every_number_of_it():
    x = np.array(PICTURE, np.float32)[None, :, :, None]
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
    np.testing.assert_allclose(nn.softmax(logits)[0], SHARES, atol=1e-6)
    loss = task_loss(logits, np.array([0], np.int32), Task("classification", 2))
    assert loss[0] == pytest.approx(0.0788897, abs=1e-5)  # -log 0.92414182
