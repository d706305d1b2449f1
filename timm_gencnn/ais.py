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
        log_z: log of the mean importance weight.
        standard_error: Standard error of `log_z` by the delta method, sd(w) / (mean(w) sqrt(n)). It can be trusted
            while the ESS is a good part of the number of chains.
        ess: Effective sample size of the weights, 1 to n.
        log_weights: Log importance weight of each chain [n], float64.
        acceptance: Mean acceptance over all transitions.
        gradients: Gradients per chain.
    """

    log_z: float
    standard_error: float
    ess: float
    log_weights: Tensor
    acceptance: float
    gradients: int


def log_weights(
    score: hmc.Score,
    shape: tuple[int, ...],
    streams: hmc.Streams,
    levels: int = 100,
    n_leapfrog: int = 4,
    step_size: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Log importance weights of independent annealed chains; their mean weight is an unbiased estimate of Z.

    The tilt of level k is (k / levels)², denser near the reference, where the score changes most. More levels lower the
    variance of the weights, and E[weight] = Z at any number of them.

    Args:
        score: f, latents [n, *shape] to scores [n].
        shape: Shape of one latent.
        streams: Random streams, one per chain.
        levels: Steps of the tilt from 0 to 1, at least 2.
        n_leapfrog: Gradients per trajectory, one trajectory per level.
        step_size: Step size in radians; None is an eighth of a period per trajectory.

    Returns:
        Log weights [n] and mean acceptance [n], float64; costs `gradients(levels, n_leapfrog)` per chain.

    Raises:
        ValueError: Fewer than two levels, no leapfrog step, or a score that is not finite.
    """
    if n_leapfrog < 1 or levels < 2:
        raise ValueError(f'levels={levels}, n_leapfrog={n_leapfrog}: give at least 2 levels and 1 gradient for each')
    eps = math.pi / 4 / n_leapfrog if step_size is None else step_size
    state = hmc.init(score, streams.normal(shape), streams)
    if not state.score.isfinite().all():
        raise ValueError('the score is not finite on images of the reference: check the weights for NaN')
    weights = torch.zeros(len(streams), dtype=torch.float64, device=state.z.device)
    acceptance = torch.zeros_like(weights)
    sizes = torch.full_like(weights, eps)
    tilts = [(k / levels) ** 2 for k in range(levels + 1)]
    for low, high in pairwise(tilts):
        weights += (high - low) * state.score.double()
        if high < 1:
            state, info = hmc.step(state, score, streams, sizes, n_leapfrog, tilt=high)
            acceptance += info.acceptance
    return weights, acceptance / (levels - 1)


def gradients(levels: int, n_leapfrog: int = 4) -> int:
    """Gradients per chain of `log_weights`."""
    return 1 + (levels - 1) * n_leapfrog


def log_z(
    score: hmc.Score,
    shape: tuple[int, ...],
    streams: hmc.Streams,
    levels: int = 100,
    n_leapfrog: int = 4,
    step_size: float | None = None,
) -> LogZ:
    """Estimates log Z = log E_q[exp f] and its standard error; see `log_weights` for the arguments.

    Raises:
        ValueError: Fewer than two chains or levels, or a score that is not finite.
    """
    weights, acceptance = log_weights(score, shape, streams, levels, n_leapfrog, step_size)
    return summarise(weights, acceptance, gradients(levels, n_leapfrog))


def summarise(weights: Tensor, acceptance: Tensor, spent: int) -> LogZ:
    """The estimate that log weights [n] of independent chains make.

    Raises:
        ValueError: Fewer than two chains.
    """
    n = len(weights)
    if n < 2:
        raise ValueError(f'{n} chain given: a standard error needs at least 2')
    w = (weights - weights.max()).exp()
    return LogZ(
        (weights.logsumexp(0) - math.log(n)).item(),
        (w.std() / w.mean() / math.sqrt(n)).item(),
        (w.sum().square() / w.square().sum()).item(),
        weights,
        acceptance.mean().item(),
        spent,
    )
