"""`gencnn train` from end to end on a folder of small pictures: files, resume, faults, flags."""

import argparse
import csv
import errno
import importlib.machinery
import importlib.util
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import timm.utils.summary
import torch
import torch.multiprocessing as mp
import yaml
from pictures import SIZE, draw_bars, write_wide_image
from PIL import Image
from ranks import assert_no_gloo_thread, become_rank, unused_port
from safetensors.torch import load_file
from timm.data import resolve_input_data_config
from timm.loss import create_classification_loss
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.utils import natural_key
from torchvision.transforms.functional import pil_to_tensor

from timm_gencnn import checkpoints, cli, task, train, train_args, train_data, validate
from timm_gencnn.config_file import RECIPES, ConfigParser
from timm_gencnn.samples import read_metadata
from timm_gencnn.schedule import InvLRScheduler, PhaseSchedule
from timm_gencnn.train_args import add_arguments

CLASSES = 3

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def images(tmp_path_factory) -> Path:
    """Three classes of pictures, each a bar at its own place in noise: 16 a class for training, 4 for validation."""
    counts = {'train': [16] * CLASSES, 'validation': [4] * CLASSES}
    return draw_bars(tmp_path_factory.mktemp('images'), counts, noise=60, bar=180)


def flags(images: Path, out: Path, *more: str) -> list[str]:
    basics = '--model lenet --num-classes 3 -b 8 -j 0 --device cpu'
    basics += ' --epochs 4 --gen-epochs 2 --warmup-epochs 0 --lr 0.01 --momentum 0.5'
    where = ['--data-dir', str(images), '--output', str(out), '--experiment', 'run']
    return ['train', *basics.split(), *where, *more]


def parse(argv: list[str]) -> argparse.Namespace:
    parser = ConfigParser()
    add_arguments(parser)
    return parser.parse_args(argv[1:])


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=False)['state_dict']


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# With augmentation, a discriminative learning rate, EMA and recovery checkpoints: all that a resume must restore.
FULL = ['--disc-lr', '0.004', '--model-ema', '--model-ema-decay', '0.9', '--sched-on-updates', '--scale', '0.5', '1.0']


@pytest.fixture(scope='module')
def straight(images, tmp_path_factory) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp('straight')
    assert cli.main(flags(images, out, *FULL)) == 0
    return out / 'run'


@pytest.mark.parametrize('where', [[], ['--cache-images'], ['--data-on-device', '--color-jitter', '0']])
def test_a_run_ends_with_the_command_that_shows_what_it_learned(where, images, tmp_path, capsys, monkeypatch):
    run = tmp_path / 'my runs'
    assert cli.main(flags(images, run, '--epochs', '1', '--phase', 'DG', *where)) == 0
    command = shlex.split(capsys.readouterr().out.splitlines()[-1].removeprefix('to see what it learned: '))
    assert command == ['gencnn', 'visualize', f'{run}/run', '0', '1', '2']
    monkeypatch.chdir(tmp_path)
    assert cli.main([*command[1:], '-n', '1', '--steps', '8']) == 0
    assert read_metadata('samples.png')['nodes'] == ['0 class0', '1 class1', '2 class2']


