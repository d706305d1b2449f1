import argparse
import copy
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from timm_gencnn import layouts, node_lists, probes
from timm_gencnn.cli import main as cli
from timm_gencnn.node_lists import NodeInfo, expand, list_nodes
from timm_gencnn.nodes import receptive_field, resolve
from timm_gencnn.scores import ScoreFunction

SHARED = Path(__file__).parents[2] / 'shared'
SIZE = (16, 16)

# One small model of every module of timm, whatever its layout; FAST are run by default.
FAST = """
    test_byobnet test_coatnet test_convnext test_efficientnet test_mambaout test_nfnet test_resnet test_vit
    test_vit_relpos crossvit_tiny_240 eva02_tiny_patch14_224 gmlp_ti16_224 levit_128s mobilevit_xxs
    swin_tiny_patch4_window7_224
""".split()  # noqa: SIM905
SMALL = """
    beit_base_patch16_224 cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32 cpubone_nano crossvit_tiny_240
    cs3darknet_focus_s csatv2 cspnext_tiny davit_tiny deepseek_vit_412m deit_tiny_patch16_224 densenet121 dla46x_c
    dpn48b edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientvim_m1 efficientvit_b0 efficientvit_m0
    ese_vovnet19b_slim_dw eva02_tiny_patch14_224 fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny
    gemma4_vit_167m ghostnet_050 gmlp_ti16_224 halonet_h1 hardcorenas_b hgnetv2_b0 hiera_tiny_224 hrnet_w18_small
    iformer_t inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small legacy_seresnet18
    legacy_xception levit_128s lowformer_b0 mobilenetv3_small_050 mobilenetv5_base mobilevit_xxs mvitv2_tiny
    naflexvit_base_patch16_parfac_gap nasnetalarge nest_tiny nextvit_small pit_ti_224 pnasnet5large poolformerv2_s12
    pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetx_002 repghostnet_050 repvit_m1 res2next50 resnest14d resnetv2_18
    rexnet_100 sam2_hiera_tiny samvit_base_patch16_224 selecsls42 sequencer2d_s shvit_s1 skresnet18 starnet_s050
    swiftformer_xs swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 swinv2_tiny_window8_256 test_byobnet test_coatnet
    test_convnext test_efficientnet test_mambaout test_nfnet test_resnet test_vit test_vit_relpos tiny_vit_5m_224
    tnt_s_legacy_patch16_224 tresnet_m twins_svt_small vgg11 visformer_tiny vit_tiny_r_s16_p8_224 vitamin_small_224
    volo_d1_224 xception41p xcit_nano_12_p8_224
""".split()  # noqa: SIM905

# Image sides where a model's own is needlessly slow here.
SIDES = {
    **dict.fromkeys(['inception_v3', 'inception_v4', 'inception_resnet_v2', 'legacy_xception', 'xception41p'], 128),
    **dict.fromkeys(['csatv2', 'nasnetalarge', 'pnasnet5large', 'sam2_hiera_tiny', 'convmixer_768_32'], 128),
    **dict.fromkeys(['gemma4_vit_167m', 'qwen3_vit_88m', 'naflexvit_base_patch16_parfac_gap'], 96),
    'deepseek_vit_412m': 112,
}


class Zoo(nn.Module):
    """Every layout in one network, with H = W = C = 8 so that no shape tells the axes apart."""

    def __init__(self, in_chans: int = 3):
        super().__init__()
        self.conv = nn.Conv2d(in_chans, 8, 3, stride=2, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 8), nn.GELU())
        self.nhwc = nn.Identity()
        self.nchw = nn.Identity()
        self.window = nn.Linear(8, 8)
        self.tokens = nn.Identity()
        self.pair = Pair()
        self.mixer = nn.Linear(64, 64)
        self.mixed = nn.Identity()
        self.soft = nn.Softmax(-1)
        self.twice = nn.Identity()
        self.sequence = nn.Identity()
        self.batch_mean = nn.Identity()
        self.gate = nn.Sequential(nn.Linear(8, 2), nn.ReLU(), nn.Linear(2, 1), nn.Sigmoid())
        self.unused = nn.Linear(8, 8)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        n = len(x)
        x = self.relu(self.conv(x))
        x = self.nhwc(self.mlp(self.norm(x.permute(0, 2, 3, 1))))
        self.nchw(x.permute(0, 3, 1, 2))
        x = self.window(x.reshape(n * 2, 32, 8))
        x = self.tokens(x.reshape(n, 64, 8))
        self.pair(x)
        self.mixed(self.mixer(x.transpose(1, 2)).transpose(1, 2))
        self.gate(x)
        self.sequence(x.transpose(0, 1))
        self.batch_mean(x - x.mean(0))
        self.soft(x @ x.transpose(1, 2))
        x = self.twice(x)
        x = self.twice(2 * x)
        return self.head(x.mean(1))


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


@pytest.fixture
def zoo() -> nn.Module:
    torch.manual_seed(0)
    return Zoo().eval()


def images(n: int = 4, chans: int = 3, size: tuple[int, int] = SIZE) -> Tensor:
    return torch.randn(n, chans, *size, generator=torch.Generator().manual_seed(1))


def capture(model: nn.Module, layer: str, x: Tensor, *, before: bool = False, call: int = 0) -> Tensor:
    """A layer's output (or input) by a hook of the test's own; a clone, as a later layer may work in place."""
    seen: list[Tensor] = []
    module = model.get_submodule(layer)
    if before:
        handle = module.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    else:
        handle = module.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    with torch.no_grad():
        model(x)
    handle.remove()
    return seen[call]


def layers_of(score: ScoreFunction) -> list[set[str]]:
    """The layers that each node reads; '' is the model's output."""
    return [{term.tap.layer for term in node.terms} for node in score.nodes]


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# ---------------------------------------------------------------------------------------------------------------------
# Layouts with known answers


@pytest.mark.parametrize(
    ('node', 'layer', 'select'),
    [
        ('conv:3', 'conv', lambda t: t[:, 3].mean((1, 2))),
        ('conv:3@2,5', 'conv', lambda t: t[:, 3, 2, 5]),
        ('norm:3', 'norm', lambda t: t[..., 3].mean((1, 2))),
        ('mlp.0:3', 'mlp.0', lambda t: t[..., 3].mean((1, 2))),
        ('nhwc:3@2,5', 'nhwc', lambda t: t[:, 2, 5, 3]),
        ('nchw:3', 'nchw', lambda t: t[:, 3].mean((1, 2))),
        ('nchw:3@2,5', 'nchw', lambda t: t[:, 3, 2, 5]),
        ('tokens:3', 'tokens', lambda t: t[..., 3].mean(1)),
        ('tokens:3@40', 'tokens', lambda t: t[:, 40, 3]),
        ('window:3', 'window', lambda t: t[..., 3].reshape(-1, 64).mean(1)),
        ('window:3@1,30', 'window', lambda t: t.reshape(-1, 2, 32, 8)[:, 1, 30, 3]),
        ('mixed:axis2=3', 'mixed', lambda t: t[..., 3].mean(1)),
        ('mixed:axis1=3@7', 'mixed', lambda t: t[:, 3, 7]),
        ('head:3', 'head', lambda t: t[:, 3]),
        (3, 'head', lambda t: t[:, 3]),
        ('3', 'head', lambda t: t[:, 3]),
    ],
)
def test_score_is_the_activation(zoo, node, layer, select):
    x = images()
    score = resolve(zoo, node, size=SIZE)
    assert score(x).dtype == torch.float32
    torch.testing.assert_close(score(x), select(capture(zoo, layer, x)), rtol=1e-5, atol=1e-6)


