"""Audio-visual digits: MNIST images paired by class with recordings of the Free Spoken Digit Dataset (FSDD)."""

import io
import wave
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from mmfusion.data.builders import archives, generate
from mmfusion.data.builders.av_digits import degrade
from mmfusion.errors import UserError

IMAGES = archives.Archive(
    filename="mnist-pngs-main.zip",
    url="https://github.com/rasbt/mnist-pngs/archive/refs/heads/main.zip",
    members=r"(train|test)/\d/\d+\.png",
    count=70_000,
    digest="fde01df6b121d04f911a76b1a86474d0ea94ad0109d552b521f448b8c2de8ac3",
)
RECORDINGS = archives.Archive(
    filename="free-spoken-digit-dataset-master.zip",
    url="https://github.com/Jakobovski/free-spoken-digit-dataset/archive/refs/heads/master.zip",
    members=r"recordings/\d_[a-z]+_\d+\.wav",
    count=3_000,
    digest="b10f94ecff580b22dfabe5dd07bf11adeb6cd2942babf8abf508afc031667457",
)
IMAGES_PER_RECORDING = {"train": 4, "test": 10}
RATE = 8_000  # Hz
TEST_INDICES = range(5)  # recordings per speaker and digit in FSDD's official test set


class Builder(tfds.core.GeneratorBasedBuilder):
    """10,800 train and 3,000 test pairs of a digit's image 28x28x1 and its recording, 8 kHz mono int16.

    FSDD's official test set, recordings 0 to 4 of each speaker and digit, is test, and its other 2,700 recordings are
    train. They are paired with images of MNIST's own test and train split. Each train recording is paired with 4 images
    of its class, each test recording with 10, sampled without replacement by a counter-based generator keyed on split
    and class. No recording and no image is in both splits, and no image is used twice. Classes are exactly balanced
    (1,080 and 300 pairs each).

    - `clean`: as recorded.
    - `hard`, after the AV-MNIST of Vielzeuf et al. (2018, arXiv:1808.07275), where PCA removes 75 % of the image's
      energy. Here the PCA is fitted to the 10,800 train images, and the fewest leading components with at least 75 % of
      the variance are removed; the remainder is added to the mean train image, rounded and clipped to 0..255. White
      Gaussian noise is added to the recording at a signal-to-noise ratio of -10 dB (of mean powers over the recording),
      sampled for each pair by its id; a mixture that exceeds 16 bits is scaled down as a whole.

    Features: `image` PNG, `audio` `[S]` int16, `label`, `group` (the recording), `id`.
    """

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        f"Without a network, put {IMAGES.filename} and {RECORDINGS.filename} here, "
        f"from {IMAGES.url} and {RECORDINGS.url}"
    )
    BUILDER_CONFIGS = [  # noqa: RUF012 (TFDS's convention)
        tfds.core.BuilderConfig(name="clean", description="As recorded."),
        tfds.core.BuilderConfig(name="hard", description="25 % of the image's energy; audio in noise at -10 dB."),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=type(self).__doc__,
            homepage="https://github.com/Jakobovski/free-spoken-digit-dataset",
            license="CC BY-SA 4.0 (recordings), CC BY-SA 3.0 (images)",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(28, 28, 1), encoding_format="png"),
                    # Stored as a list of integers, a recording would have twice the size and be slow to read.
                    "audio": tfds.features.Tensor(shape=(None,), dtype=np.int16, encoding="bytes"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                    "group": tfds.features.Text(),
                    "id": tfds.features.Text(),
                }
            ),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        recordings_path = archives.locate(RECORDINGS, dl_manager)
        images_path = archives.locate(IMAGES, dl_manager)
        names = archives.check(RECORDINGS, recordings_path)
        recordings = {
            recording_id(name): decode_wav(data, f"{recordings_path}: {name}")
            for name, data in archives.read(RECORDINGS, recordings_path, names).items()
        }
        pairs = pair(sorted(recordings), archives.check(IMAGES, images_path))
        members = [name for split in pairs.values() for _, name in split]
        pngs = archives.read(IMAGES, images_path, members)
        if generate.variant(self) == "clean":
            return {split: self._generate_examples(pairs[split], recordings, pngs.__getitem__, None) for split in pairs}
        images = {name: np.asarray(Image.open(io.BytesIO(data))) for name, data in pngs.items()}
        mean, removed = degrade.fit(np.stack([images[name] for _, name in pairs["train"]]))

        def degraded(name: str) -> bytes:
            return generate.png(degrade.remove(images[name], mean, removed))

        return {
            split: self._generate_examples(pairs[split], recordings, degraded, degrade.add_noise) for split in pairs
        }

    def _generate_examples(
        self,
        pairs: list[tuple[str, str]],
        recordings: dict[str, np.ndarray],
        png: Callable[[str], bytes],
        add_noise: Callable[[np.ndarray, str], np.ndarray] | None,
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        for recording, name in pairs:
            pair_id = f"{recording}-{name.rpartition('/')[2].removesuffix('.png')}"
            yield (
                pair_id,
                {
                    "image": io.BytesIO(png(name)),
                    "audio": add_noise(recordings[recording], pair_id) if add_noise else recordings[recording],
                    "label": int(recording[0]),
                    "group": recording,
                    "id": pair_id,
                },
            )


def recording_id(name: str) -> str:
    """Returns the id `digit_speaker_index` of a member `recordings/digit_speaker_index.wav`."""
    return name.rpartition("/")[2].removesuffix(".wav")


def pair(recordings: list[str], images: list[str]) -> dict[str, list[tuple[str, str]]]:
    """Returns per split the (recording, image member) pairs, which are a function of the two lists.

    Args:
      recordings: ids `digit_speaker_index`, in any order.
      images: members `split/digit/number.png`, in any order.

    Raises:
      UserError: a class has too few images for its recordings.
    """
    result = {}
    for split, count in IMAGES_PER_RECORDING.items():
        result[split] = []
        for digit in map(str, range(10)):
            spoken = [r for r in sorted(recordings) if r[0] == digit and split == split_of(r)]
            written = sorted(name for name in images if name.startswith(f"{split}/{digit}/"))
            if len(written) < count * len(spoken):
                raise UserError(
                    f"has {len(written)} {split} images of the digit {digit}; {count * len(spoken)} are needed",
                    path=IMAGES.filename,
                )
            order = np.argsort(generate.bits("av_digits", "pair", split, digit).random_raw(len(written)), kind="stable")
            result[split] += [(spoken[i // count], written[order[i]]) for i in range(count * len(spoken))]
    return result


def split_of(recording: str) -> str:
    """Returns the split of a recording `digit_speaker_index`."""
    return "test" if int(recording.rpartition("_")[2]) in TEST_INDICES else "train"


def decode_wav(data: bytes, path: str) -> np.ndarray:
    """Returns the samples `[S]` int16 of a mono 16-bit WAV file at 8 kHz.

    Raises:
      UserError: the file has another format.
    """
    try:
        with wave.open(io.BytesIO(data)) as file:
            form = (file.getnchannels(), file.getsampwidth(), file.getframerate())
            samples = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.int16)
    except (wave.Error, EOFError, ValueError) as error:
        raise UserError(f"not a WAV file ({error})", path=path) from error
    if form != (1, 2, RATE) or not len(samples):
        raise UserError(
            f"(channels, bytes, rate) are {form} with {len(samples)} samples, not {(1, 2, RATE)}", path=path
        )
    return samples
