"""The machine: settings that change speed and never a number, and what a process took of it."""

from __future__ import annotations

import ctypes
import resource
import sys
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


def return_memory() -> None:
    """Let glibc hand freed blocks of a MiB or more back to the kernel, the opposite choice.

    Where memory decides (towers in chunks), blocks kept in fragments may hold several times what
    the tensors need: the default threshold grows to 32 MiB and activations lie below it.
    """
    trim_threshold, mmap_threshold = -1, -3
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 1 << 20)
        libc.mallopt(trim_threshold, 1 << 20)


def peak_ram() -> int:
    """The most bytes of memory that this process ever held."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def quiet_libraries() -> None:
    """Keep the libraries' tips and loading bars off the run's own table and progress bar."""
    import logging
    import warnings

    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    names = ("pytorch_lightning", "bitsandbytes", "pytorch_lightning.utilities.rank_zero", "httpx")
    for name in (*names, "pytorch_lightning.trainer.connectors"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # said on purpose by this project: frozen parts are in eval, the module moves the batch
    warnings.filterwarnings("ignore", message=r".*module\(s\) in eval mode at the start")
    warnings.filterwarnings("ignore", message=r".*transfer_batch_to_device.*")
    warnings.filterwarnings("ignore", message=r".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
