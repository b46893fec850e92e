"""Two medical pictures, X-ray and CT, joined at the input: a CNN whose feature map a recurrent network reads.

python -m experiments.train --config=configs/xray_ct.py --workdir=DIR

The data is generated and only stands in for such pictures (`stand_ins/xray_ct`): each shows nothing in 30 % of the
examples, so that one alone is right in at most 0.775 of them, and both in 0.9325. `:joined=False` gives each its own
encoder, fused by a strategy, and `,shared=True` both the same weights; `:size=128` reads larger pictures. Of
`--config.model.encoders.xray`, `.channels="(16,32,64)"` makes the CNN deeper, `.layers=2` the recurrent network,
`.steps=cells` reads the map cell by cell, and `.tokens=attention` weighs its steps. `.name=resnet18` with
`.stem=imagenet`, `.norm=batch`, `.recurrent=rows` and `.init=FILE_OR_HUB_ID` begins at published weights, whose map an
LSTM reads (with `:size=224`, or the map has two rows); `.freeze=600` leaves them as they are.
`--config.data.modalities.xray.augment.crop=4` (and of `ct` the same: both are moved alike; `flip=0.5` is for pictures
whose mirror image means the same, which it does not here), `--config.data.targets.label.loss=focal`,
`--config.optim.name=momentum`.
"""

from ml_collections import ConfigDict

from mmfusion.config import defaults
from mmfusion.errors import UserError


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config; arguments: those of `base.begin`, joined, shared, and size (pixels of a side)."""
    config, args = defaults.begin(arg, joined=True, shared=False, size=64)
    if args.joined and args.shared:
        raise UserError(
            "config arguments: pictures that share an encoder are not joined: give joined=False, shared=True"
        )
    config.steps = 600
    config.batch_size = 32
    config.eval_every = config.checkpoint_every = 200

    config.data.name = "stand_ins/xray_ct"
    for name in ("xray", "ct"):
        config.data.modalities[name] = defaults.modality("image", name, size=(args.size, args.size), channels=1)
        config.model.encoders[name] = defaults.encoder("image", "cnn_rnn")
    if args.joined:
        del config.model.encoders.ct
        config.model.encoders.xray.join = ("ct",)
    elif args.shared:
        config.model.encoders.ct.share = "xray"
        config.model.encoders.xray.norm = "group"  # each picture has statistics of its own
    config.data.targets.label = defaults.target("classification", "label")
    config.optim = defaults.optimizer("adamw", 1e-3, schedule_options={"warmup_steps": 50})
    return defaults.finish(config, args)
