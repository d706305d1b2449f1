"""What the modules of a network put out, found by one probing forward pass: shapes, channel axes, receptive fields.

Knows nothing of node names. The channel axis is not guessed from a shape: it is the axis along which a slice of the
layer's output depends on one single entry of the last per-channel parameter (bias, norm weight, row of a weight matrix)
that ran before it. That holds for NCHW, NHWC and token layouts alike, and is read off exact zeros of a gradient.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call

PROBES = 2  # images per probe: one whose score is read, one that must not change it
LOOK_BACK = 24  # how many parameters to go back for evidence of a channel axis


class StopForward(Exception):
    """Raised by a hook to end a forward pass at the last layer that is needed."""


@dataclass
class Call:
    """One call of one module in the probe's forward pass."""

    module: nn.Module
    input: Any
    output: Any
    params: int  # how many per-channel parameters had run when this call returned


@dataclass(frozen=True)
class Tap:
    """Where a hook reads: the output (or the input) of one call of a module; '' is the model itself."""

    layer: str
    call: int = 0
    input: bool = False


@dataclass
class Probe:
    """A recorded forward pass of two random images; `calls[name]` lists the calls of a module in order.

    Where `stop` is given, the pass ended after that call of that module.
    """

    model: nn.Module
    images: Tensor
    stop: tuple[str, int] | None = None
    calls: dict[str, list[Call]] = field(default_factory=dict)
    params: list[tuple[nn.Module, Tensor]] = field(default_factory=list)
    order: list[str] = field(default_factory=list)
    _filled: 'Probe | None' = field(default=None, init=False, repr=False)

    def read(self, tap: Tap) -> Tensor:
        """The tensor at `tap`; its first axis is the batch."""
        call = self.calls[tap.layer][tap.call]
        tensor = call.input if tap.input else single_tensor(call.output) if tap.layer else class_logits(call.output)
        if tensor is None:
            raise ValueError(f'it returns a {type(call.output).__name__}, not one tensor: name a layer inside it')
        return tensor

    @property
    def filled(self) -> 'Probe':
        """The same pass with 0.1 for every zero gain and bias: branches that start at zero are seen."""
        if self._filled is None:  # no cached_property: until Python 3.12 its lock is one for all, and would cross ours
            size = self.images.shape[2], self.images.shape[3]
            with exclusive(self.model):
                self._filled = probe(self.model, self.images.shape[1], size, stop=self.stop, fill=True)
        return self._filled


@dataclass(frozen=True)
class Layout:
    """Axes of a layer's output: `shape` without the batch, `axis` of the channels (0: batch), windows unfolded."""

    shape: tuple[int, ...]
    axis: int
    windows: bool = False

    @property
    def channels(self) -> int:
        return self.shape[self.axis - 1]

    @property
    def positions(self) -> tuple[int, ...]:
        return self.shape[: self.axis - 1] + self.shape[self.axis :]

    def __str__(self) -> str:
        free = len(self.shape) - 1 - self.windows
        letters = ['W'] * self.windows + {0: [], 1: ['L'], 2: ['H', 'W']}.get(free, [f'D{i}' for i in range(free)])
        letters.insert(self.axis - 1, 'C')
        return f'(NW){"".join(letters[1:])}' if self.windows else f'N{"".join(letters)}'


def is_activation(module: nn.Module) -> bool:
    """Whether `module` is an elementwise activation or a softmax of torch or timm."""
    places = 'torch.nn.modules.activation', 'timm.layers.activations', 'timm.layers.activations_me'
    return type(module).__module__ in places and not isinstance(module, (nn.MultiheadAttention, nn.GLU))


def single_tensor(output: Any) -> Tensor | None:
    """The one tensor of a module's output, or None where there is none or more than one."""
    if isinstance(output, Tensor):
        return output
    items: Iterable[Any] = output.values() if isinstance(output, dict) else output
    if not isinstance(output, (dict, tuple, list)):
        return None
    tensors = [item for item in items if isinstance(item, Tensor)]
    return tensors[0] if len(tensors) == 1 else None


def class_logits(output: Any) -> Tensor:
    """The class scores among what a model returns: a tensor, `logits` or `out` of a mapping, the first of a tuple."""
    found = output
    if isinstance(output, Mapping):
        found = next((output[key] for key in ('logits', 'out') if key in output), None)
    elif hasattr(output, 'logits'):
        found = output.logits
    elif isinstance(output, tuple) and output:
        found = output[0]
    if not isinstance(found, Tensor):
        what = f'keys {list(output)}' if isinstance(output, Mapping) else f'a {type(output).__name__}'
        raise ValueError(
            f"the model returns {what}, not class logits: name a layer ('layer:channel') or pass a callable"
        )
    return found


_locks: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


