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
# SHA-256 of the 120 train rows of the reduced shapes/match; changes only with a new VERSION.
MATCH_DIGEST = "e91092134bfa1a4e3bf4607f819280f3c2b21ade943f13c00e10a5c72bad3cce"


@pytest.fixture
def small_shapes(monkeypatch):
    small = {
        name: (make, names, (120, 24), doc) for name, (make, names, _, doc) in shapes_dataset_builder.VARIANTS.items()
    }
    monkeypatch.setattr(shapes_dataset_builder, "VARIANTS", small)


@pytest.mark.parametrize("variant", shapes_dataset_builder.VARIANTS)
def test_shapes_variants_can_be_prepared_and_read(variant, tmp_path, small_shapes):
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


def test_shapes_rows_are_platform_independent(tmp_path, small_shapes):
    digests = []
    for folder in ("a", "b"):
        digest = hashlib.sha256()
        for row in rows(prepare("shapes/match", tmp_path / folder), "train"):
            digest.update(row["id"] + row["group"] + row["sentence"] + bytes([row["label"]]) + row["image"].tobytes())
        digests.append(digest.hexdigest())
    assert digests == [MATCH_DIGEST] * 2


@pytest.mark.process
def test_shapes_can_be_prepared_without_tensorflow(tmp_path):
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
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-2000:]
    assert process.stdout.strip().endswith("8 (32, 32, 3)")


@functools.cache
def examples(variant: str, split: str) -> list[scenes.Example]:
    make, _, sizes, _ = shapes_dataset_builder.VARIANTS[variant]
    return make(split, sizes[SPLITS.index(split)])


def parse(sentence: str) -> tuple[int, int, int]:
    """Returns the (colour, shape, position) indices in a one-object sentence."""
    position = max((p for p in POSITIONS if re.search(rf"\b{p}\b", sentence)), key=len)
    (colour,) = (c for c in COLOURS if c in sentence.split())
    (shape,) = (s for s in SHAPES if s in sentence.split())
    return COLOURS.index(colour), SHAPES.index(shape), POSITIONS.index(position)


@pytest.mark.parametrize("variant", ["match", "relations"])
@pytest.mark.parametrize("split", SPLITS)
def test_shapes_match_and_relations_need_both_modalities(variant, split):
    split_examples = examples(variant, split)
    for key in (lambda e: e.image, lambda e: e.scene, lambda e: e.sentence, lambda e: e.group):
        labels = defaultdict(Counter)
        for example in split_examples:
            labels[key(example)][example.label] += 1
        assert all(count[0] == count[1] for count in labels.values())


@pytest.mark.parametrize("split", SPLITS)
def test_shapes_match_labels_are_correct(split):
    split_examples = examples("match", split)
    assert all(e.label == (parse(e.sentence) == e.scene[0]) for e in split_examples)
    mismatches = [np.not_equal(parse(e.sentence), e.scene[0]) for e in split_examples if not e.label]
    assert 0.65 < np.mean([sum(w) == 1 for w in mismatches]) < 0.8
    # Every attribute is needed.
    assert min(np.sum([w for w in mismatches if sum(w) == 1], axis=0)) > len(mismatches) / 8


def test_shapes_held_out_combinations_are_only_in_test():
    train, test = (set(scenes.combinations(split)) for split in SPLITS)
    assert len(train) == 216 and len(test) == 54 and not train & test
    for a, b in itertools.combinations(range(3), 2):  # every pair of attributes occurs in train
        assert len({(c[a], c[b]) for c in train}) == scenes.SIZES[a] * scenes.SIZES[b]
    for variant in ("match", "redundant", "image_only", "text_only"):
        for split, allowed in zip(SPLITS, (train, test), strict=True):
            split_examples = examples(variant, split)
            assert {o for e in split_examples for o in e.scene} | {parse(e.sentence) for e in split_examples} <= allowed
            if variant == "match":
                assert {e.scene[0] for e in split_examples} == allowed


@pytest.mark.parametrize("split", SPLITS)
def test_shapes_class_variants_have_their_informative_modality(split):
    for e in examples("redundant", split):
        assert e.label == e.scene[0][0] and parse(e.sentence) == e.scene[0]
    for variant in ("image_only", "text_only"):
        split_examples = examples(variant, split)
        uninformative = defaultdict(Counter)  # the modality independent of the label
        for e in split_examples:
            assert e.label == (e.scene[0][0] if variant == "image_only" else parse(e.sentence)[0])
            uninformative[e.sentence if variant == "image_only" else e.image][e.label] += 1
        assert all(len(set(count.values())) == 1 and len(count) == 6 for count in uninformative.values())
    for variant in ("redundant", "image_only", "text_only"):
        assert len(set(Counter(e.label for e in examples(variant, split)).values())) == 1


def is_true(sentence: str, scene: scenes.Scene) -> bool:
    """Returns whether a sentence of `relations` is true, independently of the implementation."""
    positive = re.sub(r"\bnot ", "", sentence)
    if positive != sentence:
        return not is_true(positive, scene)
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
        assert len(colours[0]) == len(colours[1]) == 1  # "the circle" must be unique
        return colours[0] == colours[1]
    if m := re.fullmatch(r"there (?:is|are) (one|two|three) (?:(\w+) shapes?|(\w+?)(?:s|es)?)", sentence):
        number, colour, shape = m.groups()
        shape = shape and min((s for s in SHAPES if s.startswith(shape)), key=len)
        count = sum(COLOURS[c] == colour if colour else SHAPES[s] == shape for c, s, _ in scene)
        return count == ("one", "two", "three").index(number) + 1
    m = re.fullmatch(r"there is (a|no) (\w+) (\w+)", sentence)
    exists = any((COLOURS[c], SHAPES[s]) == m.group(2, 3) for c, s, _ in scene)
    return exists == (m.group(1) == "a")


@pytest.mark.parametrize("split", SPLITS)
def test_shapes_relations_labels_are_correct(split):
    split_examples = examples("relations", split)
    for e in split_examples:
        assert e.label == is_true(e.sentence, e.scene), e
        assert 2 <= len(e.scene) <= 4 and len({p for *_, p in e.scene}) == len(e.scene)
    sentences = " ".join(e.sentence for e in split_examples)
    for phrase in ("left of", "right of", "above", "below", "not", "no", "one", "two", "three", "same colour as"):
        assert phrase in sentences


def test_shapes_relations_hold_out_pairs():
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


def test_shapes_render_shows_colour_shape_and_position():
    single_objects = [((c, s, p),) for c, s, p in itertools.product(range(6), range(5), range(9))]
    images = render.render(single_objects, bits("test")).astype(int)
    outlines = defaultdict(set)
    for ((colour, shape, position),), image in zip(single_objects, images, strict=True):
        painted = np.ptp(image, axis=-1) > 2 * render.NOISE + 1  # the background is grey up to noise
        y, x = np.nonzero(painted)
        assert [round(v / 8.5) for v in (y.mean() - 7, x.mean() - 7)] == list(divmod(position, 3))
        mean = image[painted].mean(0)
        assert np.argmin(np.abs(render.PALETTE - mean).sum(-1)) == colour
        outlines[shape].add(painted[y.min() : y.max() + 1, x.min() : x.max() + 1].tobytes())
    assert all(len(sizes) == 2 for sizes in outlines.values())  # two sizes
    assert len(set().union(*outlines.values())) == 10  # all shapes differ
