"""Handwritten digits in several tables of numbers: Fourier coefficients, Zernike moments and shape.

python -m experiments.train --config=configs/digit_views.py --workdir=DIR --config.data.manual_dir=ARCHIVES

`:modalities=fou+zer+mor+pix+fac+kar` has all six, which leave little to be told. Not measured yet.
"""

from ml_collections import ConfigDict

from configs import base
from mmfusion.config import parse_arg

VIEWS = ("fou", "zer", "mor", "pix", "fac", "kar")


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config; arguments: fusion, seed, modalities, objectives."""
    args = parse_arg(arg, fusion="tmc", seed=0, modalities="fou+zer+mor", objectives="")
    config = base.get_config()
    with config.unlocked():
        config.seed = args.seed
        config.steps = 1000
        config.batch_size = 32
        config.eval_every = config.checkpoint_every = 250

        config.data.name = "digit_views"
        config.data.targets.label = base.target("classification", "label")
        config.model.width = 64
        for view in VIEWS:
            config.data.modalities[view] = base.modality("table", view)
            config.model.encoders[view] = base.encoder("table", "table_mlp", dropout=0.2)
        config.model.fusion = base.fusion(args.fusion)
        config.optim = base.optimizer("adamw", 1e-3, schedule_options={"warmup_steps": 100})
    base.keep_modalities(config, args.modalities)
    base.add_objectives(config, args.objectives)
    return config
