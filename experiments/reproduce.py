"""Repeats a finished run from its own config in another directory and compares every step and score.

`python -m experiments.reproduce WORKDIR [--again=DIR] [--config.data.dir=DIR ...] [--trust]`

Exit status 1 if any bit differs. Only the location of the data and the number of devices may be changed.
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags
from etils import epath
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from experiments import cli
from mmfusion.errors import UserError

OUTPUT = flags.DEFINE_string("again", "", "the second run's directory (default: WORKDIR-again)")
TRUST = flags.DEFINE_bool("trust", False, cli.TRUST_HELP, allow_override=True)
TIMES = ("seconds", "examples_per_second", "waiting")  # name prefixes of timing metrics


def main(argv: Sequence[str]) -> None:
    from mmfusion.analysis.runs import read
    from mmfusion.training.restore import trust_run

    overrides = [arg for arg in argv[1:] if arg.startswith("--config.")]
    directories = cli.parse([arg for arg in argv if arg not in overrides], positional=True)
    if len(directories) != 1:
        raise UserError("give one finished run: python -m experiments.reproduce WORKDIR")
    if TRUST.value:
        trust_run(directories[0])
    first = read(directories[0])
    output = epath.Path(OUTPUT.value or f"{first.directory}-again")
    config = relocated(first.config, overrides)
    if (output / "result.json").exists():
        raise UserError(
            "holds a run already: give a directory that does not exist yet", path="--again", value=str(output)
        )
    cli.prepare(config)

    import jax

    from mmfusion import config as configs
    from mmfusion.training.loop import train

    configs.check(config, jax.device_count())
    again = train(config, str(output))
    differ = differences(first.directory, output, first.result, again)
    show(first.result, again, differ)
    sys.exit(1 if differ else 0)


def relocated(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """Returns the config with overridden locations; raises UserError for an override that affects the computation."""
    from mmfusion import config as configs
    from mmfusion.data import trust

    for item in overrides:
        key = item.removeprefix("--config.").partition("=")[0]
        if key not in configs.RESOURCE_KEYS:
            raise UserError(
                f"cannot be changed; only {', '.join(configs.RESOURCE_KEYS)} may differ", path=f"config.{key}"
            )
    flag_values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=flag_values, sys_argv=["", *overrides])
    cli.parse(["", *overrides], flag_values)
    given = [item.removeprefix("--config.").partition("=")[0] for item in overrides]
    trust.check_places(configs.to_json(config), given)
    return config


def differences(first: epath.Path, again: epath.Path, result: dict[str, Any], repeated: dict[str, Any]) -> list[str]:
    """Returns one line per difference: in the data, at the first differing step, and for each differing score."""
    compared = (
        ("data", lambda r: r["data"]["fingerprint"]),
        ("rows", lambda r: r["data"]["content"]),
        ("best step", lambda r: r["best_step"]),
    )
    from mmfusion.data.content import WHOLE

    lines = [f"{name}: {of(result)} and {of(repeated)}" for name, of in compared if of(result) != of(repeated)]
    if not all(kept.startswith(WHOLE) for kept in result["data"]["content"].values()):  # by an older version
        lines = [line for line in lines if not line.startswith("rows: ")]
    if len(steps(first)) != len(steps(again)):
        lines.append(f"logged lines: {len(steps(first))} and {len(steps(again))}")
    for a, b in zip(steps(first), steps(again), strict=False):
        if names := [name for name in {**a, **b} if repr(a.get(name)) != repr(b.get(name))]:
            lines.append(f"step {a['step']}: {', '.join(f'{n} {a.get(n)!r} and {b.get(n)!r}' for n in names)}")
            break
    for split in ("valid", "test"):
        for name, value in result[split].items():
            if repr(repeated[split].get(name)) != repr(value):
                lines.append(f"{split} {name}: {value!r} and {repeated[split].get(name)!r}")
    return lines


def steps(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """Returns the lines of `metrics.jsonl` without timing metrics."""
    lines = [json.loads(line) for line in (epath.Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith(TIMES)} for line in lines]


def show(first: dict[str, Any], again: dict[str, Any], differ: Sequence[str]) -> None:
    """Prints differences in the provenance of the two runs, and their differences."""
    for name in ("device", "versions", "machine", "flags", "commit"):
        if first.get(name) != again.get(name):
            print(f"{name}: {first.get(name)} and {again.get(name)}")
    print("\n".join(differ) if differ else "bitwise identical: every logged step, every score")


if __name__ == "__main__":
    cli.run(main)
