"""The folder of a training run, read back: the network that was trained, and the figures that are its own."""

import json

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from torch import nn

import timm_gencnn
from timm_gencnn import GenerativeMixin, cli, push_to_hub
from timm_gencnn.networks import load_model
from timm_gencnn.runs import load_run, means_run
from timm_gencnn.samples import read_metadata

SUMMARY = """epoch,train_loss,eval_loss,eval_top1,eval_top5,lr
0,1,0.9,90.0,100,0.1
1,1,0.4,95.0,100,0.1
2,1,0.8,98.5,100,0.1
"""


def network(model='test_resnet', num_classes=3, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(model, num_classes=num_classes, **kwargs).eval()


def logits(model, in_chans=3, side=64):
    with torch.no_grad():
        return model(torch.randn(2, in_chans, side, side, generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def write_run(tmp_path):
    """Write what a run leaves: its flags, a checkpoint and the summary."""

    def write(trained, /, *, epoch=2, summary=SUMMARY, best=True, ema=None, **args):
        folder = tmp_path / 'run'
        folder.mkdir()
        state = {'state_dict': trained.state_dict(), 'epoch': epoch}
        if ema is not None:
            state['state_dict_ema'] = ema.state_dict()
        torch.save(state, folder / ('model_best.pth.tar' if best else 'last.pth.tar'))
        args = {'model': 'test_resnet', 'num_classes': 3, 'val_split': 'validation'} | args
        (folder / 'args.yaml').write_text(yaml.safe_dump({'gp': None, 'in_chans': None, 'input_size': None} | args))
        (folder / 'summary.csv').write_text(summary)
        return folder

    return write


@pytest.mark.parametrize(
    ('model', 'flags', 'arguments'),
    [
        ('test_resnet', {'gp': 'max'}, {'global_pool': 'max'}),
        ('test_efficientnet', {'bn_eps': 0.5}, {'bn_eps': 0.5}),
        ('test_resnet', {'model_kwargs': {'stem_width': 8}}, {'stem_width': 8}),
        ('test_resnet', {'input_size': [1, 64, 64]}, {'in_chans': 1}),
    ],
)
def test_the_network_is_the_one_that_was_trained(write_run, tmp_path, model, flags, arguments):
    trained = network(model, **arguments)
    in_chans = arguments.get('in_chans', 3)
    expected = logits(trained, in_chans)
    plain = {k: v for k, v in arguments.items() if k in ('global_pool', 'bn_eps')}
    if plain:  # control: the same weights mean something else in the network that the name alone gives
        other = network(model)
        other.load_state_dict(trained.state_dict())
        assert (logits(other) - expected).abs().max() > 1e-3
    loaded, facts = load_run(write_run(trained, model=model, **flags))
    assert torch.equal(logits(loaded, in_chans), expected)
    push_to_hub(loaded, 'alice/net', dry_run=tmp_path / 'published', **facts)
    pulled = timm.create_model(f'local-dir:{tmp_path / "published"}', pretrained=True).eval()
    assert torch.equal(logits(pulled, in_chans), expected)


def test_preprocessing_is_that_of_the_run(write_run, tmp_path):
    folder = write_run(network(), pretrained_cfg_overlay={'mean': [0.1, 0.2, 0.3], 'file': '/home/alice/w.pth'})
    loaded, facts = load_run(folder)
    push_to_hub(loaded, 'alice/net', dry_run=tmp_path / 'published', **facts)
    config = json.loads((tmp_path / 'published/config.json').read_text())
    assert config['pretrained_cfg']['mean'] == [0.1, 0.2, 0.3]
    assert not any(b'/home/alice' in file.read_bytes() for file in (tmp_path / 'published').iterdir())


@pytest.mark.parametrize(
    ('metric', 'epoch', 'error', 'note'),
    [
        ('top1', 2, 1.5, 'the best of 3 epochs on this split'),
        ('loss', 1, 5.0, 'the best of 3 epochs on this split, by loss'),
    ],
)
def test_figures_are_those_of_the_best_checkpoint(write_run, metric, epoch, error, note):
    _, facts = load_run(write_run(network(), epoch=epoch, eval_metric=metric))
    assert facts['results'] == {'dataset': 'unknown', 'split': 'validation', 'test_error': error, 'note': note}


def test_figures_are_those_of_the_last_checkpoint(write_run):
    """The run was stopped between the summary and the checkpoint, so the last row is of weights that are lost."""
    _, facts = load_run(write_run(network(), epoch=1, best=False))
    assert facts['results'] == {'dataset': 'unknown', 'split': 'validation', 'test_error': 5.0}


def test_a_run_without_validation_has_no_figures(write_run):
    summary = 'epoch,train_loss,lr\n0,1,0.1\n1,1,0.1\n'
    _, facts = load_run(write_run(network(), epoch=1, summary=summary, best=False, val_split=''))
    assert facts['results'] == {'dataset': 'unknown'}


@pytest.mark.parametrize(
    ('args', 'dataset'),
    [
        ({'dataset': 'hfds/alice/pets'}, 'alice/pets'),
        ({'dataset': 'hfds/cifar10'}, 'cifar10'),
        ({'dataset': 'hfds/data/local'}, 'local'),  # the folder is there
        ({'dataset': 'hfds/../data/pets'}, 'pets'),
        ({'dataset': 'torch/cifar10', 'data_dir': 'data/all'}, 'cifar10'),
        ({'dataset': '', 'data_dir': 'data/pets'}, 'pets'),
        ({'data': 'data/pets'}, 'pets'),
    ],
)
def test_only_data_sets_of_the_hub_are_named_by_a_hub_id(write_run, tmp_path, monkeypatch, args, dataset):
    (tmp_path / 'data/local').mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    loaded, facts = load_run(write_run(network(), **args))
    assert facts['results']['dataset'] == dataset
    push_to_hub(loaded, 'alice/net', dry_run=tmp_path / 'published', **facts)
    datasets = ModelCard.load(tmp_path / 'published/README.md').data.datasets
    assert datasets == (['alice/pets'] if dataset == 'alice/pets' else None)


@pytest.mark.parametrize('force_cpu', [False, True])
def test_the_weights_are_those_that_were_validated(write_run, force_cpu):
    """Training validates the moving average, but not where it lies on another device."""
    raw, ema = network(), network(global_pool='max')
    with torch.no_grad():
        ema.fc.weight.add_(1)
    folder = write_run(raw, ema=ema, model_ema=True, model_ema_force_cpu=force_cpu)
    loaded, _ = load_run(folder)
    assert torch.equal(loaded.fc.weight, (raw if force_cpu else ema).fc.weight)


@pytest.mark.parametrize('name', ['gencnn_test_resnet', 'test_resnet'])
def test_a_run_that_started_from_a_folder(write_run, tmp_path, name):
    """A fine-tuned network: the architecture and its arguments are those of the folder, log Z is forgotten."""
    source = timm.create_model('gencnn_test_resnet', num_classes=3, global_pool='max').eval()
    source.set_log_z([1.0, 2.0, 3.0])
    push_to_hub(source, 'alice/net', dry_run=tmp_path / 'source')
    config = tmp_path / 'source/config.json'
    config.write_text(config.read_text().replace('gencnn_test_resnet', name))
    if name == 'test_resnet':  # plain timm takes no log Z
        text = json.loads(config.read_text())
        del text['model_args']['log_z']
        config.write_text(json.dumps(text))
    trained = network(global_pool='max')
    loaded, _ = load_run(write_run(trained, model=f'local-dir:{tmp_path / "source"}'))
    assert isinstance(loaded, GenerativeMixin)
    assert loaded.log_z is None
    assert torch.equal(logits(loaded), logits(trained))


def test_pictures_of_a_run_are_those_of_its_network_preprocessing_and_classes(write_run, tmp_path, capsys):
    trained = network(in_chans=1)
    folder = write_run(trained, in_chans=1, input_size=[1, 48, 48], mean=[0.3], std=[0.2])
    (folder / 'class_map.txt').write_text('left\nmiddle\nfar right\n')
    trained.pretrained_cfg |= {'input_size': (1, 48, 48), 'mean': (0.3,), 'std': (0.2,)}
    expected = timm_gencnn.visualize(trained, 2, n=2, steps=8, progress=False)
    out = tmp_path / 'a.png'
    assert cli.main(['visualize', str(folder), 'far right', '-n', '2', '--steps', '8', '--out', str(out)]) == 0
    drawn = read_metadata(out)
    assert drawn['nodes'] == ['2 far right']
    assert drawn['settings']['weights'] == expected.settings['weights']
    assert drawn['settings']['mean'] == [0.3]
    found = timm_gencnn.visualize(str(folder), 'far right', n=2, steps=8, progress=False)
    assert torch.equal(found.images, expected.images)
    assert cli.main(['visualize', '--like', str(out), '--out', str(tmp_path / 'b.png')]) == 0
    assert cli.main(['gallery', str(folder), '--nodes', 'left', '--steps', '8', '--out', str(tmp_path / 'page')]) == 0
    assert 'gencnn visualize --like images/left-' in (tmp_path / 'page/index.html').read_text()
    assert cli.main(['nodes', str(folder), 'fc']) == 0
    assert '1 layers, 3 channels' in capsys.readouterr().out
    assert torch.equal(logits(timm_gencnn.from_pretrained(str(folder)), 1), logits(trained, 1))
    push = ['push', str(folder), 'alice/net', '--nodes', '0-1', '-n', '1', '--steps', '8']
    assert cli.main([*push, '--dry-run', str(tmp_path / 'published')]) == 0
    assert len(list((tmp_path / 'published/images').iterdir())) == 2
    pulled = timm.create_model(f'local-dir:{tmp_path / "published"}', pretrained=True)
    assert pulled.pretrained_cfg['label_names'] == ['left', 'middle', 'far right']


def test_a_run_is_no_shipped_checkpoint_and_comes_from_no_hub(write_run):
    trained = timm.create_model('gencnn_lenet').eval()
    folder = write_run(trained, model='lenet', num_classes=10)
    model = timm_gencnn.from_pretrained(folder)
    assert trained.pretrained_cfg['tag']
    assert model.pretrained_cfg['tag'] is None
    with pytest.raises(ValueError, match='training run on this machine: leave out revision'):
        timm_gencnn.from_pretrained(str(folder), revision='main')


def test_synsets_of_imagenet_have_their_words(write_run):
    folder = write_run(network())
    (folder / 'class_map.txt').write_text('n01443537\nn01440764\nn01484850\n')
    for node in ('tench', 'n01440764'):
        assert timm_gencnn.visualize(str(folder), node, n=1, steps=8, size=32, progress=False).nodes == ['1 tench']


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (['test_resnet', '1', '--checkpoint', '{run}'], 'is a training run: give it in place of'),
        (['{run}', '1', '--num-classes', '3'], 'of its own: leave out num_classes'),
        (['{run}/model_best.pth.tar', '1'], 'give the folder of the run, or a model and this file as --checkpoint'),
        (['{run}/..', '1'], 'no training run is in this folder'),
        (['{run}/gone', '1'], 'there is no such folder either'),
        (['test_resnet', '1', '--checkpoint', '{run}/model_best.pth.tar'], 'with other --num-classes or'),
        (['test_resnet', '1', '--num-classes', '3'], '--num-classes 3 is that of a --checkpoint'),
    ],
)
def test_what_is_no_run_says_what_to_give(write_run, tmp_path, capsys, argv, message):
    run = str(write_run(network()))
    argv = ['visualize', *(word.format(run=run) for word in argv), '--out', str(tmp_path / 'a.png')]
    assert cli.main(argv) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize('flag', ['--checkpoint', '--data-dir'])
def test_a_run_is_no_checkpoint_and_no_data_of_validation(write_run, capsys, flag):
    run = str(write_run(network()))
    assert cli.main(['validate', flag, run]) == 2
    assert f'{flag} {run!r} is a training run: give its folder alone, gencnn validate {run}' in capsys.readouterr().err


def test_a_name_that_timm_knows_is_no_folder_of_a_run(write_run, monkeypatch, capsys):
    run = write_run(network())
    run = run.rename(run.with_name('test_resnet'))
    monkeypatch.chdir(run.parent)
    assert not means_run('test_resnet')
    assert means_run('./test_resnet')
    assert load_model('./test_resnet').num_classes == 3
    monkeypatch.setattr(timm, 'create_model', lambda name, **kwargs: nn.Linear(1, 1))  # no download
    with pytest.warns(UserWarning, match=r'the training run of that name is \./test_resnet'):
        assert isinstance(load_model('test_resnet'), nn.Linear)


def test_the_first_outputs_have_the_names_of_the_classes(write_run, tmp_path):
    """A network may have more outputs than its data set has classes; a name may hold what ends a line elsewhere."""
    folder = write_run(network())
    (folder / 'class_map.txt').write_text('left\u2028most\nright\n', encoding='utf-8')
    found = timm_gencnn.visualize(str(folder), ['right', 2], n=1, steps=8, size=32, progress=False)
    assert found.nodes == ['1 right', '2']
    assert load_run(folder)[0].pretrained_cfg['label_names'] == ['left\u2028most', 'right', '2']
    (folder / 'class_map.txt').write_text('left\nright\n', encoding='utf-8')
    loaded, facts = load_run(folder)
    push_to_hub(loaded, 'alice/net', dry_run=tmp_path / 'published', **facts)
    pulled = timm.create_model(f'local-dir:{tmp_path / "published"}', pretrained=True).eval()
    assert timm_gencnn.visualize(pulled, ['right', 2], n=1, steps=8, size=32, progress=False).nodes == found.nodes
    (folder / 'class_map.txt').write_text('n01440764\nn01443537\n', encoding='utf-8')
    nodes = timm_gencnn.visualize(str(folder), ['goldfish', 2], n=1, steps=8, size=32, progress=False).nodes
    assert nodes == ['1 goldfish', '2']


def test_pictures_of_a_checkpoint_alone(write_run, tmp_path):
    """The flags of the network must be given."""
    run = write_run(network(stem_width=8), model_kwargs={'stem_width': 8})
    argv = ['visualize', 'test_resnet', '2', '--steps', '8', '--size', '32', '--out', str(tmp_path / 'a.png')]
    argv += ['--checkpoint', str(run / 'model_best.pth.tar'), '--num-classes', '3', '--model-kwargs', 'stem_width=8']
    assert cli.main(argv) == 0
    again = ['visualize', str(run), '--like', str(tmp_path / 'a.png'), '--out', str(tmp_path / 'b.png')]
    assert cli.main(again) == 0  # the run has them itself
    assert cli.main(argv[:-2]) == 2  # another network, which the weights do not fit


def test_a_network_without_a_configuration_gets_that_of_its_run(write_run, monkeypatch):
    folder, bare = write_run(network(), std=[0.2]), network()
    del bare.pretrained_cfg
    monkeypatch.setattr(timm, 'create_model', lambda *args, **kwargs: bare)
    assert load_run(folder)[0].pretrained_cfg['std'] == (0.2, 0.2, 0.2)


def test_other_settings_are_no_run(write_run):
    folder = write_run(network())
    (folder / 'args.yaml').write_text('epochs: 3\n')
    with pytest.raises(ValueError, match=r'args.yaml names no model: it is not that of a training run'):
        load_run(folder)


def test_a_checkpoint_that_does_not_fit(write_run):
    folder = write_run(network(num_classes=4))
    with pytest.raises(ValueError, match=r'model_best.pth.tar does not fit the test_resnet of its args.yaml'):
        load_run(folder)
