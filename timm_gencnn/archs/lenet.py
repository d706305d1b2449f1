"""LeNet as Caffe ships it (examples/mnist/lenet_train_test.prototxt), the paper's MNIST network.

Two 5x5 convolutions, each followed by max pooling and by no non-linearity, then two fully connected layers with a ReLU
between them: 431,080 parameters for one-channel 28x28 images and ten classes.

Papers:
* `Gradient-Based Learning Applied to Document Recognition`, LeCun et al., Proc. IEEE 86(11), 1998
* `Caffe: Convolutional Architecture for Fast Feature Embedding` - https://arxiv.org/abs/1408.5093
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from ._convnet import ConvNet, xavier_fan_in_

__all__ = ['LeNet']


class LeNet(ConvNet):
    """Caffe's LeNet: conv1, pool1, conv2, pool2, fc1, ReLU, fc2.

    Args:
        num_classes: Number of classes; 0 leaves the 500 features of `fc1` as the output.
        in_chans: Number of image channels.
        img_size: Image side, or (height, width), in pixels; at least 13. `fc1` is sized for it.
        global_pool: Accepted for timm's sake; `fc1` reads the whole map, so only '' is valid.
        drop_rate: Dropout rate before the classifier (0 as published).
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 1,
        img_size: int | tuple[int, int] = 28,
        global_pool: str = '',
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: Any = {'device': device, 'dtype': dtype}
        features: dict[str, nn.Module] = {
            'conv1': nn.Conv2d(in_chans, 20, 5, **dd),
            'pool1': nn.MaxPool2d(2, ceil_mode=True),
            'conv2': nn.Conv2d(20, 50, 5, **dd),
            'pool2': nn.MaxPool2d(2, ceil_mode=True),
        }
        super().__init__(
            features,
            taps=('conv1', 'conv2', 'pool2'),
            hidden=(500,),
            first_fc=1,
            num_classes=num_classes,
            in_chans=in_chans,
            img_size=img_size,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
        )

    def _init_layer(self, name: str, layer: nn.Conv2d | nn.Linear) -> None:
        xavier_fan_in_(layer)


default_cfgs = generate_default_cfgs(
    {
        'lenet': {
            'input_size': (1, 28, 28),
            'fixed_input_size': True,
            'num_classes': 10,
            'crop_pct': 1.0,
            'mean': (0.1307,),
            'std': (0.3081,),
            'first_conv': 'conv1',
            'classifier': 'fc2',
        }
    }
)


@register_model
def lenet(pretrained: bool = False, **kwargs: Any) -> LeNet:
    """Caffe's LeNet (LeCun et al., 1998) for MNIST: 431,080 parameters."""
    return build_model_with_cfg(LeNet, 'lenet', pretrained, feature_cfg={'out_indices': (0, 1, 2)}, **kwargs)
