"""AlexNet as Caffe's reference network trains it (models/bvlc_reference_caffenet/train_val.prototxt).

Five convolutions, three of them in two groups, overlapping max pooling before local response normalisation, three fully
connected layers with dropout: 60,965,224 parameters for 3x227x227 images and 1000 classes. Weights and the response
normalisation are scaled for pixels in [0, 255] less their mean, hence a `std` of 1/255 in the pretrained cfg.

Papers:
* `ImageNet Classification with Deep Convolutional Neural Networks`, Krizhevsky, Sutskever, Hinton, NIPS 2012
* `Caffe: Convolutional Architecture for Fast Feature Embedding` - https://arxiv.org/abs/1408.5093
"""

from __future__ import annotations

from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from ._convnet import ConvNet, gaussian_

__all__ = ['AlexNet']


class AlexNet(ConvNet):
    """Caffe's reference AlexNet.

    Args:
        num_classes: Number of classes; 0 leaves the 4096 features of `fc7` as the output.
        in_chans: Number of image channels.
        img_size: Image side, or (height, width), in pixels; at least 39. `fc6` is sized for it.
        global_pool: Accepted for timm's sake; `fc6` reads the whole map, so only '' is valid.
        drop_rate: Dropout rate after `fc6` and `fc7` (0.5 as published).
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int | tuple[int, int] = 227,
        global_pool: str = '',
        drop_rate: float = 0.5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: Any = {'device': device, 'dtype': dtype}
        features: dict[str, nn.Module] = {
            'conv1': nn.Conv2d(in_chans, 96, 11, stride=4, **dd),
            'relu1': nn.ReLU(),
            'pool1': nn.MaxPool2d(3, stride=2, ceil_mode=True),
            'norm1': nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75),
            'conv2': nn.Conv2d(96, 256, 5, padding=2, groups=2, **dd),
            'relu2': nn.ReLU(),
            'pool2': nn.MaxPool2d(3, stride=2, ceil_mode=True),
            'norm2': nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75),
            'conv3': nn.Conv2d(256, 384, 3, padding=1, **dd),
            'relu3': nn.ReLU(),
            'conv4': nn.Conv2d(384, 384, 3, padding=1, groups=2, **dd),
            'relu4': nn.ReLU(),
            'conv5': nn.Conv2d(384, 256, 3, padding=1, groups=2, **dd),
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
        std = 0.005 if name in ('fc6', 'fc7') else 0.01
        bias = 1.0 if name in ('conv2', 'conv4', 'conv5', 'fc6', 'fc7') else 0.0
        gaussian_(layer, std, bias)


default_cfgs = generate_default_cfgs(
    {
        'alexnet': {
            'input_size': (3, 227, 227),
            'fixed_input_size': True,
            'pool_size': (6, 6),
            'crop_pct': 227 / 256,
            'interpolation': 'bilinear',
            'mean': IMAGENET_DEFAULT_MEAN,
            'std': (1 / 255, 1 / 255, 1 / 255),
            'first_conv': 'conv1',
            'classifier': 'fc8',
        }
    }
)


@register_model
def alexnet(pretrained: bool = False, **kwargs: Any) -> AlexNet:
    """Caffe's reference AlexNet (Krizhevsky et al., 2012): 60,965,224 parameters."""
    return build_model_with_cfg(AlexNet, 'alexnet', pretrained, feature_cfg={'out_indices': (0, 1, 2, 3, 4)}, **kwargs)
