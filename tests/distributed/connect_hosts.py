"""`python -m tests.distributed.connect_hosts PORT HOST`: one of two hosts that connect.

It prints the number of Gloo connections after connecting and after each of a few sums over devices.
"""

import os
import sys
import tempfile
from typing import IO

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mmfusion.distributed import hosts, mesh


def main() -> None:
    port, host = sys.argv[1:]
    with tempfile.TemporaryFile() as output:
        stdout = os.dup(1)
        os.dup2(output.fileno(), 1)  # Gloo reports its connections on stdout
        os.dup2(output.fileno(), 2)
        hosts.initialize(f"localhost:{port},{host},2")
        partitioner = mesh.make_partitioner("jit", 0, (2, 2, 1))
        hosts.connect(partitioner.mesh)
        counts = [connections(output)]
        for axes in ("data", "fsdp", ("data", "fsdp")):
            rows = NamedSharding(partitioner.mesh, PartitionSpec(axes))
            x = jax.make_array_from_callback((4, 2), rows, lambda index: np.ones((4, 2), np.float32)[index])
            assert float(jax.jit(jnp.sum)(x)) == 8
            counts.append(connections(output))
        os.write(stdout, f"{counts}\n".encode())


def connections(output: IO[bytes]) -> int:
    output.seek(0)
    return output.read().count(b"is connected to")


if __name__ == "__main__":
    main()
