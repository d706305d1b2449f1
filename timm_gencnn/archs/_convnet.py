"""What the paper's networks share: a chain of named layers, flattened into fully connected ones."""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.layers import get_device_dtype
from timm.models._features import feature_take_indices
from torch import Tensor, nn


def xavier_fan_in_(layer: nn.Conv2d | nn.Linear) -> None:
    """Fill a layer as Caffe's 'xavier' filler does: uniform weights of variance 1 / fan_in, zero bias."""
    bound = math.sqrt(3 / layer.weight[0].numel())
    nn.init.uniform_(layer.weight, -bound, bound)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def gaussian_(layer: nn.Conv2d | nn.Linear, std: float, bias: float) -> None:
    """Fill a layer as Caffe's 'gaussian' and 'constant' fillers do."""
    nn.init.normal_(layer.weight, std=std)
    if layer.bias is not None:
        nn.init.constant_(layer.bias, bias)


def he_(layer: nn.Conv2d | nn.Linear, last: bool) -> None:
    """Fill a layer with Gaussian weights of variance 2 / fan_in, or 1 / fan_in where no ReLU follows; zero bias."""
    nn.init.kaiming_normal_(layer.weight, nonlinearity='linear' if last else 'relu')
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class ConvNet(nn.Module):
    """A chain of named convolutional layers, then fully connected layers `fc<first_fc>`, `fc<first_fc + 1>`, ...

    Args:
        features: The convolutional part, in order; its names become the names of the modules.
        taps: Names in `features` whose outputs are the intermediate features.
        hidden: Widths of the hidden fully connected layers, each followed by ReLU and dropout.
        first_fc: Number of the first fully connected layer, for its name.
        num_classes: Number of classes; 0 leaves the last hidden layer as the output.
        in_chans: Number of image channels.
        img_size: Image side, or (height, width), in pixels. The first fully connected layer is sized for it.
        global_pool: Accepted for timm's sake; the first fully connected layer reads the whole map, so only '' is valid.
        drop_rate: Dropout rate after each hidden fully connected layer.

    Raises:
        ValueError: If the image is too small for the layers, or `global_pool` is not ''.
    """

    def __init__(
        self,
        features: dict[str, nn.Module],
        taps: tuple[str, ...],
        hidden: tuple[int, ...],
        first_fc: int,
        num_classes: int,
        in_chans: int,
        img_size: int | tuple[int, int],
        global_pool: str = '',
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_global_pool(global_pool)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])
        self.drop_rate = drop_rate
        self.feature_info: list[dict[str, Any]] = []

        channels, size, reduction = in_chans, self.img_size, 1
        for name, layer in features.items():
            self.add_module(name, layer)
            if isinstance(layer, nn.Conv2d | nn.MaxPool2d):
                size = _output_size(layer, size)
                if min(size) < 1:
                    raise ValueError(
                        f'img_size {self.img_size} is too small for {type(self).__name__}: give a larger one'
                    )
                reduction *= _side(layer.stride)
            if isinstance(layer, nn.Conv2d):
                channels = layer.out_channels
            if name in taps:
                self.feature_info.append({'num_chs': channels, 'reduction': reduction, 'module': name})
        self.feature_layers = tuple(features)
        self.feature_size = size
        self.num_features = channels

        width = channels * size[0] * size[1]
        head: list[str] = []
        for i, hidden_width in enumerate(hidden, first_fc):
            self.add_module(f'fc{i}', nn.Linear(width, hidden_width, device=device, dtype=dtype))
            self.add_module(f'relu{i}', nn.ReLU())
            self.add_module(f'drop{i}', nn.Dropout(drop_rate))
            head += [f'fc{i}', f'relu{i}', f'drop{i}']
            width = hidden_width
        self.head_layers = tuple(head)
        self.head_hidden_size = width
        self.classifier_name = f'fc{first_fc + len(hidden)}'
        self.reset_classifier(num_classes)
        self.init_weights()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the layer groups, by depth, for layer-wise learning rate decay."""
        return {'stem': r'^(?:conv|bn)1\.', 'convs': r'^(?:conv|bn)(\d+)', 'fcs': r'^fc(\d+)'}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Refuse gradient checkpointing, which these shallow networks do not support."""
        if enable:
            raise ValueError(f'{type(self).__name__} has no gradient checkpointing: call it with enable=False')

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the last fully connected layer."""
        return self.get_submodule(self.classifier_name)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one of `num_classes` classes; 0 leaves the last hidden layer as output."""
        _check_global_pool(global_pool)
        self.num_classes = num_classes
        classifier = (
            nn.Linear(self.head_hidden_size, num_classes, **get_device_dtype(self)) if num_classes else nn.Identity()
        )
        self.add_module(self.classifier_name, classifier)
        if isinstance(classifier, nn.Linear):
            self._init_layer(self.classifier_name, classifier)

    def init_weights(self) -> None:
        """Draw all weights anew, as the network's authors did."""
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                self._init_layer(name, layer)
            elif isinstance(layer, nn.BatchNorm2d):
                layer.reset_parameters()

    def _init_layer(self, name: str, layer: nn.Conv2d | nn.Linear) -> None:
        raise NotImplementedError

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the features and the intermediate features listed in `feature_info`.

        Args:
            x: Images [n, C, H, W].
            indices: Take the last n if int, all if None, the given ones (negative: from the end) if a sequence.
            norm: Not used, there is no final norm.
            stop_early: Stop at the last intermediate asked for.
            output_fmt: Only 'NCHW'.
            intermediates_only: Return the intermediates alone.

        Raises:
            ValueError: If `output_fmt` is not 'NCHW'.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt is {output_fmt!r}, but the features are maps: use 'NCHW'")
        take, last = feature_take_indices(len(self.feature_info), indices)
        taps = [info['module'] for info in self.feature_info]
        wanted = {taps[i] for i in take}
        intermediates = []
        for name in self.feature_layers:
            x = self.get_submodule(name)(x)
            if name in wanted:
                intermediates.append(x)
            if stop_early and name == taps[last]:
                break
        return intermediates if intermediates_only else (x, intermediates)

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images [n, C, H, W] to the last feature map."""
        return self._run(x, 0, len(self.feature_layers))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map the last feature map to logits [n, num_classes], or to the last hidden layer with `pre_logits`."""
        _check_feature_size(x, self.feature_size, self.img_size)
        x = x.flatten(1)
        first, last = len(self.feature_layers), len(self.feature_layers) + len(self.head_layers)
        return self._run(x, first, last if pre_logits else last + 1)

    def _run(self, x: Tensor, first: int, last: int) -> Tensor:
        """The layers first, first + 1, ..., last - 1, in the order in which they were made."""
        if torch.jit.is_scripting():  # a script finds its layers by their order alone
            for i, layer in enumerate(self.children()):
                if first <= i < last:
                    x = layer(x)
        else:
            for name in (*self.feature_layers, *self.head_layers, self.classifier_name)[first:last]:
                x = self.get_submodule(name)(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Map images [n, C, H, W] to logits [n, num_classes]."""
        return self.forward_head(self.forward_features(x))


def _output_size(layer: nn.Conv2d | nn.MaxPool2d, size: tuple[int, int]) -> tuple[int, int]:
    """Spatial size after a square layer: Caffe rounds down for convolutions and up for pooling."""
    kernel, stride, padding = (_side(v) for v in (layer.kernel_size, layer.stride, layer.padding))
    rounding = math.ceil if isinstance(layer, nn.MaxPool2d) else math.floor
    height, width = (rounding((s + 2 * padding - kernel) / stride) + 1 for s in size)
    return height, width


def _side(value: Any) -> int:
    return value if isinstance(value, int) else value[0]


def _check_global_pool(global_pool: str | None) -> None:
    if global_pool:
        raise ValueError(f"global_pool is {global_pool!r}, but the fully connected layers read the whole map: use ''")


@torch.fx.wrap  # traced as one call: a symbol has no shape to compare
def _check_feature_size(x: Tensor, size: tuple[int, int], img_size: tuple[int, int]) -> None:
    if x.shape[-2] != size[0] or x.shape[-1] != size[1]:
        raise ValueError(
            f'feature map of {x.shape[-2]} x {x.shape[-1]} where the classifier needs {size}: give images of '
            f'{img_size} pixels, or create the model with another img_size'
        )
