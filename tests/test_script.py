"""`gencnn train --script` on a small script that is built like timm's train.py: what it trains, validates and saves."""

import argparse
import csv
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import timm.data
import timm.scheduler
import timm.task
import torch
import torch.multiprocessing as mp
from pictures import SIZE, draw_bars
from ranks import assert_no_gloo_thread, become_rank, unused_port
from timm.data import create_dataset, create_loader

from timm_gencnn import cli
from timm_gencnn import script as script_module

CLASSES = 3

# As in timm's train.py: the loaders, then the task; the model for validation fetched once, before training; optimizer,
# resume, average, compilation and DDP in this order; the schedule last.
SCRIPT = """
import argparse
import torch
from timm import utils
from timm.data import FastCollateMixup, create_dataset, create_loader
from timm.models import create_model
from timm.scheduler import create_scheduler_v2
from timm.task import (
    ClassificationTask, LogitDistillationTask, MultiLabelClassificationTask, load_task_ema_checkpoint,
    resume_task_checkpoint,
)

parser = argparse.ArgumentParser()
parser.add_argument('--data-dir')
parser.add_argument('--output')
parser.add_argument('--epochs', type=int, default=4)
parser.add_argument('--stop', type=int, default=99)
parser.add_argument('--resume')
parser.add_argument('--start-epoch', type=int)
parser.add_argument('--model', default='lenet')
parser.add_argument('--mixup', action='store_true')
parser.add_argument('--model-ema', action='store_true')
parser.add_argument('--torchcompile')
parser.add_argument('--grad-accum-steps', type=int, default=1)
parser.add_argument('--sizes', type=int, nargs='+')
parser.add_argument('--task', default='classification')
parser.add_argument('--schedule-first', action='store_true')
parser.set_defaults(hybrid=0.7)  # as timm's --config does with an args.yaml of another run
args = parser.parse_args()
args.device = 'cpu'
device = utils.init_distributed_device(args)
utils.random_seed(0)
model = create_model(args.model, num_classes=3, in_chans=1)
if args.schedule_first:
    create_scheduler_v2(torch.optim.SGD(model.parameters(), lr=0.1), num_epochs=1)
loaders = []
for split in ('train', 'validation'):
    dataset = create_dataset('', root=args.data_dir, split=split, input_img_mode='L')
    training = split == 'train'
    mixup = FastCollateMixup(mixup_alpha=0.5, num_classes=3) if args.mixup and training else None
    loaders.append(create_loader(
        dataset, input_size=(1, 28, 28), batch_size=8, is_training=training, num_workers=0, mean=(0.5,), std=(0.5,),
        device=device, collate_fn=mixup, distributed=args.distributed, persistent_workers=False,
        input_size_choices=args.sizes if training else None,
    ))
loss = {'smoothing': 0.1, 'soft_targets': args.mixup}
if args.task == 'multilabel':
    task = MultiLabelClassificationTask(model=model)
elif args.task == 'distillation':
    task = LogitDistillationTask(student_model=model, teacher_model=model)
else:
    task = ClassificationTask(model=model, device=device, dtype=None, verbose=False, criterion_kwargs=loss)
model = task.get_trainable_module()
eval_model = task.get_eval_model()
optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.5)
start = resume_task_checkpoint(task, args.resume, optimizer=optimizer) if args.resume else 0
if args.model_ema:
    task.setup_ema(decay=0.9)
    if args.resume:
        load_task_ema_checkpoint(task, args.resume)
if args.torchcompile:
    task.compile(backend=args.torchcompile)
    model, eval_model = task.get_trainable_module(), task.get_eval_model()
    if task.has_ema():
        task.compile_ema(backend=args.torchcompile)
if args.distributed:
    task.prepare_distributed(device_ids=[device])
    model = task.get_trainable_module()
saver = utils.CheckpointSaver(model, optimizer, args=args, checkpoint_dir=args.output, task=task) \\
    if utils.is_primary(args) else None
scheduler, epochs = create_scheduler_v2(optimizer, sched='step', num_epochs=args.epochs, decay_epochs=100)
start = start if args.start_epoch is None else args.start_epoch
if start:
    scheduler.step(start)


def validate(model):
    evaluator = task.create_evaluator()
    model.eval()
    with torch.inference_mode():
        for images, target in loaders[1]:
            evaluator.update(model(images), target)
    return evaluator.compute(distributed=args.distributed)


for epoch in range(start, min(epochs, args.stop)):
    utils.random_seed(epoch)
    task.get_trainable_module().train()
    for i, (images, target) in enumerate(loaders[0]):
        update = (i + 1) % args.grad_accum_steps == 0
        if update:
            loss = task(images, target)['loss']
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            task.update_ema(step=epoch * len(loaders[0]) + i)
        else:
            with task.no_sync():
                task(images, target)['loss'].backward()
    metrics = validate(eval_model)
    if task.has_ema():
        metrics = validate(task.get_eval_model(ema=True))
    if saver is not None:
        train_metrics = {'phase': getattr(task, 'generative', None)}
        summary = args.output + '/summary.csv'
        utils.update_summary(epoch, train_metrics, metrics, summary, lr=optimizer.param_groups[0]['lr'])
        saver.save_checkpoint(epoch, metric=metrics['top1'])
    scheduler.step(epoch + 1)
"""

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def images(tmp_path_factory) -> Path:
    """Three classes of pictures, a bar at a place of its own in noise; twice as many of the first class."""
    counts = {'train': (28, 14, 14), 'validation': (12, 6, 6)}
    return draw_bars(tmp_path_factory.mktemp('images'), counts, noise=120, bar=100)


