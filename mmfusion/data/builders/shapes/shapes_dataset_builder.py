"""The embedded default dataset: generated pictures of coloured shapes, each with an English sentence."""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from mmfusion.data.builders import generate
from mmfusion.data.builders.shapes import render, scenes
from mmfusion.data.builders.shapes.relations import relations

CHUNK = 500  # pictures drawn at once

# config name: its examples, its class names, how many (train, test), and what it is
VARIANTS = {
    "match": (scenes.match, ("false", "true"), (48_000, 2_000), "Is the sentence true of the one object shown?"),
    "relations": (relations, ("false", "true"), (16_000, 2_000), "The same of 2 to 4 objects: places, counts, not."),
    "redundant": (scenes.redundant, scenes.COLOURS, (9_000, 1_800), "The colour, which both modalities tell."),
    "image_only": (scenes.image_only, scenes.COLOURS, (9_000, 1_800), "The picture's colour; the sentence is noise."),
    "text_only": (scenes.text_only, scenes.COLOURS, (9_000, 1_800), "The sentence's colour; the picture is noise."),
}


class Builder(tfds.core.GeneratorBasedBuilder):
    """Pictures 32x32x3 of shapes on a noisy ground with a sentence; generated, the same on every machine.

    An object has one of 6 colours, 5 shapes and 9 places (3 rows, 3 columns). Every random choice is raw output of a
    Philox counter keyed by (variant, split), and drawing is integer arithmetic, so pixels do not depend on a version.

    - `match`: one object; one of six templates names its colour, shape and place. Examples come in quads of two
      objects c, c' with their pictures and sentences: (c, c) and (c', c') true, (c, c') and (c', c) false. In about 3
      of 4 quads c' differs from c in one attribute, each as often, else in two or three. Every picture and every
      sentence is so as often in a true as in a false example: one modality alone is exactly at chance. 54 of the 270
      (colour, shape, place) combinations are only in test, in pictures and sentences, and test holds no other; train
      shows every pair of attributes.
    - `relations`: 2 to 4 objects; quads as above. Sentences: a named object is (not) left of, right of, above or below
      another (2 of 5); there are (not) one, two, three of a colour or shape; two shapes are (not) the same colour;
      there is a (no) red circle. 54 of the 435 pairs of different (colour, shape) kinds are held out: no train picture
      shows one, every test picture does, and every test sentence of places names one.
    - `redundant`: the label is the colour; the sentence truly describes the object. Blocks of six, one a colour.
    - `image_only`: the label is the picture's colour. Blocks of six: one sentence with a picture of each colour, so
      that the sentence tells exactly nothing.
    - `text_only`: the label is the sentence's colour. Blocks of six: one picture with a sentence of each colour.
      These three hold out the same 54 combinations as `match`, and are exactly balanced.

    Features: `image` PNG, `sentence`, `label`, `group` (the quad or block), `id`.
    """

    VERSION = tfds.core.Version("1.1.0")
    BUILDER_CONFIGS = [  # noqa: RUF012 (TFDS's own convention)
        tfds.core.BuilderConfig(name=name, description=description) for name, (*_, description) in VARIANTS.items()
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=type(self).__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(render.SIZE, render.SIZE, 3), encoding_format="png"),
                    "sentence": tfds.features.Text(),
                    "label": tfds.features.ClassLabel(names=VARIANTS[self.builder_config.name][1]),
                    "group": tfds.features.Text(),
                    "id": tfds.features.Text(),
                }
            ),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # nothing is fetched
        train, test = VARIANTS[self.builder_config.name][2]
        return {"train": self._generate_examples("train", train), "test": self._generate_examples("test", test)}

    def _generate_examples(self, split: str, size: int) -> Iterator[tuple[str, dict[str, Any]]]:
        variant = self.builder_config.name
        examples = VARIANTS[variant][0](split, size)
        shown = {example.picture: example.scene for example in examples}
        pictures = pngs([shown[i] for i in range(len(shown))], generate.bits("shapes", "pixels", variant, split))
        for number, example in enumerate(examples):
            name = f"{split}-{number:05d}"
            yield (
                name,
                {
                    "image": io.BytesIO(pictures[example.picture]),
                    "sentence": example.sentence,
                    "label": example.label,
                    "group": f"{split}-{example.group:05d}",
                    "id": name,
                },
            )


def pngs(shown: list[scenes.Scene], source: np.random.Philox) -> list[bytes]:
    """Returns the PNG bytes of each scene, drawn in chunks so that memory stays small."""
    chunks = (shown[start : start + CHUNK] for start in range(0, len(shown), CHUNK))
    return [generate.png(picture) for chunk in chunks for picture in render.render(chunk, source)]