def test_activations_are_read_before_they_act_even_in_place(zoo):
    x = images()
    for layer, select in (('relu', lambda t: t[:, 3].mean((1, 2))), ('mlp.1', lambda t: t[..., 3].mean((1, 2)))):
        score = resolve(zoo, f'{layer}:3', size=SIZE)
        torch.testing.assert_close(score(x), select(capture(zoo, layer, x, before=True)), rtol=1e-5, atol=1e-6)
        assert score.nodes[0].note == 'read before the activation'
    # The convolution's own output is what the ReLU overwrites.
    torch.testing.assert_close(resolve(zoo, 'conv:3', size=SIZE)(x), resolve(zoo, 'relu:3', size=SIZE)(x))
    assert resolve(zoo, 'conv:3', size=SIZE)(x).lt(0).any()


def test_fused_norm_and_activation_is_read_before_the_activation():
    model = timm.create_model('test_byobnet').eval()
    layer = next(name for name, m in model.named_modules() if isinstance(m, timm.layers.BatchNormAct2d))
    bn = model.get_submodule(layer)
    x = images(2, size=(64, 64))
    expected = nn.functional.batch_norm(
        capture(model, layer, x, before=True), bn.running_mean, bn.running_var, eps=bn.eps
    )
    torch.testing.assert_close(resolve(model, f'{layer}:3', size=(64, 64))(x), expected[:, 3].mean((1, 2)))
    assert isinstance(bn.act, nn.ReLU)  # else the test says nothing


class Block(nn.Module):
    """Two convolutions and one ReLU that serves both: the layers of torchvision's residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(self.relu(self.conv1(x)))
        out += x
        return self.relu(out)


class Branches(nn.Module):
    """What activations put out, side by side, with what none did between: as in Inception and SqueezeNet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 6, 1)
        self.one = nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU(inplace=True))
        self.two = nn.Sequential(nn.Conv2d(8, 5, 1), nn.BatchNorm2d(5), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), torch.cat([self.conv(x), self.two(x)], 1)], 1)


