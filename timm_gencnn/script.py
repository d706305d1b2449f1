"""`gencnn train --script`: a user's own copy of timm's train.py, with the generative task in place of its own.

The script runs unmodified. While it runs, `timm.task.ClassificationTask` is a GenerativeTask with the generative flags,
timm's functions that create loaders and schedules tell that task what it must know, and other tasks are refused.
"""

import argparse
import inspect
import runpy
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import timm.data
import timm.scheduler
import timm.task
from torch import Tensor

from . import train_data
from .reference import natural_for
from .task import GenerativeTask
from .train_args import add_generative_arguments, check_generative_arguments, has_unlabeled

# Earlier ones of timm's scripts go without get_eval_model: they would validate the model without its intercepts.
_NEEDED = ('ClassificationTask', 'get_eval_model', 'create_loader', 'create_scheduler_v2')


def run(argv: list[str]) -> None:
    """Run a training script.

    Args:
        argv: Path of the script, then its flags and the generative ones in any order.

    Raises:
        ValueError: There is no such script, or it does not train with timm's ClassificationTask.
    """
    path, *flags = argv or ['']
    if not Path(path).is_file():
        raise ValueError(f"--script {path!r} is not a file: give the path of timm's train.py")
    text = Path(path).read_text()
    missing = [name for name in _NEEDED if name not in text]
    if missing:
        raise ValueError(
            f'{path} lacks {", ".join(missing)}: only scripts built like the train.py of timm {timm.__version__} '
            "run; take that one from timm's repository, or `gencnn train` without --script"
        )
    parser = argparse.ArgumentParser(prog='gencnn train --script', add_help=False, allow_abbrev=False)
    add_generative_arguments(parser)
    args, rest = parser.parse_known_args(flags)
    check_generative_arguments(args)
    session = _Session(args)
    with ExitStack() as stack:
        for owner, name, value in (
            (timm.task, 'ClassificationTask', session.task_class()),
            (timm.task.TrainingTask, '__init__', _generative_only),
            (timm.data, 'create_loader', session.create_loader),
            (timm.data, 'create_naflex_loader', session.create_naflex_loader),
            (timm.scheduler, 'create_scheduler_v2', session.create_scheduler),
            (argparse.ArgumentParser, 'parse_args', _with_flags(session)),
            (sys, 'argv', [path, *rest]),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        runpy.run_path(path, run_name='__main__')
    if session.task is None:
        raise ValueError(f'{path} has created no ClassificationTask: nothing was trained')


class _Session:
    """What the script has created so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.task: GenerativeTask | None = None
        self.batches: int | None = None
        self.start_epoch: int | None = None
        self.bridge: Any = None
        self.unlabeled: Iterator[Tensor] | None = None

    def task_class(self) -> type[GenerativeTask]:
        session, args = self, self.args

        class Task(GenerativeTask):
            def __init__(self, *positional: Any, **kwargs: Any) -> None:
                super().__init__(
                    *positional,
                    **kwargs,
                    phase=args.phase,
                    switch_ess=args.switch_ess,
                    hybrid=args.hybrid,
                    queue=args.pool_queue,
                    running_log_z=args.pool_running_log_z,
                    unlabeled_weight=args.unlabeled_weight,
                )
                session.task = self
                session.connect()

            def forward(self, input: Any, target: Tensor, unlabeled: Tensor | None = None) -> dict[str, Tensor]:
                if session.unlabeled is not None and self.generative:
                    unlabeled = next(session.unlabeled).to(input)
                return super().forward(input, target, unlabeled)

        return Task

    def create_loader(self, *positional: Any, **kwargs: Any) -> Any:
        """timm's loader; that of the training images also says what the image pool is made of."""
        loader = _create_loader(*positional, **kwargs)
        given = _LOADER_ARGUMENTS.bind(*positional, **kwargs).arguments
        if given.get('is_training'):
            self.batches = len(loader)
            self._open_pool(given)
            self.connect()
        return loader

    def _open_pool(self, given: dict[str, Any]) -> None:
        args = self.args
        if not (args.pool_reference or has_unlabeled(args)):
            return
        if given.get('input_size_choices'):
            raise ValueError('the image pool needs images of one size: leave out --train-img-sizes')
        channels, *size = given['input_size']
        if args.pool_reference:
            self.bridge = natural_for(given, channels, tuple(size), given['device']).bridge
        if has_unlabeled(args):
            batch_size = args.unlabeled_batch_size or given['batch_size']
            where = args.unlabeled_dataset or '', args.unlabeled_data_dir, args.unlabeled_split
            dataset = train_data.open_unlabeled(*where, channels, is_training=True, batch_size=batch_size)
            plain = {'dataset': dataset, 'batch_size': batch_size, 'collate_fn': None, 'num_aug_splits': 0}
            loader = _create_loader(**{**given, **plain})
            if len(loader) == 0:
                few = f'{len(dataset)} unlabeled images do not fill one batch of {batch_size}'
                raise ValueError(f'{few}: lower --unlabeled-batch-size')
            self.unlabeled = train_data.endless(loader)

    def create_naflex_loader(self, *positional: Any, **kwargs: Any) -> Any:
        loader = _create_naflex_loader(*positional, **kwargs)
        if kwargs.get('is_training'):
            if self.args.pool_reference or has_unlabeled(self.args):
                raise ValueError('further images cannot join patches: leave out --naflex-loader or the further images')
            self.batches = len(loader)
            self.connect()
        return loader

    def connect(self) -> None:
        """Tell the task what depends on the training images, whichever of the two comes first."""
        if self.task is not None and self.batches is not None:
            self.task.bridge = self.bridge
            if self.args.gen_epochs is not None:
                self.task.gen_steps = round(self.args.gen_epochs * self.batches)

    def create_scheduler(self, optimizer: Any, *positional: Any, **kwargs: Any) -> Any:
        """timm's schedule, made after any resume; from the switch on, its rates are multiplied by disc_lr / lr."""
        task = self.task
        if task is None:
            raise ValueError('the script creates a schedule before a timm.task.ClassificationTask, unlike timm itself')
        task.optimizer = optimizer
        if self.start_epoch is not None and task.gen_steps is not None and self.batches is not None:
            task.gen_steps += task.steps - self.start_epoch * self.batches  # --gen-epochs counts from epoch 0
        scheduler, epochs = _create_scheduler(optimizer, *positional, **kwargs)
        if self.args.disc_lr is None:
            return scheduler, epochs
        if scheduler is None:
            raise ValueError('--disc-lr needs a schedule whose rates it scales, and the script has none')
        factor = self.args.disc_lr / max(scheduler.base_values)

        update_groups = scheduler.update_groups

        def update(values: Any) -> None:
            values = list(values) if isinstance(values, list | tuple) else [values] * len(optimizer.param_groups)
            update_groups(values if task.switch_step is None else [value * factor for value in values])

        def scale() -> None:
            for group in optimizer.param_groups:
                group['lr'] *= factor

        scheduler.update_groups = update
        if task.switch_step is None:
            task.on_switch = scale
        else:  # resumed after the switch
            scale()
        return scheduler, epochs


def _generative_only(task: Any, *args: Any, **kwargs: Any) -> None:
    if not isinstance(task, GenerativeTask):
        raise ValueError(
            f'{type(task).__name__} cannot be generative: leave out the flag that asks for it '
            '(--kd-model-name, --task multilabel)'
        )
    _initialize(task, *args, **kwargs)


def _with_flags(session: _Session) -> Any:
    """A parse_args that adds the generative flags, so that the script's args.yaml and checkpoints record them."""

    def parse_args(*args: Any, **kwargs: Any) -> Any:
        namespace = _parse_args(*args, **kwargs)
        vars(namespace).update(vars(session.args))
        session.start_epoch = getattr(namespace, 'start_epoch', session.start_epoch)
        return namespace

    return parse_args


_initialize = timm.task.TrainingTask.__init__
_parse_args = argparse.ArgumentParser.parse_args
_create_loader = timm.data.create_loader
_create_naflex_loader = timm.data.create_naflex_loader
_create_scheduler = timm.scheduler.create_scheduler_v2
_LOADER_ARGUMENTS = inspect.signature(_create_loader)
