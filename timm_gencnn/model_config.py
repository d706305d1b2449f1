"""What a model says of itself: its configuration, image size, channels and class names; and that in files."""

from pathlib import Path
from typing import Any
from unittest import mock

import torch
from timm.data import CustomDatasetInfo, ImageNetInfo, infer_imagenet_subset
from timm.data.dataset_info import DatasetInfo
from timm.models import get_model_traits
from timm.models._hub import save_config_for_hf
from torch import nn

WEIGHTS = 'model.safetensors'


def own_config(model: nn.Module) -> dict[str, Any]:
    """The model's own `pretrained_cfg`, which may be timm's object or the dictionary of it; empty without one."""
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    return cfg if isinstance(cfg, dict) else cfg.to_dict()


def _stated_size(model: nn.Module) -> tuple[int, int, int] | None:
    """Image channels, height and width by the model's configuration.

    Raises:
        ValueError: It states something else.
    """
    stated = own_config(model).get('input_size')
    if not stated:
        return None
    try:
        channels, height, width = map(int, stated)
    except (TypeError, ValueError):
        raise ValueError(f'pretrained_cfg has input_size {stated!r}: give (channels, height, width)') from None
    return channels, height, width


def own_size(model: nn.Module) -> tuple[int, int] | None:
    """The image side that the model was built for, else the one its configuration names."""
    patches = getattr(model, 'patch_embed', None)
    built = get_model_traits(model).get('img_size')  # by timm's factory, else by the model itself
    built = built or getattr(patches, 'img_size', None) or getattr(model, 'image_size', None)
    if isinstance(built, int):
        return built, built
    if isinstance(built, (tuple, list)) and len(built) == 2:
        return int(built[0]), int(built[1])
    stated = _stated_size(model)
    return stated and stated[1:]


def own_channels(model: nn.Module) -> list[int]:
    """Image channels worth trying, most likely first."""
    first = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
    stated = _stated_size(model)
    return list(dict.fromkeys([first, stated[0] if stated else 3, 3, 1, 4]))


def own_labels(model: nn.Module) -> DatasetInfo | None:
    cfg = own_config(model)
    return CustomDatasetInfo(cfg['label_names'], cfg.get('label_descriptions')) if cfg.get('label_names') else None


def labels_for(model: nn.Module, num_classes: int) -> DatasetInfo | None:
    """Class names: those of the model's own configuration, else ImageNet's if the number of classes says so."""
    names = own_config(model).get('label_names')
    if names and (isinstance(names, dict) or len(names) == num_classes):
        return own_labels(model)
    subset = infer_imagenet_subset({'num_classes': num_classes})
    return ImageNetInfo(subset) if subset else None


def write_model(model: nn.Module, folder: Path, config: dict[str, Any], data_config: dict[str, Any] | None) -> None:
    """Writes model.safetensors and a config.json that timm reads back, as timm's save_for_hf does, from any model.

    timm's own refuses the strides that channels_last leaves, and layers that share weights.

    Args:
        model: A timm model, plain or generative.
        folder: A folder that exists.
        config: Further entries of config.json.
        data_config: Preprocessing, as of `timm.data.resolve_data_config`; None for that of the model's pretrained_cfg.
    """
    from safetensors.torch import save_file

    cfg = own_config(model)
    if len(cfg.get('label_names') or ()) == model.num_classes:
        cfg = {**cfg, 'num_classes': model.num_classes}  # by it timm tells the names of these classes from older ones
    with mock.patch.object(model, 'pretrained_cfg', cfg):  # timm reads a dictionary
        save_config_for_hf(model, str(folder / 'config.json'), model_config=config, data_config=data_config)
    state = {k: v.cpu().clone(memory_format=torch.contiguous_format) for k, v in model.state_dict().items()}
    save_file(state, folder / WEIGHTS, metadata={'format': 'pt'})
