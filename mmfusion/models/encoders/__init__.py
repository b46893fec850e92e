"""Encoders, by the name a config gives them: `(x, mask, *, train) -> tokens [B, N, D], mask [B, N]`."""

import flax.linen as nn

from mmfusion.models.encoders.audio import LogMelCNN
from mmfusion.models.encoders.image import CNN, ResNet18, ResNet50
from mmfusion.models.encoders.text import RNN, BagOfWords

ENCODERS: dict[str, type[nn.Module]] = {
    "cnn": CNN,
    "resnet18": ResNet18,
    "resnet50": ResNet50,
    "bow": BagOfWords,
    "rnn": RNN,
    "logmel_cnn": LogMelCNN,
}
