"""Writes `fixtures.npz`: inputs, weights and outputs of published implementations, for `test_published.py`.

pip install torch==2.13.0 torch_geometric==2.8.1 numpy
pip download --no-deps block.bootstrap.pytorch==0.1.6 pykale==0.2.1   (both unpacked into SOURCES)
python tests/published/make.py SOURCES

torch and torch_geometric are used as installed. block.bootstrap.pytorch (Ben-younes et al., the authors of MUTAN and
BLOCK) and pykale have requirements that these fusions do not need, so only single files of them are loaded.
"""

import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torch_geometric.nn

B, N, D, HEADS = 3, 4, 8, 2
CASES = {}


def case(name, inputs, output, **weights):
    """Adds a case: inputs, weights and output as float32 arrays under `name/...`."""
    for key, value in {**inputs, **weights, "output": output}.items():
        value = value.detach().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        CASES[f"{name}/{key}"] = value if value.dtype == bool else value.astype(np.float32)


def linear(prefix, layer):
    """Returns a torch Linear's weights in the layout of a Flax Dense."""
    return {f"{prefix}/kernel": layer.weight.T, f"{prefix}/bias": layer.bias}


def randomised(module):
    """Returns the module in evaluation mode with random parameters, so that none is 0 or 1."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return module.eval()


def attention_weights(prefix, attention):
    """Returns a MultiheadAttention's weights without the key bias, which has no effect."""
    names, parts = ("query", "key", "value"), attention.in_proj_weight.chunk(3)
    result = {f"{prefix}{n}/kernel": w.T for n, w in zip(names, parts, strict=True)}
    for n, bias in zip(names, attention.in_proj_bias.chunk(3), strict=True):
        if n != "key":
            result[f"{prefix}{n}/bias"] = bias
    return result | linear(f"{prefix}out", attention.out_proj)


def torch_cases():
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]], dtype=torch.bool)
    queries, keys = torch.randn(B, N, D), torch.randn(B, 5, D)
    attention = randomised(torch.nn.MultiheadAttention(D, HEADS, batch_first=True))
    out, weights = attention(queries, keys, keys, key_padding_mask=~mask, average_attn_weights=False)
    case(
        "attention", {"queries": queries, "keys": keys, "mask": mask}, out,
        weights=weights, **attention_weights("params/", attention),
    )  # fmt: skip

    block = randomised(torch.nn.TransformerEncoderLayer(
        D, HEADS, 2 * D, activation=lambda x: F.gelu(x, approximate="tanh"), layer_norm_eps=1e-6, batch_first=True,
        norm_first=True,
    ))  # fmt: skip
    out = block(keys, src_key_padding_mask=~mask)
    norms = {
        f"params/{flax_name}/{w}": getattr(getattr(block, torch_name), {"scale": "weight"}.get(w, w))
        for flax_name, torch_name in (("norm", "norm1"), ("norm_mlp", "norm2"))
        for w in ("scale", "bias")
    }
    case(
        "block", {"tokens": keys, "mask": mask}, out * mask[:, :, None],
        **norms, **attention_weights("params/attention/", block.self_attn),
        **linear("params/mlp_in", block.linear1), **linear("params/mlp_out", block.linear2),
    )  # fmt: skip

    a, b = torch.randn(B, D), torch.randn(B, D)
    bilinear, sides = (
        randomised(torch.nn.Bilinear(D, D, D, bias=False)),
        [randomised(torch.nn.Linear(D, D)) for _ in "ab"],
    )
    out = bilinear(a, b) + sides[0](a) + sides[1](b)
    case(
        "multiplicative", {"a": a, "b": b}, out,
        **{"params/pair_a_b": bilinear.weight.permute(1, 2, 0)},
        **linear("params/project_a", sides[0]), **linear("params/project_b", sides[1]),
    )  # fmt: skip


