"""An image, a sentence, and a knowledge graph's entries on the creature that the sentence names.

python -m experiments.train --config=configs/knowledge.py --workdir=DIR

Data: `synthetic/creatures`, generated. Test sentences name creatures that do not occur in training, so the words alone
carry no information there, and the image is uninformative in 40 % of the examples. The triples of `configs/animals.tsv`
give each creature's family. `:triples=` uses no file and links words that occur together in training.
`:modalities=image+text` has no knowledge.
"""

from pathlib import Path

from ml_collections import ConfigDict

from mmfusion.config import defaults

TRIPLES = Path(__file__).with_name("animals.tsv")


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config; arguments: those of `defaults.begin`, and triples (a file; empty: co-occurrences)."""
    config, args = defaults.begin(arg, "knowledge_graph", triples=str(TRIPLES))
    config.steps = 800
    config.batch_size = 32
    config.eval_every = config.checkpoint_every = 200

    config.data.name = "synthetic/creatures"
    config.data.modalities.image = defaults.modality("image", "image", size=(32, 32))
    config.data.modalities.text = defaults.modality("text", "text", vocabulary_size=200, length=14)
    config.data.modalities.knowledge = defaults.modality("knowledge", "text", triples=args.triples, nodes=8)
    config.data.targets.label = defaults.target("classification", "label")

    config.model.encoders.image = defaults.encoder("image", "cnn", norm="batch")
    config.model.encoders.text = defaults.encoder("text", "rnn", embedding=32)
    config.model.encoders.knowledge = defaults.encoder("knowledge", "knowledge_attention")
    config.optim = defaults.optimizer("adamw", 1e-3, schedule_options={"warmup_steps": 50})
    return defaults.finish(config, args)
