"""Memory of the host: freed blocks kept for the next step, and huge pages."""

import ctypes
import functools
import os
import sys

from torch import Tensor

__all__ = ["advise_huge_pages", "keep_heap"]

_HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14  # see madvise(2)
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # names of mallopt, see malloc.h
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_")


def keep_heap() -> bool:
    """Let this process keep the memory of freed tensors, so that the next step does not have to
    request it page by page.

    By default, glibc maps every large tensor anew and returns its memory at once: the page faults
    then cost more time than a spiking layer needs to compute. After this call, the process keeps
    its largest size until it ends, as CUDA's caching allocator does on a GPU. Do not call it if
    other processes need the memory. 让进程保留已释放的内存，避免反复缺页（仅 Linux glibc）。

    Returns:
        Whether it had an effect: False if the C library is not glibc, or if an environment variable
        such as ``MALLOC_TRIM_THRESHOLD_`` is already set.

    Source: ``mallopt(3)`` of the GNU C library; figures under *Kernels and benchmarks* (``malloc``
        and ``reuse``).

    Examples:
        >>> keep_heap()  # doctest: +SKIP
        True
    """
    if sys.platform != "linux" or any(name in os.environ for name in _VARIABLES):
        return False
    library = _libc()
    if not (hasattr(library, "mallopt") and hasattr(library, "gnu_get_libc_version")):
        return False
    wanted = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 1 << 28))
    return all(library.mallopt(name, value) == 1 for name, value in wanted)


def advise_huge_pages(fresh: Tensor) -> Tensor:
    """Ask for pages of 2 MiB before a new tensor is first written: with 4 KiB pages faults may cost
    more than the rest.

    Nothing is asked for where the tensor is too small to hold such a page or is not on a CPU, and
    where the system is not Linux.

    Args:
        fresh: A contiguous tensor that was just allocated, with memory of its own.

    Returns:
        The same tensor.

    Source: ``madvise(2)``.

    Examples:
        >>> import torch
        >>> advise_huge_pages(torch.empty(4, 3)).shape
        torch.Size([4, 3])
    """
    if sys.platform != "linux" or fresh.device.type != "cpu":
        return fresh
    start = fresh.data_ptr()
    first = -(-start // _HUGE_PAGE) * _HUGE_PAGE
    last = (start + fresh.nbytes) // _HUGE_PAGE * _HUGE_PAGE
    if last > first:
        _libc().madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_HUGEPAGE)
    return fresh


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
