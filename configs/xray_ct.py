"""X-ray and CT images, concatenated at the input of a CNN with a recurrent network over its feature map.

python -m experiments.train --config=configs/xray_ct.py --workdir=DIR

Data: `synthetic/xray_ct`, generated in place of medical images. Each image is uninformative in 30 % of the examples, so
the best possible accuracy of one modality is 0.775, and of both 0.9325. `:joined=False` uses one encoder per image and
a fusion strategy, and `:joined=False,shared=True` one encoder with shared weights. `:size=128` uses larger images.

Options of `--config.model.encoders.xray`: `.channels="(16,32,64)"` sets a deeper CNN, `.layers=2` two recurrent layers,
`.steps=cells` one recurrent step per cell of the feature map, and `.tokens=attention` attention weights over the steps.
`.name=resnet18` with `.stem=imagenet`, `.norm=batch`, `.recurrent=rows` and `.init=FILE_OR_HUB_ID` starts from
published weights with an LSTM over the rows of the feature map (use `:size=224`, otherwise the map has two rows).
`.freeze=600` freezes the encoder for the whole run of 600 steps.

Other options: `--config.data.modalities.xray.augment.crop=4` (set the same for `ct`; both get the same crop; `flip=0.5`
is for images whose label is invariant to mirroring, unlike here), `--config.data.targets.label.loss=focal`,
`--config.optim.name=momentum`.
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
