"""Trains a config in a directory, or resumes an interrupted run.

`python -m experiments.train --config=configs/X.py[:arg=value,...] --workdir=DIR [--config.key=value ...]`
"""

import json
from collections.abc import Sequence

from absl import flags

from experiments import cli
from mmfusion.distributed import hosts

WORKDIR = flags.DEFINE_string("workdir", None, "the run's directory", required=True)
flags.DEFINE_string("distributed", "", "multi-host training: auto (Cloud TPU, Slurm), or HOST:PORT,PROCESS,PROCESSES")
PROFILE = flags.DEFINE_bool("profile", False, "write a JAX trace of a few early steps to WORKDIR/profile")


def main(argv: Sequence[str]) -> None:
    distributed, rest = cli.take_flag(list(argv), "distributed")
    hosts.initialize(distributed or "")  # first, so that an invalid config on one host ends all hosts
    config = cli.parse_config(rest)
    cli.prepare(config)

    import jax

    from mmfusion import config as configs
    from mmfusion.training.loop import train

    configs.check(config, jax.device_count(), jax.process_count())
    computed = {
        key: value for key, value in configs.flat(configs.to_json(config)).items() if key not in configs.RESOURCE_KEYS
    }
    hosts.check_same(json.dumps(computed, sort_keys=True), "config")
    train(config, WORKDIR.value, profile=PROFILE.value)


if __name__ == "__main__":
    cli.run(main)
