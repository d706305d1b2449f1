"""Annealed importance sampling against log Z known exactly."""

import math

import pytest
import torch

from timm_gencnn import ais, hmc
from timm_gencnn.reference import White

A = torch.linspace(-1.2, 1.2, 16).view(1, 4, 4)


def linear(z):
    """Under N(0, σ² I): log Z = σ² |a|² / 2."""
    return (A * z).sum((1, 2, 3))


def quadratic(z):
    """Under N(0, I): Z = E exp(-b |z|²/2) = (1 + b)^(-D/2), with b = 3."""
    return -1.5 * z.square().sum((1, 2, 3))


@pytest.mark.parametrize('sigma', [0.5, 1.0, 1.5])
def test_linear_score_under_the_white_reference(sigma):
    reference = White((1, 4, 4), sigma)
    got = ais.log_z(lambda z: linear(reference(z)), (1, 4, 4), hmc.Streams(0, range(128)))
    exact = sigma**2 * A.square().sum().item() / 2
    assert abs(got.log_z - exact) < 3 * got.standard_error
    assert got.standard_error < 0.15
    assert abs(got.log_z - 1.2 * exact) > 3 * got.standard_error or sigma < 1  # power: 20 % off would be seen
    assert got.acceptance > 0.8


def test_quadratic_score():
    got = ais.log_z(quadratic, (1, 4, 4), hmc.Streams(1, range(64)), levels=200)
    assert abs(got.log_z - -8 * math.log(4)) < 3 * got.standard_error
    assert got.standard_error < 0.2


def test_standard_error_is_the_spread_of_repeated_estimates():
    runs = [ais.log_z(linear, (1, 4, 4), hmc.Streams(seed, range(32)), levels=40) for seed in range(40)]
    spread = torch.tensor([r.log_z for r in runs]).std().item()
    stated = sum(r.standard_error for r in runs) / len(runs)
    assert 0.6 < spread / stated < 1.6


def test_chains_that_do_not_move_give_plain_importance_sampling_and_an_honest_error():
    """Control: without moves the weights are exp f of reference draws; far off, and the ESS says so."""
    big = lambda z: 2.5 * linear(z)  # noqa: E731
    still = ais.log_z(big, (1, 4, 4), hmc.Streams(0, range(64)), step_size=1e-6)
    moved = ais.log_z(big, (1, 4, 4), hmc.Streams(0, range(64)), levels=300)
    exact = 2.5**2 * A.square().sum().item() / 2
    assert abs(moved.log_z - exact) < 3 * moved.standard_error
    assert still.log_z < exact - 10
    assert still.ess < moved.ess / 3


def test_mean_weight_is_z_at_any_number_of_levels():
    """E[w] = Z exactly, with three crude levels too; a weight taken at the wrong side of a move would be biased."""
    small = lambda z: 0.5 * linear(z)  # noqa: E731
    got = ais.log_z(small, (1, 4, 4), hmc.Streams(0, range(3000)), levels=3, n_leapfrog=2)
    assert abs(got.log_z - 0.25 * A.square().sum().item() / 2) < 3 * got.standard_error
    assert got.standard_error < 0.04


def test_cost_is_counted():
    calls = 0

    def score(z):
        nonlocal calls
        calls += 1
        return linear(z)

    assert ais.log_z(score, (1, 4, 4), hmc.Streams(0, range(2)), levels=10, n_leapfrog=3).gradients == calls == 28


@pytest.mark.parametrize(('chains', 'levels'), [(1, 10), (4, 1)])
def test_too_few_chains_or_levels(chains, levels):
    with pytest.raises(ValueError, match='at least 2'):
        ais.log_z(linear, (1, 4, 4), hmc.Streams(0, range(chains)), levels=levels)


def test_a_score_that_is_not_finite():
    with pytest.raises(ValueError, match='not finite'):
        ais.log_z(lambda z: linear(z) * torch.nan, (1, 4, 4), hmc.Streams(0, range(2)))
