"""One call of `visualize` on every module of timm, both regimes, and on networks that timm did not make."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from test_nodes import SHARED, SMALL, build, capture, channel_means, middle_layer
from torch import Tensor, nn

from timm_gencnn import chains, hmc, probes
from timm_gencnn.nodes import resolve
from timm_gencnn.samples import Samples, to_rgb
from timm_gencnn.sampling import Sampling
from timm_gencnn.views import Views
from timm_gencnn.visualize import visualize

# Untrained networks whose score changes its mind within one move of a chain (`check_rough`): the gradient is right
# (`check_uphill`), but the moves are too coarse to follow it. Of all others at least one node rises.
ROUGH = {'dpn48b', 'hardcorenas_b', 'inception_v4', 'pnasnet5large'}
NEARLY_ROUGH = {'efficientvit_m0'}  # it gains 0.1 and 0.3 of the promise, and rises on some processors only
FINER = 0.1  # the share of a chain's usual move by which all of these rise
GALLERY_STEPS = 40
EXACT_STEPS = 65  # the smallest budget that the exact regime takes
SMALLER: dict[str, dict[str, Any]] = {  # where even the smallest architecture is needlessly slow
    'beit_base_patch16_224': {'depth': 2},
    'deepseek_vit_412m': {'depth': 2},
    'gemma4_vit_167m': {'depth': 2},
    'naflexvit_base_patch16_parfac_gap': {'depth': 2},
    'qwen3_vit_88m': {'depth': 2},
    'samvit_base_patch16_224': {'depth': 2},
    'vgg11': {'mlp_ratio': 0.1},
}
SMALL_SIDES = 64, 96, 128, 160, 192, 224, 256

DEFAULT = ('test_resnet', 'test_vit')  # the others are minutes on a busy machine


def noise(model: nn.Module, size: tuple[int, int], n: int) -> Tensor:
    """Images of the reference, as the model takes them [n, C, H, W]."""
    chans = resolve(model, 1, size=size).in_chans
    reference = Sampling().make_reference(model, chans, size, torch.device('cpu'))
    return reference(torch.randn(n, chans, *size, generator=torch.Generator().manual_seed(1)))


def awake(model: nn.Module, size: tuple[int, int]) -> nn.Module:
    """Batch norm as after training: else the signal of an untrained network fades below float32's resolution."""
    images = noise(model, size, 32)
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.momentum = 1.0
            norm.train()
    with torch.no_grad():
        model(images)
    return model.eval()


def alive_node(model: nn.Module, size: tuple[int, int]) -> str:
    """A block in the middle of the network and the channel that is largest on all of four images."""
    images = noise(model, size, 4)
    layer, found = middle_layer(model, probes.probe(model, images.shape[1], size))
    means = torch.stack([channel_means(capture(model, layer, image[None]), found) for image in images])
    return f'{layer}:{int(means.abs().amin(0).argmax())}'


def untouched(model: nn.Module, node: Any, size: tuple[int, int], n: int, exact: bool) -> tuple[Tensor, Tensor]:
    """What the same seed gives where no score pulls: images [n, 3, H, W] in [0, 1], and as the model takes them."""
    score = resolve(model, node, size=size)
    reference = Sampling().make_reference(model, score.in_chans, size, torch.device('cpu'))
    streams = hmc.Streams(0, range(n))
    z, p = streams.normal(reference.shape), streams.normal(reference.shape)
    none = hmc.State(z, p, torch.zeros(n), torch.zeros_like(z))
    zero = lambda z: z.new_zeros(len(z))  # noqa: E731
    if exact:
        trace = chains.sample_exact(zero, none, streams, EXACT_STEPS)
    else:
        trace = chains.sample_gallery(zero, none, streams, GALLERY_STEPS, 0.005)
    return to_rgb(reference.pixels(trace.z)), reference(trace.z)


