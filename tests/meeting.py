"""`python -m tests.meeting PORT HOST`: one of two hosts that meet; says how often devices connect, then and later."""

import os
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mmfusion.distributed import hosts, mesh


def main() -> None:
    port, host = sys.argv[1:]
    with tempfile.TemporaryFile() as said:
        out = os.dup(1)
        os.dup2(said.fileno(), 1)  # where Gloo says what it connects
        os.dup2(said.fileno(), 2)
        hosts.initialize(f"localhost:{port},{host},2")
        partitioner = mesh.make_partitioner("jit", 0, (2, 2, 1))
        hosts.connect(partitioner.mesh)
        counts = [_connected(said)]
        for axes in ("data", "fsdp", ("data", "fsdp")):
            rows = NamedSharding(partitioner.mesh, PartitionSpec(axes))
            x = jax.make_array_from_callback((4, 2), rows, lambda part: np.ones((4, 2), np.float32)[part])
            assert float(jax.jit(jnp.sum)(x)) == 8
            counts.append(_connected(said))
        os.write(out, f"{counts}\n".encode())


def _connected(said) -> int:
    said.seek(0)
    return said.read().count(b"is connected to")


if __name__ == "__main__":
    main()
