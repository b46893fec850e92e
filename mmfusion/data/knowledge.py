"""Knowledge graphs: the entities that a row mentions, and their relations.

The graph is read from a file of triples, or built from co-occurrences of words in the training rows.

N nodes · P parallel relations between two entities
"""

import dataclasses
import functools
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mmfusion.data.modality_type import Decoded, ModalityType, Options
from mmfusion.data.regular_files import read_text
from mmfusion.data.text import as_string
from mmfusion.errors import UserError

CO_OCCURS = "with"  # the relation of co-occurring words
MIN_COUNT = 3  # minimum number of rows in which related words co-occur
TRIPLES_BYTES = 1 << 30
OPTIONS = {
    "triples": "",  # a file with lines head TAB relation TAB tail; empty: co-occurrences in the training rows
    "entities": 500,  # without a file, the maximum number of entities
    "nodes": 16,  # maximum number of entities per row: those that it mentions, then their neighbours
}
WORD = re.compile(r"\w+")


@dataclasses.dataclass(frozen=True)
class Graph:
    """A knowledge graph: entities, relations, and triples of their ids (head, relation, tail).

    Attributes:
      entities: lower-case names, with words separated by one space.
      relations: names.
      triples: edges, each of which is used in both directions, as a relation and as its inverse.
    """

    entities: tuple[str, ...]
    relations: tuple[str, ...]
    triples: tuple[tuple[int, int, int], ...]

    @functools.cached_property
    def entity_ids(self) -> dict[tuple[str, ...], int]:
        """The id of each entity, by the words of its name."""
        return {tuple(name.split()): i for i, name in enumerate(self.entities)}

    @functools.cached_property
    def longest_name(self) -> int:
        """The maximum number of words in a name."""
        return max((len(words) for words in self.entity_ids), default=0)

    @functools.cached_property
    def neighbours(self) -> dict[int, dict[int, list[int]]]:
        """Entity -> neighbour -> their relations: r, or r + len(relations) for the inverse."""
        result: dict[int, dict[int, list[int]]] = {}
        for head, relation, tail in dict.fromkeys(self.triples):
            result.setdefault(head, {}).setdefault(tail, []).append(relation)
            result.setdefault(tail, {}).setdefault(head, []).append(relation + len(self.relations))
        return result

    @functools.cached_property
    def parallel(self) -> int:
        """P: the maximum number of relations between two entities, at least 1."""
        return max((len(relations) for linked in self.neighbours.values() for relations in linked.values()), default=1)

    def link(self, text: str) -> list[int]:
        """Returns the distinct entities that a text mentions, in order; overlapping names match the longest."""
        words, found, position = words_of(text), {}, 0
        while position < len(words):
            for count in range(min(self.longest_name, len(words) - position), 0, -1):
                entity = self.entity_ids.get(tuple(words[position : position + count]))
                if entity is not None:
                    found[entity] = None
                    position += count - 1
                    break
            position += 1
        return list(found)


def words_of(text: str) -> list[str]:
    """Returns the lower-case words of a text; `_` also separates words."""
    return WORD.findall(text.lower().replace("_", " "))


def fit(rows: Sequence[Mapping[str, str]], options: Options) -> str:
    """Returns the graph as JSON, from the file `options["triples"]` or from co-occurrences in the rows.

    Raises:
      UserError: the file cannot be read, a line is not a triple, or the rows mention no entity.
    """
    texts = [" ".join(row.values()) for row in rows]
    path = options["triples"]
    graph = from_triples(path) if path else co_occurrence(texts, options["entities"])
    if not any(graph.link(text) for text in texts):
        first = ", ".join(graph.entities[:3]) or "none"
        source = "the file" if path else "its words"
        raise UserError(f"no training row mentions an entity of {source}; its first entities are {first}", path=path)
    return json.dumps([graph.entities, graph.relations, graph.triples])


def load(saved: str) -> Graph:
    """Returns the graph from the output of `fit`."""
    entities, relations, triples = json.loads(saved)
    return Graph(tuple(entities), tuple(relations), tuple(tuple(triple) for triple in triples))


