"""The variant `relations` of `shapes`: two to four objects; sentences about positions, counts, colours, negation."""

import functools
import itertools

from mmfusion.data.builders.generate import bits
from mmfusion.data.builders.shapes.scenes import COLOURS, POSITIONS, SHAPES, Draw, Example, Scene, drawer, quad, sample

Appearance = tuple[int, int]  # colour, shape
Pair = frozenset[Appearance]
Candidate = tuple[tuple[Scene, Scene], tuple[str, str]]

APPEARANCES = tuple(itertools.product(range(len(COLOURS)), range(len(SHAPES))))
COUNTS = ("one", "two", "three")
RELATIONS = (("left of", "right of"), ("above", "below"))  # per axis: relation of the object with the lower coordinate


@functools.cache
def held_out() -> frozenset[Pair]:
    """Returns the 54 of the 435 pairs of different appearances that occur in test images and test sentences only."""
    pairs = [frozenset(pair) for pair in itertools.combinations(APPEARANCES, 2)]
    return frozenset(sample(drawer(bits("shapes", "held-out pairs")), pairs, len(pairs) // 8))


def pairs_of(scene: Scene) -> set[Pair]:
    """Returns the pairs of different appearances in a scene."""
    return {frozenset(pair) for pair in itertools.combinations({(c, s) for c, s, _ in scene}, 2)}


def relations(split: str, examples: int) -> list[Example]:
    """Returns quads; held-out pairs occur in no train scene, every test scene, and every spatial test sentence."""
    draw, result = drawer(bits("shapes", "relations", split)), []
    for number in range(examples // 4):
        make = (_spatial, _spatial, _count, _same_colour, _exists)[draw(5)]
        candidate = make(draw)
        while candidate is None or not _belongs(candidate, split, named=make is _spatial):
            candidate = make(draw)
        result += quad(number, *candidate)
    return result


def _belongs(candidate: Candidate, split: str, named: bool) -> bool:
    pairs = [pairs_of(scene) & held_out() for scene in candidate[0]]
    if split == "train":
        return not any(pairs)
    if named:
        return frozenset((c, s) for c, s, _ in candidate[0][0][:2]) in held_out()
    return all(pairs)


def _spatial(draw: Draw) -> Candidate | None:
    """Two named objects that swap positions; None if they have the same coordinate on the sampled axis."""
    appearances = sample(draw, APPEARANCES, 2 + draw(3))
    positions = sample(draw, range(len(POSITIONS)), len(appearances))
    axis = draw(2)
    first, second = (divmod(position, 3)[1 - axis] for position in positions[:2])
    if first == second:
        return None
    relation, inverse = RELATIONS[axis] if first < second else RELATIONS[axis][::-1]
    one, other = _name(appearances[0]), _name(appearances[1])
    true = f"the {one} is {relation} the {other}"
    false = (
        f"the {one} is {inverse} the {other}",
        f"the {other} is {relation} the {one}",
        f"the {one} is not {relation} the {other}",
    )[draw(3)]
    swapped = [positions[1], positions[0], *positions[2:]]
    return (_scene(appearances, positions), _scene(appearances, swapped)), (true, false)


def _count(draw: Draw) -> Candidate:
    """Different counts of objects with a given colour or shape, in scenes with the same total number of objects."""
    by_shape = draw(2)
    value = draw(len((COLOURS, SHAPES)[by_shape]))
    total = 3 + draw(2)
    counts = sample(draw, (1, 2, 3), 2)
    inside = [appearance for appearance in APPEARANCES if appearance[by_shape] == value]
    outside = [appearance for appearance in APPEARANCES if appearance[by_shape] != value]

    def scene(count: int) -> Scene:
        appearances = [inside[draw(len(inside))] for _ in range(count)]
        appearances += [outside[draw(len(outside))] for _ in range(total - count)]
        return _scene(appearances, sample(draw, range(len(POSITIONS)), total))

    def sentence(count: int, no: str = "") -> str:
        thing = SHAPES[value] if by_shape else f"{COLOURS[value]} shape"
        plural = thing if count == 1 else thing + ("es" if thing.endswith("s") else "s")
        return f"there {'is' if count == 1 else 'are'} {no}{COUNTS[count - 1]} {plural}"

    false = sentence(counts[1]) if draw(3) else sentence(counts[0], "not ")
    return (scene(counts[0]), scene(counts[1])), (sentence(counts[0]), false)


def _same_colour(draw: Draw) -> Candidate:
    """Three shapes, of which the first has the second's colour in one scene and the third's in the other."""
    shapes = sample(draw, range(len(SHAPES)), 3 + draw(2))
    colour, another, any_colour = *sample(draw, range(len(COLOURS)), 2), draw(len(COLOURS))
    positions = sample(draw, range(len(POSITIONS)), len(shapes))

    def scene(colours: tuple[int, ...]) -> Scene:
        return _scene(list(zip(colours, shapes, strict=False)), positions)

    one, second, third = (SHAPES[shape] for shape in shapes[:3])
    false = (
        f"the {one} is not the same colour as the {second}",
        f"the {one} is the same colour as the {third}",
    )[draw(2)]
    return (
        (scene((colour, colour, another, any_colour)), scene((colour, another, colour, any_colour))),
        (f"the {one} is the same colour as the {second}", false),
    )


def _exists(draw: Draw) -> Candidate:
    """One object whose colour or shape differs between the scenes."""
    one = APPEARANCES[draw(len(APPEARANCES))]
    other = [appearance for appearance in APPEARANCES if (appearance[0] == one[0]) != (appearance[1] == one[1])]
    other = other[draw(len(other))]
    rest = sample(draw, [appearance for appearance in APPEARANCES if appearance not in (one, other)], 1 + draw(3))
    positions = sample(draw, range(len(POSITIONS)), 1 + len(rest))
    false = (f"there is a {_name(other)}", f"there is no {_name(one)}")[draw(2)]
    return (
        (_scene([one, *rest], positions), _scene([other, *rest], positions)),
        (f"there is a {_name(one)}", false),
    )


def _name(appearance: Appearance) -> str:
    return f"{COLOURS[appearance[0]]} {SHAPES[appearance[1]]}"


def _scene(appearances: list[Appearance], positions: list[int]) -> Scene:
    return tuple((*appearance, position) for appearance, position in zip(appearances, positions, strict=True))
