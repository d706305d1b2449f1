"""What a stranger's repository may do to whoever loads it: nothing but fail with a clear error.

Malformed configurations and safetensors headers are generated systematically, put on a loopback Hub, and loaded by a
client process of their own, whose memory is limited: if one of them crashed it, the pool would break.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hub_client
import pytest
from hub_client import TOKEN, Client
from hub_server import Blob, LoopbackHub

BIG = 10**12
WRONG: dict[str, list[Any]] = {
    'number': [
        '/etc/passwd',
        'http://evil.example/x',
        '../../x',
        None,
        -1,
        BIG,
        2**70,
        0.5,
        1e308,
        [1],
        {'a': 1},
        True,
    ],
    'size': [
        '3x224x224',
        None,
        [3],
        [3, 224],
        [0, 160, 160],
        [3, -1, 32],
        [3, BIG, BIG],
        [BIG, 160, 160],
        [3, 32, 'x'],
        7,
    ],
    'numbers': ['0.5', [], ['x'], [float('nan')], [float('inf')], [[0.5]], {'0': 0.5}, [None], 0.5],
    'flag': ['true', 1, None, 'hf', [], {}],
    'name': [7, ['x'], {'x': 1}, '/etc/passwd', '../x', 'http://evil.example/x', 'a\0b', 'x' * 1000, True],
    'module': [7, [7], {'x': 1}, '/etc/passwd', ['../x'], 'http://evil.example/x', 'a\0b', 'x' * 1000, True],
    'names': [7, 'x', [7], {'0': 7}, [['x']], ['a\0b'], True],
    'log_z': ['x', [1.0], [1.0] * 4, [1.0, 2.0, float('nan')], [1.0, 2.0, '3'], [1.0, 2.0, 1e300], 3.0, {}, []],
}
FIELDS = {
    ('pretrained_cfg', 'input_size'): 'size',
    ('pretrained_cfg', 'test_input_size'): 'size',
    ('pretrained_cfg', 'fixed_input_size'): 'flag',
    ('pretrained_cfg', 'interpolation'): 'name',
    ('pretrained_cfg', 'crop_mode'): 'name',
    ('pretrained_cfg', 'mean'): 'numbers',
    ('pretrained_cfg', 'std'): 'numbers',
    ('pretrained_cfg', 'num_classes'): 'number',
    ('pretrained_cfg', 'label_names'): 'names',
    ('pretrained_cfg', 'first_conv'): 'module',
    ('pretrained_cfg', 'classifier'): 'module',
    ('model_args', 'num_classes'): 'number',
    ('model_args', 'in_chans'): 'number',
    ('model_args', 'img_size'): 'size',
    ('model_args', 'log_z'): 'log_z',
    ('num_classes',): 'number',
    ('label_names',): 'names',
}
NULL_MEANS_DEFAULT = {'test_input_size', 'img_size'}
REDIRECTS = {
    'url': ['http://evil.example/x.pth', ['http://evil.example/x', 'x']],
    'file': ['/etc/passwd', '../../x.pth', 'pytorch_model.bin'],
    'state_dict': [{}, {'conv1.weight': [0.0]}],
    'hf_hub_id': ['mallory/other', '../x'],
    'hf_hub_filename': ['../../x.bin', 'pytorch_model.bin', '/etc/passwd'],
    'source': ['url', 'file', 'timm', 'local-dir'],
    'custom_load': [True, 'hf', 'timm', 1],
    'unheard_of': [1, None, 'x'],
}
ARGUMENTS = {
    'pretrained': [True],
    'checkpoint_path': ['/etc/passwd', 'x.pth'],
    'cache_dir': ['/tmp/elsewhere', '..'],
    'pretrained_cfg': [{'file': '/etc/passwd'}],
    'pretrained_cfg_overlay': [{'file': '/etc/passwd'}],
    'pretrained_filter_fn': ['os.system'],
    'pretrained_strict': [False],
    'pruned': [True],
    'device': ['cuda:99', 'meta'],
    'dtype': ['float64'],
    '__class__': ['x'],
    'a-b': [1],
    'block_fn': ['os.system("x")', 7, {'a': 'b'}],
    'layers': [[BIG] * 4, [1000, 1000, 1000, 1 << 20], 'x', [[[[1]]]], [0.5], [2] * 5000],
    'channels': [[1 << 20] * 4, [-1] * 4, [], ['x']],
    'stem_width': [1 << 20, -1, 'x/y', 1.5],
    'act_layer': ['/bin/sh', 'no_such_layer', {'a': {'b': {'c': {'d': 1}}}}],
    'global_pool': ['no_such_pool', 'http://x', 7],
    'no_such_argument': [1, 'x', [1, 2]],
}
WHOLE = [
    *(b'', b'\0' * 100, b'{', b'[]', b'7', b'null', b'"x"', b'{}', b'\xff\xfe', b'[' * 100_000, b'{"a":' * 5000),
    *(b'{"architecture": 1e999}', b'[' + b'9' * 5000 + b']', b'NaN', b'{"architecture": null}'),
]
ARCHITECTURES = [
    *(
        None,
        7,
        '',
        'resnet18x',
        'gencnn_no_such',
        '/etc/passwd',
        '../x',
        'http://evil.example',
        'os.system',
        ['resnet18'],
    ),
    *({'a': 1}, 'gencnn_test_resnet/../x', 'gencnn_test_resnet\0', 'gencnn_test_vit', 'local-dir:/etc', 'x' * 10_000),
]


def valid_config() -> dict[str, Any]:
    return {
        'architecture': 'gencnn_test_resnet',
        'num_classes': 3,
        'num_features': 96,
        'global_pool': 'avg',
        'model_args': {'num_classes': 3, 'in_chans': 1, 'log_z': [0.1, -2.0, 0.5], 'global_pool': 'avg'},
        'pretrained_cfg': {
            **{'tag': None, 'custom_load': False, 'input_size': [1, 160, 160], 'fixed_input_size': False},
            **{'interpolation': 'bilinear', 'crop_pct': 0.95, 'crop_mode': 'center', 'mean': [0.5], 'std': [0.5]},
            **{
                'num_classes': 3,
                'pool_size': [5, 5],
                'test_input_size': [1, 160, 160],
                'first_conv': 'conv1.0',
                'classifier': 'fc',
            },
        },
    }


def malformed_configs() -> Iterator[tuple[str, bytes]]:
    def changed(path: tuple[str, ...], value: Any) -> tuple[str, bytes]:
        config = copy.deepcopy(valid_config())
        part = config
        for key in path[:-1]:
            part = part[key]
        part[path[-1]] = value
        return f'{".".join(path)} = {value!r:.60}', json.dumps(config).encode()

    for path, kind in FIELDS.items():
        for value in WRONG[kind]:
            if not (value is None and (path[-1] in NULL_MEANS_DEFAULT or kind in ('names', 'log_z'))):
                yield changed(path, value)
    for key, values in REDIRECTS.items():
        for value in values:
            yield changed(('pretrained_cfg', key), value)
    for key, values in ARGUMENTS.items():
        for value in values:
            yield changed(('model_args', key), value)
    for value in ARCHITECTURES:
        yield changed(('architecture',), value)
    for part in ('pretrained_cfg', 'model_args'):
        for value in (None, [], 'x', 7, [[1]]):
            yield changed((part,), value)
    for content in WHOLE:
        yield f'{content[:40]!r}', content


def malformed_weights(valid: bytes) -> Iterator[tuple[str, bytes]]:
    (size,) = struct.unpack('<Q', valid[:8])
    header, data = json.loads(valid[8 : 8 + size]), valid[8 + size :]
    name = 'fc.weight'

    def file(content: dict[str, Any] | bytes, length: int | None = None) -> bytes:
        text = content if isinstance(content, bytes) else json.dumps(content).encode()
        return struct.pack('<Q', len(text) if length is None else length) + text + data

    for kept in (0, 4, 8, 9, 8 + size // 2, 8 + size, 9 + size, len(valid) // 2, len(valid) - 1):
        yield f'{kept} bytes', valid[:kept]
    for length in (0, 1, size - 1, size + 1, len(valid), 100_000_001, 2**63, 2**64 - 1):
        yield f'header of {length} bytes', file(header, length)
    for text in (b'', b'[]', b'null', b'{', b'\xff' * 50, b'[' * 50_000, b'{"a": 1}', b'{"__metadata__": 7}'):
        yield f'header {text[:20]!r}', file(text)
    for key, values in {
        'dtype': ['F99', 7, None, 'PICKLE', 'F64'],
        'shape': [[2**40, 2**40], [-1, 3], [0], ['x'], None, [3, 96, 1, 1, 1], [288], [1.5, 2]],
        'data_offsets': [[0, 2**62], [-4, 0], [8, 4], [0, 0], ['a', 'b'], None, [2**64, 2**64 + 4]],
    }.items():
        for value in values:
            yield f'{key} = {value}', file({**header, name: {**header[name], key: value}})
    yield 'a tensor missing', file({k: v for k, v in header.items() if k != name})
    yield 'a name that is a path', file({('../../x' if k == name else k): v for k, v in header.items()})
    yield 'two tensors in one place', file({**header, name: {**header[name], 'data_offsets': [0, 1152]}})
    yield 'a pickle', pickle.dumps({'x': 1})
    dice = random.Random(0)
    for _ in range(40):
        damaged = bytearray(valid[: 8 + size])
        for _ in range(dice.randrange(1, 20)):
            damaged[dice.randrange(len(damaged))] = dice.randrange(256)
        if bytes(damaged) != valid[: 8 + size]:
            yield 'random damage', bytes(damaged) + data


@pytest.fixture(scope='module')
def valid(_hub: LoopbackHub, client: Client, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Weights that fit `valid_config`: the control of all that follows."""
    folder = tmp_path_factory.mktemp('valid') / 'folder'
    assert not client(hub_client.push, 'mallory/net', dry_run=folder).error
    weights = (folder / 'model.safetensors').read_bytes()
    serve(_hub, 'mallory/net', {'config.json': json.dumps(valid_config()).encode(), 'model.safetensors': weights})
    outcome = client(hub_client.pull, 'mallory/net')
    assert outcome.value['log_z'] is not None, outcome.everything
    assert outcome.value['logits'] == client(hub_client.expected).value['logits']
    return weights


