"""Generated data: each signal carries its label, and each modality is uninformative at its rate."""

import dataclasses
import hashlib
import importlib
import io
import itertools

import numpy as np
import pytest

from mmfusion.data import image, knowledge, sources
from mmfusion.data.builders import generate
from mmfusion.data.builders.synthetic import signals
from mmfusion.data.builders.synthetic import synthetic_dataset_builder as synthetic
from mmfusion.errors import warn_renamed
from tests.data.prepare import prepare, rows
from tests.processes import ROOT

WORDS = ("shoes", "books", "games", "music", "plants")


def rng(seed):
    return np.random.default_rng(seed)


@pytest.fixture
def small_synthetic(monkeypatch):
    small = {name: dataclasses.replace(variant, sizes=(40, 20)) for name, variant in synthetic.VARIANTS.items()}
    monkeypatch.setattr(synthetic, "VARIANTS", small)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("label", range(4))
def test_synthetic_images_are_hatched_at_the_labels_angle(label, channels):
    pixels = signals.image(label, 4, rng(label), size=64, channels=channels)
    assert (pixels.shape, pixels.dtype) == ((64, 64, channels), np.uint8)
    middle = pixels.mean(axis=2)[20:44, 20:44]
    power = np.abs(np.fft.fft2(middle - middle.mean(), (128, 128))) ** 2
    y, x = np.unravel_index(np.argmax(power[:, :64]), (128, 64))
    angle = np.arctan2(y - 128 * (y >= 64), x) % np.pi
    deviation = (angle - np.pi * label / 4 + np.pi / 2) % np.pi - np.pi / 2
    assert abs(deviation) < np.pi / 8


@pytest.mark.parametrize("label", range(4))
def test_synthetic_videos_move_in_the_labels_direction(label):
    frames = signals.video(label, 4, rng(label), size=24, frames=8)
    assert (frames.shape, frames.dtype) == ((8, 24, 24, 1), np.uint8)
    bright = np.where(frames[..., 0] > 130, 1.0, 0.0)
    y, x = ((bright * axis).sum((1, 2)) / bright.sum((1, 2)) for axis in np.mgrid[:24, :24])
    angle = np.arctan2(y[-1] - y[0], x[-1] - x[0])
    assert abs((angle - np.pi / 2 * label + np.pi) % (2 * np.pi) - np.pi) < np.pi / 4
    name = synthetic.VARIANTS["surveillance"].classes[label]
    assert {"right": x[-1] > x[0] + 4, "left": x[-1] < x[0] - 4, "down": y[-1] > y[0] + 4, "up": y[-1] < y[0] - 4}[name]


@pytest.mark.parametrize(("label", "rate"), [(0, 8000), (3, 8000), (5, 44100)])
def test_synthetic_audio_has_the_labels_pitch(label, rate):
    waveform = signals.audio(label, 6, rng(label), rate=rate)
    assert (waveform.shape, waveform.dtype) == ((rate,), np.int16)
    # The bin is in Hz, because the audio lasts one second.
    pitch = np.argmax(np.abs(np.fft.rfft(waveform.astype(float))))
    assert abs(6 * np.log(pitch / 200) / np.log(8) - label) < 0.25


def test_synthetic_sentences_and_events_contain_the_labels_word():
    for seed in range(50):
        label = seed % len(WORDS)
        words = signals.sentence(label, WORDS, rng(seed)).split()
        assert set(words) & set(WORDS) == {WORDS[label]}
        assert 8 <= len(words) <= 12
        history = signals.events(label, WORDS, rng(seed)).split()
        pairs = list(zip(history[::2], history[1::2], strict=True))
        assert len(pairs) == 10
        seen, bought = ({item for verb, item in pairs if verb == kind} for kind in ("see", "buy"))
        assert seen & bought == {WORDS[label]}
        assert pairs.index(("see", WORDS[label])) < pairs.index(("buy", WORDS[label]))
        assert len(seen) == len(bought) == 2  # neither verb alone determines the label


def test_synthetic_signals_without_a_label_are_uninformative():
    for seed in range(20):
        coarse = [
            signals.image(label, 4, rng(seed), size=64, channels=1)[16:48, 16:48].reshape(8, 4, 8, 4).mean((1, 3))
            for label in (None, 2)
        ]
        assert coarse[0].std() < 0.6 * coarse[1].std()
        assert (signals.video(None, 4, rng(seed), size=24, frames=8) > 160).mean() < 1e-3
        assert signals.audio(None, 6, rng(seed), rate=8000).std() < 0.11 * 32767
        assert not set(signals.sentence(None, WORDS, rng(seed)).split()) & set(WORDS)
        history = signals.events(None, WORDS, rng(seed)).split()
        pairs = list(zip(history[::2], history[1::2], strict=True))
        seen, bought = ({item for verb, item in pairs if verb == kind} for kind in ("see", "buy"))
        assert len(seen) == len(bought) == 2 and not seen & bought


