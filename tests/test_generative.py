"""The generative class on models whose log Z is known exactly, on every kind of head, and on bad input."""

import copy
import inspect
import io
import itertools
import pickle

import pytest
import timm
import torch
import torchvision
from torch import nn

from timm_gencnn import GenerativeMixin, as_generative

PRIORS = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)


@pytest.fixture
def cube():
    """All 256 images of eight pixels -1 or 1: under the uniform reference, log Z_y = b_y + sum_i log cosh w_yi."""
    return torch.tensor(list(itertools.product([-1.0, 1.0], repeat=8)), dtype=torch.float64).view(256, 1, 2, 4)


@pytest.fixture
def linear():
    """A linear classifier on the cube, with the log Z of its classes."""
    torch.manual_seed(0)
    model = as_generative(nn.Sequential(nn.Flatten(), nn.Linear(8, 3, dtype=torch.float64))).eval()
    with torch.no_grad():
        model[1].weight.mul_(3)
        log_z = model[1].bias + model[1].weight.cosh().log().sum(1)
    return model, log_z


def batches(images, *sizes):
    return [(batch, torch.zeros(len(batch))) for batch in images.split(list(sizes))]


def test_log_z_is_the_known_one(cube, linear):
    model, log_z = linear
    estimate = model.estimate_log_z(batches(cube, 100, 100, 56), progress=False)
    torch.testing.assert_close(estimate.log_z, log_z, rtol=0, atol=1e-12)
    torch.testing.assert_close(model.log_z, log_z.float(), rtol=0, atol=1e-6)
    assert estimate.n == 256
    weights = model(cube).softmax(dim=0)
    torch.testing.assert_close(estimate.ess, 1 / weights.square().sum(0), rtol=1e-12, atol=0)
    assert not model.log_z.requires_grad

    # control: averaging the batches' own estimates is wrong, and this test can tell
    naive = torch.stack([model(b).logsumexp(0) - torch.tensor(len(b)).log() for b, _ in batches(cube, 100, 100, 56)])
    assert (naive.mean(0) - log_z).abs().max() > 1e-2


def test_log_z_of_huge_logits_does_not_overflow(cube, linear):
    model, log_z = linear
    with torch.no_grad():
        model[1].bias += 1e4
    estimate = model.estimate_log_z([cube], progress=False)
    torch.testing.assert_close(estimate.log_z, log_z + 1e4, rtol=1e-12, atol=0)


def test_densities_are_normalised(cube, linear):
    model, log_z = linear
    model.set_log_z(log_z)
    one = torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(model.log_ratio(cube).exp().mean(0), one, rtol=0, atol=1e-6)
    for priors in (None, PRIORS, 1000 * PRIORS):
        torch.testing.assert_close((-model.energy(cube, priors=priors)).exp().mean(), one[0], rtol=0, atol=1e-6)
    assert (model.score(cube).exp().mean(0) - 1).abs().min() > 0.1  # control: the scores alone are not


def test_posterior_is_bayes_rule(cube, linear):
    model, log_z = linear
    model.set_log_z(log_z)
    for priors, rho in ((None, torch.ones(3) / 3), (PRIORS, PRIORS), (1000 * PRIORS, PRIORS)):
        joint = rho * (model(cube) - log_z).exp() / 256
        expected = joint / joint.sum(1, keepdim=True)
        torch.testing.assert_close(model.posterior(cube, priors), expected, rtol=0, atol=1e-6)
        assert (model(cube).softmax(1) - expected).abs().max() > 0.1  # control: the raw softmax is not


def test_score_energy_and_log_ratio_pick_the_class(cube, linear):
    model, log_z = linear
    model.set_log_z(log_z)
    y = torch.arange(256) % 3
    logits = model(cube)
    assert torch.equal(model.score(cube), logits)
    assert torch.equal(model.score(cube, y), logits[range(256), y])
    assert torch.equal(model.score(cube, y.to(torch.uint8)), logits[range(256), y])
    assert torch.equal(model.score(cube, 2), logits[:, 2])
    assert torch.equal(model.energy(cube, 2), -logits[:, 2])
    torch.testing.assert_close(model.log_ratio(cube, y), (logits - log_z)[range(256), y], rtol=0, atol=1e-6)


