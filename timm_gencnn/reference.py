"""Reference distributions q(x): the law of images x = g(z) with latents z ~ N(0, I).

A reference only has to say how large its latents are, what image they stand for, and how that image looks to a person.
Tilting by a score commutes with the push-forward by g, so a chain on z samples exp(f(x)) q(x) / Z exactly for any g.
This module knows nothing of networks or sampling.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

# Statistics of logit(pixel) over 1,000 photographs, one per ImageNet class, at 128 x 128: the covariance of red, green
# and blue, and the exponent of the amplitude spectrum (fit over log-spaced frequencies); and the mean of the pixels.
NATURAL_COVARIANCE = ((2.951, 2.582, 2.493), (2.582, 2.826, 2.781), (2.493, 2.781, 3.336))
NATURAL_EXPONENT = 1.25
NATURAL_PIXEL_MEAN = (0.491, 0.463, 0.413)


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
        self.shape = tuple(shape)
        self.sigma = sigma

    def __call__(self, z: Tensor) -> Tensor:
        return self.sigma * z

    def pixels(self, z: Tensor) -> Tensor:
        x = z.float()
        magnitude = x.flatten(1).abs()
        half = magnitude.kthvalue(math.ceil(0.995 * magnitude.shape[1]), dim=1).values
        half = half.clamp(min=1e-12).view(-1, 1, 1, 1)
        return (0.5 + x / (2 * half)).clamp(0, 1)

    def settings(self) -> dict:
        return {'reference': self.name, 'sigma': self.sigma, 'display': 'contrast stretched per image'}


class Natural:
    """Coloured noise with the spectrum and colours of photographs, squashed into valid pixels.

    g(z) = sigmoid(scale · K z + logit(mean)): K shapes white noise to an amplitude spectrum 1/frequency^alpha and mixes
    the channels so that scale · K z has covariance scale² · `NATURAL_COVARIANCE` (three channels; otherwise the channels
    are independent with the variance of luminance). The law is stationary: circular shifts leave it invariant.

    Args:
        shape: [C, H, W] of an image.
        mean: Pixel mean of the model's data per channel, in (0, 1); the reference is centred on it.
        std: Pixel standard deviation that the model's normalisation divides by, per channel.
        alpha: Exponent of the amplitude spectrum, >= 0; 0 is white in space.
        scale: Contrast relative to photographs, > 0.
    """

    name = 'natural'

    def __init__(
        self,
        shape: Sequence[int],
        mean: Sequence[float] = NATURAL_PIXEL_MEAN,
        std: Sequence[float] = (0.229, 0.224, 0.225),
        alpha: float = NATURAL_EXPONENT,
        scale: float = 1.0,
        device: torch.device | str = 'cpu',
    ):
        channels, height, width = shape
        if not (scale > 0 and math.isfinite(scale)):
            raise ValueError(f'scale must be a positive number, got {scale}')
        if not (alpha >= 0 and math.isfinite(alpha)):
            raise ValueError(f'alpha must be a number >= 0, got {alpha}')
        if len(mean) != channels or len(std) != channels:
            raise ValueError(f'mean and std must have {channels} entries, got {tuple(mean)} and {tuple(std)}')
        self.shape = (channels, height, width)
        self.alpha, self.scale, self.mean = alpha, scale, tuple(mean)
        as_channels = lambda v: torch.tensor(v, dtype=torch.float32, device=device).view(-1, 1, 1)  # noqa: E731
        # a mean of exactly 0 or 1 (a model that does not normalise) has no logit
        centred = [m if 0 < m < 1 else 0.5 for m in mean]
        self._offset = as_channels([math.log(m / (1 - m)) for m in centred])
        self._mean, self._std = as_channels(mean), as_channels(std)
        self._spectrum = self.amplitude(height, width, alpha).to(device, torch.float32)
        self._mix = scale * torch.linalg.cholesky(self.covariance(channels)).to(device, torch.float32)

    @staticmethod
    def amplitude(height: int, width: int, alpha: float) -> Tensor:
        """Gain per frequency [H, W // 2 + 1], float64, so normalised that filtered white noise keeps unit variance."""
        fy, fx = torch.fft.fftfreq(height, dtype=torch.float64), torch.fft.fftfreq(width, dtype=torch.float64)
        frequency = torch.hypot(fy[:, None], fx[None]).clamp(min=1 / max(height, width))
        gain = frequency**-alpha
        return (gain / gain.square().mean().sqrt())[:, : width // 2 + 1]

    @staticmethod
    def covariance(channels: int) -> Tensor:
        """Covariance of logit(pixel) across channels [C, C], float64, at scale 1."""
        rgb = torch.tensor(NATURAL_COVARIANCE, dtype=torch.float64)
        return rgb if channels == 3 else rgb.mean() * torch.eye(channels, dtype=torch.float64)

    def field(self, z: Tensor) -> Tensor:
        """scale · K z: the stationary Gaussian field before centring and squashing [n, C, H, W]."""
        coloured = torch.fft.irfft2(torch.fft.rfft2(z) * self._spectrum.to(z.dtype), s=self.shape[1:])
        return torch.einsum('ij,njhw->nihw', self._mix.to(z.dtype), coloured)

    def pixels(self, z: Tensor) -> Tensor:
        return torch.sigmoid(self.field(z) + self._offset)

    def __call__(self, z: Tensor) -> Tensor:
        return (self.pixels(z) - self._mean) / self._std

    def settings(self) -> dict:
        return {'reference': self.name, 'alpha': self.alpha, 'scale': self.scale, 'mean': list(self.mean)}
