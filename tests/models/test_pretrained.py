"""Published weights: encoders reproduce the outputs of small torchvision, timm and transformers models."""

import json

import jax
import numpy as np
import pytest
import requests
from safetensors.numpy import save_file

from mmfusion.models.encoders import ENCODERS
from mmfusion.models.pretrained import weights
from tests.errors import rejects
from tests.models.random_variables import quick_jit, random_variables
from tests.processes import ROOT

FIXTURES = np.load(ROOT / "tests/published/encoders.npz")
VGG, RESNET = {"channels": 2}, {"channels": 3, "stem": "imagenet", "norm": "batch"}
BLOCKS = {"resnet": (1, 1, 2, 1), "convnext": (1, 2, 1, 1)}
VIT = {"patch": 4, "layers": 2, "hidden": 8, "heads": 2}
BERT = {"vocabulary": 20, "layers": 2, "hidden": 8, "heads": 2, "mlp": 16, "positions": 12}
CASES = {
    "vgg-torchvision-fc": ("vgg11", {**VGG, "fc": 6}),
    "vgg-torchvision-bn": ("vgg11", {**VGG, "norm": "batch"}),
    "vgg-timm": ("vgg11", VGG),
    "alexnet-torchvision": ("alexnet", {"channels": 2, "fc": 6}),
    "resnet-transformers-basic": ("resnet34", RESNET),
    "resnet-transformers-bottleneck": ("resnet50", RESNET),
    "resnet-torchvision": ("resnet50", RESNET),
    "convnext-transformers": ("convnext_t", {"channels": 3}),
    "convnext-timm": ("convnext_t", {"channels": 3}),
    "convnext-torchvision": ("convnext_t", {"channels": 3}),
    "vit-transformers": ("vit_ti", VIT),
    "vit-timm": ("vit_s", VIT),
    "vit-torchvision": ("vit_b", VIT),
    "bert-transformers-all": ("bert", BERT),
    "bert-transformers-pooled": ("bert", {**BERT, "tokens": "pooled"}),
}


def encoder_of(case, *, width=None):
    name, options = CASES[case]
    family = case.split("-")[0]
    fields = {"blocks": BLOCKS[family]} if family in BLOCKS else {}
    width = width or FIXTURES[f"{case}/output"].shape[-1]
    return type(name, (ENCODERS[name],), fields)(width=width, **options)


def tensors_of(case):
    start = f"{case}/tensors/"
    return {key.removeprefix(start): FIXTURES[key] for key in FIXTURES.files if key.startswith(start)}


def inputs_of(case):
    x = FIXTURES[f"{case}/input"]
    return x, x > 0 if x.dtype == np.int32 else np.ones((len(x), 1), bool)


def load(case, tensors=None, x=None):
    x = inputs_of(case)[0] if x is None else x
    mask = inputs_of(case)[1]
    encoder = encoder_of(case)
    variables = random_variables(encoder, x, mask, train=False)
    tensors = tensors_of(case) if tensors is None else tensors
    return encoder, weights.load(encoder, variables["params"], variables.get("batch_stats", {}), tensors, "a file")


def with_identity_projection(params):
    """Returns parameters whose tokens are the layer-normalised features of the encoder."""
    token_params = params.get("tokens", params)
    size = token_params["project"]["kernel"].shape[0]
    identity = {
        "project": {"kernel": np.eye(size, dtype=np.float32), "bias": np.zeros(size, np.float32)},
        "norm": {"scale": np.ones(size, np.float32), "bias": np.zeros(size, np.float32)},
    }
    if "tokens" in params:
        return {**params, "tokens": {**identity, "positions": np.zeros_like(token_params["positions"])}}
    return {**params, **identity}


