"""Images on the device: the law of their views, the batches against timm's, and runs of `gencnn train` with them."""

import csv
import math
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from pictures import SIZE, draw_bars
from PIL import Image
from scipy import stats
from sklearn.datasets import load_digits
from timm.data.transforms import RandomResizedCropAndInterpolation
from waits import NoWait, SyncError

from timm_gencnn import cli, device_data, loss, train, train_data
from timm_gencnn.config_file import ConfigParser
from timm_gencnn.train_args import add_arguments, check_arguments

DEVICES = ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)]

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def images(tmp_path_factory) -> Path:
    counts = {'train': [9] * 3, 'validation': [5] * 3}
    return draw_bars(tmp_path_factory.mktemp('images'), counts, noise=60, bar=180)


def flags(images: Path, out: Path, *more: str) -> list[str]:
    basics = '--data-on-device --model lenet --num-classes 3 -b 8 -j 0 --device cpu --color-jitter 0'
    basics += ' --epochs 3 --gen-epochs 1 --warmup-epochs 0 --lr 0.01'
    where = ['--data-dir', str(images), '--output', str(out), '--experiment', 'run']
    return ['train', *basics.split(), *where, *more]


def make_trainer(argv: list[str]) -> train.Trainer:
    parser = ConfigParser()
    add_arguments(parser)
    args = parser.parse_args(argv[1:])
    check_arguments(args)
    device = train.utils.init_distributed_device(args)
    return train.Trainer(args, device)


def noise(n: int, size: tuple[int, int], channels: int = 3) -> torch.Tensor:
    return torch.randint(256, (n, channels, *size), generator=torch.Generator().manual_seed(0)).float()


