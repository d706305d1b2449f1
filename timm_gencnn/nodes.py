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

import argparse
import difflib
import fnmatch
import operator
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import torch
from timm.data import CustomDatasetInfo, ImageNetInfo, infer_imagenet_subset
from timm.data.dataset_info import DatasetInfo
from timm.models import get_model_traits
from torch import Tensor, nn

from .layouts import (
    Layout,
    Probe,
    StopForward,
    Tap,
    class_logits,
    find_layout,
    grad,
    is_activation,
    measure_receptive_field,
    probe,
    single_tensor,
    weighted_scores,
)

Node = int | str | Mapping[Any, float] | Callable[[Tensor], Tensor]

_LAYER = re.compile(
    r'(?P<layer>[^:]*?)(?:#(?P<call>\d+))?:(?:axis(?P<axis>\d+)=)?(?P<channel>\d+)(?:@(?P<position>[\d,\s]+))?'
)
_SIGN = re.compile(r'((?<![\d.]e)\s*\+\s*(?=\S)|\s+-\s+)', re.IGNORECASE)  # not that of 1e+16
_WEIGHT = re.compile(r'(?P<weight>[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)\s*\*\s*(?P<node>.+)', re.IGNORECASE)


# ---------------------------------------------------------------------------------------------------------------------
# Score functions


@dataclass(frozen=True)
class Term:
    """weight * one unit (or the mean of one channel) of the tensor at `tap`."""

    tap: Tap
    layout: Layout
    channel: int
    position: tuple[int, ...] | None = None
    weight: float = 1.0

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


class ScoreFunction:
    """Scores of one or more nodes, images [N, C, H, W] (normalised for the model) -> float32 [N].

    With K nodes the batch is K groups of n = N / K contiguous images, group i scored by node i, all in one forward pass
    that ends at the last layer needed. Nothing is left on the model between calls and nothing waits for the device.

    Attributes:
        names: Canonical name of each node; `resolve` takes it back.
        kinds: 'class', 'layer', 'callable' or 'sum', for each node.
        layers: Dotted names of the layers that each node reads ('' is the model's output).
        notes: What a user should know about each node's score, or ''.
        size: Default image height and width in pixels.
        in_chans: Image channels.
        dtype: Of the model, which images of another one are cast to.
    """

    def __init__(
        self,
        model: nn.Module,
        terms: Sequence[Sequence[Term]],
        calls: Sequence[Sequence[tuple[float, Callable[[Tensor], Tensor]]]],
        names: list[str],
        kinds: list[str],
        notes: list[str],
        size: tuple[int, int],
        in_chans: int,
        dtype: torch.dtype,
    ):
        self.model, self.names, self.kinds, self.notes = model, names, kinds, notes
        self.size, self.in_chans, self.dtype = size, in_chans, dtype
        self.layers = [sorted({term.tap.layer for term in group}) for group in terms]
        self._calls = calls
        self._compiled: Callable[[Tensor], list[Tensor]] | None = None
        self._reads: dict[Tap, list[tuple[int, Term]]] = defaultdict(list)
        for group, members in enumerate(terms):
            for term in members:
                self._reads[term.tap].append((group, term))

    def __call__(self, images: Tensor) -> Tensor:
        """Scores [N] of images [N, C, H, W].

        Raises:
            ValueError: `images` is not a batch that the nodes divide evenly, or too small for a node's position.
        """
        groups = len(self.names)
        if images.ndim != 4 or images.shape[1] != self.in_chans or not len(images) or len(images) % groups:
            raise ValueError(
                f'images of shape {list(images.shape)} given: {groups} node(s) take [N, {self.in_chans}, H, W] '
                f'with N a positive multiple of {groups}'
            )
        n = len(images) // groups
        images = images.to(self.dtype)
        parts: list[list[Tensor]] = [[] for _ in range(groups)]
        if self._reads:
            self._forward(images, parts, n)
        for group, calls in enumerate(self._calls):
            parts[group] += [weight * call(images[group * n : (group + 1) * n]).float() for weight, call in calls]
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

    def _forward(self, images: Tensor, parts: list[list[Tensor]], n: int) -> None:
        if self._compiled:
            for tap, tensor in zip(self._reads, self._compiled(images), strict=True):
                self._read(tap, tensor, parts, n)
            return
        waiting = len(self._reads)

        def read(tap: Tap, tensor: Tensor) -> None:
            nonlocal waiting
            waiting -= 1
            self._read(tap, tensor, parts, n)
            if not waiting:
                raise StopForward

        with self._hooks(read), suppress(StopForward):
            output = self.model(images)
            if (root := Tap('')) in self._reads:
                read(root, class_logits(output))
        if waiting:
            raise ValueError(f'this forward pass did not reach all of {[tap.layer for tap in self._reads]}')

    def _read(self, tap: Tap, tensor: Tensor, parts: list[list[Tensor]], n: int) -> None:
        """Adds what the nodes read at `tap` to their groups' parts, n images each."""
        count = n * len(self.names)
        if self._reads[tap][0][1].layout.windows:
            tensor = tensor.unflatten(0, (count, -1))
        if len(tensor) != count:
            raise ValueError(f'layer {tap.layer!r} splits its {count} images in windows: resolve with size=')
        for group, term in self._reads[tap]:
            part = tensor[group * n : (group + 1) * n]
            if term.position is not None:
                _check_position(self.names[group], term, part)
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

    def __repr__(self) -> str:
        return f'ScoreFunction({self.names}, size={self.size}, in_chans={self.in_chans})'