class Net(nn.Module):
    """A stem and whatever layers follow it."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.stem, self.layers = nn.Conv2d(3, 8, 1), nn.Sequential(*layers)
        self.head = nn.Linear(1, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.stem(x)).mean((1, 2, 3))[:, None])


def test_blocks_that_return_an_activation_are_read_before_it():
    torch.manual_seed(0)
    model, x = Net(Block(), Block()).eval(), images()
    for node, layer, call in (('layers', 'layers.1.relu', 1), ('layers.0', 'layers.0.relu', 1)):
        score = resolve(model, f'{node}:3', size=SIZE)
        before = capture(model, layer, x, before=True, call=call)
        torch.testing.assert_close(score(x), before[:, 3].mean((1, 2)))
        assert before[:, 3].lt(0).any()  # else the ReLU does nothing
        assert (score.names, score.nodes[0].note) == ([f'{node}:3'], 'read before the activation')
    first = resolve(model, 'layers.0.relu#1:3', size=SIZE)
    torch.testing.assert_close(first(x), capture(model, 'layers.0.relu', x, before=True)[:, 3].mean((1, 2)))
    place = resolve(model, 'layers:3@2,5', size=SIZE)
    torch.testing.assert_close(place(x), capture(model, 'layers.1.relu', x, before=True, call=1)[:, 3, 2, 5])


def test_activations_side_by_side_are_read_before_them():
    torch.manual_seed(0)
    model, x = Net(Branches()).eval(), images()
    whole = capture(model, 'layers.0', x)
    parts = [capture(model, 'layers.0.' + name, x) for name in ('one.0', 'conv', 'two.1')]
    for channel, (layer, own) in enumerate((k, c) for k, part in enumerate(parts) for c in range(part.shape[1])):
        score = resolve(model, f'layers.0:{channel}', size=SIZE)
        torch.testing.assert_close(score(x), parts[layer][:, own].mean((1, 2)))
        assert torch.allclose(score(x), whole[:, channel].mean((1, 2))) == (layer == 1)
    with pytest.raises(ValueError, match=r'channel 15 is out of range.* 0 to 14'):
        resolve(model, 'layers.0:15', size=SIZE)


@pytest.mark.parametrize(
    'layer',
    [
        nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 1)),
        nn.Sequential(nn.ReLU(), nn.ChannelShuffle(2)),
    ],
)
def test_what_comes_after_an_activation_is_read_as_it_is(layer):
    torch.manual_seed(0)
    model, x = Net(layer).eval(), images()
    score = resolve(model, 'layers.0:3', size=SIZE)
    torch.testing.assert_close(score(x), capture(model, 'layers.0', x)[:, 3].mean((1, 2)))
    assert not score.nodes[0].note


def test_a_sum_with_an_activation_is_no_activation():
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gelu = nn.GELU()

        def forward(self, x: Tensor) -> Tensor:
            out = self.gelu(x)
            out += x  # the same tensor, and the same gradient, but other values
            return out

    torch.manual_seed(0)
    model, x = Net(Sum()).eval(), images()
    score = resolve(model, 'layers.0:3', size=SIZE)
    torch.testing.assert_close(score(x), capture(model, 'layers.0', x)[:, 3].mean((1, 2)))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(score(x), capture(model, 'layers.0.gelu', x, before=True)[:, 3].mean((1, 2)))


def test_calls_of_a_shared_module(zoo):
    with pytest.raises(ValueError, match=r"runs 2 times.*'twice#1:3' to 'twice#2:3'"):
        resolve(zoo, 'twice:3', size=SIZE)
    first, second = resolve(zoo, 'twice#1:3', size=SIZE), resolve(zoo, 'twice#2:3', size=SIZE)
    torch.testing.assert_close(second(images()), 2 * first(images()))
    with pytest.raises(ValueError, match='calls #1 to #2'):
        resolve(zoo, 'twice#3:3', size=SIZE)


@pytest.mark.parametrize('chans', [1, 3, 4])
def test_input_channels_are_found(chans):
    model = Zoo(chans).eval()
    score = resolve(model, 'conv:0', size=SIZE)
    assert score.in_chans == chans
    assert score(images(2, chans)).shape == (2,)
    model = timm.create_model('test_vit', in_chans=chans).eval()
    assert resolve(model, 0).in_chans == chans


# ---------------------------------------------------------------------------------------------------------------------
# Groups, sums, callables


def test_groups_of_images_are_scored_by_their_own_node(zoo):
    def brightness(x: Tensor) -> Tensor:
        return x.mean((1, 2, 3))

    members = [3, 'conv:2', 'window:1@0,3', brightness, {3: 2.0, 'norm:1': -0.5}, '3 - 0.25*tokens:1@2', 'conv:2@1,1']
    x = images(2 * len(members))
    together = resolve(zoo, members, size=SIZE)(x)
    alone = [resolve(zoo, member, size=SIZE)(x[2 * i : 2 * i + 2]) for i, member in enumerate(members)]
    torch.testing.assert_close(together, torch.cat(alone))


def test_weighted_sums(zoo):
    x = images()
    a, b = resolve(zoo, 3, size=SIZE)(x), resolve(zoo, 'conv:2', size=SIZE)(x)
    for node in ({3: 1.0, 'conv:2': -0.5}, '3 - 0.5*conv:2', '-0.5 * conv:2 + 3', {'3 - 0.5*conv:2': 1}):
        score = resolve(zoo, node, size=SIZE)
        assert score.nodes[0].kind == 'sum'
        torch.testing.assert_close(score(x), a - 0.5 * b)
    torch.testing.assert_close(resolve(zoo, '-2e-1*3', size=SIZE)(x), -0.2 * a)
    torch.testing.assert_close(resolve(zoo, '-conv:2', size=SIZE)(x), -b)
    torch.testing.assert_close(resolve(zoo, '3 + - conv:2', size=SIZE)(x), a - b)


@pytest.mark.parametrize('node', [5, 'conv:2@1,3', '3 + 0.5*conv:2', '-0.1*3 - conv:2', 'twice#2:1', 'mixed:axis1=3@7'])
def test_names_resolve_to_themselves(zoo, node):
    score = resolve(zoo, node, size=SIZE)
    again = resolve(zoo, score.names, size=SIZE)
    assert again.names == score.names
    torch.testing.assert_close(score(images()), again(images()))


@pytest.mark.parametrize('weight', [1e16, 2.5e22, -1e16, 1e-7])
def test_large_weights_are_read_back(zoo, weight):
    score = resolve(zoo, {3: weight, 'conv:2': -weight}, size=SIZE)
    again = resolve(zoo, score.names, size=SIZE)
    assert again.names == score.names
    assert torch.equal(score(images()), again(images()))
    assert resolve(zoo, '1e+3*3 + 2', size=SIZE).names == ['1000.0*3 + 2']


def test_names_with_signs():
    torch.manual_seed(0)
    model = nn.Sequential()
    for name, module in {'conv+bn': nn.Conv2d(3, 4, 3), 'x - y': nn.Conv2d(4, 4, 3), 'x': nn.Flatten()}.items():
        model.add_module(name, module)
    model.add_module('head', nn.Linear(4 * 12 * 12, 4))
    labels = ['rock + roll', 'jazz', 'Hip - Hop', 'hip jazz']
    model.eval().pretrained_cfg = {'input_size': (3, 16, 16), 'label_names': labels}
    x = images()
    alone = {node: resolve(model, node)(x) for node in ('conv+bn:1', 'x - y:2', 'jazz', 0, 2)}
    for node, name, expected in (
        ('conv+bn:1', 'conv+bn:1', alone['conv+bn:1']),
        ('Rock + Roll', '0 rock + roll', alone[0]),
        ('hip - hop', '2 Hip - Hop', alone[2]),
        ('hip - hop - jazz', '2 Hip - Hop - 1 jazz', alone[2] - alone['jazz']),
        ('0.5*x - y:2 + jazz', '0.5*x - y:2 + 1 jazz', 0.5 * alone['x - y:2'] + alone['jazz']),
        ('jazz + rock + roll', '1 jazz + 0 rock + roll', alone['jazz'] + alone[0]),
        ({0: -2, 'conv+bn:1': 3}, '-2.0*0 rock + roll + 3.0*conv+bn:1', 3 * alone['conv+bn:1'] - 2 * alone[0]),
    ):
        score = resolve(model, node)
        assert score.names == [name]
        assert resolve(model, name).names == [name]
        torch.testing.assert_close(score(x), expected)
    with pytest.raises(ValueError, match="unknown class 'hip'"):  # a difference, not the class 'hip jazz'
        resolve(model, 'hip - jazz')


def test_kinds_and_layers(zoo):
    score = resolve(zoo, [1, 'conv:2', lambda x: x.mean((1, 2, 3)), '1 - 0.5*2', '1 + conv:2'], size=SIZE)
    assert score.names == ['1', 'conv:2', '<lambda>', '1 - 0.5*2', '1 + conv:2']
    assert [node.kind for node in score.nodes] == ['class', 'layer', 'callable', 'class', 'sum']
    assert layers_of(score) == [{''}, {'conv'}, set(), {''}, {'', 'conv'}]


# ---------------------------------------------------------------------------------------------------------------------
# Names


@pytest.fixture(scope='module')
def resnet() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model('resnet18').eval()


@pytest.mark.parametrize(
    ('node', 'name'),
    [
        ('goldfish', '1 goldfish'),
        ('Goldfish', '1 goldfish'),
        ('Carassius auratus', '1 goldfish'),
        ('goldfish, Carassius auratus', '1 goldfish'),
        ('n01443537', '1 goldfish'),
        ('great_white_shark', '2 great white shark'),
        ('black and tan coonhound', '165 black-and-tan coonhound'),
        ('1 goldfish', '1 goldfish'),
        (207, '207 golden retriever'),
        ('layer3_1_conv2:17', 'layer3.1.conv2:17'),
        ('layer3.1.conv2:17@3, 2', 'layer3.1.conv2:17@3,2'),
        ('207 + 0.5*layer3.1.conv2:17', '207 golden retriever + 0.5*layer3.1.conv2:17'),
        ('-goldfish', '-1.0*1 goldfish'),
        ('- goldfish + tench', '-1.0*1 goldfish + 0 tench'),
        ('tench + -goldfish', '0 tench - 1 goldfish'),
    ],
)
def test_canonical_names(resnet, node, name):
    assert resolve(resnet, node, size=(64, 64)).names == [name]


def test_class_names_with_colons():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3)).eval()
    model.pretrained_cfg = {'input_size': (3, 16, 16), 'label_names': ['car: red', 'a + b:2', '1:2']}
    for node, name in (
        ('Car: red', '0 car: red'),
        ('a + b:2', '1 a + b:2'),
        ('0.5*a + b:2 - car: red', '0.5*1 a + b:2 - 0 car: red'),
        ('1:2', '1:2'),  # of the layer, which comes first
    ):
        assert resolve(model, node).names == [name]
        assert resolve(model, name).names == [name]
    with pytest.raises(ValueError, match=r"'car: blue' is no node"):
        resolve(model, 'car: blue')


def test_labels_of_the_model_come_first():
    model = timm.create_model('test_resnet', num_classes=3).eval()
    with pytest.raises(ValueError, match='no class names, give an index from 0 to 2'):
        resolve(model, 'cat', size=(64, 64))
    model.pretrained_cfg = {**model.pretrained_cfg, 'label_names': ['a1', 'a2', 'a3']}
    model.pretrained_cfg['label_descriptions'] = {'a1': 'cat, tom', 'a2': 'dog', 'a3': 'tom'}
    assert resolve(model, ['cat', 'a2'], size=(64, 64)).names == ['0 cat', '1 dog']
    with pytest.raises(ValueError, match=r'ambiguous.*0 \(cat, tom\), 2 \(tom\)'):
        resolve(model, 'tom', size=(64, 64))


@pytest.mark.parametrize(
    ('node', 'message'),
    [
        ('crane', r"'crane' is ambiguous, give the index: 134 \(crane\), 517 \(crane\)"),
        ('goldfsh', "unknown class 'goldfsh': near names are goldfish"),
        ('2*-goldfish', "unknown class '-goldfish': near names are goldfish"),
        ('great white -shark', "unknown class 'great white -shark'"),
        ('layer3.1.conv9:1', 'unknown layer .*near names are layer3.1.conv2'),
        ('conv2:1', 'unknown layer'),
        ('layer3:256', 'channel 256 is out of range, .* 0 to 255'),
        ('layer3:1@4,0', 'position 4,0 is out of range, .* 4 x 4'),
        ('layer3:1@1', 'position 1 is out of range, .* 4 x 4'),
        ('layer3:1@,', "a position is '@row,col' or '@token'"),
        ('fc:1@0', 'positions none'),
        ('layer3', "'layer3' is a layer: name one of its channels, such as 'layer3:0'"),
        ('layer3:x', 'is no node'),
        ('layer3:-1', 'is no node'),
        (1000, 'class 1000 is out of range: the model has classes 0 to 999'),
        (-1, 'class -1 is out of range'),
        ('-1', 'class -1 is out of range'),
        (True, 'True is no node'),
        (1.5, '1.5 is no node'),
        (None, 'None is no node'),
        ('', 'empty string'),
        ([], 'empty list'),
        ({}, 'empty dictionary'),
        ([[1]], r'\[1\] is no node'),
        ({1: float('nan')}, 'weight nan .* not a finite number'),
        ({1: 'a'}, "weight 'a' .* not a finite number"),
        ({1: None}, 'weight None of node 1 is not a finite number'),
        ({1: 1j}, 'weight 1j of node 1 is not a finite number'),
        ({1: torch.ones(2)}, r'weight tensor\(\[1., 1.\]\) of node 1 is not a finite number'),
        ({1: 10**400}, 'of node 1 is not a finite number'),
        ('layer3:axis4=1', 'axis 4 is out of range'),
    ],
)
def test_bad_nodes(resnet, node, message):
    with pytest.raises(ValueError, match=message):
        resolve(resnet, node, size=(64, 64))
    assert hooks(resnet) == 0


@pytest.mark.parametrize(
    ('node', 'message'),
    [
        ('mixed:3', "does not tell which axis holds the channels, name it as 'mixed:axis1=17'"),
        ('soft:3', 'does not tell which axis'),
        ('gate:0', 'does not tell which axis'),  # [N, 64, 1]: the 64 are tokens
        ('sequence:axis2=3', 'depends on another image'),
        ('sequence:3', 'depends on another image'),
        ('batch_mean:3', 'depends on another image'),
        ('pair:3', 'returns a tuple, not one tensor: name a layer inside it'),
        ('unused:3', 'does not run in a forward pass'),
        (lambda x: x.mean(), r'returns \[\] for 2 images'),
        (lambda x: [1.0], 'returns list for 2 images'),
        (lambda x: x.mean((1, 2, 3)) * float('nan'), 'is not finite'),
        (lambda x: x.mean((1, 2, 3)).detach(), 'no gradient'),
        (lambda x: x.mean((1, 2, 3)) - x.mean(), 'depends on another image'),
    ],
)
def test_what_cannot_be_read_is_an_error(zoo, node, message):
    with pytest.raises(ValueError, match=message):
        resolve(zoo, node, size=SIZE)


def test_a_layer_in_place_of_its_name(zoo):
    with pytest.raises(ValueError, match=r"the layer 'mlp\.0' itself is no node: .* such as 'mlp\.0:0'"):
        resolve(zoo, [3, zoo.mlp[0]], size=SIZE)
    judge = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 1), nn.Flatten(0)).eval()
    assert resolve(zoo, judge, size=SIZE).nodes[0].kind == 'callable'  # a module of one's own


def test_ambiguous_underscores():
    model = nn.Sequential()
    model.add_module('a_b', nn.Conv2d(3, 4, 1))
    model.add_module('a', nn.Sequential())
    model.a.add_module('b', nn.Conv2d(4, 4, 1))
    model.eval()
    assert resolve(model, 'a_b:1', size=SIZE).names == ['a_b:1']
    model.a.add_module('b_c', nn.Conv2d(4, 4, 1))
    model.add_module('a_b_c', nn.Conv2d(4, 4, 1))
    with pytest.raises(ValueError, match=r'ambiguous: a\.b_c|unknown layer'):
        resolve(model.eval(), 'a.b.c:1', size=SIZE)


# ---------------------------------------------------------------------------------------------------------------------
# Models of all kinds


class Wrapped(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.body, self.wrap = nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), wrap

    def forward(self, x: Tensor):
        return self.wrap(self.body(x))


@pytest.mark.parametrize(
    'wrap',
    [
        lambda t: {'logits': t, 'features': t.sum()},
        lambda t: {'out': t},
        lambda t: (t, t * 2),
        lambda t: torch.return_types.max((t, t)),
    ],
)
def test_wrapped_logits(wrap):
    model = Wrapped(wrap).eval()
    torch.testing.assert_close(resolve(model, 4, size=SIZE)(images()), model.body(images())[:, 4])


@pytest.mark.parametrize(
    ('wrap', 'message'),
    [
        (lambda t: {'features': t}, r"keys \['features'\], not class logits"),
        (lambda t: [t, t], 'a list, not class logits'),
        (lambda t: 'text', 'a str, not class logits'),
        (lambda t: t.sum(1), 'one number for each image, .* give a callable as the node, such as the model itself'),
        (lambda t: t.sum(), 'no batch on the first axis'),
        (lambda t: t * float('nan'), 'is not finite'),
        (lambda t: t.detach(), 'no gradient'),
    ],
)
def test_no_logits(wrap, message):
    with pytest.raises(ValueError, match=message):
        resolve(Wrapped(wrap).eval(), 4, size=SIZE)
    assert resolve(Wrapped(wrap).eval(), 'body.0:2', size=SIZE)(images()).shape == (4,)  # a layer still works


def test_one_number_for_each_image_is_a_callable():
    model = Wrapped(lambda t: t.sum(1)).eval()
    torch.testing.assert_close(resolve(model, model, size=SIZE)(images()), model(images()))


def test_class_map_is_averaged():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)).eval()
    torch.testing.assert_close(resolve(model, 4, size=SIZE)(images()), model(images())[:, 4].mean((1, 2)))


def test_rectified_and_softmax_classes_are_read_before_the_activation():
    body = nn.Conv2d(3, 6, 3)
    pooled = nn.Sequential(body, nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    score = resolve(pooled, 2, size=SIZE)
    torch.testing.assert_close(score(images()), body(images())[:, 2].mean((1, 2)))
    assert layers_of(score) == [{'1'}]
    assert score.nodes[0].note == "class logit read before the activation '1'"
    soft = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 5), nn.Softmax(1)).eval()
    torch.testing.assert_close(resolve(soft, 2, size=SIZE)(images()), soft[:2](images())[:, 2])
    plain = nn.Sequential(body, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 6)).eval()
    assert layers_of(resolve(plain, 2, size=SIZE)) == [{''}]


def test_no_classifier():
    model = timm.create_model('test_resnet', num_classes=0).eval()
    with pytest.raises(ValueError, match='no classifier'):
        resolve(model, 0)


def test_train_mode_is_refused(zoo):
    zoo.mlp.train()
    with pytest.raises(ValueError, match=r'mlp is in train mode.*model\.eval\(\)'):
        resolve(zoo, 3, size=SIZE)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16])
def test_models_of_any_floating_type(zoo, dtype):
    nodes_ = [3, 'tokens:3', lambda x: x[:, 0, 0, 0]]
    x = images(3)
    expected = resolve(zoo, nodes_, size=SIZE)(x)
    score = resolve(zoo.to(dtype), nodes_, size=SIZE)(x)
    assert score.dtype == torch.float32
    torch.testing.assert_close(score, expected, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_axes_of_half_precision_networks_are_those_of_single_precision(dtype):
    """The gradient of the stem's last weight, summed over its entries, is beyond float16."""
    torch.manual_seed(0)
    model = timm.create_model('test_resnet').eval()
    expected = list_nodes(model, 'conv1*')
    assert list_nodes(model.to(dtype), 'conv1*') == expected


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sub_(0.5)


