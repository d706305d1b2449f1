"""ResNets for small images: a 3x3 convolution, then stages of one block each.

At 32x32 pixels (CIFAR) the first convolution keeps the resolution; with a stride of 2 (`_s2`) 64x64 cost the same.
`resnet10` has four stages, the first at full resolution. `resnet11` leaves that one out and pools where the others
stride: more work at high resolution, in layers that a CPU runs fast.

Papers:
* `Deep Residual Learning for Image Recognition`, He et al., section 4.2 - https://arxiv.org/abs/1512.03385
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, create_conv2d
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg, LayerFn
from torch import Tensor, nn

__all__ = ['SmallImageResNet']


class PoolingBlock(nn.Module):
    """A convolution, max pooling instead of a stride, and two residual convolutions.

    Args:
        in_chs: Input channels.
        out_chs: Output channels.
        stride: Side of the pooling windows.
        dilation: Of the first convolution, and of the residual ones.
        layers: ByobNet's makers of layers.
        drop_path_rate: Rate at which a sample skips the residual convolutions in training.
        device: Where the weights are made.
        dtype: Their type.
        kwargs: What ByobNet tells other blocks.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        stride: int,
        dilation: tuple[int, int],
        layers: LayerFn,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        self.conv = create_conv2d(in_chs, out_chs, 3, dilation=dilation[0], **dd)
        self.pool = nn.MaxPool2d(stride)
        self.norm_act = layers.norm_act(out_chs, **dd)
        convs = [layers.conv_norm_act(out_chs, out_chs, 3, dilation=dilation[1], **dd) for _ in range(2)]
        self.residual = nn.Sequential(*convs)
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps [N, in_chs, H, W] to [N, out_chs, H / stride, W / stride]."""
        x = self.norm_act(self.pool(self.conv(x)))
        return x + self.drop_path(self.residual(x))


class SmallImageResNet(ByobNet):
    """timm's ByobNet with a stem of stride 1 or 2; all of timm's own halve the image at least.

    Args:
        cfg: What ByobNet is to build, with a stem of one convolution.
        stem_stride: Stride of that convolution, 1 or 2.
        output_stride: Largest reduction; later strides become dilations.
        mirror: Whether the logits of eval mode are the mean over an image and its mirror image, so that the density of
            a class is as symmetric as photographs are; this takes twice the time. Training flips its images anyway,
            and sees one of the two at a time.
        kwargs: Further arguments of ByobNet.
    """

    def __init__(
        self, cfg: ByoModelCfg, stem_stride: int, output_stride: int = 16, mirror: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(cfg, output_stride=min(32, output_stride * 2 // stem_stride), **kwargs)
        self.mirror = mirror
        stem: Any = self.stem
        stem.conv.stride = (stem_stride, stem_stride)
        for info in self.feature_info:
            info['reduction'] = info['reduction'] * stem_stride // 2

    def forward(self, x: Tensor) -> Tensor:
        """Map images [n, C, H, W] to logits [n, num_classes]; to feature maps without a classifier and pooling."""
        logits = self.forward_head(self.forward_features(x))
        if not self.mirror or self.training or logits.ndim != 2:
            return logits
        return (logits + self.forward_head(self.forward_features(x.flip(-1)))) / 2


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
        'resnet11_w64': _cfg(),
        'resnet10_w16_s2': _cfg(**_S2),
        'resnet10_w32_s2': _cfg(**_S2),
    }
)


def _resnet(
    variant: str,
    pretrained: bool,
    widths: tuple[int, ...],
    strides: tuple[int, ...],
    stem_stride: int,
    block: Any = 'basic',
    act_layer: str = 'relu',
    **kwargs: Any,
) -> SmallImageResNet:
    blocks = tuple(ByoBlockCfg(type=block, d=1, c=c, s=s, gs=0) for c, s in zip(widths, strides, strict=True))
    return build_model_with_cfg(
        SmallImageResNet,
        variant,
        pretrained,
        model_cfg=ByoModelCfg(
            blocks=blocks, stem_chs=widths[0] // strides[0], stem_type='3x3', stem_pool='', act_layer=act_layer
        ),
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
def resnet11_w64(pretrained: bool = False, **kwargs: Any) -> SmallImageResNet:
    """Eleven layers, 32 to 192 channels, and the mirror image, for images of 32 pixels: 1.9 million parameters."""
    own = {
        'block': partial(PoolingBlock),  # ByobNet takes a registered name or a partial
        'act_layer': 'gelu',
        'mirror': True,
        **kwargs,
    }
    return _resnet('resnet11_w64', pretrained, (64, 192, 192), (2, 2, 2), 1, **own)
