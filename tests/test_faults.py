"""What may go wrong in a run of `visualize`, and what it says then; the devices, files and progress around it."""

from __future__ import annotations

import json
import math
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from timm_gencnn import blocks, chains, cli, hmc, log_z
from timm_gencnn.networks import move, weights_digest
from timm_gencnn.node_lists import list_nodes
from timm_gencnn.nodes import receptive_field
from timm_gencnn.reference import White, squashed_normal
from timm_gencnn.samples import Samples, write_atomically
from timm_gencnn.sampling import LARGEST
from timm_gencnn.visualize import visualize


class Net(nn.Module):
    """Three classes, four channels, and whatever else around the logits."""

    def __init__(self, channels: int = 3, wrap: Any = lambda logits: logits):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(channels, 4, 3)
        self.head = nn.Linear(4, 3)
        self.wrap = wrap
        self.eval()

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.head(self.conv(x).relu().mean((2, 3))))


def quick(model: Any, node: Any, **kwargs: Any) -> Samples:
    return visualize(model, node, **{'n': 2, 'steps': 12, 'size': 16, 'progress': False} | kwargs)


# ---------------------------------------------------------------------------------------------------------------------
# Networks of all kinds


@pytest.mark.parametrize('channels', [1, 2, 3, 4, 5])
def test_images_of_any_number_of_channels(channels: int) -> None:
    images = quick(Net(channels), 1).images
    assert images.shape == (2, 3, 16, 16)
    grey = torch.equal(images[:, 0], images[:, 1])
    assert grey == (channels < 3)


@pytest.mark.parametrize(
    'wrap', [lambda t: {'logits': t, 'features': 2 * t}, lambda t: (t, 2 * t), lambda t: {'out': t}]
)
def test_dictionaries_and_tuples_are_drawn_as_their_logits_are(wrap: Any) -> None:
    assert torch.equal(quick(Net(wrap=wrap), 1).images, quick(Net(), 1).images)


def test_numbers_of_numpy_are_taken_as_pythons_own() -> None:
    numbers = {'n': 2, 'steps': 12, 'seed': 3, 'size': 16, 'frames': 1, 'temperature': 0.25, 'tilt': 2.0}
    expected = quick(Net(), 1, **numbers)
    samples = quick(Net(), 1, **{k: np.float32(v) if type(v) is float else np.int64(v) for k, v in numbers.items()})
    assert torch.equal(samples.images, expected.images)
    assert json.dumps(samples.settings) == json.dumps(expected.settings)
    for size in (np.int64(16), np.int64(16)), [torch.tensor(16)] * 2, torch.Size((16, 16)):
        assert torch.equal(quick(Net(), 1, **numbers | {'size': size}).images, expected.images)
    assert list_nodes(Net(), size=np.int64(16)) == list_nodes(Net(), size=16)
    small = {'n': 2, 'levels': 2, 'seed': 1, 'size': 16}
    estimates = [
        log_z(Net(), 1, progress=False, **{k: of(v) for k, v in small.items()}).log_z for of in (int, np.int64)
    ]
    assert estimates[0] == estimates[1]


@pytest.mark.parametrize('output', ['text', None, [1, 2], {'features': torch.ones(2, 3)}])
def test_a_model_that_returns_no_tensor_is_refused_but_for_its_layers(output: Any) -> None:
    model = Net(wrap=lambda logits: output)
    with pytest.raises(ValueError, match='not class logits: name a layer'):
        quick(model, 1)
    assert len(quick(model, 'conv:1')) == 2


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
@pytest.mark.parametrize('temperature', [None, 1.0])
def test_networks_of_another_floating_type(dtype: torch.dtype, temperature: float | None) -> None:
    images, expected = (quick(net, 1, temperature=temperature, steps=65).images for net in (Net().to(dtype), Net()))
    assert images.dtype == torch.float32
    assert (images - expected).abs().mean() < 0.02
    assert (images - images.flip(0)).abs().mean() > 0.05  # two chains are that far apart


def test_an_early_convolution_is_drawn_at_its_receptive_field() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 5, stride=2), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1))
    samples = visualize(model.eval(), '0:1', n=2, steps=8, progress=False)
    assert samples.images.shape == (2, 3, 8, 8)  # 5 and half of it, rounded up to the stride
    assert samples.settings['size'] == [8, 8]


