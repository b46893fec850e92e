"""Three pictures of one thing, of 1, 3 and 4 channels: a CNN each, global average pooling, fused, dense.

python -m experiments.train --config=configs/three_pictures.py --workdir=DIR

The data is generated (`stand_ins/three_pictures`): each picture shows nothing in 30 % of the examples, so that one
alone is right in at most 0.73 of them, and all in 0.976. Fusion of features: `concat`, the default. Fusion of
structure, branches joined at several depths: `:fusion=central`, whose branches are dense layers over the encoders, and
`:fusion=bottleneck,encoder=cnn`, of transformer layers over the cells of the maps. A graph attention network over these
cells: `:fusion=gat,encoder=cnn`. Two tasks, the second how many of the pictures show something: `:tasks=label+shown`,
which `,objectives=uncertainty` (or `gradnorm`) weighs.
"""

from ml_collections import ConfigDict

from mmfusion.config import defaults
from mmfusion.errors import UserError


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config; arguments: those of `base.begin`, encoder (pooled_cnn or cnn), and tasks (label+shown)."""
    config, args = defaults.begin(arg, encoder="pooled_cnn", tasks="label")
    if args.encoder not in ("pooled_cnn", "cnn"):
        raise UserError(f"config argument encoder={args.encoder!r} must be pooled_cnn or cnn")
    config.steps = 1500
    config.batch_size = 64
    config.eval_every = config.checkpoint_every = 500

    config.data.name = "stand_ins/three_pictures"
    options = {"channels": (32, 64), "norm": "batch"}
    options |= {"reduce": "mean"} if args.encoder == "pooled_cnn" else {"strides": (2, 2)}
    for name, channels in (("gray", 1), ("colour", 3), ("deep", 4)):
        config.data.modalities[name] = defaults.modality("image", name, size=(28, 28), channels=channels)
        config.model.encoders[name] = defaults.encoder("image", args.encoder, **options)
    defaults.add_tasks(config, args.tasks)
    config.optim = defaults.optimizer("adamw", 2e-3, schedule_options={"warmup_steps": 50})
    return defaults.finish(config, args)
