import io
import json
import os
import pathlib
import wave
from collections import Counter

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from mmfusion.data import builders
from mmfusion.data.builders import archives
from mmfusion.data.builders.av_digits import av_digits_dataset_builder as av_digits
from mmfusion.data.builders.av_digits import degrade
from mmfusion.data.builders.easy_vqa import easy_vqa_dataset_builder as easy_vqa
from mmfusion.data.builders.generate import png
from tests.data.prepare import as_known_archive, prepare, rows, write_zip
from tests.errors import rejects

DATA = pathlib.Path(os.environ.get("MMFUSION_DATA", pathlib.Path(__file__).parents[3] / "shared" / "data"))
SPLITS = ("train", "test")


def require_archives(*required: archives.Archive) -> pathlib.Path:
    for archive in required:
        if not (DATA / archive.filename).exists():
            fail_or_skip = pytest.fail if os.environ.get("CI") else pytest.skip  # CI has the data
            fail_or_skip(f"{archive.filename} is not in {DATA} (set MMFUSION_DATA)")
    return DATA


def remaining_files(data_dir) -> list[str]:
    """Returns the record files and incomplete directories under a data directory."""
    return [str(p) for p in pathlib.Path(data_dir).rglob("*") if "incomplete" in p.name or "array_record" in p.name]


