"""Any TFDS dataset by name: `configs/tfds.py:name=mnist,image=image,target=label`, or a pair of them."""

from ml_collections import ConfigDict

from mmfusion.config import defaults


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config.

    Arguments: those of `defaults.begin`; `name` of the dataset; `image`, `text` and `target` (a class), the features
    that are read (an empty one is not used); `size`, the images' height and width in pixels; `channels`.
    """
    config, args = defaults.begin(
        arg, "co_attention", name="shapes/match", image="image", text="", target="label", size=32, channels=3
    )
    config.data.name = args.name
    if args.image:
        config.data.modalities.image = defaults.modality(
            "image", args.image, size=(args.size, args.size), channels=args.channels
        )
        config.model.encoders.image = defaults.encoder("image", "cnn")
    if args.text:
        config.data.modalities.text = defaults.modality("text", args.text, length=64)
        config.model.encoders.text = defaults.encoder("text", "rnn")
    config.data.targets.label = defaults.target("classification", args.target)
    return defaults.finish(config, args)