# Views


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('size', [(32, 32), (27, 43)])
def test_a_shift_is_an_exact_copy_of_pixels(size, device):
    """Every one of them, mirrored or not. Control: half a pixel is none."""
    image = noise(1, size)
    reach = [side // 8 for side in size]
    padded = np.pad(image[0].numpy(), [(0, 0), *((r, r) for r in reach)], mode='reflect')
    boxes, expected = [], []
    for y in range(-reach[0], reach[0] + 1):
        for x in range(-reach[1], reach[1] + 1):
            crop = padded[:, y + reach[0] :, x + reach[1] :][:, : size[0], : size[1]]
            boxes += [[y, x, *size], [y, x + size[1], size[0], -size[1]], [y + size[0], x, -size[0], size[1]]]
            expected += [crop, crop[:, :, ::-1], crop[:, ::-1]]
    boxes = torch.tensor(boxes, dtype=torch.float32, device=device)
    many = image.to(device).expand(len(boxes), -1, -1, -1)
    assert np.array_equal(device_data.views(many, boxes).cpu().numpy(), np.stack(expected))
    boxes[:, 1] += 0.5
    assert not np.array_equal(device_data.views(many, boxes).cpu().numpy(), np.stack(expected))


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('size', [(32, 32), (24, 40)])
def test_views_are_what_timm_crops_and_enlarges(size, device):
    """Against PIL on the same boxes, within one level (it computes in fixed point). Control: boxes a pixel off."""
    torch.manual_seed(0)
    images = noise(64, size)
    boxes = device_data.crops(64, size, (0.1, 1.0), (0.7, 1.4))
    expected = []
    for image, (top, left, height, width) in zip(images, boxes.int().tolist(), strict=True):
        pil = Image.fromarray(image.byte().permute(1, 2, 0).numpy())
        view = TF.resized_crop(pil, top, left, height, width, size, TF.InterpolationMode.BILINEAR)
        expected.append(torch.from_numpy(np.array(view)).permute(2, 0, 1).float())
    expected = torch.stack(expected)
    found = device_data.views(images.to(device), boxes.to(device)).cpu()
    assert (found - expected).abs().max() <= 1
    mirror = device_data.mirrored(boxes.clone(), 1.0, 1.0)
    assert (device_data.views(images.to(device), mirror.to(device)).cpu() - expected.flip(2, 3)).abs().max() <= 1
    boxes[:, 1] = torch.where(boxes[:, 1] > 0, boxes[:, 1] - 1, boxes[:, 1] + 1)
    assert (device_data.views(images.to(device), boxes.to(device)).cpu() - expected).abs().mean() > 10


def law_of_crops(size, scale, ratio, log=True, cells: int = 1500) -> dict[str, tuple[float, float]]:
    """Mean and variance of height, width and top edge, by the midpoint rule over the two uniform numbers."""
    height, width = size
    middles = (np.arange(cells) + 0.5) / cells
    area = height * width * (scale[0] + (scale[1] - scale[0]) * middles)[:, None]
    low, high = np.log(ratio) if log else ratio
    aspect = low + (high - low) * middles[None]
    aspect = np.exp(aspect) if log else aspect
    h, w = np.rint(np.sqrt(area / aspect)), np.rint(np.sqrt(area * aspect))
    fits = (h <= height) & (w <= width)
    missed = (1 - fits.mean()) ** 10  # then the central box: here the whole image
    h, w = (np.append(side[fits], whole) for side, whole in ((h, height), (w, width)))
    p = np.append(np.full(fits.sum(), (1 - missed) / fits.sum()), missed)
    laws = {}
    for name, side in (('height', h), ('width', w)):
        mean = p @ side
        laws[name] = mean, p @ (side - mean) ** 2
    room = height - h  # the top edge is uniform on 0, ..., room
    mean = p @ room / 2
    laws['top'] = mean, p @ (((room + 1) ** 2 - 1) / 12 + (room / 2 - mean) ** 2)
    return laws


def worst(boxes: torch.Tensor, laws: dict[str, tuple[float, float]]) -> float:
    """The most standard errors that a mean or a variance of the boxes is off."""
    scores = []
    top, _, height, width = boxes.double().numpy().T
    for name, values in (('top', top), ('height', height), ('width', width)):
        mean, variance = laws[name]
        squares = (values - mean) ** 2
        scores.append((values.mean() - mean) / math.sqrt(variance / len(values)))
        scores.append((squares.mean() - variance) / (squares.std() / math.sqrt(len(values))))
    return float(np.abs(scores).max())


@pytest.mark.parametrize(
    ('size', 'scale', 'ratio'),
    [((32, 32), (0.08, 1.0), (0.75, 4 / 3)), ((64, 64), (0.5, 1.0), (0.8, 1.25)), ((24, 40), (0.3, 1.0), (0.5, 2.0))],
)
def test_boxes_follow_the_law(size, scale, ratio):
    """The exact one, and timm's own draws do too. Controls: uniform side lengths or ratios do not."""
    n = 40_000
    torch.manual_seed(0)
    boxes = device_data.crops(n, size, scale, ratio)
    laws = law_of_crops(size, scale, ratio)
    assert worst(boxes, laws) < 4
    top, left, height, width = boxes.T
    for start, extent, side in ((top, height, size[0]), (left, width, size[1])):
        assert ((start >= 0) & (extent >= 1) & (start + extent <= side)).all()
        room = side - extent
        share = ((start + 0.5) / (room + 1))[room > 0]  # of mean a half, whatever the room
        assert abs(share.mean() - 0.5) < 4 * share.std() / math.sqrt(len(share))
        assert (start == room)[room > 0].any()
    draw = RandomResizedCropAndInterpolation.get_params
    blank = Image.new('L', size[::-1])
    train.utils.random_seed(0)
    timms = torch.tensor([draw(blank, scale, ratio) for _ in range(n)])
    assert worst(timms, laws) < 4
    assert worst(boxes, law_of_crops(size, scale, ratio, log=False)) > 5
    sides = torch.rand(n, 1) * (1 - scale[0] ** 0.5) + scale[0] ** 0.5
    assert worst(torch.cat([boxes[:, :2], (sides * torch.tensor(size)).round()], 1), laws) > 5


@pytest.mark.parametrize('size', [(10, 100), (100, 10), (30, 33)])
def test_boxes_that_cannot_fit_are_timms_central_one(size):
    scale, ratio = (1.5, 1.5), (0.75, 4 / 3)
    expected = RandomResizedCropAndInterpolation.get_params(Image.new('L', size[::-1]), scale, ratio)
    assert device_data.crops(2, size, scale, ratio).tolist() == [list(expected)] * 2


def test_shifts_and_mirrors_follow_the_law():
    torch.manual_seed(0)
    boxes = device_data.shifts(20_000, (32, 24))
    for axis, reach in ((0, 4), (1, 3)):
        counts = np.bincount(boxes[:, axis].int().numpy() + reach)
        assert len(counts) == 2 * reach + 1
        assert stats.chisquare(counts).pvalue > 1e-4
    assert stats.chisquare(np.bincount(boxes[:, 0].abs().int().numpy())).pvalue < 1e-4  # control: not uniform
    assert (boxes[:, 2:] == torch.tensor([32, 24])).all()
    turned = device_data.mirrored(boxes.clone(), 0.5, 0.1)[:, 2:] < 0
    for axis, p in ((0, 0.1), (1, 0.5)):
        assert stats.binomtest(int(turned[:, axis].sum()), 20_000, p).pvalue > 1e-4
    assert abs(np.corrcoef(turned.numpy().T)[0, 1]) < 0.03
    assert torch.equal(device_data.mirrored(boxes.clone(), 0.0, 0.0), boxes)


# Batches


def test_validation_is_exactly_that_of_timms_loader(images, tmp_path):
    """Images, targets and metrics, where they are resized and cut; so are training images without augmentation."""
    more = ['--img-size', '32', '--crop-pct', '0.8', '--interpolation', 'bicubic', '-vb', '7', '--no-aug']
    ours = make_trainer(flags(images, tmp_path, *more))
    theirs = make_trainer([a for a in flags(images, tmp_path, *more) if a != '--data-on-device'])
    theirs.task.load_state_dict(ours.task.state_dict())
    assert ours.eval_loader.images.dtype == torch.uint8
    assert len(ours.eval_loader) == len(theirs.eval_loader) == 3
    for a, b in zip(ours.eval_loader, theirs.eval_loader, strict=True):
        assert all(map(torch.equal, a, b))
    assert ours.validate(ema=False) == theirs.validate(ema=False)
    assert len(ours.loader) == len(theirs.loader) == 3  # 27 images in batches of 8
    known = {tuple(x.flatten().tolist()): int(y) for xs, ys in theirs.loader for x, y in zip(xs, ys, strict=True)}
    for _ in range(5):  # each pass leaves three other images out
        known |= {tuple(x.flatten().tolist()): int(y) for xs, ys in theirs.loader for x, y in zip(xs, ys, strict=True)}
    for xs, ys in ours.loader:
        assert [known[tuple(x.flatten().tolist())] for x in xs] == ys.tolist()


def test_an_epoch_shows_other_images_in_another_order(images, tmp_path):
    """Each at most once; the same at the same seed."""
    loader = make_trainer(flags(images, tmp_path, '--no-aug')).loader
    epochs = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        epochs.append(torch.cat([x for x, _ in loader]))
    assert len(epochs[0]) == 24
    assert len(epochs[0].unique(dim=0)) == 24
    assert torch.equal(epochs[0], epochs[2])
    assert not torch.equal(epochs[0], epochs[1])


def test_training_shows_the_views_that_are_drawn(images, tmp_path):
    """Of padded crops, each of its own image. Control: not of the next image."""
    pad = ['--train-crop-mode', 'pad', '--hflip', '0', '--mean', '0', '--std', '1']
    loader = make_trainer(flags(images, tmp_path, *pad)).loader
    padded = np.pad(loader.images.numpy(), [(0, 0), (0, 0), (3, 3), (3, 3)], mode='reflect')
    torch.manual_seed(0)
    order = torch.randperm(27)[:24]
    corners = device_data.shifts(24, (SIZE, SIZE))[:, :2].int() + 3
    torch.manual_seed(0)
    shown = torch.cat([x for x, _ in loader]).mul(255).round().numpy()
    for i, (y, x), view in zip(order, corners, shown, strict=True):
        crops = padded[..., y : y + SIZE, x : x + SIZE]
        assert np.array_equal(crops[i], view)
        assert not np.array_equal(crops[i - 1], view)


@pytest.mark.parametrize('mode', ['const', 'pixel'])
def test_erasing_and_mixup_are_timms(images, tmp_path, mode):
    argv = flags(images, tmp_path, '--no-aug')  # not under --no-aug, as in timm
    assert make_trainer([*argv, '--reprob', '1']).loader._erase is None
    more = ['--reprob', '1', '--remode', mode, '--recount', '2', '--mixup', '0.4', '--cutmix', '1', '--smoothing', '0']
    trainer = make_trainer(flags(images, tmp_path, *more, '--hflip', '0', '--train-crop-mode', 'pad'))
    erase = trainer.loader._erase
    assert (erase.probability, erase.mode, erase.max_count) == (1, mode, 2)
    plain = make_trainer(flags(images, tmp_path, '--hflip', '0', '--train-crop-mode', 'pad'))
    for seed in range(3):
        batches = []
        for loader in (trainer.loader, plain.loader):
            train.utils.random_seed(seed)
            batches.append(next(iter(loader))[0])
        changed = (batches[0] != batches[1]).flatten(1).float().mean(1)
        assert ((changed > 0.01) & (changed < 0.7)).all()
    _, y = trainer.mixup(*next(iter(trainer.loader)))
    assert y.shape == (8, 3)
    torch.testing.assert_close(y.sum(1), torch.ones(8))


# Runs


def last(run: Path) -> dict:
    return torch.load(run / 'last.pth.tar', weights_only=False)


def test_a_killed_run_goes_on_bit_equal(images, tmp_path, monkeypatch):
    """With all that draws random numbers. Control: another seed makes another run."""
    more = ['--reprob', '0.5', '--mixup', '0.2', '--cutmix', '1', '--scale', '0.5', '1', '--vflip', '0.5']
    more += ['--model-ema', '--unlabeled-data-dir', str(images), '--unlabeled-split', 'validation']
    assert cli.main(flags(images, tmp_path / 'a', *more)) == 0
    original = train.Trainer.train_one_epoch

    class Killed(BaseException):
        pass

    def dying(self, epoch):
        if epoch == 1:
            next(iter(self.loader))
            raise Killed
        return original(self, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, 'train_one_epoch', dying)
        with pytest.raises(Killed):
            cli.main(flags(images, tmp_path / 'b', *more))
    assert cli.main(flags(images, tmp_path / 'b', *more, '--resume', 'auto')) == 0
    assert cli.main(flags(images, tmp_path / 'c', *more, '--seed', '7')) == 0
    a, b, c = (last(tmp_path / x / 'run') for x in 'abc')
    for key in ('state_dict', 'state_dict_ema'):
        assert all(torch.equal(a[key][k], b[key][k]) for k in a[key])
        assert not all(torch.equal(a[key][k], c[key][k]) for k in a[key])
    assert (tmp_path / 'a/run/summary.csv').read_text() == (tmp_path / 'b/run/summary.csv').read_text()


@pytest.mark.parametrize('crop', [['--train-crop-mode', 'pad'], ['--scale', '0.6', '1']], ids=' '.join)
def test_training_on_digits_learns(tmp_path, crop):
    """A tenth of the digits are told wrong at most; nine tenths are before (chance)."""
    digits = load_digits()
    for i, (pixels, label) in enumerate(zip(digits.images[:1000], digits.target[:1000], strict=True)):
        folder = tmp_path / ('train' if i < 800 else 'validation') / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 255 / 16).astype(np.uint8)).save(folder / f'{i}.png')
    more = ['--num-classes', '10', '--img-size', '16', '--hflip', '0', '--smoothing', '0', '-b', '25', *crop]
    assert cli.main(flags(tmp_path, tmp_path, *more, '--epochs', '6', '--momentum', '0.9')) == 0
    rows = list(csv.DictReader((tmp_path / 'run/summary.csv').open()))
    assert float(rows[-1]['eval_top1']) > 90


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize(
    'more',
    [
        ['--no-aug', '--aa', 'rand-m4', '--mixup', '0.5', '--mixup-mode', 'elem', '--phase', 'GG'],
        ['--amp', '--amp-dtype', 'bfloat16', '--channels-last', '--reprob', '0.5', '--grad-accum-steps', '2'],
        ['--torchcompile', 'eager', '--model-ema', '--opt', 'muon', '--clip-grad', '1'],
        ['--val-split', '', '--no-prefetcher', '--cache-images', '--aa', '', '--train-crop-mode', 'pad'],
        ['--phase', 'GG', '--pool-reference', '--pool-queue', '16', '--hybrid', '0.5', '--lr', '1e-3', '-j', '1'],
    ],
    ids=lambda more: ' '.join(more[:2]),
)
def test_flags_work_together(images, tmp_path, more, device):
    assert cli.main(flags(images, tmp_path, '--epochs', '2', *more, '--device', device)) == 0
    row = list(csv.DictReader((tmp_path / 'run/summary.csv').open()))[-1]
    assert math.isfinite(float(row['train_loss']))
    assert all(v.isfinite().all() for v in last(tmp_path / 'run')['state_dict'].values())


