"""Reference distributions q(x): the law of images x = g(z) with latents z ~ N(0, I).

A reference only has to say how large its latents are, what image they stand for, and how that image looks to a person.
Tilting by a score commutes with the push-forward by g, so a chain on z samples exp(f(x)) q(x) / Z exactly for any g.
This module knows nothing of networks or sampling.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

# Statistics of logit(pixel) over 1,000 photographs, one per ImageNet class, at 128 x 128: the correlation of red, green
# and blue, and the exponent of the amplitude spectrum; mean and spread of the pixels. tests/benchmarks/natural_table.py
# finds them again to 0.002, and an exponent of 1.24 from 1 to 16 cycles an image, 1.34 up to 64: resizing has blurred
# what is finer.
NATURAL_CORRELATION = ((1.0, 0.894, 0.795), (0.894, 1.0, 0.906), (0.795, 0.906, 1.0))
NATURAL_EXPONENT = 1.25
NATURAL_PIXEL_MEAN = (0.491, 0.463, 0.413)
NATURAL_PIXEL_STD = (0.264, 0.258, 0.270)
WIDEST = 0.7  # share of the spread of black-and-white pixels: MNIST's own 0.91 leaves a sigmoid without gradient
# Chosen by the look of digits of LeNets trained with `Natural.bridge`.
BRIDGE_EXPONENT = 0.8
DATA_NOISE = 0.1


class Reference(Protocol):
    """What a reference must offer; pass any object with these members as `visualize(reference=...)`."""

    name: str
    shape: tuple[int, int, int]
    """Shape [C, H, W] of one latent."""

    def __call__(self, z: Tensor) -> Tensor:
        """g: latents [n, C, H, W] to images normalised for the model [n, C, H, W], differentiable."""
        ...

    def pixels(self, z: Tensor) -> Tensor:
        """Latents [n, C, H, W] to pixels to show [n, C, H, W] in [0, 1]."""
        ...

    def settings(self) -> dict:
        """The numbers that define the reference, for JSON."""
        ...


class White:
    """White noise in normalised pixel space: x = sigma z (Dai, Lu, Wu 2015, section 3).

    Its images leave the range of valid pixels, so `pixels` stretches each image's contrast to show it.

    Args:
        shape: [C, H, W] of an image.
        sigma: Standard deviation in units of the model's normalised pixels, > 0.
    """

    name = 'white'

    def __init__(self, shape: Sequence[int], sigma: float = 1.0):
        if not (sigma > 0 and math.isfinite(sigma)):
            raise ValueError(f'sigma must be a positive number, got {sigma}')
        channels, height, width = shape
        self.shape = (channels, height, width)
        self.sigma = float(sigma)

    def __call__(self, z: Tensor) -> Tensor:
        return self.sigma * z

    def pixels(self, z: Tensor) -> Tensor:
        x = z.float()
        magnitude = x.flatten(1).abs().sort(dim=1).values  # `kthvalue` refuses where algorithms must be deterministic
        half = magnitude[:, math.ceil(0.995 * magnitude.shape[1]) - 1]
        half = half.clamp(min=1e-12).view(-1, 1, 1, 1)
        return (0.5 + x / (2 * half)).clamp(0, 1)

    def settings(self) -> dict:
        return {'reference': self.name, 'sigma': self.sigma, 'display': 'contrast stretched per image'}


class Natural:
    """Coloured noise with the spectrum and colours of photographs, squashed into pixels of a given mean and spread.

    g(z) = sigmoid(K z + m): K shapes white noise to an amplitude spectrum 1/frequency^alpha and mixes the channels,
    with the colour correlations of photographs (three channels; otherwise the channels are independent). m and the
    standard deviation s of K z are such that the pixels have the wanted mean and standard deviation, channel by
    channel. The law is stationary: circular shifts leave it invariant.

    Args:
        shape: [C, H, W] of an image.
        mean: Pixel mean per channel, in (0, 1).
        std: Pixel standard deviation per channel, > 0; cut at `WIDEST` times that of black-and-white pixels, beyond
            which the sigmoid has no gradient left.
        alpha: Exponent of the amplitude spectrum, >= 0; 0 is white in space.
        normalize: (mean, std) by which the model normalises its images, per channel; None is (mean, std).
        device: Where the latents will be.

    Raises:
        ValueError: A number out of its range, or not one per channel.
    """

    name = 'natural'

    def __init__(
        self,
        shape: Sequence[int],
        mean: Sequence[float] = NATURAL_PIXEL_MEAN,
        std: Sequence[float] = NATURAL_PIXEL_STD,
        alpha: float = NATURAL_EXPONENT,
        normalize: tuple[Sequence[float], Sequence[float]] | None = None,
        device: torch.device | str = 'cpu',
    ):
        channels, height, width = shape
        if not (alpha >= 0 and math.isfinite(alpha)):
            raise ValueError(f'alpha must be a number >= 0, got {alpha}')
        mean, std = tuple(map(float, mean)), tuple(map(float, std))  # statistics of one's own data come as arrays
        by_mean, by_std = (tuple(map(float, values)) for values in normalize or (mean, std))
        for values in mean, std, by_mean, by_std:
            if len(values) != channels:
                raise ValueError(f'mean and std must have {channels} entries, got {tuple(values)}')
        self.shape = (channels, height, width)
        self.mean, self.std, self.alpha = mean, std, float(alpha)
        self.normalize = by_mean, by_std
        fields = [squashed_normal(m, s) for m, s in zip(mean, std, strict=True)]
        spread = torch.tensor([s for _, s in fields], dtype=torch.float64, device='cpu')
        as_channels = lambda v: torch.tensor(v, dtype=torch.float32, device=device).view(-1, 1, 1)  # noqa: E731
        self.centre = as_channels([m for m, _ in fields])
        self._mean, self._std = as_channels(by_mean), as_channels(by_std)
        self._spectrum = self.amplitude(height, width, alpha).to(device, torch.float32)
        self._bridge_spectrum = self.amplitude(height, width, BRIDGE_EXPONENT).to(device, torch.float32)
        self.covariance = spread[:, None] * self.correlation(channels) * spread
        self._mix = torch.linalg.cholesky(self.covariance).to(device, torch.float32)

    @staticmethod
    def amplitude(height: int, width: int, alpha: float) -> Tensor:
        """Gain per frequency [H, W // 2 + 1], float64, so normalised that filtered white noise keeps unit variance."""
        fy, fx = (torch.fft.fftfreq(side, dtype=torch.float64, device='cpu') for side in (height, width))
        frequency = torch.hypot(fy[:, None], fx[None]).clamp(min=1 / max(height, width))
        gain = frequency**-alpha
        return (gain / gain.square().mean().sqrt())[:, : width // 2 + 1]

    @staticmethod
    def correlation(channels: int) -> Tensor:
        """Correlation of logit(pixel) across channels [C, C], float64."""
        if channels != 3:
            return torch.eye(channels, dtype=torch.float64, device='cpu')
        return torch.tensor(NATURAL_CORRELATION, dtype=torch.float64, device='cpu')

    def field(self, z: Tensor) -> Tensor:
        """K z: the stationary Gaussian field before centring and squashing [n, C, H, W]."""
        return self._field(z, self._spectrum)

    def _field(self, z: Tensor, spectrum: Tensor) -> Tensor:
        coloured = Filter.apply(z, spectrum.to(z.dtype))
        return (self._mix.to(z.dtype) @ coloured.flatten(2)).view_as(z)

    def pixels(self, z: Tensor) -> Tensor:
        return torch.sigmoid(self.field(z) + self.centre)

    def __call__(self, z: Tensor) -> Tensor:
        return (self.pixels(z) - self._mean) / self._std

    def bridge(self, images: Tensor) -> Tensor:
        """Images between given ones and the reference, for the image pool of generative training.

        First the images themselves under faint Gaussian noise, of standard deviation U(0, `DATA_NOISE`) in pixels: else
        a network tells them from the others by their clean pixels and need not look at shapes.

        Then, with a, b, c ~ U(0, 1), z, z' ~ N(0, I) and K as in the reference but for the exponent `BRIDGE_EXPONENT`
        (details finer than the reference's teach a network to mind them), each image on the way that a chain takes: in
        the field behind the sigmoid, u = logit(pixels) becomes m + a (u - m) + sqrt(1 - a²) b K z. Then one half of the
        images seen through the noise r = sigmoid(m + c K z'), 1 - (1 - pixels) (1 - r): all is there, and more; and in
        place of the other half r itself. Ratios between data and such bridges serve telescoping density-ratio
        estimation (Rhodes, Xu, Gutmann, NeurIPS 2020, arXiv 2006.12204).

        Args:
            images: Images normalised for the model [n, C, H, W].

        Returns:
            Images normalised for the model [3n, C, H, W], the first n those to learn, drawn with the global generator
            of their device.
        """
        pixels = (images.float() * self._std + self._mean).clamp(1 / 512, 1 - 1 / 512)
        a, b, c, d = torch.rand(4, len(images), 1, 1, 1, device=images.device)
        noisy = (images.float() * self._std + self._mean + DATA_NOISE * d * torch.randn_like(pixels)).clamp(0, 1)
        first, second = (self._field(torch.randn_like(pixels), self._bridge_spectrum) for _ in range(2))
        faint = (1 - a.square()).sqrt() * b * first
        faded = torch.sigmoid(self.centre + a * (torch.logit(pixels) - self.centre) + faint)
        noise = torch.sigmoid(self.centre + c * second)
        covered = 1 - (1 - pixels[::2]) * (1 - noise[::2])
        return ((torch.cat([noisy, faded, covered, noise[1::2]]) - self._mean) / self._std).to(images.dtype)

    def settings(self) -> dict:
        numbers = {'reference': self.name, 'alpha': self.alpha, 'mean': list(self.mean), 'std': list(self.std)}
        own = self.normalize == (self.mean, self.std)  # pictures from before it was recorded stay repeatable
        return numbers | ({} if own else {'normalize': [list(values) for values in self.normalize]})


class Filter(torch.autograd.Function):
    """Multiplies the half spectrum of images [..., H, W] by a real gain [H, W // 2 + 1]: `Filter.apply(images, gain)`.

    A real gain is its own adjoint, so that the gradient is filtered as the images are: by one real transform and back,
    where autograd's own way through `rfft2` takes a complex one.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, gain: Tensor) -> Tensor:
        ctx.gain = gain
        return torch.fft.irfft2(torch.fft.rfft2(images) * gain, s=images.shape[-2:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return Filter.apply(grad, ctx.gain), None


@lru_cache
def squashed_normal(mean: float, std: float) -> tuple[float, float]:
    """(m, s) such that sigmoid(N(m, s²)) has the given mean and standard deviation.

    Args:
        mean: In (0, 1).
        std: > 0; cut at `WIDEST` times the largest that a mean allows, sqrt(mean (1 - mean)).

    Raises:
        ValueError: A number out of its range.
    """
    if not 0 < mean < 1:
        raise ValueError(f'a pixel mean must lie in (0, 1), got {mean}')
    if not (std > 0 and math.isfinite(std)):
        raise ValueError(f'a pixel standard deviation must be positive, got {std}')
    std = min(std, WIDEST * math.sqrt(mean * (1 - mean)))
    x = torch.linspace(-8, 8, 2001, dtype=torch.float64, device='cpu')
    weight = torch.exp(-x.square() / 2)
    weight /= weight.sum()

    def moments(m: float, s: float) -> tuple[float, float]:
        p = torch.sigmoid(m + s * x)
        first = (weight * p).sum()
        return first.item(), ((weight * p.square()).sum() - first.square()).clamp(min=0).sqrt().item()

    def centre(s: float) -> float:
        return bisect(lambda m: moments(m, s)[0] - mean, -40.0, 40.0)

    s = bisect(lambda s: moments(centre(s), s)[1] - std, 1e-4, 20.0)
    return centre(s), s


def bisect(function: Callable[[float], float], low: float, high: float) -> float:
    """Root of an increasing function in [low, high], to 1e-6."""
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < 0 else (low, middle)
    return (low + high) / 2


def pixel_statistics(mean: Sequence[float], std: Sequence[float], channels: int) -> tuple[list[float], list[float]]:
    """Pixel mean and standard deviation of a model's data as its normalisation states them, per channel.

    Many models normalise by round numbers that describe no data (0.5 / 0.5, 0 / 1, 1 / 255): the statistics of
    photographs take their place.
    """
    plausible = all(0 < m < 1 and 0.1 <= s < 0.95 * math.sqrt(m * (1 - m)) for m, s in zip(mean, std, strict=True))
    if not plausible:
        mean, std = NATURAL_PIXEL_MEAN, NATURAL_PIXEL_STD
    return per_channel(mean, channels), per_channel(std, channels)


def per_channel(values: Sequence[float], channels: int) -> list[float]:
    """As many values as channels: themselves, or their mean repeated."""
    return list(values) if len(values) == channels else [sum(values) / len(values)] * channels


def natural_for(
    cfg: Mapping[str, Any], channels: int, size: tuple[int, int], device: torch.device | str = 'cpu'
) -> Natural:
    """The natural reference with the pixel statistics and the normalisation of a model's configuration.

    Args:
        cfg: `mean` and `std` as in timm's `pretrained_cfg`; where they are missing, ImageNet's.
        channels: Image channels.
        size: Image height and width in pixels.
        device: Where the latents will be.

    Raises:
        ValueError: `mean` and `std` are no lists of numbers, or not of one length.
    """
    mean, std = (
        default if cfg.get(key) is None else cfg[key]
        for key, default in (('mean', IMAGENET_DEFAULT_MEAN), ('std', IMAGENET_DEFAULT_STD))
    )
    try:
        mean, std = tuple(map(float, mean)), tuple(map(float, std))
    except (TypeError, ValueError):
        mean = std = ()
    if not mean or len(mean) != len(std):
        raise ValueError(
            f'pretrained_cfg has mean {cfg.get("mean")!r} and std {cfg.get("std")!r}: give one number for each of '
            f'{channels} channels, as a list'
        )
    normalize = per_channel(mean, channels), per_channel(std, channels)
    return Natural((channels, *size), *pixel_statistics(mean, std, channels), normalize=normalize, device=device)