@pytest.fixture
def small_easy_vqa(tmp_path, monkeypatch):
    members = {"easy_vqa/data/answers.txt": "\n".join(easy_vqa.ANSWERS).encode()}
    for split, n in (("train", 6), ("test", 3)):
        questions = [[f"is this {i}?", ("yes", "no", "red")[i % 3], i // 2] for i in range(n)]
        members[f"easy_vqa/data/{split}/questions.json"] = json.dumps(questions).encode()
        for i in range(3):
            members[f"easy_vqa/data/{split}/images/{i}.png"] = png(np.full((64, 64, 3), 50 * i, np.uint8))
    path = tmp_path / "manual" / easy_vqa.ARCHIVE.filename
    path.parent.mkdir()
    write_zip(path, members)
    monkeypatch.setattr(easy_vqa, "QUESTIONS", {"train": 6, "test": 3})
    monkeypatch.setattr(easy_vqa, "ARCHIVE", as_known_archive(path, members=easy_vqa.ARCHIVE.members))
    return path


def test_easy_vqa_prepares_a_small_archive(small_easy_vqa, tmp_path):
    builder = prepare("easy_vqa", tmp_path / "data", small_easy_vqa.parent)
    read = sorted(rows(builder, "train"), key=lambda row: row["id"])
    assert [row["question"] for row in read] == [f"is this {i}?".encode() for i in range(6)]
    assert [easy_vqa.ANSWERS[row["label"]] for row in read] == ["yes", "no", "red"] * 2
    assert [row["group"] for row in read] == [b"train-0", b"train-0", b"train-1", b"train-1", b"train-2", b"train-2"]
    assert [row["image"][0, 0, 0] for row in read] == [0, 0, 50, 50, 100, 100]


def test_easy_vqa_rejects_wrong_counts_and_answers(small_easy_vqa, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(easy_vqa, "QUESTIONS", {"train": 7, "test": 3})
        with rejects(small_easy_vqa, says="6 train questions, expected 7"):
            prepare("easy_vqa", tmp_path / "data", small_easy_vqa.parent)
    monkeypatch.setattr(easy_vqa, "ANSWERS", easy_vqa.ANSWERS[:-1])
    with rejects(small_easy_vqa, says="answers.txt"):
        prepare("easy_vqa", tmp_path / "data", small_easy_vqa.parent)


def test_failed_preparation_leaves_no_dataset(small_easy_vqa, tmp_path, monkeypatch):
    generate, data = easy_vqa.Builder._generate_examples, tmp_path / "data"

    def disk_full(self, split, *rest):
        yield from generate(self, split, *rest)
        if split == "test":
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(easy_vqa.Builder, "_generate_examples", disk_full)
        with pytest.raises(OSError, match="No space left"):
            prepare("easy_vqa", data, small_easy_vqa.parent)
    assert remaining_files(data) == []
    assert not tfds.builder("easy_vqa", data_dir=data).is_prepared()
    # After a kill the temporary directory remains but is not a dataset.
    (data / "easy_vqa" / "incomplete.ABCDEF_1.0.0").mkdir(parents=True)
    assert not tfds.builder("easy_vqa", data_dir=data).is_prepared()
    assert len(rows(prepare("easy_vqa", data, small_easy_vqa.parent), "test")) == 3


def test_preparation_fails_on_a_corrupt_member(small_easy_vqa, tmp_path):
    data = bytearray(small_easy_vqa.read_bytes())
    data[data.index(b"is this 3?")] ^= 1
    small_easy_vqa.write_bytes(data)
    with rejects(small_easy_vqa, says="easy_vqa/data/train/questions.json is corrupt"):
        prepare("easy_vqa", tmp_path / "data", small_easy_vqa.parent)
    assert remaining_files(tmp_path / "data") == []


def wav(samples: np.ndarray, rate: int = 8_000) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return buffer.getvalue()


@pytest.fixture
def small_av_digits(tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    folder = tmp_path / "manual"
    folder.mkdir()
    audio = {
        f"recordings/{digit}_ann_{i}.wav": wav(random.integers(-9000, 9000, 200 + 10 * digit + i))
        for digit in range(10)
        for i in range(7)
    }
    images = {
        f"{split}/{digit}/{1000 * (split == 'test') + 100 * digit + i}.png": png(
            random.integers(0, 256, (28, 28)).astype(np.uint8)
        )
        for split, n in (("train", 4), ("test", 5))
        for digit in range(10)
        for i in range(n)
    }
    for name, members in (("RECORDINGS", audio), ("IMAGES", images)):
        path = folder / getattr(av_digits, name).filename
        write_zip(path, members)
        monkeypatch.setattr(av_digits, name, as_known_archive(path, members=getattr(av_digits, name).members))
    monkeypatch.setattr(av_digits, "IMAGES_PER_RECORDING", {"train": 2, "test": 1})
    return folder, audio, images


@pytest.mark.parametrize("variant", ["clean", "hard"])
def test_av_digits_prepares_a_small_archive(variant, small_av_digits, tmp_path):
    folder, audio, images = small_av_digits
    builder = prepare(f"av_digits/{variant}", tmp_path / "data", folder)
    read = {split: rows(builder, split) for split in SPLITS}
    assert {split: len(r) for split, r in read.items()} == {"train": 40, "test": 50}
    for split in SPLITS:
        for row in read[split]:
            recording, _, number = row["id"].decode().rpartition("-")
            digit = row["label"]
            assert row["group"].decode() == recording and recording.startswith(f"{digit}_")
            original = av_digits.decode_wav(audio[f"recordings/{recording}.wav"], "")
            image = np.asarray(Image.open(io.BytesIO(images[f"{split}/{digit}/{number}.png"])))
            same = np.array_equal(row["audio"], original), np.array_equal(row["image"][..., 0], image)
            assert same == ((True, True) if variant == "clean" else (False, False))
            assert row["audio"].dtype == np.int16 and row["audio"].shape == original.shape
            assert row["image"].shape == (28, 28, 1)


def test_av_digits_rejects_too_few_images(small_av_digits, tmp_path, monkeypatch):
    monkeypatch.setattr(av_digits, "IMAGES_PER_RECORDING", {"train": 3, "test": 1})
    with rejects(av_digits.IMAGES.filename, says="4 train images of the digit 0; 6 are needed"):
        prepare("av_digits/clean", tmp_path / "data", small_av_digits[0])


def test_decode_wav_rejects_other_formats():
    for data, fact in ((b"no audio", "WAV"), (wav(np.ones(9), rate=16_000), 16_000), (wav(np.ones(0)), "0 samples")):
        with rejects("here", says=fact):
            av_digits.decode_wav(data, "here")


def test_degrade_removes_the_documented_pca_energy():
    random = np.random.default_rng(0)
    basis = random.normal(size=(12, 64)) * np.linspace(12, 1, 12)[:, None]
    images = np.clip(128 + random.normal(size=(400, 12)) @ basis, 0, 255).astype(np.uint8).reshape(400, 8, 8)
    mean, removed = degrade.fit(images)
    centred = images.reshape(400, -1) - mean
    energy = np.sum((centred @ removed) ** 2) / np.sum(centred**2)
    without_last = np.sum((centred @ removed[:, :-1]) ** 2) / np.sum(centred**2)
    assert without_last < 0.75 <= energy
    np.testing.assert_allclose(removed.T @ removed, np.eye(removed.shape[1]), atol=1e-9)
    residual = degrade.remove(images[0], mean, removed).reshape(-1) - mean
    assert np.abs(removed.T @ residual).max() < 5 < np.abs(removed.T @ centred[0]).max()


def test_degrade_noise_has_the_documented_snr_and_depends_on_name():
    samples = (300 * np.sin(np.arange(8000) / 7)).astype(np.int16)
    noise = degrade.add_noise(samples, "a").astype(float) - samples
    snr = 10 * np.log10(np.mean(samples.astype(float) ** 2) / np.mean(noise**2))
    assert abs(snr - degrade.SNR) < 0.05
    np.testing.assert_array_equal(degrade.add_noise(samples, "a"), degrade.add_noise(samples, "a"))
    assert np.abs(np.corrcoef(noise, degrade.add_noise(samples, "b").astype(float) - samples)[0, 1]) < 0.05
    loud = degrade.add_noise(samples * 90, "a").astype(float)  # exceeds 16 bits: scaled down, not clipped
    assert np.abs(loud).max() == 32767 and np.sum(np.abs(loud) == 32767) == 1


@pytest.mark.thorough
def test_real_easy_vqa_has_its_published_size(tmp_path):
    builder = prepare("easy_vqa", tmp_path, require_archives(easy_vqa.ARCHIVE))
    assert {s: builder.info.splits[s].num_examples for s in SPLITS} == {"train": 38_575, "test": 9_673}
    for row in rows(builder, "test", 200):
        assert row["image"].shape == (64, 64, 3) and row["question"]


def test_real_av_digits_pairs_do_not_cross_splits():
    folder = require_archives(av_digits.IMAGES, av_digits.RECORDINGS)
    recordings = archives.check(av_digits.RECORDINGS, str(folder / av_digits.RECORDINGS.filename))
    names = archives.check(av_digits.IMAGES, str(folder / av_digits.IMAGES.filename))
    pairs = av_digits.pair([av_digits.recording_id(name) for name in recordings], names)
    assert {split: len(p) for split, p in pairs.items()} == {"train": 10_800, "test": 3_000}
    recordings, images = ({split: [p[i] for p in pairs[split]] for split in SPLITS} for i in (0, 1))
    assert not set(recordings["train"]) & set(recordings["test"])
    assert len(set(images["train"]) | set(images["test"])) == 13_800  # no image occurs twice in either split
    assert {int(r.rpartition("_")[2]) for r in recordings["test"]} == set(range(5))
    assert len(set(recordings["train"])) == 2_700 and len(set(recordings["test"])) == 300
    for split in SPLITS:
        assert all(name.startswith(f"{split}/{r[0]}/") for r, name in pairs[split])
        assert set(Counter(r[0] for r in recordings[split]).values()) == {len(pairs[split]) // 10}


def test_real_av_digits_images_keep_a_quarter_of_their_energy():
    folder = require_archives(av_digits.IMAGES)
    path = str(folder / av_digits.IMAGES.filename)
    names = [n for n in archives.check(av_digits.IMAGES, path) if n.startswith("train/")][::20]
    data = archives.read(av_digits.IMAGES, path, names)
    images = np.stack([np.asarray(Image.open(io.BytesIO(d))) for d in data.values()])
    mean, removed = degrade.fit(images)
    centred = images.reshape(len(images), -1) - mean
    kept = centred - centred @ removed @ removed.T
    assert 0.24 < np.sum(kept**2) / np.sum(centred**2) <= 0.25
    degraded = np.stack([degrade.remove(p, mean, removed) for p in images]).reshape(len(images), -1).astype(float)
    # Clipping removes some energy.
    assert 0.2 < np.var(degraded, axis=0).sum() / np.sum(centred**2) * len(images) < 0.25


def test_real_av_digits_recordings_have_the_documented_snr():
    path = str(require_archives(av_digits.RECORDINGS) / av_digits.RECORDINGS.filename)
    names = archives.check(av_digits.RECORDINGS, path)[::150]
    for name, data in archives.read(av_digits.RECORDINGS, path, names).items():
        samples = av_digits.decode_wav(data, name)
        clean, noisy = samples.astype(float), degrade.add_noise(samples, name).astype(float)
        signal = clean * (noisy @ clean) / (clean @ clean)  # mixtures that exceed 16 bits are scaled
        assert abs(10 * np.log10(np.sum(signal**2) / np.sum((noisy - signal) ** 2)) - degrade.SNR) < 1.5


def test_builders_are_registered_with_tfds():
    from_files = {"imdb_subset", "fashion_small", "leaf", "digit_views", "synthetic"}
    assert set(builders.BUILDERS) == {"shapes", "easy_vqa", "av_digits", "cifar10_images"} | from_files
    for name, builder in builders.BUILDERS.items():
        assert builder.name == name and tfds.core.registered.imported_builder_cls(name) is builder
