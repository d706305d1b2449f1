"""The flags of `gencnn train`: those of timm's train.py by the same names and defaults, and the generative ones.

Not taken over: augmentation splits with the JSD loss and split batch norm, knowledge distillation, NaFlex loaders,
torchscript and Apex. `--script` runs timm's own script where those are wanted.
"""

import argparse
import logging
import math
import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from timm.data import create_transform
from timm.task import ClassificationEvaluator
from timm.utils import ParseKwargs

from .task import PHASES

INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')

_logger = logging.getLogger(__name__)


class NameValues(ParseKwargs):
    """timm's name=value pairs, with an error for what is none."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Take the pairs, or end with an error."""
        for value in values:
            if '=' not in value:
                parser.error(f'argument {option_string}: expected name=value, got {value!r}')
        super().__call__(parser, namespace, values, option_string)


def ess_threshold(text: str) -> float | str:
    """A number of images, or 'plateau'."""
    return text if text == 'plateau' else float(text)


def add_generative_arguments(parser: Any) -> None:
    """Add the flags that timm does not have and that `--script` understands as well."""
    group = parser.add_argument_group('generative pre-training')
    add = group.add_argument
    add('--phase', default='GG+DG', choices=PHASES, help='generative, discriminative, or first one then the other')
    add('--gen-epochs', type=float, metavar='N', help='GG+DG: epochs before the switch')
    add('--switch-ess', type=ess_threshold, metavar='X', help="GG+DG: switch at this smoothed ESS, or at its 'plateau'")
    add(
        '--disc-lr',
        type=float,
        metavar='LR',
        help='learning rate from the switch on; the schedule starts anew, and with --script goes on, scaled',
    )
    text = 'before the switch: H times the discriminative loss, 1 - H times the generative one, of unlabeled images too'
    add('--hybrid', type=float, default=0.0, metavar='H', help=text)
    add('--pool-queue', type=int, default=0, metavar='N', help='past images whose logits enlarge the image pool')
    add('--pool-running-log-z', action='store_true', help='weigh images by a running log Z instead of the batch')
    add('--unlabeled-dataset', metavar='NAME', help='further images for the softmax over images; labels are not read')
    add('--unlabeled-data-dir', metavar='DIR', help='its root folder')
    add('--unlabeled-split', default='train', metavar='NAME')
    add('--unlabeled-batch-size', type=int, metavar='N', help='default: as --batch-size')
    add(
        '--unlabeled-weight',
        type=float,
        default=0.0,
        metavar='W',
        help='weight of the likelihood of unlabeled images, each as of its most probable class; 0: softmax only',
    )
    add(
        '--pool-reference',
        action='store_true',
        help="before the switch, images between the training images and the pictures' reference join the image pool",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `gencnn train`. Of a ConfigParser: any other parser does not read the file that -c names."""
    parser.epilog = "Other flags of timm's train.py: run it with --script."
    switch: dict[str, Any] = {'action': 'store_true'}
    parser.add_argument(
        '--script',
        nargs=argparse.REMAINDER,
        metavar='PATH',
        help="run timm's own train.py with the generative task; its flags and the generative ones follow",
    )
    parser.add_argument('-c', '--config', default='', metavar='FILE', help='YAML file or recipe')
    add_generative_arguments(parser)

    add = parser.add_argument_group('data').add_argument
    add('data', nargs='?', metavar='DIR', help='as --data-dir')
    add('--data-dir', metavar='DIR', help='root folder of the data set')
    add('--dataset', default='', metavar='NAME', help="'hfds/NAME', 'torch/NAME', ...; a folder if empty")
    add('--train-split', default='train', metavar='NAME')
    add('--val-split', default='validation', metavar='NAME', help="'' for no validation")
    add('--train-num-samples', type=int, metavar='N', help='size of an iterable training split')
    add('--val-num-samples', type=int, metavar='N', help='size of an iterable validation split')
    add('--dataset-download', **switch, help='allow torch/ and tfds/ data sets to be downloaded')
    add('--class-map', default='', metavar='FILE', help='file that maps class names to indices')
    add('--input-img-mode', metavar='MODE', help="image mode; default 'L' for one channel, else 'RGB'")
    add('--input-key', metavar='KEY', help='column of the images, of unlabeled ones from the same source too')
    add('--target-key', metavar='KEY', help='column of the labels')
    add('--cache-images', **switch, help='keep decoded images in memory (with --workers 0)')
    add(
        '--data-on-device',
        **switch,
        help='decode all images once, keep them on the device at the size of the network (a byte a pixel and channel: '
        '50,000 of 3x64x64 are 0.6 GB) and augment them there: crops (bilinear), flips, erasing, mixup, cutmix; in '
        'place of --cache-images',
    )

    add = parser.add_argument_group('model').add_argument
    add('--model', default='resnet50', metavar='NAME')
    add('--pretrained', **switch, help='start from pretrained weights')
    add('--pretrained-path', metavar='PATH', help='file to take the pretrained weights from')
    add('--pretrained-cfg-overlay', nargs='*', default={}, action=NameValues, help='entries of its configuration')
    add('--initial-checkpoint', default='', metavar='PATH', help='start from the weights of this checkpoint')
    add('--resume', default='', metavar='PATH', help="go on from this checkpoint; 'auto': the run's newest whole one")
    add('--no-resume-opt', **switch, help="do not restore the optimizer's state")
    add('--num-classes', type=int, metavar='N')
    add('--gp', metavar='POOL', help='global pooling: fast, avg, max, avgmax, ...')
    add('--img-size', type=int, metavar='N')
    add('--in-chans', type=int, metavar='N')
    add('--input-size', type=int, nargs=3, metavar='N', help='channels, height, width')
    add('--crop-pct', type=float, metavar='F', help='centre crop in validation')
    add('--mean', type=float, nargs='+', metavar='X', help='mean pixel value')
    add('--std', type=float, nargs='+', metavar='X', help='standard deviation of the pixels')
    add('--interpolation', default='', choices=['', *INTERPOLATIONS], metavar='NAME')
    add('-b', '--batch-size', type=int, default=128, metavar='N', help='per process (default: 128)')
    add('-vb', '--validation-batch-size', type=int, metavar='N')
    add('--channels-last', **switch)
    add('--grad-accum-steps', type=int, default=1, metavar='N')
    add('--grad-checkpointing', **switch)
    add('--fast-norm', **switch)
    add('--model-kwargs', nargs='*', default={}, action=NameValues)
    add('--head-init-scale', type=float, metavar='X')
    add('--head-init-bias', type=float, metavar='X')
    add('--torchcompile', nargs='?', const='inductor', metavar='BACKEND')
    add('--torchcompile-mode', metavar='MODE')

    add = parser.add_argument_group('device').add_argument
    add('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    add('--amp', action=argparse.BooleanOptionalAction, default=False, help='mixed precision')
    add('--amp-dtype', default='float16', choices=['float16', 'bfloat16'])
    add('--no-ddp-bb', **switch, help='do not broadcast buffers')
    add('--sync-bn', **switch, help='synchronised batch norm')
    add('--dist-bn', default='reduce', choices=['reduce', 'broadcast', ''], help='batch-norm statistics of the ranks')

    add = parser.add_argument_group('optimizer').add_argument
    add('--opt', default='sgd', metavar='NAME')
    add('--opt-eps', type=float, metavar='X')
    add('--opt-betas', type=float, nargs='+', metavar='X')
    add('--momentum', type=float, default=0.9, metavar='X')
    add('--weight-decay', type=float, default=2e-5, metavar='X')
    add('--clip-grad', type=float, metavar='X', help='clip the gradients')
    add('--clip-mode', default='norm', choices=['norm', 'value', 'agc'])
    add('--layer-decay', type=float, metavar='X', help='layer-wise decay of the learning rate')
    add('--layer-decay-min-scale', type=float, default=0, metavar='X')
    add('--layer-decay-no-opt-scale', type=float, metavar='X')
    add('--opt-kwargs', nargs='*', default={}, action=NameValues)

    add = parser.add_argument_group('learning-rate schedule').add_argument
    add('--sched', default='cosine', metavar='NAME', help="timm's, or 'inv': lr (1 + t/decay_epochs)^-decay_rate")
    add('--sched-on-updates', **switch, help='step the schedule on updates, not epochs')
    add('--lr', type=float, metavar='LR')
    add('--lr-base', type=float, default=0.1, metavar='LR', help='lr = lr_base * global_batch_size / base_size')
    add('--lr-base-size', type=int, default=256, metavar='N')
    add('--lr-base-scale', default='', choices=['', 'linear', 'sqrt'])
    add('--lr-noise', type=float, nargs='+', metavar='X')
    add('--lr-noise-pct', type=float, default=0.67, metavar='X')
    add('--lr-noise-std', type=float, default=1.0, metavar='X')
    add('--lr-cycle-mul', type=float, default=1.0, metavar='X')
    add('--lr-cycle-decay', type=float, default=0.5, metavar='X')
    add('--lr-cycle-limit', type=int, default=1, metavar='N')
    add('--lr-k-decay', type=float, default=1.0, metavar='X')
    add('--warmup-lr', type=float, default=1e-5, metavar='LR')
    add('--min-lr', type=float, default=0.0, metavar='LR')
    add('--epochs', type=int, default=300, metavar='N')
    add('--epoch-repeats', type=float, default=0.0, metavar='N')
    add('--start-epoch', type=int, metavar='N')
    add('--decay-milestones', type=int, nargs='+', default=[90, 180, 270], metavar='N')
    add('--decay-epochs', type=float, default=90, metavar='N')
    add('--warmup-epochs', type=int, default=5, metavar='N')
    add('--warmup-prefix', **switch)
    add('--cooldown-epochs', type=int, default=0, metavar='N')
    add('--patience-epochs', type=int, default=10, metavar='N')
    add('--decay-rate', '--dr', type=float, default=0.1, metavar='X')

    add = parser.add_argument_group('augmentation and regularisation').add_argument
    add('--no-aug', **switch, help='no augmentation at all')
    add(
        '--train-crop-mode',
        choices=['rrc', 'rkrc', 'rkrr', 'pad'],
        help="timm's, or pad: a random place of the whole image padded by an eighth, whatever --scale and --ratio say",
    )
    add('--scale', type=float, nargs=2, default=[0.08, 1.0], metavar='X')
    add('--ratio', type=float, nargs=2, default=[3 / 4, 4 / 3], metavar='X')
    add('--hflip', type=float, default=0.5, metavar='P')
    add('--vflip', type=float, default=0.0, metavar='P')
    add('--color-jitter', type=float, metavar='X', help='default: 0.4; none with --data-on-device')
    add('--color-jitter-prob', type=float, metavar='P')
    add('--grayscale-prob', type=float, default=0.0, metavar='P')
    add('--gaussian-blur-prob', type=float, default=0.0, metavar='P')
    add('--aa', metavar='NAME', help='AutoAugment policy')
    add('--aug-repeats', type=float, default=0, metavar='N')
    add('--loss', choices=['ce', 'bce', 'asl', 'poly'], help='discriminative loss (default: ce)')
    add('--class-stats', metavar='FILE', help="counts of the classes, written by timm's class_weights.py")
    add('--loss-pos-weight', metavar='X', help="of bce: 'neg_pos' (from --class-stats), a value, a list or a file")
    add('--loss-class-weight', metavar='X', help="of bce: 'inv_freq' or 'effective_num', a value, a list or a file")
    add('--loss-weight-power', type=float, default=1.0, metavar='X')
    add('--loss-weight-beta', type=float, default=0.999, metavar='X')
    add('--loss-weight-max', type=float, metavar='X')
    add('--bce-loss', **switch, help='as --loss bce')
    add('--bce-sum', **switch)
    add('--bce-target-thresh', type=float, metavar='X')
    add('--bce-pos-weight', type=float, metavar='X', help='as --loss-pos-weight')
    add('--asl-gamma-pos', type=float, default=1.0, metavar='X')
    add('--asl-gamma-neg', type=float, default=4.0, metavar='X')
    add('--poly-epsilon', type=float, default=2.0, metavar='X')
    add('--reprob', type=float, default=0.0, metavar='P', help='random erasing')
    add('--remode', default='pixel', choices=['const', 'rand', 'pixel'])
    add('--recount', type=int, default=1, metavar='N')
    add('--mixup', type=float, default=0.0, metavar='X')
    add('--cutmix', type=float, default=0.0, metavar='X')
    add('--cutmix-minmax', type=float, nargs=2, metavar='X')
    add('--mixup-prob', type=float, default=1.0, metavar='P')
    add('--mixup-switch-prob', type=float, default=0.5, metavar='P')
    add('--mixup-mode', default='batch', choices=['batch', 'pair', 'elem'])
    add('--mixup-off-epoch', type=int, default=0, metavar='N')
    text = 'of the discriminative loss, and of the targets that mixup and cutmix make for both (default: 0.1)'
    add('--smoothing', type=float, default=0.1, metavar='X', help=text)
    add('--train-interpolation', default='random', choices=['', 'random', *INTERPOLATIONS], metavar='NAME')
    add('--drop', type=float, metavar='P', help="dropout (default: the network's own; timm's train.py has 0)")
    add('--drop-path', type=float, metavar='P')
    add('--drop-block', type=float, metavar='P')
    add('--bn-momentum', type=float, metavar='X')
    add('--bn-eps', type=float, metavar='X')

    add = parser.add_argument_group('moving average of the weights').add_argument
    add('--model-ema', **switch)
    add('--model-ema-force-cpu', **switch)
    add('--model-ema-decay', type=float, default=0.9998, metavar='X')
    add('--model-ema-warmup', **switch)

    add = parser.add_argument_group('miscellaneous').add_argument
    add('--seed', type=int, default=42, metavar='N')
    add('--worker-seeding', default='all', choices=['all', 'part'])
    add('--log-interval', type=int, default=50, metavar='N', help='batches between two updates of the progress bar')
    add('--val-interval', type=int, default=1, metavar='N', help='epochs between two validations and checkpoints')
    add('--recovery-interval', type=int, default=0, metavar='N', help='batches between two recovery checkpoints')
    add('--checkpoint-hist', type=int, default=10, metavar='N')
    add('-j', '--workers', type=int, default=4, metavar='N')
    add('--pin-mem', **switch)
    add('--no-prefetcher', **switch)
    add('--output', default='', metavar='DIR', help='default: ./output/train')
    add('--experiment', default='', metavar='NAME', help='sub-folder of the output')
    metrics = ClassificationEvaluator.metric_names
    add('--eval-metric', default='top1', choices=metrics, help='the best checkpoint is the best by this one')
    add('--log-wandb', **switch)
    add('--wandb-project', metavar='NAME')
    add('--wandb-tags', nargs='+', default=[], metavar='TAG')
    add('--log-tensorboard', **switch)


def validates_average(flags: Mapping[str, Any]) -> bool:
    """Whether a run with these flags validates its averaged weights: not where they lie on another device."""
    return bool(flags.get('model_ema')) and not flags.get('model_ema_force_cpu')


# What is not done on the device, and the values that do not ask for it.
_NOT_ON_DEVICE: dict[str, tuple[Any, ...]] = {
    'train_crop_mode': (None, 'rrc', 'pad'),
    'train_interpolation': ('random', 'bilinear'),
    'color_jitter': (None, 0),
    'grayscale_prob': (0,),
    'gaussian_blur_prob': (0,),
    'aa': (None, ''),
    'aug_repeats': (0,),
}

_LEAST = {
    **dict.fromkeys(('batch_size', 'grad_accum_steps', 'epochs', 'val_interval', 'log_interval', 'checkpoint_hist'), 1),
    'start_epoch': 0,
}


# The half-open intervals in which generative flags lie.
_GENERATIVE_RANGES = {
    **dict.fromkeys(('gen_epochs', 'disc_lr', 'pool_queue', 'unlabeled_weight'), (0, math.inf)),
    'hybrid': (0, 1),
    'unlabeled_batch_size': (1, math.inf),
}


def check_generative_arguments(args: argparse.Namespace) -> None:
    """Refuse what `add_generative_arguments` reads but is out of range or does not make sense together.

    Phase DG may come with flags of the other phases, as the control of a configuration; that it does without images
    which were named is a warning.

    Raises:
        ValueError: It is or does not.
    """
    for name, (low, high) in _GENERATIVE_RANGES.items():
        value = getattr(args, name)
        if value is not None and not low <= value < high:  # nor NaN
            raise ValueError(f'--{name.replace("_", "-")} {value} is outside [{low}, {high})')
    if not (args.switch_ess in (None, 'plateau') or args.switch_ess >= 1):
        raise ValueError(f'--switch-ess {args.switch_ess} is never reached: the ESS is a number of images, at least 1')
    if args.phase == 'GG+DG' and args.gen_epochs is None and args.switch_ess is None:
        raise ValueError('phase GG+DG needs to know when to switch: give --gen-epochs or --switch-ess')
    named = _names_unlabeled(args)
    if args.unlabeled_weight and not named:
        raise ValueError(f'--unlabeled-weight {args.unlabeled_weight} weighs no image: name an --unlabeled-dataset')
    if named and not has_unlabeled(args):
        _logger.warning(f'--phase {args.phase} learns from labeled images alone: the unlabeled ones are not loaded')


def has_unlabeled(args: argparse.Namespace) -> bool:
    """Whether the flags ask for unlabeled images that some phase uses."""
    return args.phase != 'DG' and _names_unlabeled(args)


def _names_unlabeled(args: argparse.Namespace) -> bool:
    return args.unlabeled_dataset is not None or args.unlabeled_data_dir is not None


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other, before anything is loaded.

    Raises:
        ValueError: They do.
    """
    args.data_dir = args.data or args.data_dir
    check_generative_arguments(args)
    if args.phase != 'DG' and args.batch_size < 2 and int(os.environ.get('WORLD_SIZE', 1)) < 2:
        raise ValueError(f'batch size {args.batch_size} has no image pool: phase {args.phase} needs at least 2 images')
    for name, least in _LEAST.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f'--{name.replace("_", "-")} {value} must be at least {least}')
    if args.data_on_device:
        _check_on_device(args)
    for name in ('initial_checkpoint', 'pretrained_path'):
        path = getattr(args, name)
        if path and not os.path.isfile(path):
            raise ValueError(f'--{name.replace("_", "-")} {path!r} is not a file')
    if not args.smoothing < 1:
        raise ValueError(f'--smoothing {args.smoothing} leaves nothing for the right class: give less than 1')
    mixed = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    if mixed and args.batch_size % 2:
        raise ValueError(f'mixup and cutmix pair the images of a batch: --batch-size {args.batch_size} must be even')
    if args.sched == 'plateau' and (args.sched_on_updates or not args.val_split):
        raise ValueError(
            '--sched plateau goes by the validation at the end of an epoch: leave out --sched-on-updates, and name a '
            '--val-split'
        )
    if args.sched == 'step' and args.decay_epochs <= 0:
        raise ValueError(f'--decay-epochs {args.decay_epochs} must be positive for --sched step')
    if args.aa:
        try:
            create_transform(8, is_training=True, auto_augment=args.aa)
        except (AssertionError, ValueError, KeyError) as error:
            raise ValueError(
                f"--aa {args.aa!r} is no policy of timm's ({error}): give one like 'v0', 'original', '3a', "
                "'rand-m9-mstd0.5-inc1' or 'augmix-m3-w3'"
            ) from error
    if args.resume == 'auto' and not args.experiment:
        raise ValueError("--resume auto needs --experiment, the name of the run's folder")
    if args.amp and args.device == 'cpu' and args.amp_dtype == 'float16':
        raise ValueError('float16 needs loss scaling, which the CPU lacks: add --amp-dtype bfloat16')
    for name in ('log_wandb', 'log_tensorboard'):
        if getattr(args, name) and find_spec(name.removeprefix('log_')) is None:
            raise ValueError(f'--{name.replace("_", "-")} needs the package {name.removeprefix("log_")}: install it')


def _check_on_device(args: argparse.Namespace) -> None:
    for name, values in {} if args.no_aug else _NOT_ON_DEVICE.items():
        value = getattr(args, name)
        if value not in values:
            known = ' or '.join(str(v) for v in values if v not in (None, ''))
            remedy = f'set it to {known}' if known else 'leave it out'
            flag = f'--{name.replace("_", "-")}'
            raise ValueError(f'{flag} {value} is not done on the device: {remedy}, or leave out --data-on-device')
