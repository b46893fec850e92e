"""Reference implementations of the closed-form strategies in float64 NumPy, one example at a time.

Each takes the parameters, the real tokens `[N, D]` of the present modalities, and the sorted names of all modalities.
"""

import itertools
import math

import numpy as np


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def relu(x):
    return np.maximum(x, 0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softplus(x):
    return np.log1p(np.exp(x))


def softmax(x):
    e = np.exp(x - np.max(x))
    return e / e.sum()


def layer_norm(p, x):
    normal = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return normal * p.get("scale", 1.0) + p.get("bias", 0.0)


def signed_sqrt_normalised(x):
    """Returns the signed square root, scaled to unit norm; both are smoothed at zero, as in the strategies."""
    x = x / np.sqrt(np.abs(x) + 1e-4)
    return x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-4)


def dense(p, x):
    return np.tensordot(x, p["kernel"], axes=1) + p.get("bias", 0.0)


def mean_of(x):
    return {m: tokens.mean(axis=0) for m, tokens in x.items()}


def or_zeros(x, names, width):
    return {m: x.get(m, np.zeros(width)) for m in names}


def projected(p, x, prefix="project"):
    return {m: dense(p[f"{prefix}_{m}"], v) for m, v in mean_of(x).items()}


def width_of(p, name="out"):
    return p[name]["kernel"].shape[-1]


def mean(p, x, names):
    return sum(projected(p, x).values()) / len(x) if x else 0.0


def sum_(p, x, names):
    return sum(projected(p, x).values())


def max_(p, x, names):
    return np.max(list(projected(p, x).values()), axis=0) if x else 0.0


def product(p, x, names):
    return math.prod(1 + v for v in projected(p, x).values())


def weighted(p, x, names):
    if len(names) == 1 or not x:
        return sum_(p, x, names)
    w = softmax([p[f"score_{m}"] for m in x])
    return sum(a * v for a, v in zip(w, projected(p, x).values(), strict=True))


def embracenet(p, x, names, evaluation):
    assert evaluation == "mean"
    return sum(relu(v) for v in projected(p, x).values()) / len(x) if x else 0.0