def test_that_command_tells_a_run_from_a_model_of_its_name(images, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = flags(images, tmp_path, '--epochs', '1', '--phase', 'DG', '--output', '.', '--experiment', 'lenet')
    assert cli.main(argv) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith('gencnn visualize ./lenet 0 1 2')


def test_writes_what_timm_writes(straight):
    names = {p.name for p in straight.iterdir()}
    assert {'summary.csv', 'args.yaml', 'last.pth.tar', 'model_best.pth.tar', 'checkpoint-3.pth.tar'} <= names
    rows = list(csv.DictReader((straight / 'summary.csv').open()))
    assert [row['epoch'] for row in rows] == list('0123')
    assert [row['train_phase'] for row in rows] == ['GG', 'GG', 'DG', 'DG']
    assert float(rows[-1]['eval_top1']) > 60
    assert float(rows[0]['lr']) > 0.005
    assert float(rows[2]['lr']) < 0.005
    assert yaml.safe_load((straight / 'args.yaml').read_text())['gen_epochs'] == 2
    checkpoint = torch.load(straight / 'last.pth.tar', weights_only=False)
    assert checkpoint['task_state']['switch_step'] == 12
    assert 'state_dict_ema' in checkpoint


class Killed(BaseException):
    """Stands for kill -9: nothing may catch it."""


def kill_at(monkeypatch, call: int, where: str) -> None:
    original, calls = getattr(train.Trainer, where), [0]

    def dying(self, *args, **kwargs):
        calls[0] += 1
        if calls[0] == call:
            raise Killed
        return original(self, *args, **kwargs)

    monkeypatch.setattr(train.Trainer, where, dying)


@pytest.mark.parametrize(
    ('call', 'where'),
    [(3, 'train_one_epoch'), (9, '_backward'), (14, '_backward'), (4, 'train_one_epoch'), (2, '_finish_epoch')],
    ids=['at the switch', 'in the generative phase', 'after the switch', 'in the discriminative phase', 'unsaved'],
)
def test_a_killed_run_goes_on_bit_equal(images, straight, tmp_path, monkeypatch, call, where):
    with monkeypatch.context() as patch:
        kill_at(patch, call, where)
        with pytest.raises(Killed):
            cli.main(flags(images, tmp_path, *FULL))
    assert cli.main(flags(images, tmp_path, *FULL, '--resume', 'auto')) == 0
    a, b = (torch.load(d / 'last.pth.tar', weights_only=False) for d in (straight, tmp_path / 'run'))
    assert same(a['state_dict'], b['state_dict'])
    assert same(a['state_dict_ema'], b['state_dict_ema'])
    assert a['task_state']['ess_history'] == b['task_state']['ess_history']
    assert torch.equal(a['task_state']['log_z'], b['task_state']['log_z'])
    assert (straight / 'summary.csv').read_text() == (tmp_path / 'run/summary.csv').read_text()


def rows(run: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((run / 'summary.csv').open()))


@pytest.mark.parametrize('epoch', [1, 3])
def test_another_batch_size_changes_neither_switch_nor_schedule(images, straight, tmp_path, monkeypatch, epoch):
    with monkeypatch.context() as patch:
        kill_at(patch, epoch + 1, 'train_one_epoch')
        with pytest.raises(Killed):
            cli.main(flags(images, tmp_path, *FULL))
    assert cli.main(flags(images, tmp_path, *FULL, '--resume', 'auto', '-b', '16')) == 0
    for a, b in zip(rows(straight), rows(tmp_path / 'run'), strict=True):
        assert a['train_phase'] == b['train_phase']
        assert float(a['lr']) == pytest.approx(float(b['lr']))


def test_the_switch_of_a_checkpoint_of_0_1_0_is_found(images, straight, tmp_path, monkeypatch):
    path = tmp_path / 'old.pth.tar'
    checkpoint = torch.load(straight / 'checkpoint-2.pth.tar', weights_only=False)
    assert checkpoint['task_state'].pop('switch_epoch') == 2
    torch.save(checkpoint, path)
    assert cli.main(flags(images, tmp_path, *FULL, '--resume', str(path))) == 0
    assert same(weights(tmp_path / 'run/last.pth.tar'), weights(straight / 'last.pth.tar'))


def test_the_switch_is_counted_from_the_first_epoch(images, tmp_path):
    assert cli.main(flags(images, tmp_path, '--start-epoch', '2', '--epochs', '6', '--gen-epochs', '3')) == 0
    assert [row['epoch'] + row['train_phase'] for row in rows(tmp_path / 'run')] == ['2GG', '3DG', '4DG', '5DG']


@pytest.mark.parametrize(
    ('lr', 'switch', 'phases'),
    [('1e-6', 11, 'GG DG DG DG'), ('1e-3', None, 'GG GG GG GG')],
    ids=['the ESS stays', 'the ESS keeps falling'],
)
def test_the_phase_switches_by_itself_on_a_plateau_of_the_ess(images, tmp_path, monkeypatch, lr, switch, phases):
    """With a record a step, ten of which make a plateau: after 11 of the 24 steps, or never."""
    monkeypatch.setattr(task, 'RECORD_EVERY', 1)
    more = ['--phase', 'GG+DG', '--switch-ess', 'plateau', '--lr', lr, '--disc-lr', '0.01', '--no-aug']
    argv = flags(images, tmp_path, *more)
    gen_epochs = argv.index('--gen-epochs')
    del argv[gen_epochs : gen_epochs + 2]
    assert cli.main(argv) == 0
    state = torch.load(tmp_path / 'run/last.pth.tar', weights_only=False)['task_state']
    assert [row['train_phase'] for row in rows(tmp_path / 'run')] == phases.split()
    assert state['switch_step'] == switch
    history = state['ess_history']
    assert len(history) == (switch or 24)
    assert (min(history[-10:]) > 0.99 * min(history[:-10])) == (switch is not None)
    assert (float(rows(tmp_path / 'run')[2]['lr']) > 1e-3) == (switch is not None)  # the discriminative rate


def test_a_truncated_last_checkpoint_falls_back(images, straight, tmp_path, caplog):
    shutil.copytree(straight, tmp_path / 'run')  # copies, where the run has hard links
    for name in ('last', 'checkpoint-3'):
        path = tmp_path / f'run/{name}.pth.tar'
        path.write_bytes(path.read_bytes()[:-2000])
    assert checkpoints.find_checkpoint(tmp_path / 'run').name == 'checkpoint-2.pth.tar'
    assert 'last.pth.tar cannot be read' in caplog.text
    assert cli.main(flags(images, tmp_path, *FULL, '--resume', 'auto')) == 0
    assert same(weights(tmp_path / 'run/last.pth.tar'), weights(straight / 'last.pth.tar'))


@pytest.mark.parametrize(('epoch', 'phases'), [(1, 'GG GG GG DG'), (2, 'GG GG DG DG'), (3, 'GG GG DG DG')])
def test_an_epoch_that_was_cut_short_is_repeated(images, tmp_path, monkeypatch, epoch, phases):
    """The switch is at the end of epoch 2, in the middle of it (before the kill), or long ago."""
    argv = flags(images, tmp_path, *FULL, '--recovery-interval', '2')
    argv += ['--gen-epochs', {1: '3', 2: '2.5', 3: '2'}[epoch]]
    with monkeypatch.context() as patch:
        kill_at(patch, 6 * epoch + 5, '_backward')
        with pytest.raises(Killed):
            cli.main(argv)
    steps = []
    monkeypatch.setattr(PhaseSchedule, 'step_update', lambda self, n: steps.append(n - self.first_update))
    assert cli.main([*argv, '--resume', f'{tmp_path}/run/recovery-{epoch}-3.pth.tar']) == 0
    assert [row['epoch'] for row in rows(tmp_path / 'run')] == list('0123')
    assert [row['train_phase'] for row in rows(tmp_path / 'run')] == phases.split()
    assert min(steps) >= 0  # a schedule does not start before its phase
    state = torch.load(tmp_path / 'run/last.pth.tar', weights_only=False)
    assert state['epoch'] == 3
    assert state['task_state']['steps'] == 24 + 4  # every epoch whole, and the four steps before the kill
    assert state['task_state']['switch_epoch'] == {1: 3, 2: 2, 3: 2}[epoch]


def test_the_newest_recovery_checkpoint_is_found(straight, tmp_path):
    for batch in (3, 5, 10):
        shutil.copy(straight / 'checkpoint-2.pth.tar', tmp_path / f'recovery-2-{batch}.pth.tar')
        assert checkpoints.find_checkpoint(tmp_path).name == f'recovery-2-{batch}.pth.tar'
    shutil.copy(straight / 'checkpoint-2.pth.tar', tmp_path)
    assert checkpoints.find_checkpoint(tmp_path).name == 'checkpoint-2.pth.tar'


def test_a_finished_run_says_that_there_is_nothing_to_train(images, straight, tmp_path, capsys):
    shutil.copytree(straight, tmp_path / 'run')
    assert cli.main(flags(images, tmp_path, *FULL, '--resume', 'auto')) == 0
    assert capsys.readouterr().out == 'nothing to train: 4 of 4 epochs are done, give a larger --epochs to go on\n'
    for name in ('summary.csv', 'last.pth.tar'):
        assert (tmp_path / 'run' / name).read_bytes() == (straight / name).read_bytes()
    assert cli.main(flags(images, tmp_path, *FULL, '--resume', 'auto', '--epochs', '5')) == 0
    printed = capsys.readouterr().out
    assert 'epoch   4  DG' in printed
    assert 'nothing to train' not in printed


def test_resume_auto_starts_afresh_where_there_is_nothing(images, tmp_path):
    assert cli.main(flags(images, tmp_path, '--epochs', '1', '--resume', 'auto')) == 0
    assert (tmp_path / 'run/last.pth.tar').exists()


@pytest.mark.slow
def test_kill_minus_9(images, straight, tmp_path):
    argv = flags(images, tmp_path, *FULL)
    process = subprocess.Popen([sys.executable, '-m', 'timm_gencnn.cli', *argv])
    while not (tmp_path / 'run/checkpoint-1.pth.tar').exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert cli.main([*argv, '--resume', 'auto']) == 0
    assert same(weights(tmp_path / 'run/last.pth.tar'), weights(straight / 'last.pth.tar'))


# Faults


def failure(capsys, argv: list[str]) -> str:
    assert cli.main(argv) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith('gencnn train: error:')
    return error


def explode_at(monkeypatch, call: int) -> None:
    """An update after which no weight is a number."""
    original, calls = train.Trainer._backward, [0]

    def explode(self, loss, update):
        original(self, loss, update)
        calls[0] += 1
        if calls[0] == call:
            for p in self.task.parameters():
                p.data.fill_(math.nan)

    monkeypatch.setattr(train.Trainer, '_backward', explode)


@pytest.mark.parametrize('phase', ['GG', 'DG'])
def test_a_loss_that_is_not_finite_names_step_batch_and_checkpoint(images, tmp_path, capsys, monkeypatch, phase):
    explode_at(monkeypatch, 8)  # the second update of the second epoch
    error = failure(capsys, flags(images, tmp_path, '--phase', phase))
    assert 'epoch 1, batch 2, step' in error
    assert 'finite' in error or 'NaN' in error
    assert 'last.pth.tar' in error or 'checkpoint-0.pth.tar' in error
    assert checkpoints.find_checkpoint(tmp_path / 'run') is not None


@pytest.mark.parametrize(
    ('call', 'interval', 'kept'), [(10, '2', 'recovery-1-1'), (12, '5', 'recovery-1-4')], ids=['recovery', 'epoch']
)
def test_weights_that_are_not_finite_are_not_saved(images, tmp_path, capsys, monkeypatch, call, interval, kept):
    explode_at(monkeypatch, call)  # right before a checkpoint of the second epoch
    error = failure(capsys, flags(images, tmp_path, '--phase', 'DG', '--recovery-interval', interval))
    assert 'not finite' in error
    assert error.endswith(f'{kept}.pth.tar')
    for path in (tmp_path / 'run').glob('*.pth.tar'):
        assert all(v.isfinite().all() for v in weights(path).values())


@pytest.mark.parametrize(
    ('more', 'what', 'kept', 'unfinished'),
    [
        ([], 'the checkpoint of epoch 1', 'checkpoint-0', 'tmp'),
        (['--recovery-interval', '2'], 'the recovery checkpoint of epoch 0, batch 3', 'recovery-0-1', 'recovery_tmp'),
    ],
)
def test_a_full_disk_loses_nothing(images, tmp_path, capsys, monkeypatch, more, what, kept, unfinished):
    save, calls = torch.save, [0]

    def full(state, path):
        calls[0] += 1
        if calls[0] == 2:
            Path(path).write_bytes(b'half')
            raise RuntimeError('PytorchStreamWriter failed writing file data/0: file write failed')
        save(state, path)

    monkeypatch.setattr(torch, 'save', full)
    error = failure(capsys, flags(images, tmp_path, *more))
    assert f'cannot write {what}' in error
    assert f'the last good checkpoint is {tmp_path}/run/{kept}.pth.tar; make room' in error
    assert not (tmp_path / f'run/{unfinished}.pth.tar').exists()
    assert torch.load(tmp_path / f'run/{kept}.pth.tar', weights_only=False)['epoch'] == 0


@pytest.mark.parametrize(
    ('epoch', 'torn', 'kept'),
    [(0, 'epoch,tra', 'no checkpoint was written yet'), (2, '2,0.3', 'the last good checkpoint is {}/checkpoint-1')],
)
def test_a_full_disk_leaves_no_half_row_in_the_summary(
    images, straight, tmp_path, capsys, monkeypatch, epoch, torn, kept
):
    update = timm.utils.update_summary

    def full(at: int, train_metrics, eval_metrics, filename: str, **kwargs) -> None:
        if at < epoch:
            return update(at, train_metrics, eval_metrics, filename, **kwargs)
        with open(filename, 'a') as file:
            file.write(torn)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(train.utils, 'update_summary', full)
        error = failure(capsys, flags(images, tmp_path, *FULL))
    assert f'cannot write epoch {epoch} to {tmp_path}/run/summary.csv ([Errno 28] No space left on device)' in error
    assert kept.format(tmp_path / 'run') in error
    assert error.endswith('; make room, or mend what it says, and go on with --resume auto')
    lines = (straight / 'summary.csv').read_text().splitlines()
    assert (tmp_path / 'run/summary.csv').read_text().splitlines() == (lines[: epoch + 1] if epoch else [])
    assert cli.main(flags(images, tmp_path, *FULL, '--resume', 'auto')) == 0
    assert (tmp_path / 'run/summary.csv').read_text().splitlines() == lines
    assert same(weights(tmp_path / 'run/last.pth.tar'), weights(straight / 'last.pth.tar'))


def test_a_full_disk_at_the_start_of_a_resumed_run_keeps_its_summary(images, straight, tmp_path, capsys, monkeypatch):
    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    shutil.copytree(straight, tmp_path / 'run')
    names = {path.name for path in straight.iterdir()}
    argv = flags(images, tmp_path, *FULL, '--resume', f'{tmp_path}/run/checkpoint-1.pth.tar')
    with monkeypatch.context() as patch:
        patch.setattr(timm.utils.summary.csv, 'writer', full)
        error = failure(capsys, argv)
    assert f'cannot write to {tmp_path}/run: [Errno 28] No space left on device' in error
    assert (tmp_path / 'run/summary.csv').read_text() == (straight / 'summary.csv').read_text()
    assert {path.name for path in (tmp_path / 'run').iterdir()} == names
    assert cli.main(argv) == 0
    assert (tmp_path / 'run/summary.csv').read_text() == (straight / 'summary.csv').read_text()


def test_a_full_disk_at_the_start_of_a_resumed_run_keeps_its_settings(images, straight, tmp_path, capsys, monkeypatch):
    def full(path: Path, data: bytes) -> None:
        write(path, data[:9])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write = Path.write_bytes
    shutil.copytree(straight, tmp_path / 'run')
    before = {path.name: path.read_bytes() for path in straight.iterdir()}
    monkeypatch.setattr(Path, 'write_bytes', full)
    error = failure(capsys, flags(images, tmp_path, *FULL, '--resume', 'auto', '--epochs', '5'))
    assert f'cannot write to {tmp_path}/run: [Errno 28] No space left on device' in error
    assert {path.name: path.read_bytes() for path in (tmp_path / 'run').iterdir()} == before


@pytest.mark.parametrize(
    ('more', 'message'),
    [
        (['-b', '1'], 'batch size 1 has no image pool'),
        (['--num-classes', '2'], 'has 3 classes, the model 2: set --num-classes 3'),
        (['--data-dir', '/nowhere'], "cannot open image folder in '/nowhere'"),
        (['--dataset', 'hfds//nowhere'], "cannot open data set 'hfds//nowhere'"),
        (['-b', '64'], '48 training images do not fill one batch of 64'),
        (['--model', 'lennet'], "cannot create model 'lennet'"),
        (['--resume', 'gone.pth.tar'], "no checkpoint 'gone.pth.tar'"),
        (['--resume', __file__], f'{__file__} cannot be read as a checkpoint'),
        (['--in-chans', '5'], "images of the mode 'RGB' do not have the 5 channels of the model"),
        (['--input-img-mode', 'LGB'], "images of the mode 'LGB' do not have the 1 channels"),
        (['--amp'], 'add --amp-dtype bfloat16'),
        (['--sched', 'inv', '--decay-epochs', '0'], 'decay-epochs 0'),
        (['--aug-repeats', '3'], 'start several (torchrun)'),
        (['--sched', 'plateau', '--sched-on-updates'], 'leave out --sched-on-updates'),
        (['--sched', 'plateau', '--val-split', ''], 'name a --val-split'),
        (['--sched', 'step', '--decay-epochs', '0'], '--decay-epochs 0.0 must be positive'),
        (['--val-interval', '0'], '--val-interval 0 must be at least 1'),
        (['--start-epoch', '-1'], '--start-epoch -1 must be at least 0'),
        (['--mixup', '1', '-b', '7'], '--batch-size 7 must be even'),
        (['--smoothing', '1'], '--smoothing 1.0 leaves nothing'),
        (['--initial-checkpoint', '/nowhere'], "--initial-checkpoint '/nowhere' is not a file"),
        (['--device', 'abacus'], 'cannot start on --device abacus'),
        (['--opt-kwargs', 'slope=1'], "cannot create optimizer 'sgd'"),
        (['--aa', 'randm9'], "--aa 'randm9' is no policy of timm's"),
        (['--aa', 'rand-x9'], "give one like 'v0'"),
        (['--torchcompile', 'indoctor'], "--torchcompile 'indoctor', --torchcompile-mode None: Invalid backend"),
        (['--torchcompile', '--torchcompile-mode', 'fast'], "mode 'fast': Unrecognized mode=fast, should be one of"),
        (['--mean', '0.1', '0.2'], 'mean must have one value or 1 values, got 2'),
        (['--model', 'test_resnet', '--std', '0.1', '0.2'], 'std must have one value or 3 values, got 2'),
        (['--input-size', '2', '28', '28', '--in-chans', '1'], 'Conflicting input channel counts'),
        (['--val-split', 'tset'], "has no sub-folder 'tset', only train, validation: name one of these"),
        (['--train-split', 'train[:10]'], "split 'train[:10]': folders have no slices"),
    ],
)
def test_bad_flags_are_one_line(images, tmp_path, capsys, more, message):
    assert message in failure(capsys, flags(images, tmp_path, *more))


def test_too_few_unlabeled_images_name_their_flag(images, tmp_path, capsys):
    more = ['--unlabeled-data-dir', str(images), '--unlabeled-split', 'validation', '--unlabeled-batch-size', '13']
    error = failure(capsys, flags(images, tmp_path, *more))
    assert '12 unlabeled images do not fill one batch of 13: lower --unlabeled-batch-size' in error


def test_a_source_whose_package_is_missing_is_one_line(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'tensorflow', None)
    error = failure(capsys, flags(images, tmp_path, '--dataset', 'tfds/mnist'))
    assert "cannot open data set 'tfds/mnist'" in error


@pytest.mark.parametrize(
    'more',
    [['--interpolation', 'cubic'], ['--train-interpolation', 'cubic'], ['--scale', '0.5'], ['--remode', 'noise']],
)
def test_values_of_flags_are_checked(images, tmp_path, capsys, more):
    with pytest.raises(SystemExit):
        cli.main(flags(images, tmp_path, *more))
    assert f'argument {more[0]}: ' in capsys.readouterr().err


def test_gg_dg_must_know_when_to_switch(capsys):
    assert 'give --gen-epochs or --switch-ess' in failure(capsys, ['train', '--model', 'lenet'])
    assert '--resume auto needs --experiment' in failure(capsys, ['train', '--phase', 'DG', '--resume', 'auto'])


def test_a_label_out_of_range_is_named(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train.train_data, 'check_classes', lambda *_: None)
    switching = ['--gen-epochs', '0']  # the first batch starts as one for the generative loss
    for phase in (['--phase', 'GG'], ['--phase', 'DG'], switching):
        error = failure(capsys, flags(images, tmp_path, '--num-classes', '2', *phase))
        assert 'epoch 0, batch 0' in error
        assert 'target 2 is outside [0, 2)' in error


def test_a_class_without_images_and_batches_of_one_class_train(images, tmp_path, monkeypatch):
    """A fourth class that nobody belongs to; of the shuffled pairs some are of one class."""
    classes, check = [], train.check_targets
    monkeypatch.setattr(train, 'check_targets', lambda t, n: classes.append(len(t.unique())) or check(t, n))
    argv = flags(images, tmp_path, '--num-classes', '4', '--epochs', '1', '--phase', 'GG', '-b', '2', '--lr', '1e-3')
    assert cli.main(argv) == 0
    row = list(csv.DictReader((tmp_path / 'run/summary.csv').open()))[-1]
    assert math.isfinite(float(row['eval_loss']))
    assert set(classes[:24]) == {1, 2}


# Features


@pytest.mark.parametrize(
    'more',
    [
        ['--mixup', '0.5', '--cutmix', '0.5'],
        ['--mixup', '0.5', '--no-prefetcher', '--phase', 'GG'],
        ['--grad-accum-steps', '4', '--clip-grad', '1.0', '--opt', 'adamw', '--layer-decay', '0.9'],
        ['--amp', '--amp-dtype', 'bfloat16', '--channels-last', '--reprob', '0.5'],
        ['--phase', 'GG', '--pool-queue', '30', '--hybrid', '0.2', '--lr', '1e-3'],
        ['--phase', 'GG', '--pool-running-log-z', '--sched', 'inv', '--decay-epochs', '1', '--decay-rate', '0.5'],
        ['--switch-ess', '7.9', '--bce-loss', '--clip-mode', 'agc', '--clip-grad', '0.1'],
        ['--val-split', '', '--phase', 'DG', '--recovery-interval', '2', '--model-kwargs', 'drop_rate=0.1'],
        ['--torchcompile', 'eager', '--phase', 'GG'],
        ['--opt', 'adahessian', '--lr', '1e-3', '--gen-epochs', '1'],
        ['--loss', 'bce', '--loss-pos-weight', '2', '--loss-class-weight', '1,2,1', '--smoothing', '0'],
        ['--loss', 'asl', '--asl-gamma-neg', '2', '--dataset', 'torch/image_folder', '--in-chans', '3'],
    ],
    ids=lambda more: ' '.join(more[:2]),
)
def test_flags_work_together(images, tmp_path, more):
    argv = flags(images, tmp_path, '--epochs', '2', *more)
    assert cli.main(argv) == 0
    row = list(csv.DictReader((tmp_path / 'run/summary.csv').open()))[-1]
    assert math.isfinite(float(row['train_loss']))
    assert all(v.isfinite().all() for v in weights(tmp_path / 'run/last.pth.tar').values())


def test_dropout_is_the_networks_own_unless_it_is_given(images, tmp_path):
    small = ['--model', 'alexnet_small', '--in-chans', '1', '--img-size', '28']
    for more, rate in (([], 0.2), (['--drop', '0'], 0.0), (['--drop', '0.4'], 0.4)):
        trainer = train.Trainer(prepared(parse(flags(images, tmp_path, *small, *more))), torch.device('cpu'))
        assert trainer.task.trainable_module.drop6.p == rate


@pytest.mark.parametrize(
    ('more', 'shape'),
    [
        (['--in-chans', '3'], (3, 28, 28)),  # timm's train.py loads one channel, as lenet's configuration says
        (['--img-size', '32'], (1, 32, 32)),  # and here three
        (['--model', 'test_resnet', '--in-chans', '1'], (1, 160, 160)),
        (['--mean', '0.5', '--std', '0.5'], (1, 28, 28)),
    ],
    ids=lambda v: ' '.join(map(str, v)),
)
def test_images_have_the_channels_of_the_network(images, tmp_path, more, shape):
    argv = [*flags(images, tmp_path), *more]
    trainer = train.Trainer(prepared(parse(argv)), torch.device('cpu'))
    for loader in (trainer.loader, trainer.eval_loader):
        batch, target = next(iter(loader))
        assert batch.shape[1:] == shape
    assert trainer.task(batch, target)['output'].shape == (len(batch), CLASSES)
    recorded = yaml.safe_load((tmp_path / 'run/args.yaml').read_text())
    assert resolve_input_data_config(trainer.task.trainable_module, recorded)['input_size'] == shape


@pytest.mark.parametrize('crop', [[], ['--train-crop-mode', 'pad']], ids=' '.join)
def test_an_empty_training_interpolation_is_that_of_the_network(images, tmp_path, crop):
    argv = flags(images, tmp_path, '--interpolation', 'nearest', '--img-size', '40', '--color-jitter', '0', *crop)
    spread = []
    for name in ('', 'nearest', 'bicubic'):
        trainer = train.Trainer(prepared(parse([*argv, '--train-interpolation', name])), torch.device('cpu'))
        torch.manual_seed(0)
        spread.append(next(iter(trainer.loader))[0].std().item())
    assert spread[0] == spread[1] != spread[2]


def test_loss_flags_make_timms_criterion(images, tmp_path):
    more = ['--phase', 'DG', '--loss', 'poly', '--poly-epsilon', '1.5', '--smoothing', '0.2']
    trainer = train.Trainer(prepared(parse(flags(images, tmp_path, *more))), torch.device('cpu'))
    logits, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 1])
    expected = create_classification_loss('poly', poly_epsilon=1.5, smoothing=0.2)(logits, target)
    assert torch.equal(trainer.task.criterion(logits, target), expected)