def _check_position(name: str, term: Term, tensor: Tensor) -> None:
    free = [size for axis, size in enumerate(tensor.shape) if axis not in (0, term.layout.axis)]
    assert term.position is not None
    if len(free) != len(term.position) or any(p >= size for p, size in zip(term.position, free, strict=True)):
        raise ValueError(
            f'{name!r}: position {term.position} is outside {tuple(free)}, the positions of {term.tap.layer!r}'
        )


# ---------------------------------------------------------------------------------------------------------------------
# Names -> terms


@dataclass(frozen=True)
class _Unit:
    """A parsed term: a class (layer None; `channel` its index or name) or a unit of a layer."""

    layer: str | None
    channel: int | str
    position: tuple[int, ...] | None = None
    call: int | None = None
    axis: int | None = None
    text: str = ''


_Parsed = list[tuple[float, '_Unit | Callable[[Tensor], Tensor]']]


class _Names:
    """What a model calls its layers and, if its own configuration names them, its classes."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.layers = [name for name, _ in model.named_modules() if name]

    @cached_property
    def classes(self) -> set[str]:
        """In lower case."""
        labels = _own_labels(self.model)
        if labels is None:
            return set()
        names = ((*_lemmas(labels, index), _class_name(index, labels)) for index in labels.label_indices())
        return {_spaced(name) for forms in names for name in forms}

    def know(self, text: str) -> bool:
        """Whether `text` is one term as it stands, whatever signs are in its name."""
        weighted = _WEIGHT.fullmatch(text)
        text = weighted['node'] if weighted else text
        unit = _LAYER.fullmatch(text)
        return unit['layer'].strip() in self.layers if unit else _spaced(text) in self.classes


def _spaced(text: str) -> str:
    return ' '.join(text.lower().split())


def _parse(node: Any, names: _Names) -> _Parsed:
    """A node of any form as weighted units and callables."""
    if isinstance(node, Mapping):
        if not node:
            raise ValueError('an empty dictionary is no node: give {node: weight, ...}')
        parsed: _Parsed = []
        for member, weight in node.items():
            if isinstance(weight, (str, bytes)) or not torch.isfinite(torch.tensor(float(weight))):
                raise ValueError(f'weight {weight!r} of node {member!r} is not a finite number')
            parsed += [(float(weight) * inner, unit) for inner, unit in _parse(member, names)]
        return parsed
    if isinstance(node, str):
        return _parse_string(node, names)
    if callable(node):
        return [(1.0, node)]
    try:
        if isinstance(node, bool):
            raise TypeError
        return [(1.0, _Unit(None, operator.index(node), text=str(node)))]
    except TypeError:
        kinds = 'an index, a name, a dictionary of weights, a callable or a list of these'
        raise ValueError(f'{node!r} is no node: give {kinds}') from None


def _parse_string(text: str, names: _Names) -> _Parsed:
    if not text.strip():
        raise ValueError("an empty string is no node: give a class or 'layer:channel'")
    parsed: _Parsed = []
    pieces = ['+', *_SIGN.split(text.strip())]  # sign, term, sign, term; some signs may belong to a name
    while pieces:
        sign, *pieces = pieces
        length = next((k for k in range(len(pieces), 1, -2) if names.know(''.join(pieces[:k]))), 1)
        term, pieces = ''.join(pieces[:length]), pieces[length:]
        weighted = _WEIGHT.fullmatch(term)
        weight = float(weighted['weight']) if weighted else 1.0
        unit = _parse_unit(weighted['node'] if weighted else term, names.layers)
        parsed.append((-weight if sign.strip() == '-' else weight, unit))
    return parsed


def _parse_unit(text: str, layers: Sequence[str]) -> _Unit:
    if match := _LAYER.fullmatch(text):
        position = None
        if match['position']:
            if not re.fullmatch(r'\s*\d+\s*(,\s*\d+\s*)*', match['position']):
                raise ValueError(f"{text!r}: a position is '@row,col' or '@token'")
            position = tuple(int(p) for p in match['position'].split(','))
        call = int(match['call']) if match['call'] else None
        axis = int(match['axis']) if match['axis'] else None
        layer = _find_layer(match['layer'].strip(), layers)
        return _Unit(layer, int(match['channel']), position, call, axis, text)
    if re.fullmatch(r'-?\d+', text):
        return _Unit(None, int(text), text=text)
    if ':' in text:
        raise ValueError(
            f"{text!r} is no node: a unit is 'layer:channel', 'layer:channel@row,col' or 'layer:channel@token'"
        )
    if text in layers:
        raise ValueError(f"{text!r} is a layer: name one of its channels, such as '{text}:0'")
    return _Unit(None, text, text=text)


def _find_layer(name: str, layers: Sequence[str]) -> str:
    if name in layers:
        return name
    same = [layer for layer in layers if layer.replace('.', '_') == name.replace('.', '_')]
    if len(same) == 1:
        return same[0]
    if same:
        raise ValueError(f'layer {name!r} is ambiguous: {", ".join(same)}')
    inside = [layer for layer in layers if layer.startswith(f'{name}.') or layer.endswith(f'.{name}')]
    near = difflib.get_close_matches(name, layers, n=5, cutoff=0.5) or inside[:5] or list(layers[:5])
    raise ValueError(f'unknown layer {name!r}: near names are {", ".join(near)}')


def _own_labels(model: nn.Module) -> DatasetInfo | None:
    cfg = _cfg(model)
    return CustomDatasetInfo(cfg['label_names'], cfg.get('label_descriptions')) if cfg.get('label_names') else None


def _labels(model: nn.Module, num_classes: int) -> DatasetInfo | None:
    """Class names: those of the model's own configuration, else ImageNet's if the number of classes says so."""
    names = _cfg(model).get('label_names')
    if names and (isinstance(names, dict) or len(names) == num_classes):
        return _own_labels(model)
    subset = infer_imagenet_subset({'num_classes': num_classes})
    return ImageNetInfo(subset) if subset else None


def _lemmas(labels: DatasetInfo, index: int) -> list[str]:
    name, described = labels.index_to_label_name(index), labels.index_to_description(index)
    return [*str(described).split(', '), str(described), str(name)]


def _plain(text: str) -> str:
    return _spaced(re.sub(r'[_\-]+', ' ', text))


def _find_class(unit: _Unit, num_classes: int, labels: DatasetInfo | None) -> int:
    if isinstance(unit.channel, int):
        if not 0 <= unit.channel < num_classes:
            raise ValueError(f'class {unit.channel} is out of range: the model has classes 0 to {num_classes - 1}')
        return unit.channel
    if labels is None:
        raise ValueError(f'{unit.text!r}: this model has no class names, give an index from 0 to {num_classes - 1}')
    by_name: dict[str, set[int]] = defaultdict(set)
    for index in labels.label_indices():
        if index < num_classes:
            for lemma in _lemmas(labels, index):
                by_name[_plain(lemma)].add(index)
    wanted = _plain(unit.channel)
    if (canonical := re.match(r'\d+(?= )', wanted)) and int(canonical[0]) < num_classes:
        index = int(canonical[0])
        if wanted == _plain(_class_name(index, labels)):
            return index
    found = sorted(by_name.get(wanted, ()))
    if len(found) > 1:
        candidates = ', '.join(f'{index} ({labels.index_to_description(index)})' for index in found)
        raise ValueError(f'class name {unit.text!r} is ambiguous, give the index: {candidates}')
    if not found:
        near = difflib.get_close_matches(wanted, by_name, n=5, cutoff=0.6)
        hint = f': near names are {", ".join(near)}' if near else ''
        raise ValueError(f'unknown class {unit.text!r}{hint} (a layer is named with its channel, as in layer:17)')
    return found[0]


def _class_name(index: int, labels: DatasetInfo | None) -> str:
    name = _lemmas(labels, index)[0] if labels is not None and labels.has_label(index) else str(index)
    return name if name == str(index) else f'{index} {name}'


# ---------------------------------------------------------------------------------------------------------------------
# The model's own image


def _cfg(model: nn.Module) -> dict[str, Any]:
    """The model's own `pretrained_cfg`, which may be timm's object or the dictionary of it; empty without one."""
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    return cfg if isinstance(cfg, dict) else cfg.to_dict()


def _own_size(model: nn.Module) -> tuple[int, int] | None:
    """The image side that the model was built for, else the one its configuration names."""
    patches = getattr(model, 'patch_embed', None)
    built = get_model_traits(model).get('img_size')  # by timm's factory, else by the model itself
    built = built or getattr(patches, 'img_size', None) or getattr(model, 'image_size', None)
    if isinstance(built, int):
        return built, built
    if isinstance(built, (tuple, list)) and len(built) == 2:
        return int(built[0]), int(built[1])
    stated = _cfg(model).get('input_size')
    return (int(stated[1]), int(stated[2])) if stated else None


def _own_channels(model: nn.Module) -> list[int]:
    """Image channels worth trying, most likely first."""
    first = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
    return list(dict.fromkeys([first, int(_cfg(model).get('input_size', (3,))[0]), 3, 1, 4]))


def _check_size(size: Any) -> tuple[int, int]:
    sides = (size, size) if isinstance(size, int) else size
    valid = (
        isinstance(sides, (tuple, list)) and len(sides) == 2 and all(type(side) is int and side > 0 for side in sides)
    )
    if not valid:
        raise ValueError(f'size {size!r} is not a positive height and width in pixels, such as (224, 224)')
    return sides[0], sides[1]


def _check_model(model: nn.Module) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError('a TorchScript module takes no hooks: give the Python module that it was made from')
    if any(p.is_meta for p in model.parameters()):
        raise ValueError('the model has no weights (its device is meta): load them first')
    training = next((name or 'the model' for name, module in model.named_modules() if module.training), None)
    if training is not None:
        raise ValueError(f'{training} is in train mode, where images change one another: call model.eval() first')


class Refused(ValueError):
    """The model, or the part of it that was asked for, takes no images of this shape."""


def _probe(model: nn.Module, in_chans: int, size: tuple[int, int], stop: tuple[str, int] | None = None) -> Probe:
    try:
        return probe(model, in_chans, size, stop=stop)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a foreign forward raises on an image that it cannot take
        raise Refused((str(error).strip() or type(error).__name__).splitlines()[0]) from error


def _first_probe(model: nn.Module, size: Any, in_chans: int | None) -> Probe:
    """Probes the model on its own image, or on the one that was asked for."""
    if in_chans is not None and (type(in_chans) is not int or in_chans < 1):
        raise ValueError(f'in_chans {in_chans!r} is not a positive number of channels')
    own = _own_size(model)
    side = _check_size(size) if size is not None else own or (224, 224)
    refusals = []
    tried = [in_chans] if in_chans else _own_channels(model)
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


# ---------------------------------------------------------------------------------------------------------------------
# Terms -> places in the network


def _probe_for(
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


def _places(result: Probe, parsed: Iterable[_Parsed]) -> dict[str, Tap]:
    """The calls of the layers that nodes name; none if one of the nodes needs the whole model."""
    units = [unit for node in parsed for _, unit in node]
    named = [unit for unit in units if isinstance(unit, _Unit) and unit.layer]
    return {unit.text: _call(result, unit) for unit in named} if len(named) == len(units) else {}


def _call(result: Probe, unit: _Unit) -> Tap:
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


def _preactivation(result: Probe, tap: Tap) -> Tap:
    """An activation's input in the place of its output; the same inside timm's fused norm + activation layers."""
    call = result.calls[tap.layer][tap.call]
    act = getattr(call.module, 'act', None)
    if type(call.module).__module__.startswith('timm.layers') and 'Norm' in type(call.module).__name__:
        inner = result.calls.get(f'{tap.layer}.act', [])
        if isinstance(act, nn.Module) and is_activation(act) and len(inner) == len(result.calls[tap.layer]):
            return _preactivation(result, Tap(f'{tap.layer}.act', tap.call))
    same = isinstance(call.input, Tensor) and isinstance(call.output, Tensor) and call.input.shape == call.output.shape
    return replace(tap, input=True) if is_activation(call.module) and same else tap


def _layout(result: Probe, tap: Tap, axis: int | None = None) -> Layout:
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
            self.layouts[tap, axis] = _layout(self.result, tap, axis)
        return self.layouts[tap, axis]

    def classes(self) -> tuple[Tap, Layout, DatasetInfo | None]:
        if self._classes is None:
            if getattr(self.model, 'num_classes', None) == 0:
                raise ValueError("the model has no classifier (num_classes=0): name a layer, 'layer:channel'")
            tap = _class_tap(self.result)
            layout = self.layout(tap)
            self._classes = tap, layout, _labels(self.model, layout.channels)
        return self._classes

    def term(self, weight: float, unit: _Unit) -> tuple[Term, str, str]:
        """The term, its canonical name and its note."""
        if unit.layer is None:
            tap, layout, labels = self.classes()
            index = _find_class(unit, layout.channels, labels)
            note = f'class logit read before the activation {tap.layer!r}' if tap.layer else ''
            return Term(tap, layout, index, weight=weight), _class_name(index, labels), note
        tap = _preactivation(self.result, _call(self.result, unit))
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
        name = unit.layer + (f'#{unit.call}' if unit.call else '') + ':' + (f'axis{unit.axis}=' if unit.axis else '')
        name += str(unit.channel) + (f'@{",".join(map(str, unit.position))}' if unit.position is not None else '')
        note = 'read before the activation' if tap.input else ''
        return Term(tap, layout, unit.channel, unit.position, weight), name, note


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
    _check_model(model)
    wanted = list(nodes) if isinstance(nodes, (list, tuple, range)) else [nodes]
    if not wanted:
        raise ValueError('an empty list of nodes given: name at least one')
    known = _Names(model)
    parsed = [_parse(node, known) for node in wanted]
    result, _ = _probe_for(model, lambda whole: _places(whole, parsed), size, in_chans)
    own = result.images.shape[2], result.images.shape[3]

    resolver = _Resolver(model, result)
    terms: list[list[Term]] = []
    calls: list[list[tuple[float, Callable[[Tensor], Tensor]]]] = []
    names, kinds, notes = [], [], []
    for members in parsed:
        terms.append([])
        calls.append([])
        labels, node_notes = [], []
        for weight, member in members:
            if isinstance(member, _Unit):
                term, name, note = resolver.term(weight, member)
                terms[-1].append(term)
                node_notes.append(note)
            else:
                calls[-1].append((weight, member))
                name = getattr(member, '__name__', type(member).__name__)
            labels.append((weight, name))
        names.append(_sum_name(labels))
        member = members[0][1]
        kind = 'callable' if not isinstance(member, _Unit) else 'class' if member.layer is None else 'layer'
        kinds.append(kind if len(members) == 1 else 'sum')
        notes.append('; '.join(dict.fromkeys(note for note in node_notes if note)))

    chans, dtype = result.images.shape[1], result.images.dtype
    function = ScoreFunction(model, terms, calls, names, kinds, notes, own, chans, dtype)
    _check_scores(function, result)
    if function._reads:
        _check_repeatable(function, result.images.detach())
    if size is None and not any(calls):
        function.size = _early_size(result, [term for group in terms for term in group]) or own
    return function


def _sum_name(labels: list[tuple[float, str]]) -> str:
    parts = []
    for position, (weight, name) in enumerate(labels):
        sign = '' if position == 0 and weight >= 0 else '-' if weight < 0 else '+'
        size = '' if abs(weight) == 1 and not (sign == '-' and position == 0) else f'{abs(weight)!r}*'
        parts.append((f'{sign}{size}' if position == 0 else f' {sign} {size}') + name)
    return ''.join(parts)


def _check_scores(function: ScoreFunction, result: Probe) -> None:
    """Runs each distinct place once: finite, differentiable, and image 0's score not moved by image 1."""
    checked: set[Any] = set()
    reads = [
        [term for taps in function._reads.values() for g, term in taps if g == group]
        for group in range(len(function.names))
    ]
    for name, members, calls in zip(function.names, reads, function._calls, strict=True):
        for term in members:
            tensor = result.read(term.tap)
            tensor = tensor.unflatten(0, (len(result.images), -1)) if term.layout.windows else tensor
            score = term.read(tensor)
            _check_finite(name, score)
            if (term.tap, term.layout) not in checked:
                checked.add((term.tap, term.layout))
                _check_independent(name, weighted_scores(tensor), result.images)
        for _, call in calls:
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

        def read(tap: Tap, tensor: Tensor) -> None:
            found[tap] = tensor.clone()  # what follows may work in place
            if len(found) == len(function._reads):
                raise StopForward

        with torch.no_grad(), function._hooks(read), suppress(StopForward):
            output = function.model(images.clone())
            if (root := Tap('')) in function._reads:
                read(root, class_logits(output))
        return found

    first, second = values(), values()
    for tap, tensor in first.items():
        rounding = torch.finfo(tensor.dtype).eps ** 0.5 * tensor.abs().max()
        if (tensor - second[tap]).abs().max() > rounding:
            name = function.names[function._reads[tap][0][0]]
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


