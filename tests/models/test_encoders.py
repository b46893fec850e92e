import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

from mmfusion.errors import UserError
from mmfusion.models.encoders import ENCODERS
from mmfusion.models.encoders.audio import SpecAugment, log_mel
from mmfusion.models.encoders.image import Positions
from tests.models.encoder_cases import AUDIO, CASES, IMAGE, RANDOM, RATE, TEXT, WIDTH, WORDS, make
from tests.models.random_variables import quick_jit, random_variables


def spoilt(x, mask):
    """Puts garbage where the mask is False: NaN, or a token id past the table."""
    mask = mask.reshape(*mask.shape[: 1 if x.ndim == 4 else 2], *[1] * (x.ndim - (1 if x.ndim == 4 else 2)))
    return np.where(mask, x, np.array(10**6 if x.dtype == np.int32 else np.nan, x.dtype))


def test_every_encoder_has_a_case():
    assert {name for name, *_ in CASES.values()} == set(ENCODERS)


# Deep ones whose layers another case has, too.
THOROUGH = {"resnet101", "vit_s", "inception_v3"}
MOST = [pytest.param(case, marks=pytest.mark.thorough if case in THOROUGH else ()) for case in CASES]


@pytest.mark.parametrize("case", MOST)
def test_contract(case):
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
    unused = {
        name
        for name, g in ((jax.tree_util.keystr(k), g) for k, g in jax.tree_util.tree_leaves_with_path(gradient))
        if not (np.abs(g).max() > 0 or name.endswith("['key']['bias']"))  # which has none, see `layers.Attention`
    }
    assert not unused, "parameters without gradient"

    # Tokens are normalised, where the last norm has its initial scale and bias.
    def undone(path, leaf):
        last = [part.key for part in path][-2:]
        return np.full(leaf.shape, float(last[1] == "scale"), np.float32) if last[0] == "norm" else leaf

    normal = step(jax.tree_util.tree_map_with_path(undone, variables["params"]), x, mask)[1][0][real]
    np.testing.assert_allclose(normal.mean(axis=-1), 0.0, atol=1e-5)
    np.testing.assert_allclose(normal.std(axis=-1), 1.0, atol=1e-2)

    # Padding has no influence, whatever it holds.
    again = step(variables["params"], spoilt(x, mask), mask)
    jax.tree.map(np.testing.assert_array_equal, again, (gradient, (tokens, real)))

    # Nor has an absent row: the others' tokens and every gradient are those of the batch without it.
    without = mask & np.array([[True], [False], [True]])
    gradient, (tokens, real) = step(variables["params"], spoilt(x, without), without)
    kept = np.array([0, 0, 2])
    filled = step(variables["params"], x[kept], without)
    jax.tree.map(np.testing.assert_array_equal, (gradient, tokens, real), (filled[0], *filled[1]))
    np.testing.assert_array_equal(tokens[1], 0.0)
    assert not real[1].any()

    gradient, (tokens, real) = step(variables["params"], np.full_like(x, spoilt(x, mask & False).flat[0]), mask & False)
    np.testing.assert_array_equal(tokens, 0.0)
    assert not real.any()
    assert all((g == 0).all() for g in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    "case",
    [
        "cnn-batch",
        "bow-mean",
        *(pytest.param(case, marks=pytest.mark.thorough) for case in ("rnn-lstm", "logmel_cnn-layer")),
    ],
)
def test_jit_is_eager_and_evaluation_returns_the_same_types(case):
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


LONGER = ["rnn-lstm", "rnn-last", "textcnn-all", "transformer", "bert-all", "logmel_cnn-layer", "logmel_cnn-group"]


@pytest.mark.parametrize("case", [*LONGER, "waveform_cnn", "ast"])
def test_a_longer_padding_changes_no_token(case):
    name, options, (x, mask), _ = CASES[case]
    encoder = ENCODERS[name](width=WIDTH, **options)
    variables = random_variables(encoder, x, mask, train=False)
    apply = quick_jit(lambda x, mask: encoder.apply(variables, x, mask, train=False))
    short, short_mask = apply(x, mask)
    more = ((0, 0), (0, 37))
    long, long_mask = apply(np.pad(x, more), np.pad(mask, more))
    np.testing.assert_allclose(long[:, : short.shape[1]], short, atol=1e-5)
    np.testing.assert_array_equal(long_mask.sum(axis=1), short_mask.sum(axis=1))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_rnn_reads_forward_and_backward_where_asked(bidirectional):
    encoder = ENCODERS["rnn"](width=WIDTH, vocabulary=7, embedding=4, hidden=4, bidirectional=bidirectional)
    variables = random_variables(encoder, *TEXT, train=False)
    apply = quick_jit(lambda x: encoder.apply(variables, x, TEXT[1], train=False)[0])
    other = WORDS.copy()
    other[0, 2], other[1, 2] = 6, 6
    changed = np.abs(apply(WORDS) - apply(other)).max(axis=-1) > 0
    before = bidirectional
    np.testing.assert_array_equal(changed[0], [before, before, True, True, False, False])
    np.testing.assert_array_equal(changed[1], [before, before, True, True, True, True])
    assert not changed[2].any()


