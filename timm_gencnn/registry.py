"""gencnn_<arch> for every architecture timm has, and the pretrained tags of our own checkpoints.

A generative entrypoint builds the plain model with the plain entrypoint, so every argument means what it means there,
and then gives it the generative class. Its pretrained cfgs are timm's own under the new name.
"""

from __future__ import annotations

import difflib
import os
import sys
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from timm.models import (
    DefaultCfg,
    PretrainedCfg,
    is_model,
    list_models,
    model_entrypoint,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models import _registry as timm_registry
from timm.models._helpers import _torch_load
from timm.models._hub import _PREFERRED_FILES
from torch import nn

from . import gencnn, zoo
from .config_check import check_download
from .generative import as_generative

__all__ = ['check_checkpoint', 'register', 'register_all']

PREFIX = 'gencnn_'


def register_all() -> None:
    """Register the checkpoints of `zoo` as pretrained tags, then gencnn_<arch> for every architecture timm lists."""
    for name in zoo.names():
        _register_tag(name)
    for arch in list_models(exclude_filters=f'{PREFIX}*'):
        register(arch)


def register(arch: str) -> None:
    """Register gencnn_<arch> in timm, with the pretrained cfgs of `arch`.

    Importing the package does this for every architecture timm has by then; call it for one registered later.

    Args:
        arch: An architecture in timm's registry, without a tag.

    Raises:
        ValueError: If timm has no such architecture.
    """
    if not is_model(arch) or '.' in arch:
        raise ValueError(f'{arch!r} is not an architecture of timm: register it there first, or see timm.list_models()')
    name = PREFIX + arch
    entrypoint = _entrypoint(arch)
    base: Any = timm_registry._model_default_cfgs.get(arch)  # a DefaultCfg, whatever timm's annotation says
    if base is not None:
        cfgs = timm_registry._model_pretrained_cfgs  # holds the Hub ids that timm completes from the plain name
        gencnn.default_cfgs[name] = DefaultCfg(
            tags=deque(base.tags),
            cfgs={tag: cfgs.get(f'{arch}.{tag}' if tag else arch, cfg) for tag, cfg in base.cfgs.items()},
            is_pretrained=base.is_pretrained,
        )
    setattr(gencnn, name, register_model(entrypoint))


def check_name(name: str) -> None:
    """Check that a model name is registered; names with a source ('hf-hub:...') are left to timm.

    Raises:
        ValueError: It is not; names near ones.
    """
    arch = name.split('.')[0]
    if ':' not in name and not is_model(arch):
        near = difflib.get_close_matches(arch, list_models(), n=3, cutoff=0.5)
        hint = f'did you mean {", ".join(near)}?' if near else 'timm.list_models() lists them'
        if os.path.isdir(name):
            hint = f"no training run is in this folder (there is no args.yaml); a Hub folder is 'local-dir:{name}'"
        elif os.path.isfile(name):
            hint = 'give the folder of the run, or a model and this file as --checkpoint'
        elif os.sep in name:
            hint = 'there is no such folder either'
        raise ValueError(f'unknown model {name!r}: {hint}')


def check_checkpoint(path: str | Path) -> None:
    """Check that a checkpoint file is whole, without loading its tensors.

    Args:
        path: A safetensors file or one written by `torch.save`, or a folder that holds one, as in timm's `local-dir:`.

    Raises:
        ValueError: If there is no such file, or it is truncated, corrupted or not a checkpoint.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in _PREFERRED_FILES if (path / name).exists()]
        if not found:
            raise ValueError(f'{path} holds no checkpoint: give a file, or a folder with {_PREFERRED_FILES[0]}')
        path = found[0]
    try:
        if path.suffix == '.safetensors':
            safe_open(path, 'pt')
        elif path.is_file() and path.suffix not in ('.npz', '.npy'):
            _torch_load(str(path), map_location='meta')
        elif not path.exists():
            raise FileNotFoundError('no such file')
    except Exception as error:
        raise ValueError(f'{path} cannot be read as a checkpoint ({error}): download it or save it again') from error


def _register_tag(name: str) -> None:
    """Register a checkpoint of the zoo as a pretrained tag of its plain architecture."""
    record = zoo.read(name)
    arch, tag = record['architecture'], record['tag']
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in record['pretrained_cfg'].items()}
    entrypoint = model_entrypoint(arch)
    cfgs = sys.modules[entrypoint.__module__].default_cfgs[arch]
    fields['file'] = str(zoo.FOLDER / f'{name}.safetensors')
    cfgs.cfgs[tag] = PretrainedCfg(**fields)
    if record.get('default') or not cfgs.is_pretrained:
        cfgs.tags.appendleft(tag)  # the first tag is what timm takes when none is named
    else:
        cfgs.tags.append(tag)
    cfgs.is_pretrained = True
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # registering again is how timm reads a changed cfg; it warns of it
        register_model(entrypoint)


_SAME_FUNCTION = {
    'pretrained_cfg',
    'pretrained_cfg_overlay',
    'pretrained_model_args',
    'cache_dir',
    'device',
    'drop_rate',
    'drop_path_rate',
}


def _entrypoint(arch: str) -> Callable[..., nn.Module]:
    base = model_entrypoint(arch)
    name = PREFIX + arch

    def entrypoint(pretrained: bool = False, log_z: Sequence[float] | None = None, **kwargs: Any) -> nn.Module:
        saved = kwargs.get('pretrained_model_args') or {}
        source = None
        downloaded = kwargs.get('pretrained_cfg')
        if isinstance(downloaded, dict) and downloaded.get('source') in ('hf-hub', 'local-dir'):
            kwargs['pretrained_cfg'] = check_download(arch, downloaded, saved, pretrained, kwargs.get('cache_dir'))
        if pretrained:
            cfg = resolve_pretrained_cfg(name, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
            source = cfg.file or cfg.hf_hub_id or cfg.url
            if cfg.file:
                check_checkpoint(cfg.file)
                if Path(cfg.file).parent == zoo.FOLDER:
                    zoo.verify(Path(cfg.file).stem)
                    record = zoo.read(Path(cfg.file).stem)
                    kwargs = record['model_args'] | kwargs
                    saved = record['model_args'] | {'log_z': record['log_z']}
                    log_z = record['log_z'] if log_z is None else log_z
        try:
            model = base(pretrained=pretrained, **kwargs)
        except SafetensorError as error:
            raise ValueError(
                f'the weights of {name} from {source} are corrupted ({error}): download them again'
            ) from error
        if kwargs.get('features_only'):
            return model
        model.pretrained_cfg['architecture'] = name
        model = as_generative(model)
        # a saved log Z belongs to the saved weights: it goes with them, with the classifier that timm replaces, and
        # with whatever else makes another function of them
        kept = pretrained and all(getattr(model, k) == saved[k] for k in ('num_classes', 'in_chans') if k in saved)
        kept = kept and kwargs.keys() <= saved.keys() | _SAME_FUNCTION
        if log_z is not None and (kept or log_z != saved.get('log_z')):
            model.set_log_z(log_z)
        return model

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__module__ = gencnn.__name__
    entrypoint.__doc__ = f'{arch} with the generative class; takes log_z and whatever {arch} takes.'
    return entrypoint