def test_the_task_knows_the_optimizer(images, tmp_path):
    argv = flags(images, tmp_path, '--opt', 'lookahead_momentum')
    trainer = train.Trainer(prepared(parse(argv)), torch.device('cpu'))
    assert trainer.task.optimizer is trainer.optimizer


def test_validation_and_checkpoints_at_intervals(images, tmp_path):
    assert cli.main(flags(images, tmp_path, '--epochs', '5', '--val-interval', '2')) == 0
    rows = list(csv.DictReader((tmp_path / 'run/summary.csv').open()))
    assert [row['epoch'] for row in rows] == ['1', '3', '4']  # the last one too
    assert not (tmp_path / 'run/checkpoint-2.pth.tar').exists()


def test_the_weights_that_count_are_validated_and_no_others(images, tmp_path, monkeypatch):
    validated, original = [], train.Trainer.validate
    monkeypatch.setattr(train.Trainer, 'validate', lambda self, ema: validated.append(ema) or original(self, ema))
    for more in ([], ['--model-ema'], ['--model-ema', '--model-ema-force-cpu']):
        assert cli.main(flags(images, tmp_path, '--epochs', '1', *more)) == 0
    assert validated == [False, True, False]


def test_accumulated_gradients_are_the_mean_of_the_micro_batches(images, tmp_path):
    seen = {}
    for steps in (1, 3):
        args = parse(flags(images, tmp_path, '--phase', 'DG', '-b', str(24 // steps), '--no-aug', '--smoothing', '0'))
        args.grad_accum_steps = steps
        trainer = train.Trainer(prepared(args), torch.device('cpu'))
        updates = []
        trainer.optimizer.step = lambda t=trainer, u=updates: u.append([p.grad.clone() for p in t.task.parameters()])
        torch.manual_seed(0)
        trainer.train_one_epoch(0)
        seen[steps] = updates
    assert len(seen[1]) == len(seen[3]) == 2
    for a, b in zip(seen[1][0], seen[3][0], strict=True):
        torch.testing.assert_close(a, b)


def prepared(args: argparse.Namespace) -> argparse.Namespace:
    train.utils.init_distributed_device(args)
    return args


@pytest.fixture
def parquet(images, tmp_path, monkeypatch) -> str:
    """The images as `hfds/FOLDER`, one of timm's ways to name a data set."""
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')
    features = datasets.Features({'img': datasets.Image(), 'label': datasets.ClassLabel(CLASSES)})
    for split in ('train', 'validation'):
        paths = sorted((images / split).glob('*/*.png'), key=lambda p: (p.parent.name, natural_key(p.name)))
        labels = [int(path.parent.name[-1]) for path in paths]
        columns = {'img': [str(path) for path in paths], 'label': labels}
        datasets.Dataset.from_dict(columns, features).to_parquet(tmp_path / f'data/{split}-00000-of-00001.parquet')
    return f'hfds/{tmp_path}/data'


def test_parquet_files_give_the_same_run_as_folders(images, parquet, tmp_path):
    """For unlabeled images as well, which need not have a column of labels."""
    bare = datasets.load_dataset(f'{tmp_path}/data', split='validation').remove_columns('label')
    bare.to_parquet(tmp_path / 'bare/validation-0-of-1.parquet')
    states = []
    for more in (
        ['--unlabeled-data-dir', str(images)],
        ['--dataset', parquet, '--unlabeled-dataset', parquet, '--input-key', 'img'],
        ['--dataset', parquet, '--unlabeled-dataset', f'hfds/{tmp_path}/bare', '--input-key', 'img'],
    ):
        more += ['--unlabeled-split', 'validation', '--unlabeled-batch-size', '5']
        assert cli.main(flags(images, tmp_path, '--epochs', '2', *more)) == 0
        states.append(weights(tmp_path / 'run/last.pth.tar'))
    assert same(states[0], states[1])
    assert same(states[0], states[2])


def test_a_stream_of_unlabeled_images_is_shuffled_and_needs_no_labels(images, parquet, tmp_path):
    bare = (
        datasets.load_dataset(f'{tmp_path}/data', split='train').remove_columns('label').rename_column('img', 'image')
    )
    bare.to_parquet(tmp_path / 'bare/train-0-of-1.parquet')
    datasets.load_dataset(f'{tmp_path}/bare')  # counts its images
    args = parse(flags(images, tmp_path, '--unlabeled-dataset', f'hfids/{tmp_path}/bare', '--no-aug'))
    config = {'input_size': (1, SIZE, SIZE), 'mean': (0.0,), 'std': (1.0,), 'interpolation': 'bilinear'}
    loader = train_data.unlabeled_loader(prepared(args), config, torch.device('cpu'))
    seen = torch.cat([image for image, _ in loader]).flatten(1)
    stored = torch.stack([pil_to_tensor(image) / 255 for image in bare['image']]).flatten(1)
    assert not torch.allclose(seen, stored)
    torch.testing.assert_close(seen.sum(1).sort().values, stored.sum(1).sort().values)


def test_validation_crops_images_as_the_network_wants_them(tmp_path):
    """As `gencnn validate` does."""
    write_wide_image(tmp_path)
    for mode, bright in (('center', False), ('squash', True)):
        model = timm.create_model('gencnn_lenet', pretrained_cfg_overlay={'crop_mode': mode})
        config = resolve_input_data_config(model, {})
        args = prepared(parse(flags(tmp_path, tmp_path)))
        ((image, _),) = train_data.eval_loader(args, config, torch.device('cpu'))
        assert (image[0, 0, :, 0] > 0).all() == bright


@pytest.mark.parametrize('more', [[], ['--hybrid', '0.5']], ids=['generative', 'hybrid'])
def test_the_zoo_folds_intercepts_into_biases_that_were_not_learned(images, parquet, tmp_path, monkeypatch, more):
    spec = importlib.util.spec_from_file_location('make_zoo', Path(__file__).parent / 'benchmarks/make_zoo.py')
    make_zoo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_zoo)
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text('epochs: 1\n')
    argv = flags(
        images, tmp_path, '-c', str(recipe), '--dataset', parquet, '--input-key', 'img', '--phase', 'GG', *more
    )
    assert cli.main(argv) == 0
    checkpoint = tmp_path / 'run/last.pth.tar'
    words = [str(checkpoint), 'bars', '--folder', str(tmp_path / 'zoo'), '--dataset', 'bars']
    monkeypatch.setattr(sys, 'argv', ['make_zoo', *words])
    make_zoo.main()
    saved = load_file(tmp_path / 'zoo/lenet.bars.safetensors')
    assert torch.equal(saved['fc2.bias'], weights(checkpoint)['fc2.bias']) == bool(more)


def test_no_data_set_is_a_clear_error():
    with pytest.raises(ValueError, match=r'no data set was named, .*give --dataset'):
        train_data.open_dataset('', None, 'train', 3)


def test_a_folder_is_read_whole_only_where_it_has_no_splits(images):
    """timm reads the whole folder in place of a split that is not there."""

    def size(root: Path, split: str) -> int:
        return len(train_data.open_dataset('', str(root), split, 3))

    assert (size(images, 'train'), size(images, 'val'), size(images, '.')) == (48, 12, 60)
    assert size(images / 'train', 'train') == size(images / 'train', 'validation') == 48  # classes alone
    for root, split in ((images, 'tset'), (images / 'train', 'val'), (images / 'train', 'holdout')):
        with pytest.raises(ValueError, match=f"has no sub-folder '{split}', only .*'.' for the whole folder"):
            size(root, split)
    alone = images.with_name('alone')
    shutil.copytree(images / 'train', alone / 'training')
    assert size(alone, 'train') == 48
    with pytest.raises(ValueError, match=r"no sub-folder 'validation', only training: name"):
        size(alone, 'validation')


def test_columns_of_the_labeled_images_are_not_asked_of_an_unlabeled_folder(images, tmp_path):
    args = parse(flags(images, tmp_path, '--unlabeled-data-dir', str(images), '--unlabeled-split', 'validation'))
    args.dataset, args.input_key, args.target_key = 'hfds/somewhere', 'img', 'fine_label'
    config = {'input_size': (1, 8, 8), 'mean': (0.5,), 'std': (0.5,), 'interpolation': 'bilinear'}
    assert len(train_data.unlabeled_loader(prepared(args), config, torch.device('cpu')))


def test_unlabeled_images_enter_the_generative_phase(images, tmp_path):
    unlabeled = ['--unlabeled-data-dir', str(images), '--unlabeled-split', 'validation', '--unlabeled-batch-size', '5']
    losses = set()
    for more in ([], unlabeled, [*unlabeled, '--unlabeled-weight', '0.5']):
        assert cli.main(flags(images, tmp_path, '--epochs', '1', *more)) == 0
        losses.add(list(csv.DictReader((tmp_path / 'run/summary.csv').open()))[-1]['train_loss'])
    assert len(losses) == 3


def test_the_weight_of_no_unlabeled_images_is_refused(images, tmp_path, capsys):
    error = failure(capsys, flags(images, tmp_path, '--unlabeled-weight', '1'))
    assert '--unlabeled-weight 1.0 weighs no image: name an --unlabeled-dataset' in error


@pytest.mark.parametrize(
    ('more', 'message'),
    [
        (['--hybrid', '1.5'], '--hybrid 1.5 is outside [0, 1)'),
        (['--gen-epochs', 'inf'], '--gen-epochs inf is outside [0, inf)'),
        (['--pool-queue', '-1'], '--pool-queue -1 is outside [0, inf)'),
        (['--unlabeled-weight', '-1'], '--unlabeled-weight -1.0 is outside [0, inf)'),
        (['--unlabeled-weight', 'nan'], '--unlabeled-weight nan is outside [0, inf)'),
        (['--unlabeled-batch-size', '0'], '--unlabeled-batch-size 0 is outside [1, inf)'),
        (['--switch-ess', '0.5'], '--switch-ess 0.5 is never reached: the ESS is a number of images'),
        (['--switch-ess', 'nan'], '--switch-ess nan is never reached'),
        (['--disc-lr', 'nan'], '--disc-lr nan is outside [0, inf)'),
    ],
)
def test_bad_generative_flags_are_refused_before_anything_is_loaded(tmp_path, capsys, more, message):
    nowhere = tmp_path / 'nowhere'
    assert message in failure(capsys, flags(nowhere, tmp_path, '--unlabeled-data-dir', str(nowhere), *more))


def test_the_discriminative_phase_says_that_it_loads_no_unlabeled_images(images, tmp_path, caplog):
    more = ['--epochs', '1', '--unlabeled-data-dir', '/nowhere', '--unlabeled-weight', '1', '--phase']
    assert cli.main(flags(images, tmp_path, *more, 'DG')) == 0
    said = [record.message for record in caplog.records if 'unlabeled' in record.message]
    assert said == ['--phase DG learns from labeled images alone: the unlabeled ones are not loaded']
    assert cli.main(flags(images, tmp_path, *more, 'GG')) == 2  # control: they would be missed


def test_unlabeled_images_are_not_loaded_after_the_switch(images, tmp_path, monkeypatch):
    endless, drawn = train_data.endless, []

    def counted(loader, epoch):
        for batch in endless(loader, epoch):
            drawn.append(epoch)
            yield batch

    monkeypatch.setattr(train_data, 'endless', counted)
    more = ['--unlabeled-data-dir', str(images), '--unlabeled-split', 'validation']
    assert cli.main(flags(images, tmp_path, *more)) == 0
    assert drawn == [0] * 6 + [1] * 6 + [2]  # the first batch of the next phase is drawn before the switch is known


def fake_package(monkeypatch, name: str, **content) -> None:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)


def test_wandb_and_tensorboard_when_installed(images, tmp_path, monkeypatch, capsys):
    logged, scalars = [], []

    class SummaryWriter:
        def __init__(self, folder: str) -> None:
            assert folder == str(tmp_path / 'run')

        def add_scalar(self, name: str, value: float, epoch: int) -> None:
            scalars.append((name, epoch))

    wandb = {'init': lambda **kwargs: logged.append(kwargs['name']), 'log': logged.append}
    fake_package(monkeypatch, 'wandb', **wandb)
    fake_package(monkeypatch, 'tensorboard')
    fake_package(monkeypatch, 'torch.utils.tensorboard', SummaryWriter=SummaryWriter)
    monkeypatch.setattr(timm.utils.summary, 'wandb', sys.modules['wandb'], raising=False)
    argv = flags(images, tmp_path, '--epochs', '2', '--log-wandb', '--log-tensorboard')
    assert cli.main(argv) == 0
    assert logged[0] == 'run'
    assert [row['epoch'] for row in logged[1:]] == [0, 1]
    assert {('loss', 0), ('ess', 1), ('eval_top1', 1)} <= set(scalars)
    monkeypatch.setitem(sys.modules, 'wandb', None)
    monkeypatch.setattr(train_args, 'find_spec', lambda name: None)
    assert '--log-wandb needs the package wandb' in failure(capsys, argv)


def test_the_progress_bar_counts_batches_and_shows_the_loss(images, tmp_path, monkeypatch):
    shown = []

    class Bar:
        def __init__(self, total: int, desc: str, **kwargs) -> None:
            shown.append((desc, total))

        def set_postfix(self, loss: str, **kwargs) -> None:
            assert math.isfinite(float(loss))

        def update(self, n: int) -> None:
            shown.append(n)

        def close(self) -> None:
            shown.append('closed')

    monkeypatch.setattr(train, 'tqdm', Bar)
    assert cli.main(flags(images, tmp_path, '--epochs', '1', '--log-interval', '4')) == 0
    assert shown == [('epoch 0', 6), 4, 2, 'closed']  # full at the end


@pytest.mark.parametrize('augment', [['--no-aug'], ['--scale', '0.3', '1', '--hflip', '0.5']])
def test_cached_images_give_the_same_run(augment, images, tmp_path):
    states = []
    for more in ([], ['--cache-images']):
        assert cli.main(flags(images, tmp_path, '--epochs', '2', *augment, *more)) == 0
        states.append(weights(tmp_path / 'run/last.pth.tar'))
    assert same(*states)


@pytest.mark.parametrize('cache', [[], ['--cache-images']])
def test_crops_of_the_padded_image(cache, images, tmp_path):
    """Every view is the whole image moved by at most three pixels, the rest reflected. Control: timm's are not."""
    padded = np.pad(np.asarray(Image.open(images / 'train/class0/0.png')), 3, mode='reflect')
    allowed = [padded[y : y + SIZE, x : x + SIZE] for y in range(7) for x in range(7)]
    for mode in ('pad', 'rrc'):
        argv = flags(images, tmp_path, '--train-crop-mode', mode, '--hflip', '0', '--color-jitter', '0', *cache)
        args = parse(argv)
        args.distributed = False
        config = {'input_size': (1, SIZE, SIZE), 'interpolation': 'bilinear', 'mean': (0.0,), 'std': (1.0,)}
        cpu = torch.device('cpu')
        dataset = train_data.train_loader(args, config, cpu, None).dataset
        torch.manual_seed(0)
        views = [np.asarray(dataset[0][0])[0] for _ in range(200)]
        seen = {i for view in views for i, crop in enumerate(allowed) if np.array_equal(view, crop)}
        unlike = sum(not any(np.array_equal(view, crop) for crop in allowed) for view in views)
        assert (len(seen) > 40 and unlike == 0) if mode == 'pad' else unlike > 190
        config |= {'input_size': (1, 16, 40)}  # images are resized to cover it first
        assert train_data.train_loader(args, config, cpu, None).dataset[0][0].shape == (1, 16, 40)


def test_a_stream_of_images_cannot_be_cached():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(ValueError, match='--cache-images needs a data set with an index, not Stream'):
        train_data.cached(Stream(), random=False)


def run_rank(rank: int, argv: list[str], port: int) -> None:
    become_rank(rank, port)
    assert cli.main(argv) == 0
    assert_no_gloo_thread()


RANK_FLAGS = ['-b', '4', '--sync-bn', *FULL]


@pytest.fixture(scope='module')
def two_ranks(images, tmp_path_factory) -> Path:
    """A run of two processes that each got their rank from here."""
    out = tmp_path_factory.mktemp('two_ranks')
    argv = flags(images, out, *RANK_FLAGS)
    mp.start_processes(run_rank, args=(argv, unused_port()), nprocs=2, start_method='spawn')
    return out / 'run'


def test_two_ranks(two_ranks):
    phases = [row['train_phase'] for row in rows(two_ranks)]
    assert phases == ['GG', 'GG', 'DG', 'DG']  # written once, by the first rank
    assert float(rows(two_ranks)[-1]['eval_loss']) < 0.9  # log 3 = 1.1 is chance
    state = torch.load(two_ranks / 'last.pth.tar', weights_only=False)
    assert 'conv1.weight' in state['state_dict']
    assert state['task_state']['class_counts'].sum() == 96  # all images of both ranks in two epochs


def test_torchrun_gives_the_same_run(images, two_ranks, tmp_path):
    launcher = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    argv = flags(images, tmp_path, *RANK_FLAGS)
    done = subprocess.run([*launcher, '-m', 'timm_gencnn.cli', *argv], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('epoch   3') == 1  # the first rank alone speaks
    assert [path.name for path in tmp_path.iterdir()] == ['run']
    assert {path.name for path in (tmp_path / 'run').iterdir()} == {path.name for path in two_ranks.iterdir()}
    assert len(rows(tmp_path / 'run')) == 4
    for row, expected in zip(rows(tmp_path / 'run'), rows(two_ranks), strict=True):
        assert row.pop('train_phase') == expected.pop('train_phase')
        numbers = {name: float(value) for name, value in expected.items()}
        assert {name: float(value) for name, value in row.items()} == pytest.approx(numbers, abs=1e-5, nan_ok=True)
    torch.testing.assert_close(
        weights(tmp_path / 'run/last.pth.tar'), weights(two_ranks / 'last.pth.tar'), rtol=0, atol=1e-5
    )


def run_rank_with_batch_norm(rank: int, argv: list[str], port: int, folder: Path) -> None:
    saved = train.Trainer._finish_epoch

    def finish(self, *args):
        for ema in (False, True):
            module = train.utils.unwrap_model(self.task.get_trainable_module(ema=ema))
            torch.save({k: v for k, v in module.state_dict().items() if 'running' in k}, folder / f'{ema}-{rank}.pt')
        saved(self, *args)

    train.Trainer._finish_epoch = finish
    run_rank(rank, argv, port)


def test_ranks_agree_on_the_statistics_of_batch_norm(images, tmp_path):
    argv = flags(
        images, tmp_path, '--model', 'test_resnet', '--input-size', '3', '32', '32', '-b', '4', *FULL, '--epochs', '1'
    )
    mp.start_processes(run_rank_with_batch_norm, args=(argv, unused_port(), tmp_path), nprocs=2, start_method='spawn')
    statistics = [[torch.load(tmp_path / f'{ema}-{rank}.pt') for rank in range(2)] for ema in (False, True)]
    for first, second in statistics:
        assert first
        assert same(first, second)
    assert not same(statistics[0][0], statistics[1][0])  # the average is another model
    saved = torch.load(tmp_path / 'run/last.pth.tar', weights_only=False)['state_dict_ema']
    assert same(statistics[1][0], {k: saved[k] for k in statistics[1][0]})


# Configuration


def test_flags_win_over_the_configuration_in_any_order(tmp_path):
    path = tmp_path / 'config.yaml'
    path.write_text('epochs: 7\nlr: 0.5\nno-aug: true\nbatch_size: 64\n')
    config, given = ['-c', str(path)], ['--lr', '0.25', '--batch-size', '128']  # the latter is the default
    for argv in ([*config, *given], [*given, *config]):
        args = parse(['train', *argv])
        assert (args.epochs, args.lr, args.no_aug, args.batch_size) == (7, 0.25, True, 128)


def test_settings_are_converted_as_flags_are(tmp_path, capsys):
    path = tmp_path / 'config.yaml'
    path.write_text('lr: 1e-3\n')  # a string to YAML 1.1
    assert parse(['train', '-c', str(path)]).lr == 0.001
    path.write_text("mean: ['0.5', 1, 1e-3]\nstd: 0.25\ninput_size: ['1', 28, 28]\nlr: 1\nbn_eps: null\n")
    args = parse(['train', '-c', str(path)])
    assert (args.mean, args.std, args.input_size, args.lr, args.bn_eps) == (
        [0.5, 1, 0.001],
        [0.25],
        [1, 28, 28],
        1,
        None,
    )
    path.write_text('amp: true\n')
    assert [parse(['train', '-c', str(path), *more]).amp for more in ([], ['--no-amp'])] == [True, False]
    path.write_text('experiment: 2024\n')
    assert parse(['train', '-c', str(path)]).experiment == '2024'
    for line, error in (
        ('epochs: ten', "argument --epochs: invalid int value: 'ten'"),
        ('epochs: 1.5', "argument --epochs: invalid int value: '1.5'"),
        ('lr: [0.1]', "argument --lr: invalid float value: '[0.1]'"),
        ('mean: [0.5, half]', "argument --mean: invalid float value: 'half'"),
        ('phase: GD', "argument --phase: invalid choice: 'GD'"),
        ('amp: "false"', "argument --amp/--no-amp: expected true or false, got 'false'"),
        ('input_size: [1, 28]', 'argument --input-size: expected 3 values, got [1, 28]'),
        ('model_kwargs: a=1', 'argument --model-kwargs: expected lines of the form "name: value", got \'a=1\''),
    ):
        path.write_text(line)
        with pytest.raises(SystemExit):
            parse(['train', '-c', str(path)])
        assert f'config.yaml: {error}' in capsys.readouterr().err


def test_validate_reads_a_configuration_too(tmp_path):
    path = tmp_path / 'config.yaml'
    path.write_text('noise: 1e-1\nbatch_size: 32\nsplit: test\n')
    parser = ConfigParser()
    validate.add_arguments(parser)
    args = parser.parse_args(['-b', '256', '-c', str(path)])
    assert (args.noise, args.batch_size, args.split) == (0.1, 256, 'test')


def test_the_settings_of_a_run_are_a_configuration(images, straight, tmp_path):
    argv = ['train', '-c', str(straight / 'args.yaml'), '--output', str(tmp_path)]
    assert cli.main(argv) == 0
    assert same(weights(tmp_path / 'run/last.pth.tar'), weights(straight / 'last.pth.tar'))


def test_validate_takes_what_the_settings_of_a_run_say_of_validation(straight, tmp_path, capsys):
    rows = list(csv.DictReader((straight / 'summary.csv').open()))
    argv = ['validate', '-c', str(straight / 'args.yaml'), '--checkpoint', str(straight / 'last.pth.tar')]
    assert cli.main([*argv, '--results-file', str(tmp_path / 'results.json')]) == 0
    found = json.loads((tmp_path / 'results.json').read_text())
    assert found['top1'] == pytest.approx(float(rows[-1]['eval_top1']))
    assert found['nll'] == pytest.approx(float(rows[-1]['eval_loss']), rel=1e-5)
    for more, name in ([], 'model_best.pth.tar'), (argv[3:], 'last.pth.tar'):  # the same of the folder alone
        argv = ['validate', str(straight), *more, '-b', '7', '--results-file', str(tmp_path / 'again.json')]
        assert cli.main(argv) == 0
        again = json.loads((tmp_path / 'again.json').read_text())
        assert again['checkpoint'] == str(straight / name)
    assert again['nll'] == pytest.approx(found['nll'], rel=1e-5)
    assert cli.main(['validate', str(straight), '--split', 'gone']) == 2
    assert "no sub-folder 'gone'" in capsys.readouterr().err
    run = yaml.safe_load((straight / 'args.yaml').read_text())
    path = tmp_path / 'args.yaml'
    timms = {k: v for k, v in run.items() if k not in ('distributed', 'world_size', 'rank', 'local_rank', 'phase')}
    more = {'val_split': 'test', 'pretrained': True, 'tta': 0, 'device': 'cuda:3', 'data': 'there', 'data_dir': None}
    path.write_text(yaml.safe_dump(timms | more | {'amp': True}))  # as timm's train.py writes them
    parser = ConfigParser()
    validate.add_arguments(parser)
    args = parser.parse_args(['-c', str(path)])
    assert (args.split, args.pretrained) == ('test', False)  # its weights are those of --checkpoint
    assert (args.data, args.data_dir, args.use_ema, args.amp) == (None, 'there', True, True)
    assert args.device != 'cuda:3'  # this machine's, not that of the training
    args = parser.parse_args(['-c', str(path), '--no-use-ema', '--no-amp'])
    assert (args.use_ema, args.amp) == (False, False)
    path.write_text(yaml.safe_dump(run | {'model_ema_force_cpu': True}))  # with which no averaged weights are validated
    assert not parser.parse_args(['-c', str(path)]).use_ema
    path.write_text('epochs: 4\n')  # no run: a setting that validate lacks may be a slip
    with pytest.raises(SystemExit):
        parser.parse_args(['-c', str(path)])
    assert "unknown setting 'epochs'" in capsys.readouterr().err


def test_validate_takes_nothing_of_the_data_set_of_a_run_to_another_one(straight, tmp_path):
    run = tmp_path / 'run'
    shutil.copytree(straight, run)
    own = {
        'dataset': 'hfds/one',
        'data_dir': 'there',
        'class_map': 'gone.txt',
        'input_key': 'img',
        'target_key': 'fine',
    }
    settings = yaml.safe_load((straight / 'args.yaml').read_text()) | own | {'val_split': 'test'}
    (run / 'args.yaml').write_text(yaml.safe_dump(settings))

    def parsed(*more):
        parser = ConfigParser()
        validate.add_arguments(parser)
        args = parser.parse_args([*more])
        assert (args.model, args.num_classes) == ('lenet', 3)
        return args.dataset, args.data_dir, args.class_map, args.input_key, args.target_key, args.split

    kept = ('hfds/one', 'there', 'gone.txt', 'img', 'fine', 'test')
    for of_run in ([str(run)], ['-c', str(run / 'args.yaml')]):
        assert parsed(*of_run) == parsed(*of_run, '--dataset', 'hfds/one') == kept
        assert parsed(*of_run, '--data-dir', 'here') == (kept[0], 'here', *kept[2:])
        assert parsed(*of_run, '--dataset', 'hfds/two') == ('hfds/two', None, '', None, None, 'validation')
        given = ['--dataset', '', '--data-dir', 'there', '--split', 'test', '--target-key', 'label']
        assert parsed(*of_run, *given) == ('', 'there', '', None, 'label', 'test')

    pixels = np.random.default_rng(0).integers(0, 255, (6, 28, 28), dtype=np.uint8)
    columns = {'image': [Image.fromarray(p) for p in pixels], 'label': [0, 1, 2] * 2}
    (tmp_path / 'other').mkdir()
    other = datasets.Dataset.from_dict(columns).cast_column('image', datasets.Image())
    other.to_parquet(tmp_path / 'other/validation-0-of-1.parquet')
    argv = ['validate', str(run), '--dataset', f'hfds/{tmp_path}/other', '--results-file', str(tmp_path / 'r.json')]
    assert cli.main(argv) == 0
    assert json.loads((tmp_path / 'r.json').read_text())['images'] == 6


def test_a_configuration_adds_to_its_base(tmp_path, capsys):
    """A recipe or a file, which may have one itself; the command line wins over all."""
    paths = [tmp_path / f'{name}.yaml' for name in 'abc']
    paths[0].write_text('base: lenet_mnist\nepochs: 7\nlr: 1e-3\n')
    paths[1].write_text(f'base: {paths[0]}\nlr: 0.5\n')
    args = parse(['train', '-c', str(paths[1]), '--batch-size', '32'])
    assert (args.model, args.epochs, args.lr, args.batch_size) == ('lenet', 7, 0.5, 32)
    for base, error in ((paths[2], 'is its own base'), ('nowhere', "cannot read configuration 'nowhere'")):
        paths[2].write_text(f'base: {base}\n')
        with pytest.raises(SystemExit):
            parse(['train', '-c', str(paths[2])])
        assert error in capsys.readouterr().err


def test_a_base_is_found_beside_the_file_and_an_empty_setting_takes_its_own_back(tmp_path, monkeypatch):
    (tmp_path / 'a.yaml').write_text('base: resnet_cifar10\n')
    (tmp_path / 'b.yaml').write_text('base: a.yaml\ntrain_crop_mode: null\n')
    (tmp_path / 'resnet_cifar10').mkdir()  # a folder is no configuration
    monkeypatch.chdir(tmp_path)
    assert parse(['train', '-c', 'a.yaml']).train_crop_mode == 'pad'
    monkeypatch.chdir('/')
    args = parse(['train', '-c', str(tmp_path / 'b.yaml')])
    assert (args.model, args.train_crop_mode) == ('resnet11_w64', None)


@pytest.mark.parametrize('name', ['resnet_cifar10', 'resnet_in100', 'alexnet_in100'])
def test_recipes_for_a_gpu_have_the_settings_of_the_others(name):
    ours, theirs = (vars(parse(['train', '-c', recipe])) for recipe in (f'{name}_gpu', name))
    added = {'data_on_device': True, 'workers': 4}
    assert ours == theirs | added | {'config': f'{name}_gpu'}


def test_an_empty_setting_leaves_the_default(tmp_path):
    path = tmp_path / 'config.yaml'
    path.write_text('epochs: null\nlr:\nbatch_size: 7\n')
    args, plain = parse(['train', '-c', str(path)]), parse(['train'])
    assert (args.epochs, args.lr, args.batch_size) == (plain.epochs, plain.lr, 7)


@pytest.mark.parametrize('recorded', ['data: there', 'data_dir: there', 'data: there\ndata_dir: there'])
@pytest.mark.parametrize('given', [['here'], ['--data-dir', 'here']])
def test_a_folder_of_the_command_line_wins(tmp_path, monkeypatch, recorded, given):
    path = tmp_path / 'config.yaml'
    path.write_text(recorded)
    for more, expected in ((given, 'here'), ([], 'there')):
        args = parse(['train', '-c', str(path), '--phase', 'DG', *more])
        train.check_arguments(args)
        assert args.data_dir == expected
    parser = ConfigParser()
    validate.add_arguments(parser)
    opened = []
    monkeypatch.setattr(validate, 'open_dataset', lambda name, root, *a, **k: opened.append(root) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        validate.main(parser.parse_args(['-c', str(path), *given]))
    assert opened == ['here']


@pytest.mark.parametrize('before', [True, False])
def test_only_a_process_group_of_its_own_is_destroyed(monkeypatch, before):
    alive, destroyed = iter([before, True]), []
    monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: next(alive))
    monkeypatch.setattr(torch.distributed, 'destroy_process_group', lambda: destroyed.append(True))
    with pytest.raises(ValueError, match='no image pool'):
        train.main(parse(['train', '--phase', 'GG', '-b', '1', '--device', 'cpu']))
    assert len(destroyed) == (not before)


# At so small a rate no epoch errs less, and each halves it.
PLATEAU = ['--sched', 'plateau', '--patience-epochs', '0', '--decay-rate', '0.5', '--phase', 'DG', '--lr', '1e-6']


def test_a_resumed_plateau_schedule_goes_on(images, tmp_path, capsys):
    more = [*PLATEAU, '--epochs', '5', '--checkpoint-hist', '9']
    assert cli.main(flags(images, tmp_path / 'straight', *more)) == 0
    rates = [float(row['lr']) for row in csv.DictReader((tmp_path / 'straight/run/summary.csv').open())]
    assert rates[-1] < rates[2] < rates[0]  # so that there is something to restore
    shutil.copytree(tmp_path / 'straight/run', tmp_path / 'resumed/run')
    checkpoint = tmp_path / 'resumed/run/checkpoint-2.pth.tar'
    assert cli.main(flags(images, tmp_path / 'resumed', *more, '--resume', str(checkpoint))) == 0
    resumed = list(csv.DictReader((tmp_path / 'resumed/run/summary.csv').open()))
    assert [float(row['lr']) for row in resumed] == rates
    summary = tmp_path / 'resumed/run/summary.csv'
    summary.write_text('\n'.join(line for line in summary.read_text().splitlines() if not line.startswith('1,')) + '\n')
    error = failure(capsys, flags(images, tmp_path / 'resumed', *more, '--resume', str(checkpoint)))
    assert "checkpoint-2.pth.tar' lacks epochs [1], resume from the run that has them" in error
    summary.unlink()
    error = failure(capsys, flags(images, tmp_path / 'resumed', *more, '--resume', str(checkpoint)))
    assert 'goes by the validations before' in error
    assert 'summary.csv' in error


@pytest.mark.parametrize(('module', 'name'), [(train.utils, 'update_summary'), (train.checkpoints, 'save')])
def test_a_plateau_schedule_goes_on_after_a_kill_between_summary_and_checkpoint(
    images, tmp_path, monkeypatch, module, name
):
    """Whichever comes first: the other one of that epoch is missing."""
    argv, original, calls = flags(images, tmp_path, *PLATEAU), getattr(module, name), [0]

    def dying(*args, **kwargs):
        calls[0] += 1
        if calls[0] == 3:
            raise Killed
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, dying)
        with pytest.raises(Killed):
            cli.main(argv)
    assert cli.main([*argv, '--resume', 'auto']) == 0
    assert [float(row['lr']) for row in rows(tmp_path / 'run')] == pytest.approx([1e-6, 1e-6, 5e-7, 2.5e-7])


def test_warns_of_classes_that_the_data_set_lacks(images, tmp_path, caplog):
    for classes in '3', '4':
        caplog.clear()
        argv = flags(images, tmp_path / classes, '--num-classes', classes, '--epochs', '1', '--phase', 'DG')
        assert cli.main(argv) == 0
        assert ('has 3 classes, the model 4: --num-classes 3 fits' in caplog.text) == (classes == '4')


def test_an_unknown_setting_or_file_is_refused(tmp_path, capsys):
    path = tmp_path / 'config.yaml'
    path.write_text('batchsize: 7\n')
    with pytest.raises(SystemExit):
        parse(['train', '-c', str(path)])
    assert "unknown setting 'batchsize', perhaps 'batch_size'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(['train', '-c', 'lenet'])
    assert 'lenet_mnist' in capsys.readouterr().err


@pytest.mark.parametrize('recipe', sorted(p.stem for p in RECIPES.glob('*.yaml')))
def test_recipes_are_valid(recipe):
    args = parse(['train', '-c', recipe])
    train.check_arguments(args)
    types = parse(['train'])
    for key, value in yaml.safe_load((RECIPES / f'{recipe}.yaml').read_text()).items():
        if key == 'base':
            continue
        assert getattr(args, key) == value
        default = getattr(types, key)
        assert default is None or isinstance(value, (int, float) if type(default) in (int, float) else type(default))


def test_an_unknown_metric_is_refused(tmp_path, capsys):
    (tmp_path / 'config.yaml').write_text('eval_metric: acc1')
    for more in (['--eval-metric', 'acc1'], ['-c', str(tmp_path / 'config.yaml')]):
        with pytest.raises(SystemExit):
            cli.main(['train', '--phase', 'GG', *more])
        assert "invalid choice: 'acc1'" in capsys.readouterr().err


def test_an_unknown_flag_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(['train', '--warmup-epoch5', '3'])
    assert exit_.value.code == 2
    assert '--warmup-epochs' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(['train', '--kd-model-name', 'resnet50'])  # a flag of timm's that only its own script has
    assert 'run it with --script' in capsys.readouterr().err


@pytest.mark.parametrize('recipe', ['alexnet_imagenet', 'zfnet_imagenet'])
def test_imagenet_recipes_train(images, tmp_path, recipe):
    """Table 2's settings but for the size of the data, of the batch and of the images."""
    argv = ['train', '-c', recipe, '--data-dir', str(images), '--num-classes', '3', '--img-size', '47', '-b', '24']
    argv += ['--epochs', '3', '--gen-epochs', '2', '-j', '0', '--device', 'cpu', '--val-interval', '3']
    assert cli.main([*argv, '--output', str(tmp_path), '--experiment', 'run']) == 0
    (row,) = csv.DictReader((tmp_path / 'run/summary.csv').open())
    assert row['train_phase'] == 'DG'
    assert float(row['lr']) == 0.01
    assert math.isfinite(float(row['train_loss']) + float(row['eval_loss']))
    checkpoint = torch.load(tmp_path / 'run/last.pth.tar', weights_only=False, mmap=True)
    assert checkpoint['task_state']['switch_step'] == 4
    assert {group['weight_decay'] for group in checkpoint['optimizer']['param_groups']} == {0.0, 5e-4}


# Schedules


def test_inv_schedule_is_caffes():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.01)
    schedule = InvLRScheduler(optimizer, decay_t=1e4, power=0.75, t_in_epochs=False)
    for update in (1, 5000, 10000):
        schedule.step_update(update)
        assert optimizer.param_groups[0]['lr'] == pytest.approx(0.01 * (1 + 1e-4 * update) ** -0.75)


