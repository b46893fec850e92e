"""Synthetic data in place of data that is not freely available: medical images, video with audio, speech."""

import dataclasses
import io
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from mmfusion.data.builders import generate
from mmfusion.data.builders.synthetic import signals

ANIMALS = (
    "ant", "bear", "cat", "dog", "eel", "fox", "goat", "hare", "ibis", "jay",
    "koala", "lion", "mole", "newt", "owl", "pig", "quail", "rat", "seal", "toad",
)  # fmt: skip
FINDINGS = ("clear", "nodule", "effusion", "fracture")
GOODS = ("shoes", "books", "games", "music", "plants")
CREATURES = {  # the last four of each class occur in test only; `configs/animals.tsv` has their families
    "bird": ("sparrow", "robin", "finch", "crow", "heron", "stork", "falcon", "wren", "thrush", "gull", "swift", "jay"),
    "fish": ("trout", "perch", "carp", "pike", "tench", "bream", "cod", "herring", "roach", "salmon", "plaice", "ling"),
    "insect": ("beetle", "moth", "wasp", "cricket", "aphid", "gnat", "ant", "weevil", "locust", "flea", "bee", "fly"),
    "mammal": ("mole", "otter", "beaver", "hare", "bear", "vole", "weasel", "lynx", "bison", "stoat", "shrew", "ibex"),
    "reptile": (
        "gecko", "iguana", "viper", "python", "skink", "cobra", "boa", "adder", "monitor", "mamba", "turtle", "caiman",
    ),
}  # fmt: skip
NAMED_IN_TRAIN = 8
COMMANDS = ("play", "stop", "call", "light", "warm")


@dataclasses.dataclass(frozen=True)
class Signal:
    """One modality of a variant.

    Attributes:
      feature: the TFDS feature.
      draw: (label or None, split, random generator) -> the feature's value.
      uninformative_rate: fraction of examples whose value does not depend on the label, sampled independently per
        modality.
    """

    feature: Any
    draw: Callable[[int | None, str, np.random.Generator], Any]
    uninformative_rate: float


def _image(classes: int, uninformative_rate: float, *, size: int, channels: int = 1) -> Signal:
    def draw(label: int | None, split: str, random: np.random.Generator) -> io.BytesIO:
        return io.BytesIO(generate.png(signals.image(label, classes, random, size=size, channels=channels)))

    return Signal(tfds.features.Image(shape=(size, size, channels), encoding_format="png"), draw, uninformative_rate)


def _video(classes: int, uninformative_rate: float, *, size: int, frames: int) -> Signal:
    def draw(label: int | None, split: str, random: np.random.Generator) -> np.ndarray:
        return signals.video(label, classes, random, size=size, frames=frames)

    return Signal(tfds.features.Tensor(shape=(frames, size, size, 1), dtype=np.uint8), draw, uninformative_rate)


def _audio(classes: int, uninformative_rate: float, *, rate: int) -> Signal:
    def draw(label: int | None, split: str, random: np.random.Generator) -> np.ndarray:
        return signals.audio(label, classes, random, rate=rate)

    return Signal(tfds.features.Tensor(shape=(rate,), dtype=np.int16), draw, uninformative_rate)


def _text(make: Callable[..., str], words: tuple[str, ...], uninformative_rate: float) -> Signal:
    def draw(label: int | None, split: str, random: np.random.Generator) -> str:
        return make(label, words, random)

    return Signal(tfds.features.Text(), draw, uninformative_rate)