def check_samples(samples: Samples, n: int, size: tuple[int, int], exact: bool) -> None:
    assert samples.images.shape == (n, 3, *size)
    assert samples.images.isfinite().all()
    assert 0 <= samples.images.min() <= samples.images.max() <= 1
    assert not torch.equal(samples.images[0], samples.images[1])
    for key in 'score', 'acceptance', 'tilt', 'step_size', 'energy_error', 'divergences':
        assert len(samples.diagnostics[key]) == n
        known = exact or key not in ('acceptance', 'energy_error')
        assert (torch.tensor(samples.diagnostics[key]).isfinite() == known).all()
    assert sum(samples.diagnostics['divergences']) == 0
    assert 0 <= (EXACT_STEPS if exact else GALLERY_STEPS) - samples.diagnostics['gradients'] < (8 if exact else 1)
    assert samples.settings['regime'] == ('exact' if exact else 'gallery')
    assert samples.verdict.startswith(samples.settings['regime'])


def gain(score: hmc.Score, z: Tensor, step: Tensor) -> Tensor:
    with torch.no_grad():
        return (score(z + step) - score(z)).double()


def check_uphill(model: nn.Module, node: Any, size: tuple[int, int], spread: Tensor) -> None:
    """A short step along the gradient raises the score by what the gradient promises.

    Where float32 rounds the step or the gain away (a slope so steep that the step is below the images' own resolution),
    the same gradient has to keep its promise in float64. The promise itself is far above the resolution of the score.
    """
    score, z = resolve(model, node, size=size), noise(model, size, 2)
    value, grad = hmc.score_and_grad(score, z)
    promise = torch.maximum(0.01 * spread, 100 * torch.finfo(torch.float32).eps * value.abs())
    step = (promise / grad.flatten(1).square().sum(1)).view(-1, 1, 1, 1) * grad
    ratio = (gain(score, z, step) / promise).mean()
    if ratio != pytest.approx(1, abs=0.5):
        precise = resolve(copy.deepcopy(model).double(), node, size=size)
        ratio = (gain(precise, z.double(), step.double()) / promise).mean()
    assert ratio == pytest.approx(1, abs=0.5)


def check_rough(model: nn.Module, node: Any, size: tuple[int, int]) -> None:
    """A move of a gallery chain's own size along the gradient gains less than a tenth of what the gradient promises."""
    score = resolve(model, node, size=size)
    reference = Sampling().make_reference(model, score.in_chans, size, torch.device('cpu'))
    z = torch.randn(4, *reference.shape, generator=torch.Generator().manual_seed(2))
    f = lambda z: score(reference(z))  # noqa: E731
    _, grad = hmc.score_and_grad(f, z)
    step = chains.MOVE * grad / grad.flatten(1).square().mean(1).sqrt().view(-1, 1, 1, 1)
    assert (gain(f, z, step) / (step * grad).flatten(1).sum(1)).mean() < 0.1


def still(model: nn.Module, node: Any, size: tuple[int, int], share: float = 1.0) -> Tensor:
    """Final scores of two gallery chains that are shown their plain images instead of random views."""
    views = Views(shift=0.0, move=share * chains.MOVE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules['timm_gencnn.visualize'], 'views_of', lambda *_: views)
        samples = visualize(model, node, n=2, size=size, steps=GALLERY_STEPS, progress=False)
    return torch.tensor(samples.diagnostics['score'])


def check_gallery(model: nn.Module, nodes: list[Any], size: tuple[int, int], share: float = 1.0) -> list[float]:
    """Each node alone, from the same noise: what differs between their images is the nodes' doing.

    Returns:
        How far each score rises above that of the same noise cooled without a score (a smooth image, whose score may be
        far from the reference's), in units of its spread over the reference, when the chains are shown still images: an
        untrained network's score says other things of other views, and its mean over them may have nowhere to rise to.
        Their moves are this share of the usual ones.
    """
    images, rises = [], []
    for node in nodes:
        samples = visualize(model, node, n=2, size=size, steps=GALLERY_STEPS, progress=False)
        check_samples(samples, 2, size, exact=False)
        pixels, plain = untouched(model, node, size, 2, exact=False)
        assert ((samples.images - pixels).flatten(1).abs().amax(1) > 0.05).all()
        score = resolve(model, node, size=size)
        with torch.no_grad():
            scores, unpulled = score(noise(model, size, 8)), score(plain)
        rises.append(((still(model, node, size, share) - unpulled).mean() / scores.std()).item())
        check_uphill(model, node, size, scores.std())
        images.append(samples.images)
    assert ((images[0] - images[1]).flatten(1).abs().amax(1) > 0.05).all()
    return rises


