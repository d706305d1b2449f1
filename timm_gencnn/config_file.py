"""Command lines that read further flags from a YAML file: `gencnn train -c FILE`.

A file may name another one, which may lie beside it, or a recipe, as its `base`, whose settings it adds to, overrides
or, by an empty one, takes back.
"""

import argparse
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from timm.utils import ParseKwargs

from .runs import is_run
from .train_args import validates_average

RECIPES = Path(__file__).parent / 'recipes'
# What a run's args.yaml holds besides its flags: the command, and what timm's init_distributed_device finds.
_NO_FLAGS = {'command', 'version', 'distributed', 'world_size', 'rank', 'local_rank'}

# By these one knows the args.yaml of a run, of timm's train.py too: it holds every flag, which nobody writes by hand.
_RECORDED = {'resume', 'start_epoch'}

# What a run says of its own data set, which does not fit another one.
_OF_DATA_SET = {'data_dir', 'split', 'class_map', 'input_key', 'target_key'}


class ConfigParser(argparse.ArgumentParser):
    """A parser whose `--config` names a YAML file, or a shipped recipe, of defaults: flags of the command line win."""

    def parse_known_args(  # type: ignore[override]  # two overloads
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Parse twice: first for --config, then with its values as the defaults."""
        given, _ = super().parse_known_args(args, argparse.Namespace(dataset=None))  # which an empty one is not
        run = getattr(given, 'data', None) if 'split' in given else None  # `gencnn validate RUN`
        files = [str(Path(run) / 'args.yaml')] if run and is_run(run) else []
        for name in [*files, given.config] if getattr(given, 'config', '') else files:
            config = self._read(name, given)
            self.set_defaults(**{key: value for key, value in config.items() if value is not None})
        return super().parse_known_args(args, namespace)

    def _read(self, name: str, given: argparse.Namespace, above: Sequence[str] = ()) -> dict[str, Any]:
        known = list(vars(given))
        if name in above:
            self.error(f'configuration {name!r} is its own base')
        path = Path(name)
        if not path.is_file() and (RECIPES / f'{name}.yaml').exists():
            path = RECIPES / f'{name}.yaml'
        try:
            config = yaml.safe_load(path.read_text())
        except (OSError, ValueError, yaml.YAMLError) as error:
            recipes = ', '.join(sorted(p.stem for p in RECIPES.glob('*.yaml')))
            self.error(f'cannot read configuration {name!r} ({error}); shipped recipes: {recipes}')
        if not isinstance(config, dict):
            self.error(f'{path.name}: expected lines of the form "flag_name: value"')
        config = {str(key).replace('-', '_'): value for key, value in config.items()}
        base = config.pop('base', None)
        folder = config.pop('data', None)
        if folder is not None:  # so that a folder on the command line wins, whichever way it is given
            config['data_dir'] = config.get('data_dir') or folder
        if config.keys() >= _RECORDED and 'split' in known:  # the args.yaml of a run, for `gencnn validate`
            config = _of_validation(config, given)
        config = {key: value for key, value in config.items() if key not in _NO_FLAGS}  # None takes back the base's
        for key, value in config.items():
            if key not in known and value is not None:
                near = get_close_matches(key, known, n=1)
                self.error(f'{path.name}: unknown setting {key!r}' + (f', perhaps {near[0]!r}' if near else ''))
        try:
            for action in self._actions:
                if config.get(action.dest) is not None:
                    config[action.dest] = self._convert(action, config[action.dest])
        except argparse.ArgumentError as error:
            self.error(f'{path.name}: {error}')
        if base is None:
            return config
        beside = path.parent / str(base)
        return self._read(str(beside if beside.is_file() else base), given, [*above, name]) | config

    def _convert(self, action: argparse.Action, value: Any) -> Any:
        """What a flag makes of its value in the file, converted and checked as on the command line."""
        if action.choices is not None:
            self._check_value(action, value)
        if action.nargs == 0 and not isinstance(value, bool):
            raise argparse.ArgumentError(action, f'expected true or false, got {value!r}')
        if isinstance(action, ParseKwargs) and not isinstance(value, dict):
            raise argparse.ArgumentError(action, f'expected lines of the form "name: value", got {value!r}')
        if action.type is None:
            return str(value) if action.nargs is None and isinstance(value, int | float) else value
        if action.nargs is None:
            return self._get_value(action, str(value))
        items = value if isinstance(value, list) else [value]
        if isinstance(action.nargs, int) and len(items) != action.nargs:
            raise argparse.ArgumentError(action, f'expected {action.nargs} values, got {value!r}')
        return [self._get_value(action, str(item)) for item in items]


def _of_validation(run: dict[str, Any], given: argparse.Namespace) -> dict[str, Any]:
    """What the args.yaml of a training run says of validation.

    Not `pretrained`, where the training began, nor its device; nor, where another data set is given, what belongs to
    its own. A folder given in place of its own is taken for the same data set, or for one laid out like it.
    """
    settings = {key: value for key, value in run.items() if key in given and key not in ('pretrained', 'device')}
    settings['use_ema'] = validates_average(run)
    if run.get('val_split'):
        settings['split'] = run['val_split']
    own = given.dataset in (None, run.get('dataset') or '')
    return settings if own else {key: value for key, value in settings.items() if key not in _OF_DATA_SET}