def test_rnn_last_is_the_last_real_position():
    options = {"vocabulary": 7, "embedding": 4, "hidden": 4}
    encoders = [ENCODERS["rnn"](width=WIDTH, tokens=tokens, **options) for tokens in ("all", "last")]
    variables = random_variables(encoders[0], *TEXT, train=False)
    (every, _), (last, _) = (encoder.apply(variables, *TEXT, train=False) for encoder in encoders)
    np.testing.assert_allclose(last[:, 0], every[np.arange(3), [3, 5, 0]], atol=1e-6)


def test_bow_is_the_mean_embedding_normalised():
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
def test_cnn_token_counts(size, options, count):
    encoder = ENCODERS["cnn"](width=WIDTH, **options)
    x = jax.ShapeDtypeStruct((2, size, size, 1), jnp.float32)
    mask = jax.ShapeDtypeStruct((2, 1), bool)
    (tokens, _), _ = jax.eval_shape(
        lambda x, m: encoder.init_with_output(jax.random.key(0), x, m, train=False), x, mask
    )
    assert tokens.shape == (2, count, WIDTH)


def test_log_mel_is_the_written_formula():
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


def test_frames_have_samples():
    with pytest.raises(UserError, match="is shorter than a sample at rate=40"):
        log_mel(np.zeros((1, 40), np.float32), 40, mels=8, hop_ms=10.0)


def test_log_mel_puts_a_tone_in_its_band():
    tone = np.sin(2 * np.pi * 1000.0 * np.arange(4000) / 8000)[None].astype(np.float32)
    band = np.asarray(log_mel(tone, 8000, mels=40)[0, 5:-5]).argmax(axis=-1)
    mel = 2595 * np.log10(1 + 1000 / 700)
    spacing = 2595 * np.log10(1 + 4000 / 700) / 41
    assert set(band) == {round(mel / spacing) - 1}


@pytest.mark.parametrize(
    ("name", "options", "data", "said"),
    [
        ("cnn", {"channels": (4,)}, IMAGE, "same length"),
        ("cnn", {"norm": "x"}, IMAGE, "norm"),
        ("resnet18", {"stem": "x"}, IMAGE, "stem"),
        ("resnet18", {"recurrent": "x"}, IMAGE, "rows, cells or none"),
        ("bow", {"vocabulary": 7, "tokens": "x"}, TEXT, "tokens"),
        ("rnn", {"vocabulary": 7, "cell": "x"}, TEXT, "vanilla, gru, lstm"),
        ("rnn", {"vocabulary": 7, "tokens": "x"}, TEXT, "tokens"),
        ("rnn", {"vocabulary": 7, "layers": 0}, TEXT, "layers"),
        ("logmel_cnn", {"rate": RATE, "strides": (2,)}, AUDIO, "length"),
    ],
)
def test_wrong_options_are_the_users_errors(name, options, data, said):
    with pytest.raises(UserError, match=said):
        jax.eval_shape(lambda: ENCODERS[name](width=WIDTH, **options).init(jax.random.key(0), *data, train=False))