def _early_size(result: Probe, terms: list[Term]) -> tuple[int, int] | None:
    """Receptive field and margin, if all terms are channel maps that see less than half of the image."""
    sides = [0, 0]
    for term in set(terms):
        if (
            not term.tap.layer
            or term.position is not None
            or len(term.layout.shape) != 3
            or term.layout.axis != 1
            or term.layout.windows
        ):
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
        if any(_layout(small, term.tap, term.layout.axis).shape[0] != term.layout.channels for term in terms):
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
    _check_model(model)
    layers = [name for name, _ in model.named_modules() if name]
    unit = _Unit(_find_layer(layer, layers), 0, text=layer)
    result, places = _probe_for(model, lambda whole: _places(whole, [[(1.0, unit)]]), size)
    tap = _preactivation(result, places[layer])
    layout = _layout(result, tap)
    if str(layout) != 'NCHW':
        raise ValueError(f'layer {layer!r} has layout {layout}: only an NCHW layer has a receptive field')
    return measure_receptive_field(result.filled, result.filled.read(tap))


# ---------------------------------------------------------------------------------------------------------------------
# Lists of nodes


@dataclass(frozen=True)
class NodeInfo:
    """A layer whose channels are nodes.

    Attributes:
        name: What goes before the colon of a node's name.
        shape: Shape of the output for one image of the size asked for.
        channels: Number of channels; None where the axis must be given by hand.
        layout: Axes by letter: N batch, C channels, H and W rows and columns, L tokens, (NW) windows; '?' unknown.
    """

    name: str
    shape: tuple[int, ...]
    channels: int | None
    layout: str


