"""The one-liner from model and node to Samples, on small networks with random weights and on the shipped LeNet."""

import json
import math
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from PIL import Image, PngImagePlugin
from torch import nn

import timm_gencnn
from timm_gencnn import blocks, cli, diagnostics, hmc, probes
from timm_gencnn.networks import frozen
from timm_gencnn.probes import Tap, exclusive, probe
from timm_gencnn.reference import Natural, White
from timm_gencnn.samples import Samples, read_metadata, verdict
from timm_gencnn.visualize import repeat_settings, visualize


class Linear(nn.Module):
    """Scores <w_c, x>: under the white reference p_c = N(w_c, I) exactly."""

    def __init__(self, classes=3, side=6):
        super().__init__()
        self.side = side
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(classes, side * side, generator=generator) / 3)
        self.pretrained_cfg = {'input_size': (1, side, side), 'mean': (0.5,), 'std': (0.25,), 'num_classes': classes}
        self.num_classes = classes

    def forward(self, x):
        return x.flatten(1) @ self.weight.T


@pytest.fixture(scope='module')
def linear():
    return Linear().eval()


@pytest.fixture(scope='module')
def lenet():
    torch.manual_seed(0)
    return timm.create_model('gencnn_lenet').eval()


def quick(model, node, **kwargs):
    return visualize(model, node, **{'n': 2, 'steps': 12, 'progress': False} | kwargs)


# Statistics


def test_exact_regime_samples_the_model(linear):
    """Class c under white noise is N(w_c, I): score mean |w_c|² and variance |w_c|², for each of three nodes."""
    samples = visualize(linear, [0, 1, 2], n=60, steps=1600, reference='white', temperature=1, progress=False)
    assert samples.settings['regime'] == 'exact'
    for c, scores in enumerate(samples.trace.split(60, dim=1)):
        norm2 = linear.weight[c].detach().square().sum().item()
        assert scores.mean().item() == pytest.approx(norm2, abs=4 * math.sqrt(norm2 / samples.diagnostics['ess']))
        assert scores.var().item() == pytest.approx(norm2, rel=0.12)
    assert samples.diagnostics['r_hat'] < 1.01
    assert samples.verdict.startswith('exact sampling: converged')


def test_low_temperature_ends_nearer_the_mode_than_the_exact_regime(linear):
    exact = visualize(linear, 0, n=20, steps=200, reference='white', temperature=1, progress=False)
    cold = visualize(linear, 0, n=20, steps=200, reference='white', temperature=0.01, tilt=1, progress=False)
    spread = lambda s: torch.tensor(s.diagnostics['score']).std()  # noqa: E731
    assert spread(cold) < 0.5 * spread(exact)


@pytest.mark.parametrize(
    ('kwargs', 'regime'),
    [
        ({}, 'gallery'),
        ({'temperature': 1}, 'exact'),
        ({'temperature': 1.0, 'tilt': 1.0}, 'exact'),
        ({'tilt': 1.0}, 'gallery'),
        ({'temperature': 1.0, 'tilt': 2.0}, 'gallery'),
        ({'temperature': 0.5, 'tilt': 1.0}, 'gallery'),
    ],
)
def test_the_regime_is_said_everywhere(linear, tmp_path, kwargs, regime):
    samples = quick(linear, 0, steps=70, **kwargs)
    assert samples.settings['regime'] == regime
    stated = read_metadata(samples.save(tmp_path / 'x.png'))
    assert stated['settings']['regime'] == regime
    assert ('not samples of the model at T = 1' in stated['verdict']) == (regime == 'gallery')
    with Image.open(tmp_path / 'x.png') as image:
        assert image.text['Description'].startswith(samples.verdict)


def test_each_chain_spends_exactly_its_budget_and_no_more_forwards(linear):
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1

    handle = linear.register_forward_hook(count)
    try:
        counts = []
        for steps in (20, 50):
            calls = 0
            assert quick(linear, 0, steps=steps).diagnostics['gradients'] == steps
            counts.append(calls)
    finally:
        handle.remove()
    assert counts[1] - counts[0] == 30  # what resolving the node and the final score cost does not grow


# Bookkeeping