def layer_norm(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


@pytest.mark.thorough(
    but=(
        "vgg-torchvision-bn",
        "alexnet-torchvision",
        "resnet-transformers-bottleneck",
        "convnext-timm",
        "vit-transformers",
        "bert-transformers-all",
        "bert-transformers-pooled",
    )
)
@pytest.mark.parametrize("case", CASES)
def test_pretrained_encoder_reproduces_the_published_output(case):
    x, mask = inputs_of(case)
    encoder, found = load(case)
    variables = {"params": with_identity_projection(found.params), "batch_stats": found.batch_stats}
    tokens, real = jax.jit(lambda v: encoder.apply(v, x, mask, train=False))(variables)
    expected = FIXTURES[f"{case}/output"]
    np.testing.assert_allclose(tokens[real], layer_norm(expected)[np.asarray(real)], atol=2e-4)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("norm", "positions"),  # of the convolutions in torchvision's `features`, configuration D
    [
        ("none", (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)),
        ("batch", (0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40)),
    ],
)
def test_pretrained_vgg16_assigns_convolutions_by_position(norm, positions):
    random = np.random.default_rng(0)
    widths = [3, *(2 * size for size in (1, 1, 2, 2, 4, 4, 4, 8, 8, 8, 8, 8, 8))]
    tensors = {}
    for position, inputs, outputs in zip(positions, widths[:-1], widths[1:], strict=True):
        kernel = random.normal(0, np.sqrt(2 / 9 / inputs), (outputs, inputs, 3, 3))
        tensors[f"features.{position}.weight"] = kernel.astype(np.float32)
        names = [(position, "bias")] + [(position + 1, n) for n in ("weight", "bias", "running_mean")] * (
            norm == "batch"
        )
        tensors |= {f"features.{i}.{name}": random.normal(size=outputs).astype(np.float32) for i, name in names}
        if norm == "batch":
            tensors[f"features.{position + 1}.running_var"] = random.uniform(0.5, 2, outputs).astype(np.float32)
    x, mask = random.normal(size=(2, 32, 32, 3)).astype(np.float32), np.ones((2, 1), bool)
    encoder = ENCODERS["vgg16"](width=16, channels=2, norm=norm)
    variables = random_variables(encoder, x, mask, train=False)
    found = weights.load(encoder, variables["params"], variables.get("batch_stats", {}), tensors, "a file")
    assert set(found.left_out) == set()
    maps = x
    for i, position in enumerate(positions):
        kernel, bias = tensors[f"features.{position}.weight"], tensors[f"features.{position}.bias"]
        maps = jax.lax.conv_general_dilated(
            maps, kernel.transpose(2, 3, 1, 0), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        maps = maps + bias
        if norm == "batch":
            bn = {n: tensors[f"features.{position + 1}.{n}"] for n in ("weight", "bias", "running_mean", "running_var")}
            maps = (maps - bn["running_mean"]) / np.sqrt(bn["running_var"] + 1e-5) * bn["weight"] + bn["bias"]
        maps = np.maximum(maps, 0)
        if i in (1, 3, 6, 9, 12):
            maps = maps.reshape(2, maps.shape[1] // 2, 2, maps.shape[2] // 2, 2, -1).max((2, 4))
    tokens, _ = encoder.apply(
        {"params": with_identity_projection(found.params), "batch_stats": found.batch_stats}, x, mask, train=False
    )
    np.testing.assert_allclose(tokens, layer_norm(maps.reshape(2, 1, -1)), atol=2e-4)


def test_pretrained_tensors_are_used_or_reported():
    used = {case: set(tensors_of(case)) - set(load(case)[1].left_out) for case in CASES}
    dropped = {case: {name for name in load(case)[1].left_out if "num_batches" not in name} for case in CASES}
    assert all(used.values())
    assert dropped["bert-transformers-all"] == {
        "bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"
    }  # fmt: skip
    assert dropped["bert-transformers-pooled"] == {"classifier.weight", "classifier.bias"}
    assert dropped["vgg-torchvision-fc"] == {"classifier.6.weight", "classifier.6.bias"}
    assert dropped["resnet-torchvision"] == {"fc.weight", "fc.bias"}
    assert dropped["convnext-torchvision"] == {"classifier.2.weight", "classifier.2.bias"}


def test_pretrained_rejects_unexpected_and_missing_tensors():
    case = "resnet-torchvision"
    with_extra = {**tensors_of(case), "layer9.0.conv1.weight": np.zeros(3, np.float32)}
    with rejects("init", "a file", says="unexpected tensors (1): layer9.0.conv1.weight"):
        load(case, with_extra)
    many = {f"other{n}.weight": np.zeros(3, np.float32) for n in range(12)}
    with rejects("init", "a file", says=f"unexpected tensors (12): {', '.join(many)}"):
        load(case, {**tensors_of(case), **many})
    deeper = {**tensors_of(case), "layer1.0.se.fc.weight": np.zeros(3, np.float32)}  # another architecture
    with rejects("init", "a file", says="unexpected tensors (1): layer1.0.se.fc.weight"):
        load(case, deeper)
    with_duplicate = {**tensors_of(case), "embedder.embedder.convolution.weight": tensors_of(case)["conv1.weight"]}
    with rejects("init", "a file", says="'embedder.embedder.convolution.weight' is a second tensor for conv_stem"):
        load(case, with_duplicate)
    with_missing = {name: tensor for name, tensor in tensors_of(case).items() if name != "layer2.0.conv2.weight"}
    with rejects("init", "a file", says="missing parameters (1): stage1_block0/conv_2/kernel"):
        load(case, with_missing)
    with_other_shape = {**tensors_of(case), "conv1.weight": np.zeros((5, 3, 7, 7), np.float32)}
    with rejects("init", "a file", says="conv1.weight of shape [5, 3, 7, 7] does not fit conv_stem/kernel"):
        load(case, with_other_shape)


def test_pretrained_rejects_an_encoder_without_published_weights():
    encoder = ENCODERS["cnn"](width=4)
    with rejects("init", "a file", says="not CNN"):
        weights.load(encoder, {}, {}, {}, "a file")


def test_pretrained_gray_kernel_is_the_sum_over_rgb():
    case = "resnet-torchvision"
    gray = inputs_of(case)[0][..., :1]
    encoder, found = load(case, x=gray)
    rgb_encoder, rgb = load(case)
    kernels = (rgb.params["conv_stem"]["kernel"], found.params["conv_stem"]["kernel"])
    np.testing.assert_allclose(kernels[0].sum(axis=2, keepdims=True), kernels[1], rtol=1e-6)
    outputs = [
        quick_jit(lambda v, x, m, module=module: module.apply(v, x, m, train=False)[0])(
            {"params": with_identity_projection(one.params), "batch_stats": one.batch_stats}, x, inputs_of(case)[1]
        )
        for module, one, x in ((encoder, found, gray), (rgb_encoder, rgb, np.repeat(gray, 3, -1)))
    ]
    np.testing.assert_allclose(*outputs, atol=1e-4)


@pytest.mark.parametrize("channels", [2, 4])
def test_pretrained_kernel_repeats_rgb_for_other_channel_counts(channels):
    case = "resnet-torchvision"
    images = np.repeat(inputs_of(case)[0][..., :1], channels, -1)
    encoder, found = load(case, x=images)
    rgb = load(case)[1]
    kernels = (rgb.params["conv_stem"]["kernel"], found.params["conv_stem"]["kernel"])
    for channel in range(channels):
        np.testing.assert_allclose(kernels[1][:, :, channel], kernels[0][:, :, channel % 3] * 3 / channels, rtol=1e-6)
    tokens, _ = quick_jit(lambda v, x, m: encoder.apply(v, x, m, train=False))(
        {"params": with_identity_projection(found.params), "batch_stats": found.batch_stats}, images, inputs_of(case)[1]
    )
    assert np.isfinite(tokens).all()


def test_pretrained_position_embeddings_are_resized_to_the_image():
    case = "vit-timm"
    small, large = (np.zeros((1, side, side, 3), np.float32) for side in (16, 24))
    original, resized = load(case, x=small)[1].params["positions"], load(case, x=large)[1].params["positions"]
    assert (original.shape, resized.shape) == ((17, 8), (37, 8))
    np.testing.assert_array_equal(original[0], resized[0])  # the class token's
    smooth = {**tensors_of(case), "pos_embed": np.linspace(0, 1, 16, dtype=np.float32).repeat(8).reshape(1, 16, 8)}
    smooth["pos_embed"] = np.concatenate([np.zeros((1, 1, 8), np.float32), smooth["pos_embed"]], axis=1)
    grid = load(case, smooth, x=large)[1].params["positions"][1:, 0].reshape(6, 6)
    assert (np.diff(grid, axis=0) > 0).all()
    assert (np.diff(grid, axis=1)[:, 1:-1] > 0).all()
    with rejects("init", "a file", says="does not fit positions"):
        load(case, x=np.zeros((1, 16, 24, 3), np.float32))


@pytest.mark.parametrize("cells", [36, 9])
def test_pretrained_position_embeddings_are_resized_as_in_timm(cells):
    grid = FIXTURES["positions/16"]
    found = weights._resize_positions(np.concatenate([np.ones((1, 8), np.float32), grid]), cells + 1)
    np.testing.assert_array_equal(found[0], 1)
    np.testing.assert_allclose(found[1:], FIXTURES[f"positions/{cells}"], atol=1e-5)


def test_pretrained_accepts_tensorflow_norm_names():
    names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    renamed = {}
    for name, tensor in tensors_of("bert-transformers-all").items():
        new_name = name
        for torch, tensorflow in names.items():
            new_name = new_name.replace(torch, tensorflow)
        renamed[new_name] = tensor
    jax.tree.map(
        np.testing.assert_array_equal,
        load("bert-transformers-all", renamed)[1].params,
        load("bert-transformers-all")[1].params,
    )


def test_weights_are_read_from_files_directories_and_shards(tmp_path):
    first, second = {"a": np.ones(2, np.float32)}, {"b": np.zeros(3, np.float32)}
    save_file(first, tmp_path / "model.safetensors")
    assert weights.read(str(tmp_path / "model.safetensors"), tmp_path).keys() == {"a"}
    assert weights.read(str(tmp_path), tmp_path).keys() == {"a"}
    save_file(second, tmp_path / "model-2.safetensors")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weights.read(str(tmp_path), tmp_path).keys() == {"a", "b"}
    save_file({**first, **second}, tmp_path / "model-2.safetensors")
    with rejects("init", str(tmp_path), says="has 'a'"):
        weights.read(str(tmp_path), tmp_path)
    for content in ("{", "{}", '{"weight_map": {"a": "../model.safetensors"}}'):
        (tmp_path / "model.safetensors.index.json").write_text(content)
        with rejects("init", str(tmp_path), says="model.safetensors.index.json"):
            weights.read(str(tmp_path), tmp_path)


def test_weights_read_rejects_unreadable_sources(tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise requests.ConnectionError("no network")

    monkeypatch.setattr(requests, "get", unreachable)
    (tmp_path / "truncated.safetensors").write_bytes(b"\x08\x00")
    (tmp_path / "weights.bin").write_bytes(b"pickle")
    for source, fact in (
        ("no/such/file", "no such file"),
        ("owner/model", "no network"),
        (str(tmp_path / "truncated.safetensors"), "read as safetensors"),
        (str(tmp_path / "weights.bin"), "pickles"),
    ):
        with rejects("init", source, says=fact):
            weights.read(source, tmp_path)
    assert not (tmp_path / "owner").exists()
