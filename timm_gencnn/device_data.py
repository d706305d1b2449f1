"""Images kept on the training device and augmented there in whole batches: `gencnn train --data-on-device`.

A random view is a box of the image, resampled to the image's size. Boxes are drawn on the CPU, those of an epoch at
once, with the generator that the training loop seeds anew at every epoch; no step waits for the device.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data.loader import PrefetchLoader, fast_collate
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm

from .loss import check_targets

_TRIALS = 10  # boxes that timm's random resized crop tries before it takes the central one


class DeviceLoader:
    """Batches of a timm loader from images that lie on its device, decoded once.

    Args:
        loader: timm's, whose transform draws no random numbers; its batch size, normalisation, random erasing and
            number of workers hold. If it leaves out the last incomplete batch, it trains: in random order.
        draw: Makes boxes [n, 4] of n views, as `views` takes them; None shows the images as they are.
        classes: How many there are, if the targets are classes.
        kind: What the images are for, for messages.

    Attributes:
        dataset: Where they come from, which knows the names of the classes.
        images: All images, uint8 [N, C, H, W].
        targets: Their targets [N].

    Raises:
        ValueError: A data set without an index or without images, a class out of range, too little memory.
    """

    def __init__(
        self,
        loader: PrefetchLoader,
        draw: Callable[[int], Tensor] | None = None,
        classes: int | None = None,
        kind: str = 'training',
    ) -> None:
        source = loader.loader
        dataset: Any = source.dataset
        if isinstance(dataset, IterableDataset):
            name = type(dataset).__name__
            raise ValueError(f'--data-on-device needs a data set with an index, not {name}: leave it out')
        if not len(dataset):
            raise ValueError(f'the data set has no {kind} images')
        assert source.batch_size is not None
        self.dataset = dataset
        self.batch_size = source.batch_size
        self.training = source.drop_last
        self.draw = draw
        self._mean, self._std, self._erase = loader.mean, loader.std, loader.random_erasing
        batches = DataLoader(dataset, self.batch_size, num_workers=source.num_workers, collate_fn=fast_collate)
        self.images, targets = _decode(batches, len(dataset), loader.device, kind)
        if classes is not None:
            check_targets(targets, classes)  # here, where no step has to wait for it
        self.targets = targets.to(loader.device)

    def __len__(self) -> int:
        return (len(self.images) + (0 if self.training else self.batch_size - 1)) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images [n, C, H, W] and their targets [n]."""
        for images, targets in self._shuffled() if self.training else self._in_order():
            images = images.sub_(self._mean).div_(self._std)
            yield images if self._erase is None else self._erase(images), targets

    def _in_order(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, targets in zip(*(x.split(self.batch_size) for x in (self.images, self.targets)), strict=True):
            yield images.float(), targets

    def _shuffled(self) -> Iterator[tuple[Tensor, Tensor]]:
        n = len(self) * self.batch_size
        order = torch.randperm(len(self.images))[:n].to(self.images.device)
        boxes = None if self.draw is None else self.draw(n).to(self.images.device)
        for i in range(0, n, self.batch_size):
            batch = slice(i, i + self.batch_size)
            images = self.images[order[batch]].float()
            yield images if boxes is None else views(images, boxes[batch]), self.targets[order[batch]]


def _decode(batches: DataLoader, n: int, device: torch.device, kind: str) -> tuple[Tensor, Tensor]:
    """All n images, on the device, and their targets, on the CPU."""
    images, targets, done = torch.empty(0), [], 0
    with tqdm(total=n, desc=f'{kind} images', leave=False, disable=None) as bar:
        for some, target in batches:
            if not done:
                images = _reserve(n, some.shape[1:], device, kind)
            images[done : done + len(some)] = some
            targets.append(target)
            done += len(some)
            bar.update(len(some))
    return images, torch.cat(targets)


def _reserve(n: int, shape: Sequence[int], device: torch.device, kind: str) -> Tensor:
    try:
        return torch.empty(n, *shape, dtype=torch.uint8, device=device)
    except RuntimeError as error:  # OutOfMemoryError is one
        size = 'x'.join(map(str, shape))
        raise ValueError(
            f'{n} {kind} images of {size} bytes need {n * math.prod(shape) / 2**30:.1f} GiB on {device}: lower '
            f'--img-size, or leave out --data-on-device ({error})'
        ) from error


# Views


def views(images: Tensor, boxes: Tensor) -> Tensor:
    """Resample a box of each image to the image's size: bilinear, in whole levels, as PIL enlarges a crop.

    Args:
        images: Pixel levels, floating point [n, C, H, W].
        boxes: Top and left edge, height and width in pixels [n, 4]. Beyond the image lies its reflection; a negative
            height or width makes the mirror image, from the opposite edge on. Boxes larger than the image would need
            a low-pass filter, which is not there.

    Returns:
        Pixel levels [n, C, H, W]; a box of the size of the image gives an exact copy of pixels.
    """
    rows, columns = (_places(boxes[:, axis], boxes[:, axis + 2], images.shape[axis + 2]) for axis in (0, 1))
    grid = torch.stack(torch.broadcast_tensors(columns[:, None, :], rows[:, :, None]), -1)
    return F.grid_sample(images, grid, padding_mode='reflection', align_corners=True).round_()


def _places(start: Tensor, extent: Tensor, size: int) -> Tensor:
    """Where the pixels of a view are read along one axis [n, size], from -1 (first pixel) to 1 (last one)."""
    centres = (torch.arange(size, device=start.device) + 0.5) / size
    end = start + extent
    places = start[:, None] + extent[:, None] * centres - 0.5
    places = places.clamp(torch.minimum(start, end)[:, None], torch.maximum(start, end)[:, None] - 1)
    return places * (2 / (size - 1)) - 1


def crops(n: int, size: Sequence[int], scale: Sequence[float], ratio: Sequence[float]) -> Tensor:
    """Draw the boxes of timm's random resized crop, RandomResizedCropAndInterpolation.

    Area ~ U(scale) of the image's and log(width / height) ~ U(log ratio), rounded to whole pixels and drawn again where
    the box is larger than the image; then a uniform place. After ten trials, the largest central box of that ratio.

    Args:
        n: Number of boxes.
        size: Height and width of the images, in pixels.
        scale: Least and largest share of the area.
        ratio: Least and largest ratio of width to height.

    Returns:
        Boxes [n, 4], as `views` takes them.
    """
    height, width = size
    aspect = min(max(width / height, ratio[0]), ratio[1])
    h, w = round(min(height, width / aspect)), round(min(width, height * aspect))
    boxes = torch.tensor([[(height - h) // 2, (width - w) // 2, h, w]], dtype=torch.float32).repeat(n, 1)
    left = torch.arange(n)
    for _ in range(_TRIALS):
        area = height * width * _uniform(len(left), *scale)
        aspects = _uniform(len(left), *map(math.log, ratio)).exp()
        shapes = torch.stack([area / aspects, area * aspects], 1).sqrt().round()
        fits = (shapes <= torch.tensor([height, width])).all(1)
        shapes = shapes[fits]
        corners = (torch.tensor([height, width]) - shapes + 1) * torch.rand_like(shapes)
        boxes[left[fits]] = torch.cat([corners.floor(), shapes], 1).float()
        left = left[~fits]
    return boxes


def shifts(n: int, size: Sequence[int]) -> Tensor:
    """Draw whole images moved by up to an eighth of their size, by whole pixels: boxes [n, 4], as `views` takes them.

    Args:
        n: Number of boxes.
        size: Height and width of the images, in pixels.
    """
    corners = [torch.randint(-(side // 8), side // 8 + 1, (n,)) for side in size]
    return torch.stack([*corners, *(torch.full((n,), side) for side in size)], 1).float()


def mirrored(boxes: Tensor, hflip: float, vflip: float) -> Tensor:
    """Make mirror images of some views.

    Args:
        boxes: Those of the views [n, 4]; changed in place.
        hflip: Probability that left and right change places.
        vflip: Probability that top and bottom do.
    """
    for axis, p in ((0, vflip), (1, hflip)):
        turned = torch.rand(len(boxes)) < p
        boxes[turned, axis] += boxes[turned, axis + 2]
        boxes[turned, axis + 2] *= -1
    return boxes


def _uniform(n: int, low: float, high: float) -> Tensor:
    return low + (high - low) * torch.rand(n, dtype=torch.float64)
