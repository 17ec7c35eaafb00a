"""What a proof holds in memory, and what it leaves behind."""

import gc
import subprocess
import sys

import pytest
import torch
from covering import mostly_slow
from proofs.collected import no_collection, tensors_of_cycles
from proofs.networks import NEURONS, classifier, convolutional, small
from torch import nn

from sj_robust.proofs import verify

METHODS = ("ibp", "joint", "mip")
OPTIONS = {"time_limit": 0.001, "batch_size": 2}


def images(count):
    """A small network, and images with the classes that it gives them."""
    model = small(NEURONS["DLIF"], seed=2)
    x = torch.rand(count, 3, generator=torch.Generator().manual_seed(2))
    return model, x, model(x).argmax(1)


@pytest.mark.parametrize("method", mostly_slow(METHODS, quick=["joint"]))
def test_memory_does_not_grow_with_the_images(method):
    held = {}

    def held_tensors(done):
        if done not in (10, 20):  # once all trains have been listed, and at the end
            return
        gc.collect()
        tensors = [one for one in gc.get_objects() if type(one) in (torch.Tensor, nn.Parameter)]
        held[done] = sum(one.untyped_storage().nbytes() for one in tensors)

    verify(*images(20), 0.1, on_batch=held_tensors, method=method, **OPTIONS)
    assert held[20] <= 1.02 * held[10]


@pytest.mark.parametrize("method", mostly_slow(METHODS, quick=["joint"]))
def test_a_proof_leaves_no_tensors_to_the_collector(method):
    """Python looks for cycles rarely, and the batches of a proof would add up until then."""
    given = images(4)
    verify(*given, 0.1, method=method, **OPTIONS)
    with no_collection():
        verify(*given, 0.1, method=method, **OPTIONS)
        assert not tensors_of_cycles()


_PEAK = """
import sys, torch
from pathlib import Path
from sj_robust.models import pretrained
from sj_robust.proofs import verify

def megabytes(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024

torch.set_num_threads(1)
model = pretrained("digits/dlif-at-mppd").eval()
x = torch.rand(int(sys.argv[1]), 1, 8, 8)
y = model(x).argmax(1)
verify(model, x[:2], y[:2], 0.004)
before = megabytes("VmRSS:")
verify(model, x, y, 0.004, batch_size=32)
print(before, megabytes("VmHWM:"))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells the peak of a process")
def test_the_peak_of_memory_does_not_grow_with_the_images():
    """Megabytes of a process that proves one batch of 32 images, and one that proves sixteen.

    Not ``ru_maxrss``: the kernel begins it with that of the process that started this one.
    """
    grown = []
    for count in (32, 512):
        command = [sys.executable, "-c", _PEAK, str(count)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        before, after = map(float, done.stdout.split())
        grown.append(after - before)
    assert grown[0] > 5
    assert grown[1] < 2.5 * grown[0], grown


def test_parameters_are_converted_once_for_all_runs(monkeypatch):
    model = classifier(convolutional, NEURONS["LIF"])
    x = torch.rand(2, 2, 8, 8)
    y = model(x).argmax(1)
    converted = []
    double = torch.Tensor.double

    def counting(value):
        converted.append(value.data_ptr())
        return double(value)

    monkeypatch.setattr(torch.Tensor, "double", counting)
    verify(model, x, y, 0.01, method="ibp")
    for name, value in model.named_parameters():
        assert converted.count(value.data_ptr()) == 1, name
