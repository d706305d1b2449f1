"""What makes sampling fast leaves its results alone, and nothing inside a transition waits for the device."""

import importlib.util
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import timm
import torch
import torch._dynamo
import torch.nn.functional as F
from PIL import Image
from torch import nn
from waits import NoWait, SyncError

from timm_gencnn import blocks, chains, hmc
from timm_gencnn.networks import affine_batch_norms, channels_last, frozen
from timm_gencnn.nodes import resolve
from timm_gencnn.partition import log_z
from timm_gencnn.reference import natural_for
from timm_gencnn.samples import read_metadata
from timm_gencnn.visualize import visualize

SIDE = 64


@pytest.fixture(scope='module')
def resnet():
    torch.manual_seed(0)
    return timm.create_model('test_resnet').eval()


def quick(model, node, **kwargs):
    return visualize(model, node, **{'n': 2, 'steps': 12, 'size': SIDE, 'progress': False} | kwargs)


class Viewer(nn.Module):
    """A network that flattens by `view`, which a map in channels-last order refuses."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 64, 5)
        self.num_classes = 5

    def forward(self, x):
        x = torch.relu(self.conv(x))
        return self.head(x.view(len(x), -1))


# No wait for the device


def transitions(model, node, regime, device='cpu', guard=nullcontext, spy=lambda *_: None, kick=None):
    """Runs a short chain with every transition, the adaptation and the tally inside `guard`."""
    device = torch.device(device)
    score = resolve(model, node, size=(SIDE, SIDE))
    q = natural_for(model.pretrained_cfg, 3, (SIDE, SIDE), device)

    def f(z):
        value = score(q(z))
        spy(value)
        return value

    def rough(z):
        with torch.autocast(device.type, torch.bfloat16):
            return f(z).float()

    streams = hmc.Streams(0, range(2 * len(score.names)), device)
    with frozen(model), channels_last(model):
        state = chains.start(f, q.shape, streams)
        with guard():
            if regime == 'exact':
                return chains.sample_exact(f, state, streams, 65, kick=rough if kick else None)
            return chains.sample_gallery(rough if kick else f, state, streams, 10, 0.01)


NODES = [1, 'layer2.0.conv1:3', 'layer1.0.act1:2@3,4', [1, 'layer2.0.conv1:3']]


@pytest.mark.parametrize('kick', [False, True])
@pytest.mark.parametrize('regime', ['exact', 'gallery'])
def test_nothing_in_a_transition_waits_for_the_device(resnet, regime, kick):
    for node in NODES:
        transitions(resnet, node, regime, guard=NoWait, kick=kick)


@pytest.mark.parametrize(
    'spy', [lambda f: f[0].item(), lambda f: bool(f.sum() > 0), lambda f: f.nonzero(), lambda f: f[f > 0]]
)
@pytest.mark.parametrize('regime', ['exact', 'gallery'])
def test_a_wait_would_be_seen(resnet, regime, spy):
    with pytest.raises(AssertionError, match='waits for the device'):
        transitions(resnet, 1, regime, guard=NoWait, spy=spy)


@pytest.mark.gpu
@pytest.mark.parametrize('regime', ['exact', 'gallery'])
def test_cuda_is_never_waited_for(resnet, regime):
    resnet.to('cuda')
    try:
        for node in NODES:
            transitions(resnet, node, regime, 'cuda', guard=SyncError)
        with pytest.raises(RuntimeError, match='synchronizing'):
            transitions(resnet, 1, regime, 'cuda', guard=SyncError, spy=lambda f: f[0].item())
    finally:
        resnet.to('cpu')


# The benchmark


@pytest.mark.parametrize('name', ['raw', 'raw_channels_last', 'exact', 'gallery'])
def test_the_benchmark_of_speed_counts_what_it_was_asked_for(resnet, name):
    spec = importlib.util.spec_from_file_location('bench_speed', Path(__file__).parent / 'benchmarks/bench_speed.py')
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    with frozen(resnet):
        s = bench.Setting(bench.Counter(resnet).eval(), SIDE, 2, 65, torch.device('cpu'))
        price = bench.price(getattr(bench, name), s)
    assert (s.model.gradients, s.model.forwards, price.forwards) == (65, 65, 1)
    assert price.gradient > 0


# Channels-last weights


def test_convolutions_run_in_channels_last_order_and_get_their_weights_back(resnet):
    before = {name: (p.data_ptr(), p.stride()) for name, p in resnet.named_parameters()}
    orders = set()
    handle = resnet.layer2[0].conv1.register_forward_hook(
        lambda module, args, output: orders.add(output.is_contiguous(memory_format=torch.channels_last))
    )
    try:
        quick(resnet, 1)
        resolving, orders = orders, set()
        with channels_last(resnet):
            resnet(torch.randn(2, 3, SIDE, SIDE))
    finally:
        handle.remove()
    assert True in resolving
    assert orders == {True}
    assert {name: (p.data_ptr(), p.stride()) for name, p in resnet.named_parameters()} == before


def test_weights_come_back_after_an_error(resnet):
    stride = resnet.layer2[0].conv1.weight.stride()
    with pytest.raises(ZeroDivisionError), channels_last(resnet):
        assert 1 / (resnet.layer2[0].conv1.weight.stride() == stride)
    assert resnet.layer2[0].conv1.weight.stride() == stride


# Batch norms as a product and a sum


@pytest.mark.parametrize('name', ['test_resnet', 'test_efficientnet'])
def test_affine_batch_norms_are_batch_norms(name):
    """torch's own, and timm's with what follows."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval().requires_grad_(False)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        for values, law in ((norm.weight, (0.5, 2)), (norm.running_var, (0.1, 4)), (norm.running_mean, (-1, 1))):
            values.uniform_(*law)
    used = []

    def pass_of(images):
        output = model(images)
        return output, *torch.autograd.grad(output[:, 1].sum(), images)

    images = torch.randn(2, 3, SIDE, SIDE, requires_grad=True)
    expected = pass_of(images)
    with mock.patch.object(F, 'batch_norm', side_effect=lambda *args: used.append(args)), affine_batch_norms(model):
        found = pass_of(images)
    assert not used
    assert not any('forward' in vars(norm) for norm in norms)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert not torch.equal(a, b)  # it was another way
    assert torch.equal(pass_of(images)[0], expected[0])