def geometric_cases():
    a, b = torch.randn(B, 2, D), torch.randn(B, 3, D)
    nodes = torch.cat([a, b], dim=1)
    convolution = randomised(torch_geometric.nn.GATConv(D, D // HEADS, heads=HEADS, bias=False, add_self_loops=False))
    edges = torch.cartesian_prod(torch.arange(5), torch.arange(5)).T
    mixed = torch.stack([convolution(row, edges) for row in nodes])
    out = nodes + F.elu(mixed)
    dense = randomised(torch.nn.Linear(2 * D, D))
    features = F.gelu(dense(torch.cat([out.mean(1), out.amax(1)], dim=-1)), approximate="tanh")
    case(
        "gat", {"a": a, "b": b}, features,
        **{
            "params/layer0/kernel": convolution.lin.weight.T.reshape(D, HEADS, D // HEADS),
            "params/layer0_to": convolution.att_dst[0],
            "params/layer0_from": convolution.att_src[0],
            "params/type_a": torch.zeros(D),
            "params/type_b": torch.zeros(D),
        },
        **linear("params/out", dense),
    )  # fmt: skip

    a, b = torch.randn(B, D), torch.randn(B, D)
    value, hidden = randomised(torch.nn.Linear(D, D)), randomised(torch.nn.Linear(D, D))
    score = randomised(torch.nn.Linear(D, 1, bias=False))
    gate = torch.nn.Sequential(value, hidden, torch.nn.Tanh(), score)
    aggregation = torch_geometric.nn.aggr.AttentionalAggregation(gate, value)
    out = aggregation(torch.stack([a, b], 1).reshape(-1, D), torch.arange(B).repeat_interleave(2))
    case(
        "attention_pool", {"a": a, "b": b}, out,
        **linear("params/project_a", value), **linear("params/project_b", value), **linear("params/hidden", hidden),
        **{"params/score/kernel": score.weight.T},
    )  # fmt: skip


def bootstrap_cases(sources):
    fusions = load(sources / "block.bootstrap.pytorch-0.1.6/block/models/networks", "fusions/fusions.py", "mlp.py")
    a, b = torch.randn(B, D), torch.randn(B, D)
    identity = torch.nn.Linear(D, D, bias=False)
    torch.nn.init.eye_(identity.weight)

    mlb = randomised(fusions.MLB((D, D), D, mm_dim=D, activ_input="tanh", activ_output=None))
    sides = {**linear("params/project_a", mlb.linear0), **linear("params/project_b", mlb.linear1)}
    case("mlb", {"a": a, "b": b}, mlb((a, b)), **sides, **linear("params/out", mlb.linear_out))

    def grouped(prefix, layer, *shape):
        arrays = linear(prefix, layer)
        return {key: value.reshape(*value.shape[:-1], *shape) for key, value in arrays.items()}

    mfb = randomised(fusions.MFB((D, D), D, mm_dim=D, factor=5, activ_input=None, activ_output=None, normalize=True))
    mfb.linear_out = identity
    case(
        "mfb", {"a": a, "b": b}, mfb((a, b)),
        **grouped("params/project_a", mfb.linear0, D, 5), **grouped("params/project_b", mfb.linear1, D, 5),
    )  # fmt: skip

    mfh = randomised(fusions.MFH((D, D), D, mm_dim=D, factor=5, activ_input=None, activ_output=None, normalize=True))
    blocks = {}
    for i in range(2):
        for side, m in enumerate("ab"):
            blocks |= grouped(f"params/block{i}_{m}", getattr(mfh, f"linear{side}_{i}"), D, 5)
    case("mfh", {"a": a, "b": b}, mfh((a, b)), **blocks, **linear("params/out", mfh.linear_out))

    chunked = randomised(fusions.Block((D, D), D, mm_dim=D, chunks=2, rank=3))
    cores = {}
    for m, layers in (("a", chunked.merge_linears0), ("b", chunked.merge_linears1)):
        cores[f"params/core_{m}"] = torch.stack([layer.weight.T for layer in layers])
        cores[f"params/core_bias_{m}"] = torch.stack([layer.bias for layer in layers])
    case(
        "block_term", {"a": a, "b": b}, chunked((a, b)), **cores, **linear("params/project_a", chunked.linear0),
        **linear("params/project_b", chunked.linear1), **linear("params/out", chunked.linear_out),
    )  # fmt: skip


def kale_cases(sources):
    fusion = load(sources / "pykale/kale/embed", "multimodal_fusion.py").LowRankTensorFusion((D, D, D), D, rank=4)
    for parameter in (*fusion.factors, fusion.fusion_weights, fusion.fusion_bias):
        torch.nn.init.normal_(parameter, std=0.4)
    inputs = {m: torch.randn(B, D) for m in "abc"}
    weights = {"params/weights": fusion.fusion_weights[0], "params/bias": fusion.fusion_bias[0]}
    for m, factor in zip("abc", fusion.factors, strict=True):  # [rank, 1 + D, out], the 1 first
        weights[f"params/project_{m}/kernel"] = factor[:, 1:].permute(1, 0, 2)
        weights[f"params/project_{m}/bias"] = factor[:, 0]
    case("low_rank_tensor", inputs, fusion(list(inputs.values())), **weights)


def load(folder, file, *siblings):
    """Returns the module in one file of a package, without importing the rest of the package."""
    package = types.ModuleType("published")
    package.__path__ = [str(folder)]
    sys.modules["published"] = package
    for path in (*siblings, file):
        parts = Path(path).with_suffix("").parts
        for depth in range(1, len(parts)):
            inner = types.ModuleType(".".join(("published", *parts[:depth])))
            inner.__path__ = [str(folder.joinpath(*parts[:depth]))]
            sys.modules[inner.__name__] = inner
        spec = importlib.util.spec_from_file_location(".".join(("published", *parts)), folder / path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    torch.manual_seed(0)
    with torch.no_grad():
        torch_cases()
        geometric_cases()
        bootstrap_cases(Path(sys.argv[1]))
        kale_cases(Path(sys.argv[1]))
    np.savez_compressed(Path(__file__).with_name("fixtures.npz"), **CASES)