@pytest.fixture
def script(tmp_path) -> Path:
    path = tmp_path / 'train.py'
    path.write_text(SCRIPT)
    return path


def run(script: Path, images: Path, out: Path, *more: str) -> int:
    out.mkdir(exist_ok=True)
    return cli.main(['train', '--script', str(script), '--data-dir', str(images), '--output', str(out), *more])


def run_plain(script: Path, images: Path, out: Path, monkeypatch) -> None:
    out.mkdir()
    monkeypatch.setattr(sys, 'argv', [str(script), '--data-dir', str(images), '--output', str(out)])
    runpy.run_path(str(script), run_name='__main__')


def load(out: Path) -> dict:
    return torch.load(out / 'last.pth.tar', weights_only=False)


def rows(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / 'summary.csv').open()))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def validation_loss(images: Path, state: dict[str, torch.Tensor]) -> float:
    """Of these weights in a plain timm model."""
    model = timm.create_model('lenet', num_classes=CLASSES).eval()
    model.load_state_dict(state)
    dataset = create_dataset('', root=str(images), split='validation', input_img_mode='L')
    cpu = torch.device('cpu')
    loader = create_loader(dataset, (1, SIZE, SIZE), 99, num_workers=0, mean=(0.5,), std=(0.5,), device=cpu)
    with torch.inference_mode():
        (loss,) = (torch.nn.functional.cross_entropy(model(x), y) for x, y in loader)
    return loss.item()


def test_phase_dg_is_the_plain_script(script, images, tmp_path, monkeypatch):
    run_plain(script, images, tmp_path / 'plain', monkeypatch)
    assert run(script, images, tmp_path / 'dg', '--phase', 'DG') == 0
    plain, dg = load(tmp_path / 'plain'), load(tmp_path / 'dg')
    assert same(plain['state_dict'], dg['state_dict'])
    assert plain['metric'] == dg['metric']
    assert timm.task.ClassificationTask.__module__.startswith('timm.')  # all put back
    assert timm.data.create_loader.__module__.startswith('timm.')
    assert timm.scheduler.create_scheduler_v2.__module__.startswith('timm.')
    assert timm.task.TrainingTask.__init__.__module__.startswith('timm.')
    assert argparse.ArgumentParser.parse_args.__module__ == 'argparse'


