"""Leaves of 99 species: a silhouette and a table of 64 measurements of shape, margin or texture.

python -m experiments.train --config=configs/leaf.py --workdir=DIR --config.data.manual_dir=ARCHIVES

Three seeds: 0.873 ± 0.014, 164,771 parameters, 90 seconds on one shared core with jax 0.10.2.
"""

from ml_collections import ConfigDict

from mmfusion.config import defaults


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config; arguments: those of `defaults.begin`, and table (shape, margin or texture)."""
    config, args = defaults.begin(arg, "concat", table="shape")
    config.steps = 1500
    config.batch_size = 32
    config.eval_every = config.checkpoint_every = 300

    config.data.name = "leaf"
    config.data.valid = "valid"
    config.data.modalities.image = defaults.modality("image", "image", size=(48, 48), channels=1)
    config.data.modalities.image.augment.update(flip=0.5, crop=3, rotate=20.0)
    config.data.modalities.table = defaults.modality("table", args.table)
    config.data.targets.label = defaults.target("classification", "label", label_smoothing=0.1)

    config.model.width = 128
    config.model.encoders.image = defaults.encoder("image", "cnn", norm="batch")
    config.model.encoders.table = defaults.encoder("table", "table_mlp")
    config.optim = defaults.optimizer("adamw", 2e-3, schedule_options={"warmup_steps": 100})
    return defaults.finish(config, args)
