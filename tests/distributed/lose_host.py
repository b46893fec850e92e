"""`python -m tests.distributed.lose_host PORT HOST`: one of two hosts whose command has finished.

The second host is killed after the shutdown barrier, before JAX has shut down.
"""

import os
import signal
import sys

from experiments import cli
from mmfusion.distributed import hosts


def main(argv: list[str]) -> None:
    hosts.initialize(f"localhost:{argv[1]},{argv[2]},2")


if __name__ == "__main__":
    if sys.argv[2] == "1":
        shutdown_barrier = hosts.shutdown_barrier

        def barrier_then_kill() -> None:
            shutdown_barrier()
            os.kill(os.getpid(), signal.SIGKILL)

        hosts.shutdown_barrier = barrier_then_kill
    cli.run(main)
