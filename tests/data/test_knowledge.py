"""Knowledge graphs: triples from a file or word co-occurrence, entity linking, and the subgraph of a row."""

import json

import numpy as np
import pytest

from mmfusion.data import knowledge
from mmfusion.data.decoding import Reader
from mmfusion.data.modalities import MODALITY_TYPES
from tests.errors import rejects

TRIPLES = """Sparrow\tis a\tbird
house_sparrow\tis a\tsparrow

trout\tis a\tfish
bird\thas\twings
trout\tlives in\tfresh water
"""


def options(**changes):
    return {"kind": "knowledge", "feature": "text", **MODALITY_TYPES["knowledge"].options, **changes}


@pytest.fixture
def triples_file(tmp_path):
    path = tmp_path / "triples.tsv"
    path.write_text(TRIPLES)
    return path


@pytest.fixture
def graph(triples_file):
    return knowledge.from_triples(str(triples_file))


def test_knowledge_graph_is_read_from_a_triples_file(graph):
    assert graph.entities == ("sparrow", "bird", "house sparrow", "trout", "fish", "wings", "fresh water")
    assert graph.relations == ("is a", "has", "lives in")
    assert graph.triples == ((0, 0, 1), (2, 0, 0), (3, 0, 4), (1, 1, 5), (3, 2, 6))
    assert graph.neighbours[1] == {0: [3], 5: [1]}  # "sparrow is a bird" inverted: relation 0 + 3
    assert graph.parallel == 1


def test_link_prefers_the_longest_entity_name(graph):
    assert graph.link("A House-sparrow, a TROUT and a house sparrow in fresh  water!") == [2, 3, 6]
    assert graph.link("sparrows and house") == []
    assert graph.link("") == []


def test_encode_contains_linked_entities_and_their_neighbours(graph):
    x, mask = knowledge.encode({"text": "the trout and the sparrow"}, options(nodes=6), graph)
    assert x.shape == (6, 8) and x.dtype == np.int32 and mask.all()
    ids = (x[:, 0] - 1).tolist()
    assert ids[:2] == [3, 0]  # in order of mention
    assert ids[2:] == [4, 1, 6, 2]  # then their neighbours in turn, in the file's order
    assert x[:, 1].tolist() == [1, 1, 0, 0, 0, 0]
    for i, one in enumerate(ids):
        for j, other in enumerate(ids):
            assert x[i, 2 + j] == graph.neighbours[one].get(other, [-1])[0] + 1
    assert x[0, 2 + ids.index(4)] == 1 and x[ids.index(4), 2] == 4  # "is a" and its inverse
    small, mask = knowledge.encode({"text": "trout"}, options(nodes=8), graph)
    assert mask.tolist() == [True] * 3 + [False] * 5 and not small[3:].any()
    assert knowledge.encode({"text": "a horse"}, options(), graph) is None


def test_encode_keeps_parallel_relations(triples_file):
    triples_file.write_text(TRIPLES + "bird\tgrows\twings\nwings\tlift\tbird\nbird\tgrows\twings\n")
    graph = knowledge.from_triples(str(triples_file))
    # The relations has, grows and (inverse) lift; duplicates are removed.
    assert graph.neighbours[1][5] == [1, 3, 4 + 5] and graph.parallel == 3
    config = options(triples=str(triples_file), nodes=4)
    assert MODALITY_TYPES["knowledge"].shape(config, graph) == ((4, 2 + 3 * 4), np.int32, 4)
    x, _ = knowledge.encode({"text": "a bird and a trout"}, config, graph)
    assert (x[:, 0] - 1).tolist() == [1, 3, 0, 4]  # no position is left for "wings"
    x, _ = knowledge.encode({"text": "wings"}, config, graph)
    planes = x[:, 2:].reshape(4, 3, 4)  # [N, P, N]
    assert (x[:2, 0] - 1).tolist() == [5, 1]
    assert planes[0, :, 1].tolist() == [1 + 5 + 1, 3 + 5 + 1, 4 + 1] and planes[1, :, 0].tolist() == [2, 4, 10]
    assert not planes[0, :, 0].any() and not planes[2:].any()


