"""The gencnn command: what it prints, what it writes, how it fails."""

import os
import subprocess
import sys

import pytest
import timm
import torch
from PIL import Image

import timm_gencnn
from timm_gencnn import cli
from timm_gencnn.reference import Natural
from timm_gencnn.samples import read_metadata

LENET = 'gencnn_lenet.vis_mnist'


def test_visualize_writes_a_picture_and_a_summary(tmp_path, capsys):
    out = tmp_path / 'digits.png'
    assert cli.main(['visualize', LENET, '3', '5', '-n', '2', '--steps', '16', '--out', str(out)]) == 0
    printed = capsys.readouterr().out
    for word in (
        '4 images of 2 node(s): score ',
        '16 gradients a chain',
        ' s\n',
        'gallery regime',
        str(out),
    ):
        assert word in printed
    with Image.open(out) as image:
        assert image.size == (2 * 30 + 2, 2 * 30 + 2)
    assert read_metadata(out)['settings']['model'] == LENET


def test_patterns_name_many_nodes(tmp_path):
    out = tmp_path / 'a.png'
    argv = ['visualize', LENET, '8-9', 'conv1:0-2', '-n', '1', '--steps', '8', '--size', '28', '--out', str(out)]
    assert cli.main(argv) == 0
    assert read_metadata(out)['nodes'] == ['8', '9', 'conv1:0', 'conv1:1', 'conv1:2']
    assert cli.main(['visualize', '--like', str(out), '--out', str(tmp_path / 'b.png')]) == 0


def test_arguments_without_a_value_are_an_error(capsys):
    for argv in (['visualize', LENET, '3', '--model-kwargs', 'mirror'], ['train', '--opt-kwargs', 'mirror']):
        with pytest.raises(SystemExit):
            cli.main(argv)
        assert "kwargs: expected name=value, got 'mirror'" in capsys.readouterr().err


def test_like_repeats_a_picture_bit_for_bit(tmp_path):
    a, b = tmp_path / 'a.png', tmp_path / 'b.png'
    assert cli.main(['visualize', LENET, '7', '-n', '3', '--steps', '20', '--seed', '5', '--out', str(a)]) == 0
    assert cli.main(['visualize', '--like', str(a), '--out', str(b)]) == 0
    with Image.open(a) as first, Image.open(b) as second:
        assert first.tobytes() == second.tobytes()


def test_like_keeps_to_white_noise_at_temperature_1_and_to_the_size(tmp_path):
    a, b = tmp_path / 'a.png', tmp_path / 'b.png'
    args = ['visualize', LENET, 'conv1:3', '-n', '2', '--steps', '80', '--temperature', '1', '--reference', 'white']
    assert cli.main([*args, '--size', '28', '--out', str(a)]) == 0
    assert cli.main(['visualize', '--like', str(a), '--out', str(b)]) == 0
    assert read_metadata(b)['settings'] == read_metadata(a)['settings']
    with Image.open(a) as first, Image.open(b) as second:
        assert first.tobytes() == second.tobytes()


def test_like_repeats_a_picture_from_before_a_setting_existed(tmp_path):
    samples = timm_gencnn.visualize(LENET, 7, n=2, steps=8, progress=False)
    for name in 'compile', 'preset':
        del samples.settings[name]
    path = samples.save(tmp_path / 'a.png')
    assert cli.main(['visualize', '--like', str(path), '--out', str(tmp_path / 'b.png')]) == 0
    with Image.open(path) as first, Image.open(tmp_path / 'b.png') as second:
        assert first.tobytes() == second.tobytes()


