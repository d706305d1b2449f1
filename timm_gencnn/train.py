"""`gencnn train`: timm's training loop with a generative phase in front.

Everything that timm exports is timm's: data sets, loaders, optimizer, schedules, task, evaluator, checkpoints. Random
numbers are seeded anew at every epoch, so that a resumed run sees the data that the uninterrupted one would have seen.
"""

import argparse
import gc
import logging
import math
import shlex
import time
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from timm import utils
from timm.data import FastCollateMixup, resolve_input_data_config
from timm.layers import convert_sync_batchnorm, set_fast_norm
from timm.loss import load_class_stats, resolve_class_weights
from timm.models import create_model, model_parameters, safe_model_name
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.task import evaluation_sample_limit, load_task_ema_checkpoint, resume_task_checkpoint
from torch import nn
from tqdm.auto import tqdm

from . import checkpoints, script, train_data
from .loss import check_targets
from .reference import natural_for
from .runs import CLASS_MAP, means_run, metric_by_epoch
from .samples import write_atomically
from .schedule import PhaseSchedule
from .task import GenerativeTask
from .train_args import add_arguments, check_arguments, validates_average

__all__ = ['add_arguments', 'main']

_logger = logging.getLogger(__name__)


def main(args: argparse.Namespace) -> None:
    """Train as the flags of `add_arguments` say.

    Raises:
        ValueError: Flags that contradict each other, missing data, labels out of range, a loss that is not finite.
        OSError: A checkpoint or the summary cannot be written.
    """
    own_group = not _has_group()
    try:
        if args.script:
            script.run(args.script)
        else:
            if not logging.root.handlers:
                utils.setup_default_logging(logging.WARNING)
            check_arguments(args)
            Trainer(args, _device(args)).run()
    finally:
        if own_group and _has_group():
            torch.distributed.destroy_process_group()
        gc.collect()  # Gloo's threads end with the last reference to the group; alive, they may abort the exit


def _has_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _device(args: argparse.Namespace) -> torch.device:
    try:
        return utils.init_distributed_device(args)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f'cannot start on --device {args.device}, or with its other ranks: {error}') from error


def use_fast_kernels(device: torch.device) -> None:
    """What timm's train.py sets on a GPU: TF32 products of float32 matrices, and the fastest convolution by trial."""
    if device.type == 'cuda':
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True


class Trainer:
    """One training run: what the flags describe, built once, and its loops.

    Args:
        args: The flags, with distributed, rank and world_size from timm's init_distributed_device.
        device: Where to train.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args = args
        self.device = device
        self.primary = utils.is_primary(args)
        utils.random_seed(args.seed, args.rank)
        use_fast_kernels(device)
        if args.fast_norm:
            set_fast_norm()
        model = self._create_model()
        config = resolve_input_data_config(model, vars(args))  # images have the channels of the network
        self.reference = natural_for(config, config['input_size'][0], config['input_size'][1:], device)
        model.to(device)
        if args.channels_last:
            model.to(memory_format=torch.channels_last)
        if args.distributed and args.sync_bn:
            args.dist_bn = ''
            model = convert_sync_batchnorm(model)
        self._set_learning_rate()
        try:
            self.optimizer = create_optimizer_v2(model, **optimizer_kwargs(args), **args.opt_kwargs)
        except TypeError as error:
            raise ValueError(f'cannot create optimizer {args.opt!r}: {error}') from error
        self.autocast: Any = nullcontext()
        self.scaler: utils.NativeScaler | None = None
        if args.amp:
            self.autocast = torch.autocast(device.type, getattr(torch, args.amp_dtype))
            self.scaler = utils.NativeScaler(device.type) if args.amp_dtype == 'float16' else None

        self.mixup = train_data.create_mixup(args, args.num_classes)
        self.loader = train_data.train_loader(args, config, device, self.mixup)
        self.unlabeled = train_data.unlabeled_loader(args, config, device)
        self.eval_loader = train_data.eval_loader(args, config, device)
        self.updates_per_epoch = math.ceil(len(self.loader) / args.grad_accum_steps)
        self.task = self._create_task(model)

        name = '-'.join([datetime.now().strftime('%Y%m%d-%H%M%S'), safe_model_name(args.model)])
        self.output = Path(args.output or './output/train', args.experiment or name)
        path = checkpoints.resume_path(args.resume, self.output)
        self.epoch = self._restore(path) if path else 0
        if args.start_epoch is not None:
            self.epoch = args.start_epoch
        self.first_step = self.task.steps - self.epoch * len(self.loader)  # where epoch 0 of this length would begin
        if self.task.gen_steps is not None:
            self.task.gen_steps += self.first_step
        if args.distributed:
            buffers = {'broadcast_buffers': False} if args.no_ddp_bb else {}
            self.task.prepare_distributed(device_ids=[device], **buffers)
        self.schedule = self._create_schedule(path)
        self.task.optimizer = self.optimizer
        self.task.on_switch = self._switched
        self.saver = self._create_saver(path) if self.primary else None
        self.writers: list[Any] = []

    # Construction

    def _create_model(self) -> nn.Module:
        args = self.args
        in_chans = args.in_chans or (args.input_size[0] if args.input_size else None)
        optional = {'in_chans': in_chans, 'img_size': args.img_size, 'num_classes': args.num_classes}
        optional |= {'drop_path_rate': args.drop_path, 'drop_block_rate': args.drop_block, 'global_pool': args.gp}
        optional |= {'bn_momentum': args.bn_momentum, 'bn_eps': args.bn_eps, 'drop_rate': args.drop}
        overlay = {'file': args.pretrained_path, 'num_classes': -1} if args.pretrained_path else {}
        optional['pretrained_cfg_overlay'] = {**overlay, **args.pretrained_cfg_overlay} or None
        try:
            model: Any = create_model(
                args.model,
                pretrained=args.pretrained or bool(args.pretrained_path),
                checkpoint_path=args.initial_checkpoint or None,
                **{k: v for k, v in optional.items() if v is not None},
                **args.model_kwargs,
            )
        except (RuntimeError, TypeError, FileNotFoundError) as error:
            raise ValueError(f'cannot create model {args.model!r}: {error}') from error
        args.num_classes = args.num_classes or model.num_classes
        if args.grad_checkpointing:
            model.set_grad_checkpointing(enable=True)
        with torch.no_grad():
            if args.head_init_scale is not None:
                model.get_classifier().weight.mul_(args.head_init_scale)
                model.get_classifier().bias.mul_(args.head_init_scale)
            if args.head_init_bias is not None:
                nn.init.constant_(model.get_classifier().bias, args.head_init_bias)
        return model

    def _set_learning_rate(self) -> None:
        """timm's rule: lr, or lr_base scaled by the global batch size."""
        args = self.args
        if not args.lr:
            ratio = args.batch_size * args.world_size * args.grad_accum_steps / args.lr_base_size
            adaptive = any(name in args.opt.lower() for name in ('ada', 'lamb'))
            scale = args.lr_base_scale or ('sqrt' if adaptive else 'linear')
            args.lr = args.lr_base * (ratio**0.5 if scale == 'sqrt' else ratio)

    def _create_task(self, model: nn.Module) -> GenerativeTask:
        args = self.args
        task = GenerativeTask(
            model,
            criterion_kwargs=self._loss_arguments(),
            device=self.device,
            verbose=self.primary,
            phase=args.phase,
            gen_steps=None if args.gen_epochs is None else round(args.gen_epochs * len(self.loader)),
            switch_ess=args.switch_ess,
            hybrid=args.hybrid,
            queue=args.pool_queue,
            bridge=self.reference.bridge if args.pool_reference else None,
            running_log_z=args.pool_running_log_z,
            unlabeled_weight=args.unlabeled_weight,
        )
        if args.model_ema:
            ema_device = torch.device('cpu') if args.model_ema_force_cpu else None
            task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup, device=ema_device)
        if args.torchcompile:
            try:
                task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
            except RuntimeError as error:
                backends = ', '.join(torch.compiler.list_backends())
                given = f'--torchcompile {args.torchcompile!r}, --torchcompile-mode {args.torchcompile_mode!r}'
                raise ValueError(f'{given}: {error} (backends: {backends})') from error
        return task

    def _loss_arguments(self) -> dict[str, Any]:
        args = self.args
        rules = {'power': args.loss_weight_power, 'beta': args.loss_weight_beta, 'max_weight': args.loss_weight_max}
        rules['class_stats'] = load_class_stats(args.class_stats)
        pos_weight = args.bce_pos_weight if args.loss_pos_weight is None else args.loss_pos_weight
        names = ('bce_sum', 'bce_target_thresh', 'asl_gamma_pos', 'asl_gamma_neg', 'poly_epsilon')
        return {
            'loss_type': 'bce' if args.bce_loss else args.loss,
            'smoothing': args.smoothing,
            'soft_targets': self.mixup is not None,  # mixup smooths the targets itself
            'class_weight': resolve_class_weights(args.loss_class_weight, 'class_weight', **rules),
            'pos_weight': resolve_class_weights(pos_weight, 'pos_weight', **rules),
            **{name: getattr(args, name) for name in names},
        }

    def _restore(self, path: str) -> int:
        args = self.args
        try:
            epoch = resume_task_checkpoint(
                self.task,
                path,
                None if args.no_resume_opt else self.optimizer,
                None if args.no_resume_opt else self.scaler,
                log_info=self.primary,
            )
            if args.model_ema:
                load_task_ema_checkpoint(self.task, path)
        except (RuntimeError, KeyError) as error:
            raise ValueError(f'cannot resume from {path!r}: {error}') from error
        if epoch and checkpoints.is_recovery(Path(path)):
            epoch -= 1  # cut short, it is repeated from its start
        return epoch or 0

    def _create_schedule(self, resumed: str | None) -> PhaseSchedule:
        task = self.task
        schedule = PhaseSchedule(self.optimizer, self.args, self.updates_per_epoch)
        if task.switch_step is not None:
            if task.switch_epoch is None:  # a checkpoint of 0.1.0 or of --script
                task.switch_epoch = task.switch_step / len(self.loader)
            task.switch_epoch = min(task.switch_epoch, self.epoch)  # earlier if the epoch of the switch is repeated
            schedule.restart(*self._epoch_and_update(task.switch_epoch))
        if self.epoch:
            schedule.replay(self.epoch, self._metrics_before(resumed, schedule.first_epoch))
            schedule.step_update(self.epoch * self.updates_per_epoch)
        return schedule

    def _metrics_before(self, resumed: str | None, first: int) -> dict[int, float]:
        """The metrics since the epoch `first` that a schedule goes by which looks at them."""
        if self.args.sched != 'plateau' or resumed is None:
            return {}
        try:
            metrics = metric_by_epoch(Path(resumed).parent, self.args.eval_metric)
        except FileNotFoundError as error:
            raise ValueError(f'--sched plateau goes by the validations before {resumed!r}: {error}') from error
        validated = [epoch for epoch in range(first, self.epoch) if (epoch + 1) % self.args.val_interval == 0]
        if missing := [epoch for epoch in validated if epoch not in metrics]:
            where = f'the summary.csv beside {resumed!r} lacks epochs {missing}'
            raise ValueError(
                f'--sched plateau goes by the validations so far: {where}, resume from the run that has them'
            )
        return metrics

    def _switched(self) -> None:
        self.task.switch_epoch = (self.task.steps - self.first_step) / len(self.loader)
        self.schedule.restart(*self._epoch_and_update(self.task.switch_epoch))

    def _epoch_and_update(self, epochs: float) -> tuple[int, int]:
        epoch, batch = divmod(round(epochs * len(self.loader)), len(self.loader))
        return epoch, epoch * self.updates_per_epoch + batch // self.args.grad_accum_steps

    def _create_saver(self, resumed: str | None) -> utils.CheckpointSaver:
        args = self.args
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            write_atomically(self.output / 'args.yaml', yaml.safe_dump(vars(args), default_flow_style=False).encode())
            if names := train_data.class_names(self.loader):
                write_atomically(self.output / CLASS_MAP, ('\n'.join(names) + '\n').encode())
            checkpoints.trim_summary(self.output / 'summary.csv', self.epoch)
        except OSError as error:
            raise OSError(f'cannot write to {self.output}: {error}') from error
        saver = utils.CheckpointSaver(
            model=self.task.get_trainable_module(),
            optimizer=self.optimizer,
            args=args,
            task=self.task,
            amp_scaler=self.scaler,
            checkpoint_dir=str(self.output),
            recovery_dir=str(self.output),
            decreasing='loss' in args.eval_metric,
            max_history=args.checkpoint_hist,
        )
        if resumed and Path(resumed).parent == self.output:
            saver.load_state_dict_from_checkpoint(resumed)
        return saver

    # Loops

    def run(self) -> None:
        """Train and validate, epoch after epoch."""
        if self.epoch >= self.schedule.epochs:
            if self.primary:
                done = f'{self.epoch} of {self.schedule.epochs} epochs are done'
                print(f'nothing to train: {done}, give a larger --epochs to go on')
            return
        if self.primary:
            self._open_writers()
        for epoch in range(self.epoch, self.schedule.epochs):
            begin = time.perf_counter()
            utils.random_seed(self.args.seed + epoch * self.args.world_size, self.args.rank)
            train_data.set_epoch(self.loader, epoch)
            if self.mixup is not None and 0 < self.args.mixup_off_epoch <= epoch:
                mixer: Any = self.loader if isinstance(self.mixup, FastCollateMixup) else self.mixup
                mixer.mixup_enabled = False
            train_metrics = self.train_one_epoch(epoch)
            if self.args.distributed and self.args.dist_bn:
                self._distribute_batch_norm()
            if (epoch + 1) % self.args.val_interval and epoch + 1 < self.schedule.epochs:
                self.schedule.step(epoch + 1)
                continue
            eval_metrics = self.validate(ema=validates_average(vars(self.args)))
            self._finish_epoch(epoch, train_metrics, eval_metrics, time.perf_counter() - begin)
        if self.primary:
            classes = ' '.join(map(str, range(min(10, self.args.num_classes))))
            run = self.output if means_run(str(self.output)) else f'./{self.output}'  # else it is a model of timm
            print(f'to see what it learned: gencnn visualize {shlex.quote(str(run))} {classes}')

    def _distribute_batch_norm(self) -> None:
        for ema in (False, True) if validates_average(vars(self.args)) else (False,):
            module: Any = self.task.get_trainable_module(ema=ema)
            utils.distribute_bn(module, self.args.world_size, self.args.dist_bn == 'reduce')

    def train_one_epoch(self, epoch: int) -> dict[str, float]:
        """One pass over the training images.

        Raises:
            ValueError: The loss or a label is not what it should be; names the step and the last good checkpoint.
        """
        args, task = self.args, self.task
        task.train()
        batches, accumulate = len(self.loader), args.grad_accum_steps
        check_every = 1 if self.device.type == 'cpu' else args.log_interval  # reading a loss stalls an accelerator
        losses: list[torch.Tensor] = []  # since the last look, and how many images each is the mean of
        sizes: list[int] = []
        loss_sum, images_seen = 0.0, 0
        update = epoch * self.updates_per_epoch
        more = train_data.endless(self.unlabeled, epoch) if self.unlabeled is not None else None
        bar = tqdm(total=batches, desc=f'epoch {epoch}', leave=False, disable=None if self.primary else True)
        for i, (images, target) in enumerate(self.loader):
            images, target = images.to(self.device), target.to(self.device)
            if self.mixup is not None and not isinstance(self.mixup, FastCollateMixup):
                images, target = self.mixup(images, target)
            extra = {'unlabeled': next(more).to(self.device)} if more is not None and task.generative else {}
            if args.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            last_of_update = (i + 1) % accumulate == 0 or i + 1 == batches
            group = accumulate if i < batches - batches % accumulate else batches % accumulate
            try:
                check_targets(target, args.num_classes)
                with nullcontext() if last_of_update else task.no_sync():
                    with self.autocast:
                        loss = task(images, target, **extra)['loss']
                    self._backward(loss if group == 1 else loss / group, last_of_update)
            except ValueError as error:
                raise ValueError(self._where(epoch, i, str(error))) from error
            losses.append(loss.detach())
            sizes.append(len(images))
            if len(losses) == check_every or i + 1 == batches:
                values = torch.stack(losses).tolist()
                if not math.isfinite(sum(values)):
                    bad = i + 1 - len(values) + next(j for j, v in enumerate(values) if not math.isfinite(v))
                    raise ValueError(self._where(epoch, bad, 'the loss is not finite: lower --lr'))
                loss_sum += sum(value * size for value, size in zip(values, sizes, strict=True))
                images_seen += sum(sizes)
                losses.clear()
                sizes.clear()
            if last_of_update:
                update += 1
                task.update_ema(step=update)
                self.schedule.step_update(update)
            if (i + 1) % args.log_interval == 0 or i + 1 == batches:
                bar.set_postfix(loss=f'{values[-1]:.3f}', refresh=False)
                bar.update(i % args.log_interval + 1)
            recovery = args.recovery_interval and (i + 1) % args.recovery_interval == 0
            if (recovery or i + 1 == batches) and not self._is_finite():  # the last good checkpoint must be one
                raise ValueError(self._where(epoch, i, 'the weights are not finite: lower --lr'))
            if self.saver is not None and recovery:
                checkpoints.save_recovery(self.saver, epoch, i)
        bar.close()
        if args.distributed:
            loss_sum = utils.reduce_tensor(torch.tensor(loss_sum, device=self.device), args.world_size).item()
        return {'loss': loss_sum / images_seen}

    def _backward(self, loss: torch.Tensor, update: bool) -> None:
        args = self.args
        second_order = getattr(self.optimizer, 'is_second_order', False)
        if self.scaler is not None:
            parameters = self._clipped_parameters()
            self.scaler(
                loss, self.optimizer, args.clip_grad, args.clip_mode, parameters, second_order, need_update=update
            )
        else:
            loss.backward(create_graph=second_order)
            if update:
                if args.clip_grad is not None:
                    utils.dispatch_clip_grad(self._clipped_parameters(), args.clip_grad, mode=args.clip_mode)
                self.optimizer.step()
        if update:
            self.optimizer.zero_grad()

    def _is_finite(self) -> bool:
        module: Any = self.task.get_trainable_module()
        return bool(torch.stack([p.detach().isfinite().all() for p in module.parameters()]).all())

    def _clipped_parameters(self) -> Any:
        model: Any = self.task.get_trainable_module()
        return model_parameters(model, exclude_head='agc' in self.args.clip_mode)

    def _where(self, epoch: int, batch: int, what: str) -> str:
        return f'epoch {epoch}, batch {batch}, step {self.task.steps}: {what}; {checkpoints.describe(self.saver)}'

    @torch.inference_mode()
    def validate(self, ema: bool) -> dict[str, float]:
        """timm's evaluator over the validation images, with the intercepts in place; empty without a split."""
        if self.eval_loader is None:
            return {}
        self.task.eval()
        model: Any = self.task.get_eval_model(ema=ema)
        evaluator = self.task.create_evaluator(max_samples=evaluation_sample_limit(self.eval_loader))
        for images, target in self.eval_loader:
            images, target = images.to(self.device), target.to(self.device)
            if self.args.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            check_targets(target, self.args.num_classes)
            with self.autocast:
                output = model(images)
            evaluator.update(output, target)
        return dict(evaluator.compute(distributed=self.args.distributed))

    # Records

    def _open_writers(self) -> None:
        if self.args.log_wandb:
            import wandb

            args = self.args
            wandb.init(project=args.wandb_project, name=self.output.name, config=vars(args), tags=args.wandb_tags)
        if self.args.log_tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writers.append(SummaryWriter(str(self.output)))

    def _finish_epoch(
        self, epoch: int, train_metrics: dict[str, float], eval_metrics: dict[str, float], seconds: float
    ) -> None:
        """Write the summary and the checkpoint, and set the next epoch's learning rate."""
        rates = [group['lr'] for group in self.optimizer.param_groups]
        lr = sum(rates) / len(rates)
        metric = eval_metrics.get(self.args.eval_metric)
        generative = self.task.generative
        train_metrics = {**train_metrics, 'phase': 'GG' if generative else 'DG'}  # type: ignore[dict-item]
        train_metrics['ess'] = math.nan if self.task.ess is None else self.task.ess.mean().item()
        self.schedule.step(epoch + 1, metric)
        if self.saver is None:
            return
        summary = self.output / 'summary.csv'
        wandb = self.args.log_wandb
        with checkpoints.whole_summary(self.saver, summary, epoch):
            utils.update_summary(epoch, train_metrics, eval_metrics, str(summary), lr=lr, log_wandb=wandb)
            for writer in self.writers:
                for name, value in {**train_metrics, **{f'eval_{k}': v for k, v in eval_metrics.items()}}.items():
                    if not isinstance(value, str):
                        writer.add_scalar(name, value, epoch)
        checkpoints.save(self.saver, epoch, metric)
        error = f'  error {100 - eval_metrics["top1"]:.2f} %' if 'top1' in eval_metrics else ''
        phase = f'GG  ESS {train_metrics["ess"]:.1f}' if generative else 'DG'
        print(
            f'epoch {epoch:3d}  {phase}  lr {lr:.5f}  loss {train_metrics["loss"]:7.4f}{error}  {seconds:.1f} s',
            flush=True,
        )