MIX = ['--mixup', '0.2', '--cutmix', '1']
POOL = ['--pool-reference', '--pool-queue', '16']


def steps(images: Path, out: Path, guard, device: str, more: list[str], spy=lambda loss: None) -> None:
    """Training steps of one epoch but the first, which notes the ESS, inside `guard`."""
    more = [*more, '--reprob', '0.5', '--model-ema', '--amp', '--amp-dtype', 'bfloat16', '--channels-last']
    more += ['--opt', 'muon' if device == 'cuda' else 'momentum']  # muon reads its count of steps, which is on the CPU
    trainer = make_trainer(flags(images, out, *more, '--device', device))
    trainer.task.train()
    for i, (x, y) in enumerate(trainer.loader):
        if trainer.mixup is not None:
            x, y = trainer.mixup(x, y)
        with guard() if i else nullcontext():
            with trainer.autocast:
                value = trainer.task(x.contiguous(memory_format=torch.channels_last), y)['loss']
            trainer._backward(value, update=True)
            trainer.task.update_ema(step=i)
            spy(value)
    assert i == 2


PHASES = [['--phase', 'GG', *POOL], ['--phase', 'GG', *MIX], ['--phase', 'DG'], ['--phase', 'DG', *MIX]]


@pytest.mark.parametrize('more', PHASES, ids=lambda more: ' '.join(more[1:3]))
def test_no_step_waits_for_the_device(images, tmp_path, monkeypatch, more):
    for check in ('_check_logits', '_check_target'):  # on the CPU alone they look at the values
        monkeypatch.setattr(loss, check, lambda *args, **kwargs: None)
    steps(images, tmp_path, NoWait, 'cpu', more)
    with pytest.raises(AssertionError, match='waits for the device'):
        steps(images, tmp_path, NoWait, 'cpu', more, spy=lambda loss: loss.item())


