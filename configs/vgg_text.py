"""VGG-16 for a product's photo and averaged word embeddings for its title: which season is it for?

python -m experiments.train --config=configs/vgg_text.py --workdir=DIR --config.data.manual_dir=ARCHIVES

Images are flipped and rotated by up to 20°. Texts have a vocabulary of 5,000 words and 100 positions; their embeddings
of 128 are averaged, followed by a dense layer and dropout. VGG-16 at 224×224 needs an accelerator; `:size=32` runs on a
CPU. With published weights: `--config.model.encoders.image.init=FILE_OR_HUB_ID` and
`--config.model.encoders.image.norm=none`. Fusions to compare: `concat`, `mean`, `weighted`, `conv`.

Trained independently, then fused: `:modalities=image` in RUNS/image and `:modalities=text` in RUNS/text, then
`:encoders=RUNS` with a feature-level (`fusion=concat`) or decision-level strategy (`fusion=late_mean`). Imputation of
an absent modality: `:objectives=mvae` (or `mmvae`, `gan`). Several tasks: `:tasks=season+gender`. Two classes:
`:tasks=summer`. A modality discriminator against the encoders: `:objectives=adversarial`.
"""

from ml_collections import ConfigDict

from mmfusion.config import defaults


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config.

    Arguments: those of `defaults.begin`, size (pixels of a side), and tasks (features joined by +).
    """
    config, args = defaults.begin(arg, size=224, tasks="season")
    config.steps = 600
    config.batch_size = 32
    config.eval_every = config.checkpoint_every = 200

    config.data.name = "fashion_small"
    config.data.valid = "valid"
    config.data.modalities.image = defaults.modality("image", "image", size=(args.size, args.size))
    config.data.modalities.image.augment.update(flip=0.5, rotate=20.0)
    config.data.modalities.text = defaults.modality("text", "title", vocabulary_size=5000, length=100)
    defaults.add_tasks(config, args.tasks)

    config.model.width = 128
    config.model.encoders.image = defaults.encoder("image", "vgg16", norm="batch")
    config.model.encoders.text = defaults.encoder("text", "bow", dense=128, dropout=0.2)
    config.optim = defaults.optimizer("adamw", 5e-4, schedule_options={"warmup_steps": 100})
    return defaults.finish(config, args)