@pytest.mark.parametrize('node', [3, 'conv1:7', 'conv2:4@2,5', '3 + 0.5*conv2:4', [1, 'conv2:4']])
def test_node_forms(lenet, node):
    samples = quick(lenet, node)
    nodes = len(node) if isinstance(node, list) else 1
    assert samples.images.shape[:2] == (2 * nodes, 3)
    assert 0 <= samples.images.min() <= samples.images.max() <= 1
    assert len(samples.nodes) == nodes


def test_class_by_name():
    model = timm.create_model('gencnn_test_resnet').eval()
    by_name, by_index = (quick(model, node, n=1, steps=8, size=64) for node in ('goldfish', 1))
    assert by_name.nodes == by_index.nodes == ['1 goldfish']
    assert torch.equal(by_name.images, by_index.images)


def test_seed_decides_the_pixels(lenet):
    a, b, c = (quick(lenet, 3, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(a.images, b.images)
    assert not torch.equal(a.images, c.images)
    assert not torch.equal(a.images[0], a.images[1])


def test_chunks_of_chains_give_the_pixels_of_one_batch(lenet, monkeypatch):
    whole = quick(lenet, [1, 2, 3], n=3, steps=8)
    for batch in (1, 2, 4):
        monkeypatch.setattr(blocks, 'PIXELS_PER_BATCH', batch * 28 * 28)
        parts = quick(lenet, [1, 2, 3], n=3, steps=8)
        assert torch.allclose(parts.images, whole.images, atol=1e-2)
        assert parts.diagnostics['score'] == pytest.approx(whole.diagnostics['score'], abs=1e-2)


def test_chunks_of_nodes_cost_no_further_probe(lenet, monkeypatch):
    probed = []
    monkeypatch.setattr(probes, 'probe', lambda *args, **kwargs: probed.append(args) or probe(*args, **kwargs))
    counts = []
    for batch in (6, 1):
        monkeypatch.setattr(blocks, 'PIXELS_PER_BATCH', batch * 28 * 28)
        quick(lenet, [1, 2, 'conv2:3'], steps=8)
        counts.append(len(probed))
    assert counts[1] == 2 * counts[0] > 0


@pytest.mark.parametrize('kwargs', [{'steps': 16}, {'steps': 65, 'temperature': 1.0}])
def test_chunks_with_dead_chains_give_the_pixels_of_one_batch(lenet, monkeypatch, kwargs):
    """Some chunks restart dead chains and some do not."""
    half_dead = lambda x: torch.relu(x[:, 0, 14, 14] + 0.35)  # noqa: E731, a pixel of at least 0.02
    with pytest.warns(UserWarning, match='dead unit'):
        whole = quick(lenet, [half_dead, 3], n=6, **kwargs)
    monkeypatch.setattr(blocks, 'PIXELS_PER_BATCH', 2 * 28 * 28)
    with pytest.warns(UserWarning, match='dead unit'):
        parts = quick(lenet, [half_dead, 3], n=6, **kwargs)
    assert torch.allclose(parts.images, whole.images, atol=1e-2)


def short_of_memory(score_and_grad):
    """The same with memory for two images."""

    def hungry(score, z):
        if len(z) > 2:
            raise torch.OutOfMemoryError('out of memory')
        return score_and_grad(score, z)

    return hungry


def test_out_of_memory_halves_the_batch_and_goes_on(lenet, monkeypatch):
    whole = quick(lenet, 3, n=8)
    monkeypatch.setattr(hmc, 'score_and_grad', short_of_memory(hmc.score_and_grad))
    with pytest.warns(UserWarning, match='with 2 images at a time'):
        parts = quick(lenet, 3, n=8)
    assert torch.allclose(parts.images, whole.images, atol=1e-2)


def test_out_of_memory_splits_the_nodes_of_an_early_convolution(lenet, monkeypatch):
    """Each part is resolved anew at their common size, which the model as a whole refuses."""
    nodes = ['conv1:0', 'conv1:1', 'conv1:2']
    whole = quick(lenet, nodes)
    assert whole.settings['size'] == [7, 7]
    monkeypatch.setattr(hmc, 'score_and_grad', short_of_memory(hmc.score_and_grad))
    with pytest.warns(UserWarning, match='images at a time'):
        parts = quick(lenet, nodes)
    assert torch.allclose(parts.images, whole.images, atol=1e-2)


def test_the_size_of_an_early_convolution_can_be_given_back(lenet):
    default, given = quick(lenet, 'conv1:3'), quick(lenet, 'conv1:3', size=7)
    assert torch.equal(given.images, default.images)
    assert given.settings == default.settings


def test_the_model_is_left_as_it_was(lenet):
    before = {k: v.clone() for k, v in lenet.state_dict().items()}
    lenet.fc2.bias.requires_grad_(False)
    quick(lenet, 3)
    assert all(torch.equal(v, before[k]) for k, v in lenet.state_dict().items())
    assert [n for n, p in lenet.named_parameters() if not p.requires_grad] == ['fc2.bias']
    assert all(p.grad is None for p in lenet.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lenet.modules())
    lenet.fc2.bias.requires_grad_(True)


def test_threads_that_share_a_model_take_turns(lenet):
    """The hooks of one ended the passes of another."""
    nodes = [3, 'conv2:5', 'conv1:2', lambda x: lenet(x)[:, 8]] * 2
    alone = [quick(lenet, node).images for node in nodes[:4]] * 2
    interval = sys.getswitchinterval()
    try:
        sys.setswitchinterval(1e-5)
        with ThreadPoolExecutor(len(nodes) + 2) as pool:
            lists = [pool.submit(timm_gencnn.list_nodes, lenet) for _ in range(2)]
            together = list(pool.map(lambda node: quick(lenet, node).images, nodes))
    finally:
        sys.setswitchinterval(interval)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert all(infos.result() == timm_gencnn.list_nodes(lenet) for infos in lists)
    assert all(p.requires_grad for p in lenet.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lenet.modules())


def test_threads_do_not_wait_for_each_other_for_ever(lenet):
    """One has the model and wants a second probe of it; another asked for its own second probe before."""
    held, asked = threading.Event(), threading.Event()
    one, other = probe(lenet, 1, (28, 28)), probe(lenet, 1, (28, 28))

    def hold():
        with exclusive(lenet):
            held.set()
            asked.wait()
            time.sleep(0.1)
            one.filled.read(Tap(''))

    def ask():
        held.wait()
        asked.set()
        other.filled.read(Tap(''))

    threads = [threading.Thread(target=target, daemon=True) for target in (hold, ask)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)


def test_parameters_are_frozen_inside_and_thawed_after_an_error(lenet):
    with frozen(lenet):
        assert not any(p.requires_grad for p in lenet.parameters())
    assert all(p.requires_grad for p in lenet.parameters())
    with pytest.raises(ValueError, match='not finite'):
        quick(lenet, lambda x: x.mean((1, 2, 3)) * math.nan)
    assert all(p.requires_grad for p in lenet.parameters())


def test_a_reference_of_ones_own(lenet):
    samples = quick(lenet, 3, reference=Natural((1, 28, 28), [0.5], [0.2], alpha=0.5))
    assert samples.settings['alpha'] == 0.5


def test_a_reference_whose_settings_do_not_name_it(tmp_path):
    """What the Hub's card and `--like` say of it."""

    class Mine(White):
        name = 'mine'

        def settings(self):
            return {'sigma': self.sigma}

    model = timm.create_model('test_resnet', num_classes=3).eval()
    samples = quick(model, 1, reference=Mine((3, 32, 32)))
    assert samples.settings['reference'] == 'mine'
    timm_gencnn.push_to_hub(model, 'user/repo', gallery=samples, dry_run=tmp_path / 'card')
    assert 'reference `mine` (sigma 1)' in (tmp_path / 'card' / 'README.md').read_text()
    with pytest.raises(ValueError, match="a reference of its own, 'mine': repeat it from Python"):
        repeat_settings(samples.save(tmp_path / 'a.png'))


@pytest.mark.parametrize('side', [28, 9])
def test_a_reference_of_ones_own_has_the_size(lenet, side):
    """Also for an early convolution, which has a smaller default."""
    samples = quick(lenet, 'conv1:3', reference=White((1, side, side)))
    assert samples.settings['size'] == [side, side]
    assert torch.equal(samples.images, quick(lenet, 'conv1:3', reference='white', size=side).images)


def test_white_reference_is_labelled(lenet):
    assert quick(lenet, 3, reference='white').settings['display'] == 'contrast stretched per image'


def test_half_precision_kicks_keep_the_accept_test_in_float32(lenet):
    """bfloat16 kicks change the path, not the law: scores of exact chains stay where float32's are."""
    full, half = (
        visualize(lenet, 3, n=8, steps=120, temperature=1, dtype=dtype, progress=False)
        for dtype in (None, torch.bfloat16)
    )
    assert half.trace.dtype == torch.float32
    spread = full.trace.std().item()
    assert abs(half.trace.mean() - full.trace.mean()).item() < spread
    assert min(half.diagnostics['acceptance']) > 0.3


# Samples


def test_png_carries_the_settings_that_repeat_it(lenet, tmp_path):
    samples = quick(lenet, [3, 5], steps=20)
    stated = read_metadata(samples.save(tmp_path / 'new' / 'x.png'))
    assert stated['settings'] == json.loads(json.dumps(samples.settings))
    assert stated['diagnostics']['gradients'] == 20
    assert list((tmp_path / 'new').iterdir()) == [tmp_path / 'new' / 'x.png']  # no partial file left


def test_animate(lenet, tmp_path):
    samples = quick(lenet, 3, steps=40, frames=5)
    assert samples.frames.shape == (5, 2, 3, 28, 28)
    for name in ('x.gif', 'x.webp'):
        with Image.open(samples.animate(tmp_path / name)) as film:
            assert film.n_frames == 5
    with pytest.raises(ValueError, match='kept no frames'):
        quick(lenet, 3).animate(tmp_path / 'y.gif')
    with pytest.raises(ValueError, match=r'\.gif or \.webp'):
        samples.animate(tmp_path / 'y.mp4')


def test_to_dataset(lenet):
    data = quick(lenet, [3, 5]).to_dataset()
    assert [row['node'] for row in data] == ['3', '3', '5', '5']
    assert data[0]['image'].size == (28, 28)
    assert json.loads(data[0]['settings'])['steps'] == 12
    assert json.loads(data[3]['diagnostics'])['gradients'] == 12


def test_grid_has_a_row_per_node_and_shows_in_a_notebook(lenet):
    samples = quick(lenet, [1, 2, 3])
    assert samples.grid(padding=0).size == (2 * 28, 3 * 28)
    assert samples._repr_png_().startswith(b'\x89PNG')
    assert quick(lenet, 1, n=9).grid(padding=0).size == (3 * 28, 3 * 28)


@pytest.mark.parametrize(
    ('nodes', 'n', 'columns', 'more'),
    [
        ([1, 2, 3], 2, None, {}),
        ([1, 2, 3], 2, 4, {}),  # a sheet with two places empty
        (7, 1, None, {}),  # a sheet of one image has no frame
        ('conv2:3', 5, None, {'temperature': 1.0, 'steps': 80, 'size': (30, 20)}),
    ],
)
def test_a_saved_picture_is_read_back_and_saved_as_the_same_file(lenet, tmp_path, nodes, n, columns, more):
    samples = quick(lenet, nodes, n=n, **more)
    samples.images = (torch.arange(samples.images.numel()) % 256).view(samples.images.shape) / 255  # every level
    path = samples.save(tmp_path / 'a.png', columns)
    loaded = Samples.load(path)
    assert torch.equal(loaded.images, samples.images)
    assert loaded.save(tmp_path / 'b.png', columns).read_bytes() == path.read_bytes()
    assert (loaded.nodes, loaded.verdict, loaded.summary()) == (samples.nodes, samples.verdict, samples.summary())
    assert ('acceptance' in loaded.summary()) == ('temperature' in more)  # exact; pictures have none
    assert loaded.to_dataset()['node'] == samples.to_dataset()['node']


def test_what_was_not_saved_is_not_read_back(lenet, tmp_path):
    def altered(samples, change, text=None):
        with Image.open(samples.save(tmp_path / 'a.png')) as image:
            info = PngImagePlugin.PngInfo()
            info.add_text('timm_gencnn', text or image.text['timm_gencnn'])
            change(image).save(tmp_path / 'altered.png', pnginfo=info)
        return tmp_path / 'altered.png'

    for samples in quick(lenet, [1, 2]), quick(lenet, 1, n=1):
        width, height = samples.grid().size
        for box in (0, 0, 20, 20), (0, 0, width, height - 1), (0, 0, 2 * width, 2 * height):
            with pytest.raises(ValueError, match=r'was cut or resized: it does not hold \d images of 28 x 28 px'):
                Samples.load(altered(samples, lambda image, box=box: image.crop(box)))
    with pytest.raises(ValueError, match='does not say what its images are'):
        Samples.load(altered(samples, lambda image: image, '{"settings": {"n": 2}}'))


def test_samples_show_themselves_in_a_line(lenet):
    samples = quick(lenet, [0, 1, 2, 3, 4])
    assert repr(samples) == (
        '<Samples: 10 images of 0, 1, 2 and 2 more, 28 x 28 px; gallery regime: not samples of the model at T = 1>'
    )


@pytest.mark.parametrize(('channels', 'shown'), [(1, ''), (2, 'the first, in grey'), (3, ''), (4, 'the first three')])
def test_channels_that_a_picture_leaves_out_are_noted(tmp_path, capsys, channels, shown):
    path = tmp_path / 'net.pth'
    torch.save(timm.create_model('test_resnet', in_chans=channels).state_dict(), path)
    argv = [
        'visualize',
        'test_resnet',
        '1',
        '-n',
        '1',
        '--steps',
        '8',
        '--size',
        '32',
        '--out',
        str(tmp_path / 'a.png'),
    ]
    assert cli.main([*argv, '--checkpoint', str(path), '--model-kwargs', f'in_chans={channels}']) == 0
    said = f'the network sees {channels} channels; pictures show {shown}'
    assert (said in capsys.readouterr().out) == bool(shown)
    assert any(said in note for note in read_metadata(tmp_path / 'a.png')['settings']['notes']) == bool(shown)


@pytest.mark.parametrize(
    ('args', 'words'),
    [
        (('exact', 1.002, 900.0), 'converged (R-hat 1.002, ESS 900)'),
        (('exact', 1.8, 900.0), 'not converged: R-hat 1.80, run longer'),
        (('exact', 1.0101, 900.0), 'not converged: R-hat 1.0101, run longer'),
        (('exact', math.nextafter(1.01, 2), 900.0), 'not converged: R-hat 1.0100000000000002, run longer'),
        (('exact', math.inf, 900.0), 'not converged: R-hat inf, run longer'),
        (('exact', 1.01, 400.0), 'converged (R-hat 1.010, ESS 400)'),
        (('exact', 1.002, 90.0), 'only 90 effective draws'),
        (('exact', 1.002, 399.9), 'only 399 effective draws'),
        (('exact', math.nan, math.nan), 'not converged'),
        (('gallery', math.nan, math.nan), 'not samples of the model at T = 1'),
    ],
)
def test_verdict(args, words):
    assert words in verdict(*args)


# Bad input


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        ({'n': 0}, 'n must be an integer >= 1, got 0'),
        ({'n': 2.5}, 'n must be'),
        ({'steps': -1}, 'steps must be'),
        ({'steps': 4}, 'too small for a picture'),
        ({'steps': 30, 'temperature': 1}, 'too small for exact sampling'),
        ({'temperature': 0}, 'temperature must be a positive number, got 0'),
        ({'temperature': math.nan}, 'temperature must be'),
        ({'tilt': -3.0}, 'tilt must be'),
        ({'seed': -1}, 'seed must be'),
        ({'frames': -1}, 'frames must be'),
        ({'reference': 'pink'}, "unknown reference 'pink'"),
        ({'reference': None}, 'unknown reference None'),
        ({'reference': White}, 'unknown reference <class'),
        ({'reference': White, 'size': 28}, 'unknown reference <class'),
        ({'reference': White((3, 28, 28))}, r'\(3, 28, 28\), the model takes \(1, 28, 28\)'),
        ({'reference': White((1, 8, 8))}, 'refuses 8 x 8 .*own size is 28 x 28'),
        ({'reference': White((1, 8, 8)), 'size': 28}, r'\(1, 8, 8\), the model takes \(1, 28, 28\)'),
        ({'size': 7}, '7'),
        ({'device': 'foo'}, "device 'foo' cannot be used"),
        ({'dtype': torch.float64}, 'dtype must be'),
        ({'dtype': 'bfloat16'}, 'dtype must be'),
    ],
)
def test_bad_numbers_are_refused_by_name(lenet, kwargs, message):
    with pytest.raises(ValueError, match=message):
        quick(lenet, 3, **kwargs)


