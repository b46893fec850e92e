"""Any TFDS dataset by name: `configs/tfds.py:name=mnist,image=image,target=label`, or a pair of them."""

from ml_collections import ConfigDict

from configs import base


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config.

    Arguments: fusion, seed, modalities, objectives; `name` of the dataset; which of its features is the `image`, the
    `text` and the `target`, a class (a modality left out is not used); `size`, the pictures' height and width in
    pixels; `channels`.
    """
    config, args = base.begin(
        arg, "co_attention", name="shapes/match", image="image", text="", target="label", size=32, channels=3
    )
    config.data.name = args.name
    if args.image:
        config.data.modalities.image = base.modality(
            "image", args.image, size=(args.size, args.size), channels=args.channels
        )
        config.model.encoders.image = base.encoder("image", "cnn")
    if args.text:
        config.data.modalities.text = base.modality("text", args.text, length=64)
        config.model.encoders.text = base.encoder("text", "rnn")
    config.data.targets.label = base.target("classification", args.target)
    return base.finish(config, args)
