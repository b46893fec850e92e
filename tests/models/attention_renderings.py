"""Reference implementations of attention strategies in float64 NumPy, one example at a time; see `renderings`."""

import functools
import itertools
import math

import numpy as np

from tests.models.renderings import (
    dense,
    gelu,
    layer_norm,
    mean_of,
    pooled_features,
    projected,
    relu,
    softmax,
    width_of,
    with_token,
)

HEADS = 2


def attend(p, queries, keys, heads):
    """Multi-head attention (Vaswani et al. 2017); zeros if there are no keys."""
    q, k, v = dense(p["query"], queries), dense(p["key"], keys), dense(p["value"], keys)
    size, mixed = q.shape[-1] // heads, []
    if not len(keys) or not len(queries):
        return np.zeros(queries.shape)
    for head in (slice(i * size, (i + 1) * size) for i in range(heads)):
        weights = np.stack([softmax(row) for row in q[:, head] @ k[:, head].T / math.sqrt(size)])
        mixed.append(weights @ v[:, head])
    return dense(p["out"], np.concatenate(mixed, axis=-1))


def block(p, x, context=None):
    """A pre-norm transformer block: attention to the context (by default self-attention), then an MLP."""
    normal = layer_norm(p["norm"], x)
    keys = normal if context is None else layer_norm(p["norm_context"], context)
    x = x + attend(p["attention"], normal, keys, HEADS)
    return x + dense(p["mlp_out"], gelu(dense(p["mlp_in"], layer_norm(p["norm_mlp"], x))))


def concatenated(p, x, names):
    return np.concatenate([np.zeros((0, width_of(p))), *(x[m] for m in names if m in x)])


def mean_max(x):
    return np.concatenate([x.mean(axis=0), x.max(axis=0)])


def read(p, x):
    """Returns features of the pooled tokens; those of zeros if there are none."""
    return pooled_features(p, layer_norm(p["norm"], x)) if len(x) else gelu(p["out"]["bias"])


def typed(p, x):
    return {m: tokens + p[f"type_{m}"] for m, tokens in x.items()}


def nl_gate(p, x, names):
    main, *others = names
    tokens = with_token(p, x, main)
    return pooled_features(p, tokens + attend(p["attention"], tokens, concatenated(p, x, others or [main]), HEADS))


def cross_attention(p, x, names, layers):
    main, *others = names
    tokens = with_token(p, x, main)
    context = concatenated(p, x, others or [main])
    for layer in range(layers):
        tokens = block(p[f"layer{layer}"], tokens, context)
    return read(p, tokens)


def co_attention(p, x, names, layers):
    for layer in range(layers):
        others = {m: concatenated(p, x, [k for k in names if k != m] or names) for m in x}
        x = {m: block(p[f"layer{layer}_{m}"], x[m], others[m]) for m in x}
    pooled = [mean_max(layer_norm(p[f"norm_{m}"], x[m])) if m in x else np.zeros(2 * width_of(p)) for m in names]
    return gelu(dense(p["out"], np.concatenate(pooled)))


def mult(p, x, names, layers, memory):
    pooled = []
    for m in names:
        if m not in x:
            pooled.append(np.zeros(2 * width_of(p)))
            continue
        crossed = []
        for k in [k for k in names if k != m] or names:
            tokens = x[m]
            for layer in range(layers if k in x else 0):
                tokens = block(p[f"cross{layer}_{k}_to_{m}"], tokens, x[k])
            crossed.append(tokens)
        attended = dense(p[f"join_{m}"], np.concatenate(crossed, axis=-1))
        for layer in range(memory):
            attended = block(p[f"self{layer}_{m}"], attended)
        pooled.append(mean_max(layer_norm(p[f"norm_{m}"], attended)))
    return gelu(dense(p["out"], np.concatenate(pooled)))


def merged_attention(p, x, names, layers):
    tokens = concatenated(p, typed(p, x), names)
    for layer in range(layers):
        tokens = block(p[f"layer{layer}"], tokens)
    return read(p, tokens)


def late_transformer(p, x, names, layers):
    single = typed(p, {m: v[None] for m, v in mean_of(x).items()})
    tokens = np.concatenate([p["token"], *(single[m] for m in names if m in x)])
    for layer in range(layers):
        tokens = block(p[f"layer{layer}"], tokens)
    return gelu(dense(p["out"], layer_norm(p["norm"], tokens[0])))


