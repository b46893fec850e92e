"""A small instance of every encoder, with an input of three rows and its mask."""

import numpy as np

from mmfusion.models.encoders import ENCODERS
from mmfusion.models.encoders.images import PerImage

WIDTH, RATE = 8, 1000
RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.normal(size=(3, 8, 8, 3)).astype(np.float32)
TOKEN_IDS = np.array([[3, 4, 2, 1, 0, 0], [5, 6, 3, 2, 4, 1], [2, 0, 0, 0, 0, 0]], np.int32)
WAVEFORMS = RANDOM.normal(size=(3, 200)).astype(np.float32)
IMAGE, TEXT, AUDIO = (
    (IMAGES, np.ones((3, 1), bool)),
    (TOKEN_IDS, TOKEN_IDS > 0),
    (WAVEFORMS, np.arange(200) < np.array([[90], [200], [31]])),
)
LARGER = {side: (RANDOM.normal(size=(3, side, side, 3)).astype(np.float32), IMAGE[1]) for side in (32, 63, 75)}
VIDEO = RANDOM.normal(size=(3, 4, 8, 8, 3)).astype(np.float32), np.arange(4) < np.array([[2], [4], [1]])
ROWS = np.array([[0.3, 2, -1.0], [1.5, 0, 0.2], [-0.4, 1, 0.7]], np.float32)  # the second column is categorical
TABLE = ROWS, np.array([[True, True, False], [True, True, True], [False, True, True]])
NODES = np.arange(5) < np.array([[3], [5], [1]])
EDGES = np.triu(RANDOM.random((3, 5, 5)) < 0.5, 1).astype(np.float32)
GRAPH = np.concatenate([RANDOM.normal(size=(3, 5, 2)), EDGES + EDGES.swapaxes(1, 2)], 2).astype(np.float32), NODES
KNOWLEDGE = RANDOM.integers(1, 6, (3, 5, 12)).astype(np.int32)  # entity, linked flag, two relations to each node
KNOWLEDGE[..., 1:] = KNOWLEDGE[..., 1:] % 4 * (RANDOM.random((3, 5, 11)) < 0.5)
KNOWLEDGE[..., 1] = KNOWLEDGE[..., 1] > 0
EMBEDDING = RANDOM.normal(size=(3, 5)).astype(np.float32), np.ones((3, 1), bool)
# Masked at the end, and in between.
SEQUENCE = (
    RANDOM.normal(size=(3, 6, 5)).astype(np.float32),
    np.array([[1, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [0, 1, 0, 0, 0, 0]], bool),
)
SEVERAL = RANDOM.normal(size=(3, 2, 8, 8, 3)).astype(np.float32), np.array([[True, True], [False, True], [True, False]])
TINY_FRAMES = {"channels": (4,), "strides": (4,), "heads": 2}
TINY_CNN = {"channels": (8, 4), "strides": (2, 1)}
TINY_VIT = {"patch": 4, "layers": 1, "hidden": 8, "heads": 2}
TINY_TEXTCNN = {"embedding": 4, "kernels": (2, 3), "channels": 4}
TINY_BERT = {"layers": 1, "hidden": 8, "heads": 2, "mlp": 16, "positions": 50}
TINY_MEL = {"rate": RATE, "mels": 8, "channels": (4, 4), "strides": (2, 1)}

# (encoder, options, (input, mask), number of tokens); at least one case per entry of ENCODERS.
CASES = {
    "cnn-layer": ("cnn", TINY_CNN, IMAGE, 16),
    "cnn-group": ("cnn", {**TINY_CNN, "norm": "group"}, IMAGE, 16),
    "cnn-batch": ("cnn", {**TINY_CNN, "norm": "batch"}, IMAGE, 16),
    "resnet18": ("resnet18", {"channels": 4}, IMAGE, 16),
    "resnet34": ("resnet34", {"channels": 4, "stem": "imagenet"}, IMAGE, 1),
    "resnet50": ("resnet50", {"channels": 4, "norm": "batch"}, IMAGE, 16),
    "resnet101": ("resnet101", {"channels": 4, "norm": "layer"}, IMAGE, 16),
    "resnet18-rows": ("resnet18", {"channels": 4, "recurrent": "rows"}, IMAGE, 4),
    "resnet18-cells": ("resnet18", {"channels": 4, "recurrent": "cells"}, IMAGE, 16),
    "cnn_rnn-rows": ("cnn_rnn", {"channels": (4,), "hidden": 4, "layers": 2}, IMAGE, 4),
    "cnn_rnn-cells": ("cnn_rnn", {"channels": (4, 4), "hidden": 4, "steps": "cells", "cell": "gru"}, IMAGE, 4),
    "cnn_rnn-attention": ("cnn_rnn", {"channels": (4,), "hidden": 4, "tokens": "attention"}, IMAGE, 1),
    "cnn_rnn-last": ("cnn_rnn", {"channels": (4,), "hidden": 4, "tokens": "last", "norm": "none"}, IMAGE, 1),
    "pooled_cnn-flatten": ("pooled_cnn", {"channels": (4,)}, IMAGE, 1),
    "pooled_cnn-mean": ("pooled_cnn", {"channels": (4,), "reduce": "mean", "norm": "batch"}, IMAGE, 1),
    "lenet5": ("lenet5", {}, IMAGE, 1),
    "alexnet": ("alexnet", {"channels": 2}, LARGER[63], 1),
    "vgg11": ("vgg11", {"channels": 4, "norm": "batch"}, LARGER[32], 1),
    "vgg16": ("vgg16", {"channels": 2, "fc": 8}, LARGER[32], 1),
    "inception_v1": ("inception_v1", {"share": 0.3}, IMAGE, 1),
    "inception_v3": ("inception_v3", {"share": 0.03}, LARGER[75], 1),
    "convnext_t": ("convnext_t", {"channels": 4}, IMAGE, 1),
    "vit_ti": ("vit_ti", TINY_VIT, IMAGE, 5),
    "vit_s": ("vit_s", TINY_VIT, IMAGE, 5),
    "vit_b": ("vit_b", {**TINY_VIT, "layers": 2}, IMAGE, 5),
    "bow-mean": ("bow", {"vocabulary": 7}, TEXT, 1),
    "bow-all": ("bow", {"vocabulary": 7, "tokens": "all"}, TEXT, 6),
    "rnn-vanilla": ("rnn", {"vocabulary": 7, "cell": "vanilla", "embedding": 4, "hidden": 4}, TEXT, 6),
    "rnn-gru": ("rnn", {"vocabulary": 7, "cell": "gru", "layers": 2, "embedding": 4, "hidden": 4}, TEXT, 6),
    "rnn-lstm": ("rnn", {"vocabulary": 7, "bidirectional": True, "embedding": 4, "hidden": 4, "layers": 2}, TEXT, 6),
    "rnn-last": (
        "rnn",
        {"vocabulary": 7, "bidirectional": True, "tokens": "last", "embedding": 4, "hidden": 4},
        TEXT,
        1,
    ),
    "textcnn-max": ("textcnn", {"vocabulary": 7, **TINY_TEXTCNN}, TEXT, 1),
    "textcnn-all": ("textcnn", {"vocabulary": 7, **TINY_TEXTCNN, "tokens": "all"}, TEXT, 6),
    "transformer": ("transformer", {"vocabulary": 7, "layers": 1, "hidden": 8, "heads": 2}, TEXT, 6),
    "bert-all": ("bert", {"vocabulary": 7, **TINY_BERT}, TEXT, 6),
    "bert-pooled": ("bert", {"vocabulary": 7, **TINY_BERT, "tokens": "pooled"}, TEXT, 1),
    "bert-mean": ("bert", {"vocabulary": 7, **TINY_BERT, "tokens": "mean"}, TEXT, 1),
    "roberta": ("roberta", {"vocabulary": 7, **TINY_BERT}, TEXT, 6),
    "modernbert": ("modernbert", {"vocabulary": 7, **TINY_BERT, "layers": 2, "window": 2}, TEXT, 6),
    "logmel_cnn-layer": ("logmel_cnn", TINY_MEL, AUDIO, 10),
    "logmel_cnn-group": ("logmel_cnn", {**TINY_MEL, "norm": "group"}, AUDIO, 10),
    "logmel_cnn-batch": ("logmel_cnn", {**TINY_MEL, "norm": "batch"}, AUDIO, 10),
    "waveform_cnn": ("waveform_cnn", {"channels": (4, 4), "kernel": 8}, AUDIO, 13),
    "frame_cnn-gru": ("frame_cnn", TINY_FRAMES, VIDEO, 4),
    "frame_cnn-attention": ("frame_cnn", {**TINY_FRAMES, "over_time": "attention", "norm": "batch"}, VIDEO, 4),
    "cnn3d": ("cnn3d", {"channels": (4, 4), "time_strides": (2, 1), "strides": (2, 2)}, VIDEO, 8),
    "table_mlp": ("table_mlp", {"categories": (0, 3, 0), "hidden": (8,)}, TABLE, 1),
    "ft_transformer-keys": (
        "ft_transformer",
        {"categories": (0, 3, 0), "keys": 2, "hidden": 8, "heads": 2, "layers": 1},
        TABLE,
        4,
    ),
    "ft_transformer": ("ft_transformer", {"categories": (0, 3, 0), "hidden": 8, "heads": 2, "layers": 1}, TABLE, 4),
    "mlp-embedding": ("mlp", {"hidden": (8,)}, EMBEDDING, 1),
    "mlp-sequence": ("mlp", {"hidden": ()}, SEQUENCE, 6),
    "rnn-sequence": ("rnn", {"vocabulary": 0, "bidirectional": True, "embedding": 4, "hidden": 4}, SEQUENCE, 6),
    "rnn-sequence-last": ("rnn", {"vocabulary": 0, "tokens": "last", "embedding": 4, "hidden": 4}, SEQUENCE, 1),
    "transformer-sequence": ("transformer", {"vocabulary": 0, "layers": 1, "hidden": 8, "heads": 2}, SEQUENCE, 6),
    "tcn": ("tcn", {"channels": (4, 4)}, SEQUENCE, 6),
    "cnn-images": ("cnn", {**TINY_CNN, "norm": "batch", "pool": "none"}, SEVERAL, 2),
    "vit_ti-images": ("vit_ti", {**TINY_VIT, "pool": "mean"}, SEVERAL, 1),
    "gcn": ("gcn", {"hidden": (8,)}, GRAPH, 5),
    "graph_attention": ("graph_attention", {"hidden": 8, "heads": 2, "layers": 1}, GRAPH, 5),
    "knowledge_attention": (
        "knowledge_attention",
        {"entities": 6, "relations": 3, "hidden": 8, "heads": 2},
        (KNOWLEDGE, NODES),
        5,
    ),
    "ast": ("ast", {"rate": RATE, "mels": 8, "patch": 4, "layers": 1, "hidden": 8, "heads": 2}, AUDIO, 10),
}


# Deep encoders with one block of each type, as further blocks are the same.
SHALLOW = {
    **{name: {"blocks": (1, 1)} for name in ("resnet18", "resnet34", "resnet50", "resnet101", "convnext_t")},
    "inception_v1": {"modules": {"a": (64, 96, 128, 16, 32, 32), "pool": (), "b": (64, 96, 128, 16, 32, 32)}},
    "inception_v3": {"pool_channels_35": (32,), "inner_channels_17": (128,), "num_modules_8": 1},
}


def make(name, options):
    """Returns the encoder, in a shallow version if it is deep; with an option `pool`, applied to every image."""
    options = dict(options)
    pool = options.pop("pool", "")
    encoder = type(name, (ENCODERS[name],), dict(SHALLOW.get(name, {})))(width=WIDTH, **options)
    return PerImage(encoder, pool) if pool else encoder
