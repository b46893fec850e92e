"""CIFAR-10 pictures beside IMDB reviews that have nothing to do with them: does an ablation see that?

python -m experiments.train --config=configs/cifar_imdb.py --workdir=DIR --config.data.manual_dir=ARCHIVES

An article on fusing images and text trains a CNN and an LSTM, concatenated, on this pair and reports 60.00 % after 10
epochs. Row i of the pictures meets review i modulo their number. The data is TFDS's official `cifar10` and
`imdb_reviews`, or, where they cannot be prepared (no network; no TensorFlow), an archive of JPEG files and a subset of
10,000 reviews; `result.json` says which. `:data=archives` takes the latter at once, `:data=tfds` nothing else.

`:network=article` has the article's layers: 32 convolutions of 3×3, pooling, flattened; Embedding(10000, 32) and an
LSTM of 64; concatenated, dense 128 and softmax. (Each modality is first projected to 128 and normalised, as in every
model here.) `:network=article,fusion=cross_attention` has its attention, from each picture's cells on words. Strategies
of more tokens than one have the CNN of the small network there, whose map they read, and all states of the LSTM.
"""

from ml_collections import ConfigDict

from mmfusion.config import defaults
from mmfusion.errors import UserError, nearest
from mmfusion.models.fusion import FUSIONS
from mmfusion.registry import lookup

TFDS, ARCHIVES = "pair:cifar10+imdb_reviews:by=index", "pair:cifar10_images+imdb_subset:by=index"
PAIRS = {"any": (TFDS, ARCHIVES), "tfds": (TFDS, ""), "archives": (ARCHIVES, "")}


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config; arguments: those of `base.begin`, data (any, tfds, archives), network (small or article)."""
    config, args = defaults.begin(arg, data="any", network="small")
    if args.data not in PAIRS:
        raise UserError(f"config argument data={args.data!r}: {nearest(args.data, PAIRS)}")
    if args.network not in ("small", "article"):
        raise UserError(f"config argument network={args.network!r} must be small or article")
    config.steps = 2000
    config.batch_size = 64
    config.eval_every = config.checkpoint_every = 500

    config.data.name, config.data.fallback_name = PAIRS[args.data]
    config.data.modalities.image = defaults.modality("image", "image", size=(32, 32))
    config.data.modalities.text = defaults.modality("text", "text", vocabulary_size=10_000, length=64)
    config.data.targets.label = defaults.target("classification", "label")

    config.model.width = 64 if args.network == "small" else 128
    config.model.encoders.image, tokens = defaults.encoder("image", "cnn", norm="batch"), "all"
    if args.network == "article" and not lookup(FUSIONS, args.fusion, "config argument fusion").declares.needs_tokens:
        config.model.encoders.image, tokens = defaults.encoder("image", "pooled_cnn"), "last"
    if args.network == "article" and args.fusion == "concat":
        config.model.fusion.layers = 1
    config.model.encoders.text = defaults.encoder("text", "rnn", embedding=32, tokens=tokens)
    config.optim = defaults.optimizer("adamw", 1e-3, schedule_options={"warmup_steps": 100})
    return defaults.finish(config, args)
