"""Attention and an LSTM in NumPy and float64, against which an accelerator is checked."""

from collections.abc import Mapping

import numpy as np


def attention(params: Mapping[str, np.ndarray], x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Returns masked attention of four heads in float64."""
    x, p = x.astype(np.float64), {name: value.astype(np.float64) for name, value in params.items()}
    query, key, value = (
        (x @ p[f"{name}/kernel"] + p.get(f"{name}/bias", 0.0)).reshape(*x.shape[:2], 4, -1)
        for name in ("query", "key", "value")
    )
    scores = np.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(query.shape[-1])
    scores = np.exp(np.where(mask[:, None, None], scores, -np.inf))
    attended = np.einsum("bhqk,bkhd->bqhd", scores / scores.sum(-1, keepdims=True), value)
    return attended.reshape(x.shape) @ p["out/kernel"] + p["out/bias"]


def lstm(params: Mapping[str, np.ndarray], ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Returns the outputs of the text encoder with an LSTM in float64; zeros where masked."""
    p = {name: value.astype(np.float64) for name, value in params.items()}
    x, outputs = p["embed/embedding"][np.where(mask, ids, 0)], []
    hidden = cell = np.zeros((len(ids), 64))
    for t in range(ids.shape[1]):
        gates = {
            gate: x[:, t] @ p[f"forward_0/i{gate}/kernel"] + hidden @ p[f"forward_0/h{gate}/kernel"]
            + p[f"forward_0/h{gate}/bias"] for gate in "ifgo"
        }  # fmt: skip
        i, f, o = (1 / (1 + np.exp(-gates[gate])) for gate in "ifo")
        cell = f * cell + i * np.tanh(gates["g"])
        hidden = o * np.tanh(cell)
        outputs.append(hidden)
    out = (np.stack(outputs, 1) @ p["project/kernel"] + p["project/bias"]) * mask[..., None]
    out = (out - out.mean(-1, keepdims=True)) / np.sqrt(out.var(-1, keepdims=True) + 1e-6)
    return (out * p["norm/scale"] + p["norm/bias"]) * mask[..., None]
