"""Writes `encoders.npz`: small encoders of published implementations with random weights, for `test_pretrained.py`.

pip install torch==2.13.0 torchvision==0.29.2 timm==1.0.31 transformers==5.23.0 numpy
python tests/published/make_encoders.py

Each case has the tensors under their published names, an input, and the encoder's output features.
"""

from pathlib import Path

import numpy as np
import timm.models.convnext
import timm.models.vgg
import timm.models.vision_transformer
import torch
import torchvision
import transformers
from torch import nn
from torchvision.models import convnext, resnet, vgg

CASES = {}
STAGES = (3, 6, 12, 24)


def randomised(module):
    """Returns the module in evaluation mode with random parameters and statistics, so that none is 0 or 1."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            nn.init.normal_(buffer)
        if name.endswith("running_var"):
            nn.init.uniform_(buffer, 0.5, 2.0)
    return module.eval()


def case(name, module, x, output):
    """Adds a case: images `[B, H, W, C]` or token ids, output features `[B, N, D]`, and the tensors."""
    CASES[f"{name}/input"] = x.permute(0, 2, 3, 1).numpy() if x.ndim == 4 else x.numpy().astype(np.int32)
    CASES[f"{name}/output"] = output.detach().numpy()
    for key, tensor in module.state_dict().items():
        CASES[f"{name}/tensors/{key}"] = tensor.numpy()


def flattened(x):
    """Returns `[B, C, H, W]` as `[B, H·W, C]`."""
    return x.flatten(2).transpose(1, 2)


class TinyVGG(nn.Module):
    """torchvision's VGG with small layers; its class hard-codes 4096 classifier units."""

    def __init__(self, *, norm, units):
        super().__init__()
        plan = [2, "M", 4, "M", 8, 8, "M", 16, 16, "M", 16, 16, "M"]
        self.features = vgg.make_layers(plan, batch_norm=norm)
        self.avgpool = nn.AdaptiveAvgPool2d(7)
        self.classifier = nn.Sequential(
            nn.Linear(16 * 49, units), nn.ReLU(), nn.Dropout(), nn.Linear(units, units), nn.ReLU(), nn.Dropout(),
            nn.Linear(units, 3),
        )  # fmt: skip


class TinyAlexNet(nn.Module):
    """torchvision's AlexNet with small layers and the same names."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 2, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(2, 6, 5, padding=2), nn.ReLU(),
            nn.MaxPool2d(3, 2), nn.Conv2d(6, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 8, 3, padding=1), nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2),
        )  # fmt: skip
        self.avgpool = nn.AdaptiveAvgPool2d(6)
        self.classifier = nn.Sequential(
            nn.Dropout(), nn.Linear(8 * 36, 6), nn.ReLU(), nn.Dropout(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)
        )


def alexnets(x):
    model = randomised(TinyAlexNet())
    case("alexnet-torchvision", model, x, model.classifier[:6](model.avgpool(model.features(x)).flatten(1))[:, None])


class TinyResNet(nn.Module):
    """torchvision's bottleneck blocks with its names, which timm shares; its class starts with 64 channels."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 3, 7, 2, 3, bias=False), nn.BatchNorm2d(3)
        before = 3
        for stage, (planes, count) in enumerate(zip(STAGES, (1, 1, 2, 1), strict=True)):
            blocks = []
            for block in range(count):
                stride = 2 if stage and not block else 1
                skip = nn.Sequential(nn.Conv2d(before, 4 * planes, 1, stride, bias=False), nn.BatchNorm2d(4 * planes))
                blocks.append(resnet.Bottleneck(before, planes, stride, None if block else skip))
                before = 4 * planes
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(before, 3)


def vggs(x):
    plain = randomised(TinyVGG(norm=False, units=6))
    hidden = plain.classifier[:6](plain.avgpool(plain.features(x)).flatten(1))
    case("vgg-torchvision-fc", plain, x, hidden[:, None])
    normed = randomised(TinyVGG(norm=True, units=6))
    case("vgg-torchvision-bn", normed, x, flattened(normed.features(x)))
    timm_vgg = randomised(
        timm.models.vgg.VGG([2, "M", 4, "M", 8, 8, "M", 16, 16, "M", 16, 16, "M"], num_classes=3, mlp_ratio=0.002)
    )
    timm_vgg.pre_logits.fc2.weight.zero_()  # large but unused
    case("vgg-timm", timm_vgg, x, flattened(timm_vgg.features(x)))


