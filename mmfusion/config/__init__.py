"""The config of a run: its defaults, its checks, and the arguments of a config file."""

from mmfusion.config.arguments import parse_arg
from mmfusion.config.choices import choice_keys, choose, sections_that_choose
from mmfusion.config.fields import RunConfig, read
from mmfusion.config.renamed import RENAMED_KEYS, rename_flags, rename_key, rename_keys
from mmfusion.config.schema import RECOVERY_KEYS, RESOURCE_KEYS, check, selectable, selected_metric
from mmfusion.config.serialization import flat, from_json, read_json, to_json

__all__ = [
    "RECOVERY_KEYS",
    "RENAMED_KEYS",
    "RESOURCE_KEYS",
    "RunConfig",
    "check",
    "choice_keys",
    "choose",
    "flat",
    "from_json",
    "parse_arg",
    "read",
    "read_json",
    "rename_flags",
    "rename_key",
    "rename_keys",
    "sections_that_choose",
    "selectable",
    "selected_metric",
    "to_json",
]
