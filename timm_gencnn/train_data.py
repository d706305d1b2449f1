"""Data sets and loaders of `gencnn train` and `gencnn validate`: timm's own, in memory or on the device if asked to."""

import argparse
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from PIL import ImageMode
from timm.data import FastCollateMixup, Mixup, create_dataset, create_loader, create_transform
from timm.data.transforms import ResizeKeepRatio
from torch.utils.data import Dataset, IterableDataset
from torchvision.transforms import Compose, RandomCrop

from . import device_data
from .device_data import DeviceLoader
from .train_args import has_unlabeled

COLOR_JITTER = 0.4  # timm's default
_SPLITS = {'train', 'training', 'val', 'valid', 'validation', 'eval', 'evaluation', 'test'}  # usual names of folders

_logger = logging.getLogger(__name__)


class CachedImages(Dataset):
    """A data set that keeps each image in memory after it was first decoded.

    What is kept is the transformed image if the transform draws no random numbers, and the decoded one if it does.
    Every worker process has a cache of its own, which dies with it: use it with workers=0.

    Args:
        dataset: One of timm's, with a transform.
        random: Whether the transform draws random numbers.
    """

    def __init__(self, dataset: Any, random: bool) -> None:
        self.dataset = dataset
        self.random = random
        self._transform: Callable[[Any], Any] = lambda image: image
        self._items: dict[int, tuple[Any, Any]] = {}

    @property
    def transform(self) -> Callable[[Any], Any]:
        return self._transform

    @transform.setter
    def transform(self, transform: Callable[[Any], Any]) -> None:
        self._transform = transform
        self._items.clear()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        if index not in self._items:
            image, target = self.dataset[index]
            self._items[index] = (image if self.random else self.transform(image)), target
        image, target = self._items[index]
        return (self.transform(image) if self.random else image), target


def cached(dataset: Any, random: bool) -> Any:
    """CachedImages as what timm's loaders are annotated to take.

    Raises:
        ValueError: The data set has no index.
    """
    if isinstance(dataset, IterableDataset):
        raise ValueError(f'--cache-images needs a data set with an index, not {type(dataset).__name__}: leave it out')
    return CachedImages(dataset, random)


def open_dataset(name: str, root: str | None, split: str, in_chans: int, **kwargs: Any) -> Any:
    """timm's create_dataset, with an error that says what was asked for when it is not there.

    Args:
        name: As timm's --dataset.
        root: As timm's --data-dir.
        split: Name of the split.
        in_chans: Channels of the model; one channel reads images as 'L', others as 'RGB'.
        kwargs: Further arguments of create_dataset.

    Raises:
        ValueError: The data set, folder or split does not exist or holds no image, or images of their mode have other
            channels than the model.
    """
    if not name and root is None:
        raise ValueError(f'no data set was named, split {split!r}: give --dataset, or --data-dir for a folder')
    if name.lower().startswith('torch/') and root is None:
        raise ValueError(f'{name!r} lies in a folder on this machine: give that as well (--data-dir)')
    local = '/' not in name and root is not None  # a folder, or a .tar file
    if local and '[' in split:
        raise ValueError(
            f'split {split!r}: folders have no slices, {root!r} would be read whole: leave out the brackets'
        )
    mode = kwargs['input_img_mode'] = kwargs.get('input_img_mode') or ('L' if in_chans == 1 else 'RGB')
    if _channels(mode) != in_chans:
        raise ValueError(
            f'images of the mode {mode!r} do not have the {in_chans} channels of the model: give another '
            '--input-img-mode (one of PIL) or --in-chans'
        )
    where = (f'data set {name!r}' if name else 'image folder') + (f' in {root!r}' if root else '')
    try:
        dataset = create_dataset(name, root=root, split=split, **kwargs)
    except (OSError, RuntimeError, ValueError, TypeError, AssertionError, ImportError) as error:
        reason = str(error) or 'no such folder'
        raise ValueError(f'cannot open {where}, split {split!r}: {reason}') from error
    if local and Path(str(root)).is_dir():
        _check_split(dataset, str(root), split)
    if hasattr(getattr(dataset, 'reader', None), 'label_key'):  # timm's of hfds/ opens it whatever its columns are
        _check_columns(dataset.reader, where)
    return dataset


