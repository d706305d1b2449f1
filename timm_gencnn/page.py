"""The page of a gallery: one HTML file with all pictures inside, WebP that the browser decodes only near the screen."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import re
import shlex
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timm.models import is_model

from .runs import is_run
from .samples import PADDING, read_metadata

if TYPE_CHECKING:
    from PIL import Image

TEMPLATE = Path(__file__).with_name('gallery.html')
LONGEST_SIDE = 720  # pixels of an embedded sheet: about 40 kB of WebP, 100 MB for 2,000 nodes
LOSSLESS_SIDE = 256  # below it, lossy compression would show


@dataclass(frozen=True)
class Entry:
    """A node on the page.

    Attributes:
        node: Canonical name.
        image: Data URI of its sheet of images, or '' if it could not be drawn.
        size: Width and height of that sheet in pixels.
        file: Name of the PNG.
        metadata: What `Samples.save` put into the PNG.
        error: Why it could not be drawn.
    """

    node: str
    image: str = ''
    size: tuple[int, int] = (0, 0)
    file: str = ''
    metadata: dict[str, Any] = field(default_factory=dict)
    error: str = ''


def read_entry(path: Path) -> Entry:
    """The entry of a finished node, from its PNG.

    Raises:
        ValueError: The file does not exist or was not written by `Samples.save`.
    """
    from PIL import Image

    metadata = read_metadata(path)
    with Image.open(path) as image:
        sheet = _frame(image.convert('RGB'), metadata['settings'])
    lossless = max(sheet.size) <= LOSSLESS_SIDE
    sheet.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    buffer = io.BytesIO()
    sheet.save(buffer, 'WEBP', lossless=lossless, quality=80, method=2)
    data = base64.b64encode(buffer.getvalue()).decode()
    return Entry(metadata['nodes'][0], f'data:image/webp;base64,{data}', sheet.size, path.name, metadata)


def _frame(sheet: Image.Image, settings: dict[str, Any]) -> Image.Image:
    """The sheet with the gaps between its images transparent, so that it suits a dark page as well as a light one."""
    from PIL import Image

    n, (height, width) = settings['n'], settings['size']
    if n == 1:
        return sheet
    mask, columns = Image.new('L', sheet.size), sheet.width // (width + PADDING)
    for i in range(n):
        row, column = divmod(i, columns)
        x, y = PADDING + column * (width + PADDING), PADDING + row * (height + PADDING)
        mask.paste(255, (x, y, x + width, y + height))
    sheet.putalpha(mask)
    return sheet.crop((PADDING, PADDING, sheet.width - PADDING, sheet.height - PADDING))


def render(model: str, entries: Sequence[Entry], total: int | None = None) -> str:
    """The HTML page of some entries: one file that asks nothing of the network.

    Args:
        model: The network's name.
        entries: Nodes in the order of the page.
        total: Number of nodes that were asked for, if some are still missing.
    """
    template = TEMPLATE.read_text(encoding='utf-8')
    script = re.search(r'<script>(.*?)</script>', template, re.DOTALL)
    assert script is not None
    groups: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        groups[_group(entry.node)].append(entry)
    drawn = sum(bool(entry.image) for entry in entries)
    missing = (total or len(entries)) - len(entries)
    counts = [f'{drawn:,} drawn']
    counts += [f'{len(entries) - drawn:,} failed'] if drawn < len(entries) else []
    counts += [f'{missing:,} still missing: run the same command again to go on'] if missing else []
    values = {
        'hash': base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode(),
        'model': html.escape(model),
        'counts': ' · '.join(counts),
        'common': html.escape(_common([entry for entry in entries if entry.image])),
        'sections': '\n'.join(_section(name, members) for name, members in groups.items()),
    }
    return re.sub(r'\{\{(\w+)\}\}', lambda match: values[match[1]], template)


def _group(node: str) -> str:
    """The heading under which a node stands: its layer, or what else it is."""
    if match := re.fullmatch(r'(\S+):(?:axis\d+=)?\d+(?:@[\d,]+)?', node):
        return match[1]
    return 'Weighted sums' if re.search(r' [+-] |\*', node) else 'Classes'


def _common(drawn: Sequence[Entry]) -> str:
    """Settings in plain words, where all nodes share them."""
    shown = [_settings(entry.metadata) for entry in drawn]
    shared = [
        f'{label}: {shown[0][label]}'
        for label in ('images', 'gradients', 'reference', 'temperature', 'seed')
        if len({settings[label] for settings in shown}) == 1
    ]
    return ' · '.join(shared)


def _section(name: str, members: Sequence[Entry]) -> str:
    cards = '\n'.join(map(_card, members))
    count = f'{len(members)} node{"s" * (len(members) > 1)}'
    return f'<section><h2>{html.escape(name)} <small>{count}</small></h2>\n<ul>\n{cards}\n</ul></section>'


def _card(entry: Entry) -> str:
    """One node: a button with what one sees, and the data that it shows when it is opened, which wait as text."""
    name = html.escape(entry.node)
    if entry.image:
        scores = entry.metadata['diagnostics']['score']
        mean = _mean(scores)
        verdict, kind = entry.metadata['verdict'], _kind(entry.metadata)
        width, height = entry.size
        alt = html.escape(f'{len(scores)} images drawn for {entry.node}, mean score {mean}')
        small = ' class="small"' * (max(entry.size) <= LOSSLESS_SIDE)
        figure = f'<img{small} alt="{alt}" width="{width}" height="{height}">'
        score = f'<span class="score">score {mean}</span>'
        data = {'image': entry.image, 'rows': _rows(entry)}
    else:
        verdict, kind, figure, score = entry.error, 'failed', '<span class="none">not drawn</span>', ''
        data = {'rows': [['Error', entry.error]]}
    text = html.escape(f'{_group(entry.node)} {entry.node} {kind} {verdict}'.lower())
    blob = json.dumps(data).replace('<', '\\u003c')
    return (
        f'<li><button class="card {kind}" data-node="{name}" data-text="{text}">{figure}'
        f'<span class="name">{_breakable(name)}</span>{score}'
        f'<span class="verdict">{html.escape(verdict)}</span></button>'
        f'<script type="application/json">{blob}</script></li>'
    )


def _breakable(name: str) -> str:
    """An escaped name that a line may break at the dots and the colon of a layer, not elsewhere."""
    return re.sub(r'(?<=\w)([.:])(?=\w)', r'\1<wbr>', name)


def _kind(metadata: dict[str, Any]) -> str:
    if metadata['settings']['regime'] != 'exact':
        return 'picture'
    return 'converged' if ': converged' in metadata['verdict'] else 'unconverged'


def _settings(metadata: dict[str, Any]) -> dict[str, str]:
    """Settings of one node in plain words."""
    s = metadata['settings']
    height, width = s['size']
    tilts = sorted(metadata['diagnostics']['tilt'])
    return {
        'images': f'{s["n"]} of {width} by {height} px',
        'gradients': f'{metadata["diagnostics"]["gradients"]} per image',
        'regime': s['regime'],
        'reference': str(s.get('reference', 'unnamed')),
        'temperature': _number(s['temperature']),
        'tilt': _number(s['tilt']) if s['tilt'] else f'automatic, {_number(tilts[0])} to {_number(tilts[-1])}',
        'seed': str(s['seed']),
        'versions': ', '.join(f'{k} {v}' for k, v in s['versions'].items()),
    }


def _rows(entry: Entry) -> list[list[str]]:
    """Label and value of everything that is known of a node."""
    d = entry.metadata['diagnostics']
    exact = entry.metadata['settings']['regime'] == 'exact'
    rows = [
        ['Verdict', entry.metadata['verdict']],
        ['Scores', ', '.join(map(_number, d['score']))],
        ['Divergences', str(sum(d['divergences']))],
        ['Step size', _mean(d['step_size'])],
    ]
    if exact:
        rows += [
            ['Acceptance', _mean(d['acceptance'])],
            ['Energy error', _mean(d['energy_error'])],
            ['ESS of the score', _number(d['ess'])],
            ['Split R-hat', _number(d['r_hat'], 4)],
        ]
    rows += [[label.capitalize(), value] for label, value in _settings(entry.metadata).items()]
    rows += [['Note', note] for note in entry.metadata['settings']['notes']]
    rows += [['Seconds', _number(d['seconds'])]]
    model = entry.metadata['settings']['model']
    if ':' in model or is_run(model) or is_model(model.split('.')[0]):  # else a module, unknown to it
        kwargs = entry.metadata['settings'].get('model_kwargs')
        flag = f' --model-kwargs {shlex.join(kwargs)}' if kwargs else ''
        rows += [['Repeat it', f'gencnn visualize --like images/{entry.file}{flag}']]
    return rows


def _mean(values: Sequence[float | None]) -> str:
    return _number(None if None in values else sum(v for v in values if v is not None) / len(values))


def _number(value: float | None, digits: int = 3) -> str:
    """A number at some significant digits; None is what JSON has for NaN."""
    if value is None:
        return 'not finite'
    return f'{value:,.0f}' if abs(value) >= 100 else f'{value:.{digits}g}'
