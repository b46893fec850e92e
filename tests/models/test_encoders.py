import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

from mmfusion.models.encoders import ENCODERS, can_read
from mmfusion.models.encoders.audio import SpecAugment, log_mel
from mmfusion.models.encoders.image import Positions
from mmfusion.models.encoders.images import PerImage
from tests.errors import rejects
from tests.models.encoder_cases import (
    AUDIO,
    CASES,
    IMAGE,
    RANDOM,
    RATE,
    SEQUENCE,
    SEVERAL,
    TEXT,
    TINY_CNN,
    TOKEN_IDS,
    WIDTH,
    make,
)  # fmt: skip
from tests.models.random_variables import quick_jit, random_variables


def with_invalid_padding(x, mask):
    """Sets masked positions to NaN, or to an out-of-range token id."""
    mask = mask.reshape(*mask.shape[: 1 if x.ndim == 4 else 2], *[1] * (x.ndim - (1 if x.ndim == 4 else 2)))
    return np.where(mask, x, np.array(10**6 if x.dtype == np.int32 else np.nan, x.dtype))


def test_encoder_cases_cover_every_encoder():
    assert {name for name, *_ in CASES.values()} == set(ENCODERS)


# One case of each kind of network, mask and input.
EACH_KIND = (
    "cnn-batch", "resnet50", "cnn_rnn-attention", "pooled_cnn-mean", "vgg11", "inception_v1", "convnext_t", "vit_ti",
    "bow-mean", "rnn-lstm", "textcnn-all", "bert-pooled", "logmel_cnn-batch", "waveform_cnn", "frame_cnn-gru",
    "table_mlp", "ft_transformer-keys", "mlp-sequence", "rnn-sequence-last", "tcn", "cnn-images", "graph_attention",
    "knowledge_attention",
)  # fmt: skip


@pytest.mark.thorough(but=EACH_KIND)
@pytest.mark.parametrize("case", CASES)
def test_encoder_satisfies_the_contract(case):
    name, options, (x, mask), count = CASES[case]
    encoder = make(name, options)
    variables = random_variables(encoder, x, mask, train=False)
    weights = RANDOM.normal(size=(3, count, WIDTH)).astype(np.float32)

    def loss(params, x, mask):
        (tokens, real), _ = encoder.apply({**variables, "params": params}, x, mask, train=True, mutable=["batch_stats"])
        return (tokens * weights).sum(), (tokens, real)

    step = quick_jit(jax.grad(loss, has_aux=True))
    gradient, (tokens, real) = step(variables["params"], x, mask)
    assert tokens.shape == (3, count, WIDTH)
    assert tokens.dtype == jnp.float32
    assert real.shape == (3, count)
    assert real.dtype == bool
    np.testing.assert_array_equal(tokens[~real], 0.0)
    assert np.abs(tokens[real]).sum(axis=-1).min() > 0
    # Key biases have no gradient, see `layers.Attention`.
    unused = {
        name
        for name, g in ((jax.tree_util.keystr(k), g) for k, g in jax.tree_util.tree_leaves_with_path(gradient))
        if not (np.abs(g).max() > 0 or name.endswith("['key']['bias']"))
    }
    assert not unused, "parameters without gradient"

    # Tokens are normalised if the last norm has its initial scale and bias.
    def reset_norm(path, leaf):
        last = [part.key for part in path][-2:]
        return np.full(leaf.shape, float(last[1] == "scale"), np.float32) if last[0] == "norm" else leaf

    normalised = step(jax.tree_util.tree_map_with_path(reset_norm, variables["params"]), x, mask)[1][0][real]
    np.testing.assert_allclose(normalised.mean(axis=-1), 0.0, atol=1e-5)
    np.testing.assert_allclose(normalised.std(axis=-1), 1.0, atol=1e-2)

    # Padding has no influence, whatever its values.
    padded = step(variables["params"], with_invalid_padding(x, mask), mask)
    jax.tree.map(np.testing.assert_array_equal, padded, (gradient, (tokens, real)))

    # Absent rows have no influence: other tokens and all gradients equal those of the batch without the row.
    without = mask & np.array([[True], [False], [True]])
    gradient, (tokens, real) = step(variables["params"], with_invalid_padding(x, without), without)
    kept = np.array([0, 0, 2])
    filled = step(variables["params"], x[kept], without)
    jax.tree.map(np.testing.assert_array_equal, (gradient, tokens, real), (filled[0], *filled[1]))
    np.testing.assert_array_equal(tokens[1], 0.0)
    assert not real[1].any()

    gradient, (tokens, real) = step(
        variables["params"], np.full_like(x, with_invalid_padding(x, mask & False).flat[0]), mask & False
    )
    np.testing.assert_array_equal(tokens, 0.0)
    assert not real.any()
    assert all((g == 0).all() for g in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    "case",
    [
        "bow-mean",
        *(pytest.param(case, marks=pytest.mark.thorough) for case in ("cnn-batch", "rnn-lstm", "logmel_cnn-layer")),
    ],
)
def test_encoder_jit_equals_eager_with_the_same_output_types(case):
    name, options, (x, mask), _ = CASES[case]
    encoder = ENCODERS[name](width=WIDTH, **options)
    variables = random_variables(encoder, x, mask, train=False)
    compiled = jax.jit(lambda v: encoder.apply(v, x, mask, train=False))(variables)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5),
        encoder.apply(variables, x, mask, train=False),
        compiled,
    )
    train = jax.eval_shape(lambda v: encoder.apply(v, x, mask, train=True, mutable=["batch_stats"])[0], variables)
    jax.tree.map(lambda a, b: np.testing.assert_equal((a.shape, a.dtype), (b.shape, b.dtype)), train, compiled)


