"""Everything that may run on a GPU, on an emulated one: the CPU's numbers, nothing on two devices, no needless wait."""

import copy
import csv
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import pytest
import timm
import torch
import torch.distributed as dist
from far_device import far_device, is_far
from pictures import draw_bars
from PIL import Image
from timm.task import ClassificationTask
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from timm_gencnn import (
    as_generative,
    blocks,
    chains,
    cli,
    device_data,
    layouts,
    log_z,
    reference,
    train,
    views,
    visualize,
)
from timm_gencnn.networks import affine_batch_norms
from timm_gencnn.nodes import receptive_field
from timm_gencnn.task import GenerativeTask
from timm_gencnn.validate import noisy

pytestmark = pytest.mark.usefixtures('one_thread')

SIDE = 16
MIXING = 'Expected all tensors to be on the same device'
WAITING = 'called a synchronizing CUDA operation'


class Net(nn.Module):
    """Two classes and a batch norm."""

    num_classes = 2
    pretrained_cfg = {'input_size': (3, SIDE, SIDE), 'mean': (0.5,) * 3, 'std': (0.3,) * 3}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.head = nn.Linear(8, 2)

    def get_classifier(self):
        return self.head

    def forward(self, x):
        return self.head(self.act(self.bn(self.conv(x))).mean((2, 3)))


@pytest.fixture
def net():
    return Net().eval()


# The emulation itself


def test_two_devices_do_not_mix(net):
    x = torch.randn(2, 3, SIDE, SIDE)
    expected = net(x)
    with far_device():
        net.to('cuda')
        far = x.to('cuda')
        assert (str(net.conv.weight.device), str(net.bn.running_mean.device), far.is_cuda) == ('cuda:0',) * 2 + (True,)
        logits = net(far)
        refused = [lambda: net(x), lambda: far + x, lambda: torch.stack([far[0], x[0]]), lambda: far.sum() * x]
        refused += [lambda: torch.zeros(2, device='cuda') + torch.zeros(2)]
        for mixing in refused:
            with pytest.raises(RuntimeError, match=MIXING):
                mixing()
        with pytest.raises(RuntimeError, match='indices should be either on cpu'):
            x[torch.tensor([0], device='cuda')]
        for numpy in (far.numpy, far.__array__):
            with pytest.raises(TypeError, match='to numpy'):
                numpy()
        for device, own in (('cuda', 'cpu'), ('cpu', 'cuda')):
            with pytest.raises(RuntimeError, match='Expected a generator'):
                torch.rand(2, device=device, generator=torch.Generator(own))
        assert far[torch.tensor([0])].is_cuda
        assert (far * torch.tensor(2.0)).is_cuda  # a number
        assert torch.equal(logits.cpu(), expected)
        assert copy.deepcopy(net).head.weight.is_cuda
        assert not net.to('cpu').head.weight.is_cuda
        assert torch.equal(net(x), expected)


