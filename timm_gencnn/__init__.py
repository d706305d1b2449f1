"""Generative modelling of convolutional networks (Dai, Lu, Wu, ICLR 2015), for any timm model."""

from . import archs as archs
from . import registry as registry
from .generative import GenerativeMixin, as_generative
from .hub import from_pretrained, push_to_hub
from .listing import list_pretrained
from .loss import GenerativeLoss
from .node_lists import list_nodes
from .partition import log_z
from .samples import Samples
from .task import GenerativeTask
from .visualize import visualize

__version__ = '0.1.0'
__all__ = [
    'GenerativeLoss',
    'GenerativeMixin',
    'GenerativeTask',
    'Samples',
    'as_generative',
    'from_pretrained',
    'list_nodes',
    'list_pretrained',
    'log_z',
    'push_to_hub',
    'visualize',
]

registry.register_all()