VARIABLE_LENGTH = [
    "mlp-sequence",
    "rnn-sequence",
    "rnn-sequence-last",
    "transformer-sequence",
    "tcn",
    "rnn-lstm",
    "rnn-last",
    "textcnn-all",
    "transformer",
    "bert-all",
    "logmel_cnn-layer",
    "logmel_cnn-group",
]


@pytest.mark.thorough(but=("rnn-lstm", "textcnn-all", "bert-all", "logmel_cnn-layer", "tcn"))
@pytest.mark.parametrize("case", [*VARIABLE_LENGTH, "waveform_cnn", "ast"])
def test_encoder_tokens_are_independent_of_the_padded_length(case):
    name, options, (x, mask), _ = CASES[case]
    encoder = ENCODERS[name](width=WIDTH, **options)
    variables = random_variables(encoder, x, mask, train=False)
    apply = quick_jit(lambda x, mask: encoder.apply(variables, x, mask, train=False))
    short, short_mask = apply(x, mask)
    padding = ((0, 0), (0, 37))
    long, long_mask = apply(np.pad(x, [*padding, *[(0, 0)] * (x.ndim - 2)]), np.pad(mask, padding))
    np.testing.assert_allclose(long[:, : short.shape[1]], short, atol=1e-5)
    np.testing.assert_array_equal(long_mask.sum(axis=1), short_mask.sum(axis=1))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_rnn_depends_on_later_tokens_only_if_bidirectional(bidirectional):
    encoder = ENCODERS["rnn"](width=WIDTH, vocabulary=7, embedding=4, hidden=4, bidirectional=bidirectional)
    variables = random_variables(encoder, *TEXT, train=False)
    apply = quick_jit(lambda x: encoder.apply(variables, x, TEXT[1], train=False)[0])
    other = TOKEN_IDS.copy()
    other[0, 2], other[1, 2] = 6, 6
    changed = np.abs(apply(TOKEN_IDS) - apply(other)).max(axis=-1) > 0
    np.testing.assert_array_equal(changed[0], [bidirectional, bidirectional, True, True, False, False])
    np.testing.assert_array_equal(changed[1], [bidirectional, bidirectional, True, True, True, True])
    assert not changed[2].any()


