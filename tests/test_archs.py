"""The paper's networks against the literature, and as timm models."""

import math

import pytest
import timm
import torch
from timm.layers import ConvNormAct
from timm.optim import param_groups_layer_decay
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

import timm_gencnn  # noqa: F401  (registers the architectures)
from timm_gencnn.archs import AlexNet, AlexNetSmall, LeNet, ZFNet

NAMES = ['lenet', 'alexnet', 'zfnet', 'alexnet_small']


@pytest.mark.parametrize(
    ('name', 'parameters'),
    [('lenet', 431_080), ('alexnet', 60_965_224), ('zfnet', 62_357_608), ('alexnet_small', 765_636)],
)
def test_parameter_count_is_that_of_the_literature(name, parameters):
    model = timm.create_model(name, device='meta')
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(
    ('name', 'channels', 'sides'),
    [
        ('lenet', [20, 50, 50], [24, 8, 4]),  # examples/mnist/lenet_train_test.prototxt
        ('alexnet', [96, 256, 384, 384, 256, 256], [55, 27, 13, 13, 13, 6]),  # Krizhevsky et al., Figure 2
        ('zfnet', [96, 256, 384, 384, 256, 256], [110, 26, 13, 13, 13, 6]),  # Zeiler and Fergus, Figure 3
        ('alexnet_small', [48, 128, 160, 160, 128, 128], [32, 16, 8, 8, 8, 4]),  # its own
    ],
)
def test_maps_are_those_of_the_literature(name, channels, sides):
    model = timm.create_model(name, device='meta')
    maps = model.forward_intermediates(
        torch.empty(1, *model.pretrained_cfg['input_size'], device='meta'), intermediates_only=True
    )
    assert [m.shape[1:] for m in maps] == [(c, s, s) for c, s in zip(channels, sides, strict=True)]


@pytest.mark.parametrize(('arch', 'smallest'), [(LeNet, 13), (AlexNet, 39), (ZFNet, 47), (AlexNetSmall, 15)])
def test_first_fully_connected_layer_fits_every_image_size(arch, smallest):
    for height in [*range(smallest, smallest + 30), 64]:
        model = arch(img_size=(height, smallest + 3), num_classes=7, device='meta').eval()
        images = torch.empty(2, model.in_chans, height, smallest + 3, device='meta')
        assert model(images).shape == (2, 7)
    with pytest.raises(ValueError, match=f'img_size .*{smallest - 1}.* too small for {arch.__name__}'):
        arch(img_size=smallest - 1, device='meta')


@pytest.mark.parametrize('name', NAMES)
def test_wrong_image_size_is_an_error_that_names_the_right_one(name):
    model = timm.create_model(name, img_size=64, device='meta')
    with pytest.raises(ValueError, match=r'\(64, 64\)'):
        model(torch.empty(1, model.in_chans, 96, 96, device='meta'))


@pytest.mark.parametrize('name', NAMES)
def test_timm_interface(name):
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=64, num_classes=7, in_chans=2).eval()
    images = torch.randn(2, 2, 64, 64)
    logits = model(images)
    assert logits.shape == (2, 7)
    assert (model.num_classes, model.in_chans) == (7, 2)

    features = model.forward_features(images)
    assert torch.equal(model.forward_head(features), logits)
    hidden = model.forward_head(features, pre_logits=True)
    assert hidden.shape == (2, model.head_hidden_size)
    assert torch.equal(model.get_classifier()(hidden), logits)

    last, maps = model.forward_intermediates(images)
    assert torch.equal(last, features)
    assert len(maps) == len(model.feature_info)
    early = model.forward_intermediates(images, indices=[0, 1], stop_early=True, intermediates_only=True)
    assert len(early) == 2
    assert torch.equal(early[1], maps[1])
    with pytest.raises(ValueError, match='NCHW'):
        model.forward_intermediates(images, output_fmt='NLC')

    net = timm.create_model(name, img_size=64, in_chans=2, features_only=True).eval()
    net.load_state_dict(model.state_dict(), strict=False)
    for out, expected in zip(net(images), maps, strict=False):
        assert torch.equal(out, expected)

    model.reset_classifier(3)
    assert model(images).shape == (2, 3)
    model.reset_classifier(0)
    assert torch.equal(model(images), hidden)
    with pytest.raises(ValueError, match='avg'):
        model.reset_classifier(3, global_pool='avg')
    model.set_grad_checkpointing(False)
    with pytest.raises(ValueError, match='checkpointing'):
        model.set_grad_checkpointing()