def from_triples(path: str) -> Graph:
    """Returns the graph of a file with lines `head TAB relation TAB tail`; empty lines are ignored.

    Raises:
      UserError: the file cannot be read, or a line is not a triple.
    """
    try:
        lines = read_text(path, TRIPLES_BYTES).splitlines()
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a NUL character in the path
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"the triples cannot be read: {reason}", path=path) from error
    entities: dict[str, int] = {}
    relations: dict[str, int] = {}
    triples = []
    for line_number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        columns = line.split("\t")
        names = [" ".join(words_of(column)) for column in columns]
        if len(columns) != 3 or not all(names):
            raise UserError(f"line {line_number} is not head TAB relation TAB tail: {line[:80]!r}", path=path)
        head, tail = (entities.setdefault(name, len(entities)) for name in (names[0], names[2]))
        triples.append((head, relations.setdefault(names[1], len(relations)), tail))
    if not triples:
        raise UserError("the file has no triple", path=path)
    return Graph(tuple(entities), tuple(relations), tuple(triples))


def co_occurrence(texts: Iterable[str], limit: int) -> Graph:
    """Returns the graph of words that co-occur in texts more often than by chance.

    Its entities are the `limit` most frequent words that occur in at most half of the texts. Two entities are related
    if they co-occur in at least 3 texts and their pointwise mutual information (Church & Hanks, 1990) is positive;
    triples are sorted by decreasing mutual information.
    """
    vocabularies = [sorted(set(words_of(text))) for text in texts]
    counts = Counter(itertools.chain.from_iterable(vocabularies))
    kept = [word for word, n in counts.items() if 2 * n <= len(vocabularies)]
    kept.sort(key=lambda word: (-counts[word], word))
    ids = {word: i for i, word in enumerate(kept[:limit])}
    pairs: Counter = Counter()
    for words in vocabularies:
        pairs.update(itertools.combinations([ids[word] for word in words if word in ids], 2))
    mutual_information = {
        (min(pair), max(pair)): math.log(n * len(vocabularies) / (counts[kept[pair[0]]] * counts[kept[pair[1]]]))
        for pair, n in pairs.items()
        if n >= MIN_COUNT
    }
    related = sorted(
        (pair for pair, value in mutual_information.items() if value > 0),
        key=lambda pair: (-mutual_information[pair], pair),
    )
    return Graph(tuple(ids), (CO_OCCURS,), tuple((head, 0, tail) for head, tail in related))


def encode(value: Mapping[str, str], options: Options, graph: Graph) -> Decoded:
    """Returns the entities that a row mentions and as many of their neighbours as fit.

    Returns:
      Nodes `[N, 2 + P · N]` int32: the entity's id plus 1; 1 if the row mentions it; then, P times, the relation to
      each node plus 1, or 0 for none. The mask of the nodes `[N]`. None if the row mentions no entity.
    """
    limit = options["nodes"]
    mentioned = graph.link(" ".join(value.values()))[:limit]
    if not mentioned:
        return None
    nodes = dict.fromkeys(mentioned)
    neighbours = [list(graph.neighbours.get(entity, ())) for entity in mentioned]
    # Round robin, so that the neighbours of all mentioned entities are represented.
    for entity in itertools.chain.from_iterable(itertools.zip_longest(*neighbours)):
        if entity is not None and len(nodes) < limit:
            nodes[entity] = None
    x = np.zeros((limit, 2 + graph.parallel * limit), np.int32)
    for i, entity in enumerate(nodes):
        x[i, :2] = entity + 1, entity in mentioned
        for j, other in enumerate(nodes):
            for p, relation in enumerate(graph.neighbours.get(entity, {}).get(other, ())):
                x[i, 2 + p * limit + j] = relation + 1
    return x, np.arange(limit) < len(nodes)


def _texts(value: Mapping[str, Any]) -> dict[str, str]:
    return {name: as_string(text) for name, text in value.items()}


def _shape(options: Options, graph: Graph) -> tuple[tuple[int, ...], Any, int]:
    return (options["nodes"], 2 + graph.parallel * options["nodes"]), np.int32, options["nodes"]


def _decode(value: Mapping[str, Any], options: Options, graph: Graph) -> Decoded:
    return encode(_texts(value), options, graph)


def _fit(values: Sequence[Mapping[str, Any]], options: Options) -> str:
    return fit([_texts(value) for value in values], options)


def _encoder_kwargs(options: Options, graph: Graph) -> dict[str, Any]:
    return {"entities": len(graph.entities), "relations": 2 * len(graph.relations)}


TYPE = ModalityType(
    OPTIONS,
    _shape,
    _decode,
    fit=_fit,
    load=load,
    encoder_kwargs=_encoder_kwargs,
    takes=("text", "bytes", "class", "number"),
    several_features=True,
    class_names=True,
)
