"""Convergence diagnostics of Markov chains: rank-normalised split R-hat and effective sample size.

Source: Vehtari, Gelman, Simpson, Carpenter, Bürkner, "Rank-normalization, folding, and localization: an improved R-hat
for assessing convergence of MCMC", Bayesian Analysis 16(2), 2021. Input is [draws, chains]; all work is in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _check(draws: Tensor) -> Tensor:
    if draws.ndim != 2 or draws.shape[0] < 4:
        raise ValueError(f'draws must be [draws, chains] with at least 4 draws, got shape {tuple(draws.shape)}')
    return draws.double()


def split(draws: Tensor) -> Tensor:
    """Halves each chain: [draws, chains] -> [draws // 2, 2 · chains]; an odd draw in the middle is dropped."""
    half = draws.shape[0] // 2
    return torch.cat([draws[:half], draws[-half:]], dim=1)


def rank_normalize(draws: Tensor) -> Tensor:
    """Replaces draws by the normal quantiles of their pooled fractional ranks (ties share their mean rank)."""
    flat = draws.double().flatten()
    _, inverse, counts = flat.unique(return_inverse=True, return_counts=True)
    mean_rank = counts.cumsum(0) - (counts - 1) / 2
    ranks = mean_rank.double()[inverse].view_as(draws)
    return torch.special.ndtri((ranks - 0.375) / (flat.numel() + 0.25))


def _basic_r_hat(draws: Tensor) -> Tensor:
    n = draws.shape[0]
    within = draws.var(dim=0).mean()
    between = n * draws.mean(dim=0).var()
    return torch.sqrt((n - 1) / n + between / (n * within))


def r_hat(draws: Tensor) -> float:
    """Rank-normalised split R-hat (Vehtari et al. 2021, section 4.1): the larger of its bulk and folded forms.

    Args:
        draws: A scalar per draw and chain [draws, chains], at least 4 draws; one chain is split in two.

    Returns:
        R-hat; 1 means that the chains agree, above 1.01 they have not converged. NaN when no chain's draws change.
    """
    draws = split(_check(draws))
    if (draws == draws[0]).all():
        return math.nan
    middle = (draws.median() - (-draws).median()) / 2  # torch's median is the lower of the two in the middle
    folded = (draws - middle).abs()
    return torch.maximum(_basic_r_hat(rank_normalize(draws)), _basic_r_hat(rank_normalize(folded))).item()


def _autocovariance(draws: Tensor) -> Tensor:
    """Biased autocovariance of each chain by FFT [draws, chains]."""
    n = draws.shape[0]
    spectrum = torch.fft.rfft(draws - draws.mean(dim=0), n=2 * n, dim=0)
    return torch.fft.irfft(spectrum.abs().square(), n=2 * n, dim=0)[:n] / n


def ess(draws: Tensor) -> float:
    """Effective sample size of the mean, by Geyer's initial monotone sequence over split chains.

    Args:
        draws: A scalar per draw and chain [draws, chains], at least 4 draws.

    Returns:
        ESS of all chains together, at most draws · chains · log10(draws · chains); NaN when all draws are equal.
    """
    draws = split(_check(draws))
    n, m = draws.shape
    acov = _autocovariance(draws)
    within = (acov[0] * n / (n - 1)).mean()
    var_plus = within * (n - 1) / n + draws.mean(dim=0).var()
    rho = 1 - (within - acov.mean(dim=1)) / var_plus
    rho[0] = 1.0
    pairs = rho[: n - n % 2].view(-1, 2).sum(dim=1)
    if not pairs.isfinite().all():
        return math.nan
    negative = (pairs < 0).nonzero()
    pairs = pairs[: negative[0, 0]] if len(negative) else pairs
    tau = max(2 * pairs.cummin(0).values.sum().item() - 1, 1 / math.log10(n * m))
    return n * m / tau


def bulk_ess(draws: Tensor) -> float:
    """ESS of the rank-normalised draws (Vehtari et al. 2021, section 4.3)."""
    return ess(rank_normalize(_check(draws)))
