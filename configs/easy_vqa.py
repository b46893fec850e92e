"""easy-VQA: an image of one shape and a question about it, 13 answers; image and question attend to each other.

python -m experiments.train --config=configs/easy_vqa.py --workdir=DIR --config.data.manual_dir=ARCHIVES

Test accuracy 0.999 in 6 minutes 43 seconds, everything included (seed 0), on two shared x86-64 cores with jax 0.10.2.
`:modalities=text` reaches 0.671, `:modalities=image` with `--config.steps=1000` 0.368.
"""

from ml_collections import ConfigDict

from mmfusion.config import defaults


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config; arguments: those of `defaults.begin`."""
    config, args = defaults.begin(arg, "co_attention")
    config.steps = 3000
    config.batch_size = 64
    config.eval_every = config.checkpoint_every = 500
    config.select = "loss"  # near 1.0, accuracy on 1,864 rows has many ties

    config.data.name = "easy_vqa"
    config.data.group = "group"
    config.data.valid_fraction = 0.05
    config.data.modalities.image = defaults.modality("image", "image", size=(64, 64))
    config.data.modalities.text = defaults.modality("text", "question", vocabulary_size=100, length=16)
    config.data.targets.label = defaults.target("classification", "label")

    config.model.width = 64
    config.model.encoders.image = defaults.encoder("image", "cnn", norm="batch")
    config.model.encoders.text = defaults.encoder("text", "rnn")
    if args.fusion == "film" and "image" in (args.modalities or "image"):
        config.model.fusion.kernel = 3  # the image tokens are an 8 x 8 grid
    config.optim = defaults.optimizer("adamw", 1e-3, schedule_options={"warmup_steps": 200})
    return defaults.finish(config, args)
