"""The grammar of node names: strings, dictionaries and sums -> weighted units of layers and classes.

Knows which layers and classes there are, and nothing of what a forward pass does. The table of forms is in `nodes`.
"""

import difflib
import math
import operator
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from timm.data.dataset_info import DatasetInfo
from torch import Tensor, nn

from .model_config import own_labels

Node = int | str | Mapping[Any, float] | Callable[[Tensor], Tensor]

_LAYER = re.compile(
    r'(?P<layer>[^:]*?)(?:#(?P<call>\d+))?:(?:axis(?P<axis>\d+)=)?(?P<channel>\d+)(?:@(?P<position>[\d,\s]+))?'
)
_SIGN = re.compile(r'((?<![\d.]e)\s*\+\s*(?=\S)|\s+-\s+)', re.IGNORECASE)  # not that of 1e+16
_MINUS = re.compile(r'-\s*(?=[^\d\s.])')  # before a name
WEIGHT = re.compile(r'(?P<weight>[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)\s*\*\s*(?P<node>.+)', re.IGNORECASE)


@dataclass(frozen=True)
class Unit:
    """A parsed term: a class (layer None; `channel` its index or name) or a unit of a layer."""

    layer: str | None
    channel: int | str
    position: tuple[int, ...] | None = None
    call: int | None = None
    axis: int | None = None
    text: str = ''

    @property
    def name(self) -> str:
        """Canonical name of a unit of a layer."""
        call, axis = f'#{self.call}' if self.call else '', f'axis{self.axis}=' if self.axis else ''
        place = '' if self.position is None else f'@{",".join(map(str, self.position))}'
        return f'{self.layer}{call}:{axis}{self.channel}{place}'


Parsed = list[tuple[float, 'Unit | Callable[[Tensor], Tensor]']]


class Names:
    """What a model calls its layers and, if its own configuration names them, its classes."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.layers = [name for name, _ in model.named_modules() if name]

    @cached_property
    def classes(self) -> set[str]:
        """In lower case."""
        labels = own_labels(self.model)
        if labels is None:
            return set()
        names = ((*_lemmas(labels, index), class_name(index, labels)) for index in labels.label_indices())
        return {_spaced(name) for forms in names for name in forms}

    def know(self, text: str) -> bool:
        """Whether `text` is one term as it stands, whatever signs are in its name."""
        weighted = WEIGHT.fullmatch(text)
        text = weighted['node'] if weighted else text
        unit = _LAYER.fullmatch(text)
        return bool(unit and unit['layer'].strip() in self.layers) or _spaced(text) in self.classes


def _spaced(text: str) -> str:
    return ' '.join(text.lower().split())


def parse(node: Any, names: Names) -> Parsed:
    """A node of any form as weighted units and callables."""
    if isinstance(node, Mapping):
        if not node:
            raise ValueError('an empty dictionary is no node: give {node: weight, ...}')
        parsed: Parsed = []
        for member, weight in node.items():
            factor = _number(weight)
            if not torch.isfinite(torch.tensor(factor, device='cpu')):
                raise ValueError(f'weight {weight!r} of node {member!r} is not a finite number')
            parsed += [(factor * inner, unit) for inner, unit in parse(member, names)]
        return parsed
    if isinstance(node, str):
        return _parse_string(node, names)
    if isinstance(node, nn.Module) and (layer := next((k for k, m in names.model.named_modules() if m is node), '')):
        raise ValueError(f"the layer {layer!r} itself is no node: name one of its channels, such as '{layer}:0'")
    if callable(node):
        return [(1.0, node)]
    try:
        if isinstance(node, bool):
            raise TypeError
        return [(1.0, Unit(None, operator.index(node), text=str(node)))]
    except TypeError:
        kinds = 'an index, a name, a dictionary of weights, a callable or a list of these'
        raise ValueError(f'{node!r} is no node: give {kinds}') from None


def _number(value: Any) -> float:
    """NaN for what is none."""
    try:
        return math.nan if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # the last but one of a tensor of several
        return math.nan


def _parse_string(text: str, names: Names) -> Parsed:
    if not text.strip():
        raise ValueError("an empty string is no node: give a class or 'layer:channel'")
    parsed: Parsed = []
    pieces = ['+', *_SIGN.split(text.strip())]  # sign, term, sign, term; some signs may belong to a name
    while pieces:
        sign, *pieces = pieces
        length = next((k for k in range(len(pieces), 1, -2) if names.know(''.join(pieces[:k]))), 1)
        term, pieces = ''.join(pieces[:length]), pieces[length:]
        if _MINUS.match(term) and not names.know(term):
            term = _MINUS.sub('-1*', term, count=1)
        weighted = WEIGHT.fullmatch(term)
        weight = float(weighted['weight']) if weighted else 1.0
        unit = _parse_unit(weighted['node'] if weighted else term, names)
        parsed.append((-weight if sign.strip() == '-' else weight, unit))
    return parsed


def _parse_unit(text: str, names: Names) -> Unit:
    layers, match = names.layers, _LAYER.fullmatch(text)
    if ':' in text and _spaced(text) in names.classes and not (match and match['layer'].strip() in layers):
        return Unit(None, text, text=text)
    if match:
        position = None
        if match['position']:
            if not re.fullmatch(r'\s*\d+\s*(,\s*\d+\s*)*', match['position']):
                raise ValueError(f"{text!r}: a position is '@row,col' or '@token'")
            position = tuple(int(p) for p in match['position'].split(','))
        call = int(match['call']) if match['call'] else None
        axis = int(match['axis']) if match['axis'] else None
        layer = find_layer(match['layer'].strip(), layers)
        return Unit(layer, int(match['channel']), position, call, axis, text)
    if re.fullmatch(r'-?\d+', text):
        return Unit(None, int(text), text=text)
    if ':' in text:
        raise ValueError(
            f"{text!r} is no node: a unit is 'layer:channel', 'layer:channel@row,col' or 'layer:channel@token'"
        )
    if text in layers:
        raise ValueError(f"{text!r} is a layer: name one of its channels, such as '{text}:0'")
    return Unit(None, text, text=text)


def find_layer(name: str, layers: Sequence[str]) -> str:
    """The layer of that name, in which '_' may stand for '.'."""
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


def _lemmas(labels: DatasetInfo, index: int) -> list[str]:
    name, described = labels.index_to_label_name(index), labels.index_to_description(index)
    return [*str(described).split(', '), str(described), str(name)]


def _plain(text: str) -> str:
    return _spaced(re.sub(r'(?<=\S)[_\-]+|[_\-]+(?!\S)', ' ', text))  # a minus before a word is none of its hyphens


def find_class(unit: Unit, num_classes: int, labels: DatasetInfo | None) -> int:
    """Index of the class that a unit means, by index, name or canonical name."""
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
        if wanted == _plain(class_name(index, labels)):
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


def class_name(index: int, labels: DatasetInfo | None) -> str:
    """Canonical name of a class: '1 goldfish', or its index alone."""
    name = _lemmas(labels, index)[0] if labels is not None and labels.has_label(index) else str(index)
    return name if name == str(index) else f'{index} {name}'


def sum_name(members: Sequence[tuple[float, str]]) -> str:
    """Canonical name of a weighted sum of members that have names: '3 - 0.5*conv:2'."""
    (weight, name), *rest = members
    text = name if weight == 1 else f'{weight!r}*{name}'
    for weight, name in rest:
        text += f' {"-" if weight < 0 else "+"} ' + ('' if abs(weight) == 1 else f'{abs(weight)!r}*') + name
    return text
