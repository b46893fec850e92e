"""Deprecated name of `experiments.reproduce`, supported for one version."""

from experiments import cli, reproduce

if __name__ == "__main__":
    cli.run_renamed("rerun", "reproduce", reproduce.main)
