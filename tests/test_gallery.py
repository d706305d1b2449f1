"""The gallery: resuming, faults, and the page in a real browser."""

from __future__ import annotations

import errno
import functools
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms.functional import pil_to_tensor

from timm_gencnn import gallery as room
from timm_gencnn import page as page_room
from timm_gencnn import views as views_room
from timm_gencnn.chains import Schedule
from timm_gencnn.cli import main as cli
from timm_gencnn.gallery import _Folder, gallery
from timm_gencnn.networks import load_model
from timm_gencnn.page import Entry, read_entry, render
from timm_gencnn.reference import White
from timm_gencnn.samples import Samples, read_metadata
from timm_gencnn.views import PHOTOGRAPHS, PLAIN, SMALL_PHOTOGRAPHS
from timm_gencnn.visualize import visualize

CHROMIUM = Path('/usr/bin/chromium')
KWARGS = {'n': 3, 'steps': 8, 'size': 12, 'progress': False}


class Net(nn.Module):
    """Four channels, three classes, and a layer whose second unit has no gradient."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 4, 3)
        self.gate = Gate()
        self.head = nn.Linear(4, 3)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.gate(self.conv(x)).mean((2, 3)))


class Gate(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[:, :1], (x[:, 1:2] - 1e6).relu(), x[:, 2:]], 1)


class Page(HTMLParser):
    """Attributes of the cards and images of a page, and its scripts."""

    def __init__(self, text: str):
        super().__init__()
        self.cards: list[dict[str, str | None]] = []
        self.images: list[dict[str, str | None]] = []
        self.tags: list[str] = []
        self.blobs: list[str] = []
        self.inside = ''
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        self.inside = found.get('type') or tag
        if tag == 'button' and 'data-node' in found:
            self.cards.append(found)
        if tag == 'img' and found.get('alt'):
            self.images.append(found)

    def handle_data(self, data: str) -> None:
        if self.inside == 'application/json' and data.strip():
            self.blobs.append(data)


def nodes_on(page: Path) -> list[str | None]:
    return [card['data-node'] for card in Page(page.read_text()).cards]


def contents(out: Path) -> dict[str, tuple[int, bytes]]:
    """Time of change and bytes of every finished node."""
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted((out / 'images').iterdir())}


def drawn(out: Path) -> dict[str, tuple[bytes, dict[str, Any]]]:
    """Pixels and metadata of every finished node, but for the time that it took."""
    result = {}
    for path in sorted((out / 'images').glob('*.png')):
        metadata = read_metadata(path)
        del metadata['diagnostics']['seconds']
        result[path.name] = Image.open(path).tobytes(), metadata
    return result


# ---------------------------------------------------------------------------------------------------------------------
# What is on the page


def test_page_has_every_node_with_picture_scores_verdict_and_settings(tmp_path: Path) -> None:
    page = gallery(Net(), ['conv:1-2', '0 + conv:3', 0], tmp_path, **KWARGS)
    text = page.read_text()
    assert '<span class="name">conv:<wbr>1</span>' in text
    parsed = Page(text)
    assert [card['data-node'] for card in parsed.cards] == ['conv:1', 'conv:2', '0 + conv:3', '0']
    assert re.findall(r'<h2>(.*?) <small>', text) == ['conv', 'Weighted sums', 'Classes']
    metadata = read_metadata(tmp_path / 'images' / room.file_name('conv:1'))
    scores = metadata['diagnostics']['score']
    blob = json.loads(parsed.blobs[0])
    rows = dict(blob['rows'])
    assert blob['image'].startswith('data:image/webp;base64,')
    assert rows['Verdict'] == metadata['verdict']
    assert rows['Scores'] == ', '.join(f'{s:.3g}' for s in scores)
    assert rows['Images'] == '3 of 12 by 12 px'
    assert 'Repeat it' not in rows  # the command line has no `Net`
    assert not {'Acceptance', 'Energy error', 'ESS of the score', 'Split R-hat'} & set(rows)  # not defined for pictures
    assert rows['Gradients'] == '8 per image'
    assert f'3 images drawn for conv:1, mean score {sum(scores) / 3:.3g}' == parsed.images[0]['alt']
    assert 'src' not in parsed.images[0]
    assert (parsed.cards[3]['data-text'] or '').startswith('classes 0')
    assert '4 drawn' in text
    assert not re.search(r'(?:src|href)="(?!data:,)', text)
    assert '://' not in text


def test_exact_run_shows_its_diagnostics(tmp_path: Path) -> None:
    page = gallery(Net(), 'conv:0', tmp_path, temperature=1.0, **KWARGS | {'steps': 65})
    rows = dict(json.loads(Page(page.read_text()).blobs[0])['rows'])
    assert rows['Verdict'].startswith('exact sampling')
    assert {'Acceptance', 'Energy error', 'ESS of the score', 'Split R-hat'} <= set(rows)


@pytest.mark.parametrize('n', [1, 3, 4])
def test_embedded_sheet_is_the_images_with_clear_gaps(n: int, tmp_path: Path) -> None:
    net = Net()
    gallery(net, 'conv:1', tmp_path, **KWARGS | {'n': n})
    path = tmp_path / 'images' / room.file_name('conv:1')
    sheet = page_room._frame(Image.open(path).convert('RGB'), read_metadata(path)['settings']).convert('RGBA')
    images = visualize(net, 'conv:1', **KWARGS | {'n': n}).images
    pixels = pil_to_tensor(sheet)
    columns = {1: 1, 3: 2, 4: 2}[n]
    for i, image in enumerate(images):
        y, x = (14 * part for part in divmod(i, columns))
        tile = pixels[:, y : y + 12, x : x + 12]
        torch.testing.assert_close(tile[:3] / 255, image, atol=1 / 255, rtol=0)
        assert (tile[3] == 255).all()
    assert int((pixels[3] == 255).sum()) == n * 144


def test_node_is_drawn_as_visualize_draws_it(tmp_path: Path) -> None:
    net = Net()
    gallery(net, 'conv:*', tmp_path / 'a', **KWARGS)
    visualize(net, 'conv:3', **KWARGS).save(tmp_path / 'b.png')
    alone = Image.open(tmp_path / 'b.png').tobytes()
    assert Image.open(tmp_path / 'a' / 'images' / room.file_name('conv:3')).tobytes() == alone
    assert Image.open(tmp_path / 'a' / 'images' / room.file_name('conv:2')).tobytes() != alone


@pytest.mark.parametrize('node', ['7', 'conv1:3'])  # the latter of 7 x 7 pixels, which the whole LeNet refuses
def test_node_can_be_repeated_from_its_png(tmp_path: Path, node: str) -> None:
    gallery('gencnn_lenet.vis_mnist', [node], tmp_path, n=2, steps=8, progress=False)
    path = tmp_path / 'images' / room.file_name(node)
    repeat = ['Repeat it', f'gencnn visualize --like images/{path.name}']
    assert repeat in page_room._rows(read_entry(path))
    assert cli(['visualize', '--like', str(path), '--device', 'cpu', '--out', str(tmp_path / 'again.png')]) == 0
    assert Image.open(tmp_path / 'again.png').tobytes() == Image.open(path).tobytes()


def test_early_layers_at_a_size_that_the_whole_model_refuses(tmp_path: Path) -> None:
    settings: dict[str, Any] = {'n': 2, 'steps': 8, 'progress': False}
    model = load_model('gencnn_lenet.vis_mnist')
    given: dict[str, Any]
    for given in ({'size': 7}, {'reference': White((1, 7, 7), 3.0)}):
        page = gallery(model, ['3', 'conv1:1-2'], tmp_path / str(*given), **settings, **given)
        assert [card['class'] for card in Page(page.read_text()).cards] == [
            'card failed',
            'card picture',
            'card picture',
        ]
        name = room.file_name('conv1:2')
        visualize(model, 'conv1:2', **settings, **given).save(tmp_path / name)
        assert Image.open(page.parent / 'images' / name).tobytes() == Image.open(tmp_path / name).tobytes()
    with pytest.raises(ValueError, match='the model refuses 7 x 7 images'):
        gallery(model, ['3', 'conv2:1', 'nosuch:1'], tmp_path / 'none', **settings, size=7)
    assert not (tmp_path / 'none').exists()


def test_file_names_are_safe_and_distinct() -> None:
    nodes = ['a:1', 'A:1', 'a/1', '../../etc/passwd', 'a' * 500 + ':1', '207 + 0.5*x:3', 'é', '']
    names = [room.file_name(node) for node in nodes]
    assert len({name.lower() for name in names}) == len(nodes)
    assert all(re.fullmatch(r'[\w.@-]{1,120}\.png', name, re.ASCII) and '/' not in name for name in names)


# ---------------------------------------------------------------------------------------------------------------------
# Nodes that fail


def test_failed_nodes_are_on_the_page_and_do_not_stop_the_others(tmp_path: Path) -> None:
    page = gallery(Net(), ['gate:1', 'nosuch:3', 'conv:9', 'conv:0'], tmp_path, **KWARGS)
    parsed = Page(page.read_text())
    errors = [dict(json.loads(blob)['rows']).get('Error', '') for blob in parsed.blobs]
    assert 'dead on the reference' in errors[0]
    assert "unknown layer 'nosuch'" in errors[1]
    assert 'out of range' in errors[2]
    assert errors[3] == ''
    assert [card['class'] for card in parsed.cards] == ['card failed'] * 3 + ['card picture']
    assert '1 drawn · 3 failed' in page.read_text()


def test_command_says_how_many_nodes_failed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = ['gallery', 'gencnn_lenet.vis_mnist', '--out', str(tmp_path), '-n', '1', '--steps', '8', '--nodes']
    assert cli([*command, '3', '12', 'nosuch:1']) == 2
    printed = capsys.readouterr()
    page = tmp_path / 'index.html'
    assert printed.out == f'wrote {page}: 1 drawn, 2 failed\n'
    assert f"error: 2 of 3 nodes could not be drawn, see {page}; '12': class 12 is out of range" in printed.err
    assert nodes_on(page) == ['3', '12', 'nosuch:1']
    assert cli([*command, '3', '4']) == 0
    assert capsys.readouterr().out == f'wrote {page}: 2 drawn, 0 failed\n'


def test_an_error_of_the_network_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @functools.wraps(visualize)
    def broken(net: nn.Module, node: str, **kwargs: Any) -> Any:
        if node == 'conv:1':
            raise IndexError('deep inside')
        return visualize(net, node, **kwargs)

    monkeypatch.setattr(room, 'visualize', broken)
    page = gallery(Net(), 'conv:0-2', tmp_path, **KWARGS)
    assert 'IndexError: deep inside' in page.read_text()
    assert len(contents(tmp_path)) == 2


def test_warnings_are_notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @functools.wraps(visualize)
    def warning(*args: Any, **kwargs: Any) -> Any:
        warnings.warn('a dead unit was restarted', stacklevel=1)
        return visualize(*args, **kwargs)

    monkeypatch.setattr(room, 'visualize', warning)
    page = gallery(Net(), 'conv:0', tmp_path, **KWARGS)
    assert ['Note', 'a dead unit was restarted'] in json.loads(Page(page.read_text()).blobs[0])['rows']


def test_galleries_in_threads_catch_their_own_warnings_and_put_all_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def warning(net: nn.Module, node: str, **kwargs: Any) -> Any:
        time.sleep(0.1 if node == 'conv:0' else 0.3)
        warnings.warn(f'a word on {node}', stacklevel=1)
        return visualize(net, node, **kwargs)

    monkeypatch.setattr(room, 'visualize', warning)
    before = warnings.filters[:], warnings.showwarning
    nodes = 'conv:0', 'conv:2'
    with ThreadPoolExecutor(2) as pool:
        pages = list(pool.map(lambda node: gallery(Net(), node, tmp_path / node[-1], **KWARGS), nodes))
    assert (warnings.filters[:], warnings.showwarning) == before
    for page, node in zip(pages, nodes, strict=True):
        rows = json.loads(Page(page.read_text()).blobs[0])['rows']
        assert [text for label, text in rows if label == 'Note'] == [f'a word on {node}']


def test_all_failed_is_an_error_that_says_why(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none of 2 node\(s\) could be drawn.*'nosuch:1'.*unknown layer"):
        gallery(Net(), ['nosuch:1', 'nosuch:2'], tmp_path, **KWARGS)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ('nodes', 'changed', 'message'),
    [
        ('nosuch*:0', {}, 'no layer matches'),
        ('conv:7-9', {}, "no node matches 'conv:7-9'"),
        ([], {}, 'no nodes given'),
        ([{0: 1.0}], {}, 'takes strings and indices'),
        ('conv:0', {'steps': 0}, 'steps must be an integer >= 1, got 0'),
        ('conv:0', {'n': 0}, 'n must be an integer >= 1, got 0'),
        ('conv:0', {'temperature': -1.0}, 'temperature must be a positive number, got -1.0'),
        ('conv:0', {'temperature': 1e300}, 'temperature must be a positive number, got 1e+300'),
        ('conv:0', {'dtype': torch.float64}, 'dtype must be None, torch.bfloat16 or torch.float16'),
        ('conv:0', {'preset': 'paper'}, "unknown preset 'paper': there are paper-lenet"),
        ('conv:0', {'preset': 'paper-lenet', 'tilt': 3.0}, "preset='paper-lenet' fixes reference, temperature and"),
        ('conv:0', {'reference': 'pink'}, "unknown reference 'pink'"),
        ('conv:0', {'size': 1}, 'the model refuses 1 x 1 images'),
        ('conv:0', {'device': 'nosuch'}, "device 'nosuch' cannot be used"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    nodes: Any, changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        gallery(Net(), nodes, tmp_path / 'out', **KWARGS | changed)
    assert not (tmp_path / 'out').exists()


def test_train_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='train mode'):
        gallery(Net().train(), 'conv:0', tmp_path, **KWARGS)


def test_folder_that_cannot_be_written_is_refused_before_any_drawing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / 'file').touch()
    monkeypatch.setattr(_Folder, 'draw', None)
    with pytest.raises(OSError, match='file'):
        gallery(Net(), 'conv:0', tmp_path / 'file', **KWARGS)


def test_full_disk_keeps_what_was_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.parent.name == 'images' and len(list(path.parent.glob('*.png'))) == 2:
            write(path, data[:100])
            raise OSError(errno.ENOSPC, 'No space left on device', str(path))
        return write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, 'write_bytes', full)
        with pytest.raises(OSError, match=r'No space left on device.*2 of 4 nodes are finished and kept'):
            gallery(Net(), 'conv:*', tmp_path, **KWARGS)
    before = contents(tmp_path)
    assert len(before) == 2
    assert nodes_on(tmp_path / 'index.html') == ['conv:0', 'conv:1']
    gallery(Net(), 'conv:*', tmp_path, **KWARGS)
    assert before.items() <= contents(tmp_path).items()
    assert nodes_on(tmp_path / 'index.html') == [f'conv:{i}' for i in range(4)]


# ---------------------------------------------------------------------------------------------------------------------
# Resuming


def test_finished_nodes_are_kept_and_new_ones_added(tmp_path: Path) -> None:
    gallery(Net(), 'conv:0-1', tmp_path, **KWARGS)
    before = contents(tmp_path)
    gallery(Net(), ['conv:2', 'conv:0-1'], tmp_path, **KWARGS)
    after = contents(tmp_path)
    assert before.items() <= after.items()
    assert len(after) == 3
    assert nodes_on(tmp_path / 'index.html') == ['conv:2', 'conv:0', 'conv:1']


def test_page_keeps_nodes_of_earlier_runs_with_the_same_settings(tmp_path: Path) -> None:
    gallery(Net(), ['conv:1', 'conv:3', 'nosuch:1'], tmp_path, **KWARGS)
    gallery(Net(), 'conv:0', tmp_path, **KWARGS | {'seed': 1})
    (tmp_path / 'images' / 'notes.png').write_bytes(b'no picture')
    visualize(Net(), 'conv:0', **KWARGS).save(tmp_path / 'images' / 'alone.png')
    before = contents(tmp_path)
    page = gallery(Net(), ['conv:2', 'conv:1'], tmp_path, **KWARGS)
    assert nodes_on(page) == ['conv:2', 'conv:1', 'conv:3']
    assert '3 drawn' in page.read_text()
    assert 'missing' not in page.read_text()
    assert before.items() <= contents(tmp_path).items()


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes the settings that a picture tells."""
    samples = Samples.load(path)
    change(samples.settings)
    samples.save(path)


