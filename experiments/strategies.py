"""The flag `--fusions`, which strategies a command is about."""

from absl import flags

from mmfusion.errors import UserError, nearest

FUSIONS = flags.DEFINE_string("fusions", "all", "names, separated by commas, or all")


def chosen() -> list[str]:
    """Returns the strategies that the flag names, in the table's order for `all`.

    Raises:
      UserError: there is none of a name.
    """
    from mmfusion.models import fusion

    if FUSIONS.value == "all":
        return list(fusion.FUSIONS)
    names = FUSIONS.value.split(",")
    for name in names:
        if name not in fusion.FUSIONS:
            raise UserError(f"--fusions: {name!r} is no strategy: {nearest(name, fusion.FUSIONS)}")
    return names
