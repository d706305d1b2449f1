"""All chains of one call of `visualize`, in blocks of images that fit into memory."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import chains, hmc
from .networks import affine_batch_norms, channels_last
from .reference import Reference
from .samples import to_rgb
from .sampling import Sampling
from .scores import ScoreFunction
from .views import Viewer, Views

PIXELS_PER_BATCH = 2**22  # image values in one forward pass: about 28 colour images of 224 x 224
MEMORY_PER_BATCH = 2**34  # bytes of a GPU for which that is right; one with more takes more images at once


def chunk(reference: Reference, device: torch.device) -> int:
    """Images in one forward pass."""
    times = torch.cuda.get_device_properties(device).total_memory / MEMORY_PER_BATCH if device.type == 'cuda' else 1
    return max(1, int(PIXELS_PER_BATCH * max(1, times)) // math.prod(reference.shape))


def lighter(e: RuntimeError, images: int, size: tuple[int, int], stacklevel: int) -> int:
    """Images in one forward pass of the next try, after an error for lack of memory; any other is raised.

    Args:
        e: The error.
        images: Images in one forward pass of the last try.
        size: Their height and width in pixels.
        stacklevel: Where the user's call is, for the warning that says so.

    Raises:
        ValueError: There is no memory for a single image.
    """
    if not _out_of_memory(e):
        raise e
    if images == 1:
        sides = ' x '.join(map(str, size))
        raise ValueError(f'out of memory with one {sides} image at a time: give a smaller size') from e
    warnings.warn(f'out of memory: starting again with {images // 2} images at a time', stacklevel=stacklevel)
    return images // 2


class Drawn(NamedTuple):
    """What chains leave behind.

    Attributes:
        film: Images of the run, the final ones last [F, n, 3, H, W] in [0, 1].
        scores: Score of every kept draw [draws, n].
        per_image: Score of the final images and what the sampler tells of each chain [n].
        gradients: Image gradients per chain.
    """

    film: Tensor
    scores: Tensor
    per_image: dict[str, Tensor]
    gradients: int


def _join(parts: Sequence[Drawn], ids: Sequence[int]) -> Drawn:
    """All chains in the order of their `ids`, on the CPU."""
    order = torch.tensor(ids, device='cpu').argsort()
    join = lambda each, dim=0: torch.cat([t.cpu() for t in each], dim).index_select(dim, order)  # noqa: E731
    films, scores, tables, gradients = zip(*parts, strict=True)
    per_image = {name: join(table[name] for table in tables) for name in tables[0]}
    return Drawn(join(films, 1), join(scores, 1), per_image, max(gradients))


@dataclass
class Run:
    """All chains of one call, in blocks of images that fit into memory."""

    score: ScoreFunction
    reference: Reference
    views: list[Views] | None  # of each node; None in the exact regime
    sampling: Sampling  # settled
    steps: int
    device: torch.device
    progress: bool

    def __post_init__(self) -> None:
        self.batch = chunk(self.reference, self.device)
        self.channels_last = True

    def blocks(self) -> list[tuple[list[int], list[int]]]:
        """(nodes, chains) of each block, which fit into a batch; chain i of node k has the number k n + i."""
        count, n = len(self.score.nodes), self.sampling.n
        blocks = []
        for first in range(0, count, self.batch):
            group = list(range(first, min(first + self.batch, count)))
            per_node = max(1, self.batch // len(group))
            some = [range(i, min(i + per_node, n)) for i in range(0, n, per_node)]
            blocks += [(group, [k * n + i for k in group for i in members]) for members in some]
        return blocks

    def run(self) -> Drawn:
        from tqdm.auto import tqdm

        while True:
            try:
                blocks = self.blocks()
                total = self.steps * len(blocks)
                with tqdm(total=total, unit='grad', disable=not self.progress, desc='sampling') as bar:
                    parts = []
                    for group, members in groupby(blocks, key=lambda block: block[0]):
                        with self.scoring(group) as score:
                            parts += [self.block(score, ids, bar) for _, ids in members]
                return _join(parts, [i for _, ids in blocks for i in ids])
            except RuntimeError as e:
                self.lighten(e)

    def lighten(self, e: RuntimeError) -> None:
        """Prepares another try after an error that one with less memory, or another order of it, may not meet."""
        if self.channels_last and _needs_contiguous(e):
            self.channels_last = False
            return
        if self.sampling.compile and isinstance(e, torch._dynamo.exc.TorchDynamoException):
            reason = str(e).strip().splitlines()[0]
            raise ValueError(f'torch.compile cannot take this model whole, leave compile out: {reason}') from e
        self.batch = lighter(e, min(self.batch, len(self.score.nodes) * self.sampling.n), self.score.size, stacklevel=6)

    @contextmanager
    def scoring(self, group: list[int]) -> Iterator[ScoreFunction]:
        """The scores of a group of nodes, with the network made fast inside."""
        score = replace(self.score, nodes=[self.score.nodes[k] for k in group])
        layout = channels_last(score.model) if self.channels_last else nullcontext()
        norms = nullcontext() if self.device.type == 'cpu' else affine_batch_norms(score.model)
        with layout, score.compiled() if self.sampling.compile else norms:
            yield score

    def block(self, node_score: ScoreFunction, ids: list[int], bar: Any) -> Drawn:
        """Runs one block of chains."""
        ask, score = self.sampling, self.of_latents(node_score)
        film: list[Tensor] = []
        first, last = bar.n, time.monotonic()

        def report(gradients: int, state: hmc.State, acceptance: Tensor | None) -> None:
            nonlocal last
            if len(film) < ask.frames - 1 and gradients * ask.frames >= (len(film) + 1) * self.steps:
                film.append(to_rgb(self.reference.pixels(state.z)))
            if time.monotonic() - last > 0.5:  # reading the score waits for the device: not at every step
                shown = {'score': state.score} | ({} if acceptance is None else {'acceptance': acceptance})
                bar.set_postfix(**{k: f'{v.mean().item():.2f}' for k, v in shown.items()}, refresh=False)
                bar.update(first + gradients - bar.n)
                last = time.monotonic()

        streams = hmc.Streams(ask.seed, ids, self.device)
        try:
            origin = ask.paper is not None and ask.paper.origin
            state = chains.start(score, self.reference.shape, streams, origin=origin)
        except chains.StartError as e:
            names = dict.fromkeys(repr(self.score.nodes[ids[i] // ask.n].name) for i in e.chains)
            raise ValueError(f'{", ".join(names)}: {e}') from None
        trace = self.sample(node_score, state, streams, ids, report)
        bar.update(first + self.steps - bar.n)
        final, _ = hmc.score_and_grad(score, trace.z)  # the one pass that has been compiled is that with a gradient
        film.append(to_rgb(self.reference.pixels(trace.z)))
        told = 'acceptance', 'tilt', 'step_size', 'energy_error', 'divergences'
        per_image = {'score': final} | {name: getattr(trace, name) for name in told}
        return Drawn(torch.stack(film), trace.scores, per_image, trace.gradients)

    def sample(
        self, score: hmc.Score, state: hmc.State, streams: hmc.Streams, ids: list[int], report: chains.Report
    ) -> chains.Trace:
        """Runs chains from their start by the score of images, or by that of random views in the gallery regime."""
        ask, rough = self.sampling, self.autocast(score)
        if self.views is None:
            paper: Any = {'n_leapfrog': ask.paper.n_leapfrog, 'step_size': ask.paper.angle} if ask.paper else {}
            kick = None if ask.dtype is None else self.of_latents(rough)
            exact = self.of_latents(score)
            return chains.sample_exact(exact, state, streams, self.steps, kick=kick, report=report, **paper)
        views = [self.views[i // ask.n] for i in ids]
        viewer = Viewer(views, ask.seed, ids, self.device)
        far = torch.tensor([(v.strength, v.move) for v in views], dtype=torch.float64, device=self.device)
        seen, heat = self.of_latents(lambda images: rough(viewer(images))), ask.temperature
        assert heat is not None
        return chains.sample_gallery(
            seen, state, streams, self.steps, heat, ask.tilt, strength=far[:, 0], move=far[:, 1], report=report
        )

    def of_latents(self, score: hmc.Score) -> hmc.Score:
        return lambda z: score(self.reference(z))

    def autocast(self, score: hmc.Score) -> hmc.Score:
        """The same score of images, by a network in the dtype asked for."""

        def cast(images: Tensor) -> Tensor:
            with torch.autocast(self.device.type, self.sampling.dtype):
                return score(images).float()

        return cast if self.sampling.dtype else score


def _needs_contiguous(e: BaseException) -> bool:
    """Whether a network failed on a `view` of a map or of a weight that is in channels-last order."""
    told = 'view size is not compatible', 'Cannot view a tensor', 'last dimension with stride 1', 'must be 1 to view'
    return any(text in str(e) for text in told)


def _out_of_memory(e: BaseException) -> bool:
    told = 'not enough memory', "can't allocate memory", 'CUDA error: out of memory', '_ALLOC_FAILED'  # cuBLAS, cuDNN
    return isinstance(e, torch.OutOfMemoryError) or any(text in str(e) for text in told)
