"""The shipped checkpoints have the test errors that their records state."""

from pathlib import Path

import pytest
import timm
from timm.data import resolve_data_config

import timm_gencnn  # noqa: F401  (registers the checkpoints)
from timm_gencnn import zoo
from timm_gencnn.chains import Schedule
from timm_gencnn.networks import weights_digest
from timm_gencnn.train_data import open_dataset, plain_loader
from timm_gencnn.validate import noisy, validate
from timm_gencnn.visualize import repeat_settings

DATA = Path(__file__).parents[2] / 'shared/data'


ROOT = Path(__file__).parents[1]
PICTURES = [ROOT / f'.github/images/{name}.png' for name in ('digits', 'cifar10', 'in100')]
PICTURES += sorted(ROOT.glob('hub_cards/*/images/*.png'))


@pytest.mark.parametrize('path', PICTURES, ids=lambda path: f'{path.parents[1].name}-{path.stem}')
def test_shipped_pictures_were_drawn_from_the_shipped_weights(path):
    """What `--like` asks of them."""
    if not path.exists():
        pytest.skip('this picture does not come with the source distribution')
    settings = repeat_settings(str(path))
    name = settings['model'].rsplit('/')[-1]
    assert name.removeprefix('gencnn_') in zoo.names()
    assert settings['weights'] == weights_digest(timm.create_model(name, pretrained=True))
    assert settings['schedule'] == Schedule()._asdict()


def test_every_checkpoint_has_a_card_with_pictures():
    for name in zoo.names():
        assert (ROOT / f'hub_cards/{name}/README.md').exists()
        assert list((ROOT / f'hub_cards/{name}/images').glob('*.png'))


@pytest.fixture
def test_images():
    def load(name: str, model) -> list:
        results = zoo.read(name)['results']
        folder = DATA / results['dataset'].split('/')[-1]
        if not folder.exists():
            pytest.skip(f'the data set {results["dataset"]} is not at {folder}')
        config = resolve_data_config({}, model=model)
        dataset = open_dataset(f'hfds/{folder}', None, results['split'], config['input_size'][0])
        return list(plain_loader(dataset, config))

    return load


@pytest.mark.slow
@pytest.mark.parametrize('name', zoo.names())
def test_error_is_the_stated_one(name, test_images):
    model = timm.create_model(f'gencnn_{name}', pretrained=True).eval()
    images, stated = test_images(name, model), zoo.read(name)['results']
    measured = validate(model, images)
    # rounding differs between machines: half of one image in a thousand, of ten thousand images or fewer
    assert 100 - measured['top1'] == pytest.approx(stated['test_error'], abs=0.05)
    assert measured['nll'] == pytest.approx(stated['test_nll'], rel=0.01)
    disturbed = validate(model, noisy(images, 0.2, model.pretrained_cfg['std']))  # a check of the check
    assert abs(100 - disturbed['top1'] - stated['test_error']) > 0.05


def test_log_z_is_that_of_the_mirrored_logits():
    name = 'gencnn_resnet11_w64.gg_dg_cifar10'
    assert timm.create_model(name, pretrained=True).log_z is not None
    assert timm.create_model(name, pretrained=True, mirror=False).log_z is None
