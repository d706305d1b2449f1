"""The two regimes in which chains are run.

`sample_exact` draws from the tilted density itself: adjusted HMC, step sizes adapted during the first half of the
budget and frozen for the second, whose draws the diagnostics describe. `sample_gallery` makes pictures: the same
dynamics, cooled from the reference to a low temperature, with persistent momenta and no accept test. This module sees
a score function of latents and knows nothing of networks or pixels.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import hmc

Report = Callable[[int, hmc.State, Tensor | None], None]
"""Called after each transition with the gradients spent so far, the chains, and their acceptance [n] or None."""


class Trace(NamedTuple):
    """What a run leaves behind.

    Attributes:
        z: Final latents [n, ...]; in the gallery regime the mean of the last ones (see `Schedule.average`).
        scores: Score of every kept draw [draws, n]; in the gallery regime of every transition, and of the random
            view at its end.
        acceptance: Mean Metropolis acceptance probability of the kept transitions [n]; NaN in the gallery regime, which
            has no accept test.
        step_size: Step size at the end [n], radians.
        tilt: Factor on the score at the end [n].
        energy_error: Mean |dH| of the kept transitions [n]; NaN in the gallery regime.
        divergences: Divergent or non-finite proposals per chain [n].
        gradients: Image gradients per chain, without those of restarts.
    """

    z: Tensor
    scores: Tensor
    acceptance: Tensor
    step_size: Tensor
    tilt: Tensor
    energy_error: Tensor
    divergences: Tensor
    gradients: int


class StartError(ValueError):
    """Some chains, by their position in the batch, cannot start."""

    def __init__(self, message: str, chains: list[int]):
        super().__init__(message)
        self.chains = chains


def start(
    score: hmc.Score, shape: tuple[int, ...], streams: hmc.Streams, tries: int = 5, origin: bool = False
) -> hmc.State:
    """Draws starting latents from the reference, z ~ N(0, I), anew where the gradient is zero.

    Where the gradient vanishes the density is the reference itself, and the chain would show plain noise.

    Args:
        score: f, latents [n, *shape] to scores [n].
        shape: Shape of one latent.
        streams: Random streams of the chains.
        tries: Further draws before giving up.
        origin: Start at z = 0 instead, and draw only where the gradient vanishes there.

    Returns:
        The chains. Each took one gradient, which counts in the budget of what follows; those of restarts come on top,
        since a budget that they shortened would let a dead chain change its neighbours.

    Raises:
        StartError: The score is not finite, or some chain found no gradient.
    """
    z = streams.normal(shape)
    p = streams.normal(shape)
    if origin:
        z.zero_()
    for attempt in range(tries + 1):
        state = hmc.State(z, p, *hmc.score_and_grad(score, z))
        bad = ~(state.score.isfinite() & state.grad.flatten(1).isfinite().all(1))
        if bad.any():
            raise StartError(
                'the score or its gradient is not finite on the starting images: check the weights for NaN',
                bad.nonzero()[:, 0].tolist(),
            )
        dead = state.grad.flatten(1).abs().amax(1) == 0
        if not dead.any():
            return state
        if attempt == 0:
            warnings.warn(
                f'the gradient is zero on {int(dead.sum())} of {len(dead)} starting images (a dead unit): '
                'restarting them elsewhere in the reference',
                stacklevel=2,
            )
        own = streams.split(1)
        for i in dead.nonzero()[:, 0].tolist():  # only their own streams move on
            z[i] = own[i].normal(shape)[0]
    raise StartError(
        f'the gradient of the score stayed zero on {int(dead.sum())} of {len(dead)} images after {tries} restarts: '
        'the unit is dead on the reference, or has no weights at all. Name the layer before what cuts it off (a ReLU), '
        "or try another reference ('white', 'natural')",
        dead.nonzero()[:, 0].tolist(),
    )


def sample_exact(
    score: hmc.Score,
    state: hmc.State,
    streams: hmc.Streams,
    steps: int,
    n_leapfrog: int = 8,
    target: float = 0.8,
    kick: hmc.Score | None = None,
    report: Report | None = None,
    step_size: float | None = None,
) -> Trace:
    """Draws from p(z) ∝ exp(f(z) - |z|²/2) by adjusted HMC.

    Trajectories span at most about a quarter period of the reference's oscillator, at which draws from the reference
    alone are independent. Each takes its step size times a factor of U(0.5, 1.5), whatever the state: without that,
    directions in which the density is 4, 16, ... times narrower than the reference would resonate (Neal 2011, section
    5.4.2).

    Trajectories of 8 gradients are a compromise. Single trials, effective draws of the score for 2, 4, 8, 16 of them at
    equal budgets, 8 chains: 3430, 1980, 1090, 490 for a unit that hardly pulls (conv2:17 of lenet.vis_mnist);
    680, 870, 870, 450 and 920, 980, 920, 580 for class 3 of two LeNets (dg_mnist, vis_mnist); 320, 280, 300, 430 for
    class 5 of resnet10_w16. Targets of 0.65 and 0.8 differed by less than a sixth.

    Args:
        score: f, latents [n, ...] to scores [n].
        state: The chains at their start (see `start`).
        streams: Random streams of the chains.
        steps: Budget of gradients per chain: one for the start, then whole trajectories.
        n_leapfrog: Gradients per trajectory.
        target: Acceptance that the warm-up adapts to, in (0, 1).
        kick: A cheaper score for the kicks inside a trajectory (see `hmc.leapfrog`).
        report: Progress callback.
        step_size: A step size in radians to keep from the first transition on, without adaptation and without random
            factor; the first half is discarded all the same.

    Raises:
        ValueError: The budget holds no warm-up and four draws.
    """
    iterations = (steps - 1) // n_leapfrog
    warmup = iterations // 2
    if warmup < 4:
        raise ValueError(
            f'steps={steps} is too small for exact sampling: the start, 4 warm-up and 4 kept trajectories of '
            f'{n_leapfrog} gradients need steps >= {1 + 8 * n_leapfrog}'
        )
    longest = math.pi / 2 / n_leapfrog
    adapt = hmc.DualAveraging.start(torch.full_like(state.score, longest / 2, dtype=torch.float64))
    size = adapt.step_size if step_size is None else torch.full_like(adapt.step_size, step_size)
    kept: list[tuple[Tensor, hmc.Info]] = []
    for i in range(iterations):
        jitter = 0.5 + streams.uniform(dtype=torch.float64) if step_size is None else 1.0
        state, info = hmc.step(state, score, streams, size * jitter, n_leapfrog, kick=kick)
        if i < warmup and step_size is None:
            adapt = adapt.update(info.acceptance, target, longest)
            size = adapt.frozen if i == warmup - 1 else adapt.step_size
        if i >= warmup:
            kept.append((state.score, info))
        if report:
            report(1 + (i + 1) * n_leapfrog, state, info.acceptance)
    scores, infos = zip(*kept, strict=True)
    return Trace(
        state.z,
        torch.stack(scores),
        torch.stack([info.acceptance for info in infos]).mean(0),
        size,
        torch.ones_like(size),
        torch.stack([info.energy_error.abs() for info in infos]).mean(0),
        torch.stack([info.diverged for info in infos]).sum(0),
        1 + iterations * n_leapfrog,
    )


STRENGTH = 1.0
MOVE = 0.03
HOT = 0.1  # the highest final temperature at which states are averaged


class Schedule(NamedTuple):
    """Shape of a gallery run.

    Most of it was compared by the log-probability of the judge of tests/benchmarks/bench_pictures.py on twelve classes
    that it does not use, 512 gradients, 336 chains of 96 px each under random settings: a persistence of 0.85 cost 1.6,
    8 gradients from one refreshment to the next 1.5; `start`, `anneal` and the temperature made no clear difference.
    At 128 px the mean of the last 64 latents gained 0.5 over the last one, that of the last 96 lost 1.

    Attributes:
        n_leapfrog: Gradients from one refreshment of the momentum to the next.
        persistence: Share of the momentum that a refreshment keeps.
        anneal: Share of the budget over which the tilt rises and the temperature falls from 1, both geometrically, to
            their final values.
        start: Tilt at the start relative to the final one.
        ramp_up: Share of the budget over which moves grow linearly at the start.
        ramp_down: Share of the budget over which they shrink at the end.
        average: Share of the budget at its end whose states are averaged into the picture, which takes the heat that
            is left and the jitter of the views out of it. Above T = 0.1 the picture is the last state: there the heat
            is asked for, and the mean would be grey.
    """

    n_leapfrog: int = 4
    persistence: float = 0.65
    anneal: float = 0.6
    start: float = 0.1
    ramp_up: float = 0.1
    ramp_down: float = 0.3
    average: float = 0.125

    def tilt(self, done: float) -> float:
        """Tilt relative to its final value when the share `done` in [0, 1] of the budget is spent."""
        return self.start ** max(0.0, 1 - done / self.anneal)

    def temperature(self, done: float, final: float) -> float:
        """Temperature on the way from the reference's own, 1, to the final one."""
        return final ** min(1.0, done / self.anneal)

    def pace(self, done: float) -> float:
        """Relative size of the moves in (0, 1]."""
        return min(1.0, (done + 1e-2) / self.ramp_up, (1 - done) / self.ramp_down)