def check_exact(model: nn.Module, nodes: list[Any], size: tuple[int, int]) -> None:
    """All nodes in one batch; at T = 1 an untrained network hardly pulls, but no image is the noise's own."""
    samples = visualize(model, nodes, n=2, size=size, steps=EXACT_STEPS, temperature=1.0, progress=False)
    check_samples(samples, 4, size, exact=True)
    assert (samples.images != untouched(model, nodes, size, 4, exact=True)[0]).flatten(1).any(1).all()


def smallest(name: str) -> tuple[nn.Module, tuple[int, int]]:
    """The architecture for the smallest image that it takes: `test_nodes` has its own size, here many gradients."""
    kwargs = SMALLER.get(name, {})
    model = build(name, **kwargs)
    for side in SMALL_SIDES:
        try:
            return model, resolve(model, 1, size=(side, side)).size
        except ValueError:
            pass
        try:
            other = build(name, img_size=side, **kwargs)
            return other, resolve(other, 1).size
        except Exception:  # no such argument, or windows and pools that do not fit: whatever a constructor raises
            pass
    raise AssertionError('the model takes no size')


def check_module(name: str) -> None:
    model, size = smallest(name)
    awake(model, size)
    nodes = [1, alive_node(model, size)]
    rises = check_gallery(model, nodes, size, FINER if name in ROUGH | NEARLY_ROUGH else 1.0)
    assert max(rises) > 1, rises
    if name in ROUGH:
        for node in nodes:
            check_rough(model, node, size)
    check_exact(model, nodes, size)


@pytest.mark.parametrize('name', DEFAULT)
def test_families(name: str) -> None:
    check_module(name)


@pytest.mark.slow
@pytest.mark.parametrize('name', [name for name in SMALL if name not in DEFAULT])
def test_all_other_modules(name: str) -> None:
    check_module(name)


@pytest.mark.parametrize('arch', ['test_resnet', 'test_vit'])
def test_generative_classes_draw_what_the_plain_ones_draw(arch: str) -> None:
    plain, generative = (
        build(prefix + arch, **({} if 'res' in arch else {'img_size': 64})) for prefix in ('', 'gencnn_')
    )
    assert type(plain) is not type(generative)
    kwargs: dict[str, Any] = {'n': 2, 'size': 64, 'steps': 8, 'progress': False}
    images = [visualize(model, 'goldfish', **kwargs).images for model in (plain, generative)]
    assert torch.equal(*images)


@pytest.mark.parametrize('wrong', [lambda grad: -grad, lambda grad: 3 * grad, lambda grad: grad.flip(-1)])
def test_a_wrong_gradient_does_not_keep_its_promise(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, size = build('test_resnet'), (64, 64)
    right = hmc.score_and_grad
    check_uphill(model, 1, size, torch.tensor(0.1))
    monkeypatch.setattr(hmc, 'score_and_grad', lambda *args: (right(*args)[0], wrong(right(*args)[1])))
    with pytest.raises(AssertionError):
        check_uphill(model, 1, size, torch.tensor(0.1))


@pytest.mark.slow
def test_torchvision() -> None:
    torchvision = pytest.importorskip('torchvision')
    torch.manual_seed(0)
    model = awake(torchvision.models.resnet18().eval().requires_grad_(False), (64, 64))
    nodes = ['goldfish', 'layer3.1.conv2:17']
    assert max(check_gallery(model, nodes, (64, 64))) > 1
    check_exact(model, nodes, (64, 64))


@pytest.mark.skipif(not (SHARED / 'networks').is_dir(), reason='needs ../shared/networks')
@pytest.mark.parametrize(('arch', 'layer'), [('squeezenet', 'features.9.squeeze:5'), ('mobilenet_v1', 'blocks.8.2:5')])
def test_shared_networks(arch: str, layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained networks, whose scores rise far beyond what the reference gives."""
    monkeypatch.syspath_prepend(str(SHARED / 'networks'))
    networks = pytest.importorskip('networks')
    model = getattr(networks, arch)()
    assert min(check_gallery(model, ['goldfish', layer], (64, 64))) > 3
    check_exact(model, ['goldfish', layer], (64, 64))
