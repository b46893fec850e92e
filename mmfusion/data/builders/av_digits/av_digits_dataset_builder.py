"""Audio-visual digits: MNIST pictures paired by class with recordings of the Free Spoken Digit Dataset (FSDD)."""

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

PICTURES = archives.Archive(
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
PICTURES_PER_RECORDING = {"train": 4, "test": 10}
RATE = 8_000  # samples per second
TEST_INDICES = range(5)  # of each speaker and digit: FSDD's official test set


class Builder(tfds.core.GeneratorBasedBuilder):
    """10,800 train and 3,000 test pairs of a digit's picture 28x28x1 and its recording, 8 kHz mono int16.

    FSDD's official test set, recordings 0 to 4 of each speaker and digit, is test, its other 2,700 are train; they meet
    MNIST pictures of MNIST's own test and train split. Each train recording meets 4 pictures of its class, each test
    recording 10, drawn without replacement by a counter keyed on split and class: no recording and no picture is in
    both splits, and no picture is used twice. Classes are exactly balanced (1,080 and 300 pairs each).

    - `clean`: as recorded.
    - `hard`, after the AV-MNIST of Vielzeuf et al. (2018, arXiv:1808.07275), where 75 % of the picture's energy is
      removed by PCA. Here the PCA is fitted on the 10,800 train pictures, and the fewest leading components that hold
      at least 75 % of the variance are removed, the others kept; the rest is added to the mean train picture, rounded
      and clipped to 0..255. To the recording, white Gaussian noise is added at a signal-to-noise ratio of -10 dB (of
      mean powers over the recording), drawn anew for each pair by its id; a mixture past 16 bits is scaled down whole.

    Features: `image` PNG, `audio` `[S]` int16, `label`, `group` (the recording), `id`.
    """

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        f"Without a network, put {PICTURES.filename} and {RECORDINGS.filename} here, "
        f"from {PICTURES.url} and {RECORDINGS.url}"
    )
    BUILDER_CONFIGS = [  # noqa: RUF012 (TFDS's own convention)
        tfds.core.BuilderConfig(name="clean", description="As recorded."),
        tfds.core.BuilderConfig(name="hard", description="25 % of the picture's energy; sound in noise at -10 dB."),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=type(self).__doc__,
            homepage="https://github.com/Jakobovski/free-spoken-digit-dataset",
            license="CC BY-SA 4.0 (recordings), CC BY-SA 3.0 (pictures)",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(28, 28, 1), encoding_format="png"),
                    # raw bytes: as a list of integers one recording is twice the size and slow to read
                    "audio": tfds.features.Tensor(shape=(None,), dtype=np.int16, encoding="bytes"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                    "group": tfds.features.Text(),
                    "id": tfds.features.Text(),
                }
            ),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        sound_path = archives.locate(RECORDINGS, dl_manager)
        picture_path = archives.locate(PICTURES, dl_manager)
        names = archives.check(RECORDINGS, sound_path)
        sounds = {
            recording_id(name): decode_wav(data, f"{sound_path}: {name}")
            for name, data in archives.read(RECORDINGS, sound_path, names).items()
        }
        pairs = pair(sorted(sounds), archives.check(PICTURES, picture_path))
        wanted = [name for split in pairs.values() for _, name in split]
        pngs = archives.read(PICTURES, picture_path, wanted)
        if self.builder_config.name == "clean":
            return {split: self._generate_examples(pairs[split], sounds, pngs.__getitem__, None) for split in pairs}
        pictures = {name: np.asarray(Image.open(io.BytesIO(data))) for name, data in pngs.items()}
        mean, removed = degrade.fit(np.stack([pictures[name] for _, name in pairs["train"]]))

        def picture(name: str) -> bytes:
            return generate.png(degrade.remove(pictures[name], mean, removed))

        return {split: self._generate_examples(pairs[split], sounds, picture, degrade.add_noise) for split in pairs}

    def _generate_examples(
        self,
        pairs: list[tuple[str, str]],
        sounds: dict[str, np.ndarray],
        picture: Callable[[str], bytes],
        add_noise: Callable[[np.ndarray, str], np.ndarray] | None,
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        for recording, name in pairs:
            pair_id = f"{recording}-{name.rpartition('/')[2].removesuffix('.png')}"
            yield (
                pair_id,
                {
                    "image": io.BytesIO(picture(name)),
                    "audio": add_noise(sounds[recording], pair_id) if add_noise else sounds[recording],
                    "label": int(recording[0]),
                    "group": recording,
                    "id": pair_id,
                },
            )


def recording_id(name: str) -> str:
    """Returns `digit_speaker_index` of a member `recordings/digit_speaker_index.wav`."""
    return name.rpartition("/")[2].removesuffix(".wav")


def pair(recordings: list[str], pictures: list[str]) -> dict[str, list[tuple[str, str]]]:
    """Returns per split the (recording, picture member) pairs, the same for the same lists.

    Args:
      recordings: ids `digit_speaker_index`, in any order.
      pictures: members `split/digit/number.png`, in any order.

    Raises:
      UserError: a class has too few pictures for its recordings.
    """
    result = {}
    for split, each in PICTURES_PER_RECORDING.items():
        result[split] = []
        for digit in map(str, range(10)):
            said = [r for r in sorted(recordings) if r[0] == digit and split == split_of(r)]
            shown = sorted(name for name in pictures if name.startswith(f"{split}/{digit}/"))
            if len(shown) < each * len(said):
                raise UserError(
                    f"{PICTURES.filename} has {len(shown)} {split} pictures of the digit {digit} where "
                    f"{each * len(said)} are needed"
                )
            order = np.argsort(generate.bits("av_digits", "pair", split, digit).random_raw(len(shown)), kind="stable")
            result[split] += [(said[i // each], shown[order[i]]) for i in range(each * len(said))]
    return result


def split_of(recording: str) -> str:
    """Returns the split of a recording `digit_speaker_index`."""
    return "test" if int(recording.rpartition("_")[2]) in TEST_INDICES else "train"


def decode_wav(data: bytes, where: str) -> np.ndarray:
    """Returns the samples `[S]` int16 of a mono 16-bit WAV file at 8 kHz.

    Raises:
      UserError: it is no such file; `where` names it.
    """
    try:
        with wave.open(io.BytesIO(data)) as file:
            form = (file.getnchannels(), file.getsampwidth(), file.getframerate())
            samples = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.int16)
    except (wave.Error, EOFError, ValueError) as error:
        raise UserError(f"{where} is no WAV file ({error})") from error
    if form != (1, 2, RATE) or not len(samples):
        raise UserError(f"{where} has (channels, bytes, rate) {form} and {len(samples)} samples, not {(1, 2, RATE)}")
    return samples
