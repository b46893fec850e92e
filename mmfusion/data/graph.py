"""Graphs: node features concatenated with the adjacency matrix, padded to a fixed number of nodes.

N nodes · F features per node · e edges
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmfusion.data import numeric
from mmfusion.data.modality_type import Decoded, ModalityType, Options

EDGES = ("pairs", "matrix")
OPTIONS = {
    "nodes": 16,  # maximum number of nodes
    "features": 8,  # number of features per node
    "edges": "pairs",  # pairs of nodes, or "matrix": a matrix of edge weights
}


def _shape(options: Options, _: None) -> tuple[tuple[int, ...], Any, int]:
    return (options["nodes"], options["features"] + options["nodes"]), np.float32, options["nodes"]


def _decode(value: Mapping[str, Any], options: Options, _: None) -> Decoded:
    """Decodes nodes `[n, F]`, and edges as undirected pairs `[e, 2]` or as a matrix of weights `[n, n]`.

    The input `[N, F + N]` has each node's features, followed by the weights of its edges to all nodes.
    """
    nodes, edges = _parse(value, options)
    if nodes is None:
        return None
    count, limit, features = len(nodes), options["nodes"], options["features"]
    if nodes.shape[1] != features or count > limit:
        raise ValueError(
            f"a graph of {count} nodes with {nodes.shape[1]} features; up to {limit} nodes of {features} features fit"
        )
    result = np.zeros((limit, features + limit), np.float32)
    result[:count, :features] = nodes
    result[:count, features : features + count] = _adjacency(edges, count, options["edges"])
    return result, np.arange(limit) < count


def _parse(value: Mapping[str, Any], options: Options) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Returns nodes `[n, F]` and edges, each None if it has no number; strings are parsed as JSON."""
    nodes, edges = (
        numeric.read(value[name], f"a list of numbers in {name!r}") for name in options["feature"].split("+")
    )
    if nodes is None:
        return None, None
    if nodes.ndim not in (1, 2):
        raise ValueError(f"nodes are an array {list(nodes.shape)}, not [n, {options['features']}]")
    if not (np.isfinite(nodes).all() and (edges is None or np.isfinite(edges).all())):
        raise ValueError("a graph has values that are not finite")
    return nodes.reshape(len(nodes), -1), edges


def _adjacency(edges: np.ndarray | None, count: int, form: str) -> np.ndarray:
    weights = np.zeros((count, count), np.float32)
    if edges is None:
        return weights
    if form == "matrix":
        if edges.shape != weights.shape:
            raise ValueError(f"edges are an array {list(edges.shape)}, not a matrix [{count}, {count}]")
        return edges
    if edges.ndim != 2 or edges.shape[1] != 2:
        raise ValueError(f"edges are an array {list(edges.shape)}, not pairs of nodes [e, 2]")
    if (edges % 1).any() or not 0 <= edges.min() <= edges.max() < count:
        raise ValueError(f"an edge names a node outside 0 to {count - 1}")
    first, second = edges.astype(np.int64).T
    weights[first, second] = weights[second, first] = 1
    return weights


TYPE = ModalityType(OPTIONS, _shape, _decode, takes=("array[1]", "array[2]", "text", "bytes"), several_features=True)
