"""Read back what a training run left in its folder: that of `gencnn train`, or of timm's own train.py."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import timm
import yaml
from timm.data import resolve_input_data_config
from timm.models import load_checkpoint
from torch import nn

from .registry import PREFIX, check_checkpoint

BEST, LAST = 'model_best.pth.tar', 'last.pth.tar'
_MODEL_ARGUMENTS = ('num_classes', 'in_chans', 'img_size')


def is_run(folder: str | Path) -> bool:
    """Whether a folder was written by a training run."""
    return (Path(folder) / 'args.yaml').is_file()


def load_run(folder: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """Load the best checkpoint of a training run, with what the Hub should know of it.

    Args:
        folder: The run's output folder, with args.yaml, summary.csv and model_best.pth.tar (else last.pth.tar).

    Returns:
        The generative model in evaluation mode, and `results`, `recipe` and `data_config` for `push_to_hub`.

    Raises:
        ValueError: If the folder holds no checkpoint, or one that does not fit its args.yaml.
    """
    folder = Path(folder)
    args = yaml.safe_load((folder / 'args.yaml').read_text(encoding='utf-8'))
    checkpoint = next((path for name in (BEST, LAST) if (path := folder / name).exists()), None)
    if checkpoint is None:
        raise ValueError(f'{folder} has neither {BEST} nor {LAST}: has the run finished an epoch?')
    check_checkpoint(checkpoint)
    arguments = {key: args[key] for key in _MODEL_ARGUMENTS if args.get(key) is not None}
    model = timm.create_model(
        PREFIX + args['model'].removeprefix(PREFIX), **(args.get('model_kwargs') or {}), **arguments
    )
    try:
        load_checkpoint(model, str(checkpoint))
    except RuntimeError as error:
        raise ValueError(f'{checkpoint} does not fit the {args["model"]} of its args.yaml: {error}') from error
    results: dict[str, Any] = {'dataset': _dataset(args), 'split': args.get('val_split', 'validation')}
    with (folder / 'summary.csv').open(encoding='utf-8') as file:
        epochs = list(csv.DictReader(file))
    if epochs:
        best = max(epochs, key=lambda row: float(row['eval_top1'])) if checkpoint.name == BEST else epochs[-1]
        results['test_error'] = round(100 - float(best['eval_top1']), 4)
        if checkpoint.name == BEST:
            results['note'] = f'the best of {len(epochs)} epochs on this split'
    settings = {key: value for key, value in args.items() if _is_setting(value)}
    return model.eval(), {
        'results': results,
        'recipe': {'settings': settings},
        'data_config': resolve_input_data_config(model, args),
    }


def _dataset(args: dict[str, Any]) -> str:
    """The Hub id of the data set, or the last part of its path."""
    name = str(args.get('dataset') or args.get('data_dir') or args.get('data') or 'unknown').removeprefix('hfds/')
    return name if name.count('/') == 1 and name[0] not in './~' else Path(name).name


def _is_setting(value: Any) -> bool:
    """Whether a value says something on another machine: not empty, and no path."""
    return value not in (None, '', False, []) and not (isinstance(value, str) and ('/' in value or '\\' in value))