@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize('temperature', [None, 1.0])
def test_pictures_are_the_same_where_gradients_are_off(mode: Any, temperature: float | None) -> None:
    model = Net()
    expected = quick(model, ['conv:1', 1], temperature=temperature, steps=65)
    with mode():
        samples = quick(model, ['conv:1', 1], temperature=temperature, steps=65)
    assert torch.equal(samples.images, expected.images)


def test_a_model_made_under_inference_mode_is_refused_and_left_as_it_was() -> None:
    with torch.inference_mode():
        model = Net()
    with pytest.raises(ValueError, match='outside of it'):
        quick(model, 1)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize('temperature', [None, 1.0])
def test_autocast_around_the_call_does_not_reach_the_score(temperature: float | None) -> None:
    model = Net()
    expected = quick(model, 1, temperature=temperature, steps=65)
    constant = log_z(model, 1, n=2, levels=3, size=16, progress=False)
    with torch.autocast('cpu', torch.bfloat16):
        samples = quick(model, 1, temperature=temperature, steps=65)
        assert torch.equal(log_z(model, 1, n=2, levels=3, size=16, progress=False).log_weights, constant.log_weights)
    assert torch.equal(samples.images, expected.images)
    assert torch.equal(samples.trace, expected.trace)


@pytest.mark.parametrize('name', ['test_vit', 'test_convnext'])
def test_a_network_that_was_trained_with_gradient_checkpointing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same pictures and log Z, without a second forward pass; the flags are as they were."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).eval()
    nodes = [1, 'stem:2' if name == 'test_convnext' else 'blocks.2.mlp.fc1:2']
    draw = lambda: visualize(model, nodes, n=1, steps=8, progress=False).images  # noqa: E731
    estimate = lambda: log_z(model, 1, n=2, levels=2, progress=False).log_z  # noqa: E731
    expected = draw(), estimate()
    model.set_grad_checkpointing(True)
    flags = [getattr(module, 'grad_checkpointing', None) for module in model.modules()]
    assert True in flags
    monkeypatch.setattr(torch.utils.checkpoint, 'checkpoint', None)
    torch.testing.assert_close(draw(), expected[0], atol=1e-3, rtol=0)
    assert estimate() == pytest.approx(expected[1], abs=1e-3)
    assert len(list_nodes(model)) > 5
    assert [getattr(module, 'grad_checkpointing', None) for module in model.modules()] == flags


