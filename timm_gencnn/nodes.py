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

The score of an activation module is its input, since a unit behind a ReLU may have no gradient; so is that of any layer
that returns what an activation module inside it puts out, alone or beside others': fused norm + activation layers, the
blocks of most residual networks, Inception's and SqueezeNet's. Any other module's score is its output. Inside windowed
attention the positions are (window, ...). Knows nothing of sampling.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from timm.data.dataset_info import DatasetInfo
from torch import nn

from .layouts import Layout, activations_in, class_tap, layout_of, measure_receptive_field, preactivation
from .model_config import labels_for
from .names import Names, Node, Parsed, Unit, class_name, find_class, find_layer, parse, sum_name
from .probes import Probe, Size, Tap, check_model, probe_for, probe_until
from .scores import NodeScore, ScoreFunction, Term, check


@torch.inference_mode(False)  # axes are measured by gradients, also under torch.no_grad()
def resolve(model: nn.Module, nodes: Node | Sequence[Node], *, size: Size | None = None) -> ScoreFunction:
    """Score function of one node or a list of nodes of any network.

    Two random images run through the model to find the axes, and to check that each score is finite, reaches the image,
    depends on its own image only and, but for callables, is the same the next time. Parameters, gradients and hooks of
    the model are left as they were.

    Args:
        model: Any module that takes images [N, C, H, W], in eval mode.
        nodes: A node or a list of nodes; the module's docstring has the grammar.
        size: Image side or (height, width) in pixels; one that the whole model refuses will do if all nodes are in
            layers that take it. None takes the model's own size or, if all nodes are channels of early convolutions,
            their receptive field and a margin of half of it (rounded up to the stride).

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
    result, _ = probe_for(model, lambda whole: places_of(whole, parsed), size)
    own = result.images.shape[2], result.images.shape[3]

    resolver = _Resolver(model, result)
    scored = [resolver.node(members) for members in parsed]
    function = ScoreFunction(model, scored, own, result.images.shape[1], result.images.dtype)
    check(function, result)
    if size is None and not any(node.calls for node in scored):
        function.size = _early_size(result, [term for node in scored for term in node.terms]) or own
    return function


class _Resolver:
    """Turns parsed terms into places, with one probe of the model for all of them."""

    def __init__(self, model: nn.Module, result: Probe):
        self.model, self.result = model, result
        self.layouts: dict[tuple[Tap, int | None], Layout] = {}
        self.activations: dict[tuple[Tap, Layout], list[tuple[Tap, range]]] = {}
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
            tap = class_tap(self.result)
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
        return Term(*self.before_activation(tap, layout, unit.channel), unit.position, weight), unit.name

    def before_activation(self, tap: Tap, layout: Layout, channel: int) -> tuple[Tap, Layout, int]:
        """Where a channel is before the activation inside its layer that puts it out, or where it is."""
        if (tap, layout) not in self.activations:
            self.activations[tap, layout] = activations_in(self.result, tap, layout)
        for place, channels in self.activations[tap, layout]:
            if channel in channels:
                shape = (*layout.shape[: layout.axis - 1], len(channels), *layout.shape[layout.axis :])
                return place, replace(layout, shape=shape), channel - channels.start
        return tap, layout, channel


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
        small = probe_until(result, [term.tap for term in terms], (sides[0], sides[1]))
        if any(layout_of(small, term.tap, term.layout.axis).shape[0] != term.layout.channels for term in terms):
            return None
    except ValueError:  # the layers so far take no image as small as that: keep the model's own size
        return None
    return sides[0], sides[1]


@torch.inference_mode(False)
def receptive_field(model: nn.Module, layer: str, *, size: Size | None = None) -> tuple[int, int]:
    """Height and width in pixels of what the central unit of a convolutional layer depends on, by its gradient.

    Args:
        model: Any module that takes images [N, C, H, W], in eval mode.
        layer: Dotted name of a layer with an NCHW output.
        size: Image side or (height, width), which the layer must take and the whole model need not; None is the model's
            own. The result is at most this.

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
