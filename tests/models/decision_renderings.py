"""Reference implementations of the decision-level strategies in float64 NumPy, one example at a time.

Each takes the parameters, the present modalities' logits `[C]` and features `[D]`, and the names of all modalities.
"""

import numpy as np

from tests.models.renderings import dense, gelu, softmax, softplus


def late_mean(p, logits, features, names):
    return sum(logits.values()) / len(logits) if logits else 0.0


def late_weighted(p, logits, features, names):
    if len(names) == 1 or not logits:
        return sum(logits.values())
    w = softmax([p[f"score_{m}"] for m in logits])
    return sum(a * v for a, v in zip(w, logits.values(), strict=True))


def product_of_experts(p, logits, features, names):
    """The logarithm of the product of the modalities' probabilities, up to a constant."""
    return sum(np.log(softmax(v)) for v in logits.values())


def stacking(p, logits, features, names):
    return sum(dense(p[f"meta_{m}"], v) for m, v in logits.items())


def tmc(p, logits, features, names):
    """Dempster's reduced rule on beliefs b and uncertainty u, modality by modality (the paper's equation 5)."""
    classes, belief, uncertainty = 4, np.zeros(4), 1.0
    for v in logits.values():
        strength = softplus(v).sum() + classes
        b, u = softplus(v) / strength, classes / strength
        conflict = np.outer(belief, b).sum() - belief @ b
        belief, uncertainty = (
            (belief * b + belief * u + b * uncertainty) / (1 - conflict),
            uncertainty * u / (1 - conflict),
        )
    return np.log(belief * classes / uncertainty + 1)


def qmf(p, logits, features, names, temperature=1.0, centred=True):
    energy = {m: temperature * np.log(np.exp((v - centred * v.mean()) / temperature).sum()) for m, v in logits.items()}
    return sum(energy[m] * v for m, v in logits.items())


def joint_hidden(p, features):
    return gelu(sum(dense(p[f"joint_{m}"], v) for m, v in features.items()) + np.zeros(8))


def moe(p, logits, features, names):
    if len(names) == 1 or not logits:
        return sum(logits.values())
    hidden = joint_hidden(p, features)
    experts = {**logits, "joint": dense(p["joint"], hidden)}
    gates = softmax([dense(p[f"gate_{e}"], hidden)[0] for e in experts])
    return sum(g * v for g, v in zip(gates, experts.values(), strict=True))


def i2m2(p, logits, features, names):
    return sum(logits.values()) + dense(p["joint"], joint_hidden(p, features))


DECISION = {
    "late_mean": late_mean,
    "late_weighted": late_weighted,
    "product_of_experts": product_of_experts,
    "stacking": stacking,
    "tmc": tmc,
    "qmf": qmf,
    "moe": moe,
    "i2m2": i2m2,
}
