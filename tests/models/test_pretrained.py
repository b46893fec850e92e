"""Published weights: small models of torchvision, timm and transformers compute the same here, tensor for tensor."""

import json

import jax
import numpy as np
import pytest
import requests
from safetensors.numpy import save_file

from mmfusion.errors import UserError
from mmfusion.models.encoders import ENCODERS
from mmfusion.models.pretrained import weights
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


def given(case):
    x = FIXTURES[f"{case}/input"]
    return x, x > 0 if x.dtype == np.int32 else np.ones((len(x), 1), bool)


def loaded(case, tensors=None, x=None):
    x = given(case)[0] if x is None else x
    mask = given(case)[1]
    encoder = encoder_of(case)
    variables = random_variables(encoder, x, mask, train=False)
    tensors = tensors_of(case) if tensors is None else tensors
    return encoder, weights.load(encoder, variables["params"], variables.get("batch_stats", {}), tensors, "a file")


def plain(params):
    """Returns parameters whose tokens are the encoder's cells, layer-normalised."""
    own = params.get("tokens", params)
    size = own["project"]["kernel"].shape[0]
    plain = {
        "project": {"kernel": np.eye(size, dtype=np.float32), "bias": np.zeros(size, np.float32)},
        "norm": {"scale": np.ones(size, np.float32), "bias": np.zeros(size, np.float32)},
    }
    if "tokens" in params:
        return {**params, "tokens": {**plain, "positions": np.zeros_like(own["positions"])}}
    return {**params, **plain}