def test_no_batch_waits_for_the_device(images, tmp_path):
    """Once an epoch's order and views are drawn."""
    loader = make_trainer(flags(images, tmp_path, '--reprob', '0.5', '--remode', 'pixel')).loader
    batches = iter(loader)
    next(batches)
    with NoWait():
        assert len(list(batches)) == 2
    with pytest.raises(AssertionError, match='waits for the device'), NoWait():
        next(iter(loader))  # control: drawing them looks at values, on the CPU


@pytest.mark.gpu
@pytest.mark.parametrize('more', PHASES, ids=lambda more: ' '.join(more[1:3]))
def test_cuda_is_never_waited_for(images, tmp_path, more):
    steps(images, tmp_path, SyncError, 'cuda', more)
    with pytest.raises(RuntimeError, match='synchronizing'):
        steps(images, tmp_path, SyncError, 'cuda', more, spy=lambda loss: loss.item())
    loader = make_trainer(flags(images, tmp_path, '--reprob', '0.5', '--device', 'cuda')).loader
    assert loader.images.is_cuda
    batches = iter(loader)
    next(batches)
    with SyncError():
        assert len(list(batches)) == 2


def test_images_on_the_device_are_not_cached_as_well(images, tmp_path, monkeypatch):
    monkeypatch.setattr(train_data, 'cached', lambda *args, **kwargs: pytest.fail('two copies'))
    make_trainer(flags(images, tmp_path, '--cache-images'))


