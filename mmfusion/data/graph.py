"""Graphs: node features concatenated with the adjacency matrix, padded to a fixed number of nodes.

N nodes · F features per node · e edges
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

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
    """Returns nodes `[n, F]` and edges, both None without nodes; strings are parsed as JSON."""
    try:
        nodes, edges = (
            json.loads(value[name]) if isinstance(value[name], (str, bytes)) and value[name] else value[name]
            for name in options["feature"].split("+")
        )
        if nodes is None or len(nodes) == 0:
            return None, None
        nodes = np.asarray(nodes, np.float32).reshape(len(nodes), -1)
        edges = None if edges is None or len(edges) == 0 else np.asarray(edges, np.float32)
    except (TypeError, RecursionError) as error:  # JSON with another structure
        raise ValueError("nodes and edges of a graph must be lists of numbers") from error
    if not (np.isfinite(nodes).all() and (edges is None or np.isfinite(edges).all())):
        raise ValueError("a graph has values that are not finite")
    return nodes, edges


def _adjacency(edges: np.ndarray | None, count: int, form: str) -> np.ndarray:
    weights = np.zeros((count, count), np.float32)
    if form == "matrix":
        weights[:] = 0 if edges is None else edges  # raises ValueError for another shape
    elif edges is not None:
        first, second = edges.astype(np.int64).T
        if (edges % 1).any() or not 0 <= min(first.min(), second.min()) <= max(first.max(), second.max()) < count:
            raise ValueError(f"an edge names a node outside 0 to {count - 1}")
        weights[first, second] = weights[second, first] = 1
    return weights


TYPE = ModalityType(OPTIONS, _shape, _decode, takes=("array[1]", "array[2]", "text", "bytes"), several_features=True)