def resnets(x):
    for name, kind, sizes in (("basic", "basic", STAGES), ("bottleneck", "bottleneck", tuple(4 * c for c in STAGES))):
        config = transformers.ResNetConfig(
            embedding_size=3, hidden_sizes=list(sizes), depths=[1, 1, 2, 1], layer_type=kind, num_labels=3
        )
        model = randomised(transformers.ResNetForImageClassification(config))
        case(f"resnet-transformers-{name}", model, x, flattened(model.resnet(x).last_hidden_state))
    model = randomised(TinyResNet())
    stem = nn.Sequential(model.conv1, model.bn1, nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    out = nn.Sequential(stem, model.layer1, model.layer2, model.layer3, model.layer4)(x)
    case("resnet-torchvision", model, x, flattened(out))


def convnexts(x):
    config = transformers.ConvNextConfig(hidden_sizes=list(STAGES), depths=[1, 2, 1, 1], num_labels=3)
    model = randomised(transformers.ConvNextForImageClassification(config))
    out = flattened(model.convnext(x).last_hidden_state)
    norm = model.convnext.layernorm
    case("convnext-transformers", model, x, nn.functional.layer_norm(out, out.shape[-1:], norm.weight, norm.bias, 1e-6))
    model = randomised(timm.models.convnext.ConvNeXt(depths=(1, 2, 1, 1), dims=STAGES, num_classes=3))
    out = flattened(model.forward_features(x))
    norm = model.head.norm
    case("convnext-timm", model, x, nn.functional.layer_norm(out, out.shape[-1:], norm.weight, norm.bias, 1e-6))
    plan = [convnext.CNBlockConfig(a, b, n) for a, b, n in ((3, 6, 1), (6, 12, 2), (12, 24, 1), (24, None, 1))]
    model = randomised(convnext.ConvNeXt(plan, num_classes=3))
    case("convnext-torchvision", model, x, flattened(model.classifier[0](model.features(x))))


def vits(x):
    sizes = {"image_size": 16, "patch_size": 4, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.ViTConfig(**sizes, intermediate_size=32, layer_norm_eps=1e-6, num_labels=3)
    model = randomised(transformers.ViTForImageClassification(config))
    case("vit-transformers", model, x, model.vit(x).last_hidden_state)
    model = randomised(timm.models.vision_transformer.VisionTransformer(16, 4, 3, 3, embed_dim=8, depth=2, num_heads=2))
    case("vit-timm", model, x, model.forward_features(x))
    model = randomised(torchvision.models.VisionTransformer(16, 4, 2, 2, 8, 32, num_classes=3))
    patches = model._process_input(x)
    tokens = torch.cat([model.class_token.expand(len(x), -1, -1), patches], dim=1)
    case("vit-torchvision", model, x, model.encoder(tokens))


def berts(ids):
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=12, num_labels=3,
    )  # fmt: skip
    model = randomised(transformers.BertForSequenceClassification(config))
    out = model.bert(ids, attention_mask=(ids > 0).long())
    case("bert-transformers-all", model, ids, out.last_hidden_state * (ids > 0)[:, :, None])
    case("bert-transformers-pooled", model, ids, out.pooler_output[:, None])


def positions():
    """Adds a grid of position embeddings and its resizing by timm to a larger and a smaller grid."""
    grid = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    CASES["positions/16"] = grid
    for side in (6, 3):
        feature_map = torch.tensor(grid).reshape(1, 4, 4, 8).permute(0, 3, 1, 2)
        resized = nn.functional.interpolate(feature_map, size=(side, side), mode="bicubic", antialias=True)
        CASES[f"positions/{side * side}"] = flattened(resized)[0].numpy()


if __name__ == "__main__":
    torch.manual_seed(0)
    with torch.no_grad():
        large = torch.randn(1, 3, 64, 32)
        vggs(large)
        resnets(large)
        convnexts(large)
        alexnets(torch.randn(1, 3, 95, 63))
        vits(torch.randn(2, 3, 16, 16))
        positions()
        berts(torch.tensor([[5, 3, 19, 7, 0, 0], [2, 2, 11, 4, 9, 13]]))
    path = Path(__file__).with_name("encoders.npz")
    np.savez_compressed(path, **CASES)
    print(f"{path}: {len(CASES)} arrays, {path.stat().st_size / 1e3:.0f} kB")