@pytest.mark.parametrize(
    ('node', 'message'),
    [
        (10, '10'),
        (-1, '-1'),
        ('conv1:20', '20'),
        ('conv9:1', 'conv1'),
        ('conv1:3@99,0', '99'),
        ([], 'empty'),
        (lambda x: x.mean(), 'must return a tensor'),
    ],
)
def test_bad_nodes_are_refused(lenet, node, message):
    with pytest.raises(ValueError, match=message):
        quick(lenet, node)


@pytest.mark.parametrize('order', [(1.001, math.nan), (math.nan, 1.001)])
def test_a_frozen_node_is_not_hidden_by_a_good_one(linear, monkeypatch, order):
    """NaN diagnostics of any node reach the verdict, whatever its place in the list."""
    r_hats, sizes = iter(order), iter(1000 * v for v in order)
    monkeypatch.setattr(diagnostics, 'r_hat', lambda draws: next(r_hats))
    monkeypatch.setattr(diagnostics, 'bulk_ess', lambda draws: next(sizes))
    samples = visualize(linear, [0, 1], n=2, steps=70, temperature=1, progress=False)
    assert math.isnan(samples.diagnostics['r_hat'])
    assert math.isnan(samples.diagnostics['ess'])
    assert 'not converged' in samples.verdict


