"""Rules that map parameter names of published weights to parameter paths of the encoders.

They cover torchvision, timm and Hugging Face transformers.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn

from mmfusion.models.encoders.bert import BERT
from mmfusion.models.encoders.classic import VGG16, AlexNet
from mmfusion.models.encoders.convnext import ConvNeXtT
from mmfusion.models.encoders.modernbert import ModernBERT
from mmfusion.models.encoders.resnet import ResNet18
from mmfusion.models.encoders.vit import ViTTi

Tensors = Mapping[str, Any]  # name -> array
Rules = list[tuple[str, str]]  # (regular expression of a published module or tensor, template of our path)
# Maps a file's tensors to rules, and to a regular expression of the tensors that an encoder may omit.
Family = Callable[[Tensors], tuple[Rules, str]]


def _feature_indices(tensors: Tensors) -> tuple[list[int], list[int]]:
    """Returns the indices in `features` of the convolutions, and of the norms between them, in order."""
    ranks = {
        int(match[1]): tensor.ndim
        for name, tensor in tensors.items()
        if (match := re.fullmatch(r"(?:.*\.)?features\.(\d+)\.weight", name))
    }
    convs, norms = (sorted(index for index in ranks if ranks[index] == ndim) for ndim in (4, 1))
    return convs, norms


def _vgg(stages: Callable[[int], tuple[int, ...]]) -> Family:
    def rules(tensors: Tensors) -> tuple[Rules, str]:
        convs, norms = _feature_indices(tensors)
        names = [f"{stage}_{layer}" for stage, count in enumerate(stages(len(convs))) for layer in range(count)]
        result = [(rf"features\.{index}", f"conv{name}") for index, name in zip(convs, names, strict=False)]
        result += [(rf"features\.{index}", f"norm{name}/batch") for index, name in zip(norms, names, strict=False)]
        result += [(r"classifier\.0", "top/fc6"), (r"classifier\.3", "top/fc7")]  # torchvision
        result += [(r"pre_logits\.fc1", "top/fc6"), (r"pre_logits\.fc2", "top/fc7")]  # timm
        return result, r"classifier\.[036]|pre_logits|head\.fc"

    return rules


def _alexnet(tensors: Tensors) -> tuple[Rules, str]:
    convs, _ = _feature_indices(tensors)
    rules = [(rf"features\.{index}", f"conv{number}") for number, index in enumerate(convs, 1)]
    return [*rules, (r"classifier\.1", "top/fc6"), (r"classifier\.4", "top/fc7")], r"classifier\.[146]"


def _resnet(tensors: Tensors) -> tuple[Rules, str]:
    rules = [("conv1", "conv_stem"), ("bn1", "norm_stem/batch")]
    embedder = r"(?:resnet\.)?embedder\.embedder"
    rules += [(rf"{embedder}\.convolution", "conv_stem"), (rf"{embedder}\.normalization", "norm_stem/batch")]
    for stage in range(4):
        ours = rf"stage{stage}_block\1"
        blocks = rf"layer{stage + 1}\.(\d+)"  # torchvision and timm
        rules += [(rf"{blocks}\.conv(\d)", rf"{ours}/conv_\2"), (rf"{blocks}\.bn(\d)", rf"{ours}/norm_\2/batch")]
        rules += [(rf"{blocks}\.downsample\.0", f"{ours}/conv_skip")]
        rules += [(rf"{blocks}\.downsample\.1", f"{ours}/norm_skip/batch")]
        hub = rf"(?:resnet\.)?encoder\.stages\.{stage}\.layers\.(\d+)"
        for layer in range(3):
            rules += [(rf"{hub}\.layer\.{layer}\.convolution", f"{ours}/conv_{layer + 1}")]
            rules += [(rf"{hub}\.layer\.{layer}\.normalization", f"{ours}/norm_{layer + 1}/batch")]
        rules += [(rf"{hub}\.shortcut\.convolution", f"{ours}/conv_skip")]
        rules += [(rf"{hub}\.shortcut\.normalization", f"{ours}/norm_skip/batch")]
    return rules, r"fc|classifier"


def _convnext(tensors: Tensors) -> tuple[Rules, str]:
    rules = [(r"stem\.0", "shrink0"), (r"stem\.1", "norm0"), (r"head\.norm", "norm"), (r"norm_pre", "norm")]  # timm
    rules += [(r"features\.0\.0", "shrink0"), (r"features\.0\.1", "norm0"), (r"classifier\.0", "norm")]  # torchvision
    hub = r"(?:convnext\.)?"
    rules += [(rf"{hub}embeddings\.patch_embeddings", "shrink0"), (rf"{hub}embeddings\.layernorm", "norm0")]
    rules += [(rf"{hub}layernorm", "norm")]
    block = {  # ours: names in timm, torchvision and transformers
        "depthwise": ("conv_dw", r"block\.0", "dwconv"),
        "norm": ("norm", r"block\.2", "layernorm"),
        "mlp_in": (r"mlp\.fc1", r"block\.3", "pwconv1"),
        "mlp_out": (r"mlp\.fc2", r"block\.5", "pwconv2"),
        "scale": ("gamma", "layer_scale", "layer_scale_parameter"),
    }
    for stage in range(4):
        prefixes = (
            rf"stages\.{stage}\.blocks\.(\d+)",
            rf"features\.{2 * stage + 1}\.(\d+)",
            rf"{hub}encoder\.stages\.{stage}\.layers\.(\d+)",
        )
        for ours, theirs in block.items():
            rules += [
                (rf"{prefix}\.{name}", rf"stage{stage}_block\1/{ours}")
                for prefix, name in zip(prefixes, theirs, strict=True)
            ]
        downsample = (
            rf"stages\.{stage}\.downsample",
            rf"features\.{2 * stage}",
            rf"{hub}encoder\.stages\.{stage}\.downsampling_layer",
        )
        for prefix in downsample if stage else ():
            rules += [(rf"{prefix}\.0", f"norm{stage}"), (rf"{prefix}\.1", f"shrink{stage}")]
    return rules, r"head\.fc|classifier"


def _vit(tensors: Tensors) -> tuple[Rules, str]:
    hub = r"(?:vit\.)?"
    rules = [
        ("cls_token|class_token", "class"), ("pos_embed|encoder.pos_embedding", "positions"),
        (r"patch_embed\.proj|conv_proj", "patches"), (r"norm|encoder\.ln", "norm_last"),
        (rf"{hub}embeddings\.cls_token", "class"), (rf"{hub}embeddings\.position_embeddings", "positions"),
        (rf"{hub}embeddings\.patch_embeddings\.projection", "patches"), (rf"{hub}layernorm", "norm_last"),
    ]  # fmt: skip
    timm, torchvision = r"blocks\.(\d+)", r"encoder\.layers\.encoder_layer_(\d+)"
    transformers = rf"{hub}(?:encoder\.layer|layers)\.(\d+)"  # version 4 and earlier, and later versions
    block = {
        "norm": (r"norm1", "ln_1", "layernorm_before"),
        "norm_mlp": (r"norm2", "ln_2", "layernorm_after"),
        "attention/query": (None, None, r"attention\.attention\.query|attention\.q_proj"),
        "attention/key": (None, None, r"attention\.attention\.key|attention\.k_proj"),
        "attention/value": (None, None, r"attention\.attention\.value|attention\.v_proj"),
        "attention/out": (r"attn\.proj", r"self_attention\.out_proj", r"attention\.output\.dense|attention\.o_proj"),
        "mlp_in": (r"mlp\.fc1", r"mlp\.(?:0|linear_1)", r"intermediate\.dense|mlp\.fc1"),
        "mlp_out": (r"mlp\.fc2", r"mlp\.(?:3|linear_2)", r"output\.dense|mlp\.fc2"),
    }
    for ours, theirs in block.items():
        for prefix, name in zip((timm, torchvision, transformers), theirs, strict=True):
            rules += [(rf"{prefix}\.(?:{name})", rf"block\1/{ours}")] if name else []
    qkv = "+".join(rf"block\1/attention/{name}" for name in ("query", "key", "value"))
    rules += [(rf"{timm}\.attn\.qkv", qkv), (rf"{torchvision}\.self_attention\.in_proj", qkv)]
    return rules, r"head|heads\.head|classifier|pooler"


def _bert(tensors: Tensors) -> tuple[Rules, str]:
    hub = r"(?:bert\.|roberta\.)?"
    layer = rf"{hub}encoder\.layer\.(\d+)"
    rules = [
        (rf"{hub}embeddings\.word_embeddings", "embed"), (rf"{hub}embeddings\.position_embeddings", "place"),
        (rf"{hub}embeddings\.token_type_embeddings", "segment"), (rf"{hub}embeddings\.LayerNorm", "norm_embed"),
        *[(rf"{layer}\.attention\.self\.{name}", rf"block\1/attention/{name}") for name in ("query", "key", "value")],
        (rf"{layer}\.attention\.output\.dense", r"block\1/attention/out"),
        (rf"{layer}\.attention\.output\.LayerNorm", r"block\1/norm_attention"),
        (rf"{layer}\.intermediate\.dense", r"block\1/mlp_in"), (rf"{layer}\.output\.dense", r"block\1/mlp_out"),
        (rf"{layer}\.output\.LayerNorm", r"block\1/norm_mlp"), (rf"{hub}pooler\.dense", "pooler"),
    ]  # fmt: skip
    return rules, r"cls|lm_head|classifier|pooler|qa_outputs"


def _modernbert(tensors: Tensors) -> tuple[Rules, str]:
    hub = r"(?:model\.)?"
    layer = rf"{hub}layers\.(\d+)"
    rules = [
        (rf"{hub}embeddings\.tok_embeddings", "embed"), (rf"{hub}embeddings\.norm", "norm_embed"),
        (rf"{layer}\.attn_norm", r"block\1/norm_attention"), (rf"{layer}\.mlp_norm", r"block\1/norm_mlp"),
        (rf"{layer}\.attn\.Wqkv", "+".join(rf"block\1/attention/{name}" for name in ("query", "key", "value"))),
        (rf"{layer}\.attn\.Wo", r"block\1/attention/out"), (rf"{layer}\.mlp\.Wi", r"block\1/mlp_in"),
        (rf"{layer}\.mlp\.Wo", r"block\1/mlp_out"), (rf"{hub}final_norm", "norm_last"),
    ]  # fmt: skip
    return rules, r"head|decoder|classifier"


VGG_STAGES = {8: (1, 1, 2, 2, 2), 13: (2, 2, 3, 3, 3)}  # number of convolutions -> convolutions per stage
FAMILIES: dict[type[nn.Module], Family] = {
    VGG16: _vgg(lambda convs: VGG_STAGES.get(convs, ())),
    AlexNet: _alexnet,
    ResNet18: _resnet,
    ConvNeXtT: _convnext,
    ViTTi: _vit,
    BERT: _bert,
    ModernBERT: _modernbert,
}