OLDER: list[Callable[[dict[str, Any]], Any]] = [
    lambda settings: [settings.pop('views'), settings.pop('schedule')],  # from before the views
    lambda settings: settings['views'][0].update(move=0.04),
    lambda settings: settings['schedule'].update(average=0.5),
]


@pytest.mark.parametrize(('temperature', 'steps', 'kept'), [(None, 8, False), (1.0, 70, True)])
@pytest.mark.parametrize('older', OLDER)
def test_pictures_of_an_older_sampler_are_refused(
    temperature: float | None, steps: int, kept: bool, older: Callable[[dict[str, Any]], Any], tmp_path: Path
) -> None:
    """Those of the exact regime are as they were, and are kept."""
    settings = KWARGS | {'temperature': temperature, 'steps': steps}
    gallery(Net(), 'conv:0', tmp_path, **settings)
    if not kept or older is OLDER[0]:
        rewrite(tmp_path / 'images' / room.file_name('conv:0'), older)
    before = contents(tmp_path)
    refused = pytest.raises(ValueError, match=r'\(conv:0: drawn by another schedule\): .*--overwrite')
    with nullcontext() if kept else refused:
        gallery(Net(), 'conv:0', tmp_path, **settings)
    assert contents(tmp_path) == before


def test_a_gallery_begun_when_requests_held_all_laws_of_views_goes_on(tmp_path: Path) -> None:
    gallery(Net(), ['conv:0', 0], tmp_path, **KWARGS)
    laws = [views._asdict() for views in (PHOTOGRAPHS, SMALL_PHOTOGRAPHS._replace(move=0.04), PLAIN)]
    more = {'views': laws, 'schedule': Schedule()._asdict()}
    for path in (tmp_path / 'images').iterdir():
        rewrite(path, lambda settings: settings['request'].update(more))
    before = contents(tmp_path)
    gallery(Net(), ['conv:0-1', 0], tmp_path, **KWARGS)
    assert before.items() <= contents(tmp_path).items()