def test_model_must_be_a_module():
    with pytest.raises(ValueError, match='got NoneType'):
        quick(None, 3)


def test_explicit_tilt_and_temperature_are_used(lenet):
    assert quick(lenet, 3, tilt=7.0).diagnostics['tilt'] == [7.0, 7.0]
    assert len(set(quick(lenet, 3).diagnostics['tilt'])) == 2  # automatic: each chain its own
    warm, cold = (quick(lenet, 3, n=8, steps=60, temperature=t, tilt=1.5) for t in (0.5, 0.005))
    roughness = lambda s: s.images.diff(dim=-1).abs().mean()  # noqa: E731
    assert roughness(warm) > 1.3 * roughness(cold)


@pytest.mark.parametrize(('temperature', 'inside'), [(1, True), (None, False)])
def test_dtype_reaches_the_kicks_and_never_the_accept_test(lenet, temperature, inside):
    """Under autocast a convolution's output is bfloat16; the score that is accepted on stays float32."""
    seen = []
    handle = lenet.conv1.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    try:
        quick(lenet, 3, steps=70, temperature=temperature, dtype=torch.bfloat16)
    finally:
        handle.remove()
    rough, exact = seen.count(torch.bfloat16), seen.count(torch.float32)
    if inside:  # 8 trajectories of 8 steps: 7 rough kicks and 1 exact gradient each
        assert rough == 56
        assert exact >= 9
    else:
        assert rough == 69


