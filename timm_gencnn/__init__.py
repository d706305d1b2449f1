"""Generative modelling of convolutional networks (Dai, Lu, Wu, ICLR 2015), for any timm model."""

__version__ = '0.1.0.dev0'

from . import archs as archs
