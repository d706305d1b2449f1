"""Where in a recorded pass a node is read, and what the axes are there: channels, rows and columns, tokens.

Knows nothing of node names. The channel axis is not guessed from a shape: it is the axis along which a slice of the
layer's output depends on one single entry of the last per-channel parameter (bias, norm weight, row of a weight matrix)
that ran before it. That holds for NCHW, NHWC and token layouts alike, and is read off exact zeros of a gradient.
"""

import threading
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .probes import PROBES, Call, Probe, Tap, class_logits, seeded

LOOK_BACK = 24  # how many parameters to go back for evidence of a channel axis
_SWITCHING = threading.Lock()  # cuDNN is off for all threads: two that switch it would not put it back as it was


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


def activates(call: Call) -> bool:
    """Whether a call is that of an activation, of a tensor whose shape it keeps."""
    given, made = call.input, call.output
    both = isinstance(given, Tensor) and isinstance(made, Tensor)
    return both and given.shape == made.shape and is_activation(call.module)


def preactivation(result: Probe, tap: Tap) -> Tap:
    """An activation's input in the place of its output."""
    return replace(tap, input=True) if activates(result.calls[tap.layer][tap.call]) else tap


def activations_in(result: Probe, tap: Tap, layout: Layout) -> list[tuple[Tap, range]]:
    """Inputs of the activations whose outputs a layer returns, whole or side by side, and its channels that they are.

    Such outputs, unless something worked in place on them, are there with their values, and the gradient of a weighted
    sum of the layer's output is the weights.
    """
    tensor, axis = result.read(tap), layout.axis - layout.windows
    inside = {
        Tap(name, number, input=True): call.output
        for name, calls in result.calls.items()
        if name.startswith(f'{tap.layer}.')
        for number, call in enumerate(calls)
        if activates(call)
        and call.output.requires_grad
        and call.output.ndim == tensor.ndim
        and call.output._version == call.version
    }
    if not inside or not tensor.requires_grad:
        return []
    weight = seeded(torch.randn, tensor.shape, 3).to(tensor)
    slopes = torch.autograd.grad((tensor * weight).sum(), list(inside.values()), retain_graph=True, allow_unused=True)
    found = []
    for (place, output), slope in zip(inside.items(), slopes, strict=True):
        width = output.shape[axis]
        for first in range(tensor.shape[axis] - width + 1) if slope is not None else ():
            own, values = (t.narrow(axis, first, width) for t in (weight, tensor))
            if torch.equal(slope, own) and torch.equal(output, values):
                found.append((place, range(first, first + width)))
    return found


def layout_of(result: Probe, tap: Tap, axis: int | None = None) -> Layout:
    """Axes of the tensor at `tap`, with errors that name its layer."""
    try:
        return find_layout(result, tap, axis)
    except ValueError as error:
        what = f'layer {tap.layer!r}' if tap.layer else "the model's output"
        hint = f", name it as '{tap.layer}:axis1=17'" if tap.layer and 'which axis' in str(error) else ''
        raise ValueError(f'{what} cannot be read: {error}{hint}') from None


def class_tap(result: Probe) -> Tap:
    """Where the raw logits are: the model's output, unless that is the mean of an activation's output.

    A class behind a last ReLU (SqueezeNet) has no gradient on most images, and a last softmax couples the classes; in
    both cases the logit is taken to be the mean of that activation's input.
    """
    logits = class_logits(result.calls[''][0].output)
    for name in reversed(result.order):
        tap = Tap(name, len(result.calls[name]) - 1)
        call = result.calls[name][-1]
        if not is_activation(call.module):
            continue
        tensor = call.output
        if isinstance(tensor, Tensor) and isinstance(call.input, Tensor) and tensor.shape[:2] == logits.shape[:2]:
            means = tensor.flatten(2).mean(2) if tensor.ndim > 2 else tensor
            if logits.ndim == 2 and torch.allclose(means, logits, rtol=1e-4, atol=1e-6):
                return replace(tap, input=True)
        break
    return Tap('')


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


def _weighted(part: Tensor) -> Tensor:
    """A sum with random weights, so that what a normalisation keeps constant does not cancel."""
    weight = seeded(torch.rand, part.shape, 1).to(part) + 0.5
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
    weight = seeded(torch.randn, unit.shape, 2).to(unit)
    cudnn = torch.backends.cudnn
    with _SWITCHING:
        enabled, cudnn.enabled = cudnn.enabled, False  # its fast convolutions leave rounding errors in place of zeros
        try:  # not cudnn.flags, which fails where somebody has set the precision of convolutions alone
            slope = grad((unit * weight).sum(), result.images)
        finally:
            cudnn.enabled = enabled
    if slope is None or not slope.any():
        return result.images.shape[2], result.images.shape[3]
    seen = (slope != 0).flatten(0, 1).any(0)
    rows, cols = seen.any(1).nonzero(), seen.any(0).nonzero()
    return int(rows[-1] - rows[0]) + 1, int(cols[-1] - cols[0]) + 1
