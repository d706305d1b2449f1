"""Checks of what was downloaded, before anything is built from it.

A config.json decides which network is built, how large, and where timm looks for weights; a safetensors header decides
how much memory its tensors take. Both are data from a stranger: every field has a type and a range here, what is not
known is refused, and the network is laid out without memory, and compared with the weights, before it is built.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError
from huggingface_hub.utils.sha import git_hash, sha_fileobj
from torch import nn
from torch.nn.modules import module as nn_module

from .model_config import WEIGHTS

MAX_PARAMETERS = 10_000_000_000  # timm's largest network has 6.7e9
MAX_MODULES = 10_000  # timm's largest network has 2,541

_MAX_SIDE = 8192
_MAX_CHANNELS = 4096
_MAX_CLASSES = 1_000_000
_MAX_INT = 1 << 20
_RESERVED = {
    *('pretrained', 'pretrained_cfg', 'pretrained_cfg_overlay', 'pretrained_model_args', 'pretrained_strict'),
    *('pretrained_filter_fn', 'cache_dir', 'checkpoint_path', 'model_name', 'model_cfg', 'feature_cfg'),
    *('kwargs_filter', 'device', 'dtype', 'scriptable', 'exportable', 'no_jit', 'pruned'),
}

Check = Callable[[Any], bool]


def _integer(low: int, high: int) -> Check:
    return lambda v: type(v) is int and low <= v <= high


def _number(low: float, high: float) -> Check:
    return lambda v: type(v) in (int, float) and low <= v <= high  # not so for NaN and infinity


def _list(item: Check, low: int, high: int) -> Check:
    return lambda v: isinstance(v, list | tuple) and low <= len(v) <= high and all(map(item, v))


def _text(length: int) -> Check:
    return lambda v: isinstance(v, str) and len(v) <= length and v.isprintable()


def _dict(value: Check) -> Check:
    return lambda v: (
        isinstance(v, dict) and len(v) <= _MAX_CLASSES and all(map(_text(1000), v)) and all(map(value, v.values()))
    )


def _optional(*checks: Check) -> Check:
    return lambda v: v is None or any(check(v) for check in checks)


def _name(v: Any) -> bool:
    return isinstance(v, str) and re.fullmatch(r'[\w.+\- ]{0,100}', v, re.ASCII) is not None


def _boolean(v: Any) -> bool:
    return type(v) is bool


def _image_size(v: Any) -> bool:
    return isinstance(v, list | tuple) and len(v) == 3 and _channels(v[0]) and all(map(_side, v[1:]))


def _argument(v: Any, depth: int = 3) -> bool:
    """A plain value: what a timm constructor takes and JSON can hold."""
    if isinstance(v, list | tuple):
        return depth > 0 and len(v) <= 1000 and all(_argument(item, depth - 1) for item in v)
    if isinstance(v, dict):
        return depth > 0 and len(v) <= 100 and all(_name(k) and _argument(item, depth - 1) for k, item in v.items())
    return _plain(v) or (type(v) is float and math.isfinite(v))


_plain = _optional(_boolean, _name, _integer(-_MAX_INT, _MAX_INT))
_channels, _side = _integer(1, _MAX_CHANNELS), _integer(1, _MAX_SIDE)
_size = '[channels, height, width]'

_PRETRAINED_CFG: dict[str, tuple[Check, str]] = {
    'custom_load': (lambda v: v is False, 'false: weights come from model.safetensors alone'),
    'input_size': (_image_size, _size),
    'fixed_input_size': (_boolean, 'true or false'),
    'crop_pct': (_number(0.01, 10), 'a number from 0.01 to 10'),
    'test_crop_pct': (_optional(_number(0.01, 10)), 'a number from 0.01 to 10'),
    'mean': (_list(_number(-1e4, 1e4), 1, _MAX_CHANNELS), 'a list of numbers'),
    'std': (_list(_number(1e-6, 1e4), 1, _MAX_CHANNELS), 'a list of positive numbers'),
    'num_classes': (_integer(0, _MAX_CLASSES), f'a whole number from 0 to {_MAX_CLASSES}'),
    'label_offset': (_optional(_integer(0, 1)), '0 or 1'),
    'label_names': (_optional(_list(_text(1000), 0, _MAX_CLASSES), _dict(_text(1000))), 'a list of names'),
    'label_descriptions': (_optional(_dict(_text(10_000))), 'a map from names to descriptions'),
    **dict.fromkeys(('test_input_size', 'min_input_size'), (_optional(_image_size), _size)),
    **dict.fromkeys(('pool_size', 'test_pool_size'), (_optional(_list(_side, 1, 3)), 'a list of sizes')),
    **dict.fromkeys(('architecture', 'tag'), (_optional(_name), 'a name')),
    **dict.fromkeys(('interpolation', 'crop_mode'), (_name, 'a name')),
    **dict.fromkeys(('first_conv', 'classifier'), (_optional(_name, _list(_name, 0, 100)), 'the name of a module')),
    **dict.fromkeys(
        ('license', 'description', 'origin_url', 'paper_name', 'paper_ids', 'notes'),
        (_optional(_text(10_000), _list(_text(10_000), 0, 100)), 'a short text'),
    ),
}
_MODEL_ARGS: dict[str, tuple[Check, str]] = {
    'num_classes': _PRETRAINED_CFG['num_classes'],
    'in_chans': (_channels, f'a whole number from 1 to {_MAX_CHANNELS}'),
    'img_size': (
        lambda v: _side(v) or _list(_side, 2, 2)(v),
        f'a side from 1 to {_MAX_SIDE}, or [height, width]',
    ),
    'log_z': (_optional(_list(_number(-1e30, 1e30), 1, _MAX_CLASSES)), 'one finite number per class'),
}


def check_config(config: Any, source: str) -> dict[str, Any]:
    """Check a parsed config.json, of which nothing is known.

    Args:
        config: What `json.loads` made of the file.
        source: Where it came from, for the message.

    Returns:
        `config`.

    Raises:
        ValueError: If a field is missing, unknown or out of its range, or names an architecture that is not registered.
    """
    if not isinstance(config, dict):
        raise ValueError(f'config.json of {source} holds {_show(config)} where an object belongs')
    architecture = config.get('architecture')
    if not (isinstance(architecture, str) and _name(architecture) and timm.is_model(architecture)):
        raise ValueError(
            f'config.json of {source} names the architecture {_show(architecture)}, which is not registered: '
            'import the package that defines it, or update timm and timm_gencnn'
        )
    pretrained_cfg, model_args = config.get('pretrained_cfg'), config.get('model_args', {})
    check_model_config(pretrained_cfg, model_args, source)
    for key in ('num_classes', 'label_names', 'label_descriptions'):
        if key in config:
            _check_field(key, config[key], _PRETRAINED_CFG, f'config.json of {source}')
    log_z, num_classes = model_args.get('log_z'), model_args.get('num_classes', config.get('num_classes'))
    if log_z is not None and len(log_z) != num_classes:
        raise ValueError(f'config.json of {source} has {len(log_z)} values of log_z for {num_classes} classes')
    return config


def check_model_config(pretrained_cfg: Any, model_args: Any, source: str) -> None:
    """Check the two parts of a config.json that timm passes on to a model's entrypoint.

    Args:
        pretrained_cfg: The input, the classes and the source of the weights.
        model_args: Keyword arguments of the model.
        source: Where they came from, for the message.

    Raises:
        ValueError: If a field is unknown or out of its range, or would take the weights from elsewhere.
    """
    where = f'config.json of {source}'
    for name, fields in (('pretrained_cfg', pretrained_cfg), ('model_args', model_args)):
        if not isinstance(fields, dict):
            raise ValueError(f'{where} has {_show(fields)} as {name}, where an object belongs')
    for key, value in pretrained_cfg.items():
        if key not in _PRETRAINED_CFG:
            raise ValueError(
                f'{where} has the entry {_show(key)} in pretrained_cfg, which is not allowed in a download'
            )
        _check_field(key, value, _PRETRAINED_CFG, where)
    for key, value in model_args.items():
        if not (isinstance(key, str) and re.fullmatch(r'[a-zA-Z]\w{0,63}', key, re.ASCII)) or key in _RESERVED:
            raise ValueError(f'{where} has the model argument {_show(key)}, which is not allowed in a download')
        if key in _MODEL_ARGS:
            _check_field(key, value, _MODEL_ARGS, where)
        elif not _argument(value):
            raise ValueError(
                f'{where} has {_show(value)} as {key}: only names, flags and numbers up to {_MAX_INT} are allowed'
            )


def _check_field(key: str, value: Any, fields: dict[str, tuple[Check, str]], where: str) -> None:
    check, meaning = fields[key]
    if not check(value):
        raise ValueError(f'{where} has {_show(value)} as {key}: must be {meaning}')


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + '...'


class _TooLarge(ValueError):
    pass


@contextmanager
def _bounded(source: str) -> Iterator[None]:
    """Refuse, within the block, to lay out a network of more than `MAX_PARAMETERS` numbers or `MAX_MODULES` modules."""
    thread, numbers, modules = threading.get_ident(), 0, 0

    def count(module: nn.Module, name: str, value: Any) -> None:
        nonlocal numbers, modules
        if threading.get_ident() == thread:
            modules += isinstance(value, nn.Module)
            numbers += value.numel() if isinstance(value, torch.Tensor) else 0
            if numbers > MAX_PARAMETERS or modules > MAX_MODULES:
                raise _TooLarge(
                    f'config.json of {source} asks for a network of more than {MAX_PARAMETERS:,} parameters or '
                    f'{MAX_MODULES:,} modules: it was not built'
                )

    hooks = [
        nn_module.register_module_parameter_registration_hook(count),
        nn_module.register_module_buffer_registration_hook(count),
        nn_module.register_module_module_registration_hook(count),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def check_build(
    architecture: str, pretrained_cfg: dict[str, Any], model_args: dict[str, Any], source: str
) -> dict[str, torch.Size]:
    """Lay the network out on the meta device, which takes no memory.

    Args:
        architecture: A registered name.
        pretrained_cfg: The checked configuration.
        model_args: Checked keyword arguments.
        source: Where they came from, for the message.

    Returns:
        The shape of each entry of the network's state dict.

    Raises:
        ValueError: If the network cannot be built, or is too large.
    """
    try:
        with torch.device('meta'), _bounded(source):
            model = timm.create_model(architecture, pretrained=False, pretrained_cfg=pretrained_cfg, **model_args)
    except _TooLarge:
        raise
    except Exception as error:
        raise ValueError(f'{architecture} cannot be built as config.json of {source} says: {error}') from error
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def check_weights(path: str | Path, shapes: dict[str, torch.Size], source: str) -> None:
    """Check the header of a safetensors file, without loading a tensor, against the network's state dict.

    Raises:
        ValueError: If the header is damaged, or tensors are missing, unknown or of another shape.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework='pt') as file:
            found = {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f'model.safetensors of {source} is damaged ({error}): download or export it again') from error
    wrong = sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        raise ValueError(
            f'model.safetensors of {source} does not fit its config.json: {len(wrong)} tensors differ, first {name}: '
            f'{_shape(found.get(name))} in the file, {_shape(shapes.get(name))} in the network'
        )


