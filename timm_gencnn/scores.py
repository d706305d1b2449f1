"""Score functions: images -> scores of nodes, by forward passes that end where the last node is read.

Knows where in a network the nodes are, and nothing of their names' grammar or of sampling.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .layouts import Layout, grad, weighted_scores
from .probes import Probe, StopForward, Tap, class_logits, exclusive, single_tensor


@dataclass(frozen=True)
class Term:
    """weight * one unit (or the mean of one channel) of the tensor at `tap`."""

    tap: Tap
    layout: Layout
    channel: int
    position: tuple[int, ...] | None = None
    weight: float = 1.0
    of_class: bool = False

    @property
    def note(self) -> str:
        """What a user should know about the score, or ''."""
        early = 'read before the activation'
        return '' if not self.tap.input else f'class logit {early} {self.tap.layer!r}' if self.of_class else early

    def read(self, tensor: Tensor) -> Tensor:
        """Scores [n] of a tensor [n, ...] whose windows, if any, are already an axis of their own."""
        values = tensor.select(self.layout.axis, self.channel).float()
        if self.position is None and values.ndim > 1:
            values = values.flatten(1).mean(1)
        else:  # a copy: what follows may work in place
            for place in self.position or ():
                values = values.select(1, place)
            values = values.clone()
        return values if self.weight == 1 else self.weight * values


@dataclass(frozen=True)
class NodeScore:
    """The score of one node: a sum of units of the network and of functions of the user's.

    Attributes:
        name: Canonical name; `resolve` takes it back.
        terms: The units, with their weights.
        calls: The functions, images [n, C, H, W] -> [n], after their weights.
    """

    name: str
    terms: list[Term]
    calls: list[tuple[float, Callable[[Tensor], Tensor]]]

    @property
    def kind(self) -> str:
        """'class' (or a sum of classes), 'layer', 'callable' or 'sum' (of anything else)."""
        if self.terms and not self.calls and all(term.of_class for term in self.terms):
            return 'class'
        if len(self.terms) + len(self.calls) > 1:
            return 'sum'
        return 'layer' if self.terms else 'callable'

    @property
    def note(self) -> str:
        """Those of the terms."""
        return '; '.join(dict.fromkeys(term.note for term in self.terms if term.note))


@dataclass(repr=False)
class ScoreFunction:
    """Scores of one or more nodes, images [N, C, H, W] (normalised for the model) -> float32 [N].

    With K nodes the batch is K groups of n = N / K contiguous images, group i scored by node i, all in one forward pass
    that ends at the last layer needed. Nothing is left on the model between calls and nothing waits for the device.

    Attributes:
        size: Default image height and width in pixels.
        in_chans: Image channels.
        dtype: Of the model, which images of another one are cast to.
    """

    model: nn.Module
    nodes: list[NodeScore]
    size: tuple[int, int]
    in_chans: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        self._compiled: Callable[[Tensor], list[Tensor]] | None = None
        self._reads: dict[Tap, list[tuple[int, Term]]] = defaultdict(list)
        for group, node in enumerate(self.nodes):
            for term in node.terms:
                self._reads[term.tap].append((group, term))

    @property
    def names(self) -> list[str]:
        """Canonical name of each node."""
        return [node.name for node in self.nodes]

    def __call__(self, images: Tensor) -> Tensor:
        """Scores [N] of images [N, C, H, W].

        Raises:
            ValueError: `images` is not a batch that the nodes divide evenly, or too small for a node's position.
        """
        groups = len(self.nodes)
        if images.ndim != 4 or images.shape[1] != self.in_chans or not len(images) or len(images) % groups:
            raise ValueError(
                f'images of shape {list(images.shape)} given: {groups} node(s) take [N, {self.in_chans}, H, W] '
                f'with N a positive multiple of {groups}'
            )
        n = len(images) // groups
        images = images.to(self.dtype)
        parts: list[list[Tensor]] = [[] for _ in self.nodes]
        if self._reads:
            called = any(node.calls for node in self.nodes)
            own = images.clone() if called else images  # the model may normalise in place
            self._forward(own, lambda tap, tensor: self._read(tap, tensor, parts, n))
        for node, members, group in zip(self.nodes, parts, images.split(n), strict=True):
            members += [weight * call(group).float() for weight, call in node.calls]
        scores = [members[0] if len(members) == 1 else torch.stack(members).sum(0) for members in parts]
        return scores[0] if groups == 1 else torch.cat(scores)

    @contextmanager
    def compiled(self, **options: Any) -> Iterator[None]:
        """Runs the network through `torch.compile` inside the block; callables and the sums of a node are run as ever.

        The pass is one graph from the images to the tensors read, so that the compiler drops what comes after them,
        where an eager pass is stopped by an exception. A new size of the batch compiles anew.

        Args:
            **options: Passed on to `torch.compile`, such as `backend`.
        """
        found: dict[Tap, Tensor] = {}

        def read(tap: Tap, tensor: Tensor) -> None:
            found[tap] = tensor.clone()  # what follows may work in place

        def forward(images: Tensor) -> list[Tensor]:
            output = self.model(images)
            if Tap('') in self._reads:
                read(Tap(''), class_logits(output))
            seen.clear()  # leaves all as it was, since a change of what was traced would compile anew
            return [found.pop(tap) for tap in self._reads]

        with self._hooks(read) as seen:
            self._compiled = torch.compile(forward, fullgraph=True, **options)
            try:
                yield
            finally:
                self._compiled = None

    def _forward(self, images: Tensor, take: Callable[[Tap, Tensor], None]) -> None:
        """Gives `take` the tensor at each tap while the pass is there: what follows may work in place."""
        if self._compiled:
            for tap, tensor in zip(self._reads, self._compiled(images), strict=True):
                take(tap, tensor)
            return
        waiting = len(self._reads)

        def read(tap: Tap, tensor: Tensor) -> None:
            nonlocal waiting
            waiting -= 1
            take(tap, tensor)
            if not waiting:
                raise StopForward

        with self._hooks(read), suppress(StopForward):
            output = self.model(images)
            if (root := Tap('')) in self._reads:
                read(root, class_logits(output))
        if waiting:
            layers = [tap.layer for tap in self._reads]
            optimized = torch._dynamo.OptimizedModule
            if any(isinstance(m, optimized) or m._compiled_call_impl for m in self.model.modules()):
                raise ValueError(
                    f'a compiled model does not tell what {layers} give: give the plain module, model._orig_mod of '
                    'torch.compile(model), or copy.deepcopy(model) after model.compile()'
                )
            raise ValueError(f'this forward pass did not reach all of {layers}')

    def _read(self, tap: Tap, tensor: Tensor, parts: list[list[Tensor]], n: int) -> None:
        """Adds what the nodes read at `tap` to their groups' parts, n images each."""
        count = n * len(self.nodes)
        if self._reads[tap][0][1].layout.windows:
            tensor = tensor.unflatten(0, (count, -1))
        if len(tensor) != count:
            raise ValueError(f'layer {tap.layer!r} splits its {count} images in windows: resolve with size=')
        for group, term in self._reads[tap]:
            part = tensor[group * n : (group + 1) * n]
            if term.position is not None:
                _check_position(self.nodes[group].name, term, part)
            parts[group].append(term.read(part))

    @contextmanager
    def _hooks(self, read: Callable[[Tap, Tensor], None]) -> Iterator[dict[tuple[str, bool], int]]:
        """Calls `read` for each tap inside the model that a forward pass comes by; yields the calls counted so far."""
        seen: dict[tuple[str, bool], int] = {}

        def hook(place: tuple[str, bool], taps: dict[int, Tap]) -> Callable[..., None]:
            def run(module: nn.Module, args: Any, output: Any = None) -> None:
                call = seen.get(place, 0)
                seen[place] = call + 1
                if call in taps:
                    tensor = args[0] if taps[call].input else single_tensor(output)
                    if tensor is None:
                        raise ValueError(f'{taps[call].layer!r} no longer returns one tensor')
                    read(taps[call], tensor)

            return run

        taps: dict[tuple[str, bool], dict[int, Tap]] = defaultdict(dict)
        for tap in self._reads:
            if tap.layer:
                taps[tap.layer, tap.input][tap.call] = tap
        handles = []
        with exclusive(self.model):
            try:
                for place, wanted in taps.items():
                    layer, before = place
                    module = self.model.get_submodule(layer)
                    register = module.register_forward_pre_hook if before else module.register_forward_hook
                    handles.append(register(hook(place, wanted)))
                yield seen
            finally:
                for handle in handles:
                    handle.remove()