@torch.inference_mode(False)
def list_nodes(model: nn.Module, pattern: str | None = None, *, size: tuple[int, int] | None = None) -> list[NodeInfo]:
    """Layers of `model` whose name matches the shell-style `pattern`, in the order in which they run.

    A layer that runs more than once is matched as a whole (`'relu'`) and by its calls (`'relu#2'`).

    Args:
        model: Any module that takes images [N, C, H, W], in eval mode.
        pattern: Pattern of layer names; None is all of them.
        size: Image height and width, which the layers must take and the whole model need not; None is the model's own.

    Raises:
        ValueError: No layer matches, the model is in train mode, or the layers refuse the size.
    """
    _check_model(model)
    result, places = _probe_for(model, lambda whole: _matching(whole, pattern), size)
    return [_info(result, name, _preactivation(result, call)) for name, call in places.items()]


def _matching(result: Probe, pattern: str | None) -> dict[str, Tap]:
    """Calls whose output is one tensor and whose name matches, by that name, in the order in which they run."""
    wanted = '*' if pattern is None else pattern
    calls: dict[str, int] = defaultdict(int)
    found = {}
    for layer in result.order:
        call = Tap(layer, calls[layer])
        calls[layer] += 1
        name = layer if len(result.calls[layer]) == 1 else f'{layer}#{calls[layer]}'
        if not layer or not any(fnmatch.fnmatchcase(each, wanted) for each in (layer, name)):
            continue
        tensor = single_tensor(result.calls[layer][call.call].output)
        if tensor is not None and tensor.ndim > 1:
            found[name] = call
    if not found:
        layers = [name for name, _ in result.model.named_modules() if name]
        near = difflib.get_close_matches(pattern or '', layers, n=5, cutoff=0.3) or layers[:5]
        raise ValueError(f'no layer matches {pattern!r}: near names are {", ".join(near)}')
    return found


