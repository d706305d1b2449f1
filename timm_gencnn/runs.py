"""Read back what a training run left in its folder: that of `gencnn train`, or of timm's own train.py."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import yaml
from timm.data import ImageNetInfo, resolve_input_data_config
from timm.models import load_checkpoint
from timm.utils.checkpoint_saver import load_checkpoint_metadata
from torch import nn

from .generative import as_generative
from .model_config import own_config
from .registry import PREFIX, check_checkpoint
from .train_args import validates_average

BEST, LAST = 'model_best.pth.tar', 'last.pth.tar'
CLASS_MAP = 'class_map.txt'  # a class a line, as --class-map takes it


def is_run(folder: str | Path) -> bool:
    """Whether a folder was written by a training run."""
    return (Path(folder) / 'args.yaml').is_file()


def means_run(model: str | Path) -> bool:
    """Whether a model's name means the folder of a training run. A name that timm knows does not: `./NAME` does."""
    if isinstance(model, str) and (
        timm.models.is_model_pretrained(model) or ('.' not in model and timm.is_model(model))
    ):
        return False
    return is_run(model)


def best_checkpoint(folder: Path) -> Path:
    """The checkpoint of a run that its figures are of.

    Raises:
        ValueError: There is none.
    """
    checkpoint = next((path for name in (BEST, LAST) if (path := folder / name).exists()), None)
    if checkpoint is None:
        raise ValueError(f'{folder} has neither {BEST} nor {LAST}: has the run finished an epoch?')
    return checkpoint


def load_run(folder: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """Load the best checkpoint of a training run, with what the Hub should know of it.

    Args:
        folder: The run's output folder, with args.yaml, summary.csv and model_best.pth.tar (else last.pth.tar).

    Returns:
        The generative model in evaluation mode, whose `pretrained_cfg` has the preprocessing and the class names of the
        run, and `results`, `recipe` and `data_config` for `push_to_hub`.

    Raises:
        ValueError: If the folder holds no checkpoint, or one that does not fit its args.yaml, or that names no model.
    """
    folder = Path(folder)
    args = yaml.safe_load((folder / 'args.yaml').read_text(encoding='utf-8'))
    if not (isinstance(args, dict) and isinstance(args.get('model'), str)):
        raise ValueError(f'{folder / "args.yaml"} names no model: it is not that of a training run')
    checkpoint = best_checkpoint(folder)
    check_checkpoint(checkpoint)
    name = args['model']
    if ':' not in name:  # a model of the Hub or of a folder says itself which it is
        name = PREFIX + name.removeprefix(PREFIX)
    overlay = args.get('pretrained_cfg_overlay') or None
    try:
        model: Any = as_generative(timm.create_model(name, pretrained_cfg_overlay=overlay, **model_arguments(args)))
        load_checkpoint(model, str(checkpoint), use_ema=validates_average(args))
    except (RuntimeError, TypeError) as error:
        raise ValueError(f'{checkpoint} does not fit the {args["model"]} of its args.yaml: {error}') from error
    data_config = resolve_input_data_config(model, args)
    labels = _labels(folder, model.num_classes)
    model.pretrained_cfg = own_config(model) | data_config | labels | {'tag': None}  # no shipped weights
    results = {'dataset': _dataset(args)} | _measured(folder, args, checkpoint)
    settings = {key: value for key, value in args.items() if _is_setting(value)}
    return model.eval(), {
        'results': results,
        'recipe': {'settings': settings},
        'data_config': data_config,
    }


def model_arguments(args: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `timm.create_model` that shape the network, from the flags of a timm script.

    Args:
        args: The flags by name, as in args.yaml; those that are missing or None are left to timm.

    Returns:
        `num_classes`, `in_chans` (else from `input_size`), `global_pool` (from `gp`) and so on, with `model_kwargs`.
    """
    names = ('num_classes', 'img_size', 'bn_momentum', 'bn_eps')
    arguments = {'global_pool': args.get('gp'), **{name: args.get(name) for name in names}}
    arguments['in_chans'] = args.get('in_chans') or (args.get('input_size') or [None])[0]
    return {name: value for name, value in arguments.items() if value is not None} | (args.get('model_kwargs') or {})


def _labels(folder: Path, outputs: int) -> dict[str, Any]:
    """The entries of a configuration that name the classes; ImageNet's synsets by their words too.

    Outputs beyond the classes are called by their indices: timm takes a shorter list for that of another network.
    """
    path = folder / CLASS_MAP
    if not path.exists():
        return {}
    names = path.read_text(encoding='utf-8').removesuffix('\n').split('\n')  # not at U+2028, as timm reads it
    imagenet = ImageNetInfo('imagenet-22k')
    rest = [str(index) for index in range(len(names), outputs)]
    words = None
    if set(names) <= set(imagenet.label_names()):
        words = {name: imagenet.label_name_to_description(name) for name in names} | {index: index for index in rest}
    return {'label_names': names + rest, 'label_descriptions': words}


def metric_by_epoch(folder: Path, metric: str) -> dict[int, float]:
    """What a run's validations gave, by epoch, from its summary.csv.

    Raises:
        FileNotFoundError: There is no summary.csv.
    """
    with (folder / 'summary.csv').open(encoding='utf-8') as file:
        rows = [row for row in csv.DictReader(file) if row.get(f'eval_{metric}')]
    return {int(row['epoch']): float(row[f'eval_{metric}']) for row in rows}


def _measured(folder: Path, args: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """What the run measured of a checkpoint, if its epoch was validated."""
    accuracy = metric_by_epoch(folder, 'top1')
    epoch = load_checkpoint_metadata(str(checkpoint)).get('epoch')
    if epoch not in accuracy:
        return {}
    measured = {'split': args.get('val_split', 'validation'), 'test_error': round(100 - accuracy[epoch], 4)}
    if checkpoint.name == BEST:
        metric = args.get('eval_metric', 'top1')
        by = '' if metric == 'top1' else f', by {metric}'
        measured['note'] = f'the best of {len(accuracy)} epochs on this split{by}'
    return measured


def _dataset(args: dict[str, Any]) -> str:
    """The Hub id of the data set where it came from the Hub, else the last part of its name or path."""
    name = str(args.get('dataset') or args.get('data_dir') or args.get('data') or 'unknown')
    hub_id = name.removeprefix('hfds/')
    if hub_id != name and hub_id.count('/') == 1 and hub_id[0] not in './~' and not Path(hub_id).exists():
        return hub_id
    return Path(name).name


def _is_setting(value: Any) -> bool:
    """Whether a value says something on another machine: not empty, and no path."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    paths = any(isinstance(part, str) and ('/' in part or '\\' in part) for part in parts)
    return value not in (None, '', False, [], {}) and not paths
