"""One second of audio at 44.1 kHz with images of two sizes and a sentence; or a spoken and a written digit.

python -m experiments.train --config=configs/audio_images.py --workdir=DIR

`:classes=20`: `synthetic/audio_images`, generated: audio 44100×1, an image 28×28×1, one of 224×224×3 (enlarged from
64×64), and text. Each modality is uninformative in 30 to 40 % of the examples: the best possible accuracy of audio
alone is 0.715, of all modalities 0.982. `:classes=10`: real data, with `--config.data.manual_dir=ARCHIVES`: spoken
digits at 8 kHz, read at 44.1 kHz, and MNIST images (`av_digits/clean`). `result.json` has the recall of each class
beside the accuracy; `experiments.ablate` adds an SVM and naive Bayes.
"""

from ml_collections import ConfigDict

from mmfusion.config import defaults
from mmfusion.errors import UserError


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config; arguments: those of `defaults.begin`, and classes (20 or 10)."""
    config, args = defaults.begin(arg, classes=20)
    if args.classes not in (10, 20):
        raise UserError("must be 10 or 20", path="config argument classes", value=args.classes)
    config.steps = 600
    config.batch_size = 32
    config.eval_every = config.checkpoint_every = 200

    if args.classes == 20:
        config.data.name, stored_rate = "synthetic/audio_images", 0
        images = {"small": ("small", 28, 1), "image": ("image", 224, 3)}
        config.data.modalities.text = defaults.modality("text", "text", vocabulary_size=100, length=16)
        config.model.encoders.text = defaults.encoder("text", "rnn", embedding=32)
    else:
        config.data.name, stored_rate, config.data.group = "av_digits/clean", 8000, "group"
        images = {"image": ("image", 28, 1)}
    config.data.modalities.audio = defaults.modality("audio", "audio", rate=44_100, stored_rate=stored_rate)
    config.model.encoders.audio = defaults.encoder("audio", "waveform_cnn", channels=(32, 32, 64, 64, 64))
    for name, (feature, size, channels) in images.items():
        config.data.modalities[name] = defaults.modality("image", feature, size=(size, size), channels=channels)
        small = {"channels": (16, 32, 32), "strides": (2, 2, 1)}
        large = {"channels": (16, 32, 32, 64), "strides": (4, 2, 2, 2)}
        config.model.encoders[name] = defaults.encoder("image", "cnn", norm="batch", **(small if size == 28 else large))
    config.data.targets.label = defaults.target("classification", "label")
    config.optim = defaults.optimizer("adamw", 2e-3, schedule_options={"warmup_steps": 50})
    return defaults.finish(config, args)