def test_schedule_restarts_at_the_discriminative_rate():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    args = parse(['train', '--lr', '0.1', '--epochs', '10', '--warmup-epochs', '2', '--disc-lr', '0.04'])
    schedule = PhaseSchedule(optimizer, args, updates_per_epoch=5)
    schedule.step(5)
    assert optimizer.param_groups[0]['lr'] == pytest.approx(0.05)  # cosine, half way
    schedule.restart(6, 30)
    assert optimizer.param_groups[0]['lr'] == pytest.approx(0.04)  # no warm-up
    schedule.step(8)
    assert optimizer.param_groups[0]['lr'] == pytest.approx(0.02)  # half way through the other 4 epochs


@pytest.mark.parametrize(
    ('sched', 'decay', 'rate'),
    [('wsd', '8', 0.04 * (1 - 0.5**0.5)), ('wsd', '2', 0.04), ('rsqrt', '2', 0.04 / 2**0.5)],
)
def test_the_decay_of_the_schedule_fits_what_is_left(sched, decay, rate):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    argv = ['train', '--sched', sched, '--decay-epochs', decay, '--epochs', '10', '--warmup-epochs', '2']
    schedule = PhaseSchedule(optimizer, parse([*argv, '--disc-lr', '0.04']), updates_per_epoch=5)
    schedule.restart(6, 30)
    schedule.step(8)
    assert rates(optimizer) == pytest.approx([rate])


