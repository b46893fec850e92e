"""Three images of one object, with 1, 3 and 4 channels: a CNN each, global average pooling, fusion, a dense layer.

python -m experiments.train --config=configs/three_images.py --workdir=DIR

Data: `synthetic/three_images`, generated. Each image is uninformative in 30 % of the examples: the best possible
accuracy of one image is 0.73, of all three 0.976. Feature fusion: `concat`, the default. Fusion at several depths:
`:fusion=central`, whose branches are dense layers over the encoders, and `:fusion=bottleneck,encoder=cnn`, transformer
layers over the cells of the feature maps. A graph attention network over these cells: `:fusion=gat,encoder=cnn`. Two
tasks, the second being the number of informative images: `:tasks=label+num_informative`, which
`,objectives=uncertainty` (or `gradnorm`) weights.
"""

from ml_collections import ConfigDict

from mmfusion.config import defaults
from mmfusion.errors import UserError

ENCODERS = ("pooled_cnn", "cnn")


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config.

    Arguments: those of `defaults.begin`, encoder (pooled_cnn or cnn), and tasks (label+num_informative).
    """
    config, args = defaults.begin(arg, encoder="pooled_cnn", tasks="label")
    if args.encoder not in ENCODERS:
        raise UserError("unknown choice", path="config argument encoder", value=args.encoder, choices=ENCODERS)
    config.steps = 1500
    config.batch_size = 64
    config.eval_every = config.checkpoint_every = 500

    config.data.name = "synthetic/three_images"
    options = {"channels": (32, 64), "norm": "batch"}
    options |= {"reduce": "mean"} if args.encoder == "pooled_cnn" else {"strides": (2, 2)}
    for name, channels in (("gray", 1), ("colour", 3), ("deep", 4)):
        config.data.modalities[name] = defaults.modality("image", name, size=(28, 28), channels=channels)
        config.model.encoders[name] = defaults.encoder("image", args.encoder, **options)
    defaults.add_tasks(config, args.tasks)
    config.optim = defaults.optimizer("adamw", 2e-3, schedule_options={"warmup_steps": 50})
    return defaults.finish(config, args)
