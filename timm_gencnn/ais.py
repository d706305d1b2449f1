"""log Z of a score by annealed importance sampling (Neal, "Annealed importance sampling", 2001).

Z = E_q[exp f(x)] under a reference q that is the law of g(z), z ~ N(0, I). The tilt rises from 0 to 1 in small steps;
between two of them the HMC kernel of `hmc.py` moves the chains and leaves each tilted density invariant.
This module sees a score function of latents and knows nothing of networks or images.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from . import hmc


class LogZ(NamedTuple):
    """An estimate of log Z.

    Attributes:
        log_z: log of the mean importance weight: low on average, by half the square of its standard error where that
            is small, since the mean weight is right on average and the log is concave.
        standard_error: Standard error of `log_z` by the delta method, sd(w) / (mean(w) sqrt(n)). It can be trusted
            while the ESS is a good part of the number of chains.
        ess: Effective sample size of the weights, 1 to n.
        log_weights: Log importance weight of each chain [n], float64, on the CPU.
        acceptance: Mean acceptance over all transitions.
        gradients: Gradients per chain.
    """

    log_z: float
    standard_error: float
    ess: float
    log_weights: Tensor
    acceptance: float
    gradients: int


def log_z(
    score: hmc.Score,
    shape: tuple[int, ...],
    streams: hmc.Streams,
    levels: int = 100,
    n_leapfrog: int = 4,
    step_size: float | None = None,
    batch: int | None = None,
) -> LogZ:
    """Estimates log Z = log E_q[exp f] and its standard error.

    The tilt of level k is (k / levels)², denser near the reference, where the score changes most. E[mean weight] = Z
    exactly, whatever the number of levels; more levels and chains lower the variance.

    Args:
        score: f, latents [n, *shape] to scores [n].
        shape: Shape of one latent.
        streams: Random streams, one per chain; at least two.
        levels: Steps of the tilt from 0 to 1, at least 2.
        n_leapfrog: Gradients per trajectory, one trajectory per level.
        step_size: Step size in radians; None is an eighth of a period per trajectory.
        batch: Chains to run together, at least 1; None is all.

    Returns:
        The estimate; costs `gradients(levels, n_leapfrog)` per chain.

    Raises:
        ValueError: Fewer than two chains or levels, no leapfrog step, or a score that is not finite.
    """
    n = len(streams)
    if n_leapfrog < 1:
        raise ValueError(f'n_leapfrog={n_leapfrog}: a trajectory needs at least one gradient')
    if n < 2 or levels < 2:
        raise ValueError(f'{n} chains and {levels} levels given: a standard error needs at least 2 of each')
    eps = math.pi / 4 / n_leapfrog if step_size is None else step_size
    parts = [_anneal(score, shape, some, levels, n_leapfrog, eps) for some in streams.split(batch or n)]
    log_weights, acceptance = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    w = (log_weights - log_weights.max()).exp()
    return LogZ(
        (log_weights.logsumexp(0) - math.log(n)).item(),
        (w.std() / w.mean() / math.sqrt(n)).item(),
        (w.sum().square() / w.square().sum()).item(),
        log_weights,
        acceptance.mean().item(),
        gradients(levels, n_leapfrog),
    )


def gradients(levels: int, n_leapfrog: int = 4) -> int:
    """Gradients per chain of `log_z`."""
    return 1 + (levels - 1) * n_leapfrog


def _anneal(
    score: hmc.Score, shape: tuple[int, ...], streams: hmc.Streams, levels: int, n_leapfrog: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Log importance weight and mean acceptance of each chain [n], float64."""
    state = hmc.init(score, streams.normal(shape), streams)
    if not state.score.isfinite().all():
        raise ValueError('the score is not finite on images of the reference: check the weights for NaN')
    log_weights = torch.zeros(len(streams), dtype=torch.float64, device=state.z.device)
    acceptance = torch.zeros_like(log_weights)
    sizes = torch.full_like(log_weights, eps)
    tilts = [(k / levels) ** 2 for k in range(levels + 1)]
    for low, high in pairwise(tilts):
        log_weights += (high - low) * state.score.double()
        if high < 1:
            state, info = hmc.step(state, score, streams, sizes, n_leapfrog, tilt=high)
            acceptance += info.acceptance
    return log_weights, acceptance / (levels - 1)
