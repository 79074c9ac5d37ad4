"""How a process that computes is set up, whoever has started it."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import warnings

__without_effect__ = "memory, messages, and the number of threads, which a record names"


def cores() -> int:
    """Return how many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quiet_libraries() -> None:
    """Keep the terminal for progress: third-party chatter that a user can do nothing about."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.getLogger("nibabel").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="monai.*")
    warnings.filterwarnings("ignore", category=UserWarning, module="torch.*")


def keep_freed_memory() -> None:
    """Let the C library keep up to 1 GiB of what torch frees on a CPU, for the next step.

    glibc gives blocks above 32 MiB back at once, as a convolution's work space is, and the kernel clears them anew
    in every step: a quarter of the time of a training step at 32 voxels.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # glibc; musl has none
        mallopt(-4, 0)  # M_MMAP_MAX: no block of its own mapping
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD, bytes


def set_threads(threads: int) -> None:
    """Let torch and the linear algebra of numpy and scikit-learn compute with ``threads`` threads.

    Another number of threads adds in another order, and rounds otherwise.
    """
    import torch
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(threads)
    threadpool_limits(threads)
