"""Product photos with titles: the season, or the type of article?

python -m experiments.train --config=configs/fashion.py --workdir=DIR --config.data.manual_dir=ARCHIVES

The season, three seeds: 0.8075 ± 0.0004, 342,276 parameters, 20 minutes on one busy core with jax 0.10.2.
"""

from ml_collections import ConfigDict

from mmfusion.config import defaults


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config; arguments: those of `defaults.begin`, and target (label or season)."""
    config, args = defaults.begin(arg, "co_attention", target="season")
    config.steps = 2000
    config.batch_size = 64
    config.eval_every = config.checkpoint_every = 500

    config.data.name = "fashion_small"
    config.data.valid = "valid"
    config.data.modalities.image = defaults.modality("image", "image", size=(80, 60))
    config.data.modalities.text = defaults.modality("text", "title", vocabulary_size=3000, length=12)
    config.data.targets.label = defaults.target("classification", args.target)

    config.model.width = 64
    config.model.encoders.image = defaults.encoder("image", "cnn", norm="batch")
    config.model.encoders.text = defaults.encoder("text", "rnn", embedding=32)
    config.optim = defaults.optimizer("adamw", 1e-3, schedule_options={"warmup_steps": 100})
    return defaults.finish(config, args)
