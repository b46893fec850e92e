"""Deprecated name of `experiments.list_fusions`, supported for one version."""

from experiments import cli, list_fusions

if __name__ == "__main__":
    cli.run_renamed("fusions", "list_fusions", list_fusions.main)