def test_scores_have_gradients_and_are_float32_at_least():
    torch.manual_seed(0)
    model = timm.create_model('gencnn_lenet').eval()
    images = torch.randn(2, 1, 28, 28, requires_grad=True)
    (gradient,) = torch.autograd.grad(model.score(images, 3).sum(), images)
    assert gradient.abs().sum() > 0
    assert model.bfloat16().score(images.bfloat16()).dtype == torch.float32


def test_folding_makes_the_softmax_the_posterior_and_unfolding_undoes_it(cube, linear):
    model, _ = linear
    model.estimate_log_z([cube], progress=False)
    bias, log_z = model[1].bias.clone(), model.log_z
    ratios, posterior = model.log_ratio(cube), model.posterior(cube, PRIORS)

    model.fold_intercepts(PRIORS)
    assert model.folded
    torch.testing.assert_close(model(cube).softmax(1), posterior, rtol=0, atol=1e-6)
    torch.testing.assert_close(model.log_ratio(cube), ratios, rtol=0, atol=1e-6)
    torch.testing.assert_close(model.posterior(cube, PRIORS), posterior, rtol=0, atol=1e-6)
    torch.testing.assert_close(model.log_z.double(), PRIORS.log(), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r'folded already.*unfold_intercepts'):
        model.fold_intercepts()

    again = pickle.loads(pickle.dumps(model))
    again.unfold_intercepts()
    assert torch.equal(again[1].bias, bias)
    model.unfold_intercepts()
    assert torch.equal(model[1].bias, bias)
    torch.testing.assert_close(model.log_z, log_z, rtol=0, atol=1e-6)
    assert not model.folded
    with pytest.raises(ValueError, match=r'not folded.*fold_intercepts'):
        model.unfold_intercepts()


def test_unfolding_refuses_a_bias_that_changed(cube, linear):
    model, log_z = linear
    model.set_log_z(log_z)
    model.estimate_log_z([cube], progress=False)
    model.fold_intercepts()
    with torch.no_grad():
        model[1].bias += 1
    with pytest.raises(ValueError, match=r'has changed.*estimate_log_z'):
        model.unfold_intercepts()


def test_other_weights_can_be_folded_anew(cube, linear):
    model, log_z = linear
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(2):
        model.estimate_log_z([cube], progress=False)
        model.fold_intercepts(PRIORS)
        torch.testing.assert_close(model[1].bias, before['1.bias'] + PRIORS.log() - log_z, rtol=0, atol=1e-6)
        assert model.folded
        model.load_state_dict(before)
        assert not model.folded
    model[1] = nn.Linear(8, 4, dtype=torch.float64)
    assert not model.folded


HEADS = {
    'linear': lambda: timm.create_model('resnet10t', num_classes=5),
    '1x1 convolution': lambda: timm.create_model('resnetv2_18', num_classes=5),
    'convolution in a ClassifierHead': lambda: timm.create_model('efficientvit_b0', num_classes=5),
    'NormMlpClassifierHead': lambda: timm.create_model('convnext_atto', num_classes=5, head_hidden_size=16),
    'ClNormMlpClassifierHead': lambda: timm.create_model('mambaout_femto', num_classes=5),
    'MlpHead': lambda: timm.create_model('convformer_s18', num_classes=5),
    'two NormLinear': lambda: timm.create_model('levit_128s', num_classes=5),
    'distilled transformer': lambda: timm.create_model(
        'deit_tiny_distilled_patch16_224', img_size=32, num_classes=5, depth=1
    ),
    'one head for each branch': lambda: timm.create_model('crossvit_tiny_240', num_classes=5),
    'torchvision': lambda: torchvision.models.mobilenet_v3_small(num_classes=5),
    'auxiliary heads': lambda: torchvision.models.googlenet(num_classes=5, init_weights=False),
}


