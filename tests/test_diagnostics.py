"""R-hat and ESS against chains whose answers are known."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from timm_gencnn import diagnostics


def autoregressive(phi, draws, chains, seed=0):
    """AR(1) with unit variance: its ESS is draws · chains · (1 - φ) / (1 + φ)."""
    noise = torch.randn(draws, chains, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = noise.clone()
    for t in range(1, draws):
        x[t] = phi * x[t - 1] + math.sqrt(1 - phi**2) * noise[t]
    return x


@pytest.mark.parametrize('phi', [-0.5, 0.0, 0.5, 0.9])
@pytest.mark.parametrize('ess', [diagnostics.ess, diagnostics.bulk_ess])
def test_ess_of_an_autoregressive_chain(phi, ess):
    draws, chains = 8000, 4
    expected = draws * chains * (1 - phi) / (1 + phi)
    got = ess(autoregressive(phi, draws, chains))
    # antithetic chains are capped at n log10 n, so the table stays below the cap
    assert abs(got / expected - 1) < 0.15


def test_ess_matches_the_variance_of_the_mean_it_stands_for():
    means = torch.stack([autoregressive(0.8, 400, 1, seed).mean() for seed in range(400)])
    assert 0.8 < (1 / means.var()).item() / diagnostics.ess(autoregressive(0.8, 4000, 10)) * 100 < 1.25


def test_r_hat_is_one_for_agreeing_chains():
    assert diagnostics.r_hat(autoregressive(0.3, 2000, 4)) < 1.01


@pytest.mark.parametrize('flaw', ['shift', 'scale', 'drift'])
def test_r_hat_finds_chains_that_disagree(flaw):
    x = autoregressive(0.3, 1000, 4)
    if flaw == 'shift':
        x[:, 0] += 1
    elif flaw == 'scale':  # equal means: only the folded form sees it
        x[:, 0] *= 4
    else:  # every chain drifts alike: only splitting sees it
        x += torch.linspace(-2, 2, len(x), dtype=x.dtype)[:, None]
    assert diagnostics.r_hat(x) > 1.05


def test_r_hat_by_its_formula():
    """Plain R-hat of 2 chains of 4 draws, computed by hand: W = 5/3, B/n = 2, R² = 3/4 + 6/5."""
    x = torch.tensor([[0.0, 2], [1, 3], [2, 4], [3, 5]], dtype=torch.float64)
    assert diagnostics._basic_r_hat(x).item() == pytest.approx(math.sqrt(0.75 + 1.2))


def test_r_hat_by_the_definitions_of_the_paper():
    """Equal means and unequal spreads: the folded form decides, and with it the median of an even number of draws."""
    x = np.random.default_rng(0).normal(size=(8, 3)) * [1, 1, 3]
    halves = np.concatenate([x[:4], x[4:]], axis=1)

    def r_hat(draws):
        z = stats.norm.ppf((stats.rankdata(draws).reshape(draws.shape) - 3 / 8) / (draws.size + 1 / 4))
        within, between = z.var(axis=0, ddof=1).mean(), len(z) * z.mean(axis=0).var(ddof=1)
        return math.sqrt(((len(z) - 1) * within + between) / len(z) / within)

    bulk, folded = r_hat(halves), r_hat(abs(halves - np.median(halves)))
    assert folded > bulk
    assert diagnostics.r_hat(torch.from_numpy(x)) == pytest.approx(folded, rel=1e-9)


def test_rank_normalize_matches_scipy_with_ties():
    x = torch.tensor([[3.0, 1.0], [1.0, 2.0], [7.0, 3.0], [3.0, -1.0]])
    ranks = stats.rankdata(x.flatten().numpy(), 'average').reshape(4, 2)
    expected = stats.norm.ppf((ranks - 3 / 8) / (8 + 1 / 4))
    assert torch.allclose(diagnostics.rank_normalize(x), torch.from_numpy(expected))


def test_heavy_tails_do_not_break_rank_forms():
    cauchy = torch.distributions.StudentT(torch.tensor(0.4))
    torch.manual_seed(0)
    x = cauchy.sample((2000, 4)).double()
    assert diagnostics.r_hat(x) < 1.02
    assert diagnostics.bulk_ess(x) > 6000


@pytest.mark.parametrize('shape', [(3, 2), (10,), (2, 2, 2)])
def test_bad_shapes_are_refused(shape):
    with pytest.raises(ValueError, match='draws must be'):
        diagnostics.r_hat(torch.zeros(shape))


def test_constant_chains_give_nan():
    assert math.isnan(diagnostics.ess(torch.ones(10, 2)))
    assert math.isnan(diagnostics.r_hat(torch.ones(10, 2)))
    stuck = torch.tensor([0.1, 0.3, 0.7]).repeat(10, 1)  # each at a place of its own
    assert math.isnan(diagnostics.r_hat(stuck))
    stuck[5:, 0] += torch.linspace(0, 0.1, 5)
    assert diagnostics.r_hat(stuck) > 2