def test_another_law_of_views_refuses_the_nodes_that_it_is_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gallery(Net(), ['conv:0', 0], tmp_path, **KWARGS)
    monkeypatch.setattr(views_room, 'SMALL_PHOTOGRAPHS', SMALL_PHOTOGRAPHS._replace(move=0.04))
    gallery(Net(), 'conv:0-1', tmp_path, **KWARGS)
    with pytest.raises(ValueError, match=r'1 of these nodes with other settings \(0: drawn by another schedule\)'):
        gallery(Net(), ['conv:0', 0], tmp_path, **KWARGS)


@pytest.mark.parametrize(
    ('seed', 'changed', 'message'),
    [
        (0, {'steps': 9}, 'steps 8, now 9'),
        (0, {'seed': 1}, 'seed 0, now 1'),
        (0, {'temperature': 0.1}, 'temperature None, now 0.1'),
        (0, {'reference': 'white'}, "reference 'natural', now 'white'"),
        (0, {'size': 14}, r'size \[12, 12\], now \[14, 14\]'),
        (1, {}, 'weights'),
    ],
)
def test_other_settings_are_refused_unless_overwritten(
    seed: int, changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    gallery(Net(), 'conv:0', tmp_path, **KWARGS)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=rf'1 of these nodes with other settings \(conv:0: {message}.*--overwrite'):
        gallery(Net(seed), 'conv:0', tmp_path, **KWARGS | changed)
    assert contents(tmp_path) == before
    gallery(Net(seed), 'conv:0', tmp_path, overwrite=True, **KWARGS | changed)
    assert contents(tmp_path) != before
    gallery(Net(seed), 'conv:0', tmp_path, **KWARGS | changed)


