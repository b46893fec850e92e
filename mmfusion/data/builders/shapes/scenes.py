"""What the examples of `shapes` are: scenes, sentences and labels, before anything is drawn."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from mmfusion.data.builders.generate import bits

COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
SHAPES = ("circle", "square", "triangle", "diamond", "cross")
PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
SIZES = (len(COLOURS), len(SHAPES), len(PLACES))

Object = tuple[int, int, int]  # colour, shape, place: numbers into the three lists
Scene = tuple[Object, ...]
Draw = Callable[[int], int]  # draw(n) is uniform in 0..n-1

TEMPLATES = (
    "there is a {colour} {shape} at the {place}",
    "a {colour} {shape} is at the {place}",
    "at the {place} there is a {colour} {shape}",
    "the {shape} at the {place} is {colour}",
    "the {colour} {shape} is at the {place}",
    "the picture shows a {colour} {shape} at the {place}",
)


@dataclasses.dataclass(frozen=True)
class Example:
    """One picture with one sentence.

    Attributes:
      picture: number of the picture in its split; examples with the same number share every pixel.
      scene: what the picture shows.
      sentence: what is said.
      label: the class.
      group: number of the block of examples that is balanced as a whole.
    """

    picture: int
    scene: Scene
    sentence: str
    label: int
    group: int


def drawer(source: np.random.Philox) -> Draw:
    """Returns the function that draws one integer at a time (the bias of the remainder is below 2^-55)."""
    return lambda n: int(source.random_raw()) % n


def sample(draw: Draw, items: Sequence, k: int) -> list:
    """Returns `k` different items, in random order."""
    pool = list(items)
    return [pool.pop(draw(len(pool))) for _ in range(k)]


@functools.cache
def combinations(split: str) -> tuple[Object, ...]:
    """Returns the (colour, shape, place) combinations of a split: 216 of the 270 in train, the other 54 in test."""
    everything = list(np.ndindex(*SIZES))
    order = sample(drawer(bits("shapes", "held-out")), everything, len(everything))
    held_out = len(everything) // 5
    return tuple(sorted(order[:held_out] if split == "test" else order[held_out:]))


def describe(combination: Object, draw: Draw) -> str:
    """Returns a true sentence about the one object of a picture."""
    colour, shape, place = combination
    template = TEMPLATES[draw(len(TEMPLATES))]
    return template.format(colour=COLOURS[colour], shape=SHAPES[shape], place=PLACES[place])


def quad(number: int, scenes: tuple[Scene, Scene], sentences: tuple[str, str]) -> list[Example]:
    """Returns the four examples of two scenes with two sentences, each true of its own scene and false of the other.

    Each picture and each sentence is once in a true and once in a false example: neither alone tells.
    """
    return [
        Example(2 * number + picture, scenes[picture], sentences[said], int(picture == said), number)
        for picture in (0, 1)
        for said in (0, 1)
    ]


def match(split: str, examples: int) -> list[Example]:
    """Returns quads of two one-object scenes of the split, which in 3 of 4 quads differ in just one attribute."""
    draw, pool = drawer(bits("shapes", "match", split)), combinations(split)
    differing = functools.cache(
        lambda one, n: [c for c in pool if sum(a != b for a, b in zip(one, c, strict=True)) == n]
    )
    result = []
    for number in range(examples // 4):
        one = pool[draw(len(pool))]
        near = _near(draw, differing(one, 1), one) if draw(4) else None
        other = near or (far := differing(one, 2) + differing(one, 3))[draw(len(far))]
        result += quad(number, ((one,), (other,)), (describe(one, draw), describe(other, draw)))
    return result


def _near(draw: Draw, candidates: Sequence[Object], one: Object) -> Object | None:
    """Returns a candidate that differs in one attribute, each attribute as likely as the others; None without one."""
    for attribute in sample(draw, range(3), 3):
        if fitting := [c for c in candidates if c[attribute] != one[attribute]]:
            return fitting[draw(len(fitting))]
    return None


def redundant(split: str, examples: int) -> list[Example]:
    """Returns blocks of one example a colour; picture and sentence agree, and each alone tells the label."""
    draw, by_colour = drawer(bits("shapes", "redundant", split)), _by_colour(split)
    result = []
    for number in range(examples // len(COLOURS)):
        for label, pool in enumerate(by_colour):
            one = pool[draw(len(pool))]
            result.append(Example(len(result), (one,), describe(one, draw), label, number))
    return result


def image_only(split: str, examples: int) -> list[Example]:
    """Returns blocks of one sentence with a picture of each colour; the label is the colour in the picture."""
    draw, pool, by_colour = drawer(bits("shapes", "image_only", split)), combinations(split), _by_colour(split)
    result = []
    for number in range(examples // len(COLOURS)):
        sentence = describe(pool[draw(len(pool))], draw)
        for label, coloured in enumerate(by_colour):
            result.append(Example(len(result), (coloured[draw(len(coloured))],), sentence, label, number))
    return result


def text_only(split: str, examples: int) -> list[Example]:
    """Returns blocks of one picture with a sentence of each colour; the label is the colour in the sentence."""
    draw, pool, by_colour = drawer(bits("shapes", "text_only", split)), combinations(split), _by_colour(split)
    result = []
    for number in range(examples // len(COLOURS)):
        scene = (pool[draw(len(pool))],)
        for label, coloured in enumerate(by_colour):
            result.append(Example(number, scene, describe(coloured[draw(len(coloured))], draw), label, number))
    return result


def _by_colour(split: str) -> list[list[Object]]:
    return [[c for c in combinations(split) if c[0] == colour] for colour in range(len(COLOURS))]