def serve(hub: LoopbackHub, name: str, files: dict[str, bytes]) -> None:
    repo = hub.new_repo(name)
    blobs = {path: Blob(content, lfs=path.endswith(('.safetensors', '.bin'))) for path, content in files.items()}
    hub.objects.update({blob.oid: blob.content for blob in blobs.values()})
    repo.commit('main', blobs, 'as somebody uploaded it')


def tree(folder: Path) -> set[Path]:
    return {path for path in folder.rglob('*') if not any('hf_home' in part for part in path.parts)}


def check_refused(
    hub: LoopbackHub,
    client: Client,
    cases: dict[str, dict[str, bytes]],
    outside: Path,
    through: str,
    clearly: bool,
) -> None:
    before = tree(outside)
    for number, files in enumerate(cases.values()):
        serve(hub, f'mallory/{through}-{number}', files)
    names = [f'mallory/{through}-{number}' for number in range(len(cases))]
    outcomes, grown = client(hub_client.pull_all, names, through).value
    accepted = [case for case, (kind, _) in zip(cases, outcomes, strict=True) if not kind]
    assert accepted == []
    if clearly:
        for case, name, (kind, error) in zip(cases, names, outcomes, strict=True):
            assert kind == 'ValueError', (case, kind, error)
            assert name in error, (case, error)
    assert grown < 300, f'{grown} MB more memory than before'
    assert tree(outside) == before