def _info(result: Probe, name: str, tap: Tap) -> NodeInfo:
    try:
        layout = _layout(result, tap)
    except ValueError:
        return NodeInfo(name, tuple(result.read(tap).shape[1:]), None, '?')
    return NodeInfo(name, layout.shape, layout.channels, str(layout))


def expand(model: nn.Module, pattern: str, *, size: tuple[int, int] | None = None) -> list[str]:
    """Node names of a pattern: `'layer3.*:0-15'`, `'conv1:*'`, `'blocks.[0-3]:4@0'`, or the classes `'0-9'`.

    Args:
        model: Any module that takes images [N, C, H, W], in eval mode.
        pattern: A shell-style layer pattern, then ':' and a channel, a range (ends included, cut at the layer's last
            channel) or '*' for all, then an optional '@position'. Anything else is one node and is returned as it is.
        size: Image height and width, as in `list_nodes`.

    Raises:
        ValueError: As `list_nodes`, or nothing matches.
    """
    if match := re.fullmatch(r'(\d+)-(\d+)', pattern):
        return [str(index) for index in _span(pattern, int(match[1]), int(match[2]))]
    match = re.fullmatch(r'([^:+\s]+):(?:(\d+)(?:-(\d+))?|(\*))(@[\d,]+)?', pattern)
    weighted = _WEIGHT.fullmatch(pattern)
    layers = {name for name, _ in model.named_modules()}
    if weighted and weighted['node'].partition(':')[0] in layers:
        return [pattern]
    if not match or not (match[3] or match[4] or re.search(r'[*?\[]', match[1])):
        return [pattern]
    names = []
    infos = [info for info in list_nodes(model, match[1], size=size) if info.channels]
    for info in infos:
        assert info.channels is not None
        span = range(info.channels) if match[4] else _span(pattern, int(match[2]), int(match[3] or match[2]))
        names += [f'{info.name}:{channel}{match[5] or ""}' for channel in span if channel < info.channels]
    if not names:
        widest = max((info.channels or 0 for info in infos), default=0)
        raise ValueError(f'no node matches {pattern!r}: the layers that it names have at most {widest} channels')
    return names


