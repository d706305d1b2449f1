"""All chains of one call of `visualize`, in blocks of images that fit into memory."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from . import chains, hmc
from .networks import channels_last
from .presets import Preset
from .reference import Reference
from .samples import to_rgb
from .scores import ScoreFunction
from .views import Viewer, Views

PIXELS_PER_BATCH = 2**22  # image values in one forward pass: about 28 colour images of 224 x 224


def chunk(reference: Reference) -> int:
    """Images in one forward pass."""
    return max(1, PIXELS_PER_BATCH // math.prod(reference.shape))


@dataclass
class Run:
    """All chains of one call, in blocks of images that fit into memory."""

    score: ScoreFunction
    reference: Reference
    views: list[Views] | None  # of each node; None in the exact regime
    n: int
    steps: int
    temperature: float
    tilt: float | None
    seed: int
    device: torch.device
    dtype: torch.dtype | None
    compile: bool
    frames: int
    paper: Preset | None
    progress: bool

    def __post_init__(self) -> None:
        self.batch = chunk(self.reference)
        self.channels_last = True

    def blocks(self) -> list[tuple[list[int], range]]:
        """(nodes, chains of each node) such that their product fits into a batch."""
        count = len(self.score.nodes)
        groups = [list(range(i, min(i + self.batch, count))) for i in range(0, count, self.batch)]
        blocks = []
        for group in groups:
            per_node = max(1, self.batch // len(group))
            blocks += [(group, range(i, min(i + per_node, self.n))) for i in range(0, self.n, per_node)]
        return blocks

    def run(self) -> tuple[Tensor, Tensor, dict[str, list[Any]], int, Tensor | None]:
        from tqdm.auto import tqdm

        while True:
            try:
                blocks = self.blocks()
                total = self.steps * len(blocks)
                with tqdm(total=total, unit='grad', disable=not self.progress, desc='sampling') as bar:
                    parts = []
                    for group, members in groupby(blocks, key=lambda block: block[0]):
                        with self.scoring(group) as score:
                            parts += [self.block(score, group, some, bar) for _, some in members]
                return self.gather(blocks, parts)
            except RuntimeError as e:
                if self.channels_last and _needs_contiguous(e):
                    self.channels_last = False
                    continue
                if self.compile and isinstance(e, torch._dynamo.exc.TorchDynamoException):
                    reason = str(e).strip().splitlines()[0]
                    raise ValueError(f'torch.compile cannot take this model whole, leave compile out: {reason}') from e
                if not _out_of_memory(e):
                    raise
                if self.batch == 1:
                    sides = ' x '.join(map(str, self.score.size))
                    raise ValueError(f'out of memory with one {sides} image at a time: give a smaller size') from e
                self.batch = max(1, min(self.batch, len(self.score.nodes) * self.n) // 2)
                if self.device.type == 'cuda':
                    torch.cuda.empty_cache()
            warnings.warn(f'out of memory: starting again with {self.batch} images at a time', stacklevel=4)

    @contextmanager
    def scoring(self, group: list[int]) -> Iterator[ScoreFunction]:
        """The scores of a group of nodes, with the network made fast inside."""
        score = replace(self.score, nodes=[self.score.nodes[k] for k in group])
        layout = channels_last(score.model) if self.channels_last else nullcontext()
        with layout, score.compiled() if self.compile else nullcontext():
            yield score

    def block(
        self, node_score: ScoreFunction, group: list[int], some: range, bar: Any
    ) -> tuple[chains.Trace, Tensor, Tensor, list[Tensor]]:
        """Runs one block: its trace, final scores [m], pixels [m, 3, H, W] and frames."""
        ids = [k * self.n + i for k in group for i in some]

        def score(z: Tensor) -> Tensor:
            return node_score(self.reference(z))

        streams = hmc.Streams(self.seed, ids, self.device)
        film: list[Tensor] = []
        last = [time.monotonic(), 0]

        def report(gradients: int, state: hmc.State, acceptance: Tensor | None) -> None:
            if len(film) < self.frames - 1 and gradients * self.frames >= (len(film) + 1) * self.steps:
                film.append(to_rgb(self.reference.pixels(state.z)))
            if time.monotonic() - last[0] > 0.5:  # reading the score waits for the device: not at every step
                shown = {'score': state.score} | ({} if acceptance is None else {'acceptance': acceptance})
                bar.set_postfix(**{k: f'{v.mean().item():.2f}' for k, v in shown.items()}, refresh=False)
                bar.update(gradients - last[1])
                last[:] = [time.monotonic(), gradients]

        origin = self.paper is not None and self.paper.origin
        try:
            state = chains.start(score, self.reference.shape, streams, origin=origin)
        except chains.StartError as e:
            names = dict.fromkeys(repr(node_score.nodes[i // len(some)].name) for i in e.chains)
            raise ValueError(f'{", ".join(names)}: {e}') from None
        budget: dict[str, Any] = {'steps': self.steps, 'report': report}
        rough = self.rough(node_score) if self.dtype else None
        if self.views is None:
            kick = None if rough is None else lambda z: rough(self.reference(z))
            if self.paper:
                budget |= {'n_leapfrog': self.paper.n_leapfrog, 'step_size': self.paper.angle}
            trace = chains.sample_exact(score, state, streams, kick=kick, **budget)
        else:
            views = [self.views[k] for k in group for _ in some]
            viewer = Viewer(views, self.seed, ids, self.device)
            far = torch.tensor([(v.strength, v.move) for v in views], dtype=torch.float64, device=self.device)

            def seen(z: Tensor) -> Tensor:
                return (rough or node_score)(viewer(self.reference(z)))

            budget |= {'strength': far[:, 0], 'move': far[:, 1]}
            trace = chains.sample_gallery(seen, state, streams, temperature=self.temperature, tilt=self.tilt, **budget)
        bar.update(self.steps - last[1])
        final, _ = hmc.score_and_grad(score, trace.z)  # the one pass that has been compiled is that with a gradient
        pixels = to_rgb(self.reference.pixels(trace.z))
        film.append(pixels)
        return trace, final, pixels, film

    def rough(self, score: hmc.Score) -> hmc.Score:
        """The same score of images under autocast."""

        def cast(images: Tensor) -> Tensor:
            with torch.autocast(self.device.type, self.dtype):
                return score(images).float()

        return cast

    def gather(self, blocks: list, parts: list) -> tuple[Tensor, Tensor, dict[str, list[Any]], int, Tensor | None]:
        """Puts the blocks' chains into the order of nodes."""
        ids = [k * self.n + i for group, some in blocks for k in group for i in some]
        order = torch.tensor(ids, device='cpu').argsort()
        join = lambda each, dim=0: torch.cat([t.cpu() for t in each], dim).index_select(dim, order)  # noqa: E731
        traces, finals, pixels, films = zip(*parts, strict=True)
        per_image = {'score': join(finals).tolist()}
        for name in 'acceptance', 'tilt', 'step_size', 'energy_error', 'divergences':
            per_image[name] = join(getattr(trace, name) for trace in traces).tolist()
        scores = join((trace.scores for trace in traces), 1)
        film = join(map(torch.stack, films), 1) if self.frames else None
        return join(pixels), scores, per_image, max(trace.gradients for trace in traces), film


def _needs_contiguous(e: BaseException) -> bool:
    """Whether a network failed on a `view` of a map that is in channels-last order."""
    return 'view size is not compatible' in str(e) or 'Cannot view a tensor' in str(e)


def _out_of_memory(e: BaseException) -> bool:
    return isinstance(e, torch.OutOfMemoryError) or 'not enough memory' in str(e) or "can't allocate memory" in str(e)