@pytest.mark.parametrize('through', ['from_pretrained', 'timm'])
def test_malformed_configs(hub: LoopbackHub, client: Client, valid: bytes, tmp_path: Path, through: str) -> None:
    cases = {f'{i}: {case}': content for i, (case, content) in enumerate(malformed_configs())}
    assert len(cases) > 200
    files = {case: {'config.json': content, 'model.safetensors': valid} for case, content in cases.items()}
    if through == 'timm':
        # timm reads config.json by itself, and puts its own values in some entries: is the defect still there?
        sound, *read = client(hub_client.timm_reads, [json.dumps(valid_config()).encode(), *cases.values()]).value
        files = dict([item for item, seen in zip(files.items(), read, strict=True) if seen != sound][::4])
    check_refused(hub, client, files, tmp_path.parent, through, clearly=through == 'from_pretrained')


@pytest.mark.parametrize('through', ['from_pretrained', 'timm'])
def test_malformed_weights(hub: LoopbackHub, client: Client, valid: bytes, tmp_path: Path, through: str) -> None:
    config = json.dumps(valid_config()).encode()
    cases = {f'{i}: {case}': content for i, (case, content) in enumerate(malformed_weights(valid))}
    assert len(cases) > 70
    files = {case: {'config.json': config, 'model.safetensors': content} for case, content in cases.items()}
    some = dict(list(files.items())[:: 4 if through == 'timm' else 1])
    check_refused(hub, client, some, tmp_path.parent, through, clearly=True)