@contextmanager
def exclusive(model: nn.Module) -> Iterator[None]:
    """One thread at a time inside: the hooks and parameters that one puts in place would reach another's passes."""
    with _locks.setdefault(model, threading.RLock()):
        yield


@contextmanager
def without_checkpointing(model: nn.Module) -> Iterator[None]:
    """No module of timm recomputes its activations in the backward pass inside; restored on the way out."""
    modules: list[Any] = [module for module in model.modules() if getattr(module, 'grad_checkpointing', False)]
    try:
        for module in modules:
            module.grad_checkpointing = False
        yield
    finally:
        for module in modules:
            module.grad_checkpointing = True


def probe(
    model: nn.Module,
    in_chans: int,
    size: tuple[int, int],
    *,
    stop: tuple[str, int] | None = None,
    fill: bool = False,
) -> Probe:
    """Runs two random images through `model` and records every module's output with its autograd graph.

    Parameters and their `requires_grad` are untouched: the pass runs on detached aliases, of which only per-channel
    parameters ask for gradients (timm's attention biases must not, since some models cache them in eval mode).

    Args:
        model: Any module that takes a batch of images, in eval mode.
        in_chans: Image channels.
        size: Image height and width in pixels.
        stop: Module name and call index at which the pass ends; None runs the whole model.
        fill: Runs with 0.1 in the place of zero gains and biases, so that a branch that starts at zero is seen.
    """
    params = {name: p.detach() for name, p in model.named_parameters()}
    if fill:
        params = {name: p.where(p != 0, 0.1) if p.ndim < 2 else p for name, p in params.items()}
    reference = next((p for p in params.values() if p.is_floating_point()), torch.empty(0, device='cpu'))
    noise = _seeded(torch.randn, (PROBES, in_chans, *size), 0)
    result = Probe(model, noise.to(reference).requires_grad_(), stop)

    def enter(own: list[str]) -> Any:
        return lambda module, args: result.params.extend((module, params[key]) for key in own)

    def record(name: str, own: list[str]) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            result.params.extend((module, params[key]) for key in own)
            calls = result.calls.setdefault(name, [])
            calls.append(Call(module, args[0] if args else None, output, len(result.params)))
            result.order.append(name)
            if stop == (name, len(calls) - 1):
                raise StopForward

        return hook

    handles = []
    try:
        for name, module in model.named_modules():
            own = []
            for key, p in module.named_parameters(name, recurse=False):
                rows = isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and key.endswith('weight')
                if key in params and p.is_floating_point() and (p.ndim == 1 or rows) and p.shape[0] > 1:
                    params[key].requires_grad_()
                    own.append(key)
            if own and next(module.children(), None) is not None:  # used before, between or after its children
                handles.append(module.register_forward_pre_hook(enter(own)))
            handles.append(module.register_forward_hook(record(name, own)))
        with torch.enable_grad(), without_checkpointing(model):  # a backward pass would recompute without the aliases
            functional_call(model, params, (result.images.clone(),))  # a copy: a model may normalise in place
    except StopForward:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return result


def grad(score: Tensor, target: Tensor) -> Tensor | None:
    """Gradient that keeps the graph; None where `score` does not depend on `target`."""
    if not score.requires_grad:
        return None
    return torch.autograd.grad(score, target, retain_graph=True, allow_unused=True)[0]


def weighted_scores(tensor: Tensor) -> Tensor:
    """One number per image that depends on all of its [N, ...] outputs."""
    return torch.stack([_weighted(part) for part in tensor])


