"""A node's name -> its score function: images [N, C, H, W] -> scores [N].

| Node                            | Score                                                                      |
|---------------------------------|----------------------------------------------------------------------------|
| `207`, `'207'`, `'goldfish'`    | logit of a class, by index or by name (mean over space if it is a map)      |
| `'layer3.1.conv2:17'`           | channel 17 of a layer, mean over all positions or tokens                    |
| `'layer3.1.conv2:17@4,4'`       | the same channel at row 4, column 4                                         |
| `'blocks.5:17@3'`               | the same channel at token 3 (class and register tokens are counted)         |
| `'relu#2:17'`                   | the second call of a module that runs more than once per forward pass       |
| `'layer:axis1=17'`              | the channel axis given by hand (0 is the batch), where it cannot be measured |
| `'207 + 0.5*layer3.1.conv2:17'` | weighted sum; also the dictionary `{207: 1.0, 'layer3.1.conv2:17': 0.5}`    |
| a callable                      | its own value: images [n, C, H, W] -> [n]                                   |
| a list of these                 | one node for each group of contiguous images                                |

The score of an activation module is its input, since a unit behind a ReLU may have no gradient; the same holds for the
fused norm + activation layers of timm. Any other module's score is its output. Inside windowed attention the positions
are (window, ...). Knows nothing of sampling.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from timm.data.dataset_info import DatasetInfo
from torch import Tensor, nn

from .layouts import (
    Layout,
    Probe,
    Tap,
    class_logits,
    exclusive,
    find_layout,
    is_activation,
    measure_receptive_field,
    probe,
)
from .model_config import labels_for, own_channels, own_size
from .names import Names, Node, Parsed, Unit, class_name, find_class, find_layer, parse, sum_name
from .scores import NodeScore, ScoreFunction, Term, check


def _check_size(size: Any) -> tuple[int, int]:
    sides = (size, size) if isinstance(size, int) else size
    valid = (
        isinstance(sides, (tuple, list)) and len(sides) == 2 and all(type(side) is int and side > 0 for side in sides)
    )
    if not valid:
        raise ValueError(f'size {size!r} is not a positive height and width in pixels, such as (224, 224)')
    return sides[0], sides[1]


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


def _probe(model: nn.Module, in_chans: int, size: tuple[int, int], stop: tuple[str, int] | None = None) -> Probe:
    try:
        with exclusive(model):
            return probe(model, in_chans, size, stop=stop)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a foreign forward raises on an image that it cannot take
        raise Refused((str(error).strip() or type(error).__name__).splitlines()[0]) from error


def _first_probe(model: nn.Module, size: Any, in_chans: int | None) -> Probe:
    """Probes the model on its own image, or on the one that was asked for."""
    if in_chans is not None and (type(in_chans) is not int or in_chans < 1):
        raise ValueError(f'in_chans {in_chans!r} is not a positive number of channels')
    own = own_size(model)
    side = _check_size(size) if size is not None else own or (224, 224)
    refusals = []
    tried = [in_chans] if in_chans else own_channels(model)
    for chans in tried:
        try:
            return _probe(model, chans, side)
        except Refused as refusal:
            refusals.append(refusal)
    remedy = f"the model's own size is {own[0]} x {own[1]}" if own and side != own else 'give size=(height, width)'
    if own is None:
        remedy += ", or state all of it: model.pretrained_cfg = {'input_size': (channels, height, width)}"
    raise Refused(
        f'the model refuses {side[0]} x {side[1]} images of {tried[0]} channel(s) ({refusals[0]}): {remedy}'
    ) from refusals[0].__cause__


def probe_for(
    model: nn.Module,
    places: Callable[[Probe], dict[str, Tap]],
    size: tuple[int, int] | None,
    in_chans: int | None = None,
) -> tuple[Probe, dict[str, Tap]]:
    """Probes the model, or only as far as some layers if it refuses the size as a whole.

    Args:
        model: Any module that takes images [N, C, H, W], in eval mode.
        places: From a probe of the whole model the calls that are needed, by name; none if that is the model's output.
        size: Image height and width in pixels; None is the model's own.
        in_chans: Image channels; None tries the likely ones.

    Returns:
        The probe at that size, and the places.

    Raises:
        Refused: The last of the places cannot be reached at this size.
    """
    try:
        result = _first_probe(model, size, in_chans)
        return result, places(result)
    except Refused:
        if size is None:
            raise
        with suppress(Refused):
            whole = _first_probe(model, None, in_chans)  # says what runs when
            if found := places(whole):
                return _probe_until(whole, found.values(), _check_size(size)), found
        raise


def _probe_until(result: Probe, taps: Iterable[Tap], size: tuple[int, int]) -> Probe:
    """Probes the model once more, at another size, until the last of `taps` has run.

    Raises:
        Refused: They do not run at this size.
    """

    def place(tap: Tap) -> int:
        return [i for i, name in enumerate(result.order) if name == tap.layer][tap.call]

    last = max(taps, key=place)
    small = _probe(result.model, result.images.shape[1], size, (last.layer, last.call))
    if any(tap.call >= len(small.calls.get(tap.layer, [])) for tap in taps):
        raise Refused('other layers run at this size')
    return small


def places_of(result: Probe, parsed: Iterable[Parsed]) -> dict[str, Tap]:
    """The calls of the layers that nodes name; none if one of the nodes needs the whole model."""
    units = [unit for node in parsed for _, unit in node]
    named = [unit for unit in units if isinstance(unit, Unit) and unit.layer]
    return {unit.text: call_of(result, unit) for unit in named} if len(named) == len(units) else {}


def call_of(result: Probe, unit: Unit) -> Tap:
    """The call of its layer that a unit names."""
    assert unit.layer is not None
    calls = result.calls.get(unit.layer)
    if not calls:
        raise ValueError(f'layer {unit.layer!r} does not run in a forward pass: see list_nodes(model)')
    number = 1 if unit.call is None else unit.call
    if unit.call is None and len(calls) > 1:
        raise ValueError(
            f'layer {unit.layer!r} runs {len(calls)} times in a forward pass: '
            f"name one call, '{unit.layer}#1:{unit.channel}' to '{unit.layer}#{len(calls)}:{unit.channel}'"
        )
    if not 1 <= number <= len(calls):
        raise ValueError(f'{unit.text!r}: layer {unit.layer!r} has calls #1 to #{len(calls)}')
    return Tap(unit.layer, number - 1)


def preactivation(result: Probe, tap: Tap) -> Tap:
    """An activation's input in the place of its output; the same inside timm's fused norm + activation layers."""
    call = result.calls[tap.layer][tap.call]
    act = getattr(call.module, 'act', None)
    if type(call.module).__module__.startswith('timm.layers') and 'Norm' in type(call.module).__name__:
        inner = result.calls.get(f'{tap.layer}.act', [])
        if isinstance(act, nn.Module) and is_activation(act) and len(inner) == len(result.calls[tap.layer]):
            return preactivation(result, Tap(f'{tap.layer}.act', tap.call))
    same = isinstance(call.input, Tensor) and isinstance(call.output, Tensor) and call.input.shape == call.output.shape
    return replace(tap, input=True) if is_activation(call.module) and same else tap


def layout_of(result: Probe, tap: Tap, axis: int | None = None) -> Layout:
    """Axes of the tensor at `tap`, with errors that name its layer."""
    try:
        return find_layout(result, tap, axis)
    except ValueError as error:
        what = f'layer {tap.layer!r}' if tap.layer else "the model's output"
        hint = f", name it as '{tap.layer}:axis1=17'" if tap.layer and 'which axis' in str(error) else ''
        raise ValueError(f'{what} cannot be read: {error}{hint}') from None


def _class_tap(result: Probe) -> Tap:
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


class _Resolver:
    """Turns parsed terms into places, with one probe of the model for all of them."""

    def __init__(self, model: nn.Module, result: Probe):
        self.model, self.result = model, result
        self.layouts: dict[tuple[Tap, int | None], Layout] = {}
        self._classes: tuple[Tap, Layout, DatasetInfo | None] | None = None

    def layout(self, tap: Tap, axis: int | None = None) -> Layout:
        if (tap, axis) not in self.layouts:
            self.layouts[tap, axis] = layout_of(self.result, tap, axis)
        return self.layouts[tap, axis]

    @property
    def classes(self) -> tuple[Tap, Layout, DatasetInfo | None]:
        if self._classes is None:
            if getattr(self.model, 'num_classes', None) == 0:
                raise ValueError("the model has no classifier (num_classes=0): name a layer, 'layer:channel'")
            tap = _class_tap(self.result)
            layout = self.layout(tap)
            self._classes = tap, layout, labels_for(self.model, layout.channels)
        return self._classes

    def node(self, members: Parsed) -> NodeScore:
        """The score of a parsed node."""
        terms, calls, labels = [], [], []
        for weight, member in members:
            if isinstance(member, Unit):
                term, name = self.unit(weight, member) if member.layer else self.logit(weight, member)
                terms.append(term)
            else:
                calls.append((weight, member))
                name = getattr(member, '__name__', type(member).__name__)
            labels.append((weight, name))
        return NodeScore(sum_name(labels), terms, calls)

    def logit(self, weight: float, unit: Unit) -> tuple[Term, str]:
        """A class logit and its canonical name."""
        tap, layout, labels = self.classes
        index = find_class(unit, layout.channels, labels)
        return Term(tap, layout, index, None, weight, of_class=True), class_name(index, labels)

    def unit(self, weight: float, unit: Unit) -> tuple[Term, str]:
        """A unit of a layer and its canonical name."""
        tap = preactivation(self.result, call_of(self.result, unit))
        layout = self.layout(tap, unit.axis)
        assert isinstance(unit.channel, int)
        if unit.channel >= layout.channels:
            raise ValueError(
                f'{unit.text!r}: channel {unit.channel} is out of range, {unit.layer!r} has 0 to {layout.channels - 1}'
            )
        if unit.position is not None:
            inside = [0 <= p < size for p, size in zip(unit.position, layout.positions, strict=False)]
            if len(unit.position) != len(layout.positions) or not all(inside):
                raise ValueError(
                    f'{unit.text!r}: position {",".join(map(str, unit.position))} is out of range, '
                    f'{unit.layer!r} has positions {" x ".join(map(str, layout.positions)) or "none"} ({layout})'
                )
        return Term(tap, layout, unit.channel, unit.position, weight), unit.name


@torch.inference_mode(False)  # axes are measured by gradients, also under torch.no_grad()
def resolve(
    model: nn.Module,
    nodes: Node | Sequence[Node],
    *,
    size: tuple[int, int] | None = None,
    in_chans: int | None = None,
) -> ScoreFunction:
    """Score function of one node or a list of nodes of any network.

    Two random images run through the model to find the axes, and to check that each score is finite, reaches the image,
    depends on its own image only and, but for callables, is the same the next time. Parameters, gradients and hooks of
    the model are left as they were.

    Args:
        model: Any module that takes images [N, C, H, W], in eval mode.
        nodes: A node or a list of nodes; the module's docstring has the grammar.
        size: Image height and width in pixels; one that the whole model refuses will do if all nodes are in layers that
            take it. None takes the model's own size or, if all nodes are channels of early convolutions, their
            receptive field and a margin of half of it (rounded up to the stride).
        in_chans: Image channels; None tries those of the first convolution and of the model's configuration.

    Returns:
        A function of images [N, C, H, W] -> scores [N].

    Raises:
        ValueError: The model is in train mode or refuses the size; a class, layer, channel or position does not exist
            or is ambiguous; a score is not finite, cannot be differentiated, mixes images or is random.
    """
    check_model(model)
    wanted = list(nodes) if isinstance(nodes, (list, tuple, range)) else [nodes]
    if not wanted:
        raise ValueError('an empty list of nodes given: name at least one')
    known = Names(model)
    parsed = [parse(node, known) for node in wanted]
    result, _ = probe_for(model, lambda whole: places_of(whole, parsed), size, in_chans)
    own = result.images.shape[2], result.images.shape[3]

    resolver = _Resolver(model, result)
    scored = [resolver.node(members) for members in parsed]
    function = ScoreFunction(model, scored, own, result.images.shape[1], result.images.dtype)
    check(function, result)
    if size is None and not any(node.calls for node in scored):
        function.size = _early_size(result, [term for node in scored for term in node.terms]) or own
    return function


def _early_size(result: Probe, terms: list[Term]) -> tuple[int, int] | None:
    """Receptive field and margin, if all terms are channel maps that see less than half of the image."""
    sides = [0, 0]
    if any(not term.tap.layer or term.position is not None or str(term.layout) != 'NCHW' for term in terms):
        return None
    for tap in {term.tap for term in terms}:
        tensor = result.read(tap)
        field = measure_receptive_field(result.filled, result.filled.read(tap))
        for axis, seen in enumerate(field):
            full, steps = result.images.shape[axis + 2], tensor.shape[axis + 2]
            stride = max(round(full / steps), 1)
            sides[axis] = max(sides[axis], -(-(seen + seen // 2) // stride) * stride)
            if 2 * sides[axis] > full:
                return None
    try:
        small = _probe_until(result, [term.tap for term in terms], (sides[0], sides[1]))
        if any(layout_of(small, term.tap, term.layout.axis).shape[0] != term.layout.channels for term in terms):
            return None
    except ValueError:  # the layers so far take no image as small as that: keep the model's own size
        return None
    return sides[0], sides[1]


@torch.inference_mode(False)
def receptive_field(model: nn.Module, layer: str, *, size: tuple[int, int] | None = None) -> tuple[int, int]:
    """Height and width in pixels of what the central unit of a convolutional layer depends on, by its gradient.

    Args:
        model: Any module that takes images [N, C, H, W], in eval mode.
        layer: Dotted name of a layer with an NCHW output.
        size: Image height and width, which the layer must take and the whole model need not; None is the model's own.
            The result is at most this.

    Raises:
        ValueError: The layer does not exist, or refuses the size, or its output is not [N, C, H, W].
    """
    check_model(model)
    unit = Unit(find_layer(layer, Names(model).layers), 0, text=layer)
    result, places = probe_for(model, lambda whole: places_of(whole, [[(1.0, unit)]]), size)
    tap = preactivation(result, places[layer])
    layout = layout_of(result, tap)
    if str(layout) != 'NCHW':
        raise ValueError(f'layer {layer!r} has layout {layout}: only an NCHW layer has a receptive field')
    return measure_receptive_field(result.filled, result.filled.read(tap))
