"""The datasets of this package, one TFDS builder folder each; importing the package registers them with TFDS.

They can be prepared and read without TensorFlow in ArrayRecord format:
`builder.download_and_prepare(file_format="array_record")`, then `builder.as_data_source("train")`. A failed preparation
leaves no loadable dataset, as TFDS writes to a temporary folder and renames it. Each builder has the splits `train` and
`test`. Every example has a unique `id`, a `label`, and a `group`: examples of a group must be in the same split when
validation rows are held out of `train`.
"""

from mmfusion.data.builders.av_digits import av_digits_dataset_builder
from mmfusion.data.builders.cifar10_images import cifar10_images_dataset_builder
from mmfusion.data.builders.digit_views import digit_views_dataset_builder
from mmfusion.data.builders.easy_vqa import easy_vqa_dataset_builder
from mmfusion.data.builders.fashion_small import fashion_small_dataset_builder
from mmfusion.data.builders.imdb_subset import imdb_subset_dataset_builder
from mmfusion.data.builders.leaf import leaf_dataset_builder
from mmfusion.data.builders.shapes import shapes_dataset_builder
from mmfusion.data.builders.synthetic import synthetic_dataset_builder

BUILDERS = {
    "shapes": shapes_dataset_builder.Builder,
    "easy_vqa": easy_vqa_dataset_builder.Builder,
    "av_digits": av_digits_dataset_builder.Builder,
    "cifar10_images": cifar10_images_dataset_builder.Builder,
    "imdb_subset": imdb_subset_dataset_builder.Builder,
    "fashion_small": fashion_small_dataset_builder.Builder,
    "leaf": leaf_dataset_builder.Builder,
    "digit_views": digit_views_dataset_builder.Builder,
    "synthetic": synthetic_dataset_builder.Builder,
}