@pytest.mark.parametrize('head', HEADS)
def test_fold_on_every_kind_of_head(head):
    torch.manual_seed(0)
    model = as_generative(HEADS[head]()).eval()
    size = getattr(model, 'pretrained_cfg', {}).get('input_size', (3, 64, 64))
    size = size if model.__dict__.get('_traits', {}).get('fixed_input_size') else (3, 64, 64)
    size = (3, 32, 32) if head == 'distilled transformer' else size
    images = torch.randn(4, *size)
    keys = model.state_dict().keys()
    with torch.no_grad():
        model.estimate_log_z([images], progress=False)
        model.set_log_z(model.log_z + torch.tensor([3.0, -2.0, 0.5, 1.0, 0.0]))
        posterior, logits = model.posterior(images), model(images)
        model.fold_intercepts()
        torch.testing.assert_close(model(images).softmax(1), posterior, rtol=0, atol=1e-5)
        model.unfold_intercepts()
        assert torch.equal(model(images), logits)
    assert model.state_dict().keys() == keys


class NoBias(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(8, 3, bias=False))


REFUSED = {
    'no bias': (NoBias, 'does not end in a linear layer with 3 biases'),
    'no linear layer': (lambda: nn.Sequential(nn.Flatten(), nn.LayerNorm(8)), 'does not end in a linear layer with 8'),
    'log-softmax': (lambda: nn.Sequential(nn.Flatten(), nn.Linear(8, 3), nn.LogSoftmax(1)), 'do not follow the bias'),
    'cosine': (lambda: nn.Sequential(nn.Flatten(), nn.Linear(8, 3), nn.LayerNorm(3)), 'do not follow the bias'),
    'ReLU behind': (lambda: nn.Sequential(nn.Flatten(), nn.Linear(8, 3), nn.ReLU()), 'do not follow the bias'),
}


@pytest.mark.parametrize('head', REFUSED)
def test_fold_refuses_other_heads_and_changes_nothing(head, cube):
    torch.manual_seed(0)
    build, message = REFUSED[head]
    model = as_generative(build()).eval()
    images = cube.float()
    model.estimate_log_z([images], progress=False)
    model.set_log_z(model.log_z + torch.arange(len(model.log_z)))
    before, log_z = model(images), model.log_z
    with pytest.raises(ValueError, match=rf'{message}.*posterior\(\)'):
        model.fold_intercepts()
    assert torch.equal(model(images), before)
    assert model.log_z is log_z
    assert not model.folded


def test_class_is_a_cached_subclass_and_the_model_stays_the_same_object():
    first, second = lenet(), lenet()
    keys, base = list(first.state_dict()), type(first)
    assert as_generative(first) is first
    assert as_generative(as_generative(first)) is first
    assert type(first).__mro__[1:3] == (GenerativeMixin, base)
    assert type(as_generative(second)) is type(first)
    assert list(first.state_dict()) == keys
    assert first.forward.__func__ is base.forward
    assert inspect.signature(type(first).reset_classifier) == inspect.signature(base.reset_classifier)
    assert not hasattr(as_generative(nn.Linear(1, 1)), 'reset_classifier')


def lenet():
    torch.manual_seed(0)
    return timm.create_model('lenet').eval()


def reload(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle(protocol):
    check_copy(lambda model: pickle.loads(pickle.dumps(model, protocol)))


@pytest.mark.parametrize('duplicate', [copy.deepcopy, copy.copy, reload])
def test_copies(duplicate):
    check_copy(duplicate)


def check_copy(duplicate):
    model = as_generative(lenet())
    model.set_log_z(torch.arange(10.0))
    images = torch.randn(2, 1, 28, 28)
    other = duplicate(model)
    assert other is not model
    assert type(other) is type(model)
    assert torch.equal(other.log_ratio(images), model.log_ratio(images))


def test_reset_classifier_forgets_log_z_and_the_fold():
    model = as_generative(lenet())
    model.set_log_z(torch.arange(10.0))
    model.fold_intercepts()
    model.reset_classifier(7)
    assert model.log_z is None
    assert not model.folded
    assert 'log_z' not in model._model_args
    model.set_log_z(torch.arange(7.0))
    model.fold_intercepts()
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 7)


def test_forward_compiles_and_runs_in_inference_mode():
    model = as_generative(lenet())
    images = torch.randn(2, 1, 28, 28)
    logits = model(images)
    assert torch.equal(torch.compile(model, backend='eager', fullgraph=True)(images), logits)
    with torch.inference_mode():
        assert torch.equal(model(images), logits)
        assert torch.equal(model.score(images), logits)
        model.estimate_log_z([images], progress=False)
    model.posterior(images).sum().backward()


