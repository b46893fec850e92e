"""Settings of the process that must be made before JAX looks for devices."""

import contextlib
import ctypes
import os

from mmfusion.errors import UserError

DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


def set_deterministic_flags() -> None:
    """Restricts XLA to GPU kernels that add in a fixed order; call it before JAX looks for devices."""
    if DETERMINISTIC not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC}".strip()


def check_determinism(platform: str) -> None:
    """Raises UserError on a GPU whose kernels may add in any order; other platforms are deterministic."""
    if platform == "gpu" and DETERMINISTIC not in os.environ.get("XLA_FLAGS", ""):
        raise UserError(
            f"needs XLA_FLAGS={DETERMINISTIC} before JAX starts, as experiments.train sets it",
            path="config.deterministic",
            value=True,
        )


def keep_freed_memory() -> None:
    """Lets glibc keep the memory that a step frees; call it before JAX starts its threads.

    XLA's CPU client allocates its temporaries anew in each step. Returned to the kernel in between, they cost the
    easy-VQA step 46,000 page faults and a third of its processor time. One arena, because others are limited to 64 MiB.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        # M_ARENA_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD
        for option, value in ((-8, 1), (-3, 2**31 - 1), (-1, 2**31 - 1), (-2, 64 << 20)):
            libc.mallopt(option, value)