def test_rnn_last_token_is_the_last_real_position():
    options = {"vocabulary": 7, "embedding": 4, "hidden": 4}
    encoders = [ENCODERS["rnn"](width=WIDTH, tokens=tokens, **options) for tokens in ("all", "last")]
    variables = random_variables(encoders[0], *TEXT, train=False)
    (all_tokens, _), (last, _) = (encoder.apply(variables, *TEXT, train=False) for encoder in encoders)
    np.testing.assert_allclose(last[:, 0], all_tokens[np.arange(3), [3, 5, 0]], atol=1e-6)


@pytest.mark.thorough(but=("last",))
@pytest.mark.parametrize("tokens", ["all", "last"])
def test_rnn_skips_masked_positions_of_vectors(tokens):
    options = {"vocabulary": 0, "embedding": 4, "hidden": 4, "tokens": tokens, "bidirectional": True}
    encoder, (x, _) = ENCODERS["rnn"](width=WIDTH, **options), SEQUENCE
    mask = np.array([[0, 1, 0, 1, 1, 0]], bool)
    variables = random_variables(encoder, x[:1], mask, train=False)
    found, _ = encoder.apply(variables, x[:1], mask, train=False)
    expected, _ = encoder.apply(variables, x[:1, mask[0]], mask[:, mask[0]], train=False)
    np.testing.assert_allclose(found[:, mask[0]] if tokens == "all" else found, expected, atol=1e-6)


@pytest.mark.thorough(but=("3-2-13",))
@pytest.mark.parametrize(("kernel", "blocks", "field"), [(2, 3, 15), (3, 2, 13)])
def test_tcn_is_causal_with_the_receptive_field_of_its_dilations(kernel, blocks, field):
    """Without ReLU's zeros, the token at t depends on exactly the positions t - field + 1 to t."""
    length, t = 24, 20
    encoder = ENCODERS["tcn"](width=WIDTH, channels=(3,) * blocks, kernel=kernel)
    x, mask = np.ones((1, length, 2), np.float32), np.ones((1, length), bool)
    variables = jax.tree.map(np.abs, random_variables(encoder, x, mask, train=False))  # positive: ReLU is the identity
    variables["params"]["project"] = {  # tokens of different values, which the normalisation does not cancel
        "kernel": np.arange(3 * WIDTH, dtype=np.float32).reshape(3, WIDTH) ** 2, "bias": np.zeros(WIDTH, np.float32)
    }  # fmt: skip
    gradient = jax.grad(lambda x: (encoder.apply(variables, x, mask, train=False)[0][0, t] * np.arange(WIDTH)).sum())(x)
    used = np.flatnonzero(np.abs(gradient[0]).max(axis=-1) > 0)
    np.testing.assert_array_equal(used, np.arange(t - field + 1, t + 1))


def test_mlp_without_hidden_layers_is_a_normalised_linear_layer():
    encoder, (x, mask) = ENCODERS["mlp"](width=WIDTH, hidden=()), SEQUENCE
    variables = random_variables(encoder, x, mask, train=False)
    params = variables["params"]
    linear = x @ params["project"]["kernel"] + params["project"]["bias"]
    centred = linear - linear.mean(axis=-1, keepdims=True)
    expected = centred / np.sqrt(linear.var(axis=-1, keepdims=True) + 1e-6)
    expected = (expected * params["norm"]["scale"] + params["norm"]["bias"]) * mask[..., None]
    np.testing.assert_allclose(encoder.apply(variables, x, mask, train=False)[0], expected, rtol=1e-4, atol=1e-5)


def test_per_image_has_the_variables_of_the_encoder_and_its_tokens():
    x, mask = SEVERAL
    encoder = make("cnn", {**TINY_CNN, "norm": "batch"})
    variables = random_variables(encoder, *IMAGE, train=False)
    assert jax.tree.map(np.shape, variables) == jax.tree.map(
        np.shape, random_variables(PerImage(encoder), x, mask, train=False)
    )
    tokens, token_mask = PerImage(encoder).apply(variables, x, mask, train=False)
    for k in range(2):
        own, _ = encoder.apply(variables, x[:, k], mask[:, k : k + 1], train=False)
        mean = own.mean(axis=1)
        expected = (mean - mean.mean(-1, keepdims=True)) / np.sqrt(mean.var(-1, keepdims=True) + 1e-6)
        np.testing.assert_allclose(tokens[:, k], expected * mask[:, k : k + 1], atol=1e-5)
    np.testing.assert_array_equal(token_mask, mask)
    pooled, pooled_mask = PerImage(encoder, "mean").apply(variables, x, mask, train=False)
    np.testing.assert_allclose(pooled[1, 0], tokens[1, 1], atol=1e-5)  # its only image
    assert pooled.shape == (3, 1, WIDTH) and pooled_mask.all()