def test_like_refuses_what_it_cannot_repeat(tmp_path, capsys):
    """Other weights, or a reference of one's own: an error, not another picture."""
    model = timm.create_model(LENET, pretrained=True).eval()
    own = timm_gencnn.visualize(
        model, 3, n=1, steps=8, reference=Natural((1, 28, 28), [0.5], [0.2], alpha=0.5), progress=False
    )
    named = timm_gencnn.visualize(model, 3, n=1, steps=8, progress=False).settings
    shape, mean, std = (1, 28, 28), named['mean'], named['std']
    scaled = Natural(shape, mean, std, normalize=([0.5], [0.5]))  # told apart by what the named one does not say
    scaled = timm_gencnn.visualize(model, 3, n=1, steps=8, reference=scaled, progress=False)
    with torch.no_grad():
        model.fc2.bias += 1
    other = timm_gencnn.visualize(model, 3, n=1, steps=8, progress=False)
    for samples, message in [(own, 'would differ'), (scaled, 'normalize would differ'), (other, 'other weights')]:
        samples.settings['model'] = LENET
        path = samples.save(tmp_path / 'x.png')
        assert cli.main(['visualize', '--like', str(path), '--out', str(tmp_path / 'y.png')]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / 'y.png').exists()


def test_like_refuses_a_unit_that_is_now_read_elsewhere(tmp_path, capsys):
    samples = timm_gencnn.visualize('gencnn_resnet10_w16', 'stages.0:3', n=1, steps=8, progress=False)
    again = ['visualize', '--like', str(tmp_path / 'a.png'), '--out', str(tmp_path / 'b.png')]
    samples.save(tmp_path / 'a.png')
    assert cli.main(again) == 0
    assert samples.settings['notes'].pop() == 'read before the activation'  # as before blocks were
    samples.save(tmp_path / 'a.png')
    assert cli.main(again) == 2
    assert 'where its units are read would differ' in capsys.readouterr().err


def test_like_takes_the_same_network_by_another_name(tmp_path, capsys):
    """The cards name the repository that they are for, which not everybody can reach."""
    samples = timm_gencnn.visualize(LENET, 3, n=1, steps=8, progress=False)
    samples.settings['model'] = 'hf-hub:nobody/nowhere'
    path, again = samples.save(tmp_path / 'x.png'), tmp_path / 'y.png'
    assert cli.main(['visualize', LENET, '--like', str(path), '--out', str(again)]) == 0
    with Image.open(path) as first, Image.open(again) as second:
        assert first.tobytes() == second.tobytes()
    assert cli.main(['visualize', 'gencnn_lenet.dg_mnist', '--like', str(path), '--out', str(again)]) == 2
    assert "other weights than 'gencnn_lenet.dg_mnist' has" in capsys.readouterr().err


def test_like_asks_for_the_arguments_of_the_network(tmp_path, capsys):
    """By them the same weights are another network."""
    out, again = tmp_path / 'a.png', tmp_path / 'b.png'
    kwargs = ['--model-kwargs', 'mirror=False']
    argv = ['visualize', 'gencnn_resnet11_w64', '3', '-n', '1', '--steps', '8', '--device', 'cpu']
    assert cli.main([*argv, *kwargs, '--out', str(out)]) == 0
    assert cli.main([*argv, '--out', str(again)]) == 0
    repeat = ['visualize', '--like', str(out), '--device', 'cpu', '--out', str(again)]
    with Image.open(out) as first, Image.open(again) as second:
        assert first.tobytes() != second.tobytes()
    for other in ([], ['--model-kwargs', 'mirror=True'], [*kwargs, 'drop_rate=0.5']):
        assert cli.main([*repeat, *other]) == 2
        assert 'give --model-kwargs mirror=False' in capsys.readouterr().err
    tagged = ['visualize', 'gencnn_resnet11_w64.gg_dg_cifar10', *repeat[1:]]  # the same model by another name
    assert cli.main(tagged) == 2
    for argv in repeat, tagged:
        assert cli.main([*argv, *kwargs]) == 0
        with Image.open(out) as first, Image.open(again) as second:
            assert first.tobytes() == second.tobytes()