def test_other_arguments_of_the_network_are_other_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, kwargs = tmp_path / 'page', ['--model-kwargs', 'mirror=False']
    argv = ['gallery', 'gencnn_resnet11_w64', '--nodes', '3', '-n', '1', '--steps', '8', '--device', 'cpu']
    assert cli([*argv, '--out', str(out), *kwargs]) == 0
    before = contents(out)
    assert cli([*argv, '--out', str(out), *kwargs]) == 0
    assert contents(out) == before
    assert cli([*argv, '--out', str(out)]) == 2
    assert "model_kwargs ['mirror=False'], now None" in capsys.readouterr().err
    repeat = json.loads(Page((out / 'index.html').read_text()).blobs[0])['rows'][-2:]
    assert ['Repeat it', f'gencnn visualize --like images/{next(iter(before))} --model-kwargs mirror=False'] in repeat
    assert cli(['visualize', '--like', str(out / 'images' / next(iter(before))), '--out', str(tmp_path / 'a.png')]) == 2
    assert 'give --model-kwargs mirror=False' in capsys.readouterr().err


def test_numbers_of_numpy_are_the_same_settings(tmp_path: Path) -> None:
    gallery(Net(), range(2), tmp_path, **KWARGS)
    before = sorted(path.stat().st_mtime_ns for path in (tmp_path / 'images').iterdir())
    numbers = {k: v if k == 'progress' else np.int64(v) for k, v in KWARGS.items()}
    for size in numbers['size'], (numbers['size'], numbers['size']):
        gallery(Net(), np.arange(2), tmp_path, **numbers | {'size': size})
    assert sorted(path.stat().st_mtime_ns for path in (tmp_path / 'images').iterdir()) == before


