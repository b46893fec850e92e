"""`python -m tests.parting PORT HOST`: one of two hosts whose command is done; the second is lost before JAX ends."""

import os
import signal
import sys

from experiments import cli
from mmfusion.distributed import hosts


def main(argv: list[str]) -> None:
    hosts.initialize(f"localhost:{argv[1]},{argv[2]},2")


if __name__ == "__main__":
    if sys.argv[2] == "1":
        part = hosts.shutdown_barrier

        def be_lost() -> None:
            part()
            os.kill(os.getpid(), signal.SIGKILL)

        hosts.shutdown_barrier = be_lost
    cli.run(main)