@pytest.mark.parametrize('name', NAMES)
def test_cfg_names_the_first_and_last_layer(name):
    model = timm.create_model(name, device='meta')
    cfg = model.pretrained_cfg
    assert model.get_submodule(cfg['first_conv']) is next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    assert model.get_submodule(cfg['classifier']) is model.get_classifier()
    assert cfg['fixed_input_size']
    assert cfg['num_classes'] == model.num_classes
    assert len(cfg['mean']) == len(cfg['std']) == model.in_chans


@pytest.mark.parametrize('name', NAMES)
def test_layer_decay_groups_follow_the_depth(name):
    model = timm.create_model(name, img_size=64)
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scale = {id(p): group['lr_scale'] for group in groups for p in group['params']}
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    scales = [scale[id(m.weight)] for m in layers]
    assert scales == [0.5**depth for depth in reversed(range(len(scales)))]
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [scale[id(m.weight)] for m in norms] == scales[: len(norms)]


def test_lenet_has_caffes_layers_and_weights():
    torch.manual_seed(0)
    model = LeNet()
    kinds = [type(m).__name__ for m in model.children()]
    assert kinds == ['Conv2d', 'MaxPool2d', 'Conv2d', 'MaxPool2d', 'Linear', 'ReLU', 'Dropout', 'Linear']
    for layer, fan_in in [(model.conv1, 25), (model.conv2, 500), (model.fc1, 800), (model.fc2, 500)]:
        bound = math.sqrt(3 / fan_in)
        assert 0.97 * bound < layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(1 / math.sqrt(fan_in), rel=0.1)
        assert not layer.bias.any()


@pytest.mark.parametrize(
    ('arch', 'groups', 'fc_std', 'biases'),
    [
        (AlexNet, [1, 2, 1, 2, 2], 0.005, {'conv2', 'conv4', 'conv5', 'fc6', 'fc7'}),
        (ZFNet, [1, 1, 1, 1, 1], 0.01, set()),
    ],
)
def test_imagenet_networks_have_their_groups_norms_dropout_and_weights(arch, groups, fc_std, biases):
    torch.manual_seed(0)
    model = arch(img_size=64)
    assert [m.groups for m in model.modules() if isinstance(m, nn.Conv2d)] == groups
    norms = [m for m in model.modules() if isinstance(m, nn.LocalResponseNorm)]
    assert [(m.size, m.alpha, m.beta, m.k) for m in norms] == [(5, 1e-4, 0.75, 1.0)] * 2
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.5, 0.5]
    assert model.fc6.weight.std().item() == pytest.approx(fc_std, rel=0.02)
    assert model.conv2.weight.std().item() == pytest.approx(0.01, rel=0.02)
    values = {name: layer.bias.unique().tolist() for name, layer in model.named_children() if hasattr(layer, 'bias')}
    assert values == {name: [1.0 if name in biases else 0.0] for name in values}


def test_small_alexnet_has_its_groups_norms_and_weights():
    torch.manual_seed(0)
    model = AlexNetSmall()
    assert [m.groups for m in model.modules() if isinstance(m, nn.Conv2d)] == [1, 2, 1, 2, 2]
    assert [m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d)] == [48, 128, 160, 160, 128]
    for layer in [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]:
        gain = 1 if layer is model.fc8 else 2
        assert layer.weight.var().item() == pytest.approx(gain / layer.weight[0].numel(), rel=0.1)
        assert not layer.bias.any()
    model.bn1.weight.data.fill_(5)
    model.bn1.running_mean.fill_(5)
    model.init_weights()
    assert model.bn1.weight.unique() == 1
    assert not model.bn1.running_mean.any()


@pytest.mark.parametrize('name', NAMES)
def test_compiles_without_graph_breaks(name):
    model = timm.create_model(name, img_size=64).eval()
    images = torch.randn(1, model.in_chans, 64, 64)
    compiled = torch.compile(model, backend='eager', fullgraph=True)
    assert torch.equal(compiled(images), model(images))


