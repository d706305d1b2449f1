"""Many nodes on one HTML page: `gallery(model, nodes, out)`, and the `gencnn gallery` command.

A folder holds `images/`, one PNG per finished node with its settings in its metadata, and `index.html`, one file with
all pictures inside (see `page`). The PNGs are the only state: what is finished is read back from them, so a run that
was killed goes on where it was.

Every node is a `visualize` call of its own with the gallery's seed. Its pixels therefore depend on nothing but itself
(random streams, and the rounding of a batched forward pass, depend on what else shares a batch), are those of
`gencnn visualize` for the same node, and all nodes start from the same noise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .networks import MODEL, default_device, kwargs_told, load, load_model, weight_arguments, weights_digest
from .node_lists import expand
from .nodes import resolve
from .page import Entry, read_entry, render
from .probes import Refused, Size
from .samples import read_metadata, write_atomically
from .sampling import Sampling, plain
from .scores import ScoreFunction
from .views import is_current
from .visualize import add_sampling_arguments, sampling_arguments, visualize

IMAGES = 4  # per node
PAGE_INTERVAL = 10.0  # seconds between two writes of the page
PAGE_SHARE = 0.05  # of the time may go into writing the page
STALE = 3600.0  # seconds after which a half-written file has no writer any more
_CATCHING = threading.Lock()  # warnings are caught for all threads: two that catch would not put all back as it was


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
    page also shows what earlier calls have drawn into `out` with the same weights and settings. Galleries in several
    threads take turns, node by node; processes do not.

    Args:
        model: A name for `timm.create_model`, the folder of a training run, or any module in eval mode that takes
            images [N, C, H, W].
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
    return _gallery(model, nodes, Path(out), overwrite, device, progress, Sampling(n, **settings), {}).page


def _gallery(
    model: str | nn.Module,
    nodes: str | int | Iterable[str | int],
    out: Path,
    overwrite: bool,
    device: str | torch.device | None,
    progress: bool,
    asked: Sampling,
    kwargs: dict[str, list[str]],
) -> _Folder:
    """The folder of `gallery`, with what became of each node. `kwargs` are those of `networks.kwargs_told`."""
    net, name, _ = load(model, device)
    wanted = _expand(net, nodes, asked.sides())
    _check_reference(net, wanted, asked)
    folder = _Folder(out, name, {file_name(node): node for node in wanted}, _request(net, asked) | kwargs)
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
        found = next(_scores(net, names, size), None)
        if found is None:
            raise
        score = found
    asked.make_reference(net, score.in_chans, score.size)


def _scores(net: nn.Module, names: list[str], size: Size | None) -> Iterator[ScoreFunction]:
    for name in names:
        with suppress(ValueError):
            yield resolve(net, name, size=size)


def _expand(net: nn.Module, nodes: str | int | Iterable[str | int], size: Size | None) -> list[str]:
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
    """What all nodes of a run share of what determines their pixels. Views and moves are told by each for itself."""
    request = vars(asked) | {'dtype': asked.dtype_name, 'weights': weights_digest(net)}
    del request['frames']
    if isinstance(asked.size, int):
        request['size'] = [asked.size] * 2
    if not isinstance(asked.reference, str):
        request['reference'] = asked.reference.settings()
    return json.loads(json.dumps(request))


def file_name(node: str) -> str:
    """Name of a node's PNG, safe on every file system and different for different nodes."""
    readable = re.sub(r'[^\w.@-]+', '_', node, flags=re.ASCII)[:80]
    return f'{readable}-{hashlib.sha256(node.encode()).hexdigest()[:8]}.png'


