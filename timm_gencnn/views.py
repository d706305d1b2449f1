"""Random views of images, through which the gallery regime shows them to the network.

A class is the same class nearer, farther off, mirrored or moved aside, and photographs are stationary, symmetric and
nearly the same at every scale, as the reference with its 1/f spectrum is. A picture that scores only at the very pixels
where it was drawn is an accident of the network. So a gallery chain climbs the score averaged over views, one fresh
view per chain and gradient, and the score that is reported at the end is that of the plain image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import chains, hmc

AHEAD = 64  # views that are drawn at once
Reading = tuple[Tensor, Tensor]
OWN_STREAMS = 0x5EED  # added to the seed of a run, so that views and momenta draw different numbers


class Views(NamedTuple):
    """The law of the random views of one node's images, and how its chains move.

    Attributes:
        crop: Side of the smallest crop, as a share of the image's; sides are uniform on (crop, 1), then enlarged.
        flip: Whether half of the views are mirrored, left to right.
        shift: Largest circular shift of a view, as a share of the shorter image side.
        shrink: Smallest share of its side to which a view is then shrunk, somewhere before the image's mean colour;
            the share is uniform on (shrink, 1).
        strength: How far the score is asked to go (see `chains.sample_gallery`).
        move: Scale of the moves, likewise.
    """

    crop: float = 1.0
    flip: bool = False
    shift: float = 0.08
    shrink: float = 1.0
    strength: float = chains.STRENGTH
    move: float = chains.MOVE


# Twelve classes, 128 px, two chains each, half the strength: these moves raised the log-probability of an independent
# judge from -3.2 (at 0.03) to -1.9 and left no pixel saturated, with scores twice as high. Digits became all but alike.
# Shrunk views make, to the eye, one whole thing of what were parts of several. From SqueezeNet, 40 classes at 160 px,
# the judge had 0.66 of the pictures first (0.54 without), at 0.9 of the score; from MobileNet, 12 classes at 192 px,
# 0.71 (0.79, standard errors 0.09), at 0.8 of the score, but 0.46 (0.67) at 128 px; from a network for 64 px it named
# 47 % as asked (87 %).
# Hidden units as tests/benchmarks/bench_units.py judges them, 128 px, other units than there: of 0.69, 0.56 and 0.88 of
# the soft pictures the own unit was the nearest, of 0.50, 0.50 and 0.88 of the plain ones (MobileNet's blocks.10 and
# blocks.12, SqueezeNet's features.12; standard errors 0.09); crops to 0.5 and flips gave 0.59 of the first. In small
# images, to the eye, the plain moves show the same things with more contrast.
PLAIN = Views()
SOFT = Views(strength=0.5, move=0.012)
SMALL_PHOTOGRAPHS = SOFT._replace(crop=0.5, flip=True)
PHOTOGRAPHS = SOFT._replace(crop=0.7, flip=True, shrink=0.5)
LARGE = 160  # shorter side, in pixels, from which on views of classes are shrunk, and units drawn softly


def views_of(kind: str, channels: int, size: Sequence[int]) -> Views:
    """The views that leave a node's question what it is.

    Classes of colour images are taken for things in photographs. Digits and letters do not survive a mirror, and a unit
    inside a network may ask for an orientation, a scale or a place: they are only moved a little. The chains of
    photographs, and of units that see as much as one, take smaller moves towards a weaker answer, which leaves their
    colours soft.

    Args:
        kind: As of `NodeScore`.
        channels: Image channels.
        size: Height and width of the images, in pixels.
    """
    if channels != 3:
        return PLAIN
    small, large = (SMALL_PHOTOGRAPHS, PHOTOGRAPHS) if kind == 'class' else (PLAIN, SOFT)
    return large if min(size) >= LARGE else small


def is_current(settings: Mapping[str, Any]) -> bool:
    """Whether a gallery picture was drawn by views and moves that this version has; any of the model itself was.

    Args:
        settings: Those of `Samples`, which an older version may have written.
    """
    if settings.get('regime') != 'gallery':
        return True
    channels = [len(settings['mean'])] if 'mean' in settings else [1, 3]  # white noise does not tell
    known = [views_of(kind, c, settings['size'])._asdict() for c in channels for kind in ('class', 'layer')]
    views = [Views()._asdict() | law for law in settings.get('views') or ()]  # the first were not shrunk, nor said so
    return bool(views) and all(v in known for v in views) and settings.get('schedule') == chains.Schedule()._asdict()


class Viewer:
    """Shows each chain's image in a fresh random view at every call.

    Args:
        views: The law of each chain's views.
        seed: Seed of the run.
        ids: Index of each chain: chain i sees the same views in every batch that holds it.
        device: Where the images will be.
    """

    def __init__(self, views: Sequence[Views], seed: int, ids: Sequence[int], device: torch.device | str = 'cpu'):
        self.streams = hmc.Streams(seed + OWN_STREAMS, ids, device)
        # streams of their own, so that views draw the same numbers whether or not some in the batch are shrunk
        self.far_streams = hmc.Streams(seed + OWN_STREAMS, [-1 - i for i in ids], device)
        self.closest = min(v.crop for v in views)
        law = [(v.crop, v.flip, v.shift, v.shrink) for v in views]
        self.crop, flip, self.shift, self.shrink = torch.tensor(law, dtype=torch.float32, device=device).unbind(1)
        self.flip = flip.bool()
        self._ahead: list[tuple[Reading, Reading]] = []

    def __call__(self, images: Tensor) -> Tensor:
        """A view of each image [n, C, H, W], of the same size, differentiable."""
        if not self._ahead:
            self._ahead = self._draw(*images.shape[2:])
        rows, columns = (interpolation(*read) for read in self._ahead.pop())
        touched = math.ceil(2 / self.closest)  # pixels of the view that read one of the image, at most
        factors = [factor(m, k) for m, k in ((rows, 2), (rows.mT, touched), (columns, 2), (columns.mT, touched))]
        mean = (images.mean((2, 3)).detach() * (self.shrink < 1)[:, None])[:, :, None, None]
        return mean + Resample.apply(images - mean, *factors)

    def _draw(self, height: int, width: int) -> list[tuple[Reading, Reading]]:
        """What the rows and the columns of the next views read, the first one last.

        As many as `AHEAD` at once: each draw is a call for every chain.
        """
        side, mirror, top, left = self.streams.uniform((AHEAD, 4)).movedim(0, 1).unbind(2)  # [AHEAD, n]
        side = 1 - (1 - self.crop) * side
        room, reach = 1 - side, self.shift * min(height, width)
        share, down, across = self.far_streams.uniform((AHEAD, 3)).movedim(0, 1).unbind(2)
        share = 1 - (1 - self.shrink) * share
        mirror = self.flip & (mirror < 0.5)
        rows = reading(height, side, -reach + (height * room + 2 * reach) * top, share, down)
        columns = reading(width, side, -reach + (width * room + 2 * reach) * left, share, across, mirror)
        return list(zip(zip(*rows, strict=True), zip(*columns, strict=True), strict=True))[::-1]


class Band(NamedTuple):
    """Matrices [n, rows, columns] of which few entries are not zero.

    Attributes:
        weights: Entries of each row, all that are not zero among them [n, rows, k].
        columns: Where they are [n, rows, k].
    """

    weights: Tensor
    columns: Tensor

    @classmethod
    def of(cls, matrices: Tensor, k: int) -> Band:
        """Non-negative matrices with at most k entries to a row that are not zero."""
        return cls(*matrices.topk(min(k, matrices.shape[2])))

    def from_left(self, images: Tensor) -> Tensor:
        """matrix @ images [n, C, columns, W]: [n, C, rows, W]."""
        n, channels, height, width = images.shape
        first = height * torch.arange(n * channels, device=images.device).view(n, channels, 1, 1)
        index = (self.columns[:, None] + first).flatten(0, 2)
        weights = self.weights[:, None].expand(-1, channels, -1, -1).flatten(0, 2).to(images.dtype)
        rows = F.embedding_bag(index, images.reshape(-1, width), mode='sum', per_sample_weights=weights)
        return rows.view(n, channels, -1, width)

    def from_right(self, images: Tensor) -> Tensor:
        """images [n, C, H, columns] @ matrixᵀ: [n, C, H, rows]."""
        return self.from_left(images.mT).mT.contiguous()


class Dense(NamedTuple):
    """Matrices [n, rows, columns] as they are."""

    entries: Tensor

    def from_left(self, images: Tensor) -> Tensor:
        """matrix @ images [n, C, columns, W]: [n, C, rows, W]."""
        return self.entries[:, None] @ images

    def from_right(self, images: Tensor) -> Tensor:
        """images [n, C, H, columns] @ matrixᵀ: [n, C, H, rows]."""
        n, channels, height, width = images.shape
        return (images.reshape(n, channels * height, width) @ self.entries.mT).view(n, channels, height, -1)


Factor = Band | Dense


def factor(matrices: Tensor, k: int) -> Factor:
    """Matrices [n, rows, columns] with at most k entries to a row that are not zero, to multiply images from the left.

    On a GPU products are cheap, and what sorts and gathers is not.
    """
    return Band.of(matrices, k) if matrices.device.type == 'cpu' else Dense(matrices)


class Resample(torch.autograd.Function):
    """rows @ images @ columnsᵀ: `Resample.apply(images, rows, rowsᵀ, columns, columnsᵀ)`.

    Each of them is a `Band` or `Dense`.

    Gradients are gathered by the transposes as the images are by the matrices, and so are the same in every run. The
    backward passes of torch's own interpolations scatter them, in an order that a GPU leaves open.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, rows: Factor, rows_t: Factor, columns: Factor, columns_t: Factor) -> Tensor:
        ctx.back = rows_t, rows, columns_t, columns
        return columns.from_right(rows.from_left(images))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return Resample.apply(grad, *ctx.back), None, None, None, None


