"""Registry of encoders, by config name: `(x, mask, *, train) -> tokens [B, N, D], mask [B, N]`.

The class attribute `reads` of an encoder is its modality type, or a tuple of them.
"""

from typing import Any

import flax.linen as nn

from mmfusion.models.encoders.audio import LogMelCNN, WaveformCNN
from mmfusion.models.encoders.bert import BERT, RoBERTa
from mmfusion.models.encoders.classic import VGG11, VGG16, AlexNet, LeNet5, PooledCNN
from mmfusion.models.encoders.cnn_rnn import CNNRNN
from mmfusion.models.encoders.convnext import ConvNeXtT
from mmfusion.models.encoders.graph import GCN, GraphAttention, KnowledgeAttention
from mmfusion.models.encoders.image import CNN
from mmfusion.models.encoders.inception import InceptionV1, InceptionV3
from mmfusion.models.encoders.modernbert import ModernBERT
from mmfusion.models.encoders.resnet import ResNet18, ResNet34, ResNet50, ResNet101
from mmfusion.models.encoders.sequence import MLP, TCN
from mmfusion.models.encoders.table import FTTransformer, TableMLP
from mmfusion.models.encoders.text import RNN, BagOfWords, TextCNN
from mmfusion.models.encoders.transformer import SpectrogramTransformer, TextTransformer
from mmfusion.models.encoders.video import CNN3D, FrameCNN
from mmfusion.models.encoders.vit import ViTB, ViTS, ViTTi

ENCODERS: dict[str, type[nn.Module]] = {
    "cnn": CNN,
    "pooled_cnn": PooledCNN,
    "cnn_rnn": CNNRNN,
    "lenet5": LeNet5,
    "alexnet": AlexNet,
    "vgg11": VGG11,
    "vgg16": VGG16,
    "inception_v1": InceptionV1,
    "inception_v3": InceptionV3,
    "resnet18": ResNet18,
    "resnet34": ResNet34,
    "resnet50": ResNet50,
    "resnet101": ResNet101,
    "convnext_t": ConvNeXtT,
    "vit_ti": ViTTi,
    "vit_s": ViTS,
    "vit_b": ViTB,
    "bow": BagOfWords,
    "textcnn": TextCNN,
    "rnn": RNN,
    "transformer": TextTransformer,
    "bert": BERT,
    "roberta": RoBERTa,
    "modernbert": ModernBERT,
    "logmel_cnn": LogMelCNN,
    "waveform_cnn": WaveformCNN,
    "ast": SpectrogramTransformer,
    "frame_cnn": FrameCNN,
    "cnn3d": CNN3D,
    "table_mlp": TableMLP,
    "ft_transformer": FTTransformer,
    "mlp": MLP,
    "tcn": TCN,
    "gcn": GCN,
    "graph_attention": GraphAttention,
    "knowledge_attention": KnowledgeAttention,
}


def can_read(encoder_class: Any, kind: str) -> bool:
    """Returns whether an encoder reads a modality type; those that read `image` read every image of `images`."""
    reads = getattr(encoder_class, "reads", ())
    reads = (reads,) if isinstance(reads, str) else tuple(reads)
    return kind in reads or (kind == "images" and "image" in reads)
