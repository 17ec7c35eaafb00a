"""Encoders of published defences against their equations written out."""

from itertools import combinations, product

import numpy as np
import pytest
import torch
from defences.neurons_by_hand import T, numbers
from spikingjelly.activation_based import functional
from torch import nn
from torch.testing import assert_close

from sj_robust import SpikingClassifier
from sj_robust.defences import FrequencyEncoder, OrthogonalEncoder, SmoothingEncoder
from sj_robust.defences.stod import temporal_similarity
from sj_robust.models import NetworkSpec, build_classifier
from sj_robust.training import ForwardPasses, TemporalOrthogonality


def images(n=3, channels=2, size=4):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(n, channels, size, size, generator=generator, dtype=torch.float64)


def random_kernels(T=4, patch=2, **options):
    """An encoder whose kernels have left where they began."""
    torch.manual_seed(0)
    encoder = OrthogonalEncoder((2, 4, 4), T, patch=patch, **options).double()
    encoder.skew.data.normal_(std=0.3)
    return encoder


def frames(encoder, x, steps):
    functional.reset_net(encoder)
    return torch.stack([encoder(x) for _ in range(steps)])


@pytest.mark.parametrize("shared", [False, True])
def test_noise_is_added_as_the_equation_says_and_begins_anew_behind_a_reset(shared):
    x = images()
    encoder = SmoothingEncoder(0.3, shared=shared)
    torch.manual_seed(5)
    found = frames(encoder, x, 3)
    torch.manual_seed(5)
    drawn = torch.randn(1 if shared else 3, *x.shape, dtype=x.dtype)
    noise = drawn.expand(3, *x.shape)
    assert_close(found, x + 0.3 * noise)
    first = frames(encoder, x, 1)
    again = frames(encoder, x, 1)
    assert not torch.equal(first, again)


def test_shared_noise_is_of_one_batch():
    encoder = SmoothingEncoder(0.3, shared=True)
    encoder(torch.rand(1, 1, 4, 4))
    with pytest.raises(RuntimeError, match="reset_net"):
        encoder(torch.rand(3, 1, 4, 4))
    encoder.reset()
    encoder(torch.rand(3, 1, 4, 4))


def by_hand(encoder, x, t):
    """Patch by patch, pixel by pixel."""
    kernel = kernel_by_hand(encoder, t, x.dtype)
    size = encoder.patch
    corners = range(0, 4, size)
    found = torch.empty_like(x)
    for n, top, left in product(range(len(x)), corners, corners):
        rows = slice(top, top + size)
        columns = slice(left, left + size)
        patch = x[n, :, rows, columns]
        turned = (patch.flatten() - 0.5) @ kernel
        found[n, :, rows, columns] = (turned + 0.5).view(patch.shape)
    return found


def kernel_by_hand(encoder, t, dtype):
    """The signs of a time step before Cayley's transform of its skew matrix."""
    skew = (encoder.skew[t] - encoder.skew[t].T).detach()
    one = torch.eye(len(skew), dtype=dtype)
    turn = (one - skew) @ torch.linalg.inv(one + skew)
    return torch.diag(encoder.start[t].to(dtype)) @ turn


def lengths(images):
    """Of the vectors from grey, the middle of [0, 1], to images."""
    return (images - 0.5).flatten(1).norm(dim=1)


def test_kernels_turn_patches_as_the_equation_says():
    encoder = random_kernels()
    x = images()
    found = frames(encoder, x, 5)
    one = torch.eye(8, dtype=torch.float64)
    for t in range(4):
        kernel = encoder.kernel(t)
        assert_close(kernel @ kernel.T, one)
        assert_close(found[t], by_hand(encoder, x, t))
        assert_close(lengths(found[t]), lengths(x))
    assert torch.equal(found[4], found[0])  # the kernels begin again


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_are_solved_in_float32_in_networks_of_half_precision(dtype):
    encoder = random_kernels().to(dtype)
    x = images().to(dtype)
    found = frames(encoder, x, 4)
    assert found.dtype == dtype
    expected = frames(encoder.float(), x.float(), 4)
    assert_close(found.float(), expected, rtol=0.0, atol=0.02)


