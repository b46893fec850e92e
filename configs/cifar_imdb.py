"""CIFAR-10 images beside unrelated IMDB reviews: does an ablation detect that the text carries no information?

python -m experiments.train --config=configs/cifar_imdb.py --workdir=DIR --config.data.manual_dir=ARCHIVES

An article on fusing images and text trains a CNN and an LSTM, concatenated, on this pair and reports 60.00 % after 10
epochs. Image i is paired with review i modulo the number of reviews. The data is TFDS's official `cifar10` and
`imdb_reviews` or, where these cannot be prepared (no network, no TensorFlow), an archive of JPEG files and a subset of
10,000 reviews; `result.json` names the one that was used. `:data=archives` always takes the latter, `:data=tfds` only
the former.

`:network=article` has the article's layers: 32 convolutions of 3×3, pooling, flattened; Embedding(10000, 32) and an
LSTM of 64; concatenated, dense 128 and softmax. (As in every model here, each modality is first projected to 128 and
normalised.) `:network=article,fusion=cross_attention` has its attention, from each image cell to the words. Strategies
that need more than one token read the feature map of the small network's CNN and all states of the LSTM.
`:network=article,training=article` trains it as the article does: Adam, batches of 32, 10 epochs, 100 words, a fifth of
the training rows for validation.

`:network=deep` has four convolutions with batch normalisation for the image, trained for 15 epochs on flipped and
shifted images, so that the image alone is a strong baseline.
"""

from ml_collections import ConfigDict

from mmfusion.config import defaults
from mmfusion.errors import UserError
from mmfusion.models.fusion import FUSIONS
from mmfusion.registry import lookup

TFDS, ARCHIVES = "pair:cifar10+imdb_reviews:by=index", "pair:cifar10_images+imdb_subset:by=index"
PAIRS = {"any": (TFDS, ARCHIVES), "tfds": (TFDS, ""), "archives": (ARCHIVES, "")}

NETWORKS = ("small", "article", "deep")
TRAINING = ("mmfusion", "article")


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config.

    Arguments: those of `defaults.begin`, data (any, tfds or archives), network (small, article or deep), and training
    (mmfusion or article).
    """
    config, args = defaults.begin(arg, data="any", network="small", training="mmfusion")
    if args.data not in PAIRS:
        raise UserError("unknown choice", path="config argument data", value=args.data, choices=PAIRS)
    if args.network not in NETWORKS:
        raise UserError("unknown choice", path="config argument network", value=args.network, choices=NETWORKS)
    if args.training not in TRAINING:
        raise UserError("unknown choice", path="config argument training", value=args.training, choices=TRAINING)
    config.steps = 2000
    config.batch_size = 64
    config.eval_every = config.checkpoint_every = 500

    config.data.name, config.data.fallback_name = PAIRS[args.data]
    config.data.modalities.image = defaults.modality("image", "image", size=(32, 32))
    config.data.modalities.text = defaults.modality("text", "text", vocabulary_size=10_000, length=64)
    config.data.targets.label = defaults.target("classification", "label")

    config.model.width = 128 if args.network == "article" else 64
    config.model.encoders.image, tokens = defaults.encoder("image", "cnn", norm="batch"), "all"
    if args.network == "article" and not lookup(FUSIONS, args.fusion, "config argument fusion").declares.needs_tokens:
        config.model.encoders.image, tokens = defaults.encoder("image", "pooled_cnn"), "last"
    if args.network == "article" and args.fusion == "concat":
        config.model.fusion.layers = 1
    config.model.encoders.text = defaults.encoder("text", "rnn", embedding=32, tokens=tokens)
    config.optim = defaults.optimizer("adamw", 1e-3, schedule_options={"warmup_steps": 100})
    if args.network == "deep":
        _train_out(config)
    if args.training == "article":
        _as_the_article(config)
    return defaults.finish(config, args)


def _train_out(config: ConfigDict) -> None:
    config.steps = 10_560  # 15 epochs of 45,000 rows
    config.eval_every = config.checkpoint_every = 704
    config.data.modalities.image.augment.update({"flip": 0.5, "crop": 4})
    config.model.encoders.image = defaults.encoder(
        "image", "cnn", channels=(32, 64, 64, 128), strides=(1, 2, 1, 2), norm="batch"
    )
    config.optim.learning_rate = 2e-3


def _as_the_article(config: ConfigDict) -> None:
    config.steps, config.batch_size = 12_500, 32  # 10 epochs of 40,000 rows
    config.eval_every = config.checkpoint_every = 1250
    config.data.valid_fraction = 0.2
    config.data.modalities.text.length = 100
    config.optim = defaults.optimizer("adamw", 1e-3, clip_norm=0.0, schedule="constant", weight_decay=0.0)
