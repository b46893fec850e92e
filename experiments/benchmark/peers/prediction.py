"""Prediction with PyTorch and onnxruntime: rows of pixels and a sentence to probabilities."""

import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.benchmark import networks
from experiments.benchmark.contender import timed
from experiments.benchmark.peers import torch_networks, torch_peer

LENGTH = networks.NETWORKS["quickstart"]["length"]


def predict(folder: str, count: int, seconds: float, runtime: str) -> tuple[dict[str, Any], Any]:
    """A contender."""
    torch_peer.threads()
    with np.load(Path(folder) / "run.npz", allow_pickle=False) as arrays:
        parameters = dict(arrays)
    made = {**networks.NETWORKS["quickstart"], "vocabulary": len(parameters["encoders_text/embed/embedding"])}
    network = torch_networks.Network("quickstart", **made)
    torch_networks.load(network, parameters)
    network.eval()
    vocabulary = json.loads((Path(folder) / "vocabulary.json").read_text())
    rows = pickle.loads((Path(folder) / f"rows{count}.pickle").read_bytes())
    infer = _onnx(network) if runtime == "onnxruntime" else _torch(network)

    def run() -> np.ndarray:
        logits = infer(*_inputs(rows, vocabulary))
        exponents = np.exp(logits - logits.max(1, keepdims=True))
        return exponents / exponents.sum(1, keepdims=True)

    probabilities = run()
    return {"losses": [float(probabilities[0, 1]), float(probabilities[:, 1].mean())]}, timed(run, seconds)


def _inputs(rows: list[dict[str, Any]], vocabulary: dict[str, int]) -> tuple[np.ndarray, ...]:
    image = np.ascontiguousarray(np.stack([row["image"] for row in rows]).transpose(0, 3, 1, 2))
    ids = np.zeros((len(rows), LENGTH), np.int64)
    for i, row in enumerate(rows):
        words = row["text"].lower().split()[:LENGTH]
        ids[i, : len(words)] = [vocabulary.get(word, 1) for word in words]
    return image, ids, ids > 0


def _torch(network: torch.nn.Module) -> Any:
    @torch.inference_mode()
    def infer(*inputs: np.ndarray) -> np.ndarray:
        return network(*map(torch.from_numpy, inputs)).numpy()

    return infer


def _onnx(network: torch.nn.Module) -> Any:
    import onnxruntime

    example = (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.ones(2, LENGTH, dtype=torch.int64),
               torch.ones(2, LENGTH, dtype=torch.bool))  # fmt: skip
    names, content = ["image", "text", "mask"], io.BytesIO()
    torch.onnx.export(network, example, content, input_names=names, output_names=["logits"], dynamo=False,
                      dynamic_axes={name: {0: "rows"} for name in (*names, "logits")})  # fmt: skip
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    session = onnxruntime.InferenceSession(content.getvalue(), options, providers=["CPUExecutionProvider"])
    return lambda *inputs: session.run(None, dict(zip(names, inputs, strict=True)))[0]
