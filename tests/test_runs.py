"""The folder of a training run, read back: the network that was trained, and the figures that are its own."""

import json

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard

from timm_gencnn import GenerativeMixin, push_to_hub
from timm_gencnn.runs import load_run

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


def test_a_checkpoint_that_does_not_fit(write_run):
    folder = write_run(network(num_classes=4))
    with pytest.raises(ValueError, match=r'model_best.pth.tar does not fit the test_resnet of its args.yaml'):
        load_run(folder)