@pytest.mark.parametrize('arch', ['test_resnet', 'test_efficientnet', 'test_convnext', 'test_vit'])
@pytest.mark.parametrize('folded', [False, True])
def test_torchscript(arch, folded):
    torch.manual_seed(0)
    model = timm.create_model(f'gencnn_{arch}', scriptable=True).eval()
    images = torch.randn(2, *model.pretrained_cfg['input_size'])
    if folded:
        model.estimate_log_z([images], progress=False)
        model.fold_intercepts()
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(model)(images), model(images))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_log_z_of_a_model_in_another_precision_than_the_images(dtype):
    images = torch.randn(8, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    model, twin = as_generative(lenet()), as_generative(lenet()).to(dtype)
    estimate = model.estimate_log_z([images], progress=False).log_z
    torch.testing.assert_close(
        twin.estimate_log_z([images], progress=False).log_z, estimate, rtol=0, atol=4 * torch.finfo(dtype).eps + 1e-6
    )


@pytest.mark.parametrize(
    ('batch', 'message'),
    [
        ({'image': torch.zeros(1, 1, 28, 28)}, 'gives a dict where'),
        ([], 'gives a list where'),
        (torch.zeros(1, 1, 28, 28, dtype=torch.uint8), r'gives a tensor of torch\.uint8 where'),
    ],
)
def test_log_z_of_batches_that_are_no_images(batch, message):
    with pytest.raises(ValueError, match=message):
        as_generative(lenet()).estimate_log_z([batch], progress=False)


def test_progress_bar_can_be_silenced(cube, linear, capsys):
    model, _ = linear
    model.estimate_log_z([cube])
    assert 'log Z' in capsys.readouterr().err
    model.estimate_log_z([cube], progress=False)
    assert capsys.readouterr().err == ''


@pytest.mark.parametrize('layer', [nn.BatchNorm1d(8), nn.Dropout(0.5)])
def test_train_mode_is_refused(layer, cube):
    model = as_generative(nn.Sequential(nn.Flatten(), layer, nn.Linear(8, 3)))
    model.set_log_z(torch.zeros(3))
    images = cube.float()
    calls = (model.score, model.energy, model.log_ratio, model.posterior)
    for switch in (model.train, layer.train):
        model.eval()
        for call in calls:
            call(images)
        switch()
        for call in (*calls, lambda x: model.estimate_log_z([x], progress=False)):
            with pytest.raises(ValueError, match=r'train mode.*\.eval\(\)'):
                call(images)


@pytest.mark.parametrize(
    ('y', 'message'),
    [
        (3, 'class 3, but the classes are 0 to 2'),
        (-1, 'class -1, but the classes are 0 to 2'),
        (torch.tensor([0] * 255 + [7]), 'class 7, but the classes are 0 to 2'),
        (torch.tensor([0, 1]), r'shape \(2,\).*256 images'),
        (0.5, 'float32'),
        (True, 'bool'),
    ],
)
def test_bad_class_is_refused(y, message, cube, linear):
    model, log_z = linear
    model.set_log_z(log_z)
    for call in (model.score, model.energy, model.log_ratio):
        with pytest.raises(ValueError, match=message):
            call(cube, y)


@pytest.mark.parametrize('priors', [[1, 1], [1, 0, 1], [1, -1, 1], [1, float('nan'), 1], [1, float('inf'), 1]])
def test_bad_priors_are_refused(priors, cube, linear):
    model, log_z = linear
    model.set_log_z(log_z)
    for call in (model.energy, model.posterior):
        with pytest.raises(ValueError, match='give 3 positive numbers'):
            call(cube, priors=priors)
    with pytest.raises(ValueError, match='give 3 positive numbers'):
        model.fold_intercepts(priors)


def test_unknown_log_z_is_refused(cube, linear):
    model, _ = linear
    model.score(cube)
    model.energy(cube, 0)
    for call in (model.log_ratio, model.posterior, model.energy, lambda _: model.fold_intercepts()):
        with pytest.raises(ValueError, match='estimate_log_z'):
            call(cube)


@pytest.mark.parametrize('log_z', [[0.0] * 9, [[0.0] * 10], [float('nan')] * 10, [float('inf')] * 10])
def test_bad_log_z_is_refused(log_z):
    with pytest.raises(ValueError, match='one finite number for each of its 10 classes'):
        as_generative(lenet()).set_log_z(log_z)


def test_log_z_of_another_head_is_refused(cube, linear):
    """One log Z was taken for that of every class, and several failed in torch."""
    model, log_z = linear
    for known in log_z[:2], log_z[:1]:
        model.set_log_z(known)
        for method in model.log_ratio, model.posterior, model.energy:
            with pytest.raises(ValueError, match=rf'log Z of {len(known)} classes is known, but .* gives 3 logits'):
                method(cube)
    model.set_log_z(log_z)
    assert model.log_ratio(cube).shape == (256, 3)


def test_log_z_is_a_copy(linear):
    model, _ = linear
    mine = torch.zeros(3, requires_grad=True)
    model.set_log_z(mine)
    assert not model.log_z.requires_grad
    with torch.no_grad():
        mine += 1
    assert model.log_z.tolist() == [0, 0, 0]


def test_nan_logits_are_refused(cube, linear):
    model, _ = linear
    with pytest.raises(ValueError, match='NaN'):
        model.score(cube * float('nan'))
    with pytest.raises(ValueError, match='NaN'):
        model.estimate_log_z([cube, cube * float('nan')], progress=False)
    assert model.log_z is None


def test_batch_norm_without_running_statistics_is_refused(cube):
    """It mixes the images of a batch in eval mode too."""
    for tracked in False, True:
        norm = nn.BatchNorm1d(8, track_running_stats=tracked)
        model = as_generative(nn.Sequential(nn.Flatten(), norm, nn.Linear(8, 3))).eval()
        if tracked:
            assert model.score(cube.float()).shape == (256, 3)
            continue
        with pytest.raises(ValueError, match='without running statistics'):
            model.score(cube.float())


def test_images_the_model_refuses():
    vit = as_generative(timm.create_model('vit_tiny_patch16_224', img_size=32, depth=1)).eval()
    for model, images in ((vit, torch.zeros(1, 3, 48, 48)), (as_generative(lenet()), torch.zeros(1, 3, 28, 28))):
        with pytest.raises(ValueError, match=rf'refuses images of shape \(1, 3, {images.shape[-1]}'):
            model.score(images)
    with pytest.raises(ValueError, match=r'\(32, 32\)|\(28, 28\)'):
        as_generative(lenet()).score(torch.zeros(1, 1, 32, 32))


def test_what_is_not_a_classifier_is_refused():
    with pytest.raises(ValueError, match='not a torch module'):
        as_generative('resnet50')
    with pytest.raises(ValueError, match='compile'):
        as_generative(torch.compile(lenet(), backend='eager'))
    headless = as_generative(timm.create_model('lenet', num_classes=0)).eval()
    with pytest.raises(ValueError, match='no classifier'):
        headless.score(torch.zeros(1, 1, 28, 28))
    with pytest.raises(ValueError, match=r'gives \(1, 1, 28, 28\)'):
        as_generative(nn.Identity()).eval().score(torch.zeros(1, 1, 28, 28))
    with pytest.raises(ValueError, match='no images'):
        as_generative(lenet()).estimate_log_z([], progress=False)


class EnergyBased(nn.Module):
    """A network that is written as an energy, with a normaliser of its own."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(8, 3)
        self.log_z = nn.Parameter(torch.ones(3))

    def energy(self, x):
        return self.log_z - self.body(x.flatten(1))

    def forward(self, x):
        return -self.energy(x)


def test_what_a_model_has_of_its_own_is_not_hidden(cube):
    """Its forward would call the mixin's method of that name, without end."""
    model, images = EnergyBased().eval(), cube.float()
    before = model(images)
    with pytest.raises(ValueError, match='EnergyBased has energy, log_z of its own'):
        as_generative(model)
    assert type(model) is EnergyBased
    assert torch.equal(model(images), before)
    wrapped = as_generative(nn.Sequential(model)).eval()
    wrapped.estimate_log_z([images], progress=False)
    assert torch.equal(wrapped.energy(images, 1), model.energy(images)[:, 1])


def test_fold_needs_an_image_size():
    model = as_generative(nn.Sequential(nn.Flatten(), nn.Linear(8, 3))).eval()
    model.set_log_z(torch.zeros(3))
    with pytest.raises(ValueError, match='estimate_log_z'):
        model.fold_intercepts()