def test_place_of_the_run_is_no_setting(tmp_path: Path) -> None:
    gallery(Net(), 'conv:0', tmp_path, **KWARGS)
    before = contents(tmp_path)
    gallery(Net(), 'conv:0', tmp_path, device='cpu', **KWARGS | {'size': (12, 12)})
    assert contents(tmp_path) == before


def test_damaged_node_is_drawn_again_and_leftovers_are_removed(tmp_path: Path) -> None:
    gallery(Net(), 'conv:0-1', tmp_path, **KWARGS)
    before = contents(tmp_path)
    name = room.file_name('conv:0')
    (tmp_path / 'images' / name).write_bytes(before[name][1][:200])
    leftover, beside = (tmp_path / 'images' / f'.{name}.{i}.partial' for i in range(2))
    for path in leftover, beside:
        path.write_bytes(b'half')
    os.utime(leftover, (0, 0))
    gallery(Net(), 'conv:0-1', tmp_path, **KWARGS)
    after = contents(tmp_path)
    assert set(after) == set(before) | {beside.name}
    other = room.file_name('conv:1')
    assert after[other] == before[other]
    assert read_entry(tmp_path / 'images' / name).node == 'conv:0'


def test_a_file_that_another_run_finishes_meanwhile_is_no_leftover(tmp_path: Path) -> None:
    gallery(Net(), 'conv:0', tmp_path, **KWARGS)
    (tmp_path / 'images' / '.gone.partial').symlink_to('nowhere')  # listed, and then not there
    gallery(Net(), 'conv:0-1', tmp_path, **KWARGS)
    assert len(drawn(tmp_path)) == 2


LENET = ['gallery', 'gencnn_lenet.vis_mnist', '--nodes', '0-7', '-n', '2', '--steps', '240', '--size', '28']