def test_co_occurrence_links_words_by_mutual_information():
    # "a" and "b" always co-occur, "c" occurs alone; "the" is in more than half of the texts, "x" in too few.
    texts = ["the a b"] * 5 + ["the c"] * 5 + ["a x b", "c"] + ["d"] * 4
    graph = knowledge.co_occurrence(texts, 10)
    assert set(graph.entities) == {"a", "b", "c", "d", "x"}
    assert graph.triples == ((graph.entities.index("a"), 0, graph.entities.index("b")),)
    assert graph.relations == (knowledge.CO_OCCURS,)
    assert knowledge.co_occurrence(texts, 2).entities == ("a", "b")
    assert knowledge.co_occurrence(reversed(texts), 10) == graph
    apart = ["a b"] * 3 + ["a"] * 7 + ["b"] * 7 + ["c"] * 3  # co-occur less often than by chance
    assert knowledge.co_occurrence(apart, 10).triples == ()


def test_fitted_graph_can_be_saved_and_loaded(triples_file):
    rows = [{"text": "a bird", "more": "fish"}, {"text": "none", "more": ""}]
    kind, config = MODALITY_TYPES["knowledge"], options(triples=str(triples_file), feature="text+more", nodes=4)
    fitted = kind.load(kind.fit(rows, config))
    assert fitted == knowledge.from_triples(str(triples_file))
    assert kind.encoder_kwargs(config, fitted) == {"entities": 7, "relations": 6}
    assert kind.shape(config, fitted) == ((4, 6), np.int32, 4)
    x, mask = kind.decode(rows[0], config, fitted)
    assert (x[mask][:2, 0] - 1).tolist() == [1, 4]
    assert kind.decode({"text": None, "more": b"  "}, config, fitted) is None
    co_occurrence = kind.load(kind.fit([{"text": "a b"}] * 4 + [{"text": "c"}] * 6, options()))
    assert co_occurrence.entities == ("a", "b")


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        ("a\tb\n", r"line 1 is not head TAB relation TAB tail: 'a\tb'"),
        ("a\tis\tb\n a is b\n", "line 2"),
        ("a\t \tb\n", "line 1"),
        ("\n", "no triple"),
        ("x\tis\ty\n", "first entities are x, y"),
    ],
)
def test_fit_rejects_an_invalid_triples_file(content, fact, tmp_path):
    path = tmp_path / "invalid.tsv"
    path.write_text(content)
    with rejects(path, says=fact):
        knowledge.fit([{"text": "a bird"}], options(triples=str(path)))


def test_fit_rejects_a_missing_triples_file(tmp_path):
    with rejects(tmp_path / "none.tsv", says="cannot be read"):
        knowledge.fit([{"text": "a"}], options(triples=str(tmp_path / "none.tsv")))


def test_reader_links_class_names_to_entities(triples_file):
    config = options(triples=str(triples_file), feature="label+text")
    reader = Reader(
        {"known": config}, {}, {}, {"known": knowledge.from_triples(str(triples_file))}, {"label": ("Trout", "none")}
    )
    x, mask = reader.read({"label": np.int64(0), "text": "a bird"}, 0)[0]["known"]
    assert (x[mask][:2, 0] - 1).tolist() == [3, 1]
    assert reader.read({"label": 1, "text": ""}, 0)[0]["known"] is None
    assert reader.read({"label": "trout", "text": ""}, 0)[0]["known"] is not None  # as in a table for prediction


def test_fit_returns_json():
    assert json.loads(knowledge.fit([{"text": "a b"}] * 3 + [{"text": "c"}] * 5, options()))[1] == ["with"]