@pytest.mark.parametrize(
    'more', [[], ['--model-ema', '--torchcompile', 'eager'], ['--mixup', '--grad-accum-steps', '2']], ids=' '.join
)
def test_what_is_validated_is_what_is_saved(script, images, tmp_path, more):
    """The intercepts of the epoch's end, though the script fetched the model for validation before it began."""
    assert run(script, images, tmp_path / 'gg', '--phase', 'GG', '--epochs', '3', *more) == 0
    checkpoint = load(tmp_path / 'gg')
    ema = '_ema' if '--model-ema' in more else ''
    weights = checkpoint['state_dict' + ema]
    validated = float(rows(tmp_path / 'gg')[-1]['eval_loss'])
    assert validated == pytest.approx(validation_loss(images, weights), abs=1e-5)
    (name, bias), *_ = checkpoint['task_state' + ema]['bias'].items()  # control: the bias without the intercepts
    assert abs(validated - validation_loss(images, {**weights, name: bias})) > 1e-2  # a thousand tolerances


FEW = ['--unlabeled-data-dir', '{images}', '--unlabeled-split', 'validation', '--unlabeled-batch-size', '999']
FULL = ['--gen-epochs', '2', '--disc-lr', '0.004', '--model-ema']


def test_the_switch_and_its_rate(script, images, tmp_path):
    assert run(script, images, tmp_path / 'run', *FULL) == 0
    assert [row['train_phase'] for row in rows(tmp_path / 'run')] == ['True', 'True', 'False', 'False']
    assert [float(row['lr']) for row in rows(tmp_path / 'run')] == pytest.approx([0.02, 0.02, 0.004, 0.004])
    checkpoint = load(tmp_path / 'run')
    assert checkpoint['task_state']['switch_step'] == 14  # 56 images in batches of 8
    args = vars(checkpoint['args'])  # the script's flags and the generative ones
    assert (args['epochs'], args['gen_epochs'], args['disc_lr'], args['phase']) == (4, 2.0, 0.004, 'GG+DG')
    assert args['hybrid'] == 0  # what was trained


@pytest.mark.parametrize('resumed', [0, 1])
@pytest.mark.parametrize('start', [1, 3])
def test_the_switch_is_counted_from_the_first_epoch(script, images, tmp_path, start, resumed):
    more = ['--gen-epochs', '2', '--epochs', '4']
    if resumed:
        assert run(script, images, tmp_path / 'first', *more, '--stop', str(resumed)) == 0
        more += ['--resume', str(tmp_path / 'first/last.pth.tar')]
    assert run(script, images, tmp_path / 'run', *more, '--start-epoch', str(start)) == 0
    phases = [(row['epoch'], row['train_phase']) for row in rows(tmp_path / 'run')]
    assert phases == [(str(epoch), str(epoch < 2)) for epoch in range(start, 4)]


@pytest.mark.parametrize('switch', [2, 6])
def test_the_rest_of_the_schedule_is_scaled(switch):
    """Warm-up (the first four epochs) and minimum too; control: the same schedule without --disc-lr."""
    rates = []
    for disc_lr in (None, 0.01):
        session = script_module._Session(SimpleNamespace(disc_lr=disc_lr))
        session.task = SimpleNamespace(switch_step=None, on_switch=lambda: None)
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        schedule = {'sched': 'cosine', 'num_epochs': 10, 'warmup_epochs': 4, 'warmup_lr': 1e-3, 'min_lr': 5e-3}
        scheduler, _ = session.create_scheduler(optimizer, **schedule)
        assert session.task.optimizer is optimizer
        seen = []
        for epoch in range(10):
            if epoch == switch:
                session.task.switch_step = 1
                session.task.on_switch()
            seen.append(optimizer.param_groups[0]['lr'])
            scheduler.step(epoch + 1)
        rates.append(seen)
    assert rates[1] == pytest.approx([r * (0.1 if epoch >= switch else 1) for epoch, r in enumerate(rates[0])])


@pytest.mark.parametrize('stop', [1, 2, 3])
def test_resume_goes_on_bit_equal(script, images, tmp_path, stop):
    """In the generative phase, at the switch, and after it, where the rate must stay the discriminative one."""
    assert run(script, images, tmp_path / 'straight', *FULL) == 0
    assert run(script, images, tmp_path / 'parts', *FULL, '--stop', str(stop)) == 0
    assert run(script, images, tmp_path / 'parts', *FULL, '--resume', str(tmp_path / 'parts/last.pth.tar')) == 0
    a, b = load(tmp_path / 'straight'), load(tmp_path / 'parts')
    assert same(a['state_dict'], b['state_dict'])
    assert same(a['state_dict_ema'], b['state_dict_ema'])
    assert torch.equal(a['task_state']['log_z'], b['task_state']['log_z'])
    assert a['task_state']['switch_step'] == b['task_state']['switch_step'] == 14
    assert rows(tmp_path / 'straight') == rows(tmp_path / 'parts')


