import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmfusion.models.encoders import ENCODERS
from mmfusion.models.encoders.classic import LENET_TABLE, adaptive_avg_pool
from mmfusion.models.encoders.inception import response_norm
from tests.errors import rejects

IMAGENET = {"stem": "imagenet", "norm": "batch"}

# (encoder, options, side, channels, classes, published parameters, tokens per image); without auxiliary heads.
PUBLISHED = [
    ("lenet5", {}, 32, 1, 0, 60_000, 1),  # LeCun et al. 1998, with fixed radial basis functions
    ("alexnet", {"fc": 4096}, 224, 3, 1000, 61_100_840, 1),  # from here on torchvision's counts
    ("vgg11", {"fc": 4096}, 224, 3, 1000, 132_863_336, 1),
    ("vgg11", {"fc": 4096, "norm": "batch"}, 224, 3, 1000, 132_868_840, 1),
    ("vgg16", {"fc": 4096}, 224, 3, 1000, 138_357_544, 1),
    ("vgg16", {"fc": 4096, "norm": "batch"}, 224, 3, 1000, 138_365_992, 1),
    ("inception_v1", {}, 224, 3, 1000, 6_998_552, 49),  # the Caffe model of the paper, with biases
    ("inception_v3", {}, 299, 3, 1000, 23_834_568, 64),
    ("resnet18", IMAGENET, 224, 3, 1000, 11_689_512, 49),
    ("resnet34", IMAGENET, 224, 3, 1000, 21_797_672, 49),
    ("resnet50", IMAGENET, 224, 3, 1000, 25_557_032, 49),
    ("resnet101", IMAGENET, 224, 3, 1000, 44_549_160, 49),
    ("convnext_t", {}, 224, 3, 1000, 28_589_128, 49),
    ("vit_ti", {}, 224, 3, 1000, 5_717_416, 197),  # timm
    ("vit_s", {}, 224, 3, 1000, 22_050_664, 197),
    ("vit_b", {}, 224, 3, 1000, 86_567_656, 197),
]


@pytest.mark.thorough(but=("lenet5-", "vgg16-batch", "inception_v3-", "resnet50-batch", "convnext_t-", "vit_b-"))
@pytest.mark.parametrize("case", PUBLISHED, ids=lambda case: f"{case[0]}-{case[1].get('norm', '')}")
def test_image_encoder_parameter_count_matches_the_published_one(case):
    """Counts the encoder without its token projection, with the classifier of its paper."""
    name, options, side, channels, classes, published, tokens = case
    encoder = ENCODERS[name](width=4, **options)
    x, mask = jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32), jax.ShapeDtypeStruct((1, 1), bool)
    (out, _), variables = jax.eval_shape(
        lambda x, mask: encoder.init_with_output(jax.random.key(0), x, mask, train=False), x, mask
    )
    assert out.shape == (1, tokens, 4)
    params = variables["params"]
    token_layers = [params.pop("tokens")] if "tokens" in params else [params.pop("project"), params.pop("norm")]
    last = token_layers[0].get("project", token_layers[0])["kernel"].shape[0]  # channels of the last feature map
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) + (last + 1) * classes == published


def test_bert_parameter_count_matches_the_published_one():
    """The count is that of transformers for BERT-base uncased with its pooler."""
    encoder = ENCODERS["bert"](width=4, vocabulary=30_522, tokens="pooled")
    ids, mask = jax.ShapeDtypeStruct((1, 8), jnp.int32), jax.ShapeDtypeStruct((1, 8), bool)
    params = jax.eval_shape(lambda x, m: encoder.init(jax.random.key(0), x, m, train=False), ids, mask)["params"]
    # The norm follows the projection.
    bert_params = [params[name] for name in params if name not in ("project", "norm")]
    assert sum(leaf.size for leaf in jax.tree.leaves(bert_params)) == 109_482_240


def test_adaptive_avg_pool_covers_every_position():
    x = np.arange(15.0, dtype=np.float32).reshape(1, 3, 5, 1)
    rows = [x[0, a:b].mean(axis=0) for a, b in ((0, 2), (1, 3))]
    expected = [[row[a:b].mean() for a, b in ((0, 3), (2, 5))] for row in rows]
    np.testing.assert_allclose(adaptive_avg_pool(x, 2)[0, :, :, 0], expected, rtol=1e-6)
    np.testing.assert_array_equal(adaptive_avg_pool(x[:, :, :3], 3), x[:, :, :3])
    np.testing.assert_allclose(adaptive_avg_pool(np.ones((1, 1, 2, 1), np.float32), 7), np.ones((1, 7, 7, 1)))


def test_response_norm_matches_its_formula():
    x = np.random.default_rng(0).normal(size=(1, 1, 1, 7)).astype(np.float32)
    expected = [x[0, 0, 0, i] / (2 + 0.1 * (x[0, 0, 0, max(i - 2, 0) : i + 3] ** 2).sum()) ** 0.75 for i in range(7)]
    np.testing.assert_allclose(response_norm(x, alpha=0.1)[0, 0, 0], expected, rtol=1e-5)


def test_lenet_connects_feature_maps_as_in_its_table():
    """The paper's table: six maps read three neighbours, six read four, three read two pairs, one reads all."""
    assert [len(maps) for maps in LENET_TABLE] == [3] * 6 + [4] * 9 + [6]
    assert LENET_TABLE[5] == (0, 1, 5)
    assert LENET_TABLE[9] == (0, 3, 4, 5)
    assert all(sum(m in maps for maps in LENET_TABLE) == 10 for m in range(6))


@pytest.mark.parametrize(
    ("name", "options", "side", "path", "value", "fact"),
    [
        ("alexnet", {}, 62, "alexnet", None, "too small"),
        ("vgg11", {}, 31, "vgg", None, "too small"),
        ("inception_v3", {}, 74, "inception_v3", None, "too small"),
        ("convnext_t", {}, 31, "convnext_t", None, "at least 32 x 32 pixels, not 31 x 31"),
        ("vit_ti", {}, 40, "vit.patch", 16, "40×40"),
        ("vit_ti", {"heads": 5}, 32, "heads", 5, "width"),
    ],
)
def test_image_encoders_reject_unsupported_sizes_and_options(name, options, side, path, value, fact):
    data = jnp.zeros((1, side, side, 3)), jnp.ones((1, 1), bool)
    with rejects(path, value, says=fact):
        jax.eval_shape(lambda: ENCODERS[name](width=4, **options).init(jax.random.key(0), *data, train=False))
