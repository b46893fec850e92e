"""Generated data in the form of what cannot be had here: medical pictures, films with sound, behaviour, speech."""

import dataclasses
import functools
import io
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from mmfusion.data.builders import generate
from mmfusion.data.builders.stand_ins import signals

ANIMALS = (
    "ant", "bear", "cat", "dog", "eel", "fox", "goat", "hare", "ibis", "jay",
    "koala", "lion", "mole", "newt", "owl", "pig", "quail", "rat", "seal", "toad",
)  # fmt: skip
FINDINGS = ("clear", "nodule", "effusion", "fracture")
GOODS = ("shoes", "books", "games", "music", "plants")
CREATURES = {  # the last four of each only test names; `configs/animals.tsv` says what they are
    "bird": ("sparrow", "robin", "finch", "crow", "heron", "stork", "falcon", "wren", "thrush", "gull", "swift", "jay"),
    "fish": ("trout", "perch", "carp", "pike", "tench", "bream", "cod", "herring", "roach", "salmon", "plaice", "ling"),
    "insect": ("beetle", "moth", "wasp", "cricket", "aphid", "gnat", "ant", "weevil", "locust", "flea", "bee", "fly"),
    "mammal": ("mole", "otter", "beaver", "hare", "bear", "vole", "weasel", "lynx", "bison", "stoat", "shrew", "ibex"),
    "reptile": (
        "gecko", "iguana", "viper", "python", "skink", "cobra", "boa", "adder", "monitor", "mamba", "turtle", "caiman",
    ),
}  # fmt: skip
NAMED_IN_TRAIN = 8
ORDERS = ("play", "stop", "call", "light", "warm")


@dataclasses.dataclass(frozen=True)
class Signal:
    """One modality of a variant.

    Attributes:
      feature: what TFDS stores.
      draw: (class shown or None, split, source) -> its value.
      silent: share of the examples in which it shows nothing, drawn for each modality by itself.
    """

    feature: Any
    draw: Callable[[int | None, str, np.random.Generator], Any]
    silent: float


def _picture(classes: int, silent: float, *, size: int, channels: int = 1) -> Signal:
    feature = tfds.features.Image(shape=(size, size, channels), encoding_format="png")
    shows = functools.partial(signals.picture, size=size, channels=channels)
    return Signal(feature, lambda shown, _, draw: io.BytesIO(generate.png(shows(shown, classes, draw))), silent)


def _film(classes: int, silent: float, *, size: int, frames: int) -> Signal:
    feature = tfds.features.Tensor(shape=(frames, size, size, 1), dtype=np.uint8)
    return Signal(feature, lambda shown, _, draw: signals.film(shown, classes, draw, size=size, frames=frames), silent)


def _sound(classes: int, silent: float, *, rate: int) -> Signal:
    feature = tfds.features.Tensor(shape=(rate,), dtype=np.int16)
    return Signal(feature, lambda shown, _, draw: signals.sound(shown, classes, draw, rate=rate), silent)


def _words(make: Callable[..., str], words: tuple[str, ...], silent: float) -> Signal:
    return Signal(tfds.features.Text(), lambda shown, _, draw: make(shown, words, draw), silent)


def _creature(silent: float) -> Signal:
    """A sentence about a creature, of which test names others than train."""

    def draw(shown: int | None, split: str, source: np.random.Generator) -> str:
        named = list(CREATURES.values())[shown or 0]
        named = named[NAMED_IN_TRAIN:] if split == "test" else named[:NAMED_IN_TRAIN]
        return signals.sentence(None if shown is None else 0, [str(source.choice(named))], source)

    return Signal(tfds.features.Text(), draw, silent)


@dataclasses.dataclass(frozen=True)
class Variant:
    """Its class names, its modalities, how many examples (train, test), and what it stands in for."""

    classes: tuple[str, ...]
    signals: Mapping[str, Signal]
    sizes: tuple[int, int]
    stands_for: str