def test_spans_of_a_spectrogram_are_masked_in_training_only():
    module, rows, frames, bands = SpecAugment(frames=6, bands=3), 40, 30, 12
    features = np.ones((rows, frames, bands), np.float32)
    mask = np.arange(frames) < np.where(np.arange(rows) % 2, 30, 15)[:, None]

    def masked(keep, step=0):
        ids = {"rows": {"id": np.arange(rows)[keep]}}
        rngs = {"dropout": jax.random.key(step)}
        return np.asarray(module.apply(ids, features[keep], mask[keep], train=True, rngs=rngs))

    whole = masked(slice(None))
    np.testing.assert_array_equal(module.apply({}, features, mask, train=False), features)
    times, levels = (whole == 0).all(axis=2), (whole == 0).all(axis=1)
    assert ((whole == 0) == (times[:, :, None] | levels[:, None, :])).all()
    assert times.sum(1).max() <= 12 and levels.sum(1).max() <= 6  # two spans of each
    assert times.sum(1).mean() == pytest.approx(5.3, abs=1.2)  # two of 3 on average, which may meet
    assert not times[::2, 15:].any()  # of a short row only what is real
    assert times[1::2, 15:].any()
    np.testing.assert_array_equal(masked(slice(7, 9)), whole[7:9])  # by its own id, whatever is beside it
    assert (masked(slice(None), step=1) != whole).any()


def test_a_maps_steps_are_weighed_by_additive_attention():
    x, mask = IMAGE
    module = ENCODERS["cnn_rnn"](width=WIDTH, channels=(4,), hidden=4, tokens="attention")
    variables = random_variables(module, x, mask, train=False)
    _, seen = module.apply(variables, x, mask, train=False, capture_intermediates=True, mutable=["intermediates"])
    seen, params = seen["intermediates"], jax.tree.map(np.float64, variables["params"])
    steps = np.float64(seen["scan0"]["__call__"][0])  # [B, T, hidden]
    keys = np.tanh(steps @ params["attend"]["kernel"] + params["attend"]["bias"])
    scores = np.exp(keys @ params["score"]["kernel"])
    pooled = (scores / scores.sum(axis=1, keepdims=True) * steps).sum(axis=1)
    expected = pooled @ params["project"]["kernel"] + params["project"]["bias"]
    np.testing.assert_allclose(seen["project"]["__call__"][0][:, 0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("recurrent", "after"), [("rows", {2, 3}), ("cells", {10, 11, 12, 13, 14, 15})])
def test_a_map_is_read_from_the_top_left(recurrent, after):
    """A change in the cell of row 2 and column 2 of a map of 4×4 is seen from its step on."""
    cells = np.random.default_rng(0).normal(size=(1, 4, 4, 3)).astype(np.float32)
    other = cells.copy()
    other[0, 2, 2] += 1
    module = Positions(WIDTH, recurrent)
    variables = random_variables(module, cells, np.ones(1, bool))
    one, two = (module.apply(variables, x, np.ones(1, bool))[0][0] for x in (cells, other))
    assert {int(step) for step in np.flatnonzero((one != two).any(axis=-1))} == after


M5 = 80 * 128 + 3 * (128 * 128 + 128 * 256 + 256 * 512) + 3 * (128 + 128 + 256 + 512)  # with bias, scale, shift
C3D = {"channels": (64, 128, 256, 256, 512, 512, 512, 512), "strides": (1, 2, 2, 1, 2, 1, 2, 1)}
APART = ("project", "norm", "offsets", "embed")


@pytest.mark.parametrize(
    ("name", "options", "shape", "but", "parameters"),
    [
        ("waveform_cnn", {}, (1, 8000), APART, M5),  # M5's "half a million"
        ("gcn", {"hidden": (16,)}, (1, 10, 1433 + 10), ("norm",), 23_063),  # Cora's 1,433 words, 7 classes
        ("graph_attention", {"layers": 1, "heads": 8}, (1, 10, 1433 + 10), APART, 1433 * 64 + 2 * 64),  # first on Cora
        ("textcnn", {"embedding": 300, "channels": 100}, (1, 10), APART, 360_300),  # words of 300, 3 × 100 maps
        ("cnn3d", {**C3D, "time_strides": (1,) * 8, "norm": "none"}, (1, 16, 56, 56, 3), APART, 27_655_936),  # C3D's
    ],
)
def test_has_as_many_parameters_as_its_paper(name, options, shape, but, parameters):
    """Of the sizes that the paper gives, without what makes tokens and without the embeddings of words."""
    text = name == "textcnn"
    encoder = ENCODERS[name](width=7, **options, **({"vocabulary": 5} if text else {}))
    x = jnp.zeros(shape, int if text else float)
    mask = jnp.ones((1, 1) if name == "waveform_cnn" else shape[:2], bool)
    params = jax.eval_shape(lambda: encoder.init(jax.random.key(0), x, mask, train=False))["params"]
    assert sum(x.size for part in params if part not in but for x in jax.tree.leaves(params[part])) == parameters
