"""References: the stated spectrum, colours and range, and gradients that flow."""

import json
import math

import numpy as np
import pytest
import torch

from timm_gencnn import hmc
from timm_gencnn.reference import (
    NATURAL_CORRELATION,
    NATURAL_PIXEL_MEAN,
    NATURAL_PIXEL_STD,
    WIDEST,
    Natural,
    White,
    natural_for,
    pixel_statistics,
    squashed_normal,
)


def draw(reference, n, seed=0):
    return torch.randn(n, *reference.shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize('shape', [(3, 32, 32), (3, 24, 40), (3, 15, 21)])
def test_natural_field_has_the_colour_correlations_of_the_table(shape):
    reference = Natural(shape)
    field = reference.field(draw(reference, 400)).double()
    covariance = torch.einsum('nihw,njhw->ij', field, field) / field[:, 0].numel()
    spread = covariance.diag().sqrt()
    correlation = covariance / spread / spread[:, None]
    assert (correlation - torch.tensor(NATURAL_CORRELATION, dtype=torch.float64)).abs().max() < 0.04
    assert (correlation - torch.eye(3)).abs().max() > 0.5  # uncorrelated colours are told apart


@pytest.mark.parametrize('mean', [0.13, 0.49, 0.8])
@pytest.mark.parametrize('std', [0.05, 0.2])
def test_natural_pixels_have_the_stated_mean_and_standard_deviation(mean, std):
    """A white field, so that 600 images are 38,400 independent pixels."""
    reference = Natural((1, 8, 8), [mean], [std], alpha=0.0)
    pixels = reference.pixels(draw(reference, 600)).double()
    assert pixels.mean().item() == pytest.approx(mean, abs=4 * std / 196)
    assert pixels.std().item() == pytest.approx(std, rel=0.02)


def test_squashed_normal_stops_where_the_sigmoid_would_lose_its_gradient():
    widest = WIDEST * math.sqrt(0.1307 * 0.8693)
    assert squashed_normal(0.1307, 0.3081) == squashed_normal(0.1307, widest)
    assert squashed_normal(0.5, 0.1)[0] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize(
    ('mean', 'std', 'own'),
    [
        ([0.1307], [0.3081], True),
        ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225], True),
        ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5], False),
        ([0.0, 0.0, 0.0], [1.0, 1.0, 1.0], False),
        ([0.48, 0.45, 0.41], [1 / 255] * 3, False),
    ],
)
def test_a_normalisation_that_describes_no_data_is_not_taken_for_one(mean, std, own):
    channels = len(mean)
    got = pixel_statistics(mean, std, channels)
    assert got == ((mean, std) if own else (list(NATURAL_PIXEL_MEAN), list(NATURAL_PIXEL_STD)))
    reference = natural_for({'mean': mean, 'std': std}, channels, (8, 8))
    x = reference(draw(reference, 2))  # whatever the pixels, they are normalised as the model wants them
    as_tensor = lambda v: torch.tensor(v).view(-1, 1, 1)  # noqa: E731
    assert torch.allclose(x * as_tensor(std) + as_tensor(mean), reference.pixels(draw(reference, 2)), atol=1e-5)


def test_bridge_leads_from_images_to_the_reference():
    """A faded image resembles its own image, more or less, and no other; a covered one is nowhere darker."""
    reference = Natural((1, 28, 28), [0.13], [0.3])
    torch.manual_seed(0)
    images = (torch.rand(200, 1, 28, 28) < 0.13).float()
    bridge = reference.bridge((images - 0.13) / 0.3) * 0.3 + 0.13
    assert len(bridge) == 600
    assert bridge.min() >= -1e-6
    assert bridge.max() <= 1 + 1e-6
    noisy, faded, covered, pure = bridge.split([200, 200, 100, 100])
    noise = (noisy - images)[images == 0]  # clamped at 0: half of a normal law of random width
    assert 0.01 < noise.mean() < 0.04
    assert ((covered - images[::2]) > -0.01).all()
    assert (covered - images[::2]).mean() > 0.03
    similarity = torch.cosine_similarity(
        pure.flatten(1) - pure.flatten(1).mean(1, True), images[1::2].flatten(1) - 0.13
    )
    assert similarity.abs().mean() < 0.1
    field = torch.logit(faded.clamp(1e-6, 1 - 1e-6)).flatten(1)
    field = field - field.mean(1, keepdim=True)
    data = images.flatten(1) - images.flatten(1).mean(1, keepdim=True)
    own = torch.cosine_similarity(field, data)
    other = torch.cosine_similarity(field, data.roll(1, 0))
    assert own.mean() > 0.4
    assert other.abs().mean() < 0.1
    assert own.min() < 0.1  # some are nearly all reference
    assert own.max() > 0.9  # some are nearly all image


@pytest.mark.parametrize('alpha', [0.0, 1.0, 1.25])
def test_natural_field_has_the_stated_spectrum(alpha):
    reference = Natural((1, 64, 64), mean=[0.5], std=[0.25], alpha=alpha)
    power = torch.fft.fft2(reference.field(draw(reference, 300)).double()).abs().square().mean((0, 1))
    frequency = torch.hypot(torch.fft.fftfreq(64)[:, None], torch.fft.fftfreq(64)[None]).double()
    inside = (frequency >= 1 / 64) & (frequency <= 0.5)
    x, y = frequency[inside].log(), power[inside].log() / 2
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    assert slope.item() == pytest.approx(-alpha, abs=0.02)


def test_natural_is_stationary_under_circular_shifts():
    reference = Natural((3, 20, 28))
    z = draw(reference, 2)
    shifted = torch.roll(z, (5, -9), (2, 3))
    assert torch.allclose(reference(shifted), torch.roll(reference(z), (5, -9), (2, 3)), atol=1e-4)


