"""`gencnn train --script`: a user's own copy of timm's train.py, with the generative task in place of its own.

The script runs unmodified; while it runs, two of timm's names mean something else: `timm.task.ClassificationTask` is a
GenerativeTask with the generative flags, and `timm.data.create_loader` notes how many batches an epoch has.
"""

import argparse
import runpy
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import timm.data
import timm.scheduler
import timm.task

from .task import GenerativeTask
from .train_args import add_generative_arguments

_NEEDED = ('ClassificationTask', 'create_loader', 'create_scheduler_v2')


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
        raise ValueError(f'{path} does not use {", ".join(missing)} of timm: only scripts built like its train.py do')
    for flag in ('--kd-model-name', '--multi-label'):
        if any(f.split('=')[0] == flag for f in flags):
            raise ValueError(f'{flag} trains with a task of its own, which cannot be generative: leave it out')
    parser = argparse.ArgumentParser(prog='gencnn train --script', add_help=False, allow_abbrev=False)
    add_generative_arguments(parser)
    args, rest = parser.parse_known_args(flags)
    if args.phase == 'GG+DG' and args.gen_epochs is None and args.switch_ess is None:
        raise ValueError('phase GG+DG needs to know when to switch: give --gen-epochs or --switch-ess')
    patches = _Patches(args)
    with (
        mock.patch.object(timm.task, 'ClassificationTask', patches.task_class()),
        mock.patch.object(timm.data, 'create_loader', patches.create_loader),
        mock.patch.object(timm.scheduler, 'create_scheduler_v2', patches.create_scheduler),
        mock.patch.object(sys, 'argv', [path, *rest]),
    ):
        runpy.run_path(path, run_name='__main__')
    if patches.task is None:
        raise ValueError(f'{path} trained without a ClassificationTask: nothing was generative')


class _Patches:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.task: GenerativeTask | None = None
        self.batches: int | None = None

    def task_class(self) -> type[GenerativeTask]:
        patches, args = self, self.args

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
                )
                patches.task = self
                patches.set_gen_steps()

        return Task

    def create_loader(self, *positional: Any, **kwargs: Any) -> Any:
        loader = _create_loader(*positional, **kwargs)
        if kwargs.get('is_training'):
            self.batches = len(loader)
            self.set_gen_steps()
        return loader

    def set_gen_steps(self) -> None:
        if self.task is not None and self.batches is not None and self.args.gen_epochs is not None:
            self.task.gen_steps = round(self.args.gen_epochs * self.batches)

    def create_scheduler(self, optimizer: Any, *positional: Any, **kwargs: Any) -> Any:
        """Multiply the schedule's rates by disc_lr / lr from the switch on."""
        scheduler, epochs = _create_scheduler(optimizer, *positional, **kwargs)
        if self.args.disc_lr is not None and self.task is not None and scheduler is not None:

            def scale() -> None:
                factor = self.args.disc_lr / max(scheduler.base_values)
                scheduler.base_values = [value * factor for value in scheduler.base_values]
                for group in optimizer.param_groups:
                    group['lr'] *= factor

            self.task.on_switch = scale
        return scheduler, epochs


_create_loader = timm.data.create_loader
_create_scheduler = timm.scheduler.create_scheduler_v2
