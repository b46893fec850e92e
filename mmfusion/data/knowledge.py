"""Knowledge as a modality: the entities that a row names, and what a graph of triples says of them.

The graph is a file of triples, or what training's rows show: which words occur together.

N nodes
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
from etils import epath

from mmfusion.errors import UserError

TOGETHER = "with"  # the relation of words that occur together
SEEN = 3  # rows in which words must occur together
WORD = re.compile(r"\w+")


@dataclasses.dataclass(frozen=True)
class Graph:
    """Entities, the relations between them, and triples of numbers (head, relation, tail).

    Attributes:
      entities: names in small letters, words divided by one space.
      relations: names.
      triples: each is read both ways, as a relation and as its inverse.
    """

    entities: tuple[str, ...]
    relations: tuple[str, ...]
    triples: tuple[tuple[int, int, int], ...]

    @functools.cached_property
    def number(self) -> dict[tuple[str, ...], int]:
        """The number of each entity, by its words."""
        return {tuple(name.split()): i for i, name in enumerate(self.entities)}

    @functools.cached_property
    def longest(self) -> int:
        """The most words of a name."""
        return max((len(words) for words in self.number), default=0)

    @functools.cached_property
    def neighbours(self) -> dict[int, dict[int, list[int]]]:
        """Of each entity its neighbours and how they are related: r from 0 on, or its inverse, r + len(relations)."""
        result: dict[int, dict[int, list[int]]] = {}
        for head, relation, tail in dict.fromkeys(self.triples):
            result.setdefault(head, {}).setdefault(tail, []).append(relation)
            result.setdefault(tail, {}).setdefault(head, []).append(relation + len(self.relations))
        return result

    @functools.cached_property
    def parallel(self) -> int:
        """The most relations between two entities, at least 1."""
        return max((len(kinds) for around in self.neighbours.values() for kinds in around.values()), default=1)

    def link(self, text: str) -> list[int]:
        """Returns the entities that a text names, in order, each once; of overlapping names the longest."""
        words, found, place = words_of(text), {}, 0
        while place < len(words):
            for count in range(min(self.longest, len(words) - place), 0, -1):
                entity = self.number.get(tuple(words[place : place + count]))
                if entity is not None:
                    found[entity] = None
                    place += count - 1
                    break
            place += 1
        return list(found)


def words_of(text: str) -> list[str]:
    """Returns the words of a text in small letters; `_` divides them, too."""
    return WORD.findall(text.lower().replace("_", " "))


def fit(rows: Sequence[Mapping[str, str]], options: Mapping[str, Any]) -> str:
    """Returns the graph as JSON: of `options["triples"]`, or of the rows' words, up to `options["entities"]` of them.

    Raises:
      UserError: the file cannot be read, a line is no triple, or the rows name no entity.
    """
    texts = [" ".join(row.values()) for row in rows]
    path = options["triples"]
    graph = from_triples(path) if path else co_occurrence(texts, options["entities"])
    if not any(graph.link(text) for text in texts):
        raise UserError(
            f"no training row names an entity of {path or 'its words'}: "
            f"the first ones are {', '.join(graph.entities[:3]) or 'none'}"
        )
    return json.dumps([graph.entities, graph.relations, graph.triples])


def load(saved: str) -> Graph:
    """Returns the graph that `fit` wrote."""
    entities, relations, triples = json.loads(saved)
    return Graph(tuple(entities), tuple(relations), tuple(tuple(one) for one in triples))


def from_triples(path: str) -> Graph:
    """Reads a graph from a file of lines `head TAB relation TAB tail`; empty lines are passed over.

    Raises:
      UserError: the file cannot be read, or a line is no triple.
    """
    try:
        lines = epath.Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the triples {path} cannot be read: {error}") from error
    entities: dict[str, int] = {}
    relations: dict[str, int] = {}
    triples = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        parts = line.split("\t")
        names = [" ".join(words_of(part)) for part in parts]
        if len(parts) != 3 or not all(names):
            raise UserError(f"{path}, line {number}: a triple is head TAB relation TAB tail, this is {line[:80]!r}")
        head, tail = (entities.setdefault(name, len(entities)) for name in (names[0], names[2]))
        triples.append((head, relations.setdefault(names[1], len(relations)), tail))
    if not triples:
        raise UserError(f"{path} holds no triple")
    return Graph(tuple(entities), tuple(relations), tuple(triples))


def co_occurrence(texts: Iterable[str], most: int) -> Graph:
    """Returns the graph of words that occur in one text more often than by chance.

    Its entities are the `most` frequent words that are in at most half of the texts; two are linked where they occur
    together in at least 3 texts and their pointwise mutual information is positive, the strongest links first (Church &
    Hanks, 1990).
    """
    each = [sorted(set(words_of(text))) for text in texts]
    counts = Counter(itertools.chain.from_iterable(each))
    kept = sorted((word for word, n in counts.items() if 2 * n <= len(each)), key=lambda word: (-counts[word], word))
    number = {word: i for i, word in enumerate(kept[:most])}
    pairs: Counter = Counter()
    for words in each:
        pairs.update(itertools.combinations([number[word] for word in words if word in number], 2))
    strength = {
        (min(pair), max(pair)): math.log(n * len(each) / (counts[kept[pair[0]]] * counts[kept[pair[1]]]))
        for pair, n in pairs.items()
        if n >= SEEN
    }
    linked = sorted((pair for pair, value in strength.items() if value > 0), key=lambda pair: (-strength[pair], pair))
    return Graph(tuple(number), (TOGETHER,), tuple((head, 0, tail) for head, tail in linked))


def read(value: Mapping[str, str], options: Mapping[str, Any], graph: Graph) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns what a row knows: the entities that it names, and as many of their neighbours as fit.

    Returns:
      `[N, 2 + P · N]` int32: an entity's number from 1 on; 1 where the row names it; then P times, P the graph's most
      parallel relations, a relation to each node, from 1 on, or 0; and which nodes are real `[N]`. None where the row
      names nothing.
    """
    most = options["nodes"]
    named = graph.link(" ".join(value.values()))[:most]
    if not named:
        return None
    nodes = dict.fromkeys(named)
    rings = [list(graph.neighbours.get(entity, ())) for entity in named]
    for entity in itertools.chain.from_iterable(itertools.zip_longest(*rings)):  # by turns, so that each has some
        if entity is not None and len(nodes) < most:
            nodes[entity] = None
    x = np.zeros((most, 2 + graph.parallel * most), np.int32)
    for i, entity in enumerate(nodes):
        x[i, :2] = entity + 1, entity in named
        for j, other in enumerate(nodes):
            for p, relation in enumerate(graph.neighbours.get(entity, {}).get(other, ())):
                x[i, 2 + p * most + j] = relation + 1
    return x, np.arange(most) < len(nodes)