VARIANTS = {
    "xray_ct": Variant(
        FINDINGS,
        {"xray": _picture(4, 0.3, size=64), "ct": _picture(4, 0.3, size=64)},
        (2000, 1000),
        "an X-ray picture and a slice of a CT of one patient",
    ),
    "medical_notes": Variant(
        FINDINGS,
        {"image": _picture(4, 0.2, size=64), "notes": _words(signals.sentence, FINDINGS, 0.3)},
        (2000, 1000),
        "a medical picture and the notes on the patient",
    ),
    "surveillance": Variant(
        ("right", "down", "left", "up"),
        {"video": _film(4, 0.2, size=24, frames=8), "audio": _sound(4, 0.3, rate=8000)},
        (2000, 1000),
        "a surveillance film of eight frames and a second of its sound",
    ),
    "recommendation": Variant(
        GOODS,
        {
            "behaviour": _words(signals.events, GOODS, 0.3),
            "text": _words(signals.sentence, GOODS, 0.4),
            "image": _picture(5, 0.4, size=32, channels=3),
        },
        (4000, 1000),
        "what a customer did, wrote and looked at",
    ),
    "interaction": Variant(
        ORDERS,
        {
            "speech": _sound(5, 0.3, rate=8000),
            "text": _words(signals.sentence, ORDERS, 0.4),
            "image": _picture(5, 0.4, size=32, channels=3),
        },
        (3000, 1000),
        "what a user says, types and shows to a machine",
    ),
    "three_pictures": Variant(
        ANIMALS[:10],
        {
            "gray": _picture(10, 0.3, size=28, channels=1),
            "colour": _picture(10, 0.3, size=28, channels=3),
            "deep": _picture(10, 0.3, size=28, channels=4),
        },
        (4000, 1000),
        "three pictures of one thing, of 1, 3 and 4 channels",
    ),
    "creatures": Variant(
        tuple(CREATURES),
        {"image": _picture(5, 0.4, size=32, channels=3), "text": _creature(0.1)},
        (3000, 1000),
        "a picture and a sentence about a creature that training may never have named",
    ),
    "sound_pictures": Variant(
        ANIMALS,
        {
            "audio": _sound(20, 0.3, rate=44100),
            "small": _picture(20, 0.4, size=28, channels=1),
            "image": _picture(20, 0.4, size=64, channels=3),
            "text": _words(signals.sentence, ANIMALS, 0.4),
        },
        (3000, 1000),
        "a second of sound, a small and a large picture and a sentence, of 20 classes",
    ),
}


class Builder(tfds.core.GeneratorBasedBuilder):
    """Generated examples of two to four modalities that each show the label, or in a known share nothing.

    They stand in for data that cannot be had freely, in kind, shape and number of modalities, not in what is hard
    about it: results on them say that a system works, not how good it is. Each modality is silent by itself, in 10 to
    40 % of the examples, so that one alone is right in at most `1 - silent · (1 - 1 / classes)` of them, and all
    together in `1 - Π silent · (1 - 1 / classes)`.

    - picture: a noisy body on a dark ground, hatched at the class's angle.
    - film: a spot that crosses the picture in the class's direction.
    - sound: one second of noise with a tone and overtones of the class's pitch.
    - sentence: fillers and the class's word.
    - events: things seen, opened and bought; the class is the thing that was both seen and bought.

    Features: the variant's modalities, `label`, `shown` (how many modalities show it), `group` and `id`.
    """

    VERSION = tfds.core.Version("1.1.0")
    BUILDER_CONFIGS = [  # noqa: RUF012 (TFDS's own convention)
        tfds.core.BuilderConfig(name=name, description=f"Generated; stands in for {variant.stands_for}.")
        for name, variant in VARIANTS.items()
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        variant = VARIANTS[self.builder_config.name]
        return tfds.core.DatasetInfo(
            builder=self,
            description=type(self).__doc__,
            features=tfds.features.FeaturesDict(
                {
                    **{name: signal.feature for name, signal in variant.signals.items()},
                    "label": tfds.features.ClassLabel(names=variant.classes),
                    "shown": tfds.features.ClassLabel(num_classes=len(variant.signals) + 1),
                    "group": tfds.features.Text(),
                    "id": tfds.features.Text(),
                }
            ),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # nothing is fetched
        train, test = VARIANTS[self.builder_config.name].sizes
        return {"train": self._generate_examples("train", train), "test": self._generate_examples("test", test)}

    def _generate_examples(self, split: str, size: int) -> Iterator[tuple[str, dict[str, Any]]]:
        name = self.builder_config.name
        for number in range(size):
            example = f"{split}-{number:05d}"
            source = np.random.Generator(generate.bits("stand_ins", name, example))
            values = draw_example(VARIANTS[name], number, split, source)
            yield example, {**values, "group": example, "id": example}


def draw_example(variant: Variant, number: int, split: str, draw: np.random.Generator) -> dict[str, Any]:
    """Returns the modalities and the labels of example `number`; each class is the label as often."""
    label, shown, values = number % len(variant.classes), 0, {}
    for name, signal in variant.signals.items():
        shows = draw.random() >= signal.silent
        shown += shows
        values[name] = signal.draw(label if shows else None, split, draw)
    return {**values, "label": label, "shown": int(shown)}