def _creature(uninformative_rate: float) -> Signal:
    """Returns sentences about creatures; creatures in test do not occur in train."""

    def draw(label: int | None, split: str, random: np.random.Generator) -> str:
        names = list(CREATURES.values())[label or 0]
        names = names[NAMED_IN_TRAIN:] if split == "test" else names[:NAMED_IN_TRAIN]
        return signals.sentence(None if label is None else 0, [str(random.choice(names))], random)

    return Signal(tfds.features.Text(), draw, uninformative_rate)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One configuration of the dataset.

    Attributes:
      classes: names of the classes.
      signals: per modality its signal.
      sizes: numbers of train and test examples.
      imitates: the data that it replaces.
      seed_name: the name in random keys, for a renamed variant; empty: its own name.
    """

    classes: tuple[str, ...]
    signals: Mapping[str, Signal]
    sizes: tuple[int, int]
    imitates: str
    seed_name: str = ""


VARIANTS = {
    "xray_ct": Variant(
        FINDINGS,
        {"xray": _image(4, 0.3, size=64), "ct": _image(4, 0.3, size=64)},
        (2000, 1000),
        "an X-ray image and a CT slice of one patient",
    ),
    "medical_notes": Variant(
        FINDINGS,
        {"image": _image(4, 0.2, size=64), "notes": _text(signals.sentence, FINDINGS, 0.3)},
        (2000, 1000),
        "a medical image and the notes on the patient",
    ),
    "surveillance": Variant(
        ("right", "down", "left", "up"),
        {"video": _video(4, 0.2, size=24, frames=8), "audio": _audio(4, 0.3, rate=8000)},
        (2000, 1000),
        "a surveillance video of eight frames and one second of its audio",
    ),
    "recommendation": Variant(
        GOODS,
        {
            "behaviour": _text(signals.events, GOODS, 0.3),
            "text": _text(signals.sentence, GOODS, 0.4),
            "image": _image(5, 0.4, size=32, channels=3),
        },
        (4000, 1000),
        "a customer's behaviour, reviews and viewed images",
    ),
    "interaction": Variant(
        COMMANDS,
        {
            "speech": _audio(5, 0.3, rate=8000),
            "text": _text(signals.sentence, COMMANDS, 0.4),
            "image": _image(5, 0.4, size=32, channels=3),
        },
        (3000, 1000),
        "the speech, text and image that a user gives to a machine",
    ),
    "three_images": Variant(
        ANIMALS[:10],
        {
            "gray": _image(10, 0.3, size=28, channels=1),
            "colour": _image(10, 0.3, size=28, channels=3),
            "deep": _image(10, 0.3, size=28, channels=4),
        },
        (4000, 1000),
        "three images of one object, with 1, 3 and 4 channels",
        seed_name="three_pictures",
    ),
    "creatures": Variant(
        tuple(CREATURES),
        {"image": _image(5, 0.4, size=32, channels=3), "text": _creature(0.1)},
        (3000, 1000),
        "an image and a sentence about a creature whose name may not occur in training",
    ),
    "audio_images": Variant(
        ANIMALS,
        {
            "audio": _audio(20, 0.3, rate=44100),
            "small": _image(20, 0.4, size=28, channels=1),
            "image": _image(20, 0.4, size=64, channels=3),
            "text": _text(signals.sentence, ANIMALS, 0.4),
        },
        (3000, 1000),
        "one second of audio, a small and a large image and a sentence, of 20 classes",
        seed_name="sound_pictures",
    ),
}


class Builder(tfds.core.GeneratorBasedBuilder):
    """Synthetic examples of two to four modalities, each of which is uninformative at a known rate.

    They replace data that is not freely available, in type, shape and number of modalities but not in difficulty:
    results show that a system works, not how accurate it is. Each modality is independently uninformative in 10 to 40 %
    of the examples, so the best possible accuracy of one modality is `1 - rate · (1 - 1 / classes)`, and that of all
    modalities is `1 - Π rate · (1 - 1 / classes)`.

    - image: a noisy ellipse on a dark background, with stripes at the class's angle.
    - video: a spot that moves across the frame in the class's direction.
    - audio: one second of noise with a tone and overtones at the class's pitch.
    - sentence: filler words and the class's word.
    - events: items seen, opened and bought; the class is the item that was both seen and bought.

    Features: the variant's modalities, `label`, `num_informative` (number of informative modalities), `group`, `id`.
    """

    VERSION = tfds.core.Version("1.1.0")
    BUILDER_CONFIGS = [  # noqa: RUF012 (TFDS's convention)
        tfds.core.BuilderConfig(name=name, description=f"Generated, in place of {variant.imitates}.")
        for name, variant in VARIANTS.items()
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        variant = VARIANTS[generate.variant(self)]
        return tfds.core.DatasetInfo(
            builder=self,
            description=type(self).__doc__,
            features=tfds.features.FeaturesDict(
                {
                    **{name: signal.feature for name, signal in variant.signals.items()},
                    "label": tfds.features.ClassLabel(names=variant.classes),
                    "num_informative": tfds.features.ClassLabel(num_classes=len(variant.signals) + 1),
                    "group": tfds.features.Text(),
                    "id": tfds.features.Text(),
                }
            ),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # nothing is downloaded
        train, test = VARIANTS[generate.variant(self)].sizes
        return {"train": self._generate_examples("train", train), "test": self._generate_examples("test", test)}

    def _generate_examples(self, split: str, size: int) -> Iterator[tuple[str, dict[str, Any]]]:
        name = generate.variant(self)
        variant = VARIANTS[name]
        for number in range(size):
            example = f"{split}-{number:05d}"
            # The dataset's original name, so that its renaming did not change the examples.
            random = np.random.Generator(generate.bits("stand_ins", variant.seed_name or name, example))
            yield example, {**draw_example(variant, number, split, random), "group": example, "id": example}


def draw_example(variant: Variant, number: int, split: str, random: np.random.Generator) -> dict[str, Any]:
    """Returns the modalities and the labels of example `number`; classes are balanced."""
    label, num_informative, values = number % len(variant.classes), 0, {}
    for name, signal in variant.signals.items():
        informative = random.random() >= signal.uninformative_rate
        num_informative += informative
        values[name] = signal.draw(label if informative else None, split, random)
    return {**values, "label": label, "num_informative": int(num_informative)}
