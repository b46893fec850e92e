"""`python -m tests.distributed.lose_host PORT HOST`: one of two hosts whose command is done.

The second one is lost after the shutdown barrier, before JAX has shut down.
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

        def shut_down_and_die() -> None:
            shutdown_barrier()
            os.kill(os.getpid(), signal.SIGKILL)

        hosts.shutdown_barrier = shut_down_and_die
    cli.run(main)
