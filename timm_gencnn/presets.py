"""The settings of the paper's own pictures (Dai, Lu, Wu 2015, section 4), for `visualize(preset=...)`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from timm.data import IMAGENET_DEFAULT_STD


class Preset(NamedTuple):
    """Adjusted HMC with a fixed step size under white noise, in the paper's units.

    Attributes:
        sigma: Standard deviation of the white reference, in the units of the paper's network input.
        white: What a white pixel is worth in these units: 1 or 255.
        mass: Mass of every particle.
        step: Leapfrog step.
        n_leapfrog: Leapfrog steps per trajectory.
        trajectories: Number of trajectories for a class node and for any other unit.
        origin: Whether to start from the zero image instead of the reference.
    """

    sigma: float
    white: float
    mass: float
    step: float
    n_leapfrog: int
    trajectories: tuple[int, int]
    origin: bool

    @property
    def angle(self) -> float:
        """Rotation per leapfrog step in radians: the reference's oscillator turns at 1 / (sigma sqrt(mass))."""
        return self.step / (self.sigma * math.sqrt(self.mass))

    def gradients(self, is_class: bool) -> int:
        """Image gradients per chain: one for the start, then those of the trajectories."""
        return 1 + self.n_leapfrog * self.trajectories[0 if is_class else 1]

    def normalised_sigma(self, cfg: Mapping[str, Any]) -> float:
        """The reference's standard deviation in units of a model's normalised pixels, by its timm configuration."""
        std = cfg.get('std') or IMAGENET_DEFAULT_STD
        return self.sigma / self.white / (sum(std) / len(std))


PRESETS = {
    'paper-lenet': Preset(10, 1, 1e-5, 1e-4, 100, (300, 300), origin=False),
    'paper-alexnet': Preset(10, 255, 1e-5, 3e-6, 50, (500, 100), origin=True),
}