@pytest.mark.parametrize(
    ('name', 'widths', 'stride', 'parameters'),
    [
        ('resnet11_w64', (32, 64, 192, 192), 1, 1_867_178),
        ('resnet10_w16', (16, 32, 64, 128), 1, 308_826),
        ('resnet10_w32', (32, 64, 128, 256), 1, 1_228_970),
        ('resnet10_w16_s2', (16, 32, 64, 128), 2, 308_826 + 90 * 129),
        ('resnet10_w32_s2', (32, 64, 128, 256), 2, 1_228_970 + 90 * 257),
    ],
)
def test_small_resnets(name, widths, stride, parameters):
    model = timm.create_model(name).eval()
    assert sum(p.numel() for p in model.parameters()) == parameters
    images = torch.randn(2, 3, 32 * stride, 32 * stride)
    sides = [32, 16, 8, 4]
    maps = model.forward_intermediates(images, intermediates_only=True)[-4:]
    assert [m.shape[1:] for m in maps] == [(c, s, s) for c, s in zip(widths, sides, strict=True)]
    net = timm.create_model(name, features_only=True)
    assert [f.shape[-1] for f in net(images)] == sides
    assert net.feature_info.reduction() == [32 * stride // s for s in sides]
    dilated = timm.create_model(name, features_only=True, output_stride=4 * stride)
    assert [f.shape[-1] for f in dilated(images)] == [32, 16, 8, 8]
    assert dilated.feature_info.reduction() == [stride, 2 * stride, 4 * stride, 4 * stride]
    cfg = model.pretrained_cfg
    assert cfg['input_size'] == (3, 32 * stride, 32 * stride)
    assert cfg['num_classes'] == model.num_classes
    assert model.get_submodule(cfg['first_conv']) is next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    assert model.get_submodule(cfg['classifier']) is model.get_classifier()


def test_the_pooling_resnet_takes_what_its_siblings_take():
    model = timm.create_model('resnet11_w64', act_layer='relu', drop_path_rate=0.3)
    assert sum(isinstance(m, nn.ReLU) for m in model.modules()) == 10
    assert [stage[0].drop_path.drop_prob for stage in model.stages[1:]] == pytest.approx([0.15, 0.3])


def test_mirrored_logits_are_the_mean_over_mirror_images():
    torch.manual_seed(0)
    plain, mirrored = (timm.create_model('resnet11_w64', mirror=mirror).eval() for mirror in (False, True))
    mirrored.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(mirrored(x), (plain(x) + plain(x.flip(3))) / 2)
    torch.testing.assert_close(mirrored(x), mirrored(x.flip(3)))
    assert not torch.allclose(plain(x), plain(x.flip(3)), atol=1e-3)  # control
    mirrored.reset_classifier(0, '')
    assert torch.equal(mirrored(x), mirrored.forward_features(x))  # a map is that of the image as it stands
    mirrored.reset_classifier(10, 'avg')
    mirrored.load_state_dict(plain.state_dict())
    assert torch.equal(mirrored.train()(x), plain.train()(x))  # training flips its images itself
    assert timm.create_model('resnet11_w64').mirror
    assert not timm.create_model('resnet10_w16').mirror


def test_a_pooling_block_is_its_formula():
    torch.manual_seed(0)
    block = timm.create_model('resnet11_w64').eval().stages[1][0]
    layers = [m for m in block.residual.modules() if isinstance(m, ConvNormAct)]
    assert len(layers) == 2
    for norm in (block.norm_act, *(layer.bn for layer in layers)):
        norm.running_mean.normal_()
        norm.weight.data.uniform_(-1, 1)  # a negative factor tells pooling before the norm from pooling after it
    x = torch.randn(2, 64, 16, 16)
    pooled = nn.functional.max_pool2d(block.conv(x), 2)
    branch = act = nn.functional.gelu(nn.functional.batch_norm(pooled, *_statistics(block.norm_act)))
    for layer in layers:
        branch = nn.functional.gelu(nn.functional.batch_norm(layer.conv(branch), *_statistics(layer.bn)))
    torch.testing.assert_close(block(x), act + branch)


def _statistics(norm: nn.BatchNorm2d) -> tuple[torch.Tensor, ...]:
    return norm.running_mean, norm.running_var, norm.weight, norm.bias


@pytest.mark.parametrize('name', [*NAMES, 'gencnn_lenet'])
def test_networks_can_be_scripted_and_traced(name):
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=64).eval()
    images, tap = torch.randn(2, model.in_chans, 64, 64), model.feature_info[1]['module']
    with torch.no_grad():
        maps = create_feature_extractor(model, [tap])(images)[tap]
        assert torch.equal(maps, model.forward_intermediates(images, indices=[1], intermediates_only=True)[0])
    shared = nn.Tanh()  # one module in several places, which a list of distinct children has once
    for layer, module in list(model.named_children()):
        if isinstance(module, nn.ReLU):
            setattr(model, layer, shared)
    wrong = torch.randn(1, model.in_chans, 96, 96)
    for form in torch.jit.script(model), torch.fx.symbolic_trace(model):
        with torch.no_grad():
            assert torch.equal(form(images), model(images))
        with pytest.raises(Exception, match=r'give images of \(64, 64\) pixels'):  # a script has errors of its own
            form(wrong)
