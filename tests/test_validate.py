"""`gencnn validate`: its figures against other implementations and closed forms, and the command."""

import json

import datasets
import numpy as np
import pytest
import timm
import torch
from datasets import Dataset
from pictures import write_wide_image
from PIL import Image
from sklearn.metrics import roc_auc_score
from timm.data import resolve_data_config
from torch import nn

from timm_gencnn import cli
from timm_gencnn.generative import as_generative
from timm_gencnn.train_data import open_dataset, plain_loader
from timm_gencnn.validate import auroc, expected_calibration_error, noisy, scores, validate


def test_auroc_is_sklearns_with_ties():
    generator = torch.Generator().manual_seed(0)
    inside = torch.randint(2, 9, (200,), generator=generator).float()
    outside = torch.randint(0, 7, (300,), generator=generator).float()
    labels = np.r_[np.ones(200), np.zeros(300)]
    assert auroc(inside, outside) == pytest.approx(roc_auc_score(labels, torch.cat([inside, outside])))
    assert auroc(inside + 100, outside) == 1
    assert auroc(inside, inside) == pytest.approx(0.5)
    with pytest.raises(ValueError, match='without NaN'):
        auroc(torch.tensor([torch.nan]), outside)


def test_expected_calibration_error_by_hand():
    """0.9 is right 3 times of 4; 0.6 once of 2; 1.0 twice of 2: |3.6 - 3| + |1.2 - 1| + 0 over 8."""
    confidence = torch.tensor([0.9, 0.9, 0.9, 0.9, 0.6, 0.6, 1.0, 1.0])
    correct = torch.tensor([True, True, True, False, True, False, True, True])
    assert expected_calibration_error(confidence, correct) == pytest.approx((0.6 + 0.2) / 8)


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_classes = 3
        self.fc = nn.Linear(4, 3)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.flatten(1))


def test_noise_is_that_of_the_pixels_and_the_same_each_time():
    std = (0.25, 0.5)
    batches = [(torch.zeros(500, 2, 8, 8), torch.arange(500))] * 2
    first, second = (torch.cat([x for x, _ in noisy(batches, 0.1, std)]) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first[:500], first[500:])
    measured = first.transpose(0, 1).flatten(1).std(1) * torch.tensor(std)
    torch.testing.assert_close(measured, torch.full((2,), 0.1), rtol=0.02, atol=0)
    assert all(a is b for (a, _), (b, _) in zip(batches, noisy(batches, 0, std), strict=True))
    grey = torch.cat([x for x, _ in noisy([(torch.zeros(500, 1, 8, 8), None)], 0.1, (0.2, 0.3, 0.4))])
    assert grey.shape == (500, 1, 8, 8)
    assert grey.std() * 0.3 == pytest.approx(0.1, rel=0.02)
    for sigma in (-0.5, float('nan')):
        with pytest.raises(ValueError, match=f'noise {sigma}: give'):
            next(noisy(batches, sigma, std))


