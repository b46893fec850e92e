"""Deprecated name of `experiments.debug_step`, supported for one version."""

from experiments import cli, debug_step

if __name__ == "__main__":
    cli.run_renamed("replay", "debug_step", debug_step.main)