def test_callables_see_the_images_that_a_model_changes_in_place(zoo):
    x = images(2)
    score = resolve(nn.Sequential(Centred(), zoo).eval(), ['1.conv:3', lambda x: x[:, 0, 0, 0]], size=SIZE)
    assert score(x.clone())[1] == x[1, 0, 0, 0]


@pytest.mark.filterwarnings('ignore:`torch.jit')
@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda model: model.to('meta'), r'no weights \(its device is meta\): load them first'),
        (
            lambda model: torch.jit.trace(model.conv, images()),
            'TorchScript module takes no hooks: give the Python module',
        ),
        (lambda model: nn.DataParallel(model).eval(), r'DataParallel .*: give the module inside, model\.module'),
        (torch.inference_mode()(lambda model: model.double()), r'made under torch\.inference_mode .*: make, move'),
    ],
)
def test_modules_that_cannot_be_probed(zoo, change, message):
    with pytest.raises(ValueError, match=message):
        resolve(change(zoo), 'conv:3', size=SIZE)


@pytest.mark.parametrize('in_place', [False, True])
def test_layers_of_compiled_models(in_place):
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 14 * 14, 2)).eval()
    if in_place:
        model = copy.deepcopy(plain)
        model.compile(backend='eager')
    else:
        model = torch.compile(plain, backend='eager')
    torch.testing.assert_close(resolve(model, 1, size=SIZE)(images()), plain(images())[:, 1])
    with pytest.raises(ValueError, match=r'a compiled model does not tell .* model\._orig_mod .* copy\.deepcopy'):
        resolve(model, '0:1' if in_place else '_orig_mod.0:1', size=SIZE)(images())
    remedy = copy.deepcopy(model) if in_place else model._orig_mod
    torch.testing.assert_close(resolve(remedy, '0:1', size=SIZE)(images()), plain[0](images())[:, 1].mean((1, 2)))


