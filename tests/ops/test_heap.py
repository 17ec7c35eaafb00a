"""keep_heap keeps what is freed, and leaves alone what somebody has decided."""

import subprocess
import sys

import pytest

CODE = """
import resource, torch
from sj_robust.ops import keep_heap
done = {call}
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.zeros(1 << 24)
before = faults()
for _ in range(3):
    torch.zeros(1 << 24)
print(done, faults() - before)
"""


def run(call: str, **variables: str) -> tuple[str, int]:
    code = CODE.format(call=call)
    command = [sys.executable, "-W", "ignore", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=variables)
    done, faults = result.stdout.split()
    return done, int(faults)


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_freed_memory_is_not_fetched_again():
    done, kept = run("keep_heap()")
    _, mapped = run("None")
    if done == "False":
        pytest.skip("the C library is not glibc")
    assert kept < mapped / 4


def test_a_decision_of_the_environment_stays():
    done, _ = run("keep_heap()", MALLOC_TOP_PAD_="131072")
    assert done == "False"
