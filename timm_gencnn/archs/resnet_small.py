"""ResNets for small images: a 3x3 convolution, then stages of one basic block each, no pooling.

At 32x32 pixels (CIFAR) the first convolution keeps the resolution; with a stride of 2 (`_s2`) 64x64 cost the same.
`resnet10` has four stages, the first at full resolution. `resnet8` leaves that one out: on a CPU it learns more in the
same time.

Papers:
* `Deep Residual Learning for Image Recognition`, He et al., section 4.2 - https://arxiv.org/abs/1512.03385
"""

from __future__ import annotations

from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg

__all__ = ['SmallImageResNet']


class SmallImageResNet(ByobNet):
    """timm's ByobNet with a stem of stride 1 or 2; all of timm's own halve the image at least.

    Args:
        cfg: What ByobNet is to build, with a stem of one convolution.
        stem_stride: Stride of that convolution, 1 or 2.
        output_stride: Largest reduction; later strides become dilations.
        kwargs: Further arguments of ByobNet.
    """

    def __init__(self, cfg: ByoModelCfg, stem_stride: int, output_stride: int = 16, **kwargs: Any) -> None:
        super().__init__(cfg, output_stride=min(32, output_stride * 2 // stem_stride), **kwargs)
        stem: Any = self.stem
        stem.conv.stride = (stem_stride, stem_stride)
        for info in self.feature_info:
            info['reduction'] = info['reduction'] * stem_stride // 2


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        'input_size': (3, 32, 32),
        'num_classes': 10,
        'pool_size': (4, 4),
        'crop_pct': 1.0,
        'interpolation': 'bilinear',
        'mean': (0.4914, 0.4822, 0.4465),  # of CIFAR-10's training images
        'std': (0.2470, 0.2435, 0.2616),
        'first_conv': 'stem.conv',
        'classifier': 'head.fc',
        **kwargs,
    }


_S2 = {'input_size': (3, 64, 64), 'num_classes': 100, 'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD}

default_cfgs = generate_default_cfgs(
    {
        'resnet10_w16': _cfg(),
        'resnet10_w32': _cfg(),
        'resnet8_w32': _cfg(),
        'resnet10_w16_s2': _cfg(**_S2),
        'resnet10_w32_s2': _cfg(**_S2),
    }
)


def _resnet(
    variant: str, pretrained: bool, widths: tuple[int, ...], strides: tuple[int, ...], stem_stride: int, **kwargs: Any
) -> SmallImageResNet:
    blocks = tuple(ByoBlockCfg(type='basic', d=1, c=c, s=s, gs=0) for c, s in zip(widths, strides, strict=True))
    return build_model_with_cfg(
        SmallImageResNet,
        variant,
        pretrained,
        model_cfg=ByoModelCfg(blocks=blocks, stem_chs=widths[0] // strides[0], stem_type='3x3', stem_pool=''),
        stem_stride=stem_stride,
        feature_cfg={'flatten_sequential': True, 'out_indices': (0, 1, 2, 3)},
        **kwargs,
    )


def _resnet10(variant: str, pretrained: bool, width: int, stem_stride: int, **kwargs: Any) -> SmallImageResNet:
    widths = (width, width * 2, width * 4, width * 8)
    return _resnet(variant, pretrained, widths, (1, 2, 2, 2), stem_stride, **kwargs)


@register_model
def resnet10_w16(pretrained: bool = False, **kwargs: Any) -> SmallImageResNet:
    """Ten layers, 16 to 128 channels, for images of 32 pixels: 0.3 million parameters."""
    return _resnet10('resnet10_w16', pretrained, 16, 1, **kwargs)


@register_model
def resnet10_w32(pretrained: bool = False, **kwargs: Any) -> SmallImageResNet:
    """Ten layers, 32 to 256 channels, for images of 32 pixels: 1.2 million parameters."""
    return _resnet10('resnet10_w32', pretrained, 32, 1, **kwargs)


@register_model
def resnet10_w16_s2(pretrained: bool = False, **kwargs: Any) -> SmallImageResNet:
    """resnet10_w16 with a stem of stride 2, for images of 64 pixels."""
    return _resnet10('resnet10_w16_s2', pretrained, 16, 2, **kwargs)


@register_model
def resnet10_w32_s2(pretrained: bool = False, **kwargs: Any) -> SmallImageResNet:
    """resnet10_w32 with a stem of stride 2, for images of 64 pixels."""
    return _resnet10('resnet10_w32_s2', pretrained, 32, 2, **kwargs)


@register_model
def resnet8_w32(pretrained: bool = False, **kwargs: Any) -> SmallImageResNet:
    """Eight layers, 32 to 256 channels, for images of 32 pixels: 1.2 million parameters."""
    return _resnet('resnet8_w32', pretrained, (64, 128, 256), (2, 2, 2), 1, **kwargs)
