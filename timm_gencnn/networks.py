"""Networks as a sampler wants them: loaded and in eval mode, on a device, frozen, their weights identified."""

from __future__ import annotations

import argparse
import hashlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import timm
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from .model_config import own_config
from .probes import exclusive, without_checkpointing
from .registry import check_checkpoint, check_name
from .runs import is_run, load_run, means_run
from .train_args import NameValues

MODEL = 'a timm model name, hf-hub:USER/REPO, local-dir:FOLDER, or the folder of a training run'  # on command lines


def load(model: str | nn.Module, device: str | torch.device | None) -> tuple[nn.Module, str, torch.device]:
    """The network that a user means, its name, and the device it is on.

    Raises:
        ValueError: It cannot be had, is no module, or the device cannot be used.
    """
    net = load_model(model) if isinstance(model, str) else model
    if not isinstance(net, nn.Module):
        raise ValueError(f'model must be a name or a torch module, got {type(net).__name__}')
    if device is not None:
        move(net, device)
    where = next((p.device for p in net.parameters()), torch.device('cpu'))
    return net, model if isinstance(model, str) else describe(net), where


def load_model(name: str, **kwargs: Any) -> nn.Module:
    """`timm.create_model(name, pretrained=True)`, or the network of a training run, in eval mode, with clear errors.

    Args:
        name: A registered name such as 'gencnn_resnet50' or 'resnet50.a1_in1k', 'hf-hub:USER/REPO',
            'local-dir:FOLDER', or the folder of a training run (see `timm_gencnn.runs`).
        **kwargs: Passed on to `timm.create_model`.

    Raises:
        ValueError: The model is unknown, has no pretrained weights, or they cannot be read; its classifier would be a
            new one; or a run is to have other weights or arguments than its own.
    """
    if means_run(name):
        if kwargs:
            own = 'a training run with a checkpoint and arguments of its own'
            raise ValueError(f'{name!r} is {own}: leave out {", ".join(kwargs).replace("_path", "")}')
        return load_run(name)[0]
    check_name(name)
    if is_run(name):
        warnings.warn(f'{name!r} is taken for the timm model; the training run of that name is ./{name}', stacklevel=2)
    if 'num_classes' in kwargs and not kwargs.get('checkpoint_path'):
        raise ValueError(
            f'--num-classes {kwargs["num_classes"]} is that of a --checkpoint: without one it would give the network a '
            'new, untrained head'
        )
    arch = name.split('.')[0]
    if ':' not in name and not kwargs.get('checkpoint_path') and not timm.models.is_model_pretrained(name):
        tags = timm.list_pretrained(f'{arch}.*')
        hint = f'pretrained are {", ".join(tags)}' if tags else 'pass a trained module, or a checkpoint'
        raise ValueError(f'{name!r} has no pretrained weights, and an untrained network has nothing to show: {hint}')
    if kwargs.get('checkpoint_path'):
        check_checkpoint(kwargs['checkpoint_path'])
    try:
        return timm.create_model(name, pretrained=not kwargs.get('checkpoint_path'), **kwargs).eval()
    except ValueError:
        raise
    except Exception as e:  # downloads and files fail in many ways; all mean that the weights could not be had
        reason = ' '.join(f'{type(e).__name__}: {e}'.split())[:500]
        other = ' (with other --num-classes or --model-kwargs?)' if 'size mismatch' in reason else ''
        raise ValueError(f'cannot load {name!r}{other}: {reason}') from e


def add_weight_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say which weights a named architecture has."""
    add = parser.add_argument
    add('--checkpoint', metavar='FILE', help='weights for the model, as timm or gencnn train saved them')
    add('--num-classes', type=int, metavar='N', help='number of classes of --checkpoint')
    add('--model-kwargs', nargs='*', default={}, action=NameValues, help='further arguments of the architecture')


def weight_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Those of `load_model` that were given.

    Raises:
        ValueError: The checkpoint is the folder of a run.
    """
    if args.checkpoint and is_run(args.checkpoint):
        raise ValueError(
            f'{args.checkpoint!r} is a training run: give it in place of {args.model!r}, not as --checkpoint'
        )
    given = {'checkpoint_path': args.checkpoint, 'num_classes': args.num_classes}
    return {name: value for name, value in given.items() if value is not None} | args.model_kwargs


