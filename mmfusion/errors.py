"""The two ways a run ends early on purpose; `experiments/cli.py` turns each into its exit status."""


class UserError(Exception):
    """The user's input is wrong: one line that says what, where, and what would be right (exit status 2)."""


class Preempted(Exception):
    """The run was asked to stop and saved itself; the same command continues it (exit status 75)."""