def _shape(shape: torch.Size | None) -> str:
    return 'absent' if shape is None else str(list(shape))


def check_hash(path: Path, repo_id: str) -> None:
    """Compare a downloaded file with its hash, which is the name that the Hub's cache stores it under.

    Raises:
        OSError: If they differ. The file is then removed, so that the next attempt downloads it again.
    """
    blob = path.resolve()
    if re.fullmatch(r'[0-9a-f]{64}', blob.name):
        with blob.open('rb') as file:
            found = sha_fileobj(file).hex()
    elif re.fullmatch(r'[0-9a-f]{40}', blob.name):
        found = git_hash(blob.read_bytes())
    else:  # a cache without symbolic links does not keep the hash
        return
    if found != blob.name:
        path.unlink()
        blob.unlink()
        raise OSError(f'{path.name} of {repo_id} was damaged on its way here, and was removed from the cache: repeat')


def check_download(
    architecture: str,
    pretrained_cfg: dict[str, Any],
    model_args: dict[str, Any],
    pretrained: bool = True,
    cache_dir: str | Path | None = None,
) -> dict[str, Any]:
    """Check a model that timm reads from the Hub ('hf-hub:...') or a folder ('local-dir:...'), before it is built.

    Args:
        architecture: The plain architecture that config.json asks for, without 'gencnn_'.
        pretrained_cfg: What timm made of config.json, `source` and location included.
        model_args: The model arguments of config.json, without the user's own.
        pretrained: Whether weights will be loaded. If so, they must be a safetensors file that fits the network.
        cache_dir: Where timm will look for downloads.

    Returns:
        A configuration by which timm reads the weights that were checked and nothing else. By itself it would take a
        pickle from a repository that has no safetensors file, or whatever was committed since.

    Raises:
        ValueError: If anything is not as `push_to_hub` would have written it.
    """
    config = dict(pretrained_cfg)
    on_hub = config.pop('source') == 'hf-hub'
    location = str(config.pop('hf_hub_id' if on_hub else 'file'))
    source = re.sub(r'.*models--(.+)--(.+)[/\\]snapshots[/\\].*', r'\1/\2', location)  # a folder of the Hub's cache
    check_model_config(config, model_args, source)
    plain_args = {key: value for key, value in model_args.items() if key != 'log_z'}
    shapes = check_build(architecture, config, plain_args, source)
    if not on_hub:
        if pretrained and (Path(location) / WEIGHTS).exists():
            check_weights(Path(location) / WEIGHTS, shapes, source)
        return pretrained_cfg
    if not pretrained:
        return pretrained_cfg
    repo_id, _, revision = location.partition('@')
    try:
        path = Path(hf_hub_download(repo_id, WEIGHTS, revision=revision or None, cache_dir=cache_dir))
    except RemoteEntryNotFoundError as error:
        raise ValueError(f'{location} has no {WEIGHTS}: other formats may run code and are not loaded') from error
    check_hash(path, location)
    check_weights(path, shapes, source)
    return {**pretrained_cfg, 'hf_hub_id': f'{repo_id}@{path.parent.name}'}  # the folder of a commit bears its name


def read_config(path: str | Path, source: str) -> dict[str, Any]:
    """Read and check a config.json.

    Raises:
        ValueError: If it is not JSON, or does not pass `check_config`.
    """
    path = Path(path)
    if path.stat().st_size > 1 << 26:
        raise ValueError(f'config.json of {source} is {path.stat().st_size:,} bytes: too large to be one')
    try:
        config = json.loads(path.read_text(encoding='utf-8'))
    except (ValueError, RecursionError) as error:
        raise ValueError(f'config.json of {source} is not JSON ({error})') from error
    return check_config(config, source)