def test_refused_sizes(zoo):
    with pytest.raises(ValueError, match=r'refuses 20 x 20 images of 3 channel.*: give size=.* or state') as caught:
        resolve(zoo, 3, size=(20, 20))
    assert 'own size' not in str(caught.value)  # nothing states one
    vit = timm.create_model('test_vit').eval()
    with pytest.raises(ValueError, match=r'refuses 100 x 100 .*own size is 160 x 160'):
        resolve(vit, 3, size=(100, 100))
    for size in ((0, 4), (4,), 'big', (4.0, 4.0), 4.0, (4, 4, 4), [-4, 4]):
        with pytest.raises(ValueError, match='not a positive height and width'):
            resolve(vit, 3, size=size)


@pytest.mark.parametrize('size', [None, (8, 8)])
def test_the_remedy_for_a_model_that_states_nothing_helps(size):
    """No layer says that its images have two channels, nor a side where none is given."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(2 * 8 * 8, 10)).eval()
    remedy = re.escape("or state all of it: model.pretrained_cfg = {'input_size': (channels, height, width)}")
    with pytest.raises(ValueError, match=remedy):
        resolve(model, 3, size=size)
    model.pretrained_cfg = {'input_size': (2, 8, 8)}
    score = resolve(model, 3, size=size)
    assert (score.in_chans, score.size) == (2, (8, 8))


@pytest.mark.parametrize('stated', [(8, 8), 8, 'large', (2, 8, None)])
def test_a_misstated_size_is_an_error(stated):
    model = nn.Sequential(nn.Flatten(), nn.Linear(2 * 8 * 8, 10)).eval()
    model.pretrained_cfg = {'input_size': stated}
    with pytest.raises(ValueError, match=re.escape(f'input_size {stated!r}: give (channels, height, width)')):
        resolve(model, 3)
    model.pretrained_cfg = {'input_size': None}  # says nothing
    with pytest.raises(ValueError, match='or state all of it'):
        resolve(model, 3)


@pytest.mark.parametrize(
    ('model', 'side'),
    [
        (lambda: timm.create_model('test_vit'), 160),
        (lambda: timm.create_model('test_vit', img_size=64), 64),
        (lambda: timm.create_model('test_coatnet', img_size=64), 64),
        (lambda: timm.create_model('gencnn_lenet', img_size=32), 32),
        (lambda: timm.models.VisionTransformer(img_size=48, embed_dim=32, depth=1, num_heads=2), 48),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.AvgPool2d(224), nn.Flatten()), 224),
    ],
)
def test_own_size(model, side):
    score = resolve(model().eval(), 0)
    assert score.size == (side, side)
    assert score(images(1, score.in_chans, score.size)).shape == (1,)


def test_bad_batches(zoo):
    score = resolve(zoo, ['conv:1', 'conv:2'], size=SIZE)
    for x in (images(3), images(2, 1), images(2)[0], images(2)[:0]):
        with pytest.raises(ValueError, match=r'2 node\(s\) take \[N, 3, H, W\]'):
            score(x)
    with pytest.raises(ValueError, match=r'position \(7, 7\) is outside \(4, 4\)'):
        resolve(zoo, 'conv:1@7,7', size=SIZE)(images(size=(8, 8)))
    assert hooks(zoo) == 0


# ---------------------------------------------------------------------------------------------------------------------
# One pass, stopped, and no trace of it


def test_forward_stops_at_the_last_layer_needed(resnet):
    x = images(2, size=(64, 64))
    ran: list[str] = []
    layers = [name for name, _ in resnet.named_modules() if name]
    score = resolve(resnet, ['layer2.0.conv1:3', 'layer2.1:4'], size=(64, 64))
    handles = [resnet.get_submodule(n).register_forward_hook(lambda m, a, o, n=n: ran.append(n)) for n in layers]
    score(x)
    for handle in handles:
        handle.remove()
    assert 'layer2.1.conv2' in ran
    assert 'layer3.0.conv1' not in ran
    assert ran.count('conv1') == 1


def test_the_model_is_left_as_it_was(resnet, monkeypatch):
    model = copy.deepcopy(resnet)
    model.conv1.weight.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    wishes = [p.requires_grad for p in model.parameters()]
    score = resolve(model, [1, 'layer1.0.act1:3'], size=(64, 64))
    score(images(2, size=(64, 64)))
    assert hooks(model) == 0
    assert [p.requires_grad for p in model.parameters()] == wishes
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    monkeypatch.setattr(model.layer1, 'forward', lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        score(images(2, size=(64, 64)))
    assert hooks(model) == 0


@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode])
def test_axes_are_measured_where_gradients_are_off(zoo, mode):
    with mode():
        assert receptive_field(zoo, 'conv', size=SIZE) == (3, 3)
        assert list_nodes(zoo, 'nhwc', size=SIZE)[0].layout == 'NHWC'
        score = resolve(zoo, ['nhwc:3', 3], size=SIZE)(images())
    torch.testing.assert_close(score, resolve(zoo, ['nhwc:3', 3], size=SIZE)(images()))


def test_biases_cached_in_eval_mode_are_not_poisoned():
    torch.manual_seed(0)
    model = timm.create_model('levit_128s').eval().requires_grad_(False)
    x = images(2, size=(224, 224)).requires_grad_()
    with torch.no_grad():
        expected = copy.deepcopy(model)(x)[:, 3]
    list_nodes(model, 'stages.0.*')
    score = resolve(model, 3)
    for _ in range(2):  # a cached graph would make the second backward fail
        value = score(x)
        torch.autograd.grad(value.sum(), x)
        torch.testing.assert_close(value, expected)


# ---------------------------------------------------------------------------------------------------------------------
# Early convolutions


def test_receptive_field_and_default_size(resnet):
    assert receptive_field(resnet, 'conv1') == (7, 7)
    assert receptive_field(resnet, 'layer1.0.conv1') == (19, 19)
    assert receptive_field(resnet, 'layer2.0') == (67, 67)  # through a branch whose gain starts at zero
    assert receptive_field(resnet, 'layer4.1', size=(64, 64)) == (64, 64)
    assert resolve(resnet, 'conv1:3').size == (10, 10)  # 7 + 3, stride 2
    assert resolve(resnet, ['conv1:3', 'layer1.0.conv1:1']).size == (28, 28)  # 19 + 9, stride 4
    for node in (['conv1:3', 1], 'conv1:3@5,5', 'layer4.1:3'):
        assert resolve(resnet, node).size == (224, 224)
    assert resolve(resnet, 'conv1:3', size=(64, 64)).size == (64, 64)
    assert resolve(resnet, 'conv1:3')(images(2, size=(10, 10))).shape == (2,)


def test_a_default_size_can_be_given_back():
    """LeNet as a whole takes no image of 7 x 7, its first layers do."""
    model = timm.create_model('gencnn_lenet').eval()
    x = images(4, 1, (7, 7))
    default = resolve(model, ['conv1:3', 'conv1:5'])
    assert default.size == (7, 7)
    given = resolve(model, default.names, size=(7, 7))
    assert given.size == (7, 7)
    assert torch.equal(given(x), default(x))
    assert resolve(model, 'conv1:3@2,2', size=(7, 7))(x).shape == (4,)
    with pytest.raises(ValueError, match=r'position 5,5 is out of range.*3 x 3'):
        resolve(model, 'conv1:3@5,5', size=(7, 7))
    for node in (3, 'conv2:1', ['conv1:3', 3], lambda x: x.mean((1, 2, 3))):
        with pytest.raises(ValueError, match=r'the model refuses 7 x 7 .*own size is 28 x 28'):
            resolve(model, node, size=(7, 7))
    with pytest.raises(ValueError, match=r'the model refuses 4 x 4 .*own size is 28 x 28'):
        resolve(model, 'conv1:3', size=(4, 4))
    with pytest.raises(ValueError, match='does not run'):
        resolve(Zoo().eval(), 'unused:1', size=SIZE)
    assert hooks(model) == 0


@pytest.mark.parametrize('gain', [1.0, 0.0])  # behind a gain of zero, axes are seen where it is filled in
def test_layers_at_a_size_that_the_whole_model_refuses(gain):
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), timm.layers.BatchNormAct2d(8), nn.Identity())
    nn.init.constant_(block[1].weight, gain)
    model = nn.Sequential(block, nn.Flatten(), nn.Linear(8 * 14 * 14, 5)).eval()
    model.pretrained_cfg = {'input_size': (3, 16, 16)}
    x = images(size=(9, 9))
    for node in ('0:3', '0.1:3', '0.1.act:3', '0.2:3@1,1'):
        own, given = resolve(model, node), resolve(model, node, size=(9, 9))
        assert own.names == given.names == [node]
        assert own.nodes[0].note == given.nodes[0].note
        torch.testing.assert_close(given(x), own(x))
        assert given(x).any() == bool(gain)
    with pytest.raises(ValueError, match=r'channel 8 is out of range, .* 0 to 7'):  # of 7 x 7 positions
        resolve(model, '0.2:8', size=(9, 9))


def test_lists_and_receptive_fields_at_a_size_that_the_whole_model_refuses(capsys):
    model = timm.create_model('gencnn_lenet').eval()
    assert list_nodes(model, 'conv1', size=(7, 7)) == [NodeInfo('conv1', (20, 3, 3), 20, 'NCHW')]
    assert expand(model, 'conv[1]:18-19', size=(7, 7)) == ['conv1:18', 'conv1:19']
    assert receptive_field(model, 'conv1', size=(7, 7)) == (5, 5)
    assert cli(['nodes', 'lenet', 'conv1', '--size', '7']) == 0
    assert '20 x 3 x 3' in capsys.readouterr().out
    for ask in (lambda: list_nodes(model, size=(7, 7)), lambda: receptive_field(model, 'conv2', size=(7, 7))):
        with pytest.raises(ValueError, match=r'the model refuses 7 x 7 .*own size is 28 x 28'):
            ask()
    with pytest.raises(ValueError, match="no layer matches 'nosuch'"):
        list_nodes(model, 'nosuch', size=(7, 7))


def test_calls_at_a_size_that_the_whole_model_refuses_keep_their_names():
    conv = nn.Conv2d(3, 3, 3)
    model = nn.Sequential(conv, conv, nn.Flatten(), nn.Linear(3 * 12 * 12, 5)).eval()
    model.pretrained_cfg = {'input_size': (3, 16, 16)}
    assert list_nodes(model, '0#1', size=(9, 9)) == [NodeInfo('0#1', (3, 7, 7), 3, 'NCHW')]
    assert [(info.name, info.shape) for info in list_nodes(model, '0', size=(9, 9))] == [
        ('0#1', (3, 7, 7)),
        ('0#2', (3, 5, 5)),
    ]
    with pytest.raises(ValueError, match='runs 2 times'):
        resolve(model, '0:1', size=(9, 9))


def test_models_that_refuse_a_small_image_keep_their_size():
    assert resolve(timm.create_model('test_vit', dynamic_img_size=False).eval(), 'patch_embed.proj:3').size == (
        160,
        160,
    )


def test_receptive_field_needs_a_map():
    with pytest.raises(ValueError, match='has layout NLC'):
        receptive_field(timm.create_model('test_vit').eval(), 'blocks.0')


# ---------------------------------------------------------------------------------------------------------------------
# Lists


def test_list_nodes(zoo, capsys):
    infos = {info.name: info for info in list_nodes(zoo, size=SIZE)}
    assert infos['conv'] == NodeInfo('conv', (8, 8, 8), 8, 'NCHW')
    assert infos['nhwc'] == NodeInfo('nhwc', (8, 8, 8), 8, 'NHWC')
    assert infos['nchw'] == NodeInfo('nchw', (8, 8, 8), 8, 'NCHW')
    assert infos['tokens'] == NodeInfo('tokens', (64, 8), 8, 'NLC')
    assert infos['window'] == NodeInfo('window', (2, 32, 8), 8, '(NW)LC')
    assert infos['head'] == NodeInfo('head', (10,), 10, 'NC')
    assert infos['mixed'] == NodeInfo('mixed', (64, 8), None, '?')
    assert {'twice#1', 'twice#2'} <= set(infos)
    assert not {'unused', 'pair', ''} & set(infos)
    assert [info.name for info in list_nodes(zoo, 'mlp.*', size=SIZE)] == ['mlp.0', 'mlp.1']
    assert [info.name for info in list_nodes(zoo, 'twice', size=SIZE)] == ['twice#1', 'twice#2']
    assert [info.name for info in list_nodes(zoo, 'twice#2', size=SIZE)] == ['twice#2']
    with pytest.raises(ValueError, match="no layer matches 'mpl"):
        list_nodes(zoo, 'mpl.*', size=SIZE)


class Attentive(nn.Module):
    """Torch's attention, which takes the weights of its last layer without a call, after tokens of mixed channels."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.attention = nn.Conv2d(3, 8, 4, stride=4), nn.MultiheadAttention(8, 2, batch_first=True)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.conv(x).flatten(2).mT
        return self.drop(self.attention(tokens, tokens, tokens, need_weights=False)[0]).mean(1)