def test_backward_passes_and_their_python_code_are_watched():
    class Careless(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * torch.ones(3)

    with far_device() as far:
        x = torch.ones(3, device='cuda', requires_grad=True)
        (grad,) = torch.autograd.grad((x * x).sum(), x)
        assert grad.is_cuda
        for run in (lambda y: torch.autograd.grad(y, x), lambda y: y.backward()):
            with pytest.raises(RuntimeError, match=MIXING):
                run(Careless.apply(x).sum())
        with far.state(patient=False):
            (x * x).sum().backward()
        assert x.grad.is_cuda


def test_waits_are_seen():
    with far_device() as far:
        x, near = torch.ones(3, device='cuda'), torch.ones(3)
        waits = [lambda: x[0].item(), lambda: bool(x.any()), x.tolist, x.cpu, x.nonzero, lambda: x[x > 0], x.unique]
        waits += [lambda: near.to('cuda'), lambda: torch.tensor(1.0, device='cuda'), lambda: x[torch.tensor([0])]]
        waits += [lambda: near.copy_(x), lambda: x.copy_(near), lambda: torch.allclose(x, x), lambda: x.to(near)]
        for number, wait in enumerate(waits):
            before = len(far.waits)
            wait()
            assert len(far.waits) > before, number
            with far.state(patient=False), pytest.raises(RuntimeError, match=WAITING):
                wait()
        with far.state(patient=False):
            x[1:] = 2.0
            x += near.to('cuda', non_blocking=True) + torch.randn(3, device='cuda') + torch.arange(3, device='cuda')
            x.where(x > 0, 1.0).to(torch.float64).new_zeros(2).is_cuda  # noqa: B018


# Pictures


@pytest.fixture
def watched(monkeypatch):
    """Makes the sampler's transitions, but not its reports of progress, fail where they wait."""

    def watch(far):
        def no_wait(sample):
            def run(*args, report=None, **kwargs):
                def reports(*told):
                    with far.state(patient=True):
                        report(*told)

                with far.state(patient=False):
                    return sample(*args, report=reports, **kwargs)

            return run

        for name in ('sample_exact', 'sample_gallery'):
            monkeypatch.setattr(chains, name, no_wait(getattr(chains, name)))

    return watch


EXACT = {'temperature': 1.0, 'steps': 65}


@contextmanager
def as_on_a_gpu(model):
    """The CPU's way of a batch norm and of a view is another than that of a GPU: by rounding."""
    with mock.patch.object(views, 'factor', lambda matrices, k: views.Dense(matrices)), affine_batch_norms(model):
        yield


def draw(model, nodes, device=None, **kwargs):
    kwargs = {'n': 2, 'steps': 12, 'size': SIDE, 'progress': False} | kwargs
    return visualize(model, nodes, device=device, **kwargs)


@pytest.mark.parametrize(
    ('default', 'kwargs'),
    [
        (False, {}),
        (True, {'dtype': torch.bfloat16, 'frames': 3}),
        (True, EXACT),
        (False, EXACT | {'reference': 'white', 'dtype': torch.bfloat16}),
    ],
    ids=['gallery', 'rough gallery', 'exact', 'white with rough kicks'],
)
def test_pictures(net, watched, monkeypatch, default, kwargs):
    """Of nodes of every kind, in two chunks. They are the CPU's, and lie there."""
    nodes = [1, 'conv:3@2,3', '0 + 0.5*bn:1', lambda x: x.square().flatten(1).mean(1)]
    monkeypatch.setattr(blocks, 'PIXELS_PER_BATCH', 4 * 3 * SIDE**2)
    with as_on_a_gpu(net):
        expected = draw(net, nodes, **kwargs)
    with far_device(default) as far:
        watched(far)
        samples = draw(net, nodes, 'cuda', **kwargs)
        assert net.head.weight.is_cuda
        assert not any(map(is_far, (samples.images, samples.trace)))
        assert len(samples.to_dataset()) == len(samples.images) == 8
        assert samples.grid().height > 4 * SIDE
    assert torch.equal(samples.images, expected.images)
    assert samples.diagnostics['score'] == expected.diagnostics['score']
    assert samples.settings == expected.settings


def test_views_of_a_large_photograph(net, watched):
    kwargs = {'n': 1, 'steps': 8, 'size': 160}
    with as_on_a_gpu(net):
        expected = draw(net, 1, **kwargs)
    with far_device() as far:
        watched(far)
        samples = draw(net, 1, 'cuda', **kwargs)
    assert samples.settings['views'][0]['shrink'] < 1
    assert torch.equal(samples.images, expected.images)


@pytest.mark.parametrize('kwargs', [{}, EXACT])
def test_a_score_that_waits_is_found(net, watched, kwargs):
    """Control."""
    with far_device() as far:
        watched(far)
        with pytest.raises(RuntimeError, match=WAITING):
            draw(net, lambda x: x.flatten(1).mean(1) * (1 + 0 * x.sum().item()), 'cuda', **kwargs)


def test_pictures_where_the_default_device_is_another_one(net):
    expected = draw(net, [1, 'conv:2'])
    with far_device(default=True):
        samples = draw(net, [1, 'conv:2'], 'cpu')
    assert torch.equal(samples.images, expected.images)


@pytest.mark.parametrize('default', [False, True])
def test_log_z(net, default):
    expected = log_z(net, 1, n=4, levels=3, size=SIDE, progress=False)
    with far_device(default):
        found = log_z(net, 1, n=4, levels=3, size=SIDE, device='cuda', progress=False)
        assert not is_far(found.log_weights)
    assert torch.equal(found.log_weights, expected.log_weights)


def test_receptive_fields_are_measured_without_the_fast_convolutions(monkeypatch):
    """cuDNN's leave rounding errors in place of zeros, which would count as seen."""
    model, used = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)).eval(), []
    backward = torch.autograd.grad

    def noted(*args, **kwargs):
        used.append(torch.backends.cudnn.enabled)
        return backward(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, 'grad', noted)
    assert receptive_field(model, '1', size=SIDE) == (5, 5)
    assert not used[-1]
    assert torch.backends.cudnn.enabled


