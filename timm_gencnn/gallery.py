"""Many nodes on one HTML page: `gallery(model, nodes, out)`, and the `gencnn gallery` command.

A folder holds `images/`, one PNG per finished node with its settings in its metadata, and `index.html`, one file with
all pictures inside (WebP, decoded by the browser only near the screen), which keeps working wherever it is copied.
The PNGs are the only state: what is finished is read back from them, so a run that was killed goes on where it was.

Every node is a `visualize` call of its own with the gallery's seed. Its pixels therefore depend on nothing but itself
(random streams, and the rounding of a batched forward pass, depend on what else shares a batch), are those of
`gencnn visualize` for the same node, and all nodes start from the same noise.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import html
import io
import json
import math
import re
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from timm.models import is_model
from torch import nn

from .chains import Schedule
from .networks import default_device, describe, load_model, move, weights_digest
from .node_lists import expand
from .nodes import Refused, resolve
from .samples import read_metadata, write_atomically
from .sampling import Sampling, plain
from .scores import ScoreFunction
from .views import PHOTOGRAPHS, PLAIN
from .visualize import add_sampling_arguments, sampling_arguments, visualize

if TYPE_CHECKING:
    from PIL import Image

TEMPLATE = Path(__file__).with_name('gallery.html')
IMAGES = 4  # per node
PADDING = 2  # pixels between the images of a sheet, as `Samples.save` lays it out
LONGEST_SIDE = 720  # pixels of an embedded sheet: about 40 kB of WebP, 100 MB for 2,000 nodes
LOSSLESS_SIDE = 256  # below it, lossy compression would show
PAGE_INTERVAL = 10.0  # seconds between two writes of the page
PAGE_SHARE = 0.05  # of the time may go into writing the page
STALE = 3600.0  # seconds after which a half-written file has no writer any more


def gallery(
    model: str | nn.Module,
    nodes: str | int | Iterable[str | int],
    out: str | Path,
    *,
    n: int = IMAGES,
    overwrite: bool = False,
    device: str | torch.device | None = None,
    progress: bool = True,
    **settings: Any,
) -> Path:
    """Draws many nodes of a network into one HTML page.

    A node that is already in `out` with the same weights and settings is kept, so that a run that was interrupted or
    killed goes on where it was. A node that cannot be drawn is recorded on the page and does not stop the others. The
    page also shows what earlier calls have drawn into `out` with the same weights and settings.

    Args:
        model: A name for `timm.create_model` or any module in eval mode that takes images [N, C, H, W].
        nodes: Nodes and patterns: `'layer3.*:0-15'`, `'conv1:*'`, `'0-9'`, `207`, `'goldfish'` (see
            `timm_gencnn.node_lists.expand`).
        out: Folder for `index.html` and `images/`, made if it does not exist.
        n: Images per node.
        overwrite: Whether to draw nodes again that `out` has with other settings or weights, instead of refusing.
        device: Where to run, with the model moved there; None is where the model is.
        progress: Whether to show a progress bar over nodes.
        **settings: Further keywords of `visualize`: steps, reference, temperature, tilt, size, seed, dtype, ...

    Returns:
        The page.

    Raises:
        ValueError: A pattern matches nothing, a setting is out of range, `out` holds nodes with other settings, or no
            node could be drawn.
        OSError: `out` cannot be written. What was finished is kept.
    """
    return _gallery(model, nodes, Path(out), overwrite, device, progress, Sampling(n, **settings)).page


def _gallery(
    model: str | nn.Module,
    nodes: str | int | Iterable[str | int],
    out: Path,
    overwrite: bool,
    device: str | torch.device | None,
    progress: bool,
    asked: Sampling,
) -> _Folder:
    """The folder of `gallery`, with what became of each node."""
    name = model if isinstance(model, str) else describe(model)
    net = load_model(model) if isinstance(model, str) else model
    if device is not None:
        move(net, device)
    wanted = _expand(net, nodes, asked.sides())
    _check_reference(net, wanted, asked)
    folder = _Folder(out, name, wanted, _request(net, asked))
    folder.open(overwrite)
    folder.draw(net, asked, progress)
    failed = folder.failed()
    if len(failed) == len(wanted):
        raise ValueError(f'none of {len(wanted)} node(s) could be drawn, see {folder.page}; {failed[0]}')
    return folder


def _check_reference(net: nn.Module, names: list[str], asked: Sampling) -> None:
    """Refuses, before any node is drawn, a size or a reference that every node would refuse."""
    size = asked.sides()
    try:
        score = resolve(net, lambda images: images.flatten(1).sum(1), size=size)
    except Refused:  # by the model as a whole: one of the layers may take it
        first = _first_score(net, names, size)
        if first is None:
            raise
        score = first
    asked.make_reference(net, score.in_chans, score.size)


def _first_score(net: nn.Module, names: list[str], size: tuple[int, int] | None) -> ScoreFunction | None:
    """The first of the nodes that has a score at this size, if one has."""
    for name in names:
        with suppress(ValueError):
            return resolve(net, name, size=size)
    return None


def _expand(net: nn.Module, nodes: str | int | Iterable[str | int], size: tuple[int, int] | None) -> list[str]:
    """Names of all nodes asked for, each once, in order."""
    nodes = plain(nodes)
    given = [nodes] if isinstance(nodes, (str, int)) else map(plain, nodes)
    names: dict[str, None] = {}
    for node in given:
        if not isinstance(node, (str, int)) or isinstance(node, bool):
            raise ValueError(f'{node!r} has no name to find it by: a gallery takes strings and indices, visualize more')
        names |= dict.fromkeys(expand(net, str(node), size=size))
    if not names:
        raise ValueError('no nodes given: name at least one')
    return list(names)


def _request(net: nn.Module, asked: Sampling) -> dict[str, Any]:
    """What a finished node must share with the run: all that determines its pixels, but not where they are made."""
    request = vars(asked) | {'dtype': asked.dtype_name, 'weights': weights_digest(net)}
    del request['frames']
    if isinstance(asked.size, int):
        request['size'] = [asked.size] * 2
    if not isinstance(asked.reference, str):
        request['reference'] = asked.reference.settings()
    if not asked.settled().exact:
        request |= {'views': [PHOTOGRAPHS._asdict(), PLAIN._asdict()], 'schedule': Schedule()._asdict()}
    return json.loads(json.dumps(request))


# ---------------------------------------------------------------------------------------------------------------------
# The folder


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
    mask = Image.new('L', sheet.size)
    columns = math.ceil(math.sqrt(n))
    for i in range(n):
        row, column = divmod(i, columns)
        x, y = PADDING + column * (width + PADDING), PADDING + row * (height + PADDING)
        mask.paste(255, (x, y, x + width, y + height))
    sheet.putalpha(mask)
    return sheet.crop((PADDING, PADDING, sheet.width - PADDING, sheet.height - PADDING))


def file_name(node: str) -> str:
    """Name of a node's PNG, safe on every file system and different for different nodes."""
    readable = re.sub(r'[^\w.@-]+', '_', node, flags=re.ASCII)[:80]
    return f'{readable}-{hashlib.sha256(node.encode()).hexdigest()[:8]}.png'