def test_layers_behind_weights_of_a_layer_that_is_not_called_have_an_axis():
    model = Attentive().eval()
    infos = list_nodes(model, size=SIZE)
    assert [(info.name, info.layout, info.channels) for info in infos[1:]] == [
        ('attention', 'NLC', 8), ('drop', 'NLC', 8)
    ]  # fmt: skip
    x = images(2)
    score = resolve(model, ['attention:3', 'drop:3@2'], size=SIZE)
    torch.testing.assert_close(score(x)[:1], model(x)[:1, 3])


def test_a_table_that_was_kept_under_inference_mode_does_not_stop_a_probe():
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with torch.inference_mode():
                self.kept = torch.randn(1, 8, 1, 1)

        def forward(self) -> Tensor:
            return self.kept

    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.act = Table(), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(x + self.table())

    model, x = Net(Shift()).eval(), images()
    before = capture(model, 'layers.0.act', x, before=True)
    torch.testing.assert_close(resolve(model, 'layers.0:3', size=SIZE)(x), before[:, 3].mean((1, 2)))


def test_layers_behind_a_gain_of_zero_have_an_axis():
    model = timm.create_model('test_nfnet').eval()
    assert not any(gain.any() for name, gain in model.named_parameters() if name.endswith('skipinit_gain'))
    assert all(info.channels for info in list_nodes(model, 'stages.[01].*'))