def _check_position(name: str, term: Term, tensor: Tensor) -> None:
    free = [size for axis, size in enumerate(tensor.shape) if axis not in (0, term.layout.axis)]
    assert term.position is not None
    if len(free) != len(term.position) or any(p >= size for p, size in zip(term.position, free, strict=True)):
        raise ValueError(
            f'{name!r}: position {term.position} is outside {tuple(free)}, the positions of {term.tap.layer!r}'
        )


def check(function: ScoreFunction, result: Probe) -> None:
    """Scores must be finite, reach the image, depend on their own image only and be the same at the next pass.

    Raises:
        ValueError: Those of a node are not.
    """
    _check_values(function, result)
    if function._reads:
        _check_repeatable(function, result.images.detach())


def _check_values(function: ScoreFunction, result: Probe) -> None:
    """Runs each distinct place once: finite, differentiable, and image 0's score not moved by image 1."""
    checked: set[Any] = set()
    for node in function.nodes:
        name = node.name
        for term in node.terms:
            tensor = result.read(term.tap)
            tensor = tensor.unflatten(0, (len(result.images), -1)) if term.layout.windows else tensor
            _check_finite(name, term.read(tensor))
            if (term.tap, term.layout) not in checked:
                checked.add((term.tap, term.layout))
                _check_independent(name, weighted_scores(tensor), result.images)
        for _, call in node.calls:
            images = result.images.detach().requires_grad_()
            with torch.enable_grad():
                score = call(images)
            if not isinstance(score, Tensor) or score.shape != images.shape[:1]:
                got = list(score.shape) if isinstance(score, Tensor) else type(score).__name__
                raise ValueError(f'{name!r} returns {got} for {len(images)} images: it must return a tensor [n]')
            _check_finite(name, score)
            _check_independent(name, score, images)