def bottleneck(p, x, names, layers, fuse_from=0):
    shared = p["bottleneck"]
    for layer in range(layers):
        if layer < fuse_from:
            x = {m: block(p[f"layer{layer}_{m}"], x[m]) for m in x}
            continue
        both = {m: block(p[f"layer{layer}_{m}"], np.concatenate([x[m], shared])) for m in x}
        x = {m: both[m][: len(x[m])] for m in x}
        versions = [both[m][len(x[m]) :] for m in x]
        shared = np.mean(versions, axis=0) if versions else 0 * shared
    features = sum(mean_max(layer_norm(p[f"norm_{m}"], x[m])) @ p[f"out_{m}"]["kernel"] for m in x)
    return gelu(features + dense(p["out"], shared.mean(axis=0)))


def perceiver(p, x, names, layers):
    latents, context = p["latents"], concatenated(p, typed(p, x), names)
    for layer in range(layers):
        latents = block(p[f"think{layer}"], block(p[f"read{layer}"], latents, context))
    return gelu(dense(p["out"], layer_norm(p["norm"], latents).mean(axis=0)))


def qformer(p, x, names, layers):
    queries = p["queries"]
    for layer in range(layers):
        queries = block(p[f"layer{layer}_self"], queries)
        for m in (m for m in names if m in x):
            queries = block(p[f"layer{layer}_{m}"], queries, x[m])
    return gelu(dense(p["out"], layer_norm(p["norm"], queries).mean(axis=0)))


def bilinear_attention(p, x, names):
    features = sum(projected(p, x).values())
    for a, b in itertools.combinations(names, 2) if len(names) > 1 else [(names[0], names[0])]:
        if a not in x or b not in x:
            continue
        pair = f"{a}_{b}"
        left, right = relu(dense(p[f"query_left_{pair}"], x[a])), relu(dense(p[f"query_right_{pair}"], x[b]))
        glimpses = []
        for score in p[f"score_{pair}"]:
            w = softmax((left * score) @ right.T)
            values = dense(p[f"value_left_{pair}"], x[a]), dense(p[f"value_right_{pair}"], x[b])
            glimpses.append(np.einsum("ij,id,jd->d", w, *values))
        out = p[f"out_{pair}"]
        features = features + np.tensordot(np.stack(glimpses), out["kernel"], axes=2) + out["bias"]
    return gelu(features) if x else 0.0


def gat(p, x, names, layers, related=False):
    nodes = concatenated(p, typed(p, x), names)
    if not len(nodes):
        return gelu(p["out"]["bias"])
    modality_of = [m for m in names if m in x for _ in x[m]]
    for layer in (f"layer{i}" for i in range(layers)):
        heads = []
        for k in range(p[layer]["kernel"].shape[1]):
            h = nodes @ p[layer]["kernel"][:, k]
            messages = np.broadcast_to(h, (len(h), *h.shape))  # [i, j, d], from node j to node i
            if related:
                messages = messages + np.array(
                    [[p[f"{layer}_relation_{q}_{m}"][k] for m in modality_of] for q in modality_of]
                )
            score = (h @ p[f"{layer}_to"][k])[:, None] + messages @ p[f"{layer}_from"][k]
            score = np.where(score > 0, score, 0.2 * score)
            heads.append(np.array([softmax(row) @ message for row, message in zip(score, messages, strict=True)]))
        mixed = np.concatenate(heads, axis=-1)
        nodes = nodes + np.where(mixed > 0, mixed, np.expm1(np.minimum(mixed, 0)))
    return pooled_features(p, nodes)


TWO = {"layers": 2}
FEATURE = {  # name -> rendering, options
    "nl_gate": (nl_gate, {}),
    "cross_attention": (cross_attention, TWO),
    "co_attention": (co_attention, TWO),
    "mult": (mult, {"layers": 2, "memory": 2}),
    "merged_attention": (merged_attention, TWO),
    "late_transformer": (late_transformer, TWO),
    "bottleneck": (bottleneck, {"layers": 3, "fuse_from": 1}),
    "perceiver": (perceiver, TWO),
    "qformer": (qformer, TWO),
    "bilinear_attention": (bilinear_attention, {}),
    "gat": (gat, TWO),
    "knowledge_graph": (functools.partial(gat, related=True), TWO),
}