def reading(
    size: int, side: Tensor, start: Tensor, share: Tensor | float = 1.0, place: Tensor | float = 0.0,
    mirror: Tensor | None = None,
) -> Reading:  # fmt: skip
    """Where the samples of a view lie in a circular signal, and which of them show it.

    Args:
        size: Samples of the signal.
        side: Length of the stretch that is shown, as a share of the signal's [...], in (0, 1].
        start: Where it starts [...], rounded to whole samples; with a side of 1 the result is exactly a circular shift.
        share: Share of the result that shows the stretch [...], in (0, 1]; the other samples are empty.
        place: Where that is [...], from 0, at the start, to 1, at the end.
        mirror: Whether to show the stretch backwards [...], bool.

    Returns:
        Places from 0 to size, those of the samples' centres being whole numbers [..., size], and whether each is shown
        [..., size].
    """
    index = torch.arange(size, dtype=side.dtype, device=side.device)
    share, place = (torch.as_tensor(v, dtype=side.dtype, device=side.device).expand_as(side) for v in (share, place))
    offset = (size * (1 - share) * place)[..., None]
    read = (index + 0.5 - offset) / share[..., None]  # in units of the stretch's samples
    inside = (read > 0) & (read < size)
    if mirror is not None:
        read = torch.where(mirror[..., None], size - read, read)
    return (start.round()[..., None] + read * side[..., None] - 0.5).remainder(size), inside


def interpolation(places: Tensor, inside: Tensor) -> Tensor:
    """Matrices [n, size, size] that read a circular signal at places [n, size] linearly, and nothing but inside."""
    size = places.shape[-1]
    index = torch.arange(size, dtype=places.dtype, device=places.device)
    distance = (places[:, :, None] - index).abs_()
    weights = distance.sub_(size / 2).abs_().sub_(size / 2 - 1).clamp_(min=0)  # 1 - min(distance, size - distance)
    return weights * inside[:, :, None]
