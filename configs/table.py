"""A table of one's own: CSV, TSV, JSON Lines, JSON or Parquet, with paths of images and audio, text and numbers.

python -m experiments.train --config=configs/table.py:data=my.csv,label=price --workdir=DIR

`python -m experiments.inspect my.csv --label=price` shows how its columns are read, and writes a config to edit.
"""

from ml_collections import ConfigDict

from mmfusion.config import defaults
from mmfusion.config.from_table import propose


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config of a table.

    Arguments: those of `defaults.begin`; `data`, the table; `label`, its column (several joined by `+`); `columns`, the
    inputs joined by `+` (empty: all that are useful); `task` (classification, regression or multilabel).
    """
    config, args = defaults.begin(arg, "concat", data="", label="", columns="", task="")
    propose(config, args.data, args.label, args.columns.split("+") if args.columns else (), args.task)
    return defaults.finish(config, args)