def test_per_image_dropout_differs_between_images_and_depends_on_the_example():
    encoder = PerImage(make("cnn", {**TINY_CNN, "dropout": 0.5}))
    x, mask = np.repeat(SEVERAL[0][:, :1], 2, axis=1), np.ones((3, 2), bool)  # the same image twice
    variables = random_variables(encoder, x, mask, train=False)

    def tokens(rows, train=True):
        ids = {"rows": {"id": np.array([7, 3, 9])[rows]}}
        rngs = {"dropout": jax.random.key(0)}
        return np.asarray(encoder.apply({**variables, **ids}, x[rows], mask[rows], train=train, rngs=rngs)[0])

    dropped = tokens(np.arange(3))
    assert np.abs(dropped[:, 0] - dropped[:, 1]).max(axis=-1).min() > 1e-3
    np.testing.assert_allclose(tokens(np.array([2, 0])), dropped[[2, 0]], atol=1e-5)
    kept = tokens(np.arange(3), train=False)
    np.testing.assert_allclose(kept[:, 0], kept[:, 1], atol=1e-6)


def test_can_read_is_true_of_the_types_of_reads_and_of_several_images():
    reading = {kind: {n for n, e in ENCODERS.items() if can_read(e, kind)} for kind in ("embedding", "sequence")}
    assert reading == {"embedding": {"mlp"}, "sequence": {"mlp", "rnn", "transformer", "tcn"}}
    assert {n for n, e in ENCODERS.items() if can_read(e, "images")} == {
        n for n, e in ENCODERS.items() if can_read(e, "image")
    }
    assert not can_read(object, "image")


def test_bow_is_the_normalised_mean_embedding():
    encoder = ENCODERS["bow"](width=WIDTH, vocabulary=7)
    variables = random_variables(encoder, *TEXT, train=False)
    table, norm = variables["params"]["embed"]["embedding"], variables["params"]["norm"]
    tokens, _ = encoder.apply(variables, *TEXT, train=False)
    mean = table[[3, 4, 2, 1]].mean(axis=0)
    expected = (mean - mean.mean()) / np.sqrt(mean.var() + 1e-6) * norm["scale"] + norm["bias"]
    np.testing.assert_allclose(tokens[0, 0], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("size", "options", "count"),
    [
        (32, {}, 16),
        (32, {"strides": (2, 2, 1)}, 64),
        (64, {}, 64),
        (28, {}, 16),
    ],
)
def test_cnn_token_count_follows_size_and_strides(size, options, count):
    encoder = ENCODERS["cnn"](width=WIDTH, **options)
    x = jax.ShapeDtypeStruct((2, size, size, 1), jnp.float32)
    mask = jax.ShapeDtypeStruct((2, 1), bool)
    (tokens, _), _ = jax.eval_shape(
        lambda x, m: encoder.init_with_output(jax.random.key(0), x, m, train=False), x, mask
    )
    assert tokens.shape == (2, count, WIDTH)