UNLABELED = ['--unlabeled-data-dir', '{images}', '--unlabeled-split', 'validation']


@pytest.mark.parametrize('pool', [['--pool-reference'], UNLABELED, [*UNLABELED, '--unlabeled-weight', '1']])
def test_further_images_join_the_pool_before_the_switch_only(script, images, tmp_path, pool):
    more = [flag.format(images=images) for flag in pool]
    log_z, weights = {}, {}
    for phase in ('GG', 'DG'):
        for name, flags in (('with', more), ('without', []), ('in the softmax', more[:4])):
            out = tmp_path / f'{phase}_{name}'
            assert run(script, images, out, '--phase', phase, '--epochs', '1', *flags) == 0
            log_z[phase, name] = load(out)['task_state']['log_z']
            weights[phase, name] = load(out)['state_dict']
    assert not torch.allclose(log_z['GG', 'with'], log_z['GG', 'without'])
    assert same(weights['DG', 'with'], weights['DG', 'without'])
    assert same(weights['GG', 'with'], weights['GG', 'in the softmax']) == (len(more) <= 4)


def run_rank(rank: int, port: int, script: Path, images: Path, out: Path) -> None:
    become_rank(rank, port)
    assert run(script, images, out, *FULL, '--grad-accum-steps', '2') == 0
    assert_no_gloo_thread()


def test_two_ranks(script, images, tmp_path):
    arguments = (unused_port(), script, images, tmp_path / 'run')
    mp.start_processes(run_rank, args=arguments, nprocs=2, start_method='spawn', join=True)
    state = load(tmp_path / 'run')
    assert state['task_state']['class_counts'].sum() == 96  # all images of two epochs
    assert [row['train_phase'] for row in rows(tmp_path / 'run')] == ['True', 'True', 'False', 'False']
    assert 'conv1.weight' in state['state_dict']


@pytest.mark.parametrize(
    ('text', 'more', 'message'),
    [
        ('print(1)', [], 'lacks ClassificationTask, get_eval_model, create_loader, create_scheduler_v2'),
        (SCRIPT.replace('get_eval_model', 'eval'), [], f'train.py of timm {timm.__version__}'),
        (SCRIPT, ['--phase', 'GG', '--task', 'multilabel'], 'MultiLabelClassificationTask cannot be generative'),
        (SCRIPT, ['--phase', 'GG', '--task', 'distillation'], 'LogitDistillationTask cannot be generative'),
        (SCRIPT, ['--phase', 'GG', '--schedule-first'], 'creates a schedule before a timm.task.ClassificationTask'),
        (SCRIPT.replace("'step'", "'none'"), ['--gen-epochs', '1', '--disc-lr', '0.1'], 'needs a schedule whose rates'),
        (SCRIPT, ['--phase', 'GG', '--pool-reference', '--sizes', '28', '32'], 'leave out --train-img-sizes'),
        (SCRIPT, ['--phase', 'GG', *FEW], 'do not fill one batch of 999: lower --unlabeled-batch-size'),
        ('# ' + SCRIPT.replace('\n', '\n# '), ['--phase', 'GG'], 'has created no ClassificationTask'),
        (SCRIPT, [], 'give --gen-epochs or --switch-ess'),
        (SCRIPT, ['--phase', 'GG', '--unlabeled-weight', '1'], 'weighs no image: name an --unlabeled-dataset'),
        (SCRIPT, ['--phase', 'GG', '--unlabeled-weight', 'nan'], '--unlabeled-weight nan is outside [0, inf)'),
        (None, [], 'is not a file'),
    ],
)
def test_refuses(images, tmp_path, capsys, text, more, message):
    path = tmp_path / 'train.py'
    if text is not None:
        path.write_text(text)
    assert run(path, images, tmp_path / 'out', *(word.format(images=images) for word in more)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith('gencnn train: error:')
    assert message in error
    assert not (tmp_path / 'out/last.pth.tar').exists()