def kwargs_told(args: argparse.Namespace) -> dict[str, list[str]]:
    """--model-kwargs, if given, as a setting of pictures: by them the same weights may be another network."""
    told = sorted(f'{name}={value}' for name, value in args.model_kwargs.items())
    return {'model_kwargs': told} if told else {}


def move(model: nn.Module, device: str | torch.device) -> None:
    """Moves a model in place.

    Raises:
        ValueError: There is no such device here, or it has no float64, in which energies are summed (mps).
    """
    try:
        torch.zeros((), dtype=torch.float64, device=device).item()  # the meta device holds no numbers
        model.to(device)
    except (RuntimeError, TypeError, AssertionError) as e:
        raise ValueError(f"device {str(device)!r} cannot be used, try 'cpu': {str(e).splitlines()[0]}") from None


def default_device(name: str | None) -> str:
    """The named device, else cuda if there is one, else cpu."""
    return name or ('cuda' if torch.cuda.is_available() else 'cpu')


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """No autocast of a caller reaches inside."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def weights_digest(model: nn.Module) -> str:
    """First 16 hexadecimal digits of the SHA-256 of a model's state_dict: names, shapes, types and values.

    What is no tensor, such as a module's extra state, counts by its `repr`.
    """
    sha = hashlib.sha256()
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            sha.update(f'{name} {value!r}'.encode())
            continue
        value = value.detach().cpu().contiguous()
        sha.update(f'{name} {tuple(value.shape)} {value.dtype}'.encode())
        sha.update(value.flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b'')
    return sha.hexdigest()[:16]


def describe(model: nn.Module) -> str:
    cfg = own_config(model)
    arch, tag = cfg.get('architecture'), cfg.get('tag')
    return f'{arch}.{tag}' if arch and tag else arch or type(model).__name__


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient inside, which saves a third of the work, and no activation is computed twice.

    All is as it was on the way out. Other threads that want the model wait.
    """
    with exclusive(model):
        trainable = [p for p in model.parameters() if p.requires_grad and not p.is_inference()]
        try:
            for p in trainable:
                p.requires_grad_(False)
            with without_checkpointing(model):
                yield
        finally:
            for p in trainable:
                p.requires_grad_(True)


@contextmanager
def channels_last(model: nn.Module) -> Iterator[None]:
    """Weights of convolutions lie in channels-last order inside, and so do the images that they put out.

    Faster or as fast on most networks, slower on a batch of very small images; the values are the same, and on the way
    out so are the tensors.
    """
    kept = [(p, p.data) for p in model.parameters() if p.ndim == 4]
    try:
        for p, data in kept:
            p.data = data.contiguous(memory_format=torch.channels_last)
        yield
    finally:
        for p, data in kept:
            p.data = data


@contextmanager
def affine_batch_norms(model: nn.Module) -> Iterator[None]:
    """Batch norms with frozen statistics are a product and a sum inside, y = a x + b, which is all that they do then.

    For a GPU: torch's own kernels take longer to launch, and hand back the gradient of channels-last images in torch's
    default order, so that every convolution before them copies it. The values differ by rounding.
    """
    norms = [m for m in model.modules() if type(m) in (nn.BatchNorm2d, BatchNormAct2d) and 'forward' not in vars(m)]
    norms = [m for m in norms if not m.training and m.running_var is not None]
    try:
        for norm in norms:
            norm.forward = _affine(norm)
        yield
    finally:
        for norm in norms:
            vars(norm).pop('forward', None)


@torch.no_grad()
def _affine(norm: Any) -> Callable[[Tensor], Tensor]:
    """The forward pass of a batch norm in eval mode, and of what timm's has behind it."""
    own = norm.forward
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight
    shift = -scale * norm.running_mean if norm.bias is None else norm.bias - scale * norm.running_mean
    a, b = (v.to(norm.running_var.dtype).view(-1, 1, 1) for v in (scale, shift))

    def forward(x: Tensor) -> Tensor:
        if x.ndim != 4 or x.dtype != a.dtype:  # under autocast
            return own(x)
        x = torch.addcmul(b, x, a)
        return norm.act(norm.drop(x)) if isinstance(norm, BatchNormAct2d) else x

    return forward
