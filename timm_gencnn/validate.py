"""`gencnn validate`: accuracy, calibration, and how well scores tell a data set from another one."""

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_input_data_config
from timm.models import create_model, load_checkpoint
from timm.task import ClassificationEvaluator
from torch import Tensor, nn
from tqdm.auto import tqdm

from .generative import as_generative
from .loss import check_targets
from .model_config import own_config
from .networks import frozen, move, without_autocast
from .reference import per_channel
from .runs import best_checkpoint, is_run, model_arguments
from .train_args import INTERPOLATIONS, NameValues
from .train_data import check_classes, columns, open_dataset, open_unlabeled, plain_loader

__all__ = ['add_arguments', 'auroc', 'expected_calibration_error', 'main', 'noisy', 'scores', 'validate']


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `gencnn validate`; those of timm's validate.py go by the same names."""
    add = parser.add_argument
    switch: dict[str, Any] = {'action': 'store_true'}
    toggle: dict[str, Any] = {'action': argparse.BooleanOptionalAction, 'default': False}  # a run may have set it
    add(
        'data',
        nargs='?',
        metavar='DIR',
        help='as --data-dir; or the folder of a training run, whose flags and best checkpoint are taken',
    )
    add('-c', '--config', default='', metavar='FILE', help="YAML file, or a run's args.yaml")
    add('--data-dir', metavar='DIR', help='root folder of the data set')
    add(
        '--dataset',
        default='',
        metavar='NAME',
        help="'hfds/NAME', 'torch/NAME', ...; a folder if empty; another one than that of a run takes neither the "
        "run's folder nor its split, class map and columns",
    )
    add('--split', default='validation', metavar='NAME')
    add('--model', '-m', default='gencnn_lenet', metavar='NAME')
    add('--pretrained', **switch, help='the published weights; also without --checkpoint')
    add('--checkpoint', default='', metavar='PATH', help='a checkpoint of gencnn train, or of timm')
    add('--use-ema', **toggle, help='the moving average of the weights in the checkpoint')
    add('--num-classes', type=int, metavar='N')
    add('--in-chans', type=int, metavar='N')
    add('--input-size', type=int, nargs=3, metavar='N', help='channels, height, width')
    add('--img-size', type=int, metavar='N')
    add('--gp', metavar='POOL', help='global pooling: fast, avg, max, avgmax, ...')
    add('--bn-eps', type=float, metavar='X')
    add('--pretrained-cfg-overlay', nargs='*', default={}, action=NameValues, help='entries of its configuration')
    add('--model-kwargs', nargs='*', default={}, action=NameValues)
    add('--crop-pct', type=float, metavar='F')
    add('--mean', type=float, nargs='+', metavar='X')
    add('--std', type=float, nargs='+', metavar='X')
    add('--interpolation', default='', choices=['', *INTERPOLATIONS], metavar='NAME')
    add('--class-map', default='', metavar='FILE')
    add('--input-img-mode', metavar='MODE', help="image mode; default 'L' for one channel, else 'RGB'")
    add('--input-key', metavar='KEY', help='column of the images, of a second data set from the same source too')
    add('--target-key', metavar='KEY', help='column of the labels')
    add('-b', '--batch-size', type=int, default=256, metavar='N')
    add('-j', '--workers', type=int, default=4, metavar='N')
    add('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    add('--channels-last', **switch)
    add('--amp', **toggle, help='mixed precision')
    add('--amp-dtype', default='float16', choices=['float16', 'bfloat16'])
    add(
        '--noise',
        type=float,
        default=0.0,
        metavar='S',
        help='accuracy and calibration with Gaussian noise of this s.d. on pixels in [0, 1]',
    )
    add('--ood-dataset', metavar='NAME', help='a second data set, whose images should score lower: gives AUROC')
    add('--ood-data-dir', metavar='DIR')
    add('--ood-split', default='validation', metavar='NAME')
    add('--log-z-split', metavar='NAME', help='estimate log Z on this split (a training split) for the log-ratio score')
    add('--results-file', default='', metavar='FILE', help='write the results as JSON')


def main(args: argparse.Namespace) -> None:
    """Validate as the flags say, and print one figure a line.

    Raises:
        ValueError: Missing data, classes that do not fit, or an unusable checkpoint or device.
    """
    if args.data and is_run(args.data):  # its args.yaml has been read by ConfigParser
        args.checkpoint = args.checkpoint or str(best_checkpoint(Path(args.data)))
        args.data = None
    args.data_dir = args.data or args.data_dir
    for flag, path in (('--checkpoint', args.checkpoint), ('--data-dir', args.data_dir)):
        if path and is_run(path):
            raise ValueError(f'{flag} {path!r} is a training run: give its folder alone, gencnn validate {path}')
    model = _create_model(args).eval()
    move(model, args.device)
    device = torch.device(args.device)
    # published figures are those at the published test size; a run is validated at the size it was trained with
    config = resolve_input_data_config(model, vars(args), use_test_size=not args.checkpoint)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    channels = config['input_size'][0]

    def loader(name: str, root: str | None, split: str, opened: Callable = open_dataset, **kwargs: Any) -> Any:
        dataset = opened(name, root, split, channels, input_img_mode=args.input_img_mode, **kwargs)
        return plain_loader(dataset, config, args.batch_size, args.workers, device)

    labeled = columns(args, args.dataset) | {'class_map': args.class_map or None}
    if args.log_z_split:
        as_generative(model).estimate_log_z(loader(args.dataset, args.data_dir, args.log_z_split, **labeled))
    data = loader(args.dataset, args.data_dir, args.split, **labeled)
    check_classes(data.dataset, model.num_classes)
    autocast = torch.autocast(device.type, getattr(torch, args.amp_dtype), enabled=args.amp)
    results: dict[str, Any] = {'model': args.model, 'checkpoint': args.checkpoint, 'noise': args.noise}
    results |= validate(model, noisy(data, args.noise, config['std']), autocast)
    if args.ood_dataset is not None or args.ood_data_dir is not None:
        ood = args.ood_dataset
        outside = loader(ood or '', args.ood_data_dir, args.ood_split, open_unlabeled, **columns(args, ood))
        inside_scores, outside_scores = (scores(model, tqdm(d, desc='scores', leave=False)) for d in (data, outside))
        results |= {f'auroc_{k}': 100 * auroc(inside_scores[k], outside_scores[k]) for k in inside_scores}
    for name, value in results.items():
        print(f'{name:20s} {value:.4f}' if isinstance(value, float) else f'{name:20s} {value}')
    if args.results_file:
        with open(args.results_file, 'w') as file:
            json.dump(results, file, indent=2)


def _create_model(args: argparse.Namespace) -> Any:
    try:
        overlay = args.pretrained_cfg_overlay or None
        arguments = model_arguments(vars(args))
        pretrained = args.pretrained or not args.checkpoint  # as timm's validate.py: an untrained network says nothing
        model = create_model(args.model, pretrained=pretrained, pretrained_cfg_overlay=overlay, **arguments)
        classes = own_config(model).get('num_classes', model.num_classes)
        if not args.checkpoint and classes != model.num_classes:
            raise ValueError(
                f'the published {args.model!r} has {classes} classes, not {model.num_classes}: give --checkpoint'
            )
        if args.checkpoint:
            load_checkpoint(model, args.checkpoint, use_ema=args.use_ema)
    except (RuntimeError, TypeError, KeyError, FileNotFoundError) as error:
        reason = str(error) or 'no such file'
        raise ValueError(f'cannot load model {args.model!r} {args.checkpoint!r}: {reason}') from error
    return model


@torch.inference_mode()
def validate(model: nn.Module, loader: Any, autocast: Any = None) -> dict[str, Any]:
    """Accuracy and calibration of a classifier.

    Args:
        model: Maps images [n, C, H, W] to logits [n, classes]; in eval mode.
        loader: Batches of normalised images and class indices.
        autocast: A context for the forward passes.

    Returns:
        'top1' and 'top5' in per cent, 'nll' in nats, 'ece' in per cent (15 bins), 'images'.

    Raises:
        ValueError: A label is out of range.
    """
    device = next(model.parameters()).device
    evaluator = ClassificationEvaluator(device)
    confidence, correct = [], []
    for images, target in tqdm(loader, desc='validate', leave=False):
        images, target = images.to(device), target.to(device)
        with autocast or without_autocast(device):
            logits = model(images).float()
        check_targets(target, logits.shape[1])
        evaluator.update(logits, target)
        best = logits.softmax(1).max(1)
        confidence.append(best.values)
        correct.append(best.indices == target)
    if not confidence:
        raise ValueError('the data set has no images')
    result = evaluator.compute()
    ece = expected_calibration_error(torch.cat(confidence), torch.cat(correct))
    return {
        'top1': result['top1'],
        'top5': result['top5'],
        'nll': result['loss'],
        'ece': 100 * ece,
        'images': int(evaluator.counts[0]),
    }


def noisy(loader: Any, sigma: float, std: Sequence[float], seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of a loader with Gaussian noise on the images, the same at every call.

    Args:
        loader: Batches of normalised images [n, C, H, W] and targets.
        sigma: Standard deviation of the noise, for pixels in [0, 1]; 0 leaves the images alone.
        std: What the pixels of each channel were divided by; of three for one channel, their mean.
        seed: Seed of the noise.

    Raises:
        ValueError: A sigma that is negative or not finite.

    Yields:
        Images and targets. Pixels are not clipped.
    """
    if not 0 <= sigma < math.inf:
        raise ValueError(f'noise {sigma}: give a standard deviation of at least 0')
    generator = torch.Generator().manual_seed(seed)
    for images, target in loader:
        if sigma > 0:
            scale = sigma / torch.tensor(per_channel(std, images.shape[1]), device='cpu').view(-1, 1, 1)
            images = images + (scale * torch.randn(images.shape, generator=generator, device='cpu')).to(images)
        yield images, target


def expected_calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over equal-width bins (Guo et al., ICML 2017, equation 3).

    Args:
        confidence: Probability of the predicted class [n], in [0, 1].
        correct: Whether the prediction is right [n].
        bins: Number of bins (lower edge excluded, upper edge included).

    Returns:
        The error, in [0, 1].
    """
    index = (confidence.double() * bins).ceil().long().clamp(1, bins) - 1
    gap = torch.zeros(bins, dtype=torch.float64, device=confidence.device)
    gap.index_add_(0, index, confidence.double() - correct.double())
    return gap.abs().sum().item() / len(confidence)


def auroc(inside: Tensor, outside: Tensor) -> float:
    """Probability that an inside score exceeds an outside one, ties counting half: the area under the ROC curve.

    Args:
        inside: Scores that should be high [n].
        outside: Scores that should be low [m].

    Returns:
        The area, in [0, 1].

    Raises:
        ValueError: A score is NaN, or one side is empty.
    """
    if len(inside) == 0 or len(outside) == 0 or inside.isnan().any() or outside.isnan().any():
        raise ValueError(f'AUROC needs scores without NaN on both sides, got {len(inside)} and {len(outside)}')
    inside, outside = inside.double(), outside.double().sort().values
    below = torch.searchsorted(outside, inside) + torch.searchsorted(outside, inside, right=True)
    return below.double().mean().item() / (2 * len(outside))


def scores(model: nn.Module, loader: Any) -> dict[str, Tensor]:
    """Scores of images that should be high on what the model was trained on.

    Args:
        model: A classifier in eval mode; a generative one that knows log Z also gives the log-ratio.
        loader: Batches that start with normalised images.

    Returns:
        [n] each: 'logit', max_y f_y(x); 'log_ratio', max_y f_y(x) - log Z_y, where log Z is known; 'gradient_norm',
        -|d/dx logsumexp_y f_y(x)| (JEM's approximate mass: typical images lie where the density is flat).
    """
    log_z = getattr(model, 'log_z', None)
    kinds: dict[str, Callable[[Tensor], Tensor]] = {'logit': lambda logits: logits.amax(1)}
    if log_z is not None:
        kinds['log_ratio'] = lambda logits: (logits - log_z.to(logits)).amax(1)
    found: dict[str, list[Tensor]] = {name: [] for name in (*kinds, 'gradient_norm')}
    parameter = next(model.parameters())
    with frozen(model):
        for images, *_ in loader:
            x = images.to(parameter).requires_grad_()
            logits = model(x).float()
            for name, score in kinds.items():
                found[name].append(score(logits.detach()))
            gradient = torch.autograd.grad(logits.logsumexp(1).sum(), x)[0]
            found['gradient_norm'].append(-gradient.flatten(1).norm(dim=1))
    return {name: torch.cat(values).cpu() for name, values in found.items()}
