import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from mmfusion import optim
from mmfusion.models.encoders import ENCODERS
from mmfusion.optim.layer_decay import decay_factors
from tests.models.encoder_cases import CASES, make

# The layers of each sequential encoder, from input to output; layers between two `<` have the same learning rate.
ORDERS = {
    "cnn-layer": "Conv_0 Norm_0 < Conv_1 Norm_1 < tokens",
    "cnn-group": "Conv_0 Norm_0 < Conv_1 Norm_1 < tokens",
    "cnn-batch": "Conv_0 Norm_0 < Conv_1 Norm_1 < tokens",
    "resnet18": "conv_stem norm_stem < stage0_block0 < stage1_block0 < tokens",
    "resnet34": "conv_stem norm_stem < stage0_block0 < stage1_block0 < tokens",
    "resnet50": "conv_stem norm_stem < stage0_block0 < stage1_block0 < tokens",
    "resnet101": "conv_stem norm_stem < stage0_block0 < stage1_block0 < tokens",
    "resnet18-rows": "conv_stem norm_stem < stage0_block0 < stage1_block0 < tokens",
    "resnet18-cells": "conv_stem norm_stem < stage0_block0 < stage1_block0 < tokens",
    "pooled_cnn-flatten": "Conv_0 < norm project",
    "pooled_cnn-mean": "Conv_0 Norm_0 < norm project",
    "lenet5": "c1 < s2_bias s2_factor < c3_bias c3_kernel < s4_bias s4_factor < c5 < f6 < tokens",
    "alexnet": "conv1 < conv2 < conv3 < conv4 < conv5 < tokens",
    "vgg11": (
        "conv0_0 norm0_0 < conv1_0 norm1_0 < conv2_0 norm2_0 < conv2_1 norm2_1 < conv3_0 norm3_0 "
        "< conv3_1 norm3_1 < conv4_0 norm4_0 < conv4_1 norm4_1 < tokens"
    ),
    "vgg16": (
        "conv0_0 < conv0_1 < conv1_0 < conv1_1 < conv2_0 < conv2_1 < conv2_2 < conv3_0 < conv3_1 "
        "< conv3_2 < conv4_0 < conv4_1 < conv4_2 < top < tokens"
    ),
    "convnext_t": "norm0 shrink0 < stage0_block0 < norm1 shrink1 < stage1_block0 < norm tokens",
    "vit_ti": "class patches positions < block0 < norm norm_last project",
    "vit_s": "class patches positions < block0 < norm norm_last project",
    "vit_b": "class patches positions < block0 < block1 < norm norm_last project",
    "bow-mean": "embed < norm",
    "bow-all": "embed < norm",
    "rnn-vanilla": "embed < forward_0 < norm project",
    "rnn-gru": "embed < forward_0 < forward_1 < norm project",
    "rnn-lstm": "embed < backward_0 forward_0 < backward_1 forward_1 < norm project",
    "rnn-last": "embed < backward_0 forward_0 < norm project",
    "mlp-embedding": "hidden0 < norm project",
    "mlp-sequence": "norm project",
    "rnn-sequence": "embed < backward_0 forward_0 < norm project",
    "rnn-sequence-last": "embed < forward_0 < norm project",
    "transformer-sequence": "embed < block0 < norm project",
    "tcn": "block0 < block1 < norm project",
    "cnn-images": "Conv_0 Norm_0 < Conv_1 Norm_1 < tokens",
    "vit_ti-images": "class patches positions < block0 < norm norm_last project",
    "transformer": "embed < block0 < norm project",
    "bert-all": "embed norm_embed place segment < block0 < norm project",
    "bert-mean": "embed norm_embed place segment < block0 < norm project",
    "roberta": "embed norm_embed place segment < block0 < norm project",
    "modernbert": "embed norm_embed < block0 < block1 < norm norm_last project",
    "bert-pooled": "embed norm_embed place segment < block0 < norm pooler project",
    "logmel_cnn-layer": "Conv_0 Norm_0 < Conv_1 Norm_1 < norm project",
    "logmel_cnn-group": "Conv_0 Norm_0 < Conv_1 Norm_1 < norm project",
    "logmel_cnn-batch": "Conv_0 Norm_0 < Conv_1 Norm_1 < norm project",
    "waveform_cnn": "Conv_0 Norm_0 < Conv_1 Norm_1 < norm project",
    "cnn3d": "Conv_0 Norm_0 < Conv_1 Norm_1 < norm offsets project",
    "gcn": "bias0 layer0 < norm project",
    "graph_attention": "layer0 layer0_from layer0_to < norm project",
    "ast": "bands patches < block0 < norm project",
}
BRANCHING = {
    "cnn_rnn", "inception_v1", "inception_v3", "textcnn", "frame_cnn", "table_mlp", "ft_transformer",
    "knowledge_attention",
}  # fmt: skip


def test_layer_order_is_none_for_encoders_that_branch():
    assert {name for name, encoder in ENCODERS.items() if encoder.layer_order is None} == BRANCHING
    assert set(ORDERS) == {case for case, (name, *_) in CASES.items() if name not in BRANCHING}


@pytest.mark.parametrize("case", ORDERS)
def test_layer_order_determines_every_layers_factor(case):
    name, options, (x, mask), _ = CASES[case]
    encoder = make(name, options)
    layers = jax.eval_shape(lambda: encoder.init(jax.random.key(0), x, mask, train=False))["params"]
    groups = [group.split() for group in ORDERS[case].split(" < ")]
    expected = {layer: 0.5**i for i, group in enumerate(reversed(groups)) for layer in group}
    assert decay_factors(layers, ENCODERS[name].layer_order, 0.5) == expected


def test_decay_factors_order_layers_by_number():
    factors = decay_factors(["block10", "block9", "block1"], [r"block\d+"], 0.5)
    assert factors == {"block10": 1, "block9": 0.5, "block1": 0.25}


def test_decay_factors_reject_an_unmatched_layer():
    with pytest.raises(ValueError, match="does not match its layer 'head'"):
        decay_factors(["block0", "head"], [r"block\d+"], 0.5)


def encoder_options(name, **changes):
    return ConfigDict({"name": name, "layer_decay": 1.0, **changes})


def test_layerwise_lr_decay_scales_updates():
    layers = {"patches": jnp.ones(2), "block0": {"mlp": jnp.ones(3)}, "block1": jnp.ones(1), "project": jnp.ones(2)}
    updates = {"encoders_image": layers, "encoders_text": {"embed": jnp.ones(2)}, "heads_label": jnp.ones(1)}
    encoders = {"image": encoder_options("vit_ti", layer_decay=0.5), "text": encoder_options("bow")}
    transformation = optim.layerwise_lr_decay(encoders)
    scaled, _ = transformation.update(updates, transformation.init(updates))
    assert [float(jax.tree.leaves(scaled["encoders_image"][name])[0][0]) for name in layers] == [0.125, 0.25, 0.5, 1]
    assert scaled["heads_label"] == 1
    assert (scaled["encoders_text"]["embed"] == 1).all()


def test_layerwise_lr_decay_is_the_identity_without_decay():
    encoders = {"image": encoder_options("vit_ti")}
    updates = {"encoders_image": {"patches": jnp.ones(2)}}
    transformation = optim.layerwise_lr_decay(encoders)
    assert transformation.update(updates, transformation.init(updates))[0] == updates