def _check_columns(reader: Any, where: str) -> None:
    try:
        if len(reader):
            reader[0]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f'{where} lacks the column {reader.image_key!r} of images or {reader.label_key!r} of labels: name its own '
            'by --input-key and --target-key'
        ) from error


def open_unlabeled(name: str, root: str | None, split: str, in_chans: int, **kwargs: Any) -> Any:
    """`open_dataset` of images whose labels, if they have any, are not read: each is -1."""
    if name.lower().startswith(('hfds/', 'hfids/')):  # their readers take a label of every image: it is its own
        kwargs['target_key'] = kwargs.get('input_key') or 'image'
    dataset = open_dataset(name, root, split, in_chans, **kwargs)
    dataset.target_transform = _no_class
    return dataset


def _no_class(target: Any) -> int:
    return -1


def _channels(mode: str) -> int | None:
    """Channels of PIL's images of a mode; None if there is no such mode."""
    try:
        return len(ImageMode.getmode(mode).bands)
    except KeyError:
        return None


def _check_split(dataset: Any, root: str, split: str) -> None:
    """Refuse a split that a folder does not have, in whose place timm has found the whole folder.

    A folder of classes alone is read whole under the names that stand for no choice, 'train' and 'validation'.
    """
    if dataset.reader.root != root:
        return
    there = sorted(path.name for path in Path(root).iterdir() if path.is_dir())
    if split in ('train', 'validation') and not _SPLITS & set(there):
        return
    shown = ', '.join(there[:10]) or 'none'
    raise ValueError(
        f"{root!r} has no sub-folder {split!r}, only {shown}: name one of these, or '.' for the whole folder"
    )


def plain_loader(
    dataset: Any,
    config: dict[str, Any],
    batch_size: int = 500,
    workers: int = 0,
    device: torch.device = torch.device('cpu'),  # noqa: B008
) -> Any:
    """timm's loader of the images in their order, without augmentation.

    Args:
        dataset: One of timm's.
        config: Preprocessing, as of `timm.data.resolve_data_config`.
        batch_size: Images per batch.
        workers: Processes that decode.
        device: Where the batches go.
    """
    return create_loader(
        dataset,
        config['input_size'],
        batch_size,
        **{key: config[key] for key in ('interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')},
        num_workers=workers,
        device=device,
        use_prefetcher=device.type in ('cpu', 'cuda'),
        persistent_workers=False,
    )


def check_classes(dataset: Any, num_classes: int) -> None:
    """Refuse a data set that knows of more classes than the model has, and warn of one that knows of fewer.

    Raises:
        ValueError: It does.
    """
    classes = len(getattr(getattr(dataset, 'reader', None), 'class_to_idx', None) or ())
    if classes > num_classes:
        raise ValueError(f'the data set has {classes} classes, the model {num_classes}: set --num-classes {classes}')
    if 0 < classes < num_classes:
        _logger.warning(f'the data set has {classes} classes, the model {num_classes}: --num-classes {classes} fits')


def class_names(loader: Any) -> list[str]:
    """Names of the classes in the order of their indices; empty where the data set does not name each of them once."""
    dataset = getattr(loader, 'dataset', None)
    while isinstance(dataset, CachedImages):
        dataset = dataset.dataset
    index = getattr(getattr(dataset, 'reader', dataset), 'class_to_idx', None) or {}
    names = sorted(index, key=index.__getitem__)
    named_once = [index[name] for name in names] == list(range(len(names)))
    return names if named_once and all(isinstance(name, str) for name in names) else []


def create_mixup(args: argparse.Namespace, num_classes: int) -> Mixup | None:
    """The mixup or cutmix that the flags ask for, or None."""
    if not (args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None):
        return None
    return (Mixup if args.no_prefetcher or args.data_on_device else FastCollateMixup)(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
    )


