"""Settings of the machine that change speed and never a number."""

from __future__ import annotations

import ctypes
from contextlib import suppress


def keep_memory() -> None:
    """Let glibc keep freed memory for the next step instead of handing it back to the kernel.

    Large activations otherwise fault in again page by page in every step, which took a quarter of
    a training step on CPUs. Other C libraries have no `mallopt` and are left as they are.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, 2**31 - 1)