def test_exact_regime_and_animation(tmp_path, capsys):
    out = tmp_path / 'x.png'
    args = ['visualize', LENET, 'conv2:3', '-n', '2', '--steps', '80', '--temperature', '1', '--reference', 'white']
    assert cli.main([*args, '--out', str(out), '--animate', str(tmp_path / 'x.gif')]) == 0
    assert 'exact sampling' in capsys.readouterr().out
    assert (tmp_path / 'x.gif').exists()


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (['visualize'], 'give a model and at least one node'),
        (['visualize', 'gencnn_lenett', '3'], 'did you mean'),
        (['nodes', 'gencnn_lenett'], 'did you mean'),
        (['nodes', 'resnet18.foo'], 'Invalid pretrained tag (foo) for resnet18. Pretrained are resnet18.a1_in1k'),
        (['visualize', LENET, '3', '--checkpoint', '.'], 'holds no checkpoint'),
        (['visualize', LENET, '11'], '11'),
        (['visualize', LENET, '3', '--out', 'x.jpg'], '.png'),
        (['visualize', LENET, '3', '--steps', '0'], 'steps must be'),
        (['visualize', LENET, '3', '-n', '0'], 'n must be'),
        (['visualize', LENET, '3', '--device', 'foo'], "device 'foo' cannot be used"),
        (['visualize', LENET, '3', '--animate', 'x.mp4'], '.gif or .webp'),
        (['visualize', '--like', 'nothing.png', '--seed', '3'], 'leave out seed'),
        (['visualize', LENET, '3', '--like', 'nothing.png'], 'leave out 3'),
        (['visualize', '--like', 'nothing.png'], 'nothing.png'),
        (['visualize', LENET, '3', '--checkpoint', 'nothing.pth'], 'nothing.pth'),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1]
    assert 'Traceback' not in error
    assert not list(tmp_path.iterdir())  # nothing half-written


@pytest.mark.parametrize('option', ['--out', '--animate'])
@pytest.mark.parametrize('place', ['file/{}', 'folder/{}', '/proc/nowhere/{}'])
def test_a_place_that_cannot_be_written_is_found_before_sampling(option, place, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'file').touch()
    name = 'x.png' if option == '--out' else 'x.gif'
    (tmp_path / 'folder' / name).mkdir(parents=True)
    monkeypatch.setattr(sys.modules['timm_gencnn.visualize'], 'visualize', lambda *args, **kwargs: pytest.fail('drawn'))
    assert cli.main(['visualize', LENET, '3', option, place.format(name)]) == 2
    assert f'error: cannot write {place.format(name)!r}: ' in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ['file', 'folder']


def test_truncated_checkpoint_is_a_clear_error(tmp_path, capsys):
    path = tmp_path / 'broken.pth'
    torch.save({'x': torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:500])
    assert cli.main(['visualize', LENET, '3', '--checkpoint', str(path)]) == 2
    assert str(path) in capsys.readouterr().err


def test_nodes_lists_layers(capsys):
    assert cli.main(['nodes', LENET]) == 0
    printed = capsys.readouterr().out
    for layer in ('conv1', 'conv2', 'fc1', 'fc2'):
        assert layer in printed


def test_a_reader_that_has_seen_enough_is_no_error():
    read, write = os.pipe()
    os.close(read)
    argv = [sys.executable, '-m', 'timm_gencnn.cli', 'nodes', LENET]
    result = subprocess.run(argv, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (result.returncode, result.stderr) == (141, '')


def test_another_pipe_that_breaks_is_an_error(monkeypatch, capsys):
    def broken(args):
        raise BrokenPipeError(32, 'Broken pipe')

    monkeypatch.setattr('timm_gencnn.listing.main', broken)
    assert cli.main(['list']) == 2
    assert 'gencnn list: error: [Errno 32] Broken pipe' in capsys.readouterr().err


def test_version_and_help(capsys):
    assert cli.main(['--version']) == 0
    assert cli.main([]) == 2
    printed = capsys.readouterr().out
    assert all(command in printed for command in cli.COMMANDS)


@pytest.mark.parametrize('command', cli.COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main([command, '--help'])
    assert exit_.value.code == 0
    assert f'gencnn {command}' in capsys.readouterr().out


def test_import_is_light():
    """Heavy libraries are imported where they are used, not with the package."""
    code = (
        'import sys, timm; before = set(sys.modules); import timm_gencnn; new = set(sys.modules) - before; '
        'print([m for m in ("datasets", "pandas", "pyarrow", "scipy", "jinja2", "torch._dynamo") if m in new])'
    )
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == '[]'
