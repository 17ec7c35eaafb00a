"""keep_heap keeps what is freed, and leaves alone what somebody has decided; huge pages are had
where there are any.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sj_robust.ops.heap import advise_huge_pages

pytestmark = pytest.mark.slow

CODE = """
import resource, torch
from sj_robust.ops import keep_heap
from sj_robust.ops.heap import advise_huge_pages

def faults(run, times=1):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        run()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def zeros():
    torch.zeros(1 << 24)

plain = faults(lambda: torch.empty(1 << 24).zero_())
advised = faults(lambda: advise_huge_pages(torch.empty(1 << 24)).zero_())
mapped = faults(zeros, 8)
done = keep_heap()
zeros()
# one block more may be fetched until the heap has settled
print(plain, advised, mapped, done, faults(zeros, 8))
"""


def run(**variables: str) -> list[str]:
    command = [sys.executable, "-W", "ignore", "-c", CODE]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, env=variables
    ).stdout.split()


def fallbacks() -> int:
    """How often the kernel had no huge page to give since it started; 0 where it is not counted."""
    counters = Path("/proc/vmstat")
    if not counters.exists():
        return 0
    for line in counters.read_text().splitlines():
        name, value = line.split()
        if name == "thp_fault_fallback":
            return int(value)
    return 0


@pytest.fixture(scope="module")
def found() -> list[str]:
    """Page faults of large blocks: plain, with huge pages, eight before keep_heap; what it says;
    eight after it; and how often there was no huge page meanwhile.
    """
    before = fallbacks()
    told = run()
    return [*told, str(fallbacks() - before)]


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_freed_memory_is_not_fetched_again_unless_the_environment_has_decided(found):
    _, _, mapped, done, kept, _ = found
    if done == "False":
        pytest.skip("the C library is not glibc")
    assert int(kept) < int(mapped) / 4
    assert run(MALLOC_TOP_PAD_="131072")[3] == "False"


def test_huge_pages_mean_fewer_faults(found):
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[madvise]" not in setting.read_text():
        pytest.skip("this system does not give huge pages on request")
    plain, advised, missing = (int(found[place]) for place in (0, 1, -1))
    if advised >= plain / 4 and missing:
        pytest.skip("memory is too fragmented for huge pages")
    assert advised < plain / 4


def test_tensors_without_memory_of_their_own_are_left_alone():
    assert advise_huge_pages(torch.empty(1 << 24, device="meta")).device.type == "meta"
    assert advise_huge_pages(torch.empty(0)).numel() == 0