def test_threads_that_measure_receptive_fields_leave_cudnn_on(monkeypatch):
    times, backward = iter((0.2, 0.4)), layouts.grad

    def slow(*args):
        time.sleep(next(times))
        return backward(*args)

    def field(delay):
        time.sleep(delay)
        return receptive_field(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), '0', size=SIDE)

    monkeypatch.setattr(torch.backends.cudnn, 'enabled', True)
    monkeypatch.setattr(layouts, 'grad', slow)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(field, (0, 0.1))) == [(3, 3)] * 2
    assert torch.backends.cudnn.enabled


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, 'conv'), reason='an older torch has one precision for all')
def test_receptive_fields_where_convolutions_have_a_precision_of_their_own():
    conv = torch.backends.cudnn.conv
    before, conv.fp32_precision = conv.fp32_precision, 'ieee'
    try:
        assert receptive_field(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), '0', size=SIDE) == (3, 3)
    finally:
        conv.fp32_precision = before


# The generative class


def everything(model, to):
    """What the methods of a generative network give."""
    torch.manual_seed(1)
    x, y = torch.randn(6, 3, SIDE, SIDE), torch.tensor([0, 1, 1, 0, 1, 0])
    loader = [(x[:4], y[:4]), to(x[4:])]
    estimate = model.estimate_log_z(loader, progress=False)
    x, y = to(x), to(y)
    found = [*estimate[:2], model.log_z, model.score(x), model.score(x, y), model.score(x, y.tolist())]
    found += [model.log_ratio(x, 1), model.energy(x), model.energy(x, y), model.posterior(x, [1, 3])]
    found += [model.posterior(x, to(torch.tensor([1.0, 3.0])))]
    model.fold_intercepts([1, 3])
    assert model.folded
    elsewhere = copy.deepcopy(model).to('cpu')
    elsewhere.unfold_intercepts()
    found += [model.head.bias.detach().clone(), elsewhere.head.bias.detach()]
    model.unfold_intercepts()
    found += [model.head.bias.detach(), next(noisy([(x, y)], 0.1, (0.3,) * 3))[0]]
    model.set_log_z(to(torch.tensor([1.0, 2.0])))
    return [*found, model.log_z]


@pytest.mark.parametrize(('device', 'default'), [('cuda', False), ('cuda', True), ('cpu', True)])
def test_a_generative_network(net, device, default):
    expected = everything(as_generative(copy.deepcopy(net)), lambda t: t)
    with far_device(default):
        found = everything(as_generative(net).to(device), lambda t: t.to(device))
    assert all(map(torch.equal, found, expected))


def test_a_checkpoint_made_on_the_device_keeps_its_log_z():
    with far_device():
        model = timm.create_model('gencnn_lenet.gg_dg_mnist', pretrained=True, device='cuda')
        assert model.fc2.weight.is_cuda
        assert model.log_z.is_cuda
    assert torch.equal(model.log_z, timm.create_model('gencnn_lenet.gg_dg_mnist', pretrained=True).log_z)


# The task


def batches(count):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        yield (
            torch.randn(6, 3, SIDE, SIDE, generator=generator, device='cpu'),
            torch.randint(2, (6,), generator=generator, device='cpu'),
        )


def run_task(device, task=None, far=None, unlabeled=False, soft=False, distributed=False, **kwargs):
    """Five steps, of which those that note no ESS may not wait."""
    task = task or GenerativeTask(Net().to(device), **kwargs)
    task.generative_loss.distributed = distributed
    task.setup_ema(decay=0.5)
    optimizer = torch.optim.SGD(task.parameters(), 0.1, momentum=0.9)
    torch.manual_seed(0)
    for i, (x, y) in enumerate(batches(5)):
        x, y = x.to(device), y.to(device)
        y = torch.eye(2, device=device)[y] * 0.9 + 0.05 if soft else y
        with nullcontext() if far is None or not task.steps else far.state(patient=False):
            loss = task(x, y, *([x.flip(0)] if unlabeled else []))['loss']
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            task.update_ema(step=i)
    return task


bridge = {'bridge': True}
TASKS = [
    {'phase': 'DG'},
    {'phase': 'GG', 'queue': 8} | bridge,
    {'phase': 'GG', 'running_log_z': True, 'queue': 4, 'soft': True},
    {'phase': 'GG', 'hybrid': 0.3, 'unlabeled': True, 'unlabeled_weight': 0.5},
    {'phase': 'GG+DG', 'gen_steps': 3},
    {'phase': 'GG', 'distributed': True},
    {'phase': 'GG', 'distributed': True, 'running_log_z': True},
]


