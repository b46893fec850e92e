"""Generated data: each signal shows its class to whoever knows how, and each modality is silent in its share."""

import dataclasses
import importlib

import numpy as np
import pytest

from mmfusion.data import image, knowledge
from mmfusion.data.builders import generate
from mmfusion.data.builders.stand_ins import signals
from mmfusion.data.builders.stand_ins import stand_ins_dataset_builder as stand_ins
from tests.data.prepare import prepare, rows
from tests.processes import ROOT

WORDS = ("shoes", "books", "games", "music", "plants")


def source(number):
    return np.random.default_rng(number)


@pytest.fixture
def small_stand_ins(monkeypatch):
    small = {name: dataclasses.replace(one, sizes=(40, 20)) for name, one in stand_ins.VARIANTS.items()}
    monkeypatch.setattr(stand_ins, "VARIANTS", small)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("shown", range(4))
def test_a_picture_is_hatched_at_its_angle(shown, channels):
    pixels = signals.picture(shown, 4, source(shown), size=64, channels=channels)
    assert (pixels.shape, pixels.dtype) == ((64, 64, channels), np.uint8)
    middle = pixels.mean(axis=2)[20:44, 20:44]
    power = np.abs(np.fft.fft2(middle - middle.mean(), (128, 128))) ** 2
    y, x = np.unravel_index(np.argmax(power[:, :64]), (128, 64))
    angle = np.arctan2(y - 128 * (y >= 64), x) % np.pi
    off = (angle - np.pi * shown / 4 + np.pi / 2) % np.pi - np.pi / 2
    assert abs(off) < np.pi / 8


@pytest.mark.parametrize("shown", range(4))
def test_a_film_moves_in_its_direction(shown):
    frames = signals.film(shown, 4, source(shown), size=24, frames=8)
    assert (frames.shape, frames.dtype) == ((8, 24, 24, 1), np.uint8)
    bright = np.where(frames[..., 0] > 130, 1.0, 0.0)
    y, x = ((bright * axis).sum((1, 2)) / bright.sum((1, 2)) for axis in np.mgrid[:24, :24])
    angle = np.arctan2(y[-1] - y[0], x[-1] - x[0])
    assert abs((angle - np.pi / 2 * shown + np.pi) % (2 * np.pi) - np.pi) < np.pi / 4
    name = stand_ins.VARIANTS["surveillance"].classes[shown]
    assert {"right": x[-1] > x[0] + 4, "left": x[-1] < x[0] - 4, "down": y[-1] > y[0] + 4, "up": y[-1] < y[0] - 4}[name]


@pytest.mark.parametrize(("shown", "rate"), [(0, 8000), (3, 8000), (5, 44100)])
def test_a_sound_has_its_pitch(shown, rate):
    waveform = signals.sound(shown, 6, source(shown), rate=rate)
    assert (waveform.shape, waveform.dtype) == ((rate,), np.int16)
    pitch = np.argmax(np.abs(np.fft.rfft(waveform.astype(float))))  # of one second: Hz
    assert abs(6 * np.log(pitch / 200) / np.log(8) - shown) < 0.25


def test_sentences_and_events_tell_their_word():
    for number in range(50):
        shown = number % len(WORDS)
        said = signals.sentence(shown, WORDS, source(number)).split()
        assert set(said) & set(WORDS) == {WORDS[shown]}
        assert 8 <= len(said) <= 12
        told = signals.events(shown, WORDS, source(number))
        pairs = list(zip(told.split()[::2], told.split()[1::2], strict=True))
        assert len(pairs) == 10
        seen, bought = ({thing for verb, thing in pairs if verb == said} for said in ("see", "buy"))
        assert seen & bought == {WORDS[shown]}
        assert pairs.index(("see", WORDS[shown])) < pairs.index(("buy", WORDS[shown]))
        assert len(seen) == len(bought) == 2  # neither alone tells


def test_who_shows_nothing_shows_nothing():
    for number in range(20):
        rough = [
            signals.picture(shown, 4, source(number), size=64, channels=1)[16:48, 16:48]
            .reshape(8, 4, 8, 4)
            .mean((1, 3))
            for shown in (None, 2)
        ]
        assert rough[0].std() < 0.6 * rough[1].std()
        assert (signals.film(None, 4, source(number), size=24, frames=8) > 160).mean() < 1e-3
        assert signals.sound(None, 6, source(number), rate=8000).std() < 0.11 * 32767
        assert not set(signals.sentence(None, WORDS, source(number)).split()) & set(WORDS)
        told = signals.events(None, WORDS, source(number)).split()
        pairs = list(zip(told[::2], told[1::2], strict=True))
        seen, bought = ({thing for verb, thing in pairs if verb == said} for said in ("see", "buy"))
        assert len(seen) == len(bought) == 2 and not seen & bought


