"""Keys that were renamed: the old names work for one version, with a line that says the new one."""

import re
from collections.abc import Sequence

from ml_collections import ConfigDict

from mmfusion.errors import warn_renamed

RENAMED_KEYS = {
    "data.instead": "data.fallback_name",
    "recovery.updates": "recovery.max_consecutive_bad_steps",
    "recovery.spike": "recovery.spike_threshold",
    "recovery.lower": "recovery.lr_factor",
}
_OVERRIDE = re.compile(r"--config\.(?P<key>[^=]+)(?P<value>=.*)?$", re.DOTALL)


def rename_keys(config: ConfigDict, *, warn: bool = True) -> None:
    """Moves values at old names to the new names, in place."""
    for old, new in RENAMED_KEYS.items():
        section, _, old_name = old.rpartition(".")
        if section in config and old_name in config[section]:
            with config.unlocked():
                config[section][new.rpartition(".")[2]] = config[section][old_name]
                del config[section][old_name]
            if warn:
                warn_renamed(f"config.{old}", f"config.{new}")


def rename_key(key: str) -> str:
    """Returns the current name of a key; names it on standard error where the key has an old name."""
    if key in RENAMED_KEYS:
        warn_renamed(f"config.{key}", f"config.{RENAMED_KEYS[key]}")
    return RENAMED_KEYS.get(key, key)


def rename_flags(argv: Sequence[str]) -> list[str]:
    """Returns the arguments with old names in `--config.key=value` and `--config.key value` replaced."""
    return [
        f"--config.{rename_key(match['key'])}{match['value'] or ''}"
        if (match := _OVERRIDE.match(argument))
        else argument
        for argument in argv
    ]