@pytest.mark.parametrize('how', ['SIGKILL', 'SIGINT'])
def test_interrupted_run_goes_on_and_equals_a_whole_one(how: str, tmp_path: Path) -> None:
    out, whole = tmp_path / 'out', tmp_path / 'whole'
    command = [sys.executable, '-m', 'timm_gencnn.cli', *LENET, '--device', 'cpu', '--out', str(out)]
    environment = os.environ | {'PYTHONPATH': str(Path(__file__).parents[1]), 'OMP_NUM_THREADS': '1'}
    listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # shells ignore it for background jobs
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=listen) as process:
        while process.poll() is None and len(list(out.glob('images/*.png'))) < 2:
            time.sleep(0.002)
        process.send_signal(getattr(signal, how))
        error = process.communicate(timeout=60)[1]
    assert process.returncode == (-signal.SIGKILL if how == 'SIGKILL' else 130), error
    assert 'Traceback' not in error
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.glob('images/*.png')}
    assert 2 <= len(before) < 8
    page = (out / 'index.html').read_text()
    assert page.endswith('</html>\n')
    if how == 'SIGINT':
        assert len(Page(page).cards) == len(before)
        assert f'{8 - len(before)} still missing' in page

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert cli([*LENET, '--device', 'cpu', '--out', str(out)]) == 0
        assert cli([*LENET, '--device', 'cpu', '--out', str(whole)]) == 0
    finally:
        torch.set_num_threads(threads)
    assert before.items() <= contents(out).items()
    assert drawn(out) == drawn(whole)
    assert nodes_on(out / 'index.html') == nodes_on(whole / 'index.html')
    assert [str(name).split()[0] for name in nodes_on(out / 'index.html')] == [str(i) for i in range(8)]


def test_page_is_written_while_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    @functools.wraps(visualize)
    def watched(net: nn.Module, node: str, **kwargs: Any) -> Any:
        seen.append(len(nodes_on(tmp_path / 'index.html')))
        return visualize(net, node, **kwargs)

    monkeypatch.setattr(room, 'visualize', watched)
    monkeypatch.setattr(room, 'PAGE_INTERVAL', 0.0)
    monkeypatch.setattr(room, 'PAGE_SHARE', 1e9)
    gallery(Net(), 'conv:*', tmp_path, **KWARGS)
    assert seen == [0, 1, 2, 3]


# ---------------------------------------------------------------------------------------------------------------------
# The page in a browser