def layer_norm(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_the_published_one_does(case):
    x, mask = given(case)
    encoder, found = loaded(case)
    variables = {"params": plain(found.params), "batch_stats": found.batch_stats}
    tokens, real = jax.jit(lambda v: encoder.apply(v, x, mask, train=False))(variables)
    expected = FIXTURES[f"{case}/output"]
    np.testing.assert_allclose(tokens[real], layer_norm(expected)[np.asarray(real)], atol=2e-4)


@pytest.mark.parametrize(
    ("norm", "places"),  # of the convolutions among torchvision's `features` of configuration D
    [
        ("none", (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)),
        ("batch", (0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40)),
    ],
)
def test_vgg16_takes_each_published_convolution_in_its_place(norm, places):
    draw = np.random.default_rng(0)
    widths = [3, *(2 * size for size in (1, 1, 2, 2, 4, 4, 4, 8, 8, 8, 8, 8, 8))]
    tensors = {}
    for place, inputs, outputs in zip(places, widths[:-1], widths[1:], strict=True):
        kernel = draw.normal(0, np.sqrt(2 / 9 / inputs), (outputs, inputs, 3, 3))
        tensors[f"features.{place}.weight"] = kernel.astype(np.float32)
        names = [(place, "bias")] + [(place + 1, n) for n in ("weight", "bias", "running_mean")] * (norm == "batch")
        tensors |= {f"features.{at}.{name}": draw.normal(size=outputs).astype(np.float32) for at, name in names}
        if norm == "batch":
            tensors[f"features.{place + 1}.running_var"] = draw.uniform(0.5, 2, outputs).astype(np.float32)
    x, mask = draw.normal(size=(2, 32, 32, 3)).astype(np.float32), np.ones((2, 1), bool)
    encoder = ENCODERS["vgg16"](width=16, channels=2, norm=norm)
    variables = random_variables(encoder, x, mask, train=False)
    found = weights.load(encoder, variables["params"], variables.get("batch_stats", {}), tensors, "a file")
    assert set(found.left_out) == set()
    maps = x
    for i, place in enumerate(places):
        kernel, bias = tensors[f"features.{place}.weight"], tensors[f"features.{place}.bias"]
        maps = jax.lax.conv_general_dilated(
            maps, kernel.transpose(2, 3, 1, 0), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        maps = maps + bias
        if norm == "batch":
            own = {n: tensors[f"features.{place + 1}.{n}"] for n in ("weight", "bias", "running_mean", "running_var")}
            maps = (maps - own["running_mean"]) / np.sqrt(own["running_var"] + 1e-5) * own["weight"] + own["bias"]
        maps = np.maximum(maps, 0)
        if i in (1, 3, 6, 9, 12):
            maps = maps.reshape(2, maps.shape[1] // 2, 2, maps.shape[2] // 2, 2, -1).max((2, 4))
    tokens, _ = encoder.apply({"params": plain(found.params), "batch_stats": found.batch_stats}, x, mask, train=False)
    np.testing.assert_allclose(tokens, layer_norm(maps.reshape(2, 1, -1)), atol=2e-4)


def test_every_tensor_is_used_or_named():
    used = {case: set(tensors_of(case)) - set(loaded(case)[1].left_out) for case in CASES}
    dropped = {case: {name for name in loaded(case)[1].left_out if "num_batches" not in name} for case in CASES}
    assert all(used.values())
    assert dropped["bert-transformers-all"] == {
        "bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"
    }  # fmt: skip
    assert dropped["bert-transformers-pooled"] == {"classifier.weight", "classifier.bias"}
    assert dropped["vgg-torchvision-fc"] == {"classifier.6.weight", "classifier.6.bias"}
    assert dropped["resnet-torchvision"] == {"fc.weight", "fc.bias"}
    assert dropped["convnext-torchvision"] == {"classifier.2.weight", "classifier.2.bias"}


def test_what_is_left_over_or_missing_is_told():
    case = "resnet-torchvision"
    more = {**tensors_of(case), "layer9.0.conv1.weight": np.zeros(3, np.float32)}
    with pytest.raises(UserError, match=r"unexpected tensors \(1\): layer9\.0\.conv1\.weight"):
        loaded(case, more)
    many = {f"other{n}.weight": np.zeros(3, np.float32) for n in range(12)}
    with pytest.raises(UserError, match=rf"unexpected tensors \(12\): {', '.join(many)}"):
        loaded(case, {**tensors_of(case), **many})
    deeper = {**tensors_of(case), "layer1.0.se.fc.weight": np.zeros(3, np.float32)}  # of another architecture
    with pytest.raises(UserError, match=r"unexpected tensors \(1\): layer1\.0\.se\.fc\.weight"):
        loaded(case, deeper)
    twice = {**tensors_of(case), "embedder.embedder.convolution.weight": tensors_of(case)["conv1.weight"]}
    with pytest.raises(UserError, match=r"'embedder\.embedder\.convolution\.weight' is a second tensor for conv_stem"):
        loaded(case, twice)
    less = {name: tensor for name, tensor in tensors_of(case).items() if name != "layer2.0.conv2.weight"}
    with pytest.raises(UserError, match=r"missing parameters \(1\): stage1_block0/conv_2/kernel"):
        loaded(case, less)
    other = {**tensors_of(case), "conv1.weight": np.zeros((5, 3, 7, 7), np.float32)}
    with pytest.raises(UserError, match=r"conv1\.weight of shape \[5, 3, 7, 7\] does not fit conv_stem/kernel"):
        loaded(case, other)


def test_an_encoder_without_published_weights_is_told():
    encoder = ENCODERS["cnn"](width=4)
    with pytest.raises(UserError, match="not CNN"):
        weights.load(encoder, {}, {}, {}, "a file")


def test_gray_pictures_see_the_sum_of_three_channels():
    case = "resnet-torchvision"
    gray = given(case)[0][..., :1]
    encoder, found = loaded(case, x=gray)
    three, of_three = loaded(case)
    kernels = (of_three.params["conv_stem"]["kernel"], found.params["conv_stem"]["kernel"])
    np.testing.assert_allclose(kernels[0].sum(axis=2, keepdims=True), kernels[1], rtol=1e-6)
    outs = [
        quick_jit(lambda v, x, m, module=module: module.apply(v, x, m, train=False)[0])(
            {"params": plain(one.params), "batch_stats": one.batch_stats}, x, given(case)[1]
        )
        for module, one, x in ((encoder, found, gray), (three, of_three, np.repeat(gray, 3, -1)))
    ]
    np.testing.assert_allclose(*outs, atol=1e-4)


@pytest.mark.parametrize("channels", [2, 4])
def test_pictures_of_other_channels_see_the_three_in_turn(channels):
    case = "resnet-torchvision"
    more = np.repeat(given(case)[0][..., :1], channels, -1)
    encoder, found = loaded(case, x=more)
    of_three = loaded(case)[1]
    kernels = (of_three.params["conv_stem"]["kernel"], found.params["conv_stem"]["kernel"])
    for channel in range(channels):
        np.testing.assert_allclose(kernels[1][:, :, channel], kernels[0][:, :, channel % 3] * 3 / channels, rtol=1e-6)
    tokens, _ = quick_jit(lambda v, x, m: encoder.apply(v, x, m, train=False))(
        {"params": plain(found.params), "batch_stats": found.batch_stats}, more, given(case)[1]
    )
    assert np.isfinite(tokens).all()


def test_positions_are_resized_to_the_picture():
    case = "vit-timm"
    small, large = (np.zeros((1, side, side, 3), np.float32) for side in (16, 24))
    same, wide = loaded(case, x=small)[1].params["positions"], loaded(case, x=large)[1].params["positions"]
    assert (same.shape, wide.shape) == ((17, 8), (37, 8))
    np.testing.assert_array_equal(same[0], wide[0])  # of the class token
    smooth = {**tensors_of(case), "pos_embed": np.linspace(0, 1, 16, dtype=np.float32).repeat(8).reshape(1, 16, 8)}
    smooth["pos_embed"] = np.concatenate([np.zeros((1, 1, 8), np.float32), smooth["pos_embed"]], axis=1)
    grid = loaded(case, smooth, x=large)[1].params["positions"][1:, 0].reshape(6, 6)
    assert (np.diff(grid, axis=0) > 0).all()
    assert (np.diff(grid, axis=1)[:, 1:-1] > 0).all()
    with pytest.raises(UserError, match="does not fit positions"):
        loaded(case, x=np.zeros((1, 16, 24, 3), np.float32))


@pytest.mark.parametrize("cells", [36, 9])
def test_positions_are_resized_as_timm_does(cells):
    grid = FIXTURES["positions/16"]
    found = weights._resize_positions(np.concatenate([np.ones((1, 8), np.float32), grid]), cells + 1)
    np.testing.assert_array_equal(found[0], 1)
    np.testing.assert_allclose(found[1:], FIXTURES[f"positions/{cells}"], atol=1e-5)


def test_norms_named_by_tensorflow_are_known():
    names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    renamed = {}
    for name, tensor in tensors_of("bert-transformers-all").items():
        new = name
        for torch, tensorflow in names.items():
            new = new.replace(torch, tensorflow)
        renamed[new] = tensor
    jax.tree.map(
        np.testing.assert_array_equal,
        loaded("bert-transformers-all", renamed)[1].params,
        loaded("bert-transformers-all")[1].params,
    )


def test_files_folders_and_shards(tmp_path):
    first, second = {"a": np.ones(2, np.float32)}, {"b": np.zeros(3, np.float32)}
    save_file(first, tmp_path / "model.safetensors")
    assert weights.read(str(tmp_path / "model.safetensors"), tmp_path).keys() == {"a"}
    assert weights.read(str(tmp_path), tmp_path).keys() == {"a"}
    save_file(second, tmp_path / "model-2.safetensors")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weights.read(str(tmp_path), tmp_path).keys() == {"a", "b"}
    save_file({**first, **second}, tmp_path / "model-2.safetensors")
    with pytest.raises(UserError, match="has 'a', which another file also has"):
        weights.read(str(tmp_path), tmp_path)
    for wrong in ("{", "{}", '{"weight_map": {"a": "../model.safetensors"}}'):
        (tmp_path / "model.safetensors.index.json").write_text(wrong)
        with pytest.raises(UserError, match=r"model\.safetensors\.index\.json lists no files"):
            weights.read(str(tmp_path), tmp_path)


def test_what_cannot_be_read_is_told(tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise requests.ConnectionError("no network")

    monkeypatch.setattr(requests, "get", unreachable)
    (tmp_path / "torn.safetensors").write_bytes(b"\x08\x00")
    (tmp_path / "weights.bin").write_bytes(b"pickle")
    for source, said in (
        ("no/such/file", "no such file or folder"),
        ("owner/model", "cannot be downloaded"),
        (str(tmp_path / "torn.safetensors"), "cannot be read as safetensors"),
        (str(tmp_path / "weights.bin"), "pickles are not supported"),
    ):
        with pytest.raises(UserError, match=said):
            weights.read(source, tmp_path)
    assert not (tmp_path / "owner").exists()
