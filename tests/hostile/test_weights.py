"""Published weights with shapes, types and values that no encoder has, and names that leave the cache."""

import json
import os
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from mmfusion.models.encoders.vit import ViTTi
from mmfusion.models.pretrained import weights
from tests.errors import rejects
from tests.hostile.limits import within


def safetensors(path, header, data=b""):
    """Writes a file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def tensor(dtype="F32", shape=(1,), start=0, end=4):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


FOUR = b"\0" * 4
HEADERS = {
    "F8": ({"a": tensor("F8_E4M3", (4,))}, FOUR),
    "F8 of another kind": ({"a": tensor("F8_E5M2", (4,))}, FOUR),
    "F4": ({"a": tensor("F4", (8,))}, FOUR),
    "BF16": ({"a": tensor("BF16", (2,))}, FOUR),
    "complex": ({"a": tensor("C64", (1,), 0, 8)}, FOUR * 2),
    "no type": ({"a": tensor("F33", (1,))}, FOUR),
    "2^62": ({"a": tensor(shape=(2**62,), end=2**64)}, b""),
    "2^62 in no bytes": ({"a": tensor(shape=(2**62,), end=0)}, b""),
    "2^62 times 0": ({"a": tensor(shape=(0, 2**62), end=0)}, b""),
    "10^11, truncated": ({"a": tensor(shape=(10**11,), end=4 * 10**11)}, FOUR),
    "negative": ({"a": tensor(shape=(-1,))}, FOUR),
    "negative offset": ({"a": tensor(start=-4, end=0)}, FOUR),
    "backwards": ({"a": tensor(start=4, end=0)}, FOUR),
    "100 axes": ({"a": tensor(shape=[1] * 100)}, FOUR),
    "larger than its bytes": ({"a": tensor(shape=(3,))}, FOUR),
    "a fraction": ({"a": tensor(shape=(1.5,))}, FOUR),
    "no number": ({"a": tensor(shape=("x",))}, FOUR),
    "no list": ({"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}, FOUR),
    "no offsets": ({"a": {"dtype": "F32", "shape": [1]}}, FOUR),
    "a list": ([], b""),
    "deep": (b'{"a":' * 50_000, b""),
    "no UTF-8": (b"\xff\xff", b""),
    "long name": ({"features." + "1" * 5000 + ".weight": tensor()}, FOUR),
    "name of two lines": ({"a\nb": tensor()}, FOUR),
    "long number": (b'{"a": ' + b"1" * 5000 + b"}", b""),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_read_refuses_a_hostile_header(kind, tmp_path):
    path = safetensors(tmp_path / "a.safetensors", *HEADERS[kind])
    with rejects("init", str(path)), within(5):
        weights.read(str(path), tmp_path)


def test_read_refuses_a_header_without_end_and_other_files(tmp_path):
    (tmp_path / "length.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    (tmp_path / "short.safetensors").write_bytes(b"\1\2\3")
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "zero.safetensors").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "model.safetensors.index.json").symlink_to("/dev/zero")
    for name in ("length.safetensors", "short.safetensors", "pipe.safetensors", "zero.safetensors", "folder"):
        with rejects("init", str(tmp_path / name)), within(5):
            weights.read(str(tmp_path / name), tmp_path)


@pytest.mark.parametrize("source", ["../x", "x/..", "./x", "../..", "a/.b", ".a/b"])
def test_read_stays_in_its_cache(source, tmp_path, monkeypatch):
    cache = tmp_path / "cache" / "hub"
    for folder in (cache / source, cache):
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"a": np.ones(1, np.float32)}, folder / "model.safetensors")
    monkeypatch.chdir(cache)  # where there is no folder of that name, but .. and .
    monkeypatch.setattr(weights, "fetch", lambda *_: pytest.fail("read from the cache"))
    monkeypatch.setattr(weights.Path, "exists", lambda _: False)
    monkeypatch.setattr(weights.Path, "is_dir", lambda _: False)
    with rejects("init", source):
        weights.read(source, cache)


@pytest.fixture(scope="module")
def vit():
    """Returns a small encoder with its variables and weights that fit, as timm names them."""
    encoder = ViTTi(width=8, patch=4, hidden=12, layers=1, heads=2)
    shapes = jax.eval_shape(
        lambda: encoder.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), jnp.ones((1, 1), bool), train=False)
    )
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes["params"])
    return encoder, params


def fitting():
    n = 12
    shapes = {
        "cls_token": (1, 1, n), "pos_embed": (1, 5, n), "patch_embed.proj.weight": (n, 3, 4, 4),
        "patch_embed.proj.bias": (n,), "norm.weight": (n,), "norm.bias": (n,), "blocks.0.norm1.weight": (n,),
        "blocks.0.norm1.bias": (n,), "blocks.0.attn.qkv.weight": (3 * n, n), "blocks.0.attn.qkv.bias": (3 * n,),
        "blocks.0.attn.proj.weight": (n, n), "blocks.0.attn.proj.bias": (n,), "blocks.0.norm2.weight": (n,),
        "blocks.0.norm2.bias": (n,), "blocks.0.mlp.fc1.weight": (4 * n, n), "blocks.0.mlp.fc1.bias": (4 * n,),
        "blocks.0.mlp.fc2.weight": (n, 4 * n), "blocks.0.mlp.fc2.bias": (n,),
    }  # fmt: skip
    return {name: np.ones(shape, np.float32) for name, shape in shapes.items()}


def test_load_accepts_the_weights_that_the_others_spoil(vit):
    encoder, params = vit
    weights.load(encoder, params, {}, fitting(), "x")


SHAPES = ((), (0,), (1,), (7,), (1, 0), (0, 12), (2, 2), (1, 1, 1, 1), (12, 12, 12, 12, 1), (1, 17, 3))


@pytest.mark.parametrize("shape", SHAPES)
def test_load_refuses_odd_shapes(shape, vit):
    encoder, params = vit
    for name in fitting():
        with rejects("init", "x", says="does not fit"):
            weights.load(encoder, params, {}, {**fitting(), name: np.ones(shape, np.float32)}, "x")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_load_refuses_values_that_are_not_finite(bad, vit):
    encoder, params = vit
    for name, value in fitting().items():
        spoiled = value.astype(np.float64)
        spoiled.flat[-1] = bad
        with rejects("init", "x", says="not finite"):
            weights.load(encoder, params, {}, {**fitting(), name: spoiled}, "x")


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64", "bool"])
def test_load_refuses_numbers_that_are_no_floats(dtype, vit):
    encoder, params = vit
    with rejects("init", "x", says=dtype):
        weights.load(encoder, params, {}, {**fitting(), "norm.bias": np.ones(12, dtype)}, "x")


@pytest.mark.parametrize("shape", [(5, 3), (4, 0), (0, 0), (4, 50)])
def test_fitted_refuses_odd_shapes_after_convolutions(shape):
    with rejects("init", "x", says="does not fit"):
        weights._fitted(np.ones(shape), np.ones((49, 4)), "top/fc6/kernel", "classifier.0.weight", "x")