def concat(p, x, names):
    hidden = np.concatenate(list(or_zeros(mean_of(x), names, p["Dense_0"]["kernel"].shape[0] // len(names)).values()))
    for layer in ("Dense_0", "Dense_1"):
        hidden = gelu(dense(p[layer], hidden))
    return hidden


def attention_pool(p, x, names):
    values = projected(p, x)
    if len(names) == 1 or not x:
        return sum(values.values())
    w = softmax([dense(p["score"], np.tanh(dense(p["hidden"], v)))[0] for v in values.values()])
    return sum(a * v for a, v in zip(w, values.values(), strict=True))


def gmu(p, x, names):
    means = or_zeros(mean_of(x), names, p[f"hidden_{names[0]}"]["kernel"].shape[0])
    joined = np.concatenate([means[m] for m in names])
    hidden = {m: np.tanh(dense(p[f"hidden_{m}"], means[m])) for m in names}
    if len(names) == 2:
        z = sigmoid(dense(p["gate"], joined))
        return z * hidden[names[0]] + (1 - z) * hidden[names[1]]
    return sum(sigmoid(dense(p[f"gate_{m}"], joined)) * hidden[m] for m in names)


def squeeze_excite(p, x, names):
    means = mean_of(x)
    z = relu(sum(dense(p[f"squeeze_{m}"], v) for m, v in means.items()) + p["squeeze_bias"])
    return sum(dense(p[f"project_{m}"], 2 * sigmoid(dense(p[f"excite_{m}"], z)) * v) for m, v in means.items())


def conv(p, x, names):
    rows = or_zeros(projected(p, x), names, width_of(p))
    signal = np.stack([rows[m] for m in names], axis=-1)  # [D, M]
    for layer in ("conv_0", "conv_1"):
        kernel, bias = p[layer]["kernel"], p[layer]["bias"]  # [3, in, out]
        padded = np.pad(signal, ((1, 1), (0, 0)))
        signal = gelu(sum(padded[k : k + len(signal)] @ kernel[k] for k in range(3)) + bias)
    return gelu(dense(p["out"], signal.reshape(-1)))


def channel_multiply(p, x, names):
    means, main = mean_of(x), names[0]
    scales = [1 + dense(p[f"scale_{m}"], gelu(dense(p[f"hidden_{m}"], v))) for m, v in means.items() if m != main]
    return gelu(dense(p["out"], math.prod(scales) * means.get(main, 1.0) * np.ones(width_of(p))))


def low_rank_tensor(p, x, names):
    factors = math.prod(projected(p, x).values()) * np.ones((len(p["weights"]), len(p["bias"])))
    return p["weights"] @ factors + p["bias"]


def tensor(p, x, names):
    outer = np.ones(1)
    size = p[f"project_{names[0]}"]["kernel"].shape[-1]
    for v in or_zeros(projected(p, x), names, size).values():
        outer = np.kron(outer, np.append(v, 1.0))
    return gelu(dense(p["out"], outer))


def multiplicative(p, x, names):
    means = mean_of(x)
    pairs = (np.einsum("i,j,ijd", means[a], means[b], p[f"pair_{a}_{b}"]) for a, b in itertools.combinations(means, 2))
    return sum(projected(p, x).values()) + sum(pairs)


def mlb(p, x, names):
    return dense(p["out"], math.prod(np.tanh(v) for v in projected(p, x).values()) * np.ones(width_of(p)))


def mfb(p, x, names):
    return signed_sqrt_normalised(
        (math.prod(projected(p, x).values()) * np.ones(p[f"project_{names[0]}"]["bias"].shape)).sum(-1)
    )


def mfh(p, x, names):
    expanded, blocks = np.ones(p[f"block0_{names[0]}"]["bias"].shape), []
    for block in ("block0", "block1"):
        expanded = expanded * math.prod(projected(p, x, block).values())
        blocks.append(signed_sqrt_normalised(expanded.sum(axis=-1)))
    return dense(p["out"], np.concatenate(blocks))


def mutan(p, x, names):
    hidden = {m: np.tanh(v) for m, v in projected(p, x, "hidden").items()}
    factors = math.prod(dense(p[f"project_{m}"], v) for m, v in hidden.items())
    return (factors * np.ones(p[f"project_{names[0]}"]["bias"].shape)).mean(axis=0)


def block(p, x, names):
    chunks, size, _ = p[f"core_{names[0]}"].shape
    chunk_features = []
    for c in range(chunks):
        factors = math.prod(
            v[c * size : (c + 1) * size] @ p[f"core_{m}"][c] + p[f"core_bias_{m}"][c]
            for m, v in projected(p, x).items()
        )
        chunk_features.append(
            signed_sqrt_normalised(
                (factors * np.ones(p[f"core_bias_{names[0]}"].shape[-1])).reshape(-1, size).sum(axis=0)
            )
        )
    return dense(p["out"], np.concatenate(chunk_features))


def mcb(p, x, names):
    """Sketches the explicit outer product, which the strategy never computes."""
    from mmfusion.models.fusion.tensor import MCB, _count_sketch

    size = MCB.sketch
    outer, bucket, sign, filled = np.ones(1), np.zeros(1, int), np.ones(1), {0}
    for m, v in mean_of(x).items():
        matrix = _count_sketch(m, len(v), size)
        buckets, signs = np.append(np.abs(matrix).argmax(axis=1), 0), np.append(matrix.sum(axis=1), 1)
        outer = np.kron(outer, np.append(v, 1.0))
        bucket = (bucket[:, None] + buckets).ravel() % size
        sign = np.kron(sign, signs)
    sketch = np.zeros(size)
    np.add.at(sketch, bucket, sign * outer)
    for m in names:
        buckets = np.abs(_count_sketch(m, len(p["out"]["bias"]), size)).argmax(axis=1)
        filled |= {(a + b) % size for a in filled for b in buckets}
    return dense(p["out"], signed_sqrt_normalised(sketch)[sorted(filled)])


def with_token(p, x, main):
    return np.concatenate([p["token"], x[main]]) if main in x else p["token"]


def pooled_features(p, tokens):
    return gelu(dense(p["out"], np.concatenate([tokens.mean(axis=0), tokens.max(axis=0)])))


def convolved(p, tokens):
    """A dense layer, or with a 3×3 kernel a convolution over the square grid of all tokens but the first."""
    if p["kernel"].ndim == 2:
        return dense(p, tokens)
    side = math.isqrt(len(tokens) - 1)
    grid = np.pad(tokens[1:].reshape(side, side, tokens.shape[-1]), ((1, 1), (1, 1), (0, 0)))
    convolved_rows = [
        [sum(grid[i + a, j + b] @ p["kernel"][a, b] for a in range(3) for b in range(3)) for j in range(side)]
        for i in range(side)
    ]
    out = np.array(convolved_rows).reshape(side * side, p["kernel"].shape[-1])
    return np.concatenate([tokens[:1] @ p["kernel"][1, 1], out]) + p["bias"]


def film(p, x, names):
    main, *others = names
    h, means = with_token(p, x, main), mean_of(x)
    for name in ("block0", "block1"):
        u = gelu(dense(p[f"{name}_in"], h))
        v = layer_norm(p.get(f"{name}_norm", {}), convolved(p[f"{name}_out"], u))
        if others:
            condition = gelu(
                sum((dense(p[f"condition_{m}"], means[m]) for m in others if m in x), np.zeros(h.shape[-1]))
            )
            gamma, beta = np.split(dense(p[f"{name}_film"], condition), 2)
            v = (1 + gamma) * v + beta
        h = u + gelu(v)
    return pooled_features(p, h)


def mag(p, x, names, beta=1.0):
    main, *others = names
    z, means, shift = with_token(p, x, main), mean_of(x), 0.0
    for m in (m for m in others if m in x):
        gate = relu(dense(p[f"gate_{m}"], np.concatenate([z, np.tile(means[m], (len(z), 1))], axis=-1)))
        shift = shift + gate * dense(p[f"project_{m}"], means[m])
    if others:
        ratio = np.sqrt((z**2).sum(-1, keepdims=True) + 1e-6) / np.sqrt(
            ((0 * z + shift) ** 2).sum(-1, keepdims=True) + 1e-6
        )
        z = z + np.minimum(beta * ratio, 1.0) * shift
    return pooled_features(p, layer_norm(p["norm"], z))


def central(p, x, names):
    branches, joined = mean_of(x), 0.0
    for layer in range(3):
        joined = joined + sum(p[f"layer{layer}_alpha_{m}"] * v for m, v in branches.items())
        joined = joined * np.ones(width_of(p, f"layer{layer}"))
        joined = relu(dense(p[f"layer{layer}"], joined))
        if layer < 2:
            joined = p[f"layer{layer + 1}_alpha"] * joined
            branches = {m: relu(dense(p[f"branch{layer}_{m}"], v)) for m, v in branches.items()}
    return joined


def deepsets(p, x, names):
    phi = {m: dense(p["phi_1"], gelu(dense(p["phi_0"], v + p[f"type_{m}"]))).mean(axis=0) for m, v in x.items()}
    total = sum(phi.values()) + np.zeros(width_of(p, "phi_1"))
    return gelu(dense(p["rho_1"], gelu(dense(p["rho_0"], total))))


FEATURE = {
    "mean": mean,
    "sum": sum_,
    "max": max_,
    "product": product,
    "weighted": weighted,
    "concat": concat,
    "attention_pool": attention_pool,
    "gmu": gmu,
    "squeeze_excite": squeeze_excite,
    "conv": conv,
    "channel_multiply": channel_multiply,
    "tensor": tensor,
    "low_rank_tensor": low_rank_tensor,
    "multiplicative": multiplicative,
    "mcb": mcb,
    "mlb": mlb,
    "mfb": mfb,
    "mfh": mfh,
    "mutan": mutan,
    "block": block,
    "film": film,
    "mag": mag,
    "central": central,
    "deepsets": deepsets,
}