@pytest.mark.parametrize('channels', [1, 3, 4])
def test_natural_images_are_valid_pixels_normalised_for_the_model(channels):
    mean, std = [0.13] * channels, [0.31] * channels
    reference = Natural((channels, 28, 28), mean, std)
    z = draw(reference, 50)
    pixels = reference.pixels(z)
    assert 0 <= pixels.min() < 0.01
    assert 0.9 < pixels.max() <= 1
    assert torch.allclose(reference(z), (pixels - 0.13) / 0.31, atol=1e-5)


def test_white_is_sigma_z_and_shows_its_contrast():
    reference = White((1, 8, 8), sigma=10.0)
    z = draw(reference, 3)
    assert torch.equal(reference(z), 10 * z)
    pixels = reference.pixels(z).flatten(1)
    assert ((pixels - 0.5).abs().amax(1) > 0.48).all()
    assert torch.equal(pixels, White((1, 8, 8), sigma=0.1).pixels(z).flatten(1))


@pytest.mark.parametrize('reference', [White((3, 12, 16)), Natural((3, 12, 16))])
def test_gradient_flows_through_the_reference(reference):
    z = draw(reference, 2).double()
    weight = torch.linspace(-1, 1, z[0].numel(), dtype=torch.float64).view(z.shape[1:])
    score = lambda z: (weight * reference(z)).sum((1, 2, 3))  # noqa: E731
    _, grad = hmc.score_and_grad(score, z)
    direction = draw(reference, 2, seed=1).double()
    finite_difference = (score(z + 1e-5 * direction) - score(z - 1e-5 * direction)) / 2e-5
    assert torch.allclose((grad * direction).sum((1, 2, 3)), finite_difference, rtol=1e-5)


def test_sampling_the_reference_alone_is_exact():
    """With f = 0 the sampler returns N(0, I) latents, and colours as in the table."""
    reference = Natural((3, 16, 16))
    zero = lambda z: z.flatten(1).sum(1) * 0  # noqa: E731
    streams = hmc.Streams(0, range(300))
    state = hmc.init(zero, streams.normal(reference.shape), streams)
    for _ in range(3):
        state, _ = hmc.step(state, zero, streams, torch.full((300,), 0.4), 4)
    assert abs(state.z.mean().item()) < 4.5 / math.sqrt(state.z.numel())
    assert abs(state.z.var().item() - 1) < 4.5 * math.sqrt(2 / state.z.numel())
    field = reference.field(state.z).double()
    covariance = torch.einsum('nihw,njhw->ij', field, field) / field[:, 0].numel()
    assert ((covariance / reference.covariance) - 1).abs().max() < 0.12


def test_settings_tell_references_apart_by_their_normalisation():
    """Networks are given other images for the same pixels."""
    plain = Natural((1, 8, 8), [0.25], [0.125])
    other = Natural((1, 8, 8), [0.25], [0.125], normalize=([0.5], [0.5]))
    assert not torch.equal(plain(draw(plain, 2)), other(draw(plain, 2)))
    assert other.settings() == plain.settings() | {'normalize': [[0.5], [0.5]]}
    assert Natural((1, 8, 8), [0.25], [0.125], normalize=([0.25], [0.125])).settings() == plain.settings()


@pytest.mark.parametrize('array', [torch.tensor, lambda values: np.array(values, np.float32)])
def test_statistics_may_be_arrays(array):
    expected = [Natural((1, 8, 8), [0.25], [0.125]), White((1, 8, 8), 2.0)]
    references = [Natural((1, 8, 8), array([0.25]), array([0.125])), White((1, 8, 8), array(2.0))]
    for reference, same in zip(references, expected, strict=True):
        assert json.dumps(reference.settings()) == json.dumps(same.settings())
        assert torch.equal(reference(draw(same, 2)), same(draw(same, 2)))


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: White((1, 8, 8), sigma=0.0), 'sigma'),
        (lambda: White((1, 8, 8), sigma=math.nan), 'sigma'),
        (lambda: Natural((1, 8, 8), [1.0], [0.2]), 'pixel mean'),
        (lambda: Natural((1, 8, 8), [0.5], [0.0]), 'standard deviation'),
        (lambda: Natural((3, 8, 8), alpha=-0.1), 'alpha'),
        (lambda: Natural((1, 8, 8)), 'entries'),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    'cfg', [{'mean': 0.5, 'std': 0.2}, {'mean': [0.5, 0.4], 'std': [0.2]}, {'mean': [0.5], 'std': []}]
)
def test_misstated_normalisations_are_refused(cfg):
    with pytest.raises(ValueError, match=r'pretrained_cfg has mean .* and std .*: give one number for each of 2'):
        natural_for(cfg, 2, (8, 8))


@pytest.mark.parametrize('shape', [(3, 8, 8), (3, 7, 9), (1, 6, 5)])
def test_the_gradient_of_the_field_is_that_of_its_definition(shape):
    """The filter's own backward pass against differences, and against autograd through the transforms."""
    reference = Natural(shape, [0.4] * shape[0], [0.2] * shape[0])
    z = torch.randn(2, *shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(reference.field, z)
    weight = torch.randn(2, *shape, dtype=torch.float64)
    coloured = torch.fft.irfft2(torch.fft.rfft2(z) * reference._spectrum.double(), s=shape[1:])
    field = torch.einsum('ij,njhw->nihw', reference._mix.double(), coloured)
    torch.testing.assert_close(reference.field(z), field)
    (expected,) = torch.autograd.grad((weight * field).sum(), z)
    (grad,) = torch.autograd.grad((weight * reference.field(z)).sum(), z)
    torch.testing.assert_close(grad, expected)
