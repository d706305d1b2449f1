"""What a model says of itself: its configuration, image size, channels and class names."""

from typing import Any

from timm.data import CustomDatasetInfo, ImageNetInfo, infer_imagenet_subset
from timm.data.dataset_info import DatasetInfo
from timm.models import get_model_traits
from torch import nn


def own_config(model: nn.Module) -> dict[str, Any]:
    """The model's own `pretrained_cfg`, which may be timm's object or the dictionary of it; empty without one."""
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    return cfg if isinstance(cfg, dict) else cfg.to_dict()


def own_size(model: nn.Module) -> tuple[int, int] | None:
    """The image side that the model was built for, else the one its configuration names."""
    patches = getattr(model, 'patch_embed', None)
    built = get_model_traits(model).get('img_size')  # by timm's factory, else by the model itself
    built = built or getattr(patches, 'img_size', None) or getattr(model, 'image_size', None)
    if isinstance(built, int):
        return built, built
    if isinstance(built, (tuple, list)) and len(built) == 2:
        return int(built[0]), int(built[1])
    stated = own_config(model).get('input_size')
    return (int(stated[1]), int(stated[2])) if stated else None


def own_channels(model: nn.Module) -> list[int]:
    """Image channels worth trying, most likely first."""
    first = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
    return list(dict.fromkeys([first, int(own_config(model).get('input_size', (3,))[0]), 3, 1, 4]))


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