def test_kernels_begin_mutually_orthogonal_and_with_the_identity():
    encoder = OrthogonalEncoder((2, 4, 4), T=4, patch=2)
    kernels = torch.stack([encoder.kernel(t) for t in range(4)])
    products = torch.einsum("iab,jab->ij", kernels, kernels)
    assert_close(products, 8 * torch.eye(4))
    assert_close(kernels[0], torch.eye(8))


def test_similarity_is_the_sum_over_pairs_of_squared_cosines():
    generator = torch.Generator().manual_seed(0)
    x_seq = torch.rand(4, 3, 2, 5, generator=generator)
    total = 0.0
    for n in range(3):
        for i, j in combinations(range(4), 2):
            one = x_seq[i, n].flatten()
            other = x_seq[j, n].flatten()
            cosine = one @ other / one.norm() / other.norm()
            total += float(cosine) ** 2
    assert float(temporal_similarity(x_seq)) == pytest.approx(total / 3, rel=1e-5)
    assert float(temporal_similarity(x_seq[:1])) == 0.0


def test_the_penalty_reaches_the_kernels():
    classifier = build_classifier(NetworkSpec(encoder="stod", channels=(4, 4)))
    classifier.encoder.skew.data.normal_(std=0.1)
    x = torch.rand(3, 1, 8, 8)
    y = torch.tensor([0, 1, 2])
    penalty = TemporalOrthogonality(1.0)
    passes = ForwardPasses(classifier, y, x, None, classifier(x), None)
    value = penalty.value(passes)
    centred = torch.stack([classifier.encoder.turned(x, t) for t in range(4)])
    assert_close(value, temporal_similarity(centred))
    value.backward()
    assert classifier.encoder.skew.grad.abs().max() > 0


def test_kernels_that_are_not_kept_are_gone_in_evaluation():
    encoder = random_kernels(kept=False)
    x = images()
    trained = frames(encoder, x, 2)
    evaluated = frames(encoder.eval(), x, 2)
    assert not torch.equal(trained[1], x)
    assert torch.equal(evaluated[1], x)


def pictures(height, width):
    return numbers(2, 3, height, width)


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


@pytest.mark.parametrize(("height", "width"), [(32, 32), (28, 28), (8, 8), (7, 10)])
@pytest.mark.parametrize("narrowing", [0.125, 0.2])
def test_frames_are_filtered_as_by_numpy(height, width, narrowing):
    x = pictures(height, width)
    encoder = FrequencyEncoder(narrowing)
    for t in range(T):
        plain = filtered(x.numpy(), 1 - narrowing * t)
        wanted = np.abs(plain)
        frame = encoder(x)
        np.testing.assert_allclose(frame, wanted, rtol=0, atol=1e-12)
        assert t == 0 or not torch.allclose(frame, x, atol=1e-3)


def test_the_gradient_is_that_of_the_real_part():
    x = pictures(8, 8).requires_grad_()
    weights = pictures(8, 8).flip(0)
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
    x = pictures(8, 8)
    encoder = FrequencyEncoder()
    frames = torch.stack([encoder(x) for _ in range(T)])
    wanted = frames.flatten(2).mean(0)
    for _ in range(2):
        assert_close(model(x), wanted)
    assert functional.reset_net(model.encoder) is None
    assert model.encoder.time_step == 0
    assert encoder(x.bfloat16()).dtype == torch.bfloat16
    assert encoder(x[:0]).shape == (0, 3, 8, 8)
    assert encoder.time_step == T + 2


def test_a_classifier_says_that_its_encoder_has_no_more_frequencies():
    spec = NetworkSpec(encoder="feel", neuron="feel", T=9, encoder_options={"narrowing": 0.125})
    classifier = build_classifier(spec)
    with pytest.raises(ValueError, match="narrowing"):
        classifier(torch.rand(2, 1, 8, 8))
