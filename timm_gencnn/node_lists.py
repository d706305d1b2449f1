"""Lists of nodes: the layers of a model, patterns of node names, and the `gencnn nodes` command."""

import argparse
import difflib
import fnmatch
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import timm
import torch
from torch import nn

from .layouts import layout_of, preactivation
from .names import WEIGHT
from .probes import Probe, Size, Tap, check_model, probe_for, single_tensor
from .registry import check_name
from .runs import load_run, means_run


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
def list_nodes(model: nn.Module, pattern: str | None = None, *, size: Size | None = None) -> list[NodeInfo]:
    """Layers of `model` whose name matches the shell-style `pattern`, in the order in which they run.

    A layer that runs more than once is matched as a whole (`'relu'`) and by its calls (`'relu#2'`).

    Args:
        model: Any module that takes images [N, C, H, W], in eval mode.
        pattern: Pattern of layer names; None is all of them.
        size: Image side or (height, width), which the layers must take and the whole model need not; None is the
            model's own.

    Raises:
        ValueError: No layer matches, the model is in train mode, or the layers refuse the size.
    """
    check_model(model)
    result, places = probe_for(model, lambda whole: _matching(whole, pattern), size)
    return [_info(result, name, preactivation(result, call)) for name, call in places.items()]


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
        layout = layout_of(result, tap)
    except ValueError:
        return NodeInfo(name, tuple(result.read(tap).shape[1:]), None, '?')
    return NodeInfo(name, layout.shape, layout.channels, str(layout))


def expand(model: nn.Module, pattern: str, *, size: Size | None = None) -> list[str]:
    """Node names of a pattern: `'layer3.*:0-15'`, `'conv1:*'`, `'blocks.[0-3]:4@0'`, or the classes `'0-9'`.

    Args:
        model: Any module that takes images [N, C, H, W], in eval mode.
        pattern: A shell-style layer pattern, then ':' and a channel, a range (ends included, cut at the layer's last
            channel) or '*' for all, then an optional '@position'. Anything else is one node and is returned as it is.
        size: As in `list_nodes`.

    Raises:
        ValueError: As `list_nodes`, or nothing matches.
    """
    if match := re.fullmatch(r'(\d+)-(\d+)', pattern):
        return [str(index) for index in _span(pattern, int(match[1]), int(match[2]))]
    match = re.fullmatch(r'([^:+\s]+):(?:(\d+)(?:-(\d+))?|(\*))(@[\d,]+)?', pattern)
    weighted = WEIGHT.fullmatch(pattern)
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


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first of them the header, as plain text in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ('  '.join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return '\n'.join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `gencnn nodes`."""
    parser.add_argument(
        'model', help='a timm model name, such as gencnn_lenet.vis_mnist, or the folder of a training run'
    )
    parser.add_argument('pattern', nargs='?', help="shell-style pattern of layer names, such as 'layer3.*'")
    parser.add_argument('--size', type=int, help="image side in pixels (default: the model's own)")


def main(args: argparse.Namespace) -> None:
    """Prints the layers of a model, with channels, layout and shape; the weights do not matter and are not loaded."""
    try:
        if means_run(args.model):
            model = load_run(args.model)[0]
        else:
            check_name(args.model)
            model = timm.create_model(args.model, pretrained=False).eval()
    except RuntimeError as error:  # a tag that the architecture does not have
        tags = ', '.join(timm.list_pretrained(args.model.split('.')[0] + '.*')) or 'none'
        raise ValueError(f'cannot create model {args.model!r}: {error} Pretrained are {tags}') from error
    infos = list_nodes(model, args.pattern, size=args.size)
    rows = [(i.name, str(i.channels or '?'), i.layout, ' x '.join(map(str, i.shape))) for i in infos]
    print(table([('layer', 'channels', 'layout', 'shape'), *rows]))
    units = sum((info.channels or 0) for info in infos)
    positions = sum(prod(info.shape) for info in infos)
    print(f'{len(infos)} layers, {units} channels, {positions} units')
