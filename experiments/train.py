"""Trains one configuration in a directory, or continues there; see README.md for the flags."""

import json
from collections.abc import Sequence

from absl import flags

from experiments import cli
from mmfusion.distributed import hosts

WORKDIR = flags.DEFINE_string("workdir", None, "the run's directory", required=True)
flags.DEFINE_string("distributed", "", "auto (Cloud TPU, Slurm), or HOST:PORT,PROCESS,PROCESSES")
PROFILE = flags.DEFINE_bool("profile", False, "write a JAX trace of a few early steps to WORKDIR/profile")


def main(argv: Sequence[str]) -> None:
    where, rest = cli.take_flag(list(argv), "distributed")
    hosts.initialize(where or "")  # first, so that all hear of a host whose config is wrong
    config = cli.parse_config(rest)
    cli.prepare(config)

    import jax

    from mmfusion import config as configs
    from mmfusion.training.loop import train

    configs.check(config, jax.device_count(), jax.process_count())
    computed = {key: value for key, value in configs.flat(configs.to_json(config)).items() if key not in configs.PLACES}
    hosts.check_same(json.dumps(computed, sort_keys=True), "config")
    train(config, WORKDIR.value, profile=PROFILE.value)


if __name__ == "__main__":
    cli.run(main)
