"""The hard variant of `shapes`: two to four objects, and sentences on where, how many, which colour, and not."""

import functools
import itertools

from mmfusion.data.builders.generate import bits
from mmfusion.data.builders.shapes.scenes import COLOURS, PLACES, SHAPES, Draw, Example, Scene, drawer, quad, sample

Kind = tuple[int, int]  # colour, shape
Pair = frozenset[Kind]
Candidate = tuple[tuple[Scene, Scene], tuple[str, str]]

KINDS = tuple(itertools.product(range(len(COLOURS)), range(len(SHAPES))))
NUMBERS = ("one", "two", "three")
RELATIONS = (("left of", "right of"), ("above", "below"))  # by axis: the lower coordinate first


@functools.cache
def held_out() -> frozenset[Pair]:
    """Returns the 54 of the 435 pairs of different kinds that only test pictures show, and only test sentences name."""
    pairs = [frozenset(pair) for pair in itertools.combinations(KINDS, 2)]
    return frozenset(sample(drawer(bits("shapes", "held-out pairs")), pairs, len(pairs) // 8))


def pairs_of(scene: Scene) -> set[Pair]:
    """Returns the pairs of different kinds that a scene shows."""
    return {frozenset(pair) for pair in itertools.combinations({(c, s) for c, s, _ in scene}, 2)}


def relations(split: str, examples: int) -> list[Example]:
    """Returns quads; no train scene shows a held-out pair, each test scene does, and is about it where it names two."""
    draw, result = drawer(bits("shapes", "relations", split)), []
    for number in range(examples // 4):
        make = (_spatial, _spatial, _count, _same_colour, _exists)[draw(5)]
        while not _belongs(candidate := make(draw), split, named=make is _spatial):
            pass
        result += quad(number, *candidate)
    return result


def _belongs(candidate: Candidate | None, split: str, named: bool) -> bool:
    if candidate is None:
        return False
    shown = [pairs_of(scene) & held_out() for scene in candidate[0]]
    if split == "train":
        return not any(shown)
    if named:
        return frozenset((c, s) for c, s, _ in candidate[0][0][:2]) in held_out()
    return all(shown)


def _spatial(draw: Draw) -> Candidate | None:
    """Two named objects that change places; None where they do not differ along the drawn axis."""
    kinds = sample(draw, KINDS, 2 + draw(3))
    places = sample(draw, range(len(PLACES)), len(kinds))
    axis = draw(2)
    first, second = (divmod(place, 3)[1 - axis] for place in places[:2])
    if first == second:
        return None
    relation, inverse = RELATIONS[axis] if first < second else RELATIONS[axis][::-1]
    one, other = _name(kinds[0]), _name(kinds[1])
    said = f"the {one} is {relation} the {other}"
    opposite = (
        f"the {one} is {inverse} the {other}",
        f"the {other} is {relation} the {one}",
        f"the {one} is not {relation} the {other}",
    )[draw(3)]
    swapped = [places[1], places[0], *places[2:]]
    return (_scene(kinds, places), _scene(kinds, swapped)), (said, opposite)


def _count(draw: Draw) -> Candidate:
    """Different numbers of objects that share a colour or a shape, among equally many objects."""
    by_shape = draw(2)
    value = draw(len((COLOURS, SHAPES)[by_shape]))
    total = 3 + draw(2)
    counts = sample(draw, (1, 2, 3), 2)
    inside = [kind for kind in KINDS if kind[by_shape] == value]
    outside = [kind for kind in KINDS if kind[by_shape] != value]

    def scene(count: int) -> Scene:
        kinds = [inside[draw(len(inside))] for _ in range(count)]
        kinds += [outside[draw(len(outside))] for _ in range(total - count)]
        return _scene(kinds, sample(draw, range(len(PLACES)), total))

    def sentence(count: int, no: str = "") -> str:
        thing = SHAPES[value] if by_shape else f"{COLOURS[value]} shape"
        plural = thing if count == 1 else thing + ("es" if thing.endswith("s") else "s")
        return f"there {'is' if count == 1 else 'are'} {no}{NUMBERS[count - 1]} {plural}"

    opposite = sentence(counts[1]) if draw(3) else sentence(counts[0], "not ")
    return (scene(counts[0]), scene(counts[1])), (sentence(counts[0]), opposite)


def _same_colour(draw: Draw) -> Candidate:
    """Three shapes, the first of the second's colour in one scene, of the third's in the other."""
    shapes = sample(draw, range(len(SHAPES)), 3 + draw(2))
    colour, another, any_colour = *sample(draw, range(len(COLOURS)), 2), draw(len(COLOURS))
    places = sample(draw, range(len(PLACES)), len(shapes))

    def scene(colours: tuple[int, ...]) -> Scene:
        return _scene(list(zip(colours, shapes, strict=False)), places)

    one, second, third = (SHAPES[shape] for shape in shapes[:3])
    opposite = (
        f"the {one} is not the same colour as the {second}",
        f"the {one} is the same colour as the {third}",
    )[draw(2)]
    return (
        (scene((colour, colour, another, any_colour)), scene((colour, another, colour, any_colour))),
        (f"the {one} is the same colour as the {second}", opposite),
    )


def _exists(draw: Draw) -> Candidate:
    """One object of another colour or shape, the others the same."""
    one = KINDS[draw(len(KINDS))]
    other = [kind for kind in KINDS if (kind[0] == one[0]) != (kind[1] == one[1])]
    other = other[draw(len(other))]
    rest = sample(draw, [kind for kind in KINDS if kind not in (one, other)], 1 + draw(3))
    places = sample(draw, range(len(PLACES)), 1 + len(rest))
    opposite = (f"there is a {_name(other)}", f"there is no {_name(one)}")[draw(2)]
    return (
        (_scene([one, *rest], places), _scene([other, *rest], places)),
        (f"there is a {_name(one)}", opposite),
    )


def _name(kind: Kind) -> str:
    return f"{COLOURS[kind[0]]} {SHAPES[kind[1]]}"


def _scene(kinds: list[Kind], places: list[int]) -> Scene:
    return tuple((*kind, place) for kind, place in zip(kinds, places, strict=True))
