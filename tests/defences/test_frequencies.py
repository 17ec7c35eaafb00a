"""The frequency encoder against numpy, and what an attack sees of it."""

import numpy as np
import pytest
import torch
from spikingjelly.activation_based import functional
from torch import nn
from torch.testing import assert_close

from sj_robust import SpikingClassifier
from sj_robust.defences import FrequencyEncoder

T = 4


def images(height, width, *, low=0.0):
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, height, width)
    return low + (1 - low) * torch.rand(shape, generator=generator, dtype=torch.float64)


def filtered(x, keep):
    """The filtered image, complex, by shifting zero frequency to the middle as the code of the
    paper does.
    """
    height, width = x.shape[-2:]
    spectrum = np.fft.fftshift(np.fft.fft2(x), axes=(-2, -1))
    for axis, size in ((-2, height), (-1, width)):
        for place in range(size):
            k = place - size // 2
            below = -keep * (size // 2) <= k
            above = k <= keep * (size // 2) if size % 2 else k < keep * (size // 2)
            if not (below and above):
                index = [slice(None)] * 4
                index[axis] = place
                spectrum[tuple(index)] = 0
    return np.fft.ifft2(np.fft.ifftshift(spectrum, axes=(-2, -1)))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (28, 28), (8, 8), (7, 10)])
@pytest.mark.parametrize("narrowing", [0.125, 0.2])
def test_frames_are_filtered_as_by_numpy(height, width, narrowing):
    x = images(height, width)
    encoder = FrequencyEncoder(narrowing)
    for t in range(T):
        wanted = np.abs(filtered(x.numpy(), 1 - narrowing * t))
        frame = encoder(x)
        np.testing.assert_allclose(frame, wanted, rtol=0, atol=1e-12)
        assert t == 0 or not torch.allclose(frame, x, atol=1e-3)


def test_the_gradient_is_that_of_the_real_part():
    x = images(8, 8).requires_grad_()
    weights = images(8, 8).flip(0)
    encoder = FrequencyEncoder()
    for t in range(T):
        (found,) = torch.autograd.grad((encoder(x) * weights).sum(), x)
        shifted = torch.zeros(8, 8, dtype=torch.float64)
        inside = [k for k in range(-4, 4) if -(1 - t / 8) * 4 <= k < (1 - t / 8) * 4]
        for k in inside:
            for m in inside:
                shifted[k, m] = 1
        plain = torch.fft.ifft2(torch.fft.fft2(x) * shifted).real
        (wanted,) = torch.autograd.grad((plain * weights).sum(), x)
        assert_close(found, wanted)


def test_where_the_filtered_image_is_positive_it_is_the_gradient_of_the_magnitude():
    x = images(8, 8, low=0.7)
    direction = images(8, 8) - 0.5
    encoder = FrequencyEncoder(0.3)  # whose masks are symmetric from the second step on
    encoder(x)
    frame = encoder(x.requires_grad_())
    (found,) = torch.autograd.grad((frame * direction).sum(), x)
    slope = (found * direction).sum()
    ends = []
    for sign in (1, -1):
        functional.reset_net(encoder)
        encoder(x)
        moved = x.detach() + sign * 1e-5 * direction
        ends.append((encoder(moved) * direction).sum())
    assert_close(slope, (ends[0] - ends[1]) / 2e-5, rtol=1e-7, atol=0)


def test_black_pixels_have_the_gradient_of_others():
    x = torch.zeros(1, 1, 8, 8, requires_grad=True)
    (found,) = torch.autograd.grad(FrequencyEncoder()(x).sum(), x)
    assert_close(found, torch.ones_like(x))


def test_a_classifier_begins_every_forward_with_the_whole_image():
    model = SpikingClassifier(nn.Flatten(2), T, FrequencyEncoder())
    x = images(8, 8)
    encoder = FrequencyEncoder()
    wanted = torch.stack([encoder(x) for _ in range(T)]).flatten(2).mean(0)
    for _ in range(2):
        assert_close(model(x), wanted)
    assert functional.reset_net(model.encoder) is None
    assert model.encoder.time_step == 0
    assert encoder(x.bfloat16()).dtype == torch.bfloat16


def test_wrong_use():
    with pytest.raises(ValueError, match=r"narrowing must be in \[0, 1\]"):
        FrequencyEncoder(-0.1)
    encoder = FrequencyEncoder(0.5)
    encoder(images(8, 8))
    encoder(images(8, 8))
    with pytest.raises(RuntimeError, match="leaves no frequency at step 2"):
        encoder(images(8, 8))
