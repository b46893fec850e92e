"""The flag `--fusions` of the commands that take fusion strategies."""

from absl import flags

from mmfusion.errors import UserError
from mmfusion.registry import lookup

FUSIONS = flags.DEFINE_string("fusions", "all", "names or package.module:Class, separated by commas, or all")


def fusion_classes() -> dict[str, type]:
    """Returns the strategies that the flag names, by name; for `all` in the registry's order.

    Raises:
      UserError: there is no strategy of a name, or one is given twice.
    """
    from mmfusion.models import fusion

    if FUSIONS.value == "all":
        return dict(fusion.FUSIONS)
    names = FUSIONS.value.split(",")
    if len(set(names)) < len(names):
        raise UserError("a strategy is given twice", path="--fusions", value=FUSIONS.value)
    return {name: lookup(fusion.FUSIONS, name, "--fusions") for name in names}
