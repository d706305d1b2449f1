"""The paper's own settings."""

import math

import pytest
import timm
import torch

import timm_gencnn
from timm_gencnn import cli, hmc
from timm_gencnn.presets import PRESETS


def spy_on_steps(monkeypatch):
    seen = []
    original = hmc.step

    def step(state, score, streams, step_size, n_leapfrog, *args, **kwargs):
        seen.append((step_size[0].item(), n_leapfrog, state.z.clone()))
        return original(state, score, streams, step_size, n_leapfrog, *args, **kwargs)

    monkeypatch.setattr(hmc, 'step', step)
    return seen


def alexnet():
    torch.manual_seed(0)
    net = timm.create_model('gencnn_alexnet', num_classes=4, img_size=67).eval()
    for name, p in net.named_parameters():
        if name.endswith('bias'):
            p.data += 0.1  # with zero biases every unit is dead on the zero image
    return net


@pytest.mark.parametrize('name', PRESETS)
def test_angle_is_that_of_leapfrog_in_the_papers_units(name):
    """Leapfrog with mass m on |x|² / (2 sigma²) turns by about step / (sigma sqrt(m))."""
    preset = PRESETS[name]
    x, momentum = 1.0, 0.0
    momentum -= preset.step / 2 * x / preset.sigma**2
    x += preset.step * momentum / preset.mass
    assert math.acos(x) == pytest.approx(preset.angle, rel=1e-3)


def test_lenet(monkeypatch):
    seen = spy_on_steps(monkeypatch)
    samples = timm_gencnn.visualize('gencnn_lenet.vis_mnist', 3, n=2, steps=801, preset='paper-lenet', progress=False)
    sizes, lengths, _ = zip(*seen, strict=True)
    assert set(sizes) == {PRESETS['paper-lenet'].angle}  # no adaptation, no random factor
    assert lengths == (100,) * 8
    settings = samples.settings
    assert (settings['regime'], settings['preset'], settings['reference']) == ('exact', 'paper-lenet', 'white')
    assert settings['sigma'] * 0.3081 == pytest.approx(10, rel=1e-3)  # 10 in pixels of [0, 1]
    assert 'exact sampling' in samples.verdict


def test_alexnet_starts_from_the_zero_image(monkeypatch):
    seen = spy_on_steps(monkeypatch)
    net = alexnet()
    samples = timm_gencnn.visualize(net, 0, n=1, steps=8 * 50 + 1, preset='paper-alexnet', progress=False)
    assert not seen[0][2].any()
    assert seen[1][2].any()
    assert samples.settings['sigma'] == pytest.approx(10)  # the network takes grey levels of 0 to 255


def test_budget_is_the_papers():
    assert PRESETS['paper-lenet'].gradients(True) == 30_001
    assert PRESETS['paper-alexnet'].gradients(True) == 25_001
    assert PRESETS['paper-alexnet'].gradients(False) == 5_001


def test_budget_follows_from_the_kind_of_node(monkeypatch):
    from timm_gencnn import chains

    budgets = []

    def run(score, state, streams, steps, n_leapfrog, **kwargs):
        budgets.append((steps, n_leapfrog))
        raise ValueError('enough')

    monkeypatch.setattr(chains, 'sample_exact', run)
    net = alexnet()
    for node in 0, 'conv1:3':
        with pytest.raises(ValueError, match='enough'):
            timm_gencnn.visualize(net, node, n=1, preset='paper-alexnet', progress=False)
    assert budgets == [(25_001, 50), (5_001, 50)]


@pytest.mark.parametrize(
    'wrong',
    [{'preset': 'paper-vgg'}, {'reference': 'white'}, {'temperature': 0.1}, {'tilt': 2.0}],
)
def test_bad_input(wrong):
    with pytest.raises(ValueError, match=r'paper-lenet'):
        timm_gencnn.visualize('gencnn_lenet.vis_mnist', 3, progress=False, **{'preset': 'paper-lenet'} | wrong)


def test_like_repeats_a_preset(tmp_path):
    first, second = tmp_path / 'a.png', tmp_path / 'b.png'
    command = ['visualize', 'gencnn_lenet.vis_mnist', '3', '-n', '1', '--steps', '801', '--preset', 'paper-lenet']
    assert cli.main([*command, '--out', str(first), '--device', 'cpu']) == 0
    assert cli.main(['visualize', '--like', str(first), '--out', str(second), '--device', 'cpu']) == 0
    assert timm_gencnn.samples.read_metadata(first)['settings']['preset'] == 'paper-lenet'
    from PIL import Image

    assert Image.open(first).tobytes() == Image.open(second).tobytes()
