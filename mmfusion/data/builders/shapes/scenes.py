"""The examples of `shapes`: scenes, sentences and labels, before rendering."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from mmfusion.data.builders.generate import bits

COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
SHAPES = ("circle", "square", "triangle", "diamond", "cross")
POSITIONS = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
SIZES = (len(COLOURS), len(SHAPES), len(POSITIONS))

Object = tuple[int, int, int]  # colour, shape, position: indices into the three lists
Scene = tuple[Object, ...]
Draw = Callable[[int], int]  # draw(n) is uniform in 0..n-1

TEMPLATES = (
    "there is a {colour} {shape} at the {position}",
    "a {colour} {shape} is at the {position}",
    "at the {position} there is a {colour} {shape}",
    "the {shape} at the {position} is {colour}",
    "the {colour} {shape} is at the {position}",
    "the picture shows a {colour} {shape} at the {position}",
)


@dataclasses.dataclass(frozen=True)
class Example:
    """One image with one sentence.

    Attributes:
      image: index of the image in its split; examples with the same index have identical pixels.
      scene: the objects in the image.
      sentence: the text.
      label: the class.
      group: index of the example's block; every block is balanced.
    """

    image: int
    scene: Scene
    sentence: str
    label: int
    group: int


def drawer(source: np.random.Philox) -> Draw:
    """Returns a function that samples one integer per call (the modulo bias is below 2^-55)."""
    return lambda n: int(source.random_raw()) % n


def sample(draw: Draw, items: Sequence, k: int) -> list:
    """Returns `k` distinct items in random order."""
    pool = list(items)
    return [pool.pop(draw(len(pool))) for _ in range(k)]


@functools.cache
def combinations(split: str) -> tuple[Object, ...]:
    """Returns the (colour, shape, position) combinations of a split: 216 of the 270 in train, the other 54 in test."""
    everything = list(np.ndindex(*SIZES))
    order = sample(drawer(bits("shapes", "held-out")), everything, len(everything))
    held_out = len(everything) // 5
    return tuple(sorted(order[:held_out] if split == "test" else order[held_out:]))


def describe(combination: Object, draw: Draw) -> str:
    """Returns a true sentence about the single object of an image."""
    colour, shape, position = combination
    template = TEMPLATES[draw(len(TEMPLATES))]
    return template.format(colour=COLOURS[colour], shape=SHAPES[shape], position=POSITIONS[position])


def quad(number: int, scenes: tuple[Scene, Scene], sentences: tuple[str, str]) -> list[Example]:
    """Returns the four examples of two scenes and two sentences, each true of its own scene and false of the other.

    Each image and each sentence is in one true and one false example, so neither alone carries information.
    """
    return [
        Example(2 * number + image, scenes[image], sentences[sentence], int(image == sentence), number)
        for image in (0, 1)
        for sentence in (0, 1)
    ]


def match(split: str, examples: int) -> list[Example]:
    """Returns quads of two one-object scenes of the split, which differ in a single attribute in 3 of 4 quads."""
    draw, pool = drawer(bits("shapes", "match", split)), combinations(split)

    @functools.cache
    def differing(first: Object, attributes: int) -> list[Object]:
        return [second for second in pool if sum(a != b for a, b in zip(first, second, strict=True)) == attributes]

    result = []
    for number in range(examples // 4):
        first = pool[draw(len(pool))]
        second = _near(draw, differing(first, 1), first) if draw(4) else None
        if second is None:
            far = differing(first, 2) + differing(first, 3)
            second = far[draw(len(far))]
        result += quad(number, ((first,), (second,)), (describe(first, draw), describe(second, draw)))
    return result


def _near(draw: Draw, candidates: Sequence[Object], first: Object) -> Object | None:
    """Returns a candidate that differs from `first` in one attribute, each equally likely; None if there is none."""
    for attribute in sample(draw, range(3), 3):
        matching = [candidate for candidate in candidates if candidate[attribute] != first[attribute]]
        if matching:
            return matching[draw(len(matching))]
    return None


def redundant(split: str, examples: int) -> list[Example]:
    """Returns blocks of one example per colour; image and sentence agree, and each alone determines the label."""
    draw, by_colour = drawer(bits("shapes", "redundant", split)), _by_colour(split)
    result = []
    for number in range(examples // len(COLOURS)):
        for label, pool in enumerate(by_colour):
            shown = pool[draw(len(pool))]
            result.append(Example(len(result), (shown,), describe(shown, draw), label, number))
    return result


def image_only(split: str, examples: int) -> list[Example]:
    """Returns blocks of one sentence with an image of each colour; the label is the colour in the image."""
    draw, pool, by_colour = drawer(bits("shapes", "image_only", split)), combinations(split), _by_colour(split)
    result = []
    for number in range(examples // len(COLOURS)):
        sentence = describe(pool[draw(len(pool))], draw)
        for label, coloured in enumerate(by_colour):
            result.append(Example(len(result), (coloured[draw(len(coloured))],), sentence, label, number))
    return result


def text_only(split: str, examples: int) -> list[Example]:
    """Returns blocks of one image with a sentence of each colour; the label is the colour in the sentence."""
    draw, pool, by_colour = drawer(bits("shapes", "text_only", split)), combinations(split), _by_colour(split)
    result = []
    for number in range(examples // len(COLOURS)):
        scene = (pool[draw(len(pool))],)
        for label, coloured in enumerate(by_colour):
            result.append(Example(number, scene, describe(coloured[draw(len(coloured))], draw), label, number))
    return result


def _by_colour(split: str) -> list[list[Object]]:
    return [[c for c in combinations(split) if c[0] == colour] for colour in range(len(COLOURS))]
