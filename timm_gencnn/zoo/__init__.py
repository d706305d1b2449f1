"""Checkpoints small enough to ship, each with its results: `<arch>.<tag>.safetensors` and `<arch>.<tag>.json`.

Every pair in this folder is a pretrained tag: of the plain `<arch>` and of `gencnn_<arch>`. The JSON file holds

    architecture    the plain architecture, e.g. 'lenet'
    tag             e.g. 'gg_dg_mnist'
    default         whether `pretrained=True` without a tag means this one
    model_args      arguments of the entrypoint, beside those that `pretrained_cfg` implies
    pretrained_cfg  fields of timm's PretrainedCfg: input_size, mean, std, num_classes, label_names, ...
    log_z           log Z_y of each class, or null; not known to the plain architecture
    results         what was measured, e.g. {'test_error': 0.76}
    recipe          how it was made: command, seed, versions
    sha256          of the safetensors file, checked whenever it is loaded
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from timm_gencnn.model_config import WEIGHTS, own_config, write_model

__all__ = ['FOLDER', 'names', 'read', 'save', 'verify']

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Return the checkpoints as '<arch>.<tag>', in alphabetical order."""
    return sorted(path.stem for path in FOLDER.glob('*.*.safetensors'))


def read(name: str) -> dict[str, Any]:
    """Return the JSON record of a checkpoint, '<arch>.<tag>'.

    Raises:
        ValueError: If the record is missing or is not a JSON object with the keys above.
    """
    path = FOLDER / f'{name}.json'
    try:
        record = json.loads(path.read_text(encoding='utf-8'))
        record['architecture'], record['tag'], record['pretrained_cfg'], record['sha256']
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path} is not the record of a checkpoint ({error!r}): install timm_gencnn again') from error
    return record


def verify(name: str) -> None:
    """Check that a checkpoint is the one its record describes.

    Raises:
        ValueError: If the safetensors file has other contents than when it was saved.
    """
    path = FOLDER / f'{name}.safetensors'
    if hashlib.sha256(path.read_bytes()).hexdigest() != read(name)['sha256']:
        raise ValueError(f'{path} is corrupted (its SHA-256 is not that of its record): install timm_gencnn again')


def save(
    model: nn.Module,
    tag: str,
    folder: str | os.PathLike[str],
    *,
    default: bool = False,
    results: dict[str, Any] | None = None,
    recipe: dict[str, Any] | None = None,
    data_config: dict[str, Any] | None = None,
    label_names: list[str] | None = None,
) -> Path:
    """Write a model as `<arch>.<tag>.safetensors` with its record beside it; log Z is taken from the model.

    Args:
        model: A model made by `timm.create_model`, generative or plain.
        tag: Name of this training, e.g. 'gg_dg_mnist'.
        folder: Where to write; made if it does not exist.
        default: Whether this is the one that `pretrained=True` without a tag means.
        results: What was measured, e.g. {'test_error': 0.76}.
        recipe: How it was made: command, seed, versions.
        data_config: Preprocessing it was trained with, as of `timm.data.resolve_data_config`; None for that of its cfg.
        label_names: Name of each class.

    Returns:
        Path of the safetensors file.

    Raises:
        ValueError: If the tag could not be part of a timm model name, or the model was not made by timm.
    """
    if not tag or not all(c.isalnum() or c in '_-' for c in tag):
        raise ValueError(f"tag is {tag!r}: give letters, digits, '_' and '-' only")
    if not own_config(model):
        raise ValueError(f'{type(model).__name__} has no pretrained_cfg: make the model with timm.create_model')
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder) as new:
        write_model(model, Path(new), {'label_names': label_names}, data_config)
        weights, config = Path(new, WEIGHTS), json.loads(Path(new, 'config.json').read_text())
        model_args = config.get('model_args', {})
        architecture = config['architecture'].removeprefix('gencnn_')
        cfg = {**config['pretrained_cfg'], 'num_classes': config['num_classes'], 'tag': tag}
        record = {
            'architecture': architecture,
            'tag': tag,
            'default': default,
            'model_args': {k: v for k, v in model_args.items() if k != 'log_z'},
            'pretrained_cfg': cfg | ({'label_names': label_names} if label_names else {}),
            'log_z': model_args.get('log_z'),
            'results': results or {},
            'recipe': recipe or {},
            'sha256': hashlib.sha256(weights.read_bytes()).hexdigest(),
        }
        Path(new, 'record.json').write_text(json.dumps(record, indent=2) + '\n', encoding='utf-8')
        name = f'{architecture}.{tag}'
        os.replace(Path(new, 'record.json'), folder / f'{name}.json')
        weights.chmod(0o644)  # safetensors writes for the owner alone
        return weights.replace(folder / f'{name}.safetensors')
