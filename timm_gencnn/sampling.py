"""What `visualize` was asked for: its settings, checked before a network is looked at."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .model_config import own_config
from .presets import PRESETS, Preset
from .reference import Reference, White, natural_for

STEPS = 512
GALLERY_TEMPERATURE = 0.005  # measured with the schedule of `chains.Schedule`
LARGEST = 1e30  # tilt and temperature: squares of what they scale must stay in float32's range


@dataclass
class Sampling:
    """The settings of `visualize`, which describes them. None leaves one to the regime, the preset or the network.

    Raises:
        ValueError: A setting out of its range, or at odds with the preset.
    """

    n: int = 16
    steps: int | None = None
    reference: str | Reference = 'natural'
    temperature: float | None = None
    tilt: float | None = None
    size: int | tuple[int, int] | None = None
    seed: int = 0
    dtype: torch.dtype | None = None
    compile: bool = False
    frames: int = 0
    preset: str | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            setattr(self, name, plain(value))
        if isinstance(self.size, (tuple, list)):
            self.size = tuple(map(plain, self.size))
        fixed = self.reference != 'natural' or self.temperature not in (None, 1) or self.tilt not in (None, 1)
        if self.paper and fixed:
            raise ValueError(f'preset={self.preset!r} fixes reference, temperature and tilt: leave them out')
        for name, low in ('n', 1), ('steps', 1), ('seed', 0), ('frames', 0):
            if name != 'steps' or self.steps is not None:
                check_integer(name, getattr(self, name), low)
        for name in 'temperature', 'tilt':
            value = getattr(self, name)
            if not (value is None or (isinstance(value, (int, float)) and 1 / LARGEST <= value <= LARGEST)):
                bounds = f'from {1 / LARGEST:.0e} to {LARGEST:.0e}'
                raise ValueError(f'{name} must be a positive number, got {value!r} ({bounds}; 1 is the model itself)')
        if self.dtype not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f'dtype must be None, torch.bfloat16 or torch.float16, got {self.dtype!r}')

    @property
    def paper(self) -> Preset | None:
        """The preset, if there is one."""
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(f'unknown preset {self.preset!r}: there are {", ".join(PRESETS)}')
        return None if self.preset is None else PRESETS[self.preset]

    def settled(self) -> Sampling:
        """With the temperature and the tilt that None means; a tilt that stays None is automatic."""
        temperature = 1.0 if self.paper else self.temperature or GALLERY_TEMPERATURE
        tilt = 1.0 if self.tilt is None and temperature == 1 else self.tilt
        return replace(self, temperature=temperature, tilt=tilt)

    @property
    def exact(self) -> bool:
        """Whether the settled chains sample the model itself."""
        return self.temperature == 1 and self.tilt == 1

    @property
    def dtype_name(self) -> str | None:
        return None if self.dtype is None else str(self.dtype).removeprefix('torch.')

    def sides(self) -> int | tuple[int, int] | None:
        """The size asked for; that of the reference, where it alone has one; None leaves it open."""
        shape: Any = getattr(self.reference, 'shape', ())
        return shape[1:] if self.size is None and len(shape) == 3 else self.size

    def budget(self, classes: bool) -> int:
        """Image gradients per chain, for nodes that are all classes or not."""
        return self.steps or (self.paper.gradients(classes) if self.paper else STEPS)

    def make_reference(
        self, model: nn.Module, channels: int, size: tuple[int, int], device: torch.device | str = 'cpu'
    ) -> Reference:
        """The reference, with the mean and standard deviation by which the model normalises its images.

        Raises:
            ValueError: An unknown name, another shape than that of the model's images, or settings that are no JSON.
        """
        reference, shape = self.reference, (channels, *size)
        if not isinstance(reference, str) and hasattr(reference, 'shape'):
            if tuple(reference.shape) != shape:
                raise ValueError(f'the reference draws images of {tuple(reference.shape)}, the model takes {shape}')
            try:
                json.dumps(reference.settings())
            except (TypeError, ValueError) as e:
                raise ValueError(
                    f'settings() of the reference must be numbers, strings and lists, for JSON: {e}'
                ) from None
            return reference
        if self.paper or reference == 'white':
            return White(shape, self.paper.normalised_sigma(own_config(model)) if self.paper else 1.0)
        if reference == 'natural':
            return natural_for(own_config(model), channels, size, device)
        raise ValueError(f"unknown reference {reference!r}: 'natural', 'white' or an object of timm_gencnn.reference")


def plain(value: Any) -> Any:
    """A number of numpy or torch as Python's own, which goes into settings; anything else as it is."""
    return value.item() if getattr(value, 'ndim', None) == 0 else value


def check_integer(name: str, value: Any, low: int) -> None:
    if type(value) is not int or value < low:
        raise ValueError(f'{name} must be an integer >= {low}, got {value!r}')