# Faults


def failure(capsys, argv: list[str]) -> str:
    assert cli.main(argv) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ('more', 'message'),
    [
        (['--aa', 'rand-m4'], '--aa rand-m4 is not done on the device: leave it out, or leave out --data-on-device'),
        (['--color-jitter', '0.4'], '--color-jitter 0.4 is not done on the device: set it to 0, or'),
        (['--grayscale-prob', '0.1'], '--grayscale-prob 0.1 is not done on the device: set it to 0, or'),
        (['--gaussian-blur-prob', '0.1'], '--gaussian-blur-prob 0.1 is not done on the device: set it to 0, or'),
        (['--aug-repeats', '3'], '--aug-repeats 3.0 is not done on the device: set it to 0, or'),
        (['--train-crop-mode', 'rkrc'], '--train-crop-mode rkrc is not done on the device: set it to rrc or pad, or'),
        (['--train-interpolation', 'bicubic'], 'bicubic is not done on the device: set it to random or bilinear, or'),
        (['-b', '64'], '27 training images do not fill one batch of 64: lower --batch-size'),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else '',
)
def test_what_the_device_does_not_do_is_refused(images, tmp_path, capsys, more, message):
    assert message in failure(capsys, flags(images, tmp_path, *more))


def test_a_label_out_of_range_is_named_before_training(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_data, 'check_classes', lambda *_: None)
    message = failure(capsys, flags(images, tmp_path, '--num-classes', '2'))
    assert 'target 2 is outside [0, 2)' in message
    assert 'epoch' not in message