def test_scores_in_closed_form():
    torch.manual_seed(0)
    model = as_generative(Linear()).eval()
    x = torch.randn(10, 1, 2, 2)
    assert set(scores(model, [(x, None)])) == {'logit', 'gradient_norm'}
    model.set_log_z([1.0, -2.0, 0.5])
    found = scores(model, [(x[:6], None), (x[6:], None)])
    logits = model(x).detach()
    torch.testing.assert_close(found['logit'], logits.amax(1))
    torch.testing.assert_close(found['log_ratio'], (logits - torch.tensor([1.0, -2.0, 0.5])).amax(1))
    torch.testing.assert_close(found['gradient_norm'], -(logits.softmax(1) @ model.fc.weight).norm(dim=1).detach())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_validate_counts():
    model = Linear().eval()
    x = torch.randn(50, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    logits = model(x).detach()
    target = logits.argmax(1)
    target[:10] = (target[:10] + 1) % 3
    result = validate(model, [(x[:30], target[:30]), (x[30:], target[30:])])
    assert result['top1'] == pytest.approx(80)
    assert result['top5'] == 100
    assert result['images'] == 50
    assert result['nll'] == pytest.approx(nn.functional.cross_entropy(logits, target).item())
    with pytest.raises(ValueError, match=r'target 3 is outside \[0, 3\)'):
        validate(model, [(x, target + 1)])


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for split, high in (('validation', 255), ('noise', 40)):
        for c in range(2):
            (tmp_path / split / f'{c}').mkdir(parents=True)
            for i in range(3):
                pixels = rng.integers(0, high, (28, 28), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / f'{c}/{i}.png')
    return tmp_path


def test_command(folder, capsys):
    torch.manual_seed(0)
    torch.save({'state_dict': timm.create_model('lenet', num_classes=2).state_dict()}, folder / 'model.pth.tar')
    argv = ['validate', '--model', 'gencnn_lenet', '--num-classes', '2', '--checkpoint', str(folder / 'model.pth.tar')]
    argv += ['--data-dir', str(folder), '-j', '0', '--device', 'cpu', '--log-z-split', 'validation']
    argv += ['--ood-data-dir', str(folder / 'noise'), '--results-file', str(folder / 'results.json')]
    assert cli.main(argv) == 0
    results = json.loads((folder / 'results.json').read_text())
    assert results['images'] == 6
    assert {'top1', 'nll', 'ece', 'auroc_logit', 'auroc_log_ratio', 'auroc_gradient_norm'} <= set(results)
    assert f'{"top1":20s} {results["top1"]:.4f}' in capsys.readouterr().out
    assert cli.main([*argv, '--noise', '0.3']) == 0
    assert json.loads((folder / 'results.json').read_text())['nll'] != results['nll']


def results_of(folder, *more):
    """Results of the command for a classifier of two classes."""
    argv = ['validate', '--data-dir', str(folder), '-j', '0', '--device', 'cpu', '--num-classes', '2', *more]
    assert cli.main([*argv, '--results-file', str(folder / 'results.json')]) == 0
    return json.loads((folder / 'results.json').read_text())


def test_without_a_checkpoint_the_published_weights_are_measured(folder, capsys):
    argv = ['validate', '--data-dir', str(folder), '-j', '0', '--device', 'cpu']
    argv += ['--results-file', str(folder / 'r.json')]
    found = []
    for more in ([], ['--pretrained']):
        assert cli.main([*argv, '--model', 'gencnn_lenet.gg_mnist', *more]) == 0
        found.append(json.loads((folder / 'r.json').read_text())['nll'])
    assert found[0] == found[1]
    assert cli.main([*argv, '--model', 'alexnet']) == 2
    assert "cannot load model 'alexnet' '': No pretrained weights exist" in capsys.readouterr().err
    assert cli.main([*argv, '--model', 'gencnn_lenet', '--num-classes', '2']) == 2
    assert "the published 'gencnn_lenet' has 10 classes, not 2: give --checkpoint" in capsys.readouterr().err


def test_published_weights_see_images_of_the_published_test_size(folder):
    argv = ['validate', '--model', 'gencnn_resnet10_w16', '--data-dir', str(folder), '-j', '0', '--device', 'cpu']
    argv += ['--results-file', str(folder / 'r.json')]
    overlay = ['--pretrained-cfg-overlay', 'test_input_size=(3,48,48)', 'test_crop_pct=0.5']
    model = timm.create_model('gencnn_resnet10_w16', pretrained=True)
    torch.save(model.state_dict(), folder / 'model.pth.tar')
    checkpoint = ['--checkpoint', str(folder / 'model.pth.tar')]
    explicit = ['--input-size', '3', '48', '48', '--crop-pct', '0.5']
    found = []
    for more in ([], checkpoint + overlay, overlay, explicit):
        assert cli.main([*argv, *more]) == 0
        found.append(json.loads((folder / 'r.json').read_text())['nll'])
    assert found[0] == found[1]
    assert found[2] == found[3] != found[0]


def test_images_are_cropped_as_the_network_wants_them(tmp_path):
    write_wide_image(tmp_path)
    for mode, bright in (('center', False), ('squash', True)):
        model = timm.create_model('gencnn_lenet', pretrained_cfg_overlay={'crop_mode': mode})
        config = resolve_data_config({}, model=model)
        ((image, _),) = plain_loader(open_dataset('', str(tmp_path), 'validation', 1), config)
        assert (image[0, 0, :, 0] > 0).all() == bright


def test_the_network_is_the_one_that_was_trained(folder):
    """Its shape is given by timm's flags: the pooling, the norm's epsilon, and what only its constructor knows."""
    torch.manual_seed(0)
    kwargs = {'num_classes': 2, 'global_pool': 'max', 'bn_eps': 0.1, 'act_layer': 'relu'}
    trained = timm.create_model('test_efficientnet', **kwargs).eval()
    with torch.no_grad():
        trained.classifier.weight.mul_(100)  # a new network tells no class from another
    torch.save({'state_dict': trained.state_dict()}, folder / 'model.pth.tar')
    argv = ['--model', 'gencnn_test_efficientnet', '--checkpoint', str(folder / 'model.pth.tar')]
    argv += ['--input-size', '3', '64', '64', '--model-kwargs', 'act_layer=relu']
    argv += ['--pretrained-cfg-overlay', 'mean=(0.1,0.2,0.3)']
    config = resolve_data_config({'input_size': (3, 64, 64), 'mean': (0.1, 0.2, 0.3)}, model=trained)
    loader = plain_loader(open_dataset('', str(folder), 'validation', 3), config)
    expected = validate(trained, loader)['nll']
    pool, epsilon = ['--gp', 'max'], ['--bn-eps', '0.1']
    assert results_of(folder, *argv, *pool, *epsilon)['nll'] == pytest.approx(expected, rel=1e-5)
    for other in (pool, epsilon):  # control: another network
        assert abs(results_of(folder, *argv, *other)['nll'] - expected) > 1e-2


def test_columns_and_image_mode(folder, tmp_path, capsys):
    """Images and labels are read from the columns that are named, and in the mode that is named."""
    pixels = np.random.default_rng(0).integers(0, 255, (6, 28, 28, 3), dtype=np.uint8)
    columns = {'img': [Image.fromarray(p) for p in pixels], 'fine_label': [0, 1, 0, 1, 1, 1]}
    (tmp_path / 'columns').mkdir()
    for split in ('validation', 'test'):
        Dataset.from_dict(columns).cast_column('img', datasets.Image()).to_parquet(
            tmp_path / f'columns/{split}-0-of-1.parquet'
        )
    data = ['--dataset', f'hfds/{tmp_path / "columns"}', '--input-key', 'img', '--target-key', 'fine_label']
    torch.manual_seed(0)
    model = timm.create_model('lenet', num_classes=2, in_chans=3).eval()
    torch.save(model.state_dict(), folder / 'model.pth.tar')
    argv = ['--model', 'lenet', '--in-chans', '3', '--checkpoint', str(folder / 'model.pth.tar')]
    argv += ['--input-size', '3', '28', '28', '--mean', '0', '--std', '1', '--data-dir', str(tmp_path / 'cache')]
    (tmp_path / 'bare').mkdir()
    bare = Dataset.from_dict({'img': columns['img']}).cast_column('img', datasets.Image())
    bare.to_parquet(tmp_path / 'bare/test-0-of-1.parquet')  # a second data set needs no labels
    ood = ['--ood-dataset', f'hfds/{tmp_path / "bare"}', '--ood-split', 'test']
    for mode in ('RGB', 'YCbCr'):
        converted = np.stack([Image.fromarray(p).convert(mode) for p in pixels])
        logits = model(torch.from_numpy(converted).permute(0, 3, 1, 2) / 255)
        expected = nn.functional.cross_entropy(logits, torch.tensor(columns['fine_label'])).item()
        found = results_of(folder, *argv, *data, *ood, *([] if mode == 'RGB' else ['--input-img-mode', mode]))
        assert found['nll'] == pytest.approx(expected, abs=1e-6)
        assert found['auroc_logit'] == 50  # the same images on both sides
    for key in (['--input-key', 'img'], ['--input-key', 'image', '--target-key', 'img']):
        data = ['--dataset', ood[1], '--split', 'test', *key, '--data-dir', str(tmp_path / 'cache')]
        assert cli.main(['validate', *argv, *data, '-j', '0', '--num-classes', '2']) == 2
        assert 'lacks the column' in capsys.readouterr().err


def test_images_have_the_channels_that_were_asked_for(folder):
    """test_resnet's own configuration names three."""
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=2, in_chans=1).eval()
    torch.save(model.state_dict(), folder / 'model.pth.tar')
    argv = ['--model', 'test_resnet', '--checkpoint', str(folder / 'model.pth.tar'), '--mean', '0.5', '--std', '0.5']
    found = [results_of(folder, *argv, *more) for more in (['--in-chans', '1'], ['--input-size', '1', '160', '160'])]
    assert found[0] == found[1]