class Browser:
    """Headless Chromium, driven over its DevTools pipe."""

    FLAGS = (
        '--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking '
        '--disable-component-update --disable-sync --remote-debugging-pipe'
    )

    def __init__(self, profile: Path):
        self.profile = profile
        self.ids = itertools.count(1)
        self.events: list[dict[str, Any]] = []
        self.buffer = b''
        child_in, self.out = os.pipe()
        self.back, child_out = os.pipe()
        command = f'exec "$@" 3<&{child_in} 4>&{child_out}'  # Chromium listens on 3 and answers on 4
        self.process = subprocess.Popen(
            ['bash', '-c', command, 'bash', CHROMIUM, *self.FLAGS.split(), f'--user-data-dir={profile}', 'about:blank'],
            pass_fds=(child_in, child_out),
            stderr=subprocess.DEVNULL,
        )
        os.close(child_in)
        os.close(child_out)
        self.session = ''
        targets = self.call('Target.getTargets')['targetInfos']
        target = next(info['targetId'] for info in targets if info['type'] == 'page')
        self.session = self.call('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
        for domain in 'Page', 'Runtime', 'Network':
            self.call(f'{domain}.enable')

    def receive(self) -> dict[str, Any]:
        while b'\0' not in self.buffer:
            data = os.read(self.back, 2**20)
            assert data, 'the browser is gone'
            self.buffer += data
        message, self.buffer = self.buffer.split(b'\0', 1)
        return json.loads(message)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        message = {'id': next(self.ids), 'method': method, 'params': params}
        if self.session:
            message['sessionId'] = self.session
        os.write(self.out, json.dumps(message).encode() + b'\0')
        while (answer := self.receive()).get('id') != message['id']:
            self.events.append(answer)
        assert 'error' not in answer, answer
        return answer['result']

    def open(self, page: Path, fragment: str = '', width: int = 1200, height: int = 900) -> None:
        """Loads the page afresh, at a window size."""
        self.call(
            'Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.call('Page.navigate', url='about:blank')
        self.until("location.href == 'about:blank'")
        self.events.clear()
        self.call('Page.navigate', url=page.as_uri() + fragment)
        self.until("document.readyState == 'complete' && typeof restore == 'function'")

    def run(self, expression: str) -> Any:
        """Value of a JavaScript expression, after the next two frames."""
        self.call(
            'Runtime.evaluate',
            expression='new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))',
            awaitPromise=True,
        )
        answer = self.call('Runtime.evaluate', expression=expression, returnByValue=True)
        assert 'exceptionDetails' not in answer, answer
        return answer['result'].get('value')

    def until(self, expression: str) -> None:
        end = time.monotonic() + 30
        while not self.run(expression):
            assert time.monotonic() < end, f'{expression} never came true'

    def press(self, *keys: str) -> None:
        for key in keys:
            text = {'text': '\r' if key == 'Enter' else key} if len(key) == 1 or key == 'Enter' else {}
            codes = {'Enter': 13, 'Escape': 27}
            code = {'windowsVirtualKeyCode': codes[key]} if key in codes else {}
            self.call('Input.dispatchKeyEvent', type='keyDown', key=key, **text, **code)
            self.call('Input.dispatchKeyEvent', type='keyUp', key=key, **code)

    def swipe(self, start: tuple[int, int], end: tuple[int, int]) -> None:
        for kind, points in ('touchStart', [start]), ('touchMove', [end]), ('touchEnd', []):
            self.call('Input.dispatchTouchEvent', type=kind, touchPoints=[{'x': x, 'y': y} for x, y in points])

    def close(self) -> None:
        os.close(self.out)
        os.close(self.back)
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope='module')
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if not CHROMIUM.exists():
        pytest.skip(f'{CHROMIUM} is not installed')
    browser = Browser(tmp_path_factory.mktemp('profile'))
    yield browser
    browser.close()


@pytest.fixture(scope='module')
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of 2,001 nodes; its time to build is asserted, too."""
    folder = tmp_path_factory.mktemp('large')
    gallery(Net(), 'conv:0', folder, **KWARGS | {'n': 4, 'size': 24})
    entry = read_entry(next(folder.glob('images/*.png')))
    entries = [replace(entry, node=f'layer{i // 40}.conv:{i % 40}') for i in range(2000)]
    began = time.process_time()
    text = render('net', [*entries, Entry('layer50.conv:0', error='the unit is dead')])
    assert time.process_time() - began < 3
    page = folder / 'large.html'
    page.write_text(text)
    return page


LOADED = "document.querySelectorAll('.card img[src]').length"
FOCUS = 'document.activeElement.dataset.node'
OPEN = "document.querySelector('dialog').open && document.querySelector('#title').textContent"


def test_only_pictures_near_the_screen_are_loaded(browser: Browser, large: Path) -> None:
    browser.open(large)
    assert browser.run("document.querySelectorAll('.card').length") == 2001
    browser.until(f'{LOADED} > 4')
    assert browser.run(LOADED) < 60
    assert browser.run("document.querySelector('.card img').src.startsWith('data:image/webp')")
    browser.until("document.querySelector('.card img').naturalWidth > 0")
    browser.run('scrollTo(0, document.body.scrollHeight / 2)')
    browser.until("!document.querySelector('.card img').src")
    browser.until(f'{LOADED} > 4')
    assert browser.run(LOADED) < 60
    middle = browser.run("document.querySelector('.card img[src]').closest('.card').dataset.node")
    assert int(re.match(r'layer(\d+)', middle)[1]) > 10


def test_page_asks_nothing_of_the_network(browser: Browser, large: Path) -> None:
    browser.open(large)
    browser.until(f'{LOADED} > 4')
    urls = [
        event['params']['request']['url'] for event in browser.events if event['method'] == 'Network.requestWillBeSent'
    ]
    assert [url for url in urls if not url.startswith('data:')] == [large.as_uri()]
    refused = """new Promise(done => {
        document.addEventListener('securitypolicyviolation', event => done(event.effectiveDirective));
        fetch('http://127.0.0.1:9/').catch(() => setTimeout(done, 1000, 'asked'));
    })"""
    answer = browser.call('Runtime.evaluate', expression=refused, awaitPromise=True)
    assert answer['result']['value'] == 'connect-src'


@pytest.mark.parametrize(
    ('fragment', 'count', 'sections', 'first'),
    [
        ('#filter=layer7.', 40, 1, 'layer7.conv:0'),
        ('#filter=CONV:39+layer1', 11, 11, 'layer1.conv:39'),
        ('#filter=failed', 1, 1, 'layer50.conv:0'),
        ('#filter=nosuch', 0, 0, None),
    ],
)
def test_address_filters(
    browser: Browser, large: Path, fragment: str, count: int, sections: int, first: str | None
) -> None:
    browser.open(large, fragment)
    assert browser.run("document.querySelectorAll('li:not([hidden])').length") == count
    assert browser.run("document.querySelector('li:not([hidden]) .card')?.dataset.node ?? null") == first
    assert browser.run("document.querySelector('#count').value") == f'{count} of 2001'
    assert browser.run("document.querySelector('#nothing').hidden") is (count > 0)
    assert browser.run("document.querySelectorAll('section:not([hidden])').length") == sections


def test_keyboard(browser: Browser, large: Path) -> None:
    browser.open(large)
    columns = browser.run("getComputedStyle(document.querySelector('ul')).gridTemplateColumns.split(' ').length")
    assert columns >= 4
    browser.press('j')
    assert browser.run(FOCUS) == 'layer0.conv:0'
    browser.press('j', 'ArrowRight', 'k')
    assert browser.run(FOCUS) == 'layer0.conv:1'
    browser.press('ArrowDown')
    assert browser.run(FOCUS) == f'layer0.conv:{1 + columns}'
    browser.press('ArrowUp', 'ArrowLeft', 'ArrowLeft')
    assert browser.run(FOCUS) == 'layer0.conv:0'
    browser.press('Enter')
    assert browser.run(OPEN) == 'layer0.conv:0'
    assert browser.run("document.activeElement == document.querySelector('dialog')")
    browser.until("document.querySelector('.open img').naturalWidth > 0")
    browser.press('j', 'ArrowRight', 'ArrowLeft')
    assert browser.run(OPEN) == 'layer0.conv:1'
    assert browser.run('location.hash') == '#node=layer0.conv%3A1'
    assert 'gallery regime' in browser.run("document.querySelector('dl').textContent")
    browser.press('Escape')
    assert browser.run(OPEN) is False
    assert browser.run(FOCUS) == 'layer0.conv:1'
    browser.press('/', *'layer49')
    assert browser.run("document.querySelector('#count').value") == '40 of 2001'
    browser.press('Enter')
    assert browser.run(FOCUS) == 'layer49.conv:0'
    browser.press('/', 'Escape')
    assert browser.run("document.querySelector('#count').value") == '2001 nodes'


def test_touch_on_a_phone(browser: Browser, large: Path) -> None:
    browser.open(large, '#node=layer3.conv:5', width=390, height=844)
    assert browser.run('document.documentElement.scrollWidth') <= 390
    assert browser.run("getComputedStyle(document.querySelector('ul')).gridTemplateColumns.split(' ').length") == 2
    assert browser.run(OPEN) == 'layer3.conv:5'
    browser.swipe((300, 300), (80, 310))
    assert browser.run(OPEN) == 'layer3.conv:6'
    browser.swipe((80, 300), (300, 310))
    assert browser.run(OPEN) == 'layer3.conv:5'
    browser.swipe((200, 300), (210, 100))
    assert browser.run(OPEN) == 'layer3.conv:5'
    box = browser.run("JSON.stringify(document.querySelector('#close').getBoundingClientRect())")
    assert min(json.loads(box)['width'], json.loads(box)['height']) >= 44


HOSTILE = [
    '"><img src=x onerror="document.title=1">',
    '</script><script>document.title="owned"</script>',
    "1 <!--<script>' & {{sections}}",
    '{{hash}} \u2028 \x00',
]


def test_hostile_names_are_text(browser: Browser, large: Path, tmp_path: Path) -> None:
    entry = read_entry(next(large.parent.glob('images/*.png')))
    entries = [replace(entry, node=name) for name in HOSTILE]
    entries += [Entry(name, error=f'{name} failed') for name in HOSTILE]
    page = tmp_path / 'hostile.html'
    page.write_text(render(HOSTILE[1] + HOSTILE[2], entries), encoding='utf-8')
    parsed = Page(page.read_text(encoding='utf-8'))
    names = [name.replace('\0', '\ufffd') for name in HOSTILE]
    assert len(parsed.cards) == len(parsed.blobs) == 8
    assert len(parsed.images) == 4
    browser.open(page)
    assert browser.run('document.title') == f'{HOSTILE[1]}{HOSTILE[2]} · gallery'
    assert browser.run("[...document.querySelectorAll('.card')].map(card => card.dataset.node)") == names * 2
    assert browser.run('document.images.length') == 5
    assert browser.run('document.scripts.length') == 9
    browser.run('cards[5].click()')
    assert HOSTILE[1] in browser.run("document.querySelector('dl').textContent")
    assert browser.run('document.images.length') == 5


def test_dumped_dom_has_pictures(large: Path, tmp_path: Path) -> None:
    """The plain command line, without DevTools."""
    if not CHROMIUM.exists():
        pytest.skip(f'{CHROMIUM} is not installed')
    flags = Browser.FLAGS.replace('--remote-debugging-pipe', '--virtual-time-budget=2000 --dump-dom').split()
    url = f'{large.as_uri()}#filter=layer7.'
    command = [str(CHROMIUM), *flags, f'--user-data-dir={tmp_path}', url]
    text = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    parsed = Page(text)
    loaded = [image for image in parsed.images if (image.get('src') or '').startswith('data:image/webp')]
    assert 4 < len(loaded) <= 40