@pytest.mark.parametrize("name", synthetic.VARIANTS)
def test_synthetic_modalities_are_uninformative_independently(name):
    variant, signal_labels, count = synthetic.VARIANTS[name], {}, 6000
    recording = {
        m: dataclasses.replace(signal, draw=lambda label, *_, m=m: signal_labels.setdefault(m, []).append(label))
        for m, signal in variant.signals.items()
    }
    variant, random = dataclasses.replace(variant, signals=recording), rng(0)
    examples = [synthetic.draw_example(variant, number, "train", random) for number in range(count)]
    labels = [example["label"] for example in examples]
    assert np.ptp(np.bincount(labels, minlength=len(variant.classes))) <= 1
    uninformative = np.array([[label is None for label in signal_labels[m]] for m in variant.signals])
    np.testing.assert_array_equal([example["num_informative"] for example in examples], (~uninformative).sum(axis=0))
    rates = [signal.uninformative_rate for signal in variant.signals.values()]
    np.testing.assert_allclose(uninformative.mean(axis=1), rates, atol=0.03)
    assert np.abs(np.corrcoef(uninformative) - np.eye(len(uninformative))).max() < 0.06
    for m in variant.signals:
        assert all(signal_label in (None, label) for signal_label, label in zip(signal_labels[m], labels, strict=True))


# SHA-256 of the first two test examples, computed before the dataset and two variants were renamed.
DIGESTS = {
    "xray_ct": "6f3c54a5c9b1b8f1",
    "medical_notes": "95ad433cd735cda9",
    "surveillance": "256763c7b51170f4",
    "recommendation": "295ac981bdac0725",
    "interaction": "907ddaa5968c9d39",
    "three_images": "5ce8820a60fcc543",
    "creatures": "3552e440084e47aa",
    "audio_images": "38b82cf39c1f48bc",
}


def as_bytes(value):
    if isinstance(value, io.BytesIO):
        return value.getvalue()
    return value.tobytes() if isinstance(value, np.ndarray) else str(value).encode()


@pytest.mark.parametrize("name", synthetic.VARIANTS)
def test_synthetic_examples_did_not_change_with_the_renaming(name, tmp_path):
    builder = synthetic.Builder(config=name, data_dir=str(tmp_path))
    digest = hashlib.sha256()
    for _, example in itertools.islice(builder._generate_examples("test", 2), 2):
        for value in example.values():
            digest.update(as_bytes(value))
    assert digest.hexdigest()[:16] == DIGESTS[name]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("stand_ins/xray_ct", "synthetic/xray_ct"),
        ("stand_ins/three_pictures", "synthetic/three_images"),
        ("stand_ins/sound_pictures", "synthetic/audio_images"),
    ],
)
def test_renamed_datasets_work_with_a_warning(old, new, small_synthetic, tmp_path, capsys):
    warn_renamed.cache_clear()
    sources.check_name(old, str(tmp_path))
    opened = [sources.open_source(name, "test", data_dir=str(tmp_path), manual_dir="", seed=0) for name in (old, new)]
    assert capsys.readouterr().err == f"warning: dataset {old} is now called {new}\n"
    assert opened[0].version == opened[1].version and len(opened[0].rows) == 20


def test_synthetic_preparation_is_deterministic(small_synthetic, tmp_path):
    both = [list(rows(prepare("synthetic/medical_notes", tmp_path / folder), "train")) for folder in ("a", "b")]
    assert len(both[0]) == 40
    for one, other in zip(*both, strict=True):
        assert one["notes"] == other["notes"] and one["label"] == other["label"]
        np.testing.assert_array_equal(one["image"], other["image"])
    test = list(rows(prepare("synthetic/medical_notes", tmp_path / "a"), "test"))
    assert not {row["notes"] for row in test} & {row["notes"] for row in both[0]}
    assert len({row["image"].tobytes() for row in (*test, *both[0])}) == 60


def test_synthetic_creatures_of_test_do_not_occur_in_train():
    variant, random = synthetic.VARIANTS["creatures"], rng(0)
    creatures = {name for names in synthetic.CREATURES.values() for name in names}
    named = {
        split: {
            word for i in range(2000) for word in synthetic.draw_example(variant, i, split, random)["text"].split()
        } & creatures
        for split in ("train", "test")
    }  # fmt: skip
    assert (len(named["train"]), len(named["test"])) == (40, 20)
    assert not named["train"] & named["test"]
    graph = knowledge.from_triples(str(ROOT / "configs" / "animals.tsv"))
    triples = {(graph.entities[h], graph.relations[r], graph.entities[t]) for h, r, t in graph.triples}
    for family, names in synthetic.CREATURES.items():
        assert all((name, "is a", family) in triples for name in names)


def test_png_encoding_keeps_the_number_of_channels():
    for shape in ((5, 6), (5, 6, 1), (5, 6, 3), (5, 6, 4)):
        pixels = rng(1).integers(0, 256, shape, np.uint8)
        channels = shape[2] if len(shape) == 3 else 1
        np.testing.assert_array_equal(
            image.decode(generate.png(pixels), (5, 6), channels), pixels.reshape(5, 6, channels)
        )


def test_articles_table_gives_the_best_possible_accuracy():
    """The column "at most" assumes chance level where every modality is uninformative."""
    table = [
        line.split("|")[1:-1]
        for line in (ROOT / "experiments" / "results" / "ARTICLES.md").read_text().splitlines()
        if line.count("|") == 10
    ]
    documented = {row[2].strip().strip("`"): row[6].strip() for row in table if row[6].strip().startswith("0.")}
    assert len(documented) >= 8
    for command, at_most in documented.items():
        file, _, arg = command.partition(":")
        config = importlib.import_module(f"configs.{file.removesuffix('.py')}").get_config(arg)
        variant = synthetic.VARIANTS[config.data.name.removeprefix("synthetic/")]
        features = {options.feature for options in config.data.modalities.values()}
        all_uninformative = np.prod(
            [signal.uninformative_rate for name, signal in variant.signals.items() if name in features]
        )
        possible = 1 - all_uninformative * (1 - 1 / len(variant.classes))
        assert at_most == f"{possible:.{len(at_most) - 2}f}", command
