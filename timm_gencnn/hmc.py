"""Hamiltonian Monte Carlo on a tilted Gaussian, for many independent chains at once.

The target over latents z, with a score f, is

    p(z) ∝ exp(-U(z)),      U(z) = (|z|² / 2 - tilt · f(z)) / T

The momentum has the law N(0, T I), so that H(z, p) = (|z|² / 2 + |p|² / 2 - tilt · f(z)) / T splits into a harmonic
oscillator, solved exactly by a rotation of (z, p), and kicks by the gradient of f alone (split Hamiltonian Monte
Carlo: Shahbaba et al. 2014; Neal 2011, section 5.5.1). With f = 0 every proposal is exact and accepted.

The functions here are pure: a `State` goes in, a new `State` comes out. This module sees a score function of latents
and knows nothing of networks, images or references.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy
from typing import NamedTuple

import torch
from torch import Tensor

Score = Callable[[Tensor], Tensor]
"""A differentiable function of latents [n, ...] to scores [n], row by row."""

DIVERGENCE = 1000.0  # an energy error this large means the integrator left the level set (the convention of Stan)


class State(NamedTuple):
    """Where the chains are.

    Attributes:
        z: Latents [n, ...].
        p: Momenta [n, ...], law N(0, T I).
        score: f(z) [n]: the cache that makes a trajectory of L steps cost L gradients.
        grad: Gradient of f at z [n, ...].
    """

    z: Tensor
    p: Tensor
    score: Tensor
    grad: Tensor


class Info(NamedTuple):
    """What a transition did.

    Attributes:
        acceptance: Metropolis acceptance probability [n] in [0, 1].
        accepted: Whether the proposal was taken [n], bool.
        diverged: Whether the proposal was not finite or its energy error exceeded `DIVERGENCE` [n], bool.
        energy_error: H(proposal) - H(start) - `log_volume` [n], float64: what the accept test goes by.
    """

    acceptance: Tensor
    accepted: Tensor
    diverged: Tensor
    energy_error: Tensor


class Streams:
    """One random stream per chain, so that a chain's path does not depend on which others share its batch.

    Args:
        seed: Seed of the run, a non-negative integer.
        chains: Index of each chain; chain i draws the same numbers in every batch that holds it.
        device: Device of the generators.
    """

    def __init__(self, seed: int, chains: Sequence[int], device: torch.device | str = 'cpu'):
        self.generators = [torch.Generator(device).manual_seed(mix_seed(seed, chain)) for chain in chains]
        self.device = torch.device(device)

    def __len__(self) -> int:
        return len(self.generators)

    def split(self, size: int) -> list[Streams]:
        """The same streams, at most `size` to a piece: what a piece draws is drawn here."""
        pieces = []
        for first in range(0, len(self), size):
            piece = copy(self)
            piece.generators = self.generators[first : first + size]
            pieces.append(piece)
        return pieces

    def normal(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normals [n, *shape]."""
        return self._draw(torch.randn, shape, dtype)

    def uniform(self, shape: Sequence[int] = (), dtype: torch.dtype = torch.float32) -> Tensor:
        """Uniforms on [0, 1) [n, *shape]."""
        return self._draw(torch.rand, shape, dtype)

    def _draw(self, fn: Callable[..., Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.stack([fn(tuple(shape), generator=g, device=self.device, dtype=dtype) for g in self.generators])


def mix_seed(seed: int, chain: int) -> int:
    """A 63-bit seed for a chain of a run; the multipliers are splitmix64's (Steele et al. 2014).

    torch's generator on the CPU reads its lowest 32 bits: of 100,000 chains one pair, on average, draws the same.
    """
    mask = (1 << 64) - 1
    x = (seed * 0x9E3779B97F4A7C15 + chain + 1) & mask
    for shift, multiplier in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = ((x ^ (x >> shift)) * multiplier) & mask
    return (x ^ (x >> 31)) >> 1


def score_and_grad(score: Score, z: Tensor) -> tuple[Tensor, Tensor]:
    """f(z) [n] and its gradient [n, ...]; chains are independent, so one backward pass serves them all."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        f = score(z)
        if not f.requires_grad:  # a constant score, e.g. the reference itself
            return f.detach(), torch.zeros_like(z)
        (grad,) = torch.autograd.grad(f.sum(), z, allow_unused=True, materialize_grads=True)
    return f.detach(), grad


def init(score: Score, z: Tensor, streams: Streams, temperature: float = 1.0) -> State:
    """Starts chains at z [n, ...] with fresh momenta; costs one gradient."""
    f, grad = score_and_grad(score, z)
    return State(z.detach(), math.sqrt(temperature) * streams.normal(z.shape[1:], z.dtype), f, grad)


def refresh(state: State, streams: Streams, temperature: float = 1.0, persistence: float = 0.0) -> State:
    """Draws the momentum anew, keeping the share `persistence` in [0, 1) of the old one (Horowitz 1991)."""
    noise = streams.normal(state.z.shape[1:], state.z.dtype)
    scale = math.sqrt(temperature * (1 - persistence**2))
    return state._replace(p=noise.mul_(scale).add_(state.p, alpha=persistence))


def leapfrog(
    state: State,
    score: Score,
    step_size: Tensor,
    n_leapfrog: int,
    tilt: float | Tensor = 1.0,
    kick: Score | None = None,
) -> State:
    """Integrates `n_leapfrog` steps: half kick, then rotations by the angle `step_size` with full kicks between.

    Costs exactly `n_leapfrog` gradients. Reversible and, up to rounding (see `log_volume`), volume preserving for any
    `step_size` [n] and also for any `kick`, a cheaper score (bfloat16, say) whose gradient serves the kicks inside the
    trajectory: those at its two ends, and the score that the accept test sees, are always those of `score`.
    """
    shape = (-1,) + (1,) * (state.z.ndim - 1)
    strength = (step_size * tilt).to(state.z.dtype).view(shape)
    cos, sin = (v.view(shape) for v in rotation(step_size, state.z.dtype))
    z, f, grad = state.z, state.score, state.grad
    p = torch.addcmul(state.p, strength, grad, value=0.5)
    for i in range(n_leapfrog):
        z, p = torch.addcmul(cos * z, sin, p), torch.addcmul(cos * p, sin, z, value=-1)
        last = i == n_leapfrog - 1
        f, grad = score_and_grad(score if last else kick or score, z)
        p = torch.addcmul(p, strength, grad, value=0.5 if last else 1.0)
    return State(z, p, f, grad)


def rotation(step_size: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of an angle [n], as they turn latents of that dtype."""
    return step_size.cos().to(dtype), step_size.sin().to(dtype)


def log_volume(step_size: Tensor, n_leapfrog: int, z: Tensor) -> Tensor:
    """log |det| of a trajectory's map of (z, p) [n], float64: 0 but for rounding.

    A rotation by a rounded cosine and sine stretches as well, in float32 by up to 3e-8, and the energy changes by as
    much as the volume, alike wherever the trajectory starts: by up to 0.4 in eight rotations of 3x512x512 coordinates.
    """
    cos, sin = (v.double() for v in rotation(step_size, z.dtype))
    return n_leapfrog * z[0].numel() * (cos.square() + sin.square()).log()


def hamiltonian(state: State, temperature: float = 1.0, tilt: float | Tensor = 1.0) -> Tensor:
    """H(z, p) [n] in float64: at 3x224x224 the quadratic terms are about 150,000, beyond float32's resolution."""
    z2, p2 = (torch.linalg.vector_norm(v.flatten(1), dim=1, dtype=torch.float64).square() for v in (state.z, state.p))
    return ((z2 + p2) / 2 - tilt * state.score.double()) / temperature


def step(
    state: State,
    score: Score,
    streams: Streams,
    step_size: Tensor,
    n_leapfrog: int,
    temperature: float = 1.0,
    tilt: float | Tensor = 1.0,
    persistence: float = 0.0,
    kick: Score | None = None,
) -> tuple[State, Info]:
    """One transition: refresh the momentum, integrate, accept or reject.

    Leaves p(z) exactly invariant; the momentum is flipped on rejection, so this also holds for persistent momenta
    (generalised HMC, Horowitz 1991).

    Args:
        state: The chains.
        score: f, latents [n, ...] to scores [n].
        streams: Random streams, one per chain.
        step_size: Rotation angle per chain [n], in radians; pi/2 turns a whole quarter period.
        n_leapfrog: Gradients per trajectory, at least 1.
        temperature: T > 0.
        tilt: Factor on the score, one for all chains or one each [n].
        persistence: Share of the momentum kept, in [0, 1).
        kick: A cheaper score for the kicks inside the trajectory (see `leapfrog`).

    Returns:
        The new state and what happened.
    """
    start = refresh(state, streams, temperature, persistence)
    end = leapfrog(start, score, step_size, n_leapfrog, tilt, kick)
    error = hamiltonian(end, temperature, tilt) - hamiltonian(start, temperature, tilt)
    error -= log_volume(step_size, n_leapfrog, state.z)
    finite = error.isfinite()
    acceptance = torch.where(finite, torch.exp(-error.clamp(min=0)), 0.0)
    diverged = ~(finite & (error < DIVERGENCE))
    accepted = (streams.uniform(dtype=torch.float64) < acceptance) & ~diverged
    return _choose(accepted, end, start._replace(p=-start.p)), Info(acceptance, accepted, diverged, error)


def unadjusted_step(
    state: State,
    score: Score,
    streams: Streams,
    step_size: Tensor,
    n_leapfrog: int,
    temperature: float = 1.0,
    tilt: float | Tensor = 1.0,
    persistence: float = 0.0,
) -> tuple[State, Tensor]:
    """The transition of `step` without its accept test; underdamped Langevin dynamics at `n_leapfrog=1`.

    The discretisation error is left in. A trajectory that is not finite is refused, and the momentum flipped.

    Returns:
        The new state and whether the trajectory was finite [n], bool.
    """
    start = refresh(state, streams, temperature, persistence)
    end = leapfrog(start, score, step_size, n_leapfrog, tilt)
    finite = end.score.isfinite() & torch.linalg.vector_norm(end.p.flatten(1), dim=1, dtype=torch.float64).isfinite()
    return _choose(finite, end, start._replace(p=-start.p)), finite


def _choose(accepted: Tensor, end: State, start: State) -> State:
    return State(
        *(torch.where(accepted.view((-1,) + (1,) * (a.ndim - 1)), a, b) for a, b in zip(end, start, strict=True))
    )


class DualAveraging(NamedTuple):
    """Step size adaptation per chain by Nesterov's dual averaging (Hoffman and Gelman 2014, section 3.2).

    Attributes:
        log_step: Log step size to use next [n].
        log_average: Averaged log step size [n], the one to freeze after warm-up.
        deficit: Running mean of target - acceptance [n].
        anchor: Log step size that the iterates shrink towards [n].
        updates: Updates so far.
    """

    log_step: Tensor
    log_average: Tensor
    deficit: Tensor
    anchor: Tensor
    updates: int

    @classmethod
    def start(cls, step_size: Tensor) -> DualAveraging:
        """Starts at `step_size` [n], radians."""
        log_step = step_size.double().log()
        return cls(log_step, log_step, torch.zeros_like(log_step), log_step + math.log(2.0), 0)

    def update(self, acceptance: Tensor, target: float, longest: float = math.pi / 2) -> DualAveraging:
        """Moves each chain's step size towards acceptance `target` in (0, 1), given its last acceptance [n].

        No step size goes beyond `longest`, in radians.
        """
        gamma, t0, kappa = 0.05, 10.0, 0.75  # Hoffman and Gelman's constants
        count = self.updates + 1
        deficit = self.deficit + (target - acceptance - self.deficit) / (count + t0)
        log_step = (self.anchor - math.sqrt(count) / gamma * deficit).clamp(max=math.log(longest))
        weight = count**-kappa
        return DualAveraging(log_step, weight * log_step + (1 - weight) * self.log_average, deficit, self.anchor, count)

    @property
    def step_size(self) -> Tensor:
        """Step size to use next while warming up [n]."""
        return self.log_step.exp()

    @property
    def frozen(self) -> Tensor:
        """Step size to keep after warm-up [n]."""
        return self.log_average.exp()