def test_batch_norms_that_look_at_the_batch_or_round_otherwise_stay_as_they_are():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False)).eval()
    model[0].train()
    images = torch.rand(4, 3, 5, 5)
    rough = images.bfloat16()
    expected = model[1](rough)
    with affine_batch_norms(model):
        assert ['forward' in vars(norm) for norm in model] == [False, True, False]
        assert torch.equal(model[1](rough), expected)
        assert model[1](rough).dtype == torch.bfloat16


def test_a_larger_gpu_takes_more_images_at_once(monkeypatch):
    reference = natural_for({}, 3, (224, 224))
    memory = lambda gib: monkeypatch.setattr(  # noqa: E731
        torch.cuda, 'get_device_properties', lambda device: SimpleNamespace(total_memory=gib * 2**30)
    )
    at_once = {}
    for gib in (8, 16, 80):
        memory(gib)
        at_once[gib] = blocks.chunk(reference, torch.device('cuda'))
    assert at_once == {8: 27, 16: 27, 80: 139}
    assert blocks.chunk(reference, torch.device('cpu')) == 27


@pytest.mark.parametrize(
    ('context', 'owner', 'method'),
    [(channels_last, torch.Tensor, 'contiguous'), (frozen, nn.Parameter, 'requires_grad_')],
)
def test_weights_come_back_after_an_error_in_the_middle_of_the_change(resnet, monkeypatch, context, owner, method):
    state = lambda: [(p.data_ptr(), p.stride(), p.requires_grad) for p in resnet.parameters()]  # noqa: E731
    before, change, calls = state(), getattr(owner, method), 0

    def interrupted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return change(*args, **kwargs)

    monkeypatch.setattr(owner, method, interrupted)
    with pytest.raises(KeyboardInterrupt), context(resnet):
        pass
    assert calls >= 3
    assert state() == before


@pytest.mark.parametrize(('temperature', 'steps'), [(1.0, 70), (None, 12)])
def test_the_order_of_the_weights_does_not_change_the_images(resnet, monkeypatch, temperature, steps):
    fast = quick(resnet, 1, steps=steps, temperature=temperature)
    monkeypatch.setattr(blocks, 'channels_last', lambda model: nullcontext())
    plain = quick(resnet, 1, steps=steps, temperature=temperature)
    torch.testing.assert_close(fast.images, plain.images, atol=1e-3, rtol=0)


def test_a_network_that_needs_contiguous_maps_gets_them():
    model = Viewer().eval()
    with channels_last(model), pytest.raises(RuntimeError, match='view'):
        model(torch.randn(2, 3, 8, 8))
    samples = quick(model, [1, 'conv:2'], size=8)
    assert samples.images.shape == (4, 3, 8, 8)
    assert model.conv.weight.is_contiguous()
    assert len(log_z(model, 1, n=2, levels=2, size=8, progress=False).log_weights) == 2


class Complex(nn.Module):
    """A filter of frequencies with complex weights, kept as pairs of real ones: a parameter of four dimensions."""

    def __init__(self, view):
        super().__init__()
        self.conv, self.view = nn.Conv2d(3, 4, 3, padding=1), view
        self.weight = nn.Parameter(torch.randn(8, 5, 4, 2))

    def forward(self, x):
        frequencies = torch.fft.rfft2(self.conv(x).permute(0, 2, 3, 1), dim=(1, 2))
        return torch.fft.irfft2(frequencies * self.view(self.weight), s=(8, 8), dim=(1, 2)).mean((1, 2))