def test_several_processes_are_refused(images, tmp_path):
    parser = ConfigParser()
    add_arguments(parser)
    args = parser.parse_args(flags(images, tmp_path)[1:])
    args.distributed = True
    config = {'input_size': (1, SIZE, SIZE), 'interpolation': 'bilinear', 'mean': (0.0,), 'std': (1.0,)}
    with pytest.raises(ValueError, match='--data-on-device keeps all images on one device: leave it out'):
        train_data.train_loader(args, config, torch.device('cpu'), None)


def test_a_stream_of_images_and_no_images_are_refused():
    class Stream(torch.utils.data.IterableDataset):
        transform = None

        def __iter__(self):
            return iter(())

    nothing = torch.utils.data.TensorDataset(torch.empty(0))
    for data, message in (
        (Stream(), '--data-on-device needs a data set with an index, not Stream: leave it out'),
        (nothing, 'the data set has no training images'),
    ):
        source = torch.utils.data.DataLoader(data, batch_size=2)
        loader = device_data.PrefetchLoader(source, (0.5,), (0.5,), 1, torch.device('cpu'))
        with pytest.raises(ValueError, match=message):
            device_data.DeviceLoader(loader)


def test_too_little_memory_names_the_remedy():
    message = r'1099511627776 training images of 3x1024x1024 bytes need 3221225472\.0 GiB on cpu: lower --img-size, or'
    with pytest.raises(ValueError, match=message + ' leave out --data-on-device'):
        device_data._reserve(1 << 40, (3, 1024, 1024), torch.device('cpu'), 'training')


def test_colour_jitter_that_was_not_asked_for_is_left_out_and_said_so(images, tmp_path, caplog):
    """Elsewhere timm's default holds."""
    argv = flags(images, tmp_path)
    make_trainer(argv)
    assert not caplog.records
    at = argv.index('--color-jitter')
    del argv[at : at + 2]
    make_trainer(argv)
    assert 'does no colour jitter (else 0.4): --color-jitter 0 says that this is meant' in caplog.text
    caplog.clear()
    argv.remove('--data-on-device')
    transform = make_trainer(argv).loader.dataset.transform
    assert 'ColorJitter(brightness=(0.6, 1.4)' in str(transform)
    assert not caplog.records


def test_images_are_kept_as_they_are_seen_whole(tmp_path):
    """A larger one that is no square: its shorter side at the network's size, its middle."""
    rng = np.random.default_rng(0)
    for split in ('train', 'validation'):
        for label in range(2):
            folder = tmp_path / split / str(label)
            folder.mkdir(parents=True)
            Image.fromarray(rng.integers(0, 255, (40, 60), dtype=np.uint8)).save(folder / '0.png')
    trainer = make_trainer(flags(tmp_path, tmp_path, '--num-classes', '2', '-b', '2', '--img-size', '20'))
    image = Image.open(tmp_path / 'train/0/0.png').resize((30, 20), Image.Resampling.BICUBIC)
    assert np.array_equal(trainer.loader.images[0, 0].numpy(), np.asarray(image)[:, 5:25])
