"""The frequency encoder against numpy, and what an attack sees of it."""

import numpy as np
import pytest
import torch
from defences.neurons_by_hand import numbers
from spikingjelly.activation_based import functional
from torch import nn
from torch.testing import assert_close

from sj_robust import SpikingClassifier
from sj_robust.defences import FrequencyEncoder
from sj_robust.models import NetworkSpec, build_classifier

T = 4


def images(height, width, *, low=0.0):
    return numbers(2, 3, height, width, low=low)


def wave(k):
    """An image with one frequency, along the columns."""
    places = torch.arange(32, dtype=torch.float64)
    angles = 2 * torch.pi * k * places / 32
    row = 0.5 + 0.4 * torch.cos(angles)
    return row.expand(1, 1, 32, 32)


def gradient(frame, weights, x):
    loss = (frame * weights).sum()
    (found,) = torch.autograd.grad(loss, x)
    return found


def kept(size, keep):
    """Whether each frequency stays, from the lowest negative one on."""
    reach = round(keep * (size // 2), 6)
    stays = []
    for place in range(size):
        k = place - size // 2
        above = k <= reach if size % 2 else k < reach
        stays.append(above and k >= -reach)
    return np.array(stays)


def filtered(x, keep):
    """The filtered image, complex, by shifting zero frequency to the middle as the code of the
    paper does.
    """
    axes = (-2, -1)
    transform = np.fft.fft2(x)
    spectrum = np.fft.fftshift(transform, axes=axes)
    rows = kept(x.shape[-2], keep)
    columns = kept(x.shape[-1], keep)
    spectrum[:, :, ~rows] = 0
    spectrum[:, :, :, ~columns] = 0
    shifted = np.fft.ifftshift(spectrum, axes=axes)
    return np.fft.ifft2(shifted)


def test_masks_of_the_papers_size_are_32_28_24_and_20_wide():
    encoder = FrequencyEncoder()
    for reach in (16, 14, 12, 10):
        inside = wave(reach - 1)
        outside = wave(reach + 1)
        x = torch.cat((inside, outside))
        frame = encoder(x)
        assert_close(frame[0], inside[0])
        if reach < 15:  # beyond, a wave is one of a lower frequency
            grey = torch.full_like(frame[1], 0.5)
            assert_close(frame[1], grey)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (28, 28), (8, 8), (7, 10)])
@pytest.mark.parametrize("narrowing", [0.125, 0.2])
def test_frames_are_filtered_as_by_numpy(height, width, narrowing):
    x = images(height, width)
    encoder = FrequencyEncoder(narrowing)
    for t in range(T):
        plain = filtered(x.numpy(), 1 - narrowing * t)
        wanted = np.abs(plain)
        frame = encoder(x)
        np.testing.assert_allclose(frame, wanted, rtol=0, atol=1e-12)
        assert t == 0 or not torch.allclose(frame, x, atol=1e-3)


def test_the_gradient_is_that_of_the_real_part():
    x = images(8, 8).requires_grad_()
    weights = images(8, 8).flip(0)
    encoder = FrequencyEncoder()
    for t in range(T):
        found = gradient(encoder(x), weights, x)
        stays = kept(8, 1 - t / 8)
        inside = torch.from_numpy(np.fft.ifftshift(stays))
        mask = inside[:, None] & inside
        spectrum = torch.fft.fft2(x) * mask
        plain = torch.fft.ifft2(spectrum).real
        wanted = gradient(plain, weights, x)
        assert_close(found, wanted)


def test_black_pixels_have_the_gradient_of_others():
    x = torch.zeros(1, 1, 8, 8, requires_grad=True)
    encoder = FrequencyEncoder()
    encoder(x).sum().backward()
    assert_close(x.grad, torch.ones_like(x))


def test_a_classifier_begins_every_forward_with_the_whole_image():
    model = SpikingClassifier(nn.Flatten(2), T, FrequencyEncoder())
    x = images(8, 8)
    encoder = FrequencyEncoder()
    frames = torch.stack([encoder(x) for _ in range(T)])
    wanted = frames.flatten(2).mean(0)
    for _ in range(2):
        assert_close(model(x), wanted)
    assert functional.reset_net(model.encoder) is None
    assert model.encoder.time_step == 0
    assert encoder(x.bfloat16()).dtype == torch.bfloat16


def test_no_images_have_frames_too():
    encoder = FrequencyEncoder()
    assert encoder(torch.rand(0, 3, 8, 8)).shape == (0, 3, 8, 8)
    assert encoder.time_step == 1


def test_a_classifier_says_that_its_encoder_has_no_more_frequencies():
    spec = NetworkSpec(encoder="feel", neuron="feel", T=9, encoder_options={"narrowing": 0.125})
    classifier = build_classifier(spec)
    with pytest.raises(ValueError, match="narrowing"):
        classifier(torch.rand(2, 1, 8, 8))