def train_loader(args: argparse.Namespace, config: dict[str, Any], device: torch.device, mixup: Mixup | None) -> Any:
    """Loader of the labeled training images."""
    dataset = open_dataset(
        args.dataset,
        args.data_dir,
        args.train_split,
        config['input_size'][0],
        is_training=True,
        batch_size=args.batch_size,
        seed=args.seed,
        repeats=args.epoch_repeats,
        num_samples=args.train_num_samples,
        **_dataset_arguments(args),
    )
    check_classes(dataset, args.num_classes)
    collate = mixup if isinstance(mixup, FastCollateMixup) else None
    return _train_loader(dataset, args.batch_size, args, config, device, collate_fn=collate)


def columns(args: argparse.Namespace, name: str | None) -> dict[str, Any]:
    """The columns to read of a second data set: those of the labeled one where both are of the same source."""
    alike = (name or '').partition('/')[0] == args.dataset.partition('/')[0]
    return {'input_key': args.input_key, 'target_key': args.target_key} if alike else {}


def unlabeled_loader(args: argparse.Namespace, config: dict[str, Any], device: torch.device) -> Any | None:
    """Loader of the unlabeled images, or None."""
    if not has_unlabeled(args):
        return None
    batch_size = args.unlabeled_batch_size or args.batch_size
    dataset = open_unlabeled(
        args.unlabeled_dataset or '',
        args.unlabeled_data_dir,
        args.unlabeled_split,
        config['input_size'][0],
        is_training=True,
        batch_size=batch_size,
        seed=args.seed,
        input_img_mode=args.input_img_mode,
        **columns(args, args.unlabeled_dataset),
    )
    return _train_loader(dataset, batch_size, args, config, device, kind='unlabeled')


def _train_loader(
    dataset: Any,
    batch_size: int,
    args: argparse.Namespace,
    config: dict[str, Any],
    device: torch.device,
    kind: str = 'training',
    **kwargs: Any,
) -> Any:
    if not args.no_prefetcher and not args.data_on_device and device.type == 'mps':
        raise ValueError('timm prefetches to CPU, CUDA and NPU devices only: add --no-prefetcher')
    if args.aug_repeats and (not args.distributed or isinstance(dataset, IterableDataset)):
        raise ValueError(
            '--aug-repeats shows the views of an image to different processes: start several (torchrun), with a data '
            'set that has an index, or leave it out'
        )
    if args.data_on_device and args.distributed:
        raise ValueError('--data-on-device keeps all images on one device: leave it out, or start one process')
    plain = args.no_aug or not args.train_interpolation
    interpolation = config['interpolation'] if plain else args.train_interpolation
    loader = create_loader(
        cached(dataset, random=not args.no_aug) if args.cache_images and not args.data_on_device else dataset,
        config['input_size'],
        batch_size,
        is_training=True,
        no_aug=args.no_aug,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        train_crop_mode=None if args.train_crop_mode == 'pad' else args.train_crop_mode,
        scale=args.scale,
        ratio=args.ratio,
        hflip=args.hflip,
        vflip=args.vflip,
        color_jitter=COLOR_JITTER if args.color_jitter is None else args.color_jitter,
        color_jitter_prob=args.color_jitter_prob,
        grayscale_prob=args.grayscale_prob,
        gaussian_blur_prob=args.gaussian_blur_prob,
        auto_augment=args.aa,
        num_aug_repeats=args.aug_repeats,
        interpolation=interpolation,
        worker_seeding=args.worker_seeding,
        persistent_workers=False,  # workers start with the epoch's seed, so that a resumed run sees the same data
        **_loader_arguments(args, config, device),
        **kwargs,
    )
    if args.data_on_device:
        loader = _device_loader(loader, args, config, kind)
    elif args.train_crop_mode == 'pad' and not args.no_aug:
        _shift_instead_of_zoom(loader.dataset.transform, config['input_size'][1:], interpolation)
    if len(loader) == 0:
        flag = '--batch-size' if kind == 'training' else '--unlabeled-batch-size'
        raise ValueError(f'{len(dataset)} {kind} images do not fill one batch of {batch_size}: lower {flag}')
    return loader


