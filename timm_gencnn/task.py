"""Generative pre-training as a timm task: the generative loss first, the discriminative one afterwards.

Knows nothing of data sets, files or command lines.
"""

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from timm.task import ClassificationTask
from timm.utils import unwrap_model
from torch import Tensor

from .generative import head_biases
from .loss import GenerativeLoss, ess, log_mean_exp
from .running import RunningMean

_logger = logging.getLogger(__name__)

PHASES = ('DG', 'GG', 'GG+DG')
RECORD_EVERY = 100  # steps between two entries of the ESS history; the automatic switch is decided there
RECENT = 20  # log Z is a mean over about the last twentieth of the steps, until that is longer than 1/momentum
PLATEAU = 10  # records without a fall of 1 % that make a plateau
_STATE = ('generative', 'steps', 'switch_step', 'log_z', 'class_counts', 'ess', 'ess_history', 'queue')


class GenerativeTask(ClassificationTask):
    """Train with the generative gradient (GG), the discriminative one (DG), or the first and then the second (GG+DG).

    A drop-in for timm's ClassificationTask. In the generative phase the class biases receive no gradient; instead the
    task keeps a running log Z_y per class, and adds the intercepts alpha_y = log rho_y - log Z_y to the logits of the
    model that validation sees and to the classifier bias of the weights that a checkpoint holds. The bias that training
    continues from lies in the checkpoint's task state, so that a resumed run goes on unchanged. At the switch the
    intercepts are folded into the bias for good. Averaged weights get intercepts averaged in the same way: those of the
    moment belong to scores that the average has yet to reach.

    Across ranks the softmax over images is that of the global batch. Within accumulated gradients it is that of each
    micro-batch, unless a queue joins them.

    Args:
        model: The model to train.
        criterion: Discriminative loss; made from criterion_kwargs, as timm does, if None.
        criterion_kwargs: Arguments of timm's create_classification_loss.
        phase: 'DG', 'GG' or 'GG+DG'.
        gen_steps: GG+DG switches after this many training steps (calls of forward).
        switch_ess: GG+DG switches when the smoothed effective sample size, in images of all ranks, has fallen to this;
            or 'plateau': when it has not fallen by 1 % for 1000 steps. The mean over the classes counts.
        hybrid: Weight h in [0, 1) of the discriminative loss in the generative phase: (1 - h) GG + h DG, where GG is
            the whole generative loss, that of unlabeled images included. With h > 0 the discriminative part learns the
            biases, so no intercepts are added.
        queue: Number of past images per rank whose (detached) logits enlarge the image pool. Biased: their share of
            E_p[grad f] is missing, so that the scores of all images drift upwards, and their logits are as stale as the
            queue is long. Needs a small learning rate. A checkpoint holds the first rank's; the others start anew.
        unlabeled_weight: Weight w of the likelihood of the unlabeled images, each taken for one of the class that is
            most probable under the model of the moment: (mean over labeled images) + w (mean over unlabeled ones), the
            classification likelihood (Celeux and Govaert 1992) of a mixture whose components are the p_y. Biased as far
            as those guesses are wrong, and they confirm themselves. With 0 these images enter the softmax only, which
            pushes all their scores down: a few labeled images are then told from the unlabeled ones of their class.
        bridge: Makes of a batch [n, C, H, W] the n images to learn and, behind them, further images of the pool
            [n + m, C, H, W], such as `Natural.bridge`: q is then the mixture of all. Without it nothing tells the
            network what an image is not, and pictures of its nodes need not look like images.
        running_log_z: Weigh the images of a batch by exp(f_y - running log Z_y) / n instead of by a softmax over the
            batch, as SogCLR does. Biased by the lag of the running mean, less biased than a small batch.
        momentum: Weight of a batch in the running means of Z_y and of the ESS, in (0, 1]. Early batches have a larger
            one: that of step t (from 0) 20 / (t + 20) in Z_y, which moves fast at first, so that the mean lags by
            t / 21 steps, and 1 / (t + 1) in the ESS.
        on_switch: Called without arguments after the switch, for example to restart a learning-rate schedule.
        device: Where the model is; None finds out.
        dtype, verbose: As in timm's ClassificationTask.

    Attributes:
        optimizer: None, or the optimizer, which then forgets at the switch what it knows of the bias: Lookahead and
            MADGRAD keep a copy of it, and would take the intercepts back.

    Raises:
        ValueError: Unknown phase, or a number out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module | Callable | None = None,
        criterion_kwargs: dict[str, Any] | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
        *,
        phase: str = 'GG+DG',
        gen_steps: int | None = None,
        switch_ess: float | str | None = None,
        hybrid: float = 0.0,
        queue: int = 0,
        unlabeled_weight: float = 0.0,
        bridge: Callable[[Tensor], Tensor] | None = None,
        running_log_z: bool = False,
        momentum: float = 0.01,
        on_switch: Callable[[], None] | None = None,
    ) -> None:
        if phase not in PHASES:
            raise ValueError(f'phase {phase!r} is not one of {", ".join(PHASES)}')
        if isinstance(switch_ess, str) and switch_ess != 'plateau':
            raise ValueError(f"switch_ess {switch_ess!r} is neither a number of images nor 'plateau'")
        if not 0 <= hybrid < 1:
            raise ValueError(f'hybrid {hybrid} is outside [0, 1); phase DG is the discriminative loss alone')
        if not 0 <= unlabeled_weight < math.inf:
            raise ValueError(f'unlabeled_weight {unlabeled_weight} is outside [0, inf)')
        if not 0 < momentum <= 1:
            raise ValueError(f'momentum {momentum} is outside (0, 1]')
        if queue < 0 or (gen_steps is not None and gen_steps < 0):
            raise ValueError(f'queue {queue} and gen_steps {gen_steps} must not be negative')
        if device is None:
            device = next((p.device for p in model.parameters()), None)
        super().__init__(model, criterion, criterion_kwargs, device, dtype, verbose)
        self.phase = phase
        self.gen_steps = gen_steps
        self.switch_ess = switch_ess
        self.hybrid = hybrid
        self.queue_size = queue
        self.unlabeled_weight = unlabeled_weight
        self.bridge = bridge
        self.running_log_z = running_log_z
        self.momentum = momentum
        self.on_switch = on_switch
        self.optimizer: Any = None
        self.generative_loss = GenerativeLoss()

        self.generative = phase != 'DG'
        self.steps = 0
        self.switch_step: int | None = None
        self.switch_epoch: float | None = None  # for the training loop, which alone knows how long an epoch is
        self._log_z = RunningMean(logarithms=True)
        self._ess = RunningMean()
        self.ess_history: list[float] = []
        self.class_counts: Tensor | None = None  # images of each class so far [C], over all ranks
        self.queue: Tensor | None = None
        self._new_counts: Tensor | None = None  # those of this rank, not yet added to class_counts
        self._ema_intercepts: Tensor | None = None  # [C]

    @property
    def log_z(self) -> Tensor | None:
        """Running mean of Z_y, as a logarithm [C]."""
        return self._log_z.get()

    @log_z.setter
    def log_z(self, value: Tensor | None) -> None:
        self._log_z.set(value)

    @property
    def ess(self) -> Tensor | None:
        """Running mean of the batches' ESS [C]."""
        return self._ess.get()

    @ess.setter
    def ess(self, value: Tensor | None) -> None:
        self._ess.set(value)

    def _apply(self, fn: Callable, *args: Any, **kwargs: Any) -> 'GenerativeTask':
        """Take the running estimates along to another device."""
        super()._apply(fn, *args, **kwargs)
        for name in (*_STATE, '_new_counts', '_ema_intercepts'):
            value = getattr(self, name)
            if isinstance(value, Tensor):
                setattr(self, name, value.to(self.device))
        return self

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs: Any) -> 'GenerativeTask':
        """Wrap the model in DistributedDataParallel and take the softmax over the images of all ranks."""
        if self.device.type == 'cpu':
            device_ids = None  # DistributedDataParallel refuses the CPU's, which timm's train.py passes
        super().prepare_distributed(device_ids=device_ids, **ddp_kwargs)
        self.generative_loss.distributed = True
        return self

    def forward(self, input: Tensor, target: Tensor, unlabeled: Tensor | None = None) -> dict[str, Tensor]:
        """Compute the loss of the current phase.

        Args:
            input: Images [n, C, H, W], or what else the model takes, such as a dict of patches.
            target: Class indices [n] or class weights [n, C].
            unlabeled: Images without a class [m, C, H, W]. In the generative phase they enter the softmax, so that q
                is the mixture of both sets, and, with an `unlabeled_weight`, the loss; otherwise they are not used. All
                ranks have some, if not as many, or none has.

        Returns:
            'loss', a scalar, and 'output', the logits of the labeled images [n, C].
        """
        if self.generative and self._is_time_to_switch():
            self.switch()
        if not self.generative:
            self.steps += 1
            return super().forward(input, target)

        images = self.bridge(input) if self.bridge else input
        logits = self.trainable_module(images if unlabeled is None else torch.cat([images, unlabeled]))
        n = len(target)
        if self.running_log_z:
            scores = logits if self.queue is None else torch.cat([logits, self.queue])
            self._update_log_z(log_mean_exp(scores.detach(), self.generative_loss.distributed))
        log_z = self.log_z if self.running_log_z else None
        log_ratio = self.generative_loss.log_ratio(logits, self.queue, log_z)
        labeled = log_ratio if len(logits) == n else log_ratio[:n]  # a slice of all would copy the gradient
        loss = self.generative_loss.nll(labeled, target)
        if self.unlabeled_weight and unlabeled is not None and len(unlabeled):
            free = log_ratio[-len(unlabeled) :]
            classes = (free.detach() + self._log_priors()).argmax(1)
            loss = loss + self.unlabeled_weight * self.generative_loss.nll(free, classes)
        if not self.running_log_z:
            self._update_log_z(self.generative_loss.log_z)
        self._track(logits.detach(), log_ratio.detach(), target.detach())
        output = logits if len(logits) == n else logits[:n]
        if self.hybrid:
            loss = torch.lerp(loss, self.criterion(output, target).to(loss.dtype), self.hybrid)
        return {'loss': loss, 'output': output}

    # Running estimates

    def _update_log_z(self, new: Tensor | None) -> None:
        """Z_y <- (1 - rate) Z_y + rate (this batch's Z_y)."""
        assert new is not None
        self._log_z.add(new, max(self.momentum, RECENT / (self.steps + RECENT)))

    def _track(self, logits: Tensor, log_ratio: Tensor, target: Tensor) -> None:
        """Update what the intercepts and the automatic switch need. Talks to the other ranks only when it records.

        With as few operations as it takes: on a fast device the host's time for each is what counts.
        """
        new = ess(log_ratio)  # that of the logits, which autocast leaves in half precision
        self._ess.add(new, max(self.momentum, 1 / (self.steps + 1)))
        self._count(target, like=new)
        if self.queue_size:
            past = logits if self.queue is None else torch.cat([logits, self.queue])
            self.queue = past[: self.queue_size]
        recording = self.steps % RECORD_EVERY == 0
        if recording:
            self._log_z.get()  # or it would keep all batches until the end of the epoch
        if self.generative_loss.distributed and (recording or self.steps < RECORD_EVERY):
            self._share(with_ess=recording)  # in a short phase, too: its priors must not be those of a single batch
        elif recording:
            self.ess_history.append(self._mean_ess().item())
        self.steps += 1

    def _count(self, target: Tensor, like: Tensor) -> None:
        """Count the images of each class: for good, or, with other ranks, until the counts are shared."""
        name = '_new_counts' if self.generative_loss.distributed else 'class_counts'
        if getattr(self, name) is None:
            setattr(self, name, torch.zeros_like(like))
        counts = getattr(self, name)
        if target.is_floating_point():
            counts += target.sum(0)
        else:
            counts.scatter_(0, target.long(), 1, reduce='add')

    def _share(self, with_ess: bool) -> None:
        """Add the ranks' new counts to class_counts and, if asked, their ESS to the history."""
        assert self._new_counts is not None
        record = torch.cat([self._new_counts, self._mean_ess()[None]]) if with_ess else self._new_counts
        dist.all_reduce(record)
        new_counts = record[: len(self._new_counts)]
        self.class_counts = new_counts if self.class_counts is None else self.class_counts + new_counts
        self._new_counts = None
        if with_ess:
            self.ess_history.append(record[-1].item())

    def _mean_ess(self) -> Tensor:
        """Over the classes."""
        assert self.ess is not None
        return self.ess.mean()

    def _is_time_to_switch(self) -> bool:
        if self.phase != 'GG+DG':
            return False
        if self.gen_steps is not None and self.steps >= self.gen_steps:
            return True
        history = self.ess_history
        if self.switch_ess is None or len(history) < 2:  # the first record is a single batch
            return False
        if self.switch_ess == 'plateau':
            return len(history) > PLATEAU and min(history[-PLATEAU:]) > 0.99 * min(history[:-PLATEAU])
        return history[-1] <= float(self.switch_ess)

    def switch(self) -> None:
        """Go over to the discriminative gradient. Does nothing in the discriminative phase."""
        if not self.generative:
            return
        if self.calibrates:
            for ema in (False, True):
                for bias in self._biases(ema).values():
                    with torch.no_grad():
                        bias += self.intercepts(ema).to(bias)
                    if self.optimizer is not None:
                        optimizer = getattr(self.optimizer, '_base_optimizer', self.optimizer)  # timm's Lookahead
                        known = optimizer.state.pop(bias, {})
                        if 'hessian step' in known:  # Adahessian writes it in its constructor alone
                            optimizer.state[bias]['hessian step'] = known['hessian step']
        self.generative = False
        self.switch_step = self.steps
        self.queue = None
        if self.verbose:
            _logger.info(f'Step {self.steps}: from the generative to the discriminative gradient')
        if self.on_switch is not None:
            self.on_switch()

    # Intercepts

    @property
    def calibrates(self) -> bool:
        """Whether the model needs intercepts that its bias does not hold: in a purely generative phase."""
        return self.generative and self.hybrid == 0 and self.log_z is not None

    def intercepts(self, ema: bool = False) -> Tensor:
        """alpha_y = log rho_y - log Z_y from the running estimates [C].

        Args:
            ema: For the averaged weights.

        Raises:
            ValueError: Before the first generative step.
        """
        if ema and self._ema_intercepts is not None:
            return self._ema_intercepts
        if self.log_z is None:
            raise ValueError('no log Z yet: the intercepts are known after the first generative training step')
        return self._log_priors() - self.log_z

    def _log_priors(self) -> Tensor:
        """log rho_y from the images so far, one more a class to keep it finite [C]; before the first a scalar."""
        if self.class_counts is None:
            return torch.zeros((), device=self.device)
        counts = self.class_counts + 1
        return (counts / counts.sum()).log()

    def update_ema(self, step: int | None = None) -> None:
        """Update the averaged weights, and their intercepts."""
        super().update_ema(step)
        average: Any = self.get_trainable_module(ema=True)
        if average is not None and self.calibrates:
            self._ema_intercepts = torch.lerp(self.intercepts(), self.intercepts(ema=True), average.get_decay(step))

    def _plain_model(self, ema: bool) -> Any:
        module = self.get_trainable_module(ema=ema)
        return None if module is None else unwrap_model(module)

    def _biases(self, ema: bool) -> dict[str, Tensor]:
        """Final bias of each classifier head by its name in the state dict; empty if the heads have none."""
        model = self._plain_model(ema)
        if not hasattr(model, 'get_classifier'):
            return {}
        biases = head_biases(model)
        if any(b is None or self.log_z is None or b.shape != self.log_z.shape for b in biases):
            return {}
        return {name: p for name, p in model.named_parameters() if any(p is b for b in biases)}

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """Return the model for validation: with the intercepts of the moment added to its logits while they are needed.

        It may be fetched once, before training, and kept, as timm's train.py does.
        """
        model = super().get_eval_model(module, ema)
        if model is None or module is not None or self.phase == 'DG' or self.hybrid:
            return model
        return _Calibrated(model, lambda: self.intercepts(ema) if self.calibrates else None)

    def compile_ema(self, backend: str = 'inductor', mode: str | None = None, **kwargs: Any) -> nn.Module | None:
        """Compile the averaged model for validation, without the intercepts: they change."""
        if self.has_ema():
            self.eval_model_ema = torch.compile(super().get_eval_model(ema=True), backend=backend, mode=mode, **kwargs)
        return self.get_eval_model(ema=True)

    # Checkpoints

    def get_checkpoint_state(self, ema: bool = False, unwrap_fn: Callable = unwrap_model) -> dict[str, Any]:
        """timm's checkpoint entries, the weights with the intercepts folded in."""
        state = super().get_checkpoint_state(ema=ema, unwrap_fn=unwrap_fn)
        if state and self.calibrates:
            key = 'state_dict_ema' if ema else 'state_dict'
            folded = {name: bias.detach() + self.intercepts(ema).to(bias) for name, bias in self._biases(ema).items()}
            state[key] = {**state[key], **folded}
        return state

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Phase, running log Z, ESS history, class counts and queue; and the biases as training has them."""
        state: dict[str, Any] = {}
        if self.calibrates:
            state['bias'] = {name: bias.detach().clone() for name, bias in self._biases(ema).items()}
        if not ema:
            state.update({name: getattr(self, name) for name in _STATE}, new_counts=self._new_counts)
            # copies, for steps change them in place
            state = {name: v.clone() if isinstance(v, Tensor) else v for name, v in state.items()}
            state['switch_epoch'] = self.switch_epoch
        elif self.calibrates:
            state['intercepts'] = self._ema_intercepts
        return state

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """Restore what get_task_state returned, after the weights.

        Raises:
            ValueError: If strict and the state is not that of a GenerativeTask; or it is that of the other phase than
                the only one that this task knows.
        """
        state = state or {}
        if not ema:
            missing = [name for name in _STATE if name not in state]
            if missing:
                if strict and state:
                    raise ValueError(f'the checkpoint was not written by a GenerativeTask: it lacks {missing}')
                return
            if self.phase == ('DG' if state['generative'] else 'GG'):
                before = 'generative' if state['generative'] else 'discriminative'
                raise ValueError(
                    f'the checkpoint is in its {before} phase, where phase {self.phase} cannot go on: resume with the '
                    'phase that it was trained in, or start from its weights (--initial-checkpoint)'
                )
            for name in _STATE:
                value = state[name]
                setattr(self, name, value.to(self.device, copy=True) if isinstance(value, Tensor) else value)
            self.switch_epoch = state.get('switch_epoch')  # unknown to 0.1.0
            self._new_counts = None
            if state['new_counts'] is not None:  # of the first rank: those of the others are lost
                new_counts = state['new_counts'].to(self.device)
                self.class_counts = new_counts if self.class_counts is None else self.class_counts + new_counts
            if dist.is_available() and dist.is_initialized() and dist.get_rank() > 0:
                self.queue = None  # that in the checkpoint is the first rank's own
        else:
            averaged = state.get('intercepts')  # unknown to 0.1.0, and to a run without averaged weights
            self._ema_intercepts = None if averaged is None else averaged.to(self.device)
        with torch.no_grad():
            for name, bias in state.get('bias', {}).items():
                self._plain_model(ema).get_parameter(name).copy_(bias)


class _Calibrated(nn.Module):
    """A model with the intercepts, if there are any now, added to its logits. unwrap_model sees through it."""

    def __init__(self, module: nn.Module, intercepts: Callable[[], Tensor | None]) -> None:
        super().__init__()
        self.module = module
        self.intercepts = intercepts
        self.training = module.training

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        logits = self.module(*args, **kwargs)
        intercepts = self.intercepts()
        return logits if intercepts is None else logits.float() + intercepts.to(logits.device)
