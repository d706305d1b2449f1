"""Generative modelling of convolutional networks (Dai, Lu, Wu, ICLR 2015), for any timm model."""

__version__ = '0.1.0.dev0'

from . import archs as archs
from . import registry as registry
from .generative import GenerativeMixin as GenerativeMixin
from .generative import as_generative as as_generative

registry.register_all()