def _check_repeatable(function: ScoreFunction, images: Tensor) -> None:
    """Reads each layer twice on the same images: what differs by more than rounding is random."""

    def values() -> dict[Tap, Tensor]:
        found: dict[Tap, Tensor] = {}
        with torch.no_grad():
            function._forward(images.clone(), lambda tap, tensor: found.update({tap: tensor.clone()}))
        return found

    first, second = values(), values()
    for tap, tensor in first.items():
        rounding = torch.finfo(tensor.dtype).eps ** 0.5 * tensor.abs().max()
        if (tensor - second[tap]).abs().max() > rounding:
            name = function.nodes[function._reads[tap][0][0]].name
            raise ValueError(
                f'the score of {name!r} differs between two passes on the same images: the network draws random '
                'numbers in eval mode, such as dropout with training=True, and has no density: switch them off'
            )


def _check_finite(name: str, score: Tensor) -> None:
    if not bool(torch.isfinite(score).all()):
        raise ValueError(f'the score of {name!r} is not finite ({score.tolist()} on two random images)')


def _check_independent(name: str, score: Tensor, images: Tensor) -> None:
    slope = grad(score[0], images)
    if slope is None:
        raise ValueError(f'the score of {name!r} has no gradient with respect to the image')
    own, other = slope.abs().flatten(1).amax(1).tolist()
    if other > 1e-6 * own:
        raise ValueError(f'the score of {name!r} for one image depends on another image: its layer mixes the batch')