def find_layout(result: Probe, tap: Tap, axis: int | None = None) -> Layout:
    """Layout of the tensor at `tap`, which is [N, ...] or, inside windowed attention, [N * windows, ...].

    Args:
        result: The recorded pass.
        tap: Where to look.
        axis: The channel axis where the user gave it, counted on the tensor as the module returns it.

    Raises:
        ValueError: The batch is not on the first axis, or nothing tells which axis holds the channels.
    """
    tensor = result.read(tap)
    shape = tuple(tensor.shape)
    if shape == (PROBES,):
        raise ValueError(
            'it is one number for each image, without an axis of channels: give a callable as the node, such as the '
            'model itself'
        )
    if len(shape) < 2 or shape[0] % PROBES or not shape[0]:
        raise ValueError(f'its output {list(shape)} for {PROBES} images has no batch on the first axis')
    if axis is not None and not 1 <= axis < len(shape):
        raise ValueError(
            f'axis {axis} is out of range: its output {list(shape)} has channel axes 1 to {len(shape) - 1}'
        )
    if axis is None:
        axis = _typed_axis(result.calls[tap.layer][tap.call].module, tensor)
    if axis is None:
        axis = _measured_axis(result, tap)
    if axis is None:
        axis = _measured_axis(result.filled, tap)
    if not axis:
        raise ValueError(f'its output {list(shape)} does not tell which axis holds the channels')
    if shape[0] > PROBES:
        return Layout((shape[0] // PROBES, *shape[1:]), axis + 1, windows=True)
    return Layout(shape[1:], axis)


def _typed_axis(module: nn.Module, tensor: Tensor) -> int | None:
    """Channel axis of the modules for which torch defines it, checked against the size that the module states."""
    if tensor.ndim == 2:
        return 1
    if isinstance(module, (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)):
        width = next(
            getattr(module, key) for key in ('out_channels', 'num_features', 'num_channels') if hasattr(module, key)
        )
        return 1 if tensor.shape[1] == width else None
    if isinstance(module, nn.Linear) and tensor.shape[-1] == module.out_features:
        return tensor.ndim - 1
    return None


def _measured_axis(result: Probe, tap: Tap) -> int | None:
    """The axis whose slices depend on one entry of the latest parameter, exactly or else by a wide margin.

    0 where the parameters act on no axis alone, None where no parameter has a gradient.
    """
    tensor, ran = result.read(tap), result.calls[tap.layer][tap.call].params
    axes = [axis for axis in range(1, tensor.ndim) if tensor.shape[axis] > 1]
    leading, mixed = None, 0
    for module, param in reversed(result.params[max(ran - LOOK_BACK, 0) : ran]):
        if not _depends(tensor, param):
            continue
        shares = [(_largest_share(tensor, axis, param), axis) for axis in axes]
        known = sorted(((share, axis) for share, axis in shares if share is not None), reverse=True)
        if not known or len(known) < len(axes):
            continue
        (first, axis), second = known[0], known[1][0] if len(known) > 1 else 0.0
        if first > 0.9999 and second < 0.99:
            # Features of a linear layer on the first axis of [N, A, B]: transposed, or a mixer of tokens?
            return 0 if isinstance(module, nn.Linear) and tensor.ndim == 3 and axis == 1 else axis
        if leading is None and first > 0.5 and second < 0.1:
            leading = axis
        mixed += first < 0.5
        if mixed == 2:  # what ran earlier passed through the same mixing
            break
    return leading or (0 if mixed else None)


def _seeded(draw: Callable[..., Tensor], shape: Sequence[int], seed: int) -> Tensor:
    """Numbers of a generator of their own, on the CPU whatever the default device is."""
    return draw(tuple(shape), generator=torch.Generator().manual_seed(seed), device='cpu')


def _weighted(part: Tensor) -> Tensor:
    """A sum with random weights, so that what a normalisation keeps constant does not cancel."""
    weight = _seeded(torch.rand, part.shape, 1).to(part) + 0.5
    return (part * weight).sum()


def _depends(tensor: Tensor, param: Tensor) -> bool:
    slope = grad(_weighted(tensor), param)
    return slope is not None and bool(slope.any())


def _largest_share(tensor: Tensor, axis: int, param: Tensor) -> float | None:
    """How much of a slice's gradient with respect to `param` falls on a single entry: 1 for a channel's own slice.

    Two channels have different entries of their own. A share that stays on one entry is that of a parameter of which
    nothing else is alive, and says nothing (None).
    """
    size = tensor.shape[axis]
    # The slices likely to be alive: the latest branch of a concatenation is mostly its end.
    places = [size - 1, 0, *(size - k for k in (2, 3, 5, 9, 17)), *(size * k // 12 for k in range(11, 0, -1))]
    first: tuple[float, int] | None = None
    for index in dict.fromkeys(place for place in places if place >= 0):
        slope = grad(_weighted(tensor.select(axis, index)), param)
        if slope is None:
            return None
        slope = slope.float().abs()  # a sum of float16 may overflow
        rows = slope.flatten(1).sum(1) if slope.ndim > 1 else slope
        total = float(rows.sum())
        if not 0 < total < float('inf'):
            continue
        share, entry = float(rows.max()) / total, int(rows.argmax())
        if share < 0.5:
            return share
        if first is not None and first[1] != entry:
            return min(first[0], share)
        first = first or (share, entry)
    return None


def measure_receptive_field(result: Probe, tensor: Tensor) -> tuple[int, int]:
    """Height and width in pixels of the image part that the central unit of an NCHW `tensor` depends on."""
    unit = tensor[:, :, tensor.shape[2] // 2, tensor.shape[3] // 2]
    weight = _seeded(torch.randn, unit.shape, 2).to(unit)
    slope = grad((unit * weight).sum(), result.images)
    if slope is None or not slope.any():
        return result.images.shape[2], result.images.shape[3]
    seen = (slope != 0).flatten(0, 1).any(0)
    rows, cols = seen.any(1).nonzero(), seen.any(0).nonzero()
    return int(rows[-1] - rows[0]) + 1, int(cols[-1] - cols[0]) + 1