@pytest.mark.parametrize(
    ('pattern', 'names'),
    [
        ('mlp.*:2-3', ['mlp.0:2', 'mlp.0:3', 'mlp.1:2', 'mlp.1:3']),
        ('head:8-20', ['head:8', 'head:9']),
        ('head:*', [f'head:{i}' for i in range(10)]),
        ('n?wc:1@2,3', ['nhwc:1@2,3']),
        ('twice:0-1', ['twice#1:0', 'twice#1:1', 'twice#2:0', 'twice#2:1']),
        ('twice#2:0-1', ['twice#2:0', 'twice#2:1']),
        ('*#1:0', ['twice#1:0']),
        ('0-2', ['0', '1', '2']),
        ('conv:3', ['conv:3']),
        ('3 + 0.5*conv:3', ['3 + 0.5*conv:3']),
        ('0.5*conv:3', ['0.5*conv:3']),
        ('goldfish', ['goldfish']),
    ],
)
def test_expand(zoo, pattern, names):
    assert expand(zoo, pattern, size=SIZE) == names


@pytest.mark.parametrize(
    ('pattern', 'message'),
    [('conv:9-12', 'at most 8 channels'), ('conv:3-1', 'runs backwards'), ('x*:1', "no layer matches 'x[*]'")],
)
def test_expand_nothing(zoo, pattern, message):
    with pytest.raises(ValueError, match=message):
        expand(zoo, pattern, size=SIZE)


def test_command(capsys):
    parser = argparse.ArgumentParser()
    node_lists.add_arguments(parser)
    node_lists.main(parser.parse_args(['test_vit', 'blocks.1.*']))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ['layer', 'channels', 'layout', 'shape']
    assert any(line.split() == ['blocks.1.mlp.fc1', '192', 'NLC', '101', 'x', '192'] for line in lines)
    with pytest.raises(ValueError, match='unknown model'):
        node_lists.main(parser.parse_args(['no_such_model']))


