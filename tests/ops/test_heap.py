"""keep_heap keeps what is freed, and leaves alone what somebody has decided; huge pages are had
where there are any.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sj_robust.ops.heap import advise_huge_pages, keep_heap

CODE = """
import resource, torch
from sj_robust.ops import keep_heap
from sj_robust.ops.heap import advise_huge_pages

def faults(run):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    run()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def zeros():
    for _ in range(8):
        torch.zeros(1 << 24)

plain = faults(lambda: torch.empty(1 << 24).zero_())
advised = faults(lambda: advise_huge_pages(torch.empty(1 << 24)).zero_())
mapped = faults(zeros)
done = keep_heap()
zeros()
# one block more may be fetched until the heap has settled
print(plain, advised, mapped, done, faults(zeros))
"""


def run():
    """Page faults of large blocks: plain, with huge pages, eight before keep_heap; what it says;
    eight after it.
    """
    command = [sys.executable, "-W", "ignore", "-c", CODE]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env={})
    return [eval(word) for word in result.stdout.split()]


def pages(file, word):
    """Whether the system gives huge pages on request, and how often it had none."""
    path = Path(file)
    return [line for line in path.read_text().splitlines() if word in line] if path.exists() else []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_freed_memory_is_not_fetched_again_and_huge_pages_mean_fewer_faults():
    before = pages("/proc/vmstat", "thp_fault_fallback ")
    plain, advised, mapped, done, kept = run()
    if done:  # the C library is glibc
        assert kept < mapped / 4
    gives = pages("/sys/kernel/mm/transparent_hugepage/enabled", "[madvise]")
    if gives and pages("/proc/vmstat", "thp_fault_fallback ") == before:
        assert advised < plain / 4


def test_what_somebody_has_decided_stays(monkeypatch):
    monkeypatch.setenv("MALLOC_TOP_PAD_", "131072")
    assert keep_heap() is False


def test_tensors_without_memory_of_their_own_are_left_alone():
    assert advise_huge_pages(torch.empty(1 << 24, device="meta")).device.type == "meta"
    assert advise_huge_pages(torch.empty(0)).numel() == 0
