"""Two medical images, X-ray and CT, joined at the input: a CNN whose feature map is read by a recurrent network.

python -m experiments.train --config=configs/xray_ct.py --workdir=DIR

Data: `synthetic/xray_ct`, generated in place of such images. Each image is uninformative in 30 % of the examples: the
best possible accuracy of one alone is 0.775, of both 0.9325. `:joined=False` gives each image its own encoder, fused by
a strategy, and `,shared=True` one encoder with the same weights for both; `:size=128` reads larger images.

Keys of `--config.model.encoders.xray`: `.channels="(16,32,64)"` makes the CNN deeper, `.layers=2` the recurrent
network, `.steps=cells` reads the map cell by cell, and `.tokens=attention` weights its steps. `.name=resnet18` with
`.stem=imagenet`, `.norm=batch`, `.recurrent=rows` and `.init=FILE_OR_HUB_ID` starts from published weights, whose map
an LSTM reads (with `:size=224`, or the map has two rows); `.freeze=600` keeps them fixed.

Other keys: `--config.data.modalities.xray.augment.crop=4` (set the same for `ct`: both are moved alike; `flip=0.5` is
for images whose mirror image has the same label, which is not the case here),
`--config.data.targets.label.loss=focal`, `--config.optim.name=momentum`.
"""

from ml_collections import ConfigDict

from mmfusion.config import defaults
from mmfusion.errors import UserError


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config; arguments: those of `defaults.begin`, joined, shared, and size (pixels of a side)."""
    config, args = defaults.begin(arg, joined=True, shared=False, size=64)
    if args.joined and args.shared:
        raise UserError(
            "images that share an encoder are not joined: give joined=False, shared=True", path="config arguments"
        )
    config.steps = 600
    config.batch_size = 32
    config.eval_every = config.checkpoint_every = 200

    config.data.name = "synthetic/xray_ct"
    for name in ("xray", "ct"):
        config.data.modalities[name] = defaults.modality("image", name, size=(args.size, args.size), channels=1)
        config.model.encoders[name] = defaults.encoder("image", "cnn_rnn")
    if args.joined:
        del config.model.encoders.ct
        config.model.encoders.xray.join = ("ct",)
    elif args.shared:
        config.model.encoders.ct.share = "xray"
        config.model.encoders.xray.norm = "group"  # batch statistics differ between the two modalities
    config.data.targets.label = defaults.target("classification", "label")
    config.optim = defaults.optimizer("adamw", 1e-3, schedule_options={"warmup_steps": 50})
    return defaults.finish(config, args)
