"""The C library's allocator, told to keep what a training step frees for the next step."""

import ctypes
import os
import sys

__all__ = ["keep_heap"]

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # names of mallopt, see malloc.h
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_")


def keep_heap() -> bool:
    """Let this process keep the memory of freed tensors, so that the next step need not fetch it page by page.

    By default glibc maps every large tensor afresh and gives it back at once: the page faults then cost more than a
    spiking layer computes. From this call on the process keeps its largest size until it ends, as CUDA's caching
    allocator does on a GPU. Memory that other processes need is better left alone; a training run has its own machine.
    让进程保留已释放的内存，避免反复缺页（仅 Linux glibc）。

    Returns:
        Whether it was done: False where the C library is not glibc, or where an environment variable such as
        ``MALLOC_TRIM_THRESHOLD_`` shows that somebody has decided already.

    Source: ``mallopt(3)`` of the GNU C library; figures under *Kernels and benchmarks* (``malloc`` and ``reuse``).

    Examples:
        >>> keep_heap()  # doctest: +SKIP
        True
    """
    if sys.platform != "linux" or any(name in os.environ for name in _VARIABLES):
        return False
    library = ctypes.CDLL(None)
    if not (hasattr(library, "mallopt") and hasattr(library, "gnu_get_libc_version")):
        return False
    wanted = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 1 << 28))
    return all(library.mallopt(name, value) == 1 for name, value in wanted)