def made(device, kwargs):
    natural = reference.natural_for(Net.pretrained_cfg, 3, (SIDE, SIDE), device)
    return kwargs | ({'bridge': natural.bridge} if 'bridge' in kwargs else {})


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize('kwargs', TASKS, ids=lambda kwargs: ' '.join(map(str, kwargs.values())))
def test_steps_of_the_task_never_wait(one_rank, kwargs):
    expected = run_task('cpu', **made('cpu', kwargs))
    with far_device() as far:
        task = run_task('cuda', far=far, **made('cuda', kwargs))
        states = task.state_dict(), task.get_checkpoint_state(), task.get_checkpoint_state(ema=True)
        with pytest.raises(RuntimeError, match='No backend type'):
            dist.all_reduce(torch.zeros(2))
    assert all(torch.equal(v, expected.state_dict()[k]) for k, v in states[0].items())
    for ema, state in enumerate(states[1:]):
        (weights,) = (v for k, v in state.items() if k.startswith('state_dict'))
        (same,) = (v for k, v in expected.get_checkpoint_state(ema=bool(ema)).items() if k.startswith('state_dict'))
        assert all(torch.equal(v, same[k]) for k, v in weights.items())


class Started(TorchDispatchMode):
    """Counts the operators that a device has to start: all but views."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **kwargs or {})


def operators(make, half, step, **kwargs):
    """How many the forward and backward pass of one step issue."""
    with Started() as started, far_device():
        task = make(Net().to('cuda'), verbose=False, **kwargs)
        x, y = (t.to('cuda') for t in next(batches(1)))
        task(x, y)['loss'].backward()  # the first step makes what the others keep
        task.steps = step
        started.count = 0
        with torch.autocast('cuda', torch.bfloat16, enabled=half):
            loss = task(x, y)['loss']
        loss.backward()
    return started.count


@pytest.mark.parametrize('half', [False, True])
@pytest.mark.parametrize('step', [1, 150])
def test_a_generative_step_issues_few_operators_more_than_a_discriminative_one(half, step):
    """Each costs the host 10 to 20 microseconds, which a fast device waits for.

    log n, log Z of the batch, three for the ESS and one for the counts.
    """
    discriminative = operators(ClassificationTask, half, step)
    assert discriminative > 20  # control
    assert operators(GenerativeTask, half, step, phase='GG') <= discriminative + 6
    assert operators(GenerativeTask, half, step, phase='GG', queue=8) > discriminative + 6  # control


@pytest.mark.parametrize('how', ['loaded', 'moved', 'moved after loading'])
def test_a_task_goes_on_on_another_device(how):
    """And its validation model there; `device` was never stated."""
    kwargs = {'phase': 'GG', 'queue': 8}
    first = run_task('cpu', **kwargs)
    state, averaged = (first.get_task_state(ema=ema) for ema in (False, True))
    x = next(batches(1))[0]
    with far_device() as far:
        second = first if how == 'moved' else GenerativeTask(Net().to('cuda' if how == 'loaded' else 'cpu'), **kwargs)
        if how != 'moved':
            second.setup_ema(decay=0.5)
            second.load_task_state(state)
            second.load_task_state(averaged, ema=True)
        if how != 'loaded':
            second.to('cuda')
        assert second.device == torch.device('cuda:0')
        for ema in (False, True):
            assert second.get_eval_model(ema=ema)(x.to('cuda')).is_cuda
        run_task('cuda', second, far)
        assert second.steps == 10


# Commands


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    counts = {'train': [9] * 3, 'validation': [5] * 3}
    return draw_bars(tmp_path_factory.mktemp('images'), counts, noise=60, bar=180)


def command(*words):
    """Runs `gencnn` on a machine whose GPU is the emulated one."""

    def alone(args):
        args.distributed, args.rank, args.local_rank, args.world_size = False, 0, 0, 1
        return torch.device(args.device)

    with mock.patch.object(train.utils, 'init_distributed_device', alone), mock.patch.object(train, 'use_fast_kernels'):
        assert cli.main([str(word) for word in words]) == 0


def train_flags(images, out, *more):
    basics = 'train --model lenet --num-classes 3 -b 8 -j 0 --warmup-epochs 0 --lr 0.01 --phase GG+DG --gen-epochs 1'
    where = ['--data-dir', images, '--output', out, '--experiment', 'run']
    return [*basics.split(), *where, *more]


RUNS = [
    ['--data-on-device', '--color-jitter', '0', '--reprob', '0.5', '--mixup', '0.2', '--cutmix', '1', '--model-ema'],
    ['--pool-reference', '--pool-queue', '16', '--amp', '--amp-dtype', 'bfloat16', '--channels-last', '--opt', 'adamw'],
    [
        '--mixup',
        '0.5',
        '--mixup-mode',
        'elem',
        '--unlabeled-split',
        'validation',
        '--model-ema',
        '--model-ema-force-cpu',
    ],
]


def marked_far():
    """Files say which tensors were on the GPU, and a machine without one then cannot read them unless it says how."""
    return mock.patch('torch.serialization.location_tag', lambda s: 'cuda:0' if getattr(s, 'far', False) else 'cpu')


@pytest.mark.parametrize('more', RUNS, ids=lambda more: ' '.join(more[:2]))
def test_a_run_and_its_resumption(images, tmp_path, more):
    """From the CPU to the GPU and back: weights and records are those of a run on the CPU."""
    more = [*more, '--unlabeled-data-dir', images] if '--unlabeled-split' in more else more
    for epochs in '123':
        for run in ('near', 'far'):
            far = (run, epochs) in {('far', '1'), ('far', '2')}
            device = 'cuda' if far else 'cpu'
            flags = ['--epochs', epochs, '--sched', 'none', '--resume', 'auto', '--device', device]
            with far_device() if far else nullcontext(), marked_far():
                command(*train_flags(images, tmp_path / run, *more, *flags))
            path = tmp_path / run / 'run/last.pth.tar'
            if far:
                with pytest.raises(RuntimeError, match='deserialize object on a CUDA device'):
                    torch.load(path, weights_only=False)  # control
    near, back = (torch.load(tmp_path / run / 'run/last.pth.tar', weights_only=False) for run in ('near', 'far'))
    for name in near.keys() & {'state_dict', 'state_dict_ema'}:
        assert all(torch.equal(v, back[name][k]) for k, v in near[name].items())
    rows = [list(csv.reader((tmp_path / run / 'run/summary.csv').open())) for run in ('near', 'far')]
    assert rows[0] == rows[1]


def test_batches_made_on_the_device_do_not_wait(images, tmp_path, monkeypatch):
    """But for the first one, before which those of an epoch are drawn."""
    shuffled, seen = device_data.DeviceLoader._shuffled, []

    def patient_once(self):
        batches = shuffled(self)
        yield next(batches)
        with far.state(patient=False):
            seen.extend(batches)
        yield from seen

    monkeypatch.setattr(device_data.DeviceLoader, '_shuffled', patient_once)
    with far_device() as far:
        command(*train_flags(images, tmp_path, *RUNS[0], '--epochs', '1', '--device', 'cuda'))
    assert len(seen) == 2


def test_what_a_run_made_on_the_gpu_is_good_for(images, tmp_path, capsys, monkeypatch):
    """Validation, pictures, a gallery and a push, there and on a machine without a GPU, give the same."""
    with far_device(), marked_far():
        command(*train_flags(images, tmp_path, '--epochs', '2', '--device', 'cuda'))
    run, found = tmp_path / 'run', []
    for device in ('cuda', 'cpu'):
        out = tmp_path / device
        capsys.readouterr()
        with far_device() as far:
            second = ['--ood-data-dir', images, '--ood-split', 'train', '--log-z-split', 'train', '--noise', '0.1']
            checkpoint = ['-c', run / 'args.yaml', '--checkpoint', run / 'last.pth.tar', '-j', '0']
            command('validate', *checkpoint, *second, '--device', device)
            monkeypatch.setattr('torch.cuda.is_available', lambda device=device: device == 'cuda')
            command('visualize', run, '0', '1', '-n', '2', '--steps', '9', '--out', out / 'a.png')
            command('gallery', run, '--nodes', '0', 'conv1:0', '-n', '2', '--steps', '9', '--out', out / 'gallery')
            before = len(far.waits)
            command('push', run, 'me/net', '--dry-run', out / 'push', '--nodes', '0', '-n', '2', '--steps', '9')
            assert bool(len(far.waits) - before) == (device == 'cuda')  # pictures for the card
            assert bool(far.waits) == (device == 'cuda')
            monkeypatch.undo()
        lines = capsys.readouterr().out.splitlines()
        found.append([line for line in lines if line.startswith(('top1', 'nll', 'ece', 'auroc'))])
        found[-1] += [(out / 'push/model.safetensors').read_bytes()]
        found[-1] += [pixels_of(path) for path in sorted(out.rglob('*.png'))]
    assert len(found[0]) == 6 + 1 + 4
    assert found[0] == found[1]


def pixels_of(path: Path) -> bytes:
    return Image.open(path).tobytes()