@dataclass
class _Folder:
    """A gallery's folder: which nodes are finished, and the page that shows them.

    Attributes:
        out: The folder.
        model: The network's name.
        wanted: Nodes asked for, by file name.
        request: What determines their pixels.
        entries: Nodes that are finished or have failed, and those of earlier runs with the same request, by file name.
    """

    out: Path
    model: str
    wanted: dict[str, str]
    request: dict[str, Any]
    entries: dict[str, Entry] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.page = self.out / 'index.html'
        self.images = self.out / 'images'
        self.written, self.took = -math.inf, 0.0

    def read(self) -> list[tuple[str, dict[str, Any]]]:
        """Reads the finished nodes that are not known yet.

        Returns:
            Those of the nodes wanted that were drawn by another request, and that request, or by another version.
        """
        others = []
        for path in sorted(self.images.glob('*.png')):
            if path.name in self.entries:
                continue
            with suppress(ValueError):  # damaged, and drawn again if it is wanted, or not ours
                settings = read_metadata(path).get('settings', {})
                request = settings.get('request', {})
                request = {k: v for k, v in request.items() if k not in ('views', 'schedule')}  # of all nodes, once
                if request == self.request and is_current(settings):
                    self.entries[path.name] = read_entry(path)
                elif path.name in self.wanted:
                    others.append((self.wanted[path.name], request))
        return others

    def open(self, overwrite: bool) -> None:
        """Reads what is finished, and writes a first page, so that a folder that cannot be written is found at once."""
        others = self.read()
        if others and not overwrite:
            node, old = others[0]
            now = self.request
            changed = [f'{k} {old.get(k)!r}, now {now.get(k)!r}' for k in now | old if old.get(k) != now.get(k)]
            why = ', '.join(changed) or 'drawn by another schedule'
            raise ValueError(
                f'{str(self.out)!r} holds {len(others)} of these nodes with other settings ({node}: {why}): '
                'choose another folder, or overwrite them (--overwrite)'
            )
        self.images.mkdir(parents=True, exist_ok=True)
        for partial in self.images.glob('.*.partial'):  # of a run that was killed while it wrote, not of one beside us
            with suppress(FileNotFoundError):  # finished meanwhile
                if time.time() - partial.stat().st_mtime > STALE:
                    partial.unlink()
        self.write_page()

    def draw(self, net: nn.Module, asked: Sampling, progress: bool) -> None:
        """Draws what is missing. Ctrl-C and a full disk leave a page of what was finished."""
        from tqdm.auto import tqdm

        missing = {name: node for name, node in self.wanted.items() if name not in self.entries}
        done = len(self.wanted) - len(missing)
        try:
            try:
                with tqdm(missing, total=len(self.wanted), initial=done, unit='node', disable=not progress) as bar:
                    for name in bar:
                        bar.set_postfix_str(missing[name])
                        self.entries[name] = self.draw_one(net, name, asked)
                        if time.monotonic() - self.written > max(PAGE_INTERVAL, self.took / PAGE_SHARE):
                            self.write_page()
            finally:
                self.read()  # Ctrl-C may have come between a node's file and its entry
                self.write_page()
        except OSError as e:
            finished = sum(bool(self.entries[name].image) for name in self.wanted if name in self.entries)
            raise OSError(
                f'cannot write to {str(self.out)!r} ({e.strerror or e}): {finished} of {len(self.wanted)} nodes are '
                'finished and kept, run the same command again to go on'
            ) from e

    def draw_one(self, net: nn.Module, name: str, asked: Sampling) -> Entry:
        """Draws one node and saves it by its file name, or says why not."""
        node = self.wanted[name]
        with _CATCHING, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            try:
                samples = visualize(net, node, progress=False, **vars(asked))
            except Exception as e:  # whatever a foreign network raises concerns this node only
                text = str(e).strip() or 'no message'
                return Entry(node, error=text if isinstance(e, ValueError) else f'{type(e).__name__}: {text}')
        messages = [str(w.message) for w in caught if w.category is UserWarning]
        samples.settings |= {
            'model': self.model,
            'model_kwargs': self.request.get('model_kwargs', []),
            'notes': list(dict.fromkeys(samples.settings['notes'] + messages)),
            'request': self.request,
        }
        return read_entry(samples.save(self.images / name))

    def failed(self) -> list[str]:
        """Each node that could not be drawn, and why."""
        return [f'{entry.node!r}: {entry.error}' for entry in self.entries.values() if not entry.image]

    def write_page(self) -> None:
        """Writes the page of all nodes known so far, in the order asked for and then those of earlier runs."""
        began = time.monotonic()
        names = dict.fromkeys([*self.wanted, *self.entries])
        known = [self.entries[name] for name in names if name in self.entries]
        write_atomically(self.page, render(self.model, known, len(names)).encode())
        self.written = time.monotonic()
        self.took = self.written - began


# ---------------------------------------------------------------------------------------------------------------------
# The command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `gencnn gallery`."""
    parser.add_argument('model', help=MODEL)
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
    weights = weight_arguments(args)
    model = load_model(args.model, **weights) if weights else args.model
    asked = Sampling(**{'n': IMAGES} | sampling_arguments(args))
    out, device = Path(args.out), default_device(args.device)
    folder = _gallery(model, args.nodes, out, args.overwrite, device, True, asked, kwargs_told(args))
    failed, total = folder.failed(), len(folder.wanted)
    print(f'wrote {folder.page}: {total - len(failed)} drawn, {len(failed)} failed')
    if failed:
        raise ValueError(f'{len(failed)} of {total} nodes could not be drawn, see {folder.page}; {failed[0]}')