@pytest.mark.parametrize("name", stand_ins.VARIANTS)
def test_each_modality_is_silent_by_itself(name):
    variant, shown, count = stand_ins.VARIANTS[name], {}, 6000
    told = {
        m: dataclasses.replace(signal, draw=lambda cls, *_, m=m: shown.setdefault(m, []).append(cls))
        for m, signal in variant.signals.items()
    }
    variant, draw = dataclasses.replace(variant, signals=told), source(0)
    drawn = [stand_ins.draw_example(variant, number, "train", draw) for number in range(count)]
    labels = [one["label"] for one in drawn]
    assert np.ptp(np.bincount(labels, minlength=len(variant.classes))) <= 1
    silent = np.array([[one is None for one in shown[m]] for m in variant.signals])
    np.testing.assert_array_equal([one["shown"] for one in drawn], (~silent).sum(axis=0))
    asked = [signal.silent for signal in variant.signals.values()]
    np.testing.assert_allclose(silent.mean(axis=1), asked, atol=0.03)
    assert np.abs(np.corrcoef(silent) - np.eye(len(silent))).max() < 0.06
    for m in variant.signals:
        assert all(one in (None, label) for one, label in zip(shown[m], labels, strict=True))


def test_it_prepares_the_same_each_time(small_stand_ins, tmp_path):
    both = [list(rows(prepare("stand_ins/medical_notes", tmp_path / folder), "train")) for folder in ("a", "b")]
    assert len(both[0]) == 40
    for one, other in zip(*both, strict=True):
        assert one["notes"] == other["notes"] and one["label"] == other["label"]
        np.testing.assert_array_equal(one["image"], other["image"])
    test = list(rows(prepare("stand_ins/medical_notes", tmp_path / "a"), "test"))
    assert not {row["notes"] for row in test} & {row["notes"] for row in both[0]}
    assert len({row["image"].tobytes() for row in (*test, *both[0])}) == 60


def test_test_names_creatures_that_train_does_not():
    variant, draw = stand_ins.VARIANTS["creatures"], source(0)
    every = {name for names in stand_ins.CREATURES.values() for name in names}
    named = {
        split: {
            word for i in range(2000) for word in stand_ins.draw_example(variant, i, split, draw)["text"].split()
        } & every
        for split in ("train", "test")
    }  # fmt: skip
    assert (len(named["train"]), len(named["test"])) == (40, 20)
    assert not named["train"] & named["test"]
    graph = knowledge.from_triples(str(ROOT / "configs" / "animals.tsv"))
    triples = {(graph.entities[h], graph.relations[r], graph.entities[t]) for h, r, t in graph.triples}
    for family, names in stand_ins.CREATURES.items():
        assert all((name, "is a", family) in triples for name in names)


def test_png_keeps_every_number_of_channels():
    for shape in ((5, 6), (5, 6, 1), (5, 6, 3), (5, 6, 4)):
        pixels = source(1).integers(0, 256, shape, np.uint8)
        channels = shape[2] if len(shape) == 3 else 1
        np.testing.assert_array_equal(
            image.decode(generate.png(pixels), (5, 6), channels), pixels.reshape(5, 6, channels)
        )


def test_the_readme_says_what_is_possible():
    """Where every modality is silent at once only a guess is left: that is the table's column "at most"."""
    table = [line.split("|")[1:-1] for line in (ROOT / "README.md").read_text().splitlines() if line.count("|") == 10]
    said = {row[2].strip().strip("`"): row[6].strip() for row in table if row[6].strip().startswith("0.")}
    assert len(said) >= 8
    for command, most in said.items():
        file, _, arg = command.partition(":")
        config = importlib.import_module(f"configs.{file.removesuffix('.py')}").get_config(arg)
        variant = stand_ins.VARIANTS[config.data.name.removeprefix("stand_ins/")]
        seen = {options.feature for options in config.data.modalities.values()}
        guess = np.prod([signal.silent for name, signal in variant.signals.items() if name in seen])
        possible = 1 - guess * (1 - 1 / len(variant.classes))
        assert most == f"{possible:.{len(most) - 2}f}", command
