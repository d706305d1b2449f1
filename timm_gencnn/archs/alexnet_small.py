"""AlexNet's plan at a fortieth of its size, for images of 64 pixels.

Five convolutions of 5x5 and 3x3, three of them in two groups, overlapping max pooling, three fully connected layers
with dropout, as in the original. Batch normalisation stands for local response normalisation, He's initialisation for
fixed Gaussians.

Papers:
* `ImageNet Classification with Deep Convolutional Neural Networks`, Krizhevsky, Sutskever, Hinton, NIPS 2012
* `Batch Normalization`, Ioffe, Szegedy - https://arxiv.org/abs/1502.03167
* `Delving Deep into Rectifiers`, He et al., section 2.2 - https://arxiv.org/abs/1502.01852
"""

from __future__ import annotations

from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from ._convnet import ConvNet, he_

__all__ = ['AlexNetSmall']


class AlexNetSmall(ConvNet):
    """A small AlexNet with batch normalisation.

    Args:
        num_classes: Number of classes; 0 leaves the 128 features of `fc7` as the output.
        in_chans: Number of image channels.
        img_size: Image side, or (height, width), in pixels; at least 15. `fc6` is sized for it.
        global_pool: Accepted for timm's sake; `fc6` reads the whole map, so only '' is valid.
        drop_rate: Dropout rate after `fc6` and `fc7`.
    """

    def __init__(
        self,
        num_classes: int = 100,
        in_chans: int = 3,
        img_size: int | tuple[int, int] = 64,
        global_pool: str = '',
        drop_rate: float = 0.2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: Any = {'device': device, 'dtype': dtype}
        convs = [
            nn.Conv2d(in_chans, 48, 5, stride=2, padding=2, **dd),
            nn.Conv2d(48, 128, 5, padding=2, groups=2, **dd),
            nn.Conv2d(128, 160, 3, padding=1, **dd),
            nn.Conv2d(160, 160, 3, padding=1, groups=2, **dd),
            nn.Conv2d(160, 128, 3, padding=1, groups=2, **dd),
        ]
        features: dict[str, nn.Module] = {}
        for i, conv in enumerate(convs, 1):
            features |= {f'conv{i}': conv, f'bn{i}': nn.BatchNorm2d(conv.out_channels, **dd), f'relu{i}': nn.ReLU()}
            if i in (1, 2, 5):
                features[f'pool{i}'] = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        super().__init__(
            features,
            taps=('relu1', 'relu2', 'relu3', 'relu4', 'relu5', 'pool5'),
            hidden=(128, 128),
            first_fc=6,
            num_classes=num_classes,
            in_chans=in_chans,
            img_size=img_size,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
        )

    def _init_layer(self, name: str, layer: nn.Conv2d | nn.Linear) -> None:
        he_(layer, last=name == self.classifier_name)


default_cfgs = generate_default_cfgs(
    {
        'alexnet_small': {
            'input_size': (3, 64, 64),
            'fixed_input_size': True,
            'num_classes': 100,
            'pool_size': (4, 4),
            'crop_pct': 1.0,
            'interpolation': 'bilinear',
            'mean': IMAGENET_DEFAULT_MEAN,
            'std': IMAGENET_DEFAULT_STD,
            'first_conv': 'conv1',
            'classifier': 'fc8',
        }
    }
)


@register_model
def alexnet_small(pretrained: bool = False, **kwargs: Any) -> AlexNetSmall:
    """A small AlexNet with batch normalisation for images of 64 pixels: 0.8 million parameters for 100 classes."""
    out = (0, 1, 2, 3, 4)
    return build_model_with_cfg(AlexNetSmall, 'alexnet_small', pretrained, feature_cfg={'out_indices': out}, **kwargs)
