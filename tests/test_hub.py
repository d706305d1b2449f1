"""Publishing and loading, by the real client against a Hub on the loopback interface."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import hub_client
import numpy as np
import pytest
import timm
import torch
from hub_client import OTHER_TOKEN, TOKEN, Client, Outcome, environment
from hub_server import Blob, LoopbackHub

import timm_gencnn

ROOT = Path(__file__).parents[1]
MEASURED = {
    'results': {'dataset': 'ylecun/mnist', 'split': 'test', 'test_error': 0.77, 'nll': 0.025, 'train_loss': 0.001},
    'recipe': {'command': 'gencnn train --config lenet_mnist', 'seed': 0, 'seconds': 400.0, 'hardware': 'one core'},
    'license': 'apache-2.0',
}


def ok(outcome: Outcome) -> Any:
    assert not outcome.error, outcome.everything
    return outcome.value


def card(hub: LoopbackHub, repo: str) -> str:
    return hub.repo(repo).files()['README.md'].decode()


def python_blocks(text: str) -> list[str]:
    return re.findall(r'```python\n(.*?)```', text, re.DOTALL)


@pytest.fixture(scope='module')
def published(client: Client) -> tuple[str, str]:
    """A complete checkpoint: its repository and its commit."""
    commit, _ = ok(client(hub_client.push, 'alice/net', pictures=2, **MEASURED))
    return 'alice/net', commit


def test_push_is_one_commit_of_safe_files(hub: LoopbackHub, published: tuple[str, str]) -> None:
    repo = hub.repo('alice/net')
    assert repo.messages == ['initial commit', 'Publish a generative checkpoint']
    assert set(repo.files()) == {
        *('.gitattributes', 'README.md', 'config.json', 'model.safetensors', 'results.json'),
        *('images/0-000-0-class-0.png', 'images/0-001-1-class-1.png'),
    }
    assert json.loads(repo.files()['results.json'])['results'] == MEASURED['results']
    assert b'alice/secret' not in b''.join(repo.files().values())


@pytest.mark.parametrize('through', ['timm', 'from_pretrained'])
@pytest.mark.parametrize('at', ['', '@main', '@commit'])
def test_pull_gives_the_same_model(client: Client, published: tuple[str, str], through: str, at: str) -> None:
    repo, commit = published
    pulled = ok(client(hub_client.pull, repo + at.replace('commit', commit), through))
    assert pulled == ok(client(hub_client.expected))


def test_pull_adapts_the_classifier_like_timm(client: Client, published: tuple[str, str]) -> None:
    pulled = ok(client(hub_client.pull, published[0], num_classes=7))
    assert len(pulled['logits']) == 2 * 7 * 4
    assert pulled['log_z'] is None


def test_large_files_go_up_in_parts(hub: LoopbackHub, client: Client) -> None:
    ok(client(hub_client.push, 'alice/parts', seed=9))
    assert any(re.fullmatch(r'/objects/\w+/2', path) for _, path, _ in hub.requests)
    assert any(path.startswith('/lfs/complete/') for _, path, _ in hub.requests)


def test_push_of_channels_last_weights(client: Client) -> None:
    ok(client(hub_client.push, 'alice/strides', channels_last=True))
    assert ok(client(hub_client.pull, 'alice/strides')) == ok(client(hub_client.expected))


def test_push_of_a_network_whose_layers_share_weights(tmp_path: Path) -> None:
    model = timm.create_model('gencnn_coat_lite_tiny', num_classes=2)
    folder = timm_gencnn.push_to_hub(model, 'alice/coat', dry_run=tmp_path / 'coat')
    again = timm.create_model(f'local-dir:{folder}', pretrained=True).state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize('classes', [2, 3])
def test_push_of_class_names_of_ones_own(tmp_path: Path, classes: int) -> None:
    """They were lost unless num_classes stood beside them; names of another number of classes still are."""
    model = timm.create_model('test_resnet', num_classes=classes)
    model.pretrained_cfg = {**model.pretrained_cfg, 'label_names': ['ant', 'bee']}
    folder = timm_gencnn.push_to_hub(model, 'alice/insects', dry_run=tmp_path / 'insects')
    loaded = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert loaded.pretrained_cfg.get('label_names') == (['ant', 'bee'] if classes == 2 else None)
    assert model.pretrained_cfg['num_classes'] == 1000  # as it was


def test_push_of_results_that_are_numbers_of_numpy_and_torch(tmp_path: Path) -> None:
    model = timm.create_model('test_resnet', num_classes=2)
    results = {'test_error': np.float32(1.5), 'nll': torch.tensor(0.25), 'images': np.int64(3)}
    folder = timm_gencnn.push_to_hub(model, 'alice/net', results=results, dry_run=tmp_path / 'net')
    measured = json.loads((folder / 'results.json').read_text())['results']
    assert measured == {'test_error': 1.5, 'nll': 0.25, 'images': 3}
    assert '| 1.5 |' in (folder / 'README.md').read_text()
    with pytest.raises(ValueError, match=r'must be numbers, strings and lists, for JSON: .*PosixPath'):
        timm_gencnn.push_to_hub(model, 'alice/net', recipe={'data': tmp_path}, dry_run=tmp_path / 'other')
    assert not (tmp_path / 'other').exists()


def test_push_of_a_configuration_as_timms_own_object(client: Client, tmp_path: Path) -> None:
    folders = [tmp_path / 'dictionary', tmp_path / 'object']
    for folder in folders:
        ok(client(hub_client.push, 'alice/object', cfg_object=folder.name == 'object', dry_run=folder))
    dictionary, as_object = ({p.name: p.read_bytes() for p in folder.iterdir()} for folder in folders)
    assert dictionary == as_object
    assert b'"mean"' in as_object['config.json']


def test_push_again(hub: LoopbackHub, client: Client) -> None:
    first, _ = ok(client(hub_client.push, 'alice/again', pictures=3))
    same, _ = ok(client(hub_client.push, 'alice/again', pictures=3))
    assert same == first
    assert len(hub.repo('alice/again').messages) == 2
    second, _ = ok(client(hub_client.push, 'alice/again', seed=1, pictures=1))
    assert len(hub.repo('alice/again').messages) == 3
    assert [name for name in hub.repo('alice/again').files() if 'images' in name] == ['images/0-000-0-class-0.png']
    assert ok(client(hub_client.pull, 'alice/again')) == ok(client(hub_client.expected, 1))
    assert ok(client(hub_client.pull, f'alice/again@{first}')) == ok(client(hub_client.expected, 0))
    assert second != first


@pytest.mark.parametrize('edit', ['appended', 'one letter', 'foreign'])
def test_a_hand_edited_card_is_kept(hub: LoopbackHub, client: Client, edit: str) -> None:
    name = f'alice/edited-{edit.replace(" ", "-")}'
    ok(client(hub_client.push, name, pictures=2, **MEASURED))
    repo, written = hub.repo(name), card(hub, name)
    theirs = {
        'appended': written + '\nMy own notes.\n',
        'one letter': written.replace('Intended use', 'intended use'),
        'foreign': '---\nlicense: mit\n---\n# My model\n',
    }[edit]
    repo.commit('main', {**repo.commits[repo.branches['main']], 'README.md': Blob(theirs.encode(), False)}, 'edit')
    outcome = client(hub_client.push, name, seed=1, pictures=1, **MEASURED)
    ok(outcome)
    assert f'{name}: README.md was not written by timm_gencnn, or was edited since: it is kept' in outcome.log
    assert card(hub, name) == theirs
    assert 'images/0-001-1-class-1.png' in repo.files()  # the card may show it
    assert ok(client(hub_client.pull, name)) == ok(client(hub_client.expected, 1))
    ok(client(hub_client.push, name, seed=1, pictures=1, overwrite_card=True, **MEASURED))
    assert card(hub, name) != theirs
    assert 'images/0-001-1-class-1.png' not in repo.files()


def test_an_untouched_card_is_renewed(hub: LoopbackHub, client: Client) -> None:
    ok(client(hub_client.push, 'alice/renewed'))
    assert 'No result was measured' in card(hub, 'alice/renewed')
    ok(client(hub_client.push, 'alice/renewed', **MEASURED))
    assert '| error (%) | 0.77 |' in card(hub, 'alice/renewed')


def test_private(hub: LoopbackHub, client: Client, tmp_path: Path) -> None:
    ok(client(hub_client.push, 'alice/private', private=True))
    assert hub.repo('alice/private').private
    assert ok(client(hub_client.pull, 'alice/private', token=TOKEN)) == ok(client(hub_client.expected))
    for token in (False, OTHER_TOKEN):
        refused = client(hub_client.pull, 'alice/private', token=token, cache_dir=tmp_path / str(bool(token)))
        assert refused.kind == 'OSError'
        assert re.search(
            r'alice/private: .*(not logged in|check the name, or log in).*nothing was loaded', refused.error
        )


def test_nothing_private_goes_to_a_public_repository(hub: LoopbackHub, client: Client) -> None:
    ok(client(hub_client.push, 'alice/public'))
    refused = client(hub_client.push, 'alice/public', seed=1, private=True)
    assert refused.kind == 'ValueError'
    assert 'alice/public exists and is public' in refused.error
    assert len(hub.repo('alice/public').messages) == 2
    hub.new_repo('alice/pictures', 'dataset')
    refused = client(hub_client.push_dataset, 'alice/public', 'alice/pictures', private=True)
    assert 'alice/pictures exists and is public' in refused.error
    assert set(hub.repo('alice/pictures', 'dataset').files()) == {'.gitattributes'}


def test_revision_and_pull_request(hub: LoopbackHub, client: Client) -> None:
    ok(client(hub_client.push, 'alice/branches'))
    ok(client(hub_client.push, 'alice/branches', seed=1, revision='v1.0'))
    _, url = ok(client(hub_client.push, 'alice/branches', seed=2, create_pr=True, token=OTHER_TOKEN))
    assert url == f'{hub.endpoint}/alice/branches/discussions/1'
    assert set(hub.repo('alice/branches').branches) == {'main', 'v1.0', 'refs/pr/1'}
    ok(client(hub_client.push, 'alice/branches', seed=3, revision='refs/pr/1'))
    for seed, at in ((0, ''), (1, '@v1.0'), (3, '@refs/pr/1')):
        for through in ('timm', 'from_pretrained'):
            pulled = ok(client(hub_client.pull, f'alice/branches{at}', through))
            assert pulled == ok(client(hub_client.expected, seed))


def test_dry_run_writes_what_would_be_pushed(
    hub: LoopbackHub, client: Client, published: tuple[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / 'dry'
    outcome = client(hub_client.push, 'alice/net', pictures=2, dry_run=folder, **MEASURED)
    assert ok(outcome) == folder
    assert not hub.requests
    pushed = hub.repo('alice/net').files()
    written = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob('*') if p.is_file()}
    assert written == {name: content for name, content in pushed.items() if name != '.gitattributes'}
    for name, content in written.items():
        assert re.search(rf'{re.escape(name.split("/")[-1])} +{len(content):,} bytes', outcome.log)
    refused = client(hub_client.push, 'alice/net', dry_run=tmp_path / 'leak', recipe={'command': TOKEN})
    assert 'would publish a Hub token' in refused.error
    assert not (tmp_path / 'leak').exists()
    again = client(hub_client.push, 'alice/net', dry_run=folder)
    assert again.kind == 'ValueError'
    assert 'is not empty' in again.error


def test_gallery_dataset_round_trip(hub: LoopbackHub, client: Client) -> None:
    ok(client(hub_client.push_dataset, 'alice/with-gallery', 'alice/gallery', private=True))
    assert hub.repo('alice/gallery', 'dataset').private
    assert any(name.endswith('.parquet') for name in hub.repo('alice/gallery', 'dataset').files())
    rows = ok(client(hub_client.load_gallery, 'alice/gallery', token=TOKEN))
    written = ok(client(hub_client.gallery_rows))
    assert [{**row, 'settings': ''} for row in rows] == [{**row, 'settings': ''} for row in written]
    assert {json.loads(row['settings'])['model'] for row in rows} == {'hf-hub:alice/with-gallery'}
    assert {'image', 'node', 'score', 'settings', 'seed', 'diagnostics'} <= set(rows[0])
    assert 'huggingface.co/datasets/alice/gallery' in card(hub, 'alice/with-gallery')


def test_card(hub: LoopbackHub, client: Client, published: tuple[str, str]) -> None:
    text = card(hub, 'alice/net')
    ok(client(hub_client.validate_card, text))
    assert client(hub_client.validate_card, text.replace('license: apache-2.0', 'license: do what you like')).error
    assert client(hub_client.validate_card, text.replace('      value: 0.025\n', '', 1)).error
    for part in (
        *('library_name: timm', 'pipeline_tag: image-classification', 'ylecun/mnist', 'value: 0.77', '<Gallery />'),
        *('url: images/0-001-1-class-1.png', 'gencnn train --config lenet_mnist', 'dai2015generative'),
        'Trained with seed 0 in 7 minutes on one core.',
        '- **0 (class 0), 1 (class 1)**: 2 chains per node, reference `natural` (alpha 1.25), temperature',
        ' 0.02, tilt 50, 64 image gradients per chain, seed 5. Gallery regime: not samples of the model at T = 1.',
        'Mean score by node: 0.5, 2.5.',
        '**not samples of the\nmodel**',
    ):
        assert part in text
    assert 'train_loss' not in text
    ok(client(hub_client.push, 'alice/unmeasured'))
    assert 'model-index' not in card(hub, 'alice/unmeasured')
    assert 'Trained' not in card(hub, 'alice/unmeasured')


def test_cards_of_the_zoo(client: Client) -> None:
    checkpoints, names = ok(client(hub_client.listed))
    for name, checkpoint in zip(names, checkpoints, strict=True):
        folder = ROOT / 'hub_cards' / name
        text = (folder / 'README.md').read_bytes().decode()
        ok(client(hub_client.validate_card, text))
        assert ok(client(hub_client.is_untouched, text))
        assert f'| error (%) | {checkpoint["error"]:.6g} |' in text
        pictures = re.findall(r'url: (images/.*)', text)
        assert pictures
        assert all((folder / picture).exists() for picture in pictures)


def test_snippets_with_this_package(
    client: Client, published: tuple[str, str], hub: LoopbackHub, tmp_path: Path
) -> None:
    for code in python_blocks(card(hub, 'alice/net')):
        if 'timm_gencnn' in code:
            assert code.startswith('import timm_gencnn')
            quick = code.replace('(model, 0)', '(model, 0, n=1, steps=8)')
            ok(client(hub_client.run_code, quick.replace('class_0.png', str(tmp_path / 'class_0.png'))))
    assert (tmp_path / 'class_0.png').exists()


def run_python(code: str, hub: LoopbackHub, home: Path, cwd: Path, path: str = '', **extra: str) -> str:
    env = {**os.environ, **environment(hub.endpoint, home), 'HF_DEBUG': '', 'PYTHONPATH': path, **extra}
    done = subprocess.run([sys.executable, '-c', code], env=env, cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_train_push_pull_visualize(hub: LoopbackHub, client: Client, tmp_path: Path) -> None:
    trained = ok(client(hub_client.train_and_push, 'alice/trained'))
    code = (
        'import hub_client, hashlib, timm, timm_gencnn\n'
        'model = timm.create_model("hf-hub:alice/trained", pretrained=True).eval()\n'
        'samples = timm_gencnn.visualize(model, 7, n=2, steps=8)\n'
        'print(hashlib.sha256(hub_client.logits(model)).hexdigest(), model.log_z.isfinite().all(), samples.nodes)'
    )
    path = os.pathsep.join([str(ROOT / 'tests'), str(ROOT)])
    printed = run_python(code, hub, tmp_path / 'home', tmp_path, path=path)
    assert printed.startswith(f"{hashlib.sha256(trained).hexdigest()} tensor(True) ['7")
    assert sum(name.startswith('images/0-') for name in hub.repo('alice/trained').files()) == 2


@pytest.mark.usefixtures('published')
def test_plain_timm_reads_the_weights(hub: LoopbackHub, client: Client, tmp_path: Path) -> None:
    code = [block for block in python_blocks(card(hub, 'alice/net')) if 'timm_gencnn' not in block]
    assert len(code) == 1
    blocked = 'import sys; sys.modules["timm_gencnn"] = None  # as if it were not installed\n'
    report = '\nimport hub_client, hashlib; print(hashlib.sha256(hub_client.logits(model)).hexdigest(), type(model))'
    printed = run_python(blocked + code[0] + report, hub, tmp_path / 'home', tmp_path, path=str(ROOT / 'tests'))
    assert printed.split()[0] == hashlib.sha256(ok(client(hub_client.expected))['logits']).hexdigest()
    assert "<class 'timm.models.resnet.ResNet'>" in printed


@pytest.mark.usefixtures('published')
def test_offline(hub: LoopbackHub, hub_home: Path, client: Client, tmp_path: Path) -> None:
    ok(client(hub_client.pull, 'alice/net'))
    hub.requests.clear()
    code = (
        'import hub_client\n'
        'assert hub_client.pull("alice/net", "timm") == hub_client.pull("alice/net") == hub_client.expected()\n'
        'print(hub_client.observed(hub_client.pull, "alice/never-seen").error)'
    )
    path = os.pathsep.join([str(ROOT / 'tests'), str(ROOT)])
    printed = run_python(code, hub, hub_home, tmp_path, path=path, HF_HUB_OFFLINE='1')
    assert 'alice/never-seen: it is not in the cache' in printed
    assert 'HF_HUB_OFFLINE' in printed
    assert not hub.requests


PUSH_FAULTS = {
    '401 at creation': (('POST', 'repos/create', 'status'), {'status': 401}, 'hf auth login'),
    '403 at commit': (('POST', '/commit/', 'status'), {'status': 403}, 'write access'),
    '404 at commit': (('POST', '/commit/', 'status'), {'status': 404}, 'check the name'),
    '409 at commit': (('POST', '/commit/', 'status'), {'status': 409}, 'in progress: repeat'),
    '412 at commit': (('POST', '/commit/', 'status'), {'status': 412}, 'somebody else committed'),
    '429 at commit': (
        ('POST', '/commit/', 'status'),
        {'status': 429, 'headers': {'Retry-After': '7'}},
        'wait 7 seconds',
    ),
    '500 at commit': (('POST', '/commit/', 'status'), {'status': 500}, 'repeat later'),
    '500 at validation': (('POST', 'validate-yaml', 'status'), {'status': 500}, 'repeat later'),
    'a web page at validation': (('POST', 'validate-yaml', 'page'), {'status': 503}, 'repeat later'),
    'a web page at commit': (('POST', '/commit/', 'page'), {'status': 503}, 'repeat later'),
    '503 for the store': (('PUT', '/objects/', 'status'), {'status': 503, 'times': 9}, 'repeat later'),
    '429 then success': (('POST', 'preupload', 'status'), {'status': 429, 'headers': {'Retry-After': '0'}}, ''),
    '500 then success': (('PUT', '/objects/', 'status'), {'status': 500}, ''),
    'cut during upload': (('PUT', '/objects/', 'cut request'), {}, ''),
    'cut during every upload': (('PUT', '/objects/', 'cut request'), {'times': 9}, 'connection'),
    'cut during commit': (('POST', '/commit/', 'cut request'), {}, 'connection'),
    'slow': (('POST', '/commit/', 'slow'), {'seconds': 0.5}, ''),
}


@pytest.mark.parametrize('fault', PUSH_FAULTS)
@pytest.mark.parametrize('existing', [False, True], ids=['new', 'existing'])
def test_fault_while_pushing(hub: LoopbackHub, client: Client, fault: str, existing: bool) -> None:
    name = f'alice/push-{fault.replace(" ", "-")}-{existing}'
    if existing:
        ok(client(hub_client.push, name, seed=1))
    before = hub.repo(name).files() if existing else None
    hub.objects.clear()
    request, settings, remedy = PUSH_FAULTS[fault]
    hub.fail(*request, **settings)
    outcome = client(hub_client.push, name, seed=2)
    assert settings.get('times', 1) > 1 or not hub.faults  # the fault was met
    hub.faults.clear()
    if remedy and not (existing and fault == '401 at creation'):  # an existing repository need not be created
        assert outcome.kind == 'OSError'
        assert re.search(rf'^{name}: .*{remedy}.*\(nothing was published\)$', outcome.error, re.DOTALL)
        after = hub.repos.get(('model', name))
        assert after is None or after.files() == (before or {'.gitattributes': after.files()['.gitattributes']})
        outcome = client(hub_client.push, name, seed=2)
    ok(outcome)
    assert ok(client(hub_client.pull, name)) == ok(client(hub_client.expected, 2))


def test_lost_answer_to_a_commit(hub: LoopbackHub, client: Client) -> None:
    hub.fail('POST', '/commit/', 'lose answer')
    outcome = client(hub_client.push, 'alice/lost')
    assert 'alice/lost: the connection to the Hub failed' in outcome.error
    ok(client(hub_client.push, 'alice/lost'))
    assert hub.repo('alice/lost').messages == ['initial commit', 'Publish a generative checkpoint']


def test_commit_by_somebody_else_meanwhile(hub: LoopbackHub, client: Client) -> None:
    ok(client(hub_client.push, 'alice/race'))
    repo = hub.repo('alice/race')
    theirs = {**repo.commits[repo.branches['main']], 'README.md': Blob(b'mine', False)}
    info = hub.take_fault

    def commit_in_between(method: str, path: str) -> Any:
        if '/commit/' in path and repo.messages[-1] != 'theirs':
            repo.commit('main', theirs, 'theirs')
        return info(method, path)

    hub.take_fault = commit_in_between  # type: ignore[method-assign]
    try:
        outcome = client(hub_client.push, 'alice/race', seed=1)
    finally:
        hub.take_fault = info  # type: ignore[method-assign]
    assert 'somebody else committed' in outcome.error
    assert repo.files()['README.md'] == b'mine'
    ok(client(hub_client.push, 'alice/race', seed=1))
    assert repo.files()['README.md'] == b'mine'


PULL_FAULTS = {
    '401': (('GET', '/api/models/', 'status'), {'status': 401}, 'hf auth login'),
    '403': (('GET', '/api/models/', 'status'), {'status': 403}, 'the token does not give this right'),
    '404': (('GET', '/api/models/', 'status'), {'status': 404}, 'check the name'),
    '429': (('GET', '/api/models/', 'status'), {'status': 429, 'headers': {'Retry-After': '0'}}, 'too many requests'),
    '500': (('GET', '/api/models/', 'status'), {'status': 500}, 'repeat later'),
    '500 for a file, then success': (('HEAD', 'safetensors', 'status'), {'status': 500}, ''),
    '500 for a file': (('HEAD', 'safetensors', 'status'), {'status': 500, 'times': 99}, 'repeat later'),
    'cut during download': (('GET', '/objects/', 'cut response'), {}, ''),
    'cut, then truncated': (('GET', '/objects/', 'truncate'), {}, 'should be of size'),
    'corrupted': (('GET', '/objects/', 'corrupt'), {}, 'damaged on its way'),
    'corrupted config': (('GET', '/resolve/.*config.json', 'corrupt'), {}, 'damaged on its way'),
    'wrong etag': (('HEAD', '/resolve/.*safetensors', 'etag'), {}, 'damaged on its way'),
    'slow': (('GET', '/objects/', 'slow'), {'seconds': 1.2}, ''),
    'slow metadata': (('HEAD', '/resolve/.*safetensors', 'slow'), {'seconds': 1.2}, ''),
}


@pytest.mark.parametrize('fault', PULL_FAULTS)
def test_fault_while_pulling(
    hub: LoopbackHub, client: Client, published: tuple[str, str], fault: str, tmp_path: Path
) -> None:
    repo, _ = published
    request, settings, remedy = PULL_FAULTS[fault]
    hub.fail(*request, **settings)
    outcome = client(hub_client.pull, repo, cache_dir=tmp_path)
    assert settings.get('times', 1) > 1 or not hub.faults  # the fault was met
    hub.faults.clear()
    if remedy:
        assert outcome.kind == 'OSError'
        assert re.search(rf'{repo}\b.*{remedy}', outcome.error, re.DOTALL)
        outcome = client(hub_client.pull, repo, cache_dir=tmp_path)
    assert ok(outcome) == ok(client(hub_client.expected))


@pytest.mark.parametrize('fault', ['cut during download', 'cut, then truncated', 'corrupted'])
def test_fault_while_timm_is_pulling(
    hub: LoopbackHub, client: Client, published: tuple[str, str], fault: str, tmp_path: Path
) -> None:
    request, _, remedy = PULL_FAULTS[fault]
    hub.fail(*request)
    outcome = client(hub_client.pull, published[0], 'timm', cache_dir=tmp_path)
    assert bool(outcome.error) == bool(remedy)
    assert ok(client(hub_client.pull, published[0], 'timm', cache_dir=tmp_path)) == ok(client(hub_client.expected))


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        ({'repo_id': 'net'}, "write 'USER/net'"),
        ({'repo_id': 'alice/a b'}, 'alice/a b'),
        ({'repo_id': 'a/b/c'}, 'a/b/c'),
        ({'repo_id': 'alice/net', 'gallery_dataset': 'alice/pictures'}, 'there is no gallery'),
        ({'repo_id': 'alice/net', 'results': {'note': f'used {TOKEN}'}}, 'would publish a Hub token'),
        ({'repo_id': 'alice/net', 'recipe': {'command': 'x --token hf_' + 'x' * 34}, 'token': None}, 'Hub token'),
    ],
)
def test_bad_input(hub: LoopbackHub, client: Client, kwargs: dict[str, Any], message: str) -> None:
    outcome = client(hub_client.push, **kwargs)
    assert outcome.kind in ('ValueError', 'HFValidationError')
    assert message in outcome.error
    assert not hub.requests


def test_model_without_a_name(client: Client) -> None:
    outcome = client(hub_client.push_unnamed)
    assert outcome.kind == 'ValueError'
    assert re.search(r'Linear.*cannot be rebuilt.*timm\.create_model', outcome.error)


def test_pull_of_a_plain_checkpoint(hub: LoopbackHub, client: Client) -> None:
    ok(client(hub_client.push, 'alice/plain'))
    repo = hub.repo('alice/plain')
    files = repo.commits[repo.branches['main']]
    config = files['config.json'].content.replace(b'"gencnn_test_resnet"', b'"test_resnet"')
    repo.commit('main', {**files, 'config.json': Blob(config, False)}, 'plain')
    outcome = client(hub_client.pull, 'alice/plain')
    assert outcome.kind == 'ValueError'
    assert 'alice/plain is a plain test_resnet: use timm_gencnn.as_generative' in outcome.error


def test_push_command(hub: LoopbackHub, client: Client, tmp_path: Path) -> None:
    results, weights, folder = tmp_path / 'results.json', tmp_path / 'weights.pth', tmp_path / 'out'
    results.write_text(json.dumps({'results': {'test_error': 1.5}, 'recipe': {'command': 'made by hand'}}))
    ok(client(hub_client.save_weights, weights, 3))
    push = ['push', 'gencnn_test_resnet', 'alice/cli', '--checkpoint', str(weights), '--num-classes', '3']
    dry = client(hub_client.command, *push, '--results', str(results), '--dry-run', str(folder))
    assert ok(dry) == 0
    assert 'model.safetensors' in dry.log
    assert '| error (%) | 1.5 |' in (folder / 'README.md').read_text()
    assert 'made by hand' in (folder / 'README.md').read_text()
    assert not hub.requests
    pushed = client(hub_client.command, *push, '--token', TOKEN, '--private')
    assert ok(pushed) == 0
    assert f'{hub.endpoint}/alice/cli/commit/' in pushed.log
    assert hub.repo('alice/cli').private
    refused = client(hub_client.command, *push, '--token', OTHER_TOKEN)
    assert refused.value == 2
    assert re.search(r'^gencnn push: error: alice/cli: the token does not give this right', refused.log, re.MULTILINE)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['gencnn_lenet.vis_mnist', '--num-classes', '5'], '--num-classes 5 is that of a --checkpoint'),
        (['RUN', '--num-classes', '5'], 'is a training run .*: leave out num_classes'),
        (['RUN', '--checkpoint', 'WEIGHTS'], 'is a training run .*: leave out checkpoint'),
        (['gencnn_lennet'], "unknown model 'gencnn_lennet': did you mean gencnn_lenet"),
        (['gencnn_test_resnet.gone'], 'has no pretrained weights.*: pretrained are gencnn_test_resnet.r160_in1k'),
        (['local-dir:gone'], "cannot load 'local-dir:gone'"),
        (['gencnn_lenet', '--checkpoint', 'WEIGHTS'], "cannot load 'gencnn_lenet': RuntimeError: Error.* state_dict"),
        (['gencnn_test_resnet', '--checkpoint', 'gone.pth'], 'gone.pth cannot be read as a checkpoint'),
        (['gencnn_zfnet'], "'gencnn_zfnet' has no pretrained weights"),
    ],
)
def test_bad_input_of_the_push_command(client: Client, tmp_path: Path, arguments: list[str], message: str) -> None:
    run, weights = tmp_path / 'run', tmp_path / 'weights.pth'
    ok(client(hub_client.train_run, run))
    ok(client(hub_client.save_weights, weights, 3))
    paths = {'RUN': str(run), 'WEIGHTS': str(weights)}
    model, *flags = [paths.get(argument, argument) for argument in arguments]
    refused = client(hub_client.command, 'push', model, 'alice/bad', *flags, '--dry-run', str(tmp_path / 'out'))
    assert ok(refused) == 2
    assert re.search(f'^gencnn push: error: .*{message}', refused.log, re.MULTILINE)
    assert not (tmp_path / 'out').exists()


def test_push_command_with_the_folder_of_a_run(client: Client, tmp_path: Path) -> None:
    run, folder = tmp_path / 'run', tmp_path / 'out'
    ok(client(hub_client.train_run, run))
    dry = ['--dry-run', str(folder), '--dataset', 'alice/data']
    assert ok(client(hub_client.command, 'push', str(run), 'alice/run', *dry)) == 0
    config = json.loads((folder / 'config.json').read_text())
    assert (config['architecture'], config['num_classes'], config['pretrained_cfg']['mean']) == (
        *('gencnn_test_resnet', 3),
        [0.25],
    )
    text = (folder / 'README.md').read_text()
    assert 'Measured on alice/data, split `test` (the best of 3 epochs on this split):' in text
    assert '| error (%) | 1.5 |' in text
    assert 'epochs: 3\n' in text
    assert str(tmp_path) not in text + (folder / 'results.json').read_text() + json.dumps(config)
    weights = (folder / 'model.safetensors').read_bytes()
    assert weights == (tmp_path / 'expected.safetensors').read_bytes()
    (run / 'model_best.pth.tar').unlink()
    assert 'has neither model_best.pth.tar nor' in client(hub_client.command, 'push', str(run), 'alice/run').log


def test_list_pretrained(client: Client) -> None:
    checkpoints, names = ok(client(hub_client.listed))
    assert [c['name'] for c in checkpoints] == [f'gencnn_{name}' for name in names]
    printed = client(hub_client.command, 'list').log
    for checkpoint in checkpoints:
        assert Path(checkpoint['location']).exists()
        assert checkpoint['dataset']
        assert checkpoint['error'] < 100
        assert all(checkpoint[key] in printed for key in ('name', 'dataset', 'location'))
        assert f'{checkpoint["error"]:.2f} %' in printed
