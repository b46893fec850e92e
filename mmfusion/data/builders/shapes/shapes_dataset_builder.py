"""The default dataset: generated images of coloured shapes, each paired with an English sentence."""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from mmfusion.data.builders import generate
from mmfusion.data.builders.shapes import render, scenes
from mmfusion.data.builders.shapes.relations import relations

CHUNK = 500  # images rendered at once

# Variant -> its examples, class names, numbers of train and test examples, and description.
VARIANTS = {
    "match": (scenes.match, ("false", "true"), (48_000, 2_000), "Is the sentence true of the one object?"),
    "relations": (
        relations,
        ("false", "true"),
        (16_000, 2_000),
        "The same with 2 to 4 objects.",
    ),
    "redundant": (scenes.redundant, scenes.COLOURS, (9_000, 1_800), "The colour, which each modality determines."),
    "image_only": (scenes.image_only, scenes.COLOURS, (9_000, 1_800), "The image's colour; the sentence is noise."),
    "text_only": (scenes.text_only, scenes.COLOURS, (9_000, 1_800), "The sentence's colour; the image is noise."),
}


class Builder(tfds.core.GeneratorBasedBuilder):
    """Generated images 32x32x3 of shapes on a noisy background with a sentence; the same on every machine.

    An object has one of 6 colours, 5 shapes and 9 positions (3 rows, 3 columns). Every random choice is raw output of a
    Philox counter keyed by (variant, split), and rendering is integer arithmetic, so pixels do not depend on versions.

    - `match`: one object; one of six templates states its colour, shape and position. Examples form quads of two
      objects c, c' with their images and sentences: (c, c) and (c', c') are true, (c, c') and (c', c) false. In about 3
      of 4 quads c' differs from c in one attribute (each equally often), otherwise in two or three. Every image and
      every sentence is in as many true as false examples, so neither modality alone carries information about the
      label. 54 of the 270 (colour, shape, position) combinations occur in test only, in images and sentences, and test
      has no others; train has every pair of attributes.
    - `relations`: 2 to 4 objects; quads as above. Sentences: a named object is (not) left of, right of, above or below
      another (2 of 5); there are (not) one, two, three of a colour or shape; two shapes are (not) the same colour;
      there is a (no) red circle. 54 of the 435 pairs of different (colour, shape) are held out: they occur in no train
      image and in every test image, and every test sentence about positions mentions one.
    - `redundant`: the label is the colour; the sentence is true of the object. Blocks of six, one per colour.
    - `image_only`: the label is the image's colour. Blocks of six: one sentence with an image of each colour, so the
      sentence carries no information.
    - `text_only`: the label is the sentence's colour. Blocks of six: one image with a sentence of each colour.
      These three hold out the same 54 combinations as `match`, and are exactly balanced.

    Features: `image` PNG, `sentence`, `label`, `group` (the quad or block), `id`.
    """

    VERSION = tfds.core.Version("1.1.0")
    BUILDER_CONFIGS = [  # noqa: RUF012 (TFDS's convention)
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
                    "label": tfds.features.ClassLabel(names=VARIANTS[generate.variant(self)][1]),
                    "group": tfds.features.Text(),
                    "id": tfds.features.Text(),
                }
            ),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # nothing is downloaded
        train, test = VARIANTS[generate.variant(self)][2]
        return {"train": self._generate_examples("train", train), "test": self._generate_examples("test", test)}

    def _generate_examples(self, split: str, size: int) -> Iterator[tuple[str, dict[str, Any]]]:
        variant = generate.variant(self)
        examples = VARIANTS[variant][0](split, size)
        scene_of = {example.image: example.scene for example in examples}
        images = pngs([scene_of[i] for i in range(len(scene_of))], generate.bits("shapes", "pixels", variant, split))
        for number, example in enumerate(examples):
            name = f"{split}-{number:05d}"
            yield (
                name,
                {
                    "image": io.BytesIO(images[example.image]),
                    "sentence": example.sentence,
                    "label": example.label,
                    "group": f"{split}-{example.group:05d}",
                    "id": name,
                },
            )


def pngs(to_render: list[scenes.Scene], source: np.random.Philox) -> list[bytes]:
    """Returns the PNG bytes of each scene, rendered in chunks to bound memory."""
    chunks = (to_render[start : start + CHUNK] for start in range(0, len(to_render), CHUNK))
    return [generate.png(image) for chunk in chunks for image in render.render(chunk, source)]
