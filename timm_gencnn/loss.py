"""The generative loss: softmax over the images of a batch instead of over the classes.

Knows nothing of models: logits and targets go in, a scalar comes out.
"""

import math

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

_REDUCTIONS = ('mean', 'sum', 'none')
_NO_CLASS = torch.iinfo(torch.int64).min  # torch would leave out targets of -100


class _AllReduceSum(torch.autograd.Function):
    """Sum over ranks. Every rank's loss depends on the sum, so the gradient is summed over ranks as well."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad


def log_mean_exp(logits: Tensor, distributed: bool = False) -> Tensor:
    """Estimate log Z_y = log E_q[exp f_y(x)] from a sample of q, one value a class.

    Args:
        logits: Scores f_y(x_j) of images x_j drawn from q [n, C].
        distributed: Take the mean over the images of all ranks: three all-reduces of C numbers (one of them in the
            backward pass) whatever the batch size. Every rank must call it.

    Returns:
        log (1/n) sum_j exp f_y(x_j), at least float32 [C].
    """
    logits = _at_least_float32(logits)
    if not distributed:
        return logits.logsumexp(0) - math.log(len(logits))
    peak = logits.detach().amax(0)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    return peak + _mean_over_images((logits - peak).exp(), distributed).log()


def _mean_over_images(x: Tensor, distributed: bool) -> Tensor:
    """Mean over the first axis [n, ...] -> [...], of all ranks together if distributed."""
    if not distributed:
        return x.mean(0)
    total = _AllReduceSum.apply(torch.cat([x.sum(0).flatten(), x.new_full((1,), len(x))]))
    return (total[:-1] / total[-1]).view(x.shape[1:])


def ess(logits: Tensor) -> Tensor:
    """Effective sample size of the importance weights W_jy = softmax_j f_y(x_j).

    Args:
        logits: Scores f_y(x_j) [n, C].

    Returns:
        1 / sum_j W_jy^2 per class [C], from 1 (one image carries the class) to n (all weights equal).
    """
    weights = _at_least_float32(logits.detach()).softmax(0)
    return torch.linalg.vector_norm(weights, dim=0).pow_(-2)


class GenerativeLoss(nn.Module):
    r"""Negative log-likelihood of each image under its class's density p_y(x) = exp(f_y(x)) q(x) / Z_y.

    With q = "all training images", the batch is a sample of q and Z_y is estimated on it, so that

        loss = -(1/n) sum_i [f_{y_i}(x_i) - log (1/n) sum_j exp f_{y_i}(x_j)]
             = nll_loss(log_softmax(logits, dim=0), target) - log n

    whose gradient is the generative gradient of Dai, Lu and Wu (ICLR 2015, arXiv 1412.6296) with self-normalised
    importance weights. The loss is an estimate of -log p_y(x)/q(x), at least -log n. It does not change when a constant
    is added to a column, so class biases are not learned by it: set them afterwards from log Z_y.

    Soft targets (mixup, cutmix, smoothing) enter by linearity, as sum_y t_iy loss_iy. Classes absent from the batch
    contribute nothing. The softmax is taken in float32 (or the logits' own dtype if wider), inside autocast too.

    Args:
        reduction: 'mean', 'sum' or 'none' over the n images.
        distributed: Take the softmax over the images of all ranks, with O(C) communication. With reduction 'mean' the
            loss of a rank is scaled so that the average over ranks, which DistributedDataParallel takes of the
            gradients, is that of one big batch even when the ranks' batch sizes differ.

    Attributes:
        log_z: The log Z_y that the last call estimated or was given [C], detached.

    Raises:
        ValueError: Unknown reduction.

    Example:
        >>> loss = GenerativeLoss()
        >>> loss(torch.zeros(4, 10), torch.tensor([3, 1, 4, 1]))
        tensor(0.)
    """

    def __init__(self, reduction: str = 'mean', distributed: bool = False) -> None:
        super().__init__()
        if reduction not in _REDUCTIONS:
            raise ValueError(f'reduction {reduction!r} is not one of {", ".join(_REDUCTIONS)}')
        self.reduction = reduction
        self.distributed = distributed
        self.log_z: Tensor | None = None

    def forward(
        self, logits: Tensor, target: Tensor, pool: Tensor | None = None, log_z: Tensor | None = None
    ) -> Tensor:
        """Compute the loss.

        Args:
            logits: Scores f_y(x_i) [n, C].
            target: Class indices [n], or weights of the classes [n, C].
            pool: Scores of further images drawn from q [m, C]. They enter the softmax, not the numerator.
                With detached scores (a queue of past batches) their share of E_p[grad f] is missing from the
                gradient, which shrinks that expectation by about n / (n + m), and the scores are stale.
            log_z: log Z_y known from elsewhere, such as a running mean [C]. The weights become exp(f_y - log_z) / n:
                unbiased where log_z is exact, no longer invariant to a shift of a column.

        Returns:
            Loss: a scalar, or [n] for reduction 'none'.

        Raises:
            ValueError: Shapes that do not fit, a batch of one image, a class index outside [0, C), scores that are
                not finite. (The last two are checked on the CPU only: on an accelerator the check would stall it.)
        """
        return self.nll(self.log_ratio(logits, pool, log_z), target)

    def log_ratio(self, logits: Tensor, pool: Tensor | None = None, log_z: Tensor | None = None) -> Tensor:
        """Estimate log p_y(x_i)/q(x_i) of every image and class [n, C]. Arguments and errors are those of a call."""
        _check_logits(logits, pool, least=1 if self.distributed and dist.get_world_size() > 1 else 2)
        logits = _at_least_float32(logits)
        images = logits if pool is None else torch.cat([logits, pool.to(logits.dtype)])
        if log_z is None and not self.distributed:
            log_ratio = F.log_softmax(images, 0) + math.log(len(images))
            self.log_z = images.detach()[0] - log_ratio.detach()[0]
        else:
            if log_z is None:
                log_z = log_mean_exp(images, self.distributed)
            else:
                weights = _mean_over_images((images - log_z.detach()).exp(), self.distributed)
                log_z = log_z.detach() + weights - weights.detach()
            log_ratio = images - log_z
            self.log_z = log_z.detach()
        return log_ratio if pool is None else log_ratio[: len(logits)]

    def nll(self, log_ratio: Tensor, target: Tensor) -> Tensor:
        """Reduce what `log_ratio` estimated [n, C], or the rows of some images, to the loss of their classes."""
        _check_target(target, log_ratio.shape)
        over_ranks = self.distributed and self.reduction == 'mean'
        reduction = 'sum' if over_ranks else self.reduction
        if target.is_floating_point():
            loss = -(target * log_ratio).sum(1)
            loss = loss if reduction == 'none' else getattr(loss, reduction)()
        else:
            loss = F.nll_loss(log_ratio, target.long(), reduction=reduction, ignore_index=_NO_CLASS)
        if not over_ranks:
            return loss
        total = loss.new_full((1,), len(target))
        dist.all_reduce(total)
        return loss * (dist.get_world_size() / total[0])

    def extra_repr(self) -> str:
        return f'reduction={self.reduction!r}, distributed={self.distributed}'


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype.itemsize < 4 else x


def check_targets(target: Tensor, classes: int) -> None:
    """Refuse class indices outside [0, classes). On an accelerator it does nothing, so as not to stall it.

    Raises:
        ValueError: A target is out of range.
    """
    if target.is_floating_point() or target.device.type != 'cpu':
        return
    low, high = (int(t) for t in target.aminmax())
    if low < 0 or high >= classes:
        bad = low if low < 0 else high
        raise ValueError(f'target {bad} is outside [0, {classes}): the model has {classes} classes')


def _check_logits(logits: Tensor, pool: Tensor | None, least: int) -> None:
    if logits.ndim != 2:
        raise ValueError(f'logits must be [n, C], not {list(logits.shape)}')
    n, classes = logits.shape
    if pool is not None and (pool.ndim != 2 or pool.shape[1] != classes):
        raise ValueError(f'pool must be [m, {classes}] to match the logits, not {list(pool.shape)}')
    if n + (0 if pool is None else len(pool)) < least:
        raise ValueError(
            'a batch of 1 image has no image pool: the generative loss needs at least 2 images (raise the batch size)'
        )
    if logits.device.type == 'cpu' and not math.isfinite(logits.detach().sum(dtype=torch.float64)):
        raise ValueError('logits contain NaN or infinity: lower the learning rate or clip the gradients')


def _check_target(target: Tensor, shape: torch.Size) -> None:
    soft = target.is_floating_point()
    expected = list(shape) if soft else [shape[0]]
    if list(target.shape) != expected:
        kind = 'soft (floating-point)' if soft else 'integer'
        raise ValueError(f'{kind} target for logits {list(shape)} must be {expected}, not {list(target.shape)}')
    check_targets(target, shape[1])