class Bomb:
    """Leaves a file behind wherever it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize('through', ['from_pretrained', 'timm'])
@pytest.mark.parametrize('name', ['pytorch_model.bin', 'model.safetensors', 'model.pth'])
def test_nothing_is_unpickled(
    hub: LoopbackHub, client: Client, valid: bytes, tmp_path: Path, name: str, through: str
) -> None:
    bomb = pickle.dumps({'x': Bomb(tmp_path / 'exploded')})
    pickle.loads(bomb)  # the control: this is a bomb
    (tmp_path / 'exploded').rmdir()
    repo = f'mallory/bomb-{name}-{through}'
    serve(hub, repo, {'config.json': json.dumps(valid_config()).encode(), name: bomb})
    outcome = client(hub_client.pull, repo, through)
    assert outcome.kind == 'ValueError'
    assert repo in outcome.error
    assert not (tmp_path / 'exploded').exists()
    downloaded = [path for _, path, _ in hub.requests if path.endswith(('.bin', '.pth'))]
    assert not downloaded


def test_weights_are_those_that_were_checked(
    hub: LoopbackHub, client: Client, valid: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The repository changes, from good weights to a pickle, as soon as the good weights were downloaded."""
    serve(hub, 'mallory/race', {'config.json': json.dumps(valid_config()).encode(), 'model.safetensors': valid})
    repo, take_fault = hub.repo('mallory/race'), hub.take_fault
    worse = {'config.json': repo.files()['config.json'], 'pytorch_model.bin': pickle.dumps({'x': 1})}

    def then_change(method: str, path: str) -> Any:
        if method == 'GET' and path.startswith('/objects/'):
            serve(hub, 'mallory/race', worse)
            hub.repo('mallory/race').commits.update(repo.commits)
        return take_fault(method, path)

    monkeypatch.setattr(hub, 'take_fault', then_change)
    outcome = client(hub_client.pull, 'mallory/race', 'timm', cache_dir=tmp_path)
    assert outcome.value['logits'] == client(hub_client.expected).value['logits'], outcome.everything
    assert not [path for _, path, _ in hub.requests if path.endswith('.bin')]


def test_file_names_stay_in_the_folder(hub: LoopbackHub, client: Client, valid: bytes, tmp_path: Path) -> None:
    strange = [
        '../evil.txt',
        '../../../evil.txt',
        'images/../../evil.txt',
        '/tmp/evil.txt',
        '..\\evil.txt',
        'C:\\evil.txt',
    ]
    files = {'config.json': json.dumps(valid_config()).encode(), 'model.safetensors': valid}
    serve(hub, 'mallory/names', {**files, **dict.fromkeys(strange, b'evil')})
    outcome = client(hub_client.pull, 'mallory/names', cache_dir=tmp_path / 'a' / 'b' / 'c')
    assert not outcome.error
    assert not [path for path in tmp_path.rglob('*') if 'evil' in path.name]
    assert not Path('/tmp/evil.txt').exists()
    assert not any('evil' in path for _, path, _ in hub.requests)


@pytest.mark.parametrize(
    'name', ['../x', 'mallory/../x', '/etc/passwd', 'mallory/x/../..', 'a/b/c', 'mallory/net@../../x']
)
def test_repository_names_are_checked(client: Client, valid: bytes, name: str) -> None:
    outcome = client(hub_client.pull, name)
    assert outcome.kind in ('HFValidationError', 'OSError')


def test_tokens_stay_secret(hub: LoopbackHub, client: Client) -> None:
    """`client` itself looks for tokens in all that is logged, printed and raised; here in what is published."""
    outcome = client(hub_client.push, 'alice/secret', pictures=1, recipe={'command': 'gencnn train'})
    assert 'alice/secret/preupload' in outcome.log  # requests were logged, in full
    assert '<TOKEN>' in outcome.log
    assert all(TOKEN.encode() not in content for content in hub.repo('alice/secret').files().values())
    refused = client(hub_client.push, 'alice/secret', recipe={'command': f'gencnn train --token {TOKEN}'})
    assert 'README.md would publish a Hub token' in refused.error or 'results.json would publish' in refused.error
