"""The network of Zeiler and Fergus, the "fast" one of their Figure 3 (38.4 % top-1 error on ImageNet as a single net).

AlexNet with a finer first layer (7x7, stride 2) and without groups: 62,357,608 parameters for 3x224x224 images and 1000
classes. The paddings are those that give the map sizes of the figure (110, 55, 26, 13, 6) under Caffe's rounding. The
paper does not give the constants of its contrast normalisation across maps: they are those of Caffe's AlexNet. As
there, pixels are in [0, 255] less their mean, hence a `std` of 1/255 in the pretrained cfg.

Papers:
* `Visualizing and Understanding Convolutional Networks` - https://arxiv.org/abs/1311.2901, Section 3 and Figure 3
"""

from __future__ import annotations

from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from ._convnet import ConvNet, gaussian_

__all__ = ['ZFNet']


class ZFNet(ConvNet):
    """Zeiler and Fergus's network (Figure 3).

    Args:
        num_classes: Number of classes; 0 leaves the 4096 features of `fc7` as the output.
        in_chans: Number of image channels.
        img_size: Image side, or (height, width), in pixels; at least 47. `fc6` is sized for it.
        global_pool: Accepted for timm's sake; `fc6` reads the whole map, so only '' is valid.
        drop_rate: Dropout rate after `fc6` and `fc7` (0.5 as published).
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int | tuple[int, int] = 224,
        global_pool: str = '',
        drop_rate: float = 0.5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: Any = {'device': device, 'dtype': dtype}
        features: dict[str, nn.Module] = {
            'conv1': nn.Conv2d(in_chans, 96, 7, stride=2, padding=1, **dd),
            'relu1': nn.ReLU(),
            'pool1': nn.MaxPool2d(3, stride=2, ceil_mode=True),
            'norm1': nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75),
            'conv2': nn.Conv2d(96, 256, 5, stride=2, **dd),
            'relu2': nn.ReLU(),
            'pool2': nn.MaxPool2d(3, stride=2, ceil_mode=True),
            'norm2': nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75),
            'conv3': nn.Conv2d(256, 384, 3, padding=1, **dd),
            'relu3': nn.ReLU(),
            'conv4': nn.Conv2d(384, 384, 3, padding=1, **dd),
            'relu4': nn.ReLU(),
            'conv5': nn.Conv2d(384, 256, 3, padding=1, **dd),
            'relu5': nn.ReLU(),
            'pool5': nn.MaxPool2d(3, stride=2, ceil_mode=True),
        }
        super().__init__(
            features,
            taps=('relu1', 'relu2', 'relu3', 'relu4', 'relu5', 'pool5'),
            hidden=(4096, 4096),
            first_fc=6,
            num_classes=num_classes,
            in_chans=in_chans,
            img_size=img_size,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
        )

    def _init_layer(self, name: str, layer: nn.Conv2d | nn.Linear) -> None:
        gaussian_(layer, std=0.01, bias=0.0)


default_cfgs = generate_default_cfgs(
    {
        'zfnet': {
            'input_size': (3, 224, 224),
            'fixed_input_size': True,
            'pool_size': (6, 6),
            'crop_pct': 0.875,
            'interpolation': 'bilinear',
            'mean': IMAGENET_DEFAULT_MEAN,
            'std': (1 / 255, 1 / 255, 1 / 255),
            'first_conv': 'conv1',
            'classifier': 'fc8',
        }
    }
)


@register_model
def zfnet(pretrained: bool = False, **kwargs: Any) -> ZFNet:
    """Zeiler and Fergus's "fast" network (2013): 62,357,608 parameters."""
    return build_model_with_cfg(ZFNet, 'zfnet', pretrained, feature_cfg={'out_indices': (0, 1, 2, 3, 4)}, **kwargs)