def test_the_restart_keeps_the_layer_decay():
    model = timm.create_model('test_resnet', num_classes=CLASSES)
    args = parse(['train', '--lr', '0.1', '--layer-decay', '0.5', '--disc-lr', '0.04', '--warmup-epochs', '0'])
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(args))
    schedule = PhaseSchedule(optimizer, args, updates_per_epoch=5)
    before = rates(optimizer)
    assert max(before) > 4 * min(before)
    schedule.restart(6, 30)
    assert rates(optimizer) == pytest.approx([0.4 * lr for lr in before])


def test_the_discriminative_rate_without_a_schedule():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    schedule = PhaseSchedule(optimizer, parse(['train', '--sched', 'none', '--disc-lr', '0.04']), updates_per_epoch=5)
    schedule.restart(6, 30)
    schedule.step(7)
    assert rates(optimizer) == [0.04]


def rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [group['lr'] for group in optimizer.param_groups]


def test_every_pass_over_the_unlabeled_images_has_an_order_of_its_own():
    """Other than in any other epoch, and than the labeled images': the same images would be a rank's own batch."""
    numbers = torch.arange(32)
    data = torch.utils.data.TensorDataset(numbers, numbers)
    sampler = torch.utils.data.DistributedSampler(data, num_replicas=2, rank=1, seed=0)
    loader = torch.utils.data.DataLoader(data, batch_size=16, sampler=sampler)
    orders = []
    for epoch in range(3):
        train_data.set_epoch(loader, epoch)
        orders.append(tuple(sampler))
        unlabeled = train_data.endless(loader, epoch)
        orders += [tuple(next(unlabeled).tolist()) for _ in range(3)]
    assert len(set(orders)) == 12


@pytest.mark.parametrize(('device', 'fast'), [('cuda', True), ('cpu', False)])
def test_the_kernels_of_timms_script_on_a_gpu(device, fast):
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.benchmark
    try:
        matmul.allow_tf32 = cudnn.benchmark = False
        train.use_fast_kernels(torch.device(device))
        assert (matmul.allow_tf32, cudnn.benchmark) == (fast, fast)
    finally:
        matmul.allow_tf32, cudnn.benchmark = before
