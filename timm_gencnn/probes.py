"""Forward passes of two random images in which every module's output is recorded: what a model takes and puts out.

Knows nothing of node names, nor of what the axes of an output mean.
"""

import operator
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .model_config import own_channels, own_size

Size = int | tuple[int, int]
PROBES = 2  # images per probe: one whose score is read, one that must not change it


class StopForward(Exception):
    """Raised by a hook to end a forward pass at the last layer that is needed."""


@dataclass
class Call:
    """One call of one module in the probe's forward pass."""

    module: nn.Module
    input: Any
    output: Any
    params: int  # how many per-channel parameters had run when this call returned
    version: int | None  # of the output, when this call returned: what works in place later moves it on


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
    noise = seeded(torch.randn, (PROBES, in_chans, *size), 0)
    result = Probe(model, noise.to(reference).requires_grad_(), stop)

    rows: dict[str, list[tuple[nn.Module, Tensor]]] = {}  # per-channel parameters of each module itself

    def enter(name: str) -> Any:
        return lambda module, args: result.params.extend(rows[name])

    def record(name: str) -> Any:
        children = [f'{name}.{child}'.lstrip('.') for child, _ in model.get_submodule(name).named_children()]

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            for own in name, *children:  # torch's attention takes the weights of a child that it does not call
                if own == name or own not in result.calls:
                    result.params.extend(rows.get(own, ()))
            calls = result.calls.setdefault(name, [])
            counted = isinstance(output, Tensor) and not output.is_inference()  # as of a table that is kept
            version = output._version if counted else None
            calls.append(Call(module, args[0] if args else None, output, len(result.params), version))
            result.order.append(name)
            if stop == (name, len(calls) - 1):
                raise StopForward

        return hook

    handles = []
    try:
        for name, module in model.named_modules():
            rows[name] = []
            for key, p in module.named_parameters(name, recurse=False):
                rowwise = isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and key.endswith('weight')
                if key in params and p.is_floating_point() and (p.ndim == 1 or rowwise) and p.shape[0] > 1:
                    rows[name].append((module, params[key].requires_grad_()))
            if rows[name] and next(module.children(), None) is not None:  # used before, between or after its children
                handles.append(module.register_forward_pre_hook(enter(name)))
            handles.append(module.register_forward_hook(record(name)))
        with torch.enable_grad(), without_checkpointing(model):  # a backward pass would recompute without the aliases
            functional_call(model, params, (result.images.clone(),))  # a copy: a model may normalise in place
    except StopForward:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return result


def seeded(draw: Callable[..., Tensor], shape: Sequence[int], seed: int) -> Tensor:
    """Numbers of a generator of their own, on the CPU whatever the default device is."""
    return draw(tuple(shape), generator=torch.Generator().manual_seed(seed), device='cpu')


def _check_size(size: Any) -> tuple[int, int]:
    pair = size if isinstance(size, (tuple, list)) else (size, size)
    try:
        height, width = map(operator.index, pair)  # integers of numpy and torch, too
    except (TypeError, ValueError):
        height = width = 0
    if min(height, width) < 1:
        raise ValueError(f'size {size!r} is not a positive height and width in pixels, such as (224, 224)')
    return height, width


def check_model(model: nn.Module) -> None:
    """Refuses what takes no hooks, has no weights or couples its images."""
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError('a TorchScript module takes no hooks: give the Python module that it was made from')
    if isinstance(model, nn.DataParallel):
        raise ValueError('a DataParallel model splits its batches: give the module inside, model.module')
    if any(p.is_meta for p in model.parameters()):
        raise ValueError('the model has no weights (its device is meta): load them first')
    if any(p.is_inference() for p in model.parameters()):
        raise ValueError(
            'weights that were made under torch.inference_mode have no gradients: make, move and convert the model '
            'outside of it'
        )
    training = next((name or 'the model' for name, module in model.named_modules() if module.training), None)
    if training is not None:
        raise ValueError(f'{training} is in train mode, where images change one another: call model.eval() first')


class Refused(ValueError):
    """The model, or the part of it that was asked for, takes no images of this shape."""


def _try(model: nn.Module, in_chans: int, size: tuple[int, int], stop: tuple[str, int] | None = None) -> Probe:
    try:
        with exclusive(model):
            return probe(model, in_chans, size, stop=stop)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a foreign forward raises on an image that it cannot take
        raise Refused((str(error).strip() or type(error).__name__).splitlines()[0]) from error


def _first_probe(model: nn.Module, size: Any) -> Probe:
    """Probes the model on images of its own size, or of the one that was asked for."""
    own = own_size(model)
    side = _check_size(size) if size is not None else own or (224, 224)
    refusals, tried = [], own_channels(model)
    for chans in tried:
        try:
            return _try(model, chans, side)
        except Refused as refusal:
            refusals.append(refusal)
    remedy = f"the model's own size is {own[0]} x {own[1]}" if own and side != own else 'give size=(height, width)'
    if own is None:
        remedy += ", or state all of it: model.pretrained_cfg = {'input_size': (channels, height, width)}"
    raise Refused(
        f'the model refuses {side[0]} x {side[1]} images of {tried[0]} channel(s) ({refusals[0]}): {remedy}'
    ) from refusals[0].__cause__


def probe_for(
    model: nn.Module, places: Callable[[Probe], dict[str, Tap]], size: Size | None
) -> tuple[Probe, dict[str, Tap]]:
    """Probes the model, or only as far as some layers if it refuses the size as a whole.

    Args:
        model: Any module that takes images [N, C, H, W], in eval mode.
        places: From a probe of the whole model the calls that are needed, by name; none if that is the model's output.
        size: Image side or (height, width) in pixels; None is the model's own.

    Returns:
        The probe at that size, and the places.

    Raises:
        Refused: The last of the places cannot be reached at this size.
    """
    try:
        result = _first_probe(model, size)
        return result, places(result)
    except Refused:
        if size is None:
            raise
        with suppress(Refused):
            whole = _first_probe(model, None)  # says what runs when
            if found := places(whole):
                return probe_until(whole, found.values(), _check_size(size)), found
        raise


def probe_until(result: Probe, taps: Iterable[Tap], size: tuple[int, int]) -> Probe:
    """Probes the model once more, at another size, until the last of `taps` has run.

    Raises:
        Refused: They do not run at this size.
    """

    def place(tap: Tap) -> int:
        return [i for i, name in enumerate(result.order) if name == tap.layer][tap.call]

    last = max(taps, key=place)
    small = _try(result.model, result.images.shape[1], size, (last.layer, last.call))
    if any(tap.call >= len(small.calls.get(tap.layer, [])) for tap in taps):
        raise Refused('other layers run at this size')
    return small
