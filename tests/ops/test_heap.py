"""keep_heap keeps what is freed, and leaves alone what somebody has decided; huge pages are had where there are any."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

from sj_robust.ops.heap import advise_huge_pages

pytestmark = pytest.mark.slow

CODE = """
import resource, torch
from sj_robust.ops import keep_heap
done = {call}
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.zeros(1 << 24)
before = faults()
for _ in range(8):  # one block more may be fetched until the heap has settled
    torch.zeros(1 << 24)
print(done, faults() - before)
"""
HUGE_PAGES = """
import resource, torch
from sj_robust.ops.heap import advise_huge_pages
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
{call}(torch.empty(1 << 24)).zero_()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(code: str, call: str, **variables: str) -> list[str]:
    command = [sys.executable, "-W", "ignore", "-c", code.format(call=call)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=variables).stdout.split()


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_freed_memory_is_not_fetched_again():
    done, kept = run(CODE, "keep_heap()")
    _, mapped = run(CODE, "None")
    if done == "False":
        pytest.skip("the C library is not glibc")
    assert int(kept) < int(mapped) / 4


def test_a_decision_of_the_environment_stays():
    done, _ = run(CODE, "keep_heap()", MALLOC_TOP_PAD_="131072")
    assert done == "False"


def test_huge_pages_mean_fewer_faults():
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[madvise]" not in setting.read_text():
        pytest.skip("this system does not give huge pages on request")
    (advised,), (plain,) = (run(HUGE_PAGES, call) for call in ("advise_huge_pages", ""))
    assert int(advised) < int(plain) / 4


def test_tensors_without_memory_of_their_own_are_left_alone():
    with FakeTensorMode():
        assert advise_huge_pages(torch.empty(1 << 24)).shape == (1 << 24,)
    assert advise_huge_pages(torch.empty(1 << 24, device="meta")).device.type == "meta"
    assert advise_huge_pages(torch.empty(0)).numel() == 0