def sample_gallery(
    score: hmc.Score,
    state: hmc.State,
    streams: hmc.Streams,
    steps: int,
    temperature: float,
    tilt: float | None = None,
    strength: float | Tensor = STRENGTH,
    move: float | Tensor = MOVE,
    schedule: Schedule = Schedule(),  # noqa: B008, an immutable tuple
    report: Report | None = None,
) -> Trace:
    """Runs Hamiltonian dynamics with partial momentum refreshment and no accept step: pictures, not samples at T = 1.

    The chains start as images of the reference (T = 1) and cool down while the tilt rises. The picture is the mean of
    their last states.

    The step size follows from the gradient: eps² = move / (tilt · RMS(grad f)), so that a kick moves latents by about
    `move` whatever the scale of the score.

    Args:
        score: f, latents [n, ...] to scores [n]; it may look at them in another random way at each call, so that the
            dynamics climbs its mean.
        state: The chains at their start (see `start`).
        streams: Random streams of the chains.
        steps: Budget of gradients per chain.
        temperature: T > 0.
        tilt: Final factor on the score, > 0; None takes each chain's automatic one, strength / RMS(grad f): the
            scale-free choice, since z = tilt · grad f where the density peaks.
        strength: Size of the latents that the score asks for, per coordinate and relative to the reference's own; one
            number or one per chain [n].
        move: Scale of a kick along the score's gradient, in latent units; likewise.
        schedule: Shape of the run.
        report: Progress callback.

    Raises:
        ValueError: The budget is below 8 gradients.
    """
    if steps < 8:
        raise ValueError(f'steps={steps} is too small for a picture: give at least 8, better 512')
    rms = _rms(state.grad)
    scores = []
    total, count = torch.zeros_like(state.z), 0
    average = schedule.average if temperature <= HOT else 0.0
    refused = torch.zeros(len(rms), dtype=torch.long, device=rms.device)
    for first in range(1, steps, schedule.n_leapfrog):
        n_leapfrog = min(schedule.n_leapfrog, steps - first)
        done = first / steps
        final = strength / rms if tilt is None else torch.full_like(rms, tilt)
        now = final * schedule.tilt(done)
        eps = (move * schedule.pace(done) / (now * rms)).sqrt().clamp(max=0.5)
        heat = schedule.temperature(done, temperature)
        state, finite = hmc.unadjusted_step(state, score, streams, eps, n_leapfrog, heat, now, schedule.persistence)
        rms = 0.9 * rms + 0.1 * _rms(state.grad)
        scores.append(state.score)
        refused += ~finite
        if first + n_leapfrog >= steps * (1 - average):
            total, count = total + state.z, count + 1
        if report:
            report(first + n_leapfrog, state, None)
    none = torch.full_like(rms, math.nan)
    return Trace(total / count, torch.stack(scores), none, eps, now, none, refused, steps)


def _rms(grad: Tensor) -> Tensor:
    """Root mean square of each chain's gradient [n], float64, kept away from zero."""
    grad = grad.flatten(1)
    rms = grad.square().mean(1).sqrt().double()
    slow = torch.linalg.vector_norm(grad, dim=1, dtype=torch.float64) / math.sqrt(grad.shape[1])
    in_range = (rms > 1e-12) & rms.isfinite()  # else the squares leave float32's
    return torch.where(in_range, rms, slow).clamp(min=1e-30)
