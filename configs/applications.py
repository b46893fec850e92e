"""Four applications on generated data: medicine, surveillance, recommendation, and human-machine interaction.

python -m experiments.train --config=configs/applications.py:application=surveillance --workdir=DIR

- `medical_notes`: a medical image and notes; a CNN and an LSTM.
- `surveillance`: a video of eight frames and its audio; a CNN per frame with a GRU over time, and a CNN on the
  spectrogram.
- `recommendation`: a customer's behaviour, a sequence of events, with a text and an image.
- `interaction`: speech, text and an image.

Data: `synthetic`, generated in place of data that is not freely available: each modality is uninformative in 20 to 40 %
of the examples, independently.
"""

from ml_collections import ConfigDict

from mmfusion.config import defaults
from mmfusion.errors import UserError

# Modality type, its options, encoder, its options.
IMAGE = ("image", {"size": (32, 32)}, "cnn", {"norm": "batch"})
SCAN = ("image", {"size": (64, 64), "channels": 1}, "cnn", {"norm": "batch"})
TEXT = ("text", {"vocabulary_size": 100, "length": 16}, "rnn", {"embedding": 32})
EVENTS = ("text", {"vocabulary_size": 100, "length": 20}, "transformer", {"hidden": 64, "layers": 2})
AUDIO = ("audio", {"rate": 8000}, "logmel_cnn", {})
VIDEO = ("video", {"frames": 8, "size": (24, 24), "channels": 1}, "frame_cnn", {})
APPLICATIONS = {
    "medical_notes": {"image": SCAN, "notes": TEXT},
    "surveillance": {"video": VIDEO, "audio": AUDIO},
    "recommendation": {"behaviour": EVENTS, "text": TEXT, "image": IMAGE},
    "interaction": {"speech": AUDIO, "text": TEXT, "image": IMAGE},
}


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config; arguments: those of `defaults.begin`, and application (see above)."""
    config, args = defaults.begin(arg, application="medical_notes")
    if args.application not in APPLICATIONS:
        raise UserError(
            "unknown choice", path="config argument application", value=args.application, choices=APPLICATIONS
        )
    config.steps = 800
    config.batch_size = 32
    config.eval_every = config.checkpoint_every = 200

    config.data.name = f"synthetic/{args.application}"
    for name, (kind, options, encoder, encoder_options) in APPLICATIONS[args.application].items():
        config.data.modalities[name] = defaults.modality(kind, name, **options)
        config.model.encoders[name] = defaults.encoder(kind, encoder, **encoder_options)
    config.data.targets.label = defaults.target("classification", "label")
    config.optim = defaults.optimizer("adamw", 1e-3, schedule_options={"warmup_steps": 50})
    return defaults.finish(config, args)
