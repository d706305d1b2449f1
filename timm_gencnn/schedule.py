"""Learning rates: Caffe's "inv" schedule, which timm lacks, and a schedule that starts anew at the switch."""

import argparse
from collections.abc import Mapping
from typing import Any

import torch
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.scheduler.scheduler import Scheduler


class InvLRScheduler(Scheduler):
    """Caffe's "inv" policy: lr_t = lr_0 (1 + t / decay_t) ^ -power.

    Args:
        optimizer: Optimizer to schedule.
        decay_t: Time scale, in epochs or updates; 1 / gamma in Caffe's terms.
        power: Exponent, 0.75 in Caffe's LeNet.
        t_in_epochs: Whether t counts epochs or updates.

    Raises:
        ValueError: decay_t is not positive.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, decay_t: float, power: float, t_in_epochs: bool = True
    ) -> None:
        if decay_t <= 0:
            raise ValueError(f'decay-epochs {decay_t} must be positive for the inv schedule')
        super().__init__(optimizer, 'lr', t_in_epochs=t_in_epochs)
        self.decay_t = decay_t
        self.power = power

    def _get_lr(self, t: int) -> list[float]:
        return [lr * (1 + t / self.decay_t) ** -self.power for lr in self.base_values]


class PhaseSchedule:
    """The schedule that the flags ask for, on which `restart` puts a fresh one with the discriminative rate.

    Args:
        optimizer: Optimizer to schedule.
        args: The flags of `gencnn train`.
        updates_per_epoch: Optimizer updates an epoch.

    Attributes:
        epochs: Epochs to train, cool-down and warm-up included.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, args: argparse.Namespace, updates_per_epoch: int) -> None:
        self.optimizer = optimizer
        self.args = args
        self.updates_per_epoch = updates_per_epoch
        self.first_epoch = self.first_update = 0
        self.scheduler, self.epochs = self._create(scheduler_kwargs(args))

    def _create(self, kwargs: dict[str, Any]) -> tuple[Scheduler | None, int]:
        if kwargs['sched'] != 'inv':
            return create_scheduler_v2(self.optimizer, updates_per_epoch=self.updates_per_epoch, **kwargs)
        in_epochs = kwargs['step_on_epochs']
        decay_t = kwargs['decay_epochs'] * (1 if in_epochs else self.updates_per_epoch)
        return InvLRScheduler(self.optimizer, decay_t, kwargs['decay_rate'], in_epochs), kwargs['num_epochs']

    def restart(self, epoch: int, update: int) -> None:
        """Start anew at --disc-lr, without warm-up, for the epochs that are left; without --disc-lr, do nothing."""
        if self.args.disc_lr is None:
            return
        for group in self.optimizer.param_groups:
            group['initial_lr'] = self.args.disc_lr
            group['lr'] = self.args.disc_lr  # stays with --sched none; a schedule sets its own
        kwargs = scheduler_kwargs(self.args)
        left = max(1, self.epochs - epoch)
        if kwargs['sched'] in ('wsd', 'rsqrt'):  # whose decay must fit, and whose time scale is that of the warm-up
            kwargs |= {'decay_epochs': min(kwargs['decay_epochs'], left), 'stable_timescale': kwargs['warmup_epochs']}
        kwargs |= {'num_epochs': left, 'warmup_epochs': 0, 'cooldown_epochs': 0}
        self.scheduler, _ = self._create(kwargs)
        self.first_epoch, self.first_update = epoch, update

    def step(self, epoch: int, metric: float | None = None) -> None:
        """Set the rate for this epoch (counted from the start of training)."""
        if self.scheduler is not None:
            self.scheduler.step(epoch - self.first_epoch, metric)

    def replay(self, epochs: int, metrics: Mapping[int, float]) -> None:
        """Set the rate for an epoch as if all before it had been gone through.

        Args:
            epochs: Epochs that are done.
            metrics: The metric of each that was validated; only a plateau schedule looks at it.
        """
        for epoch in range(self.first_epoch, epochs):
            self.step(epoch + 1, metrics.get(epoch))

    def step_update(self, update: int) -> None:
        """Set the rate after this many updates (counted from the start of training)."""
        if self.scheduler is not None:
            self.scheduler.step_update(update - self.first_update)
