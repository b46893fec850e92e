"""Exports a run's best checkpoint as StableHLO, safetensors and JSON, which load without this package.

`python -m experiments.export --workdir=DIR --output=FOLDER`
"""

from collections.abc import Sequence

from absl import flags

from experiments import cli

WORKDIR = flags.DEFINE_string("workdir", None, "the run's directory", required=True)
TRUST = flags.DEFINE_bool("trust", False, cli.TRUST_HELP, allow_override=True)
OUTPUT = flags.DEFINE_string("output", None, "the folder to write, which must not exist or be empty", required=True)


def main(argv: Sequence[str]) -> None:
    cli.parse(argv)
    cli.enable_compilation_cache()

    from mmfusion.inference.export import export
    from mmfusion.training.restore import trust_run

    if TRUST.value:
        trust_run(WORKDIR.value)
    platforms = export(WORKDIR.value, OUTPUT.value)
    print(f"{OUTPUT.value}: a program for {', '.join(platforms)}; README.md says how to load it")


if __name__ == "__main__":
    cli.run(main)
