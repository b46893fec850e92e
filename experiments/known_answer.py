"""Deprecated name of `experiments.gate`, supported for one version."""

from experiments import cli, gate

if __name__ == "__main__":
    cli.run_renamed("known_answer", "gate", gate.main)