def test_class_map_is_not_that_of_the_other_data_set(folder):
    (folder / 'noise/1').rename(folder / 'noise/static')
    (folder / 'noise/0').rename(folder / 'noise/snow')
    (folder / 'classes.txt').write_text('1\n0\n')
    torch.save({'state_dict': timm.create_model('lenet', num_classes=2).state_dict()}, folder / 'model.pth.tar')
    argv = ['--model', 'lenet', '--checkpoint', str(folder / 'model.pth.tar')]
    argv += ['--class-map', str(folder / 'classes.txt'), '--ood-data-dir', str(folder / 'noise')]
    assert 'auroc_logit' in results_of(folder, *argv)


def test_an_unknown_interpolation_is_none_of_the_choices(capsys):
    with pytest.raises(SystemExit):
        cli.main(['validate', '--interpolation', 'cubic'])
    assert 'argument --interpolation: invalid choice' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('more', 'message'),
    [
        (['--num-classes', '1', '--checkpoint', '{folder}/one.pth.tar'], 'has 2 classes, the model 1'),
        (['--checkpoint', 'gone.pth.tar'], "cannot load model 'lenet' 'gone.pth.tar': no such file"),
        (['--ood-dataset', 'torch/mnist'], "'torch/mnist' lies in a folder on this machine: give that as well"),
        (['--data-dir', '/nowhere'], "cannot open image folder in '/nowhere', split 'validation': no such folder"),
        (['--model-kwargs', 'depth=3'], "cannot load model 'lenet'"),
        (['--model', 'lennet'], "cannot load model 'lennet'"),
        (['--device', 'abacus'], "device 'abacus' cannot be used, try 'cpu'"),
    ],
)
def test_bad_input(folder, capsys, more, message):
    torch.save({'state_dict': timm.create_model('lenet', num_classes=1).state_dict()}, folder / 'one.pth.tar')
    argv = ['validate', '--model', 'lenet', '--data-dir', str(folder), '-j', '0', '--device', 'cpu']
    assert cli.main([*argv, *(word.format(folder=folder) for word in more)]) == 2
    assert message in capsys.readouterr().err