class Extra(Net):
    """A network with an extra state that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.state: Any = {'scale': 1}

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        self.state = state


def test_an_extra_state_that_is_no_tensor_counts_as_weights() -> None:
    model = Extra()
    digests = [quick(model, 1).settings['weights'], quick(Extra(), 1).settings['weights']]
    model.state = {'scale': 2}
    digests.append(weights_digest(model))
    assert digests[0] == digests[1] != digests[2]


def test_the_weights_are_read_before_the_budget_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks.Run, 'run', lambda self: pytest.fail('sampled'))
    model = Extra()
    model.get_extra_state = lambda: 1 / 0  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        quick(model, 1)


@pytest.mark.parametrize('kwargs', [{}, {'preset': 'paper-lenet', 'steps': 900}])
def test_a_configuration_as_timms_own_object(kwargs: dict[str, Any]) -> None:
    model = timm.create_model('gencnn_lenet.vis_mnist', pretrained=True).eval()
    expected = quick(model, 3, **{'size': 28} | kwargs)
    fields = {k: v for k, v in model.pretrained_cfg.items() if k in timm.models.PretrainedCfg.__dataclass_fields__}
    model.pretrained_cfg = timm.models.PretrainedCfg(**fields)
    samples = quick(model, 3, **{'size': 28} | kwargs)
    assert torch.equal(samples.images, expected.images)
    assert samples.settings == expected.settings


# ---------------------------------------------------------------------------------------------------------------------
# Devices


def test_the_model_is_moved_where_it_is_asked_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def to(self: nn.Module, device: Any) -> nn.Module:
        asked.append(device)
        return self

    monkeypatch.setattr(Net, 'to', to)
    quick(Net(), 1)
    assert asked == []
    quick(Net(), 1, device='cpu')
    assert asked == ['cpu']


@pytest.mark.parametrize('temperature', [None, 1.0])
def test_the_default_device_of_torch_is_not_that_of_the_model(temperature: float | None) -> None:
    """Tensors of our own state their device: those of `torch.set_default_device` would be elsewhere, here nowhere."""
    model, nodes = Net(), [{'conv:1': 0.5}, 1]
    squashed_normal.cache_clear()
    with torch.device('meta'):
        samples = quick(model, nodes, temperature=temperature, steps=65)
        estimate = log_z(model, 1, n=2, levels=3, size=16, progress=False)
        field = receptive_field(model, 'conv', size=(16, 16))
    assert torch.equal(samples.images, quick(model, nodes, temperature=temperature, steps=65).images)
    assert estimate.log_z == log_z(model, 1, n=2, levels=3, size=16, progress=False).log_z
    assert field == (3, 3)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_the_default_dtype_of_torch_changes_nothing(dtype: torch.dtype) -> None:
    model = Net()
    exact = {'n': 4, 'steps': 200, 'temperature': 1.0}
    expected = quick(model, 1), quick(model, 1, **exact)
    torch.set_default_dtype(dtype)
    try:
        samples = quick(model, 1), quick(model, 1, **exact)
    finally:
        torch.set_default_dtype(torch.float32)
    for got, same in zip(samples, expected, strict=True):
        assert torch.equal(got.images, same.images)
    assert all(samples[1].diagnostics[k] == expected[1].diagnostics[k] for k in ('r_hat', 'ess'))


def test_a_device_without_numbers_is_refused_before_the_weights_are_lost() -> None:
    model = Net()
    with pytest.raises(ValueError, match="device 'meta' cannot be used, try 'cpu'"):
        quick(model, 1, device='meta')
    assert not model.head.weight.is_meta
    with pytest.raises(ValueError, match='no weights'):
        quick(Net().to('meta'), 1)


@pytest.mark.gpu
def test_the_cpus_model_runs_on_the_gpu() -> None:
    model = Net()
    assert quick(model, 1, device='cuda').images.device.type == 'cpu'
    assert model.head.weight.is_cuda
    move(model, 'cpu')
    assert not model.head.weight.is_cuda


def test_settings_of_a_reference_that_no_file_can_hold_are_refused_before_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Mine(White):
        def settings(self) -> dict[str, Any]:
            return super().settings() | {'scale': torch.ones(2)}

    monkeypatch.setattr(blocks.Run, 'run', lambda self: pytest.fail('sampled'))
    with pytest.raises(ValueError, match=r'numbers, strings and lists, for JSON.*Tensor'):
        quick(Net(), 1, reference=Mine((3, 16, 16)))


# ---------------------------------------------------------------------------------------------------------------------
# Scores that misbehave


class Spoilt:
    """The mean of the image, until the calls are up; from then on NaN for the images chosen."""

    def __init__(self, calls: int, chosen: slice = slice(None)):
        self.calls, self.chosen = calls, chosen
        self.__name__ = 'spoilt'

    def __call__(self, images: Tensor) -> Tensor:
        self.calls -= 1
        score = images.mean((1, 2, 3))
        if self.calls < 0:
            score = score.clone()
            score[self.chosen] *= float('nan')
        return score


@pytest.mark.parametrize('temperature', [None, 1.0])
@pytest.mark.parametrize(('chosen', 'count'), [(slice(None), 2), (slice(1), 1)])
def test_chains_that_cannot_move_are_no_picture_without_a_warning(
    temperature: float | None, chosen: slice, count: int, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match=f'{count} of 2 images are hardly more than noise') as caught:
        samples = quick(Net(), Spoilt(2, chosen), steps=80, temperature=temperature)
    assert samples.images.isfinite().all()
    assert caught[0].filename == __file__  # where the user called
    assert str(caught[0].message) in samples.settings['notes']
    assert sum(d > 0 for d in samples.diagnostics['divergences']) == count


@pytest.mark.filterwarnings('ignore:.*hardly more than noise')
@pytest.mark.parametrize('n', [1, 2, 4])
def test_chains_that_never_moved_are_told_so_also_when_read_back(n: int, tmp_path: Path) -> None:
    """R-hat was infinite, which JSON does not have, and more steps would not have helped."""
    samples = quick(Net(), Spoilt(2), n=n, steps=80, temperature=1)
    assert samples.verdict == 'exact sampling: not converged: the score never changed'
    path = samples.save(tmp_path / 'a.png')
    assert Samples.load(path).save(tmp_path / 'b.png').read_bytes() == path.read_bytes()


def test_a_few_refused_moves_are_counted_without_a_warning() -> None:
    calls = 0

    def now_and_then(images: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return images.mean((1, 2, 3)) * (float('nan') if calls % 7 == 0 else 1)

    with warnings.catch_warnings():
        warnings.simplefilter('error')
        samples = quick(Net(), now_and_then, steps=40)
    assert 4 <= samples.diagnostics['divergences'][0] <= 6
    assert samples.settings['notes'] == []


def test_not_finite_at_the_start_names_the_node() -> None:
    with pytest.raises(ValueError, match=r"'spoilt': the score or its gradient is not finite on the starting images"):
        quick(Net(), ['conv:1', Spoilt(1)])


def test_a_dead_node_among_others_is_named() -> None:
    def dead(images: Tensor) -> Tensor:
        return (images.mean((1, 2, 3)) - 1e6).relu()

    with (
        pytest.warns(UserWarning, match='2 of 6 starting images'),
        pytest.raises(ValueError, match=r"^'dead': the gradient"),
    ):
        quick(Net(), [1, dead, 'conv:1'])


@pytest.mark.parametrize('name', ['tilt', 'temperature'])
@pytest.mark.parametrize('value', [1e300, 1e-300, float('inf'), float('nan'), -1.0, 0, 'hot'])
def test_numbers_beyond_float32_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f'{name} must be a positive number, got .*from 1e-30 to 1e.30'):
        quick(Net(), 1, **{name: value})


@pytest.mark.parametrize('name', ['tilt', 'temperature'])
@pytest.mark.parametrize('value', [LARGEST, 1 / LARGEST])
def test_extreme_numbers_that_are_allowed_give_images_or_a_warning(name: str, value: float) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        samples = quick(Net(), 1, **{name: value})
    stuck = [2 * d > len(samples.trace) for d in samples.diagnostics['divergences']]
    assert any(stuck) == any('hardly more than noise' in str(w.message) for w in caught)
    assert samples.images.isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# Memory


@pytest.mark.parametrize(
    'error',
    [
        torch.OutOfMemoryError('CUDA out of memory'),
        RuntimeError('CUDA error: out of memory'),
        RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`'),
        RuntimeError('cuDNN error: CUDNN_STATUS_ALLOC_FAILED'),
    ],
)
def test_an_image_that_does_not_fit_alone_is_a_clear_error(
    error: RuntimeError, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hungry(score: hmc.Score, z: Tensor) -> Any:
        raise error

    monkeypatch.setattr(hmc, 'score_and_grad', hungry)
    with (
        pytest.warns(UserWarning, match='out of memory: starting again with 1 images') as caught,
        pytest.raises(ValueError, match='out of memory with one 16 x 16 image at a time: give a smaller size'),
    ):
        quick(Net(), 1)
    assert caught[0].filename == __file__


def test_other_errors_of_the_network_are_not_taken_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError('a bug')

    monkeypatch.setattr(chains, 'sample_gallery', broken)
    with pytest.raises(RuntimeError, match='a bug'):
        quick(Net(), 1)


# ---------------------------------------------------------------------------------------------------------------------
# Files, progress, Ctrl-C


def test_files_are_replaced_in_one_step(tmp_path: Path) -> None:
    """Whoever has the old file open keeps reading the old one, whole; a file written in place would change there."""
    path = tmp_path / 'x.png'
    write_atomically(path, b'old' * 1000)
    with path.open('rb') as reader:
        write_atomically(path, b'new')
        assert reader.read() == b'old' * 1000
    assert path.read_bytes() == b'new'
    assert list(tmp_path.iterdir()) == [path]


def test_threads_that_write_one_file_do_not_tear_it(tmp_path: Path) -> None:
    path, contents = tmp_path / 'x.html', [bytes([i]) * 300_000 for i in range(4)]
    write_atomically(path, contents[0])

    def write(data: bytes) -> list[bytes]:
        seen = []
        for _ in range(20):
            write_atomically(path, data)
            seen.append(path.read_bytes())
        return seen

    interval = sys.getswitchinterval()
    try:
        sys.setswitchinterval(1e-5)
        with ThreadPoolExecutor(len(contents)) as pool:
            seen = [data for some in pool.map(write, contents) for data in some]
    finally:
        sys.setswitchinterval(interval)
    assert all(data in contents for data in seen)
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / 'x.png'
    path.write_bytes(b'old')
    write = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        write(self, data[:1])
        raise OSError('No space left on device')

    monkeypatch.setattr(Path, 'write_bytes', full)
    with pytest.raises(OSError, match='No space'):
        write_atomically(path, b'new')
    assert path.read_bytes() == b'old'
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize('temperature', [None, 1.0])
def test_progress_bar_counts_gradients_and_shows_score_and_acceptance(
    temperature: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tqdm.auto

    bars = []

    class Bar(tqdm.auto.tqdm):
        def __init__(self, **kwargs: Any):
            bars.append(self)
            self.shown: list[dict[str, str]] = []
            super().__init__(**kwargs)

        def set_postfix(self, *args: Any, **kwargs: Any) -> None:
            self.shown.append(kwargs)

    clock = iter(range(10**6))
    monkeypatch.setattr(tqdm.auto, 'tqdm', Bar)
    monkeypatch.setattr(blocks.time, 'monotonic', lambda: next(clock))
    monkeypatch.setattr(blocks, 'PIXELS_PER_BATCH', 2 * 3 * 16 * 16)
    samples = quick(Net(), 1, n=3, steps=65, temperature=temperature, progress=True)
    (bar,) = bars
    assert bar.n == bar.total == 2 * 65  # two blocks: of two chains and of one
    assert len(bar.shown) > 10
    last = bar.shown[-1]
    assert float(last['score']) == pytest.approx(samples.trace[-1, 2].item(), abs=0.006)
    assert 0 <= float(last['acceptance']) <= 1 if temperature else 'acceptance' not in last
    monkeypatch.setattr(blocks.time, 'monotonic', lambda: 0)  # over before the bar was drawn once
    quick(Net(), 1, n=3, steps=65, temperature=temperature, progress=True)
    assert bars[-1].n == 2 * 65
    quick(Net(), 1)
    assert bars[-1].disable


def test_energy_errors_and_step_sizes_are_those_of_the_transitions(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    step = hmc.step

    def spy(state: hmc.State, score: hmc.Score, streams: hmc.Streams, step_size: Tensor, *args: Any, **kwargs: Any):
        state, info = step(state, score, streams, step_size, *args, **kwargs)
        seen.append((info, step_size))
        return state, info

    monkeypatch.setattr(hmc, 'step', spy)
    monkeypatch.setattr(hmc.Streams, 'uniform', lambda self, *_, dtype: torch.full((len(self),), 0.5, dtype=dtype))
    diagnostics = quick(Net(), 1, steps=81, temperature=1).diagnostics
    infos, sizes = zip(*seen[5:], strict=True)  # the second half of ten trajectories
    mean = lambda values: torch.stack(values).mean(0).tolist()  # noqa: E731
    assert diagnostics['energy_error'] == pytest.approx(mean([info.energy_error.abs() for info in infos]))
    assert diagnostics['acceptance'] == pytest.approx(mean([info.acceptance for info in infos]))
    assert diagnostics['step_size'] == pytest.approx(sizes[-1].tolist())  # times a random factor, here 1


def test_the_gallery_regime_claims_no_acceptance() -> None:
    diagnostics = quick(Net(), 1).diagnostics
    for name in 'acceptance', 'energy_error':
        assert all(math.isnan(value) for value in diagnostics[name])


def test_ctrl_c_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(chains, 'sample_gallery', interrupted)
    out = tmp_path / 'x.png'
    assert cli.main(['visualize', 'gencnn_lenet.vis_mnist', '3', '--steps', '8', '--out', str(out)]) == 130
    assert 'interrupted' in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []
