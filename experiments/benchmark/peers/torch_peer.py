"""Train steps, layers, input, start and prediction in PyTorch: eager, tuned (channels last, fused AdamW), compiled."""

import os
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from experiments.benchmark import networks
from experiments.benchmark.contender import timed
from experiments.benchmark.peers import torch_networks


def threads() -> None:
    """Sets PyTorch's threads to the cores of this process."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))


def network(name: str, parameters: str = "", channels_last: bool = False) -> torch_networks.Network:
    """Returns a network, with the parameters in a file."""
    made = torch_networks.Network(name, **networks.NETWORKS[name])
    if parameters:
        with np.load(parameters, allow_pickle=False) as arrays:
            torch_networks.load(made, dict(arrays))
    return made.to(memory_format=torch.channels_last) if channels_last else made


def tensors(arrays: dict[str, np.ndarray], channels_last: bool = False) -> tuple[torch.Tensor, ...]:
    """Returns a batch of `networks.batches` as image, text, mask and label."""
    image = torch.from_numpy(arrays["image"]).permute(0, 3, 1, 2)  # channels last in memory, as it comes
    image = image if channels_last else image.contiguous()
    return (image, torch.from_numpy(arrays["text"]).long(), torch.from_numpy(arrays["mask"]),
            torch.from_numpy(arrays["label"]).long())  # fmt: skip


def optimizer(module: nn.Module, rate: float, b2: float, fused: bool) -> torch.optim.Optimizer:
    """Returns AdamW, whose weight decay spares biases and norms."""
    learned = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learned if p.ndim > 1], "weight_decay": 1e-4},
        {"params": [p for p in learned if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, rate, (0.9, b2), fused=fused)


def make_step(name: str, variant: str, parameters: str = "") -> Any:
    """Returns a function of a batch of tensors that takes a step and returns the loss."""
    tuned, made = variant != "eager", networks.NETWORKS[name]
    module = network(name, parameters, channels_last=tuned)
    adam = optimizer(module, made["rate"], made["b2"], fused=tuned)
    forward = torch.compile(module) if variant == "compiled" else module

    def step(image: torch.Tensor, text: torch.Tensor, mask: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        adam.zero_grad(set_to_none=True)
        loss = F.cross_entropy(forward(image, text, mask), label)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        adam.step()
        return loss.detach()

    return step


def step(network: str, size: int, parameters: str, seconds: float, variant: str) -> tuple[dict[str, Any], Any]:
    """A contender: a train step on batches in memory."""
    threads()
    take_step = make_step(network, variant, parameters)
    batches = [tensors(arrays, variant != "eager") for arrays in networks.batches(network, size)]
    losses = [float(take_step(*batch)) for batch in batches]
    taken = 0

    def run() -> None:
        nonlocal taken
        take_step(*batches[taken % len(batches)])
        taken += 1

    return {"losses": losses, "torch": torch.__version__}, timed(run, seconds)


def layer(layer: str, parameters: str, seconds: float, variant: str) -> tuple[dict[str, Any], Any]:
    """A contender: gradients of a weighted mean of a layer's output with regard to its parameters."""
    from experiments.benchmark.steps import layer_inputs

    threads()
    vectors, ids, weights = (torch.from_numpy(x) for x in layer_inputs(layer))
    if layer == "attention":
        module, inputs = torch_networks.Attention(64), (vectors, vectors, None)
    else:
        module = torch_networks.Recurrent(64, 100, 64, cell=layer)
        inputs = (ids.long(), torch.ones(ids.shape, dtype=torch.bool))
    with np.load(parameters, allow_pickle=False) as arrays:
        torch_networks.load(module, dict(arrays))
    forward = torch.compile(module) if variant == "compiled" else module

    def run() -> torch.Tensor:
        module.zero_grad(set_to_none=True)
        loss = (forward(*inputs) * weights).mean()
        loss.backward()
        return loss.detach()

    loss = float(run())
    grads = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    if layer == "gru":  # two of its three pairs of biases are one in flax
        grads["forward_0.bias_hh_l0"][: 2 * 64] = 0
    norm = float(torch.sqrt(sum(grad.square().sum() for grad in grads.values())))
    return {"losses": [loss, norm]}, timed(run, seconds)


def first_step(network: str, size: int) -> tuple[dict[str, Any], Any]:
    """A contender that is ready once it has taken a step."""
    threads()
    take_step = make_step(network, "eager")
    loss = float(take_step(*tensors(networks.batches(network, size, 1)[0])))
    return {"losses": [loss]}, float


def imported() -> tuple[dict[str, Any], Any]:
    """A contender that is ready once PyTorch is imported."""
    return {"torch": torch.__version__}, float