@pytest.mark.parametrize('view', [torch.view_as_complex, lambda w: w.view(torch.complex64)[..., 0]])
def test_a_network_that_needs_contiguous_weights_gets_them(view):
    torch.manual_seed(0)
    model = Complex(view).eval()
    with channels_last(model), pytest.raises(RuntimeError, match='stride'):
        model(torch.randn(2, 3, 8, 8))
    assert quick(model, [1, 'conv:2'], size=8).images.shape == (4, 3, 8, 8)
    assert model.weight.is_contiguous()


# torch.compile


@pytest.fixture
def eager_compiler(monkeypatch):
    """torch.compile without a C++ compiler: the whole graph is captured and differentiated, then run as it is.

    Lists the graphs that were captured.
    """
    graphs = []
    aot_eager = torch._dynamo.lookup_backend('aot_eager')

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    compile = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda f, **kwargs: compile(f, backend=backend, **kwargs))
    yield graphs
    torch._dynamo.reset()


@pytest.mark.parametrize(('temperature', 'steps'), [(1.0, 70), (None, 12)])
def test_compiled_images_are_those_of_the_eager_network(resnet, eager_compiler, temperature, steps):
    nodes = [1, 'layer2.0.conv1:3', 'layer1.0.act1:2@3,4', '3 + 0.5*layer1.0.conv1:1']
    eager = quick(resnet, nodes, n=1, steps=steps, temperature=temperature)
    assert not eager_compiler
    compiled = quick(resnet, nodes, n=1, steps=steps, temperature=temperature, compile=True)
    assert len(eager_compiler) == 1  # one graph for all steps
    torch.testing.assert_close(compiled.images, eager.images, atol=2e-2, rtol=0)
    assert (eager.settings['compile'], compiled.settings['compile']) == (False, True)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in resnet.modules())


def test_a_compiled_pass_ends_at_the_last_layer_needed(resnet, eager_compiler):
    """What comes after the tensor read is not in the graph: as many convolutions run as in the eager pass."""

    def convolutions(run):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            run()
        return sum(event.name == 'aten::convolution' for event in profile.events())

    score = resolve(resnet, 'layer2.0.conv1:3', size=(SIDE, SIDE))
    images = torch.randn(2, 3, SIDE, SIDE)
    with frozen(resnet):
        eager = hmc.score_and_grad(score, images)
        stopped = convolutions(lambda: score(images))
        with score.compiled():
            torch.testing.assert_close(hmc.score_and_grad(score, images), eager)
            compiled = convolutions(lambda: hmc.score_and_grad(score, images))
        whole = convolutions(lambda: resnet(images))
    assert 0 < compiled == stopped < whole


def test_compiled_passes_count_repeated_calls(eager_compiler):
    """relu#1 is the second call, in every pass; what follows works in place on the tensor that was read."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.relu = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.ReLU(inplace=True)
            self.num_classes = 4

        def forward(self, x):
            return self.relu(self.b(self.relu(self.a(x)))).mean((2, 3))

    model = Twice().eval()
    for node in ('relu#1:2', 'b:1', 'a:1'):
        score = resolve(model, node, size=(8, 8))
        images = torch.randn(2, 3, 8, 8)
        eager = hmc.score_and_grad(score, images)
        with score.compiled():
            for _ in range(3):
                torch.testing.assert_close(hmc.score_and_grad(score, images), eager)


def test_what_cannot_be_compiled_is_refused_by_name(eager_compiler):
    class Branches(Viewer):
        def forward(self, x):
            x = torch.relu(self.conv(x))
            return self.head(x.flatten(1)) * (2.0 if x.sum().item() > 0 else 1.0)

    with pytest.raises(ValueError, match=r'torch\.compile cannot take this model whole'):
        quick(Branches().eval(), 1, size=8, compile=True)


def test_compile_on_the_command_line_is_recorded_and_repeated(tmp_path, eager_compiler):
    from timm_gencnn.cli import main

    first, again = tmp_path / 'a.png', tmp_path / 'b.png'
    main(['visualize', 'gencnn_lenet.vis_mnist', '3', '-n', '1', '--steps', '8', '--compile', '--out', str(first)])
    assert read_metadata(first)['settings']['compile'] is True
    seen = len(eager_compiler)
    torch._dynamo.reset()
    main(['visualize', '--like', str(first), '--out', str(again)])
    assert len(eager_compiler) > seen > 0
    assert read_metadata(again)['settings'] == read_metadata(first)['settings']
    assert Image.open(first).tobytes() == Image.open(again).tobytes()
