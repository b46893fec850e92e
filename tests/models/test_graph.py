"""Graph encoders against reference implementations in float64 NumPy, node by node."""

import itertools

import jax
import numpy as np
import pytest

from mmfusion.models.encoders import ENCODERS
from tests.models.encoder_cases import GRAPH, KNOWLEDGE, NODES, WIDTH
from tests.models.random_variables import random_variables


def softmax(scores):
    weights = np.exp(scores - np.max(scores))
    return weights / weights.sum()


def attend(params, layer, values, neighbours, relations=None):
    """Returns each node's Σ_j a_ij (value_j + e_ij) over its neighbours, with heads concatenated."""
    query, key = params[f"layer{layer}_to"], params[f"layer{layer}_from"]
    mixed = np.zeros_like(values)  # [N, h, d]
    for i, edges in enumerate(neighbours):
        for head in range(values.shape[1]):
            messages = [
                values[j, head] + sum(relations[relation, head] for relation in edge_relations)
                for j, edge_relations in edges
            ]
            scores = [query[head] @ values[i, head] + key[head] @ message for message in messages]
            if edges:
                mixed[i, head] = softmax([s if s > 0 else 0.2 * s for s in scores]) @ messages
    return mixed.reshape(len(values), -1)


def elu(x):
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0)))


def project_and_normalise(params, h):
    """Returns the tokens: projected, then layer-normalised."""
    tokens = h @ params["project"]["kernel"] + params["project"]["bias"]
    tokens = (tokens - tokens.mean(-1, keepdims=True)) / np.sqrt(tokens.var(-1, keepdims=True) + 1e-6)
    return tokens * params["norm"]["scale"] + params["norm"]["bias"]


def knowledge_attention(params, row, real):
    h = params["entity"]["embedding"][row[:, 0]] + params["named"]["embedding"][row[:, 1]]
    nodes = len(row)
    neighbours = [[] for _ in row]
    for i, j in itertools.product(real, real):
        relations = [r for r in (row[i, 2 + j], row[i, 2 + nodes + j]) if r > 0] + ([0] if i == j else [])
        if relations:
            neighbours[i].append((j, relations))
    for layer in range(2):
        values = np.einsum("nf,fhd->nhd", h, params[f"layer{layer}"]["kernel"])
        h = h + elu(attend(params, layer, values, neighbours, params[f"layer{layer}_relations"]))
    return project_and_normalise(params, h)


def graph_attention(params, row, real):
    h, edges = row[:, : -len(row)], row[:, -len(row) :]
    neighbours = [[(j, []) for j in real if j == i or edges[i, j]] if i in real else [] for i in range(len(row))]
    for layer in range(2):
        values = np.einsum("nf,fhd->nhd", h, params[f"layer{layer}"]["kernel"])
        h = elu(attend(params, layer, values, neighbours))
    return project_and_normalise(params, h)


@pytest.mark.parametrize(
    ("name", "options", "x", "reference"),
    [
        ("knowledge_attention", {"entities": 6, "relations": 3}, KNOWLEDGE, knowledge_attention),
        ("graph_attention", {}, GRAPH[0], graph_attention),
    ],
)
def test_graph_encoder_matches_its_reference_implementation(name, options, x, reference):
    encoder = ENCODERS[name](width=WIDTH, hidden=8, heads=2, **options)
    variables = random_variables(encoder, x, NODES, train=False)
    tokens, _ = jax.jit(lambda v: encoder.apply(v, x, NODES, train=False))(variables)
    params = jax.tree.map(np.float64, variables["params"])
    for row, real, found in zip(x, NODES, tokens, strict=True):
        expected = reference(params, row, np.flatnonzero(real))
        np.testing.assert_allclose(found[real], expected[real], rtol=2e-5, atol=2e-5)