def _device_loader(loader: Any, args: argparse.Namespace, config: dict[str, Any], kind: str) -> Any:
    """The images of timm's loader on the device, at the network's size: what a larger one has beyond it is cut off."""
    classes = args.num_classes if kind == 'training' else None
    if args.no_aug:
        return DeviceLoader(loader, classes=classes, kind=kind)
    if args.color_jitter is None:
        _logger.warning(
            f'--data-on-device does no colour jitter (else {COLOR_JITTER}): --color-jitter 0 says that this is meant'
        )
    size, interpolation = config['input_size'][1:], config['interpolation']
    loader.dataset.transform = create_transform(size, interpolation=interpolation, crop_pct=1.0, use_prefetcher=True)
    return DeviceLoader(loader, partial(_boxes, args=args, size=size), classes, kind)


def _boxes(n: int, args: argparse.Namespace, size: Sequence[int]) -> torch.Tensor:
    pad = args.train_crop_mode == 'pad'
    boxes = device_data.shifts(n, size) if pad else device_data.crops(n, size, args.scale, args.ratio)
    return device_data.mirrored(boxes, args.hflip, args.vflip)


def _shift_instead_of_zoom(transform: Any, size: Sequence[int], interpolation: str) -> None:
    """Put a crop at a random place of the whole image, padded by an eighth, in place of timm's random resized crop.

    Small images suffer from being resampled: the network is tested on sharper ones than it learned from.
    """
    resize = ResizeKeepRatio(size, interpolation=interpolation)  # leaves images of this size as they are
    padding = [size[1] // 8, size[0] // 8]
    transform.transforms[0] = Compose([resize, RandomCrop(size, padding=padding, padding_mode='reflect')])


def eval_loader(args: argparse.Namespace, config: dict[str, Any], device: torch.device) -> Any | None:
    """Loader of the validation images, or None without a validation split."""
    if not args.val_split:
        return None
    dataset = open_dataset(
        args.dataset,
        args.data_dir,
        args.val_split,
        config['input_size'][0],
        batch_size=args.batch_size,
        num_samples=args.val_num_samples,
        **_dataset_arguments(args),
    )
    loader = create_loader(
        cached(dataset, random=False) if args.cache_images and not args.data_on_device else dataset,
        config['input_size'],
        args.validation_batch_size or args.batch_size,
        interpolation=config['interpolation'],
        crop_pct=config['crop_pct'],
        crop_mode=config['crop_mode'],
        **_loader_arguments(args, config, device),
    )
    return DeviceLoader(loader, classes=args.num_classes, kind='validation') if args.data_on_device else loader


def _dataset_arguments(args: argparse.Namespace) -> dict[str, Any]:
    return {
        'class_map': args.class_map or None,
        'download': args.dataset_download,
        'input_img_mode': args.input_img_mode,
        **columns(args, args.dataset),
    }


def _loader_arguments(args: argparse.Namespace, config: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        'mean': config['mean'],
        'std': config['std'],
        'num_workers': args.workers,
        'distributed': args.distributed,
        'pin_memory': args.pin_mem,
        'device': device,
        'use_prefetcher': args.data_on_device or not args.no_prefetcher,
    }


def endless(loader: Any, epoch: int = 0) -> Iterator[torch.Tensor]:
    """Images of a loader, over and over, each time in an order that no other epoch and no labeled images have."""
    for turn in count((epoch + 1) << 16):
        set_epoch(loader, turn)
        for images, *_ in loader:
            yield images


def set_epoch(loader: Any | None, epoch: int) -> None:
    """Tell a distributed sampler, or an iterable data set, which epoch's order is wanted."""
    for name in ('sampler', 'dataset'):
        owner: Any = getattr(loader, name, None)
        if hasattr(owner, 'set_epoch'):
            owner.set_epoch(epoch)
            return