def test_log_mel_matches_its_formula():
    rate, frame, hop, fft, mels = 8000, 200, 80, 256, 20
    waveform = RANDOM.normal(size=(1, 1003)).astype(np.float32)
    out = log_mel(waveform, rate, mels=mels)
    assert out.shape == (1, 13, mels)  # ceil(1003 / 80)
    hertz = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 4000 / 700), mels + 2) / 2595) - 1)
    window = scipy.signal.get_window("hann", frame)
    padded = np.pad(waveform[0], (0, frame))
    for t in range(13):
        power = np.abs(np.fft.rfft(padded[t * hop : t * hop + frame] * window, fft)) ** 2
        for band in range(mels):
            triangle = np.interp(np.arange(fft // 2 + 1) * rate / fft, hertz[band : band + 3], [0.0, 1.0, 0.0])
            np.testing.assert_allclose(out[0, t, band], np.log(power @ triangle + 1e-6), rtol=1e-4, atol=1e-4)


def test_log_mel_rejects_frames_without_samples():
    with rejects("hop_ms", 10.0, says="rate=40"):
        log_mel(np.zeros((1, 40), np.float32), 40, mels=8, hop_ms=10.0)


def test_log_mel_of_a_tone_peaks_in_its_band():
    tone = np.sin(2 * np.pi * 1000.0 * np.arange(4000) / 8000)[None].astype(np.float32)
    band = np.asarray(log_mel(tone, 8000, mels=40)[0, 5:-5]).argmax(axis=-1)
    mel = 2595 * np.log10(1 + 1000 / 700)
    spacing = 2595 * np.log10(1 + 4000 / 700) / 41
    assert set(band) == {round(mel / spacing) - 1}


@pytest.mark.parametrize(
    ("name", "options", "data", "path", "value", "suggestion"),
    [
        ("cnn", {"channels": (4,), "strides": (1, 2)}, IMAGE, "cnn.strides", (1, 2), ""),
        ("cnn", {"norm": "x"}, IMAGE, "norm", "x", "layer"),
        ("resnet18", {"stem": "x"}, IMAGE, "resnet.stem", "x", "small"),
        ("resnet18", {"recurrent": "x"}, IMAGE, "recurrent", "x", "rows"),
        ("bow", {"vocabulary": 7, "tokens": "x"}, TEXT, "bow.tokens", "x", "mean"),
        ("rnn", {"vocabulary": 7, "cell": "x"}, TEXT, "rnn.cell", "x", "gru"),
        ("rnn", {"vocabulary": 7, "tokens": "x"}, TEXT, "rnn.tokens", "x", "last"),
        ("rnn", {"vocabulary": 7, "layers": 0}, TEXT, "rnn.layers", 0, ""),
        ("logmel_cnn", {"rate": RATE, "strides": (2,)}, AUDIO, "logmel_cnn.strides", (2,), ""),
    ],
)
def test_encoders_reject_invalid_options(name, options, data, path, value, suggestion):
    with rejects(path, value, suggestion):
        jax.eval_shape(lambda: ENCODERS[name](width=WIDTH, **options).init(jax.random.key(0), *data, train=False))


def test_spec_augment_masks_spans_in_training_only():
    module, rows, frames, bands = SpecAugment(frames=6, bands=3), 40, 30, 12
    features = np.ones((rows, frames, bands), np.float32)
    mask = np.arange(frames) < np.where(np.arange(rows) % 2, 30, 15)[:, None]

    def masked(keep, step=0):
        ids = {"rows": {"id": np.arange(rows)[keep]}}
        rngs = {"dropout": jax.random.key(step)}
        return np.asarray(module.apply(ids, features[keep], mask[keep], train=True, rngs=rngs))

    batch = masked(slice(None))
    np.testing.assert_array_equal(module.apply({}, features, mask, train=False), features)
    times, levels = (batch == 0).all(axis=2), (batch == 0).all(axis=1)
    assert ((batch == 0) == (times[:, :, None] | levels[:, None, :])).all()
    assert times.sum(1).max() <= 12 and levels.sum(1).max() <= 6  # two spans per axis
    assert times.sum(1).mean() == pytest.approx(5.3, abs=1.2)  # two spans of mean length 3, which may overlap
    assert not times[::2, 15:].any()  # padding frames of short rows are not masked
    assert times[1::2, 15:].any()
    np.testing.assert_array_equal(masked(slice(7, 9)), batch[7:9])  # depends on the row's id, not on the batch
    assert (masked(slice(None), step=1) != batch).any()


def test_cnn_rnn_attention_matches_additive_attention():
    x, mask = IMAGE
    module = ENCODERS["cnn_rnn"](width=WIDTH, channels=(4,), hidden=4, tokens="attention")
    variables = random_variables(module, x, mask, train=False)
    _, state = module.apply(variables, x, mask, train=False, capture_intermediates=True, mutable=["intermediates"])
    outputs, params = state["intermediates"], jax.tree.map(np.float64, variables["params"])
    steps = np.float64(outputs["scan0"]["__call__"][0])  # [B, T, hidden]
    keys = np.tanh(steps @ params["attend"]["kernel"] + params["attend"]["bias"])
    scores = np.exp(keys @ params["score"]["kernel"])
    pooled = (scores / scores.sum(axis=1, keepdims=True) * steps).sum(axis=1)
    expected = pooled @ params["project"]["kernel"] + params["project"]["bias"]
    np.testing.assert_allclose(outputs["project"]["__call__"][0][:, 0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("recurrent", "changed_steps"), [("rows", {2, 3}), ("cells", {10, 11, 12, 13, 14, 15})])
def test_positions_scans_a_feature_map_from_the_top_left(recurrent, changed_steps):
    """A change at row 2 and column 2 of a 4×4 map changes its own step and all later ones."""
    cells = np.random.default_rng(0).normal(size=(1, 4, 4, 3)).astype(np.float32)
    other = cells.copy()
    other[0, 2, 2] += 1
    module = Positions(WIDTH, recurrent)
    variables = random_variables(module, cells, np.ones(1, bool))
    original, changed = (module.apply(variables, x, np.ones(1, bool))[0][0] for x in (cells, other))
    assert {int(step) for step in np.flatnonzero((original != changed).any(axis=-1))} == changed_steps


M5 = 80 * 128 + 3 * (128 * 128 + 128 * 256 + 256 * 512) + 3 * (128 + 128 + 256 + 512)  # with biases, scales and shifts
C3D = {"channels": (64, 128, 256, 256, 512, 512, 512, 512), "strides": (1, 2, 2, 1, 2, 1, 2, 1)}
EXCLUDED = ("project", "norm", "offsets", "embed")


@pytest.mark.parametrize(
    ("name", "options", "shape", "excluded", "parameters"),
    [
        ("waveform_cnn", {}, (1, 8000), EXCLUDED, M5),  # M5's "half a million"
        ("gcn", {"hidden": (16,)}, (1, 10, 1433 + 10), ("norm",), 23_063),  # Cora's 1,433 words, 7 classes
        # The first layer on Cora.
        ("graph_attention", {"layers": 1, "heads": 8}, (1, 10, 1433 + 10), EXCLUDED, 1433 * 64 + 2 * 64),
        # Embeddings of size 300, 3 × 100 feature maps.
        ("textcnn", {"embedding": 300, "channels": 100}, (1, 10), EXCLUDED, 360_300),
        # "Permuted MNIST" of the paper's table 1 (70K), with the weight scales of its code: 8 blocks of 25 channels.
        ("tcn", {"channels": (25,) * 8, "kernel": 7}, (1, 784, 1), ("project", "norm"), 66_650),
        ("cnn3d", {**C3D, "time_strides": (1,) * 8, "norm": "none"}, (1, 16, 56, 56, 3), EXCLUDED, 27_655_936),  # C3D's
    ],
)
def test_encoder_parameter_count_matches_the_paper(name, options, shape, excluded, parameters):
    """Counts parameters at the paper's sizes, without token projections and word embeddings."""
    text = name == "textcnn"
    encoder = ENCODERS[name](width=7, **options, **({"vocabulary": 5} if text else {}))
    x = jnp.zeros(shape, int if text else float)
    mask = jnp.ones((1, 1) if name == "waveform_cnn" else shape[:2], bool)
    params = jax.eval_shape(lambda: encoder.init(jax.random.key(0), x, mask, train=False))["params"]
    assert sum(x.size for part in params if part not in excluded for x in jax.tree.leaves(params[part])) == parameters