@dataclass
class _Folder:
    """A gallery's folder: which of the nodes wanted are finished, and the page that shows them."""

    out: Path
    model: str
    wanted: list[str]
    request: dict[str, Any]
    entries: dict[str, Entry] = field(default_factory=dict)
    earlier: dict[str, Entry] = field(default_factory=dict)
    """Nodes of earlier runs with the same request, by file name."""

    def __post_init__(self) -> None:
        self.page = self.out / 'index.html'
        self.images = self.out / 'images'
        self.written, self.took = -math.inf, 0.0

    def read(self) -> list[tuple[str, dict[str, Any]]]:
        """Reads the finished nodes that are not known yet.

        Returns:
            Those of the nodes wanted that were drawn by another request, and that request.
        """
        others = []
        for node in self.wanted:
            if node in self.entries:
                continue
            try:
                entry = read_entry(self.images / file_name(node))
            except ValueError:  # not there, or damaged: drawn again
                continue
            old = entry.metadata['settings'].get('request', {})
            if old == self.request:
                self.entries[node] = entry
            else:
                others.append((node, old))
        mine = set(map(file_name, self.wanted))
        for path in sorted(self.images.glob('*.png')):
            if path.name in mine or path.name in self.earlier:
                continue
            with suppress(ValueError):  # damaged, or not ours
                if read_metadata(path).get('settings', {}).get('request') == self.request:
                    self.earlier[path.name] = read_entry(path)
        return others

    def open(self, overwrite: bool) -> None:
        """Reads what is finished, and writes a first page, so that a folder that cannot be written is found at once."""
        others = self.read()
        if others and not overwrite:
            node, old = others[0]
            changed = ', '.join(f'{k} {old.get(k)!r}, now {v!r}' for k, v in self.request.items() if old.get(k) != v)
            raise ValueError(
                f'{str(self.out)!r} holds {len(others)} of these nodes with other settings ({node}: {changed}): '
                'choose another folder, or overwrite them (--overwrite)'
            )
        self.images.mkdir(parents=True, exist_ok=True)
        for partial in self.images.glob('.*.partial'):  # of a run that was killed while it wrote, not of one beside us
            if time.time() - partial.stat().st_mtime > STALE:
                partial.unlink(missing_ok=True)
        self.write_page()

    def draw(self, net: nn.Module, asked: Sampling, progress: bool) -> None:
        """Draws what is missing. Ctrl-C and a full disk leave a page of what was finished."""
        from tqdm.auto import tqdm

        missing = [node for node in self.wanted if node not in self.entries]
        done = len(self.wanted) - len(missing)
        try:
            try:
                with tqdm(missing, total=len(self.wanted), initial=done, unit='node', disable=not progress) as bar:
                    for node in bar:
                        bar.set_postfix_str(node)
                        self.entries[node] = self.draw_one(net, node, asked)
                        if time.monotonic() - self.written > max(PAGE_INTERVAL, self.took / PAGE_SHARE):
                            self.write_page()
            finally:
                self.read()  # Ctrl-C may have come between a node's file and its entry
                self.write_page()
        except OSError as e:
            finished = sum(bool(entry.image) for entry in self.entries.values())
            raise OSError(
                f'cannot write to {str(self.out)!r} ({e.strerror or e}): {finished} of {len(self.wanted)} nodes are '
                'finished and kept, run the same command again to go on'
            ) from e

    def draw_one(self, net: nn.Module, node: str, asked: Sampling) -> Entry:
        """Draws one node and saves it, or says why not."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            try:
                samples = visualize(net, node, progress=False, **vars(asked))
            except Exception as e:  # whatever a foreign network raises concerns this node only
                text = str(e).strip() or 'no message'
                return Entry(node, error=text if isinstance(e, ValueError) else f'{type(e).__name__}: {text}')
        messages = [str(w.message) for w in caught if w.category is UserWarning]
        samples.settings |= {
            'model': self.model,
            'notes': list(dict.fromkeys(samples.settings['notes'] + messages)),
            'request': self.request,
        }
        return read_entry(samples.save(self.images / file_name(node)))

    def failed(self) -> list[str]:
        """Each node that could not be drawn, and why."""
        return [f'{node!r}: {entry.error}' for node, entry in self.entries.items() if not entry.image]

    def write_page(self) -> None:
        """Writes the page of all nodes known so far, in the order asked for and then those of earlier runs."""
        began = time.monotonic()
        known = [self.entries[node] for node in self.wanted if node in self.entries] + list(self.earlier.values())
        write_atomically(self.page, render(self.model, known, len(self.wanted) + len(self.earlier)).encode())
        self.written = time.monotonic()
        self.took = self.written - began


# ---------------------------------------------------------------------------------------------------------------------
# The page


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
    if ':' in model or is_model(model.split('.')[0]):  # else a module that the command line cannot make
        rows += [['Repeat it', f'gencnn visualize --like images/{entry.file}']]
    return rows


def _mean(values: Sequence[float | None]) -> str:
    return _number(None if None in values else sum(v for v in values if v is not None) / len(values))


def _number(value: float | None, digits: int = 3) -> str:
    """A number at some significant digits; None is what JSON has for NaN."""
    if value is None:
        return 'not finite'
    return f'{value:,.0f}' if abs(value) >= 100 else f'{value:.{digits}g}'


# ---------------------------------------------------------------------------------------------------------------------
# The command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `gencnn gallery`."""
    parser.add_argument('model', help='a timm model name, hf-hub:USER/REPO or local-dir:FOLDER')
    parser.add_argument(
        '--nodes', nargs='+', action='extend', required=True, help="nodes and patterns: 'layer3.*:0-15', 0-9, goldfish"
    )
    parser.add_argument('--out', required=True, metavar='DIR', help='folder of the page; a run there is taken up again')
    parser.add_argument('--overwrite', action='store_true', help='draw nodes again that DIR has with other settings')
    add_sampling_arguments(parser)


def main(args: argparse.Namespace) -> None:
    """Runs `gencnn gallery`.

    Raises:
        ValueError: As `gallery`, or some nodes could not be drawn; the page is written all the same.
    """
    model = load_model(args.model, checkpoint_path=args.checkpoint) if args.checkpoint else args.model
    asked = Sampling(**{'n': IMAGES} | sampling_arguments(args))
    folder = _gallery(model, args.nodes, Path(args.out), args.overwrite, default_device(args.device), True, asked)
    failed, total = folder.failed(), len(folder.wanted)
    print(f'wrote {folder.page}: {total - len(failed)} drawn, {len(failed)} failed')
    if failed:
        raise ValueError(f'{len(failed)} of {total} nodes could not be drawn, see {folder.page}; {failed[0]}')
