import functools
import hashlib
import itertools
import re
import subprocess
import sys
from collections import Counter, defaultdict

import numpy as np
import pytest

from mmfusion.data.builders.generate import bits
from mmfusion.data.builders.shapes import relations, render, scenes, shapes_dataset_builder
from mmfusion.data.builders.shapes.scenes import COLOURS, POSITIONS, SHAPES
from tests.data.prepare import prepare, rows

SPLITS = ("train", "test")
# of the rows of shapes/match, cut to 120 in train; changes only with a new VERSION
MATCH_DIGEST = "e91092134bfa1a4e3bf4607f819280f3c2b21ade943f13c00e10a5c72bad3cce"


@pytest.fixture
def small_shapes(monkeypatch):
    small = {
        name: (make, names, (120, 24), what) for name, (make, names, _, what) in shapes_dataset_builder.VARIANTS.items()
    }
    monkeypatch.setattr(shapes_dataset_builder, "VARIANTS", small)


@pytest.mark.parametrize("variant", shapes_dataset_builder.VARIANTS)
def test_shapes_prepare_and_read(variant, tmp_path, small_shapes):
    builder = prepare(f"shapes/{variant}", tmp_path)
    ids = set()
    for split, n in (("train", 120), ("test", 24)):
        read = rows(builder, split)
        assert len(read) == n
        ids |= {row["id"] for row in read}
        for row in read:
            assert row["image"].shape == (32, 32, 3) and row["image"].dtype == np.uint8
            assert row["sentence"] and row["group"].startswith(split.encode())
        labels = Counter(row["label"] for row in read)
        assert set(labels.values()) == {n // builder.info.features["label"].num_classes}
    assert len(ids) == 144


def test_shapes_rows_are_the_same_everywhere(tmp_path, small_shapes):
    digests = []
    for folder in ("a", "b"):
        digest = hashlib.sha256()
        for row in rows(prepare("shapes/match", tmp_path / folder), "train"):
            digest.update(row["id"] + row["group"] + row["sentence"] + bytes([row["label"]]) + row["image"].tobytes())
        digests.append(digest.hexdigest())
    assert digests == [MATCH_DIGEST] * 2


@pytest.mark.process
def test_no_tensorflow(tmp_path):
    code = (
        "import sys, tensorflow_datasets as tfds, mmfusion.data.builders\n"
        "from mmfusion.data.builders.shapes import shapes_dataset_builder as s\n"
        "s.VARIANTS['match'] = (*s.VARIANTS['match'][:2], (40, 8), '')\n"
        "from importlib.machinery import PathFinder\n"
        "find = PathFinder.find_spec\n"
        "hide = lambda name, *a: None if name.partition('.')[0] == 'tensorflow' else find(name, *a)\n"
        "PathFinder.find_spec = hide\n"
        f"b = tfds.builder('shapes/match', data_dir={str(tmp_path)!r})\n"
        "b.download_and_prepare(file_format='array_record')\n"
        "print(len(b.as_data_source('test')), b.as_data_source('test')[0]['image'].shape)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().endswith("8 (32, 32, 3)")


@functools.cache
def examples(variant: str, split: str) -> list[scenes.Example]:
    make, _, sizes, _ = shapes_dataset_builder.VARIANTS[variant]
    return make(split, sizes[SPLITS.index(split)])


def parse(sentence: str) -> tuple[int, int, int]:
    """The combination a one-object sentence names."""
    place = max((p for p in POSITIONS if re.search(rf"\b{p}\b", sentence)), key=len)
    (colour,) = (c for c in COLOURS if c in sentence.split())
    (shape,) = (s for s in SHAPES if s in sentence.split())
    return COLOURS.index(colour), SHAPES.index(shape), POSITIONS.index(place)


@pytest.mark.parametrize("variant", ["match", "relations"])
@pytest.mark.parametrize("split", SPLITS)
def test_shapes_match_needs_both_modalities(variant, split):
    made = examples(variant, split)
    for key in (lambda e: e.image, lambda e: e.scene, lambda e: e.sentence, lambda e: e.group):
        labels = defaultdict(Counter)
        for example in made:
            labels[key(example)][example.label] += 1
        assert all(count[0] == count[1] for count in labels.values())


@pytest.mark.parametrize("split", SPLITS)
def test_match_labels_are_true_of_the_scene(split):
    made = examples("match", split)
    assert all(e.label == (parse(e.sentence) == e.scene[0]) for e in made)
    wrong = [np.not_equal(parse(e.sentence), e.scene[0]) for e in made if not e.label]
    assert 0.65 < np.mean([sum(w) == 1 for w in wrong]) < 0.8
    assert min(np.sum([w for w in wrong if sum(w) == 1], axis=0)) > len(wrong) / 8  # every attribute must be heard


def test_held_out_combinations_are_only_in_test():
    train, test = (set(scenes.combinations(split)) for split in SPLITS)
    assert len(train) == 216 and len(test) == 54 and not train & test
    for a, b in itertools.combinations(range(3), 2):  # every pair of attributes is seen in train
        assert len({(c[a], c[b]) for c in train}) == scenes.SIZES[a] * scenes.SIZES[b]
    for variant in ("match", "redundant", "image_only", "text_only"):
        for split, allowed in zip(SPLITS, (train, test), strict=True):
            made = examples(variant, split)
            assert {o for e in made for o in e.scene} | {parse(e.sentence) for e in made} <= allowed
            if variant == "match":
                assert {e.scene[0] for e in made} == allowed


@pytest.mark.parametrize("split", SPLITS)
def test_class_variants(split):
    for e in examples("redundant", split):
        assert e.label == e.scene[0][0] and parse(e.sentence) == e.scene[0]
    for variant in ("image_only", "text_only"):
        made = examples(variant, split)
        other = defaultdict(Counter)  # the modality that must tell nothing
        for e in made:
            assert e.label == (e.scene[0][0] if variant == "image_only" else parse(e.sentence)[0])
            other[e.sentence if variant == "image_only" else e.image][e.label] += 1
        assert all(len(set(count.values())) == 1 and len(count) == 6 for count in other.values())
    for variant in ("redundant", "image_only", "text_only"):
        assert len(set(Counter(e.label for e in examples(variant, split)).values())) == 1


def holds(sentence: str, scene: scenes.Scene) -> bool:
    """Whether a sentence of `relations` is true, written without looking at how it was made."""
    positive = re.sub(r"\bnot ", "", sentence)
    if positive != sentence:
        return not holds(positive, scene)
    if m := re.fullmatch(r"the (\w+) (\w+) is (left of|right of|above|below) the (\w+) (\w+)", sentence):
        (a,) = (p for c, s, p in scene if (COLOURS[c], SHAPES[s]) == m.group(1, 2))
        (b,) = (p for c, s, p in scene if (COLOURS[c], SHAPES[s]) == m.group(4, 5))
        (row, column), (other_row, other_column) = divmod(a, 3), divmod(b, 3)
        return {
            "left of": column < other_column,
            "right of": column > other_column,
            "above": row < other_row,
            "below": row > other_row,
        }[m.group(3)]
    if m := re.fullmatch(r"the (\w+) is the same colour as the (\w+)", sentence):
        colours = [[c for c, s, _ in scene if SHAPES[s] == name] for name in m.groups()]
        assert len(colours[0]) == len(colours[1]) == 1  # "the circle" must be the only one
        return colours[0] == colours[1]
    if m := re.fullmatch(r"there (?:is|are) (one|two|three) (?:(\w+) shapes?|(\w+?)(?:s|es)?)", sentence):
        number, colour, shape = m.groups()
        shape = shape and min((s for s in SHAPES if s.startswith(shape)), key=len)
        count = sum(COLOURS[c] == colour if colour else SHAPES[s] == shape for c, s, _ in scene)
        return count == ("one", "two", "three").index(number) + 1
    m = re.fullmatch(r"there is (a|no) (\w+) (\w+)", sentence)
    there = any((COLOURS[c], SHAPES[s]) == m.group(2, 3) for c, s, _ in scene)
    return there == (m.group(1) == "a")


@pytest.mark.parametrize("split", SPLITS)
def test_relations_labels_are_true_of_the_scene(split):
    made = examples("relations", split)
    for e in made:
        assert e.label == holds(e.sentence, e.scene), e
        assert 2 <= len(e.scene) <= 4 and len({p for *_, p in e.scene}) == len(e.scene)
    said = " ".join(e.sentence for e in made)
    for words in ("left of", "right of", "above", "below", "not", "no", "one", "two", "three", "same colour as"):
        assert words in said


def test_relations_holds_out_pairs():
    held_out = relations.held_out()
    assert len(held_out) == 54
    for split in SPLITS:
        for e in examples("relations", split):
            assert bool(relations.pairs_of(e.scene) & held_out) == (split == "test")
            named = re.findall(rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})", e.sentence)
            if len(named) == 2:
                pair = frozenset((COLOURS.index(c), SHAPES.index(s)) for c, s in named)
                assert (pair in held_out) == (split == "test")
    kinds = {(c, s) for e in examples("relations", "train") for c, s, _ in e.scene}
    assert kinds == set(relations.APPEARANCES)


def test_render_draws_the_scene():
    everything = [((c, s, p),) for c, s, p in itertools.product(range(6), range(5), range(9))]
    pictures = render.render(everything, bits("test")).astype(int)
    outlines = defaultdict(set)
    for ((colour, shape, place),), picture in zip(everything, pictures, strict=True):
        painted = np.ptp(picture, axis=-1) > 2 * render.NOISE + 1  # the ground is grey but for the noise
        y, x = np.nonzero(painted)
        assert [round(v / 8.5) for v in (y.mean() - 7, x.mean() - 7)] == list(divmod(place, 3))
        mean = picture[painted].mean(0)
        assert np.argmin(np.abs(render.PALETTE - mean).sum(-1)) == colour
        outlines[shape].add(painted[y.min() : y.max() + 1, x.min() : x.max() + 1].tobytes())
    assert all(len(drawn) == 2 for drawn in outlines.values())  # two sizes
    assert len(set().union(*outlines.values())) == 10  # and no two shapes alike