@pytest.mark.parametrize(('frames', 'temperature'), [(1, 1), (5, 1), (5, None)])
def test_frames_end_with_the_final_images(lenet, frames, temperature):
    samples = quick(lenet, 3, steps=80, frames=frames, temperature=temperature)
    assert len(samples.frames) == frames
    assert torch.equal(samples.frames[-1], samples.images)


def test_train_mode_is_refused(lenet):
    lenet.train()
    try:
        with pytest.raises(ValueError, match='eval'):
            quick(lenet, 3)
    finally:
        lenet.eval()


def test_weights_with_nan_are_refused():
    model = Linear().eval()
    with torch.no_grad():
        model.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match='finite'):
        quick(model, 0)


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('gencnn_lenett', 'did you mean .*gencnn_lenet'),
        ('gencnn_lenet.nonsense', 'no pretrained weights'),
        ('gencnn_zfnet', 'no pretrained weights'),
    ],
)
def test_unknown_and_untrained_models_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        quick(name, 0)


def test_only_pngs_of_ours_can_be_repeated(tmp_path):
    Image.new('RGB', (4, 4)).save(tmp_path / 'plain.png')
    (tmp_path / 'broken.png').write_bytes(b'\x89PNG nonsense')
    for name, message in [('plain.png', 'carries no settings'), ('broken.png', 'cannot read'), ('none.png', 'cannot')]:
        with pytest.raises(ValueError, match=message):
            read_metadata(tmp_path / name)


# The shipped checkpoint


def test_one_line_from_a_name():
    samples = timm_gencnn.visualize('gencnn_lenet.vis_mnist', 3, n=2, steps=60, progress=False)
    assert isinstance(samples, Samples)
    model = timm.create_model('gencnn_lenet.vis_mnist', pretrained=True).eval()
    logits = model((samples.images[:, :1] - 0.1307) / 0.3081)
    assert (logits.argmax(1) == 3).all()