class Noisy(Zoo):
    """Dropout that eval mode does not switch off, before the head."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.head(nn.functional.dropout(self.relu(x).mean((2, 3)), self.rate, training=True))


def test_a_network_that_is_random_in_eval_mode_is_refused():
    torch.manual_seed(0)
    model = Noisy(0.2).eval()
    with pytest.raises(ValueError, match=r"score of '1' differs between two passes on the same images.*switch"):
        resolve(model, ['conv:3', 1], size=SIZE)
    assert resolve(model, 'conv:3', size=SIZE).names == ['conv:3']  # before the noise
    assert resolve(Noisy(0.0).eval(), 1, size=SIZE).names == ['1']


# ---------------------------------------------------------------------------------------------------------------------
# Every family


def readable(result: probes.Probe, layer: str) -> tuple[str, layouts.Layout] | None:
    try:
        found = layouts.find_layout(result, probes.Tap(layer))
    except ValueError:  # one channel only, or inside attention
        return None
    slope = layouts.grad(layouts.weighted_scores(result.read(probes.Tap(layer)))[0], result.images)
    return None if slope is None else (layer, found)  # a table of positions sees no image


def build(name: str, **kwargs: Any) -> nn.Module:
    """An untrained model whose gains and heads that start at zero, and hide what is behind them, are noise."""
    torch.manual_seed(0)
    cfg = timm.get_pretrained_cfg(name)
    model = timm.create_model(name, **({} if cfg and cfg.num_classes else {'num_classes': 10}), **kwargs)
    model.eval().requires_grad_(False)
    for p in model.parameters():
        if not p.any():
            p.normal_(std=0.1)
    return model


def middle_layer(model: nn.Module, result: probes.Probe) -> tuple[str, layouts.Layout]:
    """A block in the middle of the network, with its layout."""
    single = [name for name, calls in result.calls.items() if name and len(calls) == 1]
    single = [name for name in single if isinstance(result.calls[name][0].output, Tensor)]
    blocks = [name for name in single if list(result.calls[name][0].module.children())]
    blocks = [name for name in blocks if 'Norm' not in type(result.calls[name][0].module).__name__] or single
    return next(found for name in blocks[len(blocks) // 2 :] if (found := readable(result, name)))


def channel_means(tensor: Tensor, layout: layouts.Layout) -> Tensor:
    return tensor.movedim(layout.axis - layout.windows, 0).flatten(1).float().mean(1)


def check_model(name: str) -> None:
    """A class and a layer in the middle: finite, alive, and equal to what a hook of the test's own sees."""
    model = build(name)
    size = (SIDES[name], SIDES[name]) if name in SIDES else None
    plain = resolve(model, 1, size=size)
    result = probes.probe(model, plain.in_chans, plain.size)
    for stage in getattr(model, 'feature_info', None) or []:  # timm's own word for the number of channels
        calls = result.calls.get(stage.get('module'), [])
        if len(calls) == 1 and isinstance(calls[0].output, Tensor):
            assert layouts.find_layout(result, probes.Tap(stage['module'])).channels == stage['num_chs'], stage
    layer, found = middle_layer(model, result)

    x = images(2, plain.in_chans, plain.size).requires_grad_()
    means = channel_means(capture(model, layer, x[1:]), found)
    channel = int(means.abs().argmax())  # a channel that is alive
    score = resolve(model, [1, f'{layer}:{channel}'], size=size)
    assert layers_of(score) == [{''}, {layer}]
    value = score(x)
    assert value.shape == (2,)
    assert value.isfinite().all()
    torch.testing.assert_close(value[1], means[channel], rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        logits = probes.class_logits(model(x[:1]))
    torch.testing.assert_close(value[:1], logits[:, 1].float(), rtol=1e-3, atol=1e-4)
    (slope,) = torch.autograd.grad(value.sum(), x)
    assert slope.isfinite().all()
    assert slope.flatten(1).any(1).all()


@pytest.mark.parametrize('name', FAST)
def test_representative_models(name):
    check_model(name)


@pytest.mark.slow
@pytest.mark.parametrize('name', [name for name in SMALL if name not in FAST])
def test_all_other_modules(name):
    check_model(name)


def test_every_module_of_timm_is_in_the_list():
    modules = {timm.model_entrypoint(name).__module__ for name in timm.list_models()}
    covered = {timm.model_entrypoint(name).__module__ for name in SMALL}
    assert {module for module in modules if module.startswith('timm.')} == covered


@pytest.mark.parametrize(
    ('arch', 'layer', 'layout'),
    [
        ('resnet18', 'layer3.1.conv2', 'NCHW'),
        ('swin_t', 'features.3.1', 'NHWC'),
        ('swin_t', 'features.1.0.attn', 'NHWC'),  # which does not call the layers whose weights it takes
        ('vit_b_32', 'encoder.layers.encoder_layer_5.mlp', 'NLC'),
    ],
)
def test_torchvision(arch, layer, layout):
    torchvision = pytest.importorskip('torchvision')
    torch.manual_seed(0)
    model = getattr(torchvision.models, arch)().eval().requires_grad_(False)
    assert list_nodes(model, layer)[0].layout == layout
    score = resolve(model, ['goldfish', f'{layer}:17'])
    assert score.names[0] == '1 goldfish'
    x = images(2, 3, score.size)
    tensor = capture(model, layer, x[1:])
    expected = tensor.select(layout.index('C'), 17).flatten(1).mean(1)
    torch.testing.assert_close(score(x)[1:], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not (SHARED / 'networks').is_dir(), reason='needs ../shared/networks')
@pytest.mark.parametrize(('arch', 'size'), [('squeezenet', 227), ('mobilenet_v1', 160)])
def test_shared_networks(arch, size, monkeypatch):
    monkeypatch.syspath_prepend(str(SHARED / 'networks'))
    networks = pytest.importorskip('networks')
    model = getattr(networks, arch)()
    score = resolve(model, ['goldfish', 207], size=(size, size))
    x = images(8, 3, (size, size)).requires_grad_()
    (slope,) = torch.autograd.grad(score(x).sum(), x)
    assert slope.flatten(1).any(1).all()  # no chain is dead
    assert bool(score.nodes[0].note) == (arch == 'squeezenet')


@pytest.mark.gpu
def test_no_host_sync():
    model = timm.create_model('resnet18').eval().requires_grad_(False).cuda()
    score = resolve(model, [1, 'layer3.1.conv2:17', 'layer2.0:3@4,4', '207 + 0.5*layer1.0:3'])
    x = torch.randn(8, 3, 224, 224, device='cuda', requires_grad=True)
    score(x)
    torch.cuda.set_sync_debug_mode('error')
    try:
        torch.autograd.grad(score(x).sum(), x)
    finally:
        torch.cuda.set_sync_debug_mode('default')