def _span(pattern: str, first: int, last: int) -> range:
    if last < first:
        raise ValueError(f'{pattern!r}: the range {first}-{last} runs backwards')
    return range(first, last + 1)


def table(infos: Iterable[NodeInfo]) -> Iterator[str]:
    """Lines of a plain-text table of layers."""
    rows = [('layer', 'channels', 'layout', 'shape')]
    for info in infos:
        rows.append((info.name, str(info.channels or '?'), info.layout, ' x '.join(map(str, info.shape))))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for row in rows:
        yield '  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `gencnn nodes`."""
    parser.add_argument('model', help='a timm model name, such as resnet18 or gencnn_lenet.vis_mnist')
    parser.add_argument('pattern', nargs='?', help="shell-style pattern of layer names, such as 'layer3.*'")
    parser.add_argument('--size', type=int, help="image side in pixels (default: the model's own)")


def main(args: argparse.Namespace) -> None:
    """Prints the layers of a model, with channels, layout and shape; the weights do not matter and are not loaded."""
    import timm

    from .registry import check_name

    check_name(args.model)
    try:
        model = timm.create_model(args.model, pretrained=False).eval()
    except RuntimeError as error:  # a tag that the architecture does not have
        tags = ', '.join(timm.list_pretrained(args.model.split('.')[0] + '.*')) or 'none'
        raise ValueError(f'cannot create model {args.model!r}: {error} Pretrained are {tags}') from error
    size = None if args.size is None else (args.size, args.size)
    infos = list_nodes(model, args.pattern, size=size)
    print('\n'.join(table(infos)))
    units = sum((info.channels or 0) for info in infos)
    positions = sum(prod(info.shape) for info in infos)
    print(f'{len(infos)} layers, {units} channels, {positions} units')
