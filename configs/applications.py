"""Four applications on generated data: medicine, surveillance, recommendation, and talking to a machine.

python -m experiments.train --config=configs/applications.py:application=surveillance --workdir=DIR

- `medical_notes`: a medical picture and notes; a CNN and an LSTM.
- `surveillance`: a film of eight frames and its sound; a CNN on each frame with a GRU over time, and a CNN on the
  spectrogram.
- `recommendation`: what a customer did, a sequence of events, with a text and a picture.
- `interaction`: speech, text and a picture.

The data stands in for what cannot be had freely, and says what it is (`stand_ins`): each modality shows nothing in 20
to 40 % of the examples, independently.
"""

from ml_collections import ConfigDict

from mmfusion.config import defaults
from mmfusion.errors import UserError, nearest

# Modality: kind, its options, encoder, its options.
PICTURE = ("image", {"size": (32, 32)}, "cnn", {"norm": "batch"})
SCAN = ("image", {"size": (64, 64), "channels": 1}, "cnn", {"norm": "batch"})
WORDS = ("text", {"vocabulary_size": 100, "length": 16}, "rnn", {"embedding": 32})
EVENTS = ("text", {"vocabulary_size": 100, "length": 20}, "transformer", {"hidden": 64, "layers": 2})
SOUND = ("audio", {"rate": 8000}, "logmel_cnn", {})
FILM = ("video", {"frames": 8, "size": (24, 24), "channels": 1}, "frame_cnn", {})
APPLICATIONS = {
    "medical_notes": {"image": SCAN, "notes": WORDS},
    "surveillance": {"video": FILM, "audio": SOUND},
    "recommendation": {"behaviour": EVENTS, "text": WORDS, "image": PICTURE},
    "interaction": {"speech": SOUND, "text": WORDS, "image": PICTURE},
}


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config; arguments: those of `base.begin`, and application (see above)."""
    config, args = defaults.begin(arg, application="medical_notes")
    if args.application not in APPLICATIONS:
        raise UserError(f"config argument application={args.application!r}: {nearest(args.application, APPLICATIONS)}")
    config.steps = 800
    config.batch_size = 32
    config.eval_every = config.checkpoint_every = 200

    config.data.name = f"stand_ins/{args.application}"
    for name, (kind, options, encoder, encoder_options) in APPLICATIONS[args.application].items():
        config.data.modalities[name] = defaults.modality(kind, name, **options)
        config.model.encoders[name] = defaults.encoder(kind, encoder, **encoder_options)
    config.data.targets.label = defaults.target("classification", "label")
    config.optim = defaults.optimizer("adamw", 1e-3, schedule_options={"warmup_steps": 50})
    return defaults.finish(config, args)
