"""Trains one configuration in a directory, or continues there; see README.md for the flags."""

from collections.abc import Sequence

from absl import flags

from experiments import cli

WORKDIR = flags.DEFINE_string("workdir", None, "the run's directory", required=True)
PROFILE = flags.DEFINE_bool("profile", False, "write a JAX trace of a few early steps to WORKDIR/profile")


def main(argv: Sequence[str]) -> None:
    config = cli.parse_config(argv)
    cli.settle(config)

    import jax

    from configs import base
    from mmfusion import config as configs
    from mmfusion.train import train

    configs.check(config, base.get_config(), jax.device_count())
    train(config, WORKDIR.value, profile=PROFILE.value)


if __name__ == "__main__":
    cli.run(main)
