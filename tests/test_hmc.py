"""The sampler against exactly known answers, each with a control that must fail."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from timm_gencnn import hmc

DIM = 6
CENTRE = torch.linspace(-1.5, 1.5, DIM, dtype=torch.float64)


def linear(z):
    """f = <a, z>: the tilted density is N(a, I) exactly."""
    return z.flatten(1) @ CENTRE.to(z.dtype)


def quartic(z):
    """A smooth score without a closed form, curved enough that leapfrog errs and the accept test has work to do."""
    return -(z.flatten(1) ** 4).sum(1) / 4


class Counted:
    def __init__(self, score):
        self.score, self.calls = score, 0

    def __call__(self, z):
        self.calls += 1
        return self.score(z)


def run(score, n, iterations, step_size=0.5, n_leapfrog=3, seed=0, shape=(DIM,), **kwargs):
    streams = hmc.Streams(seed, range(n))
    state = hmc.init(score, streams.normal(shape, torch.float64), streams, kwargs.get('temperature', 1.0))
    infos = []
    for _ in range(iterations):
        state, info = hmc.step(
            state, score, streams, torch.full((n,), step_size, dtype=torch.float64), n_leapfrog, **kwargs
        )
        infos.append(info)
    return state, infos


def exact_quartic(n, generator):
    """Exact draws of p(u) ∝ exp(-u²/2 - u⁴/4) by rejection from N(0, 1)."""
    u = torch.randn(4 * n, generator=generator, dtype=torch.float64)
    return u[torch.rand(4 * n, generator=generator, dtype=torch.float64) < torch.exp(-(u**4) / 4)][:n]


def quartic_p_value(draws):
    """Kolmogorov-Smirnov p-value of draws against the exact law of `exact_quartic`, its CDF by quadrature."""
    grid = np.linspace(-6, 6, 20_001)
    density = np.exp(-(grid**2) / 2 - grid**4 / 4)
    cdf = np.cumsum(density) / density.sum()
    return stats.kstest(draws.numpy(), lambda u: np.interp(u, grid, cdf)).pvalue


@pytest.mark.parametrize('factor', [1.0, 1.1])
@pytest.mark.parametrize('persistence', [0.0, 0.8])
def test_one_transition_keeps_exact_draws_exact(factor, persistence):
    """200,000 exact draws, one transition, Kolmogorov-Smirnov; a target 1.1 times too sharp must be found out."""
    generator = torch.Generator().manual_seed(1)
    n = 200_000
    z = exact_quartic(n, generator)[:, None]

    def score(z):  # tempers the whole density: factor * (-z²/2 - z⁴/4), of which the sampler adds -z²/2 itself
        return factor * quartic(z) - (factor - 1) * z.square().sum(1) / 2

    streams = SharedStream(7, n)
    state = hmc.init(score, z, streams)
    for _ in range(1 if factor == 1.0 else 3):  # the control gets time to drift to the wrong law
        state, info = hmc.step(state, score, streams, torch.full((n,), 0.9), 2, persistence=persistence)
    assert 0.5 < info.acceptance.mean() < 0.999  # the test has rejections to get right
    p = quartic_p_value(state.z[:, 0])
    assert p > 1e-3 if factor == 1.0 else p < 1e-3


class SharedStream(hmc.Streams):
    """One generator for all chains: fast where tens of thousands of chains need no individual streams."""

    def __init__(self, seed, n):
        super().__init__(seed, [0])
        self.n = n

    def _draw(self, fn, shape, dtype):
        return fn((self.n, *shape), generator=self.generators[0], dtype=dtype)


def test_without_the_accept_test_exact_draws_are_spoiled():
    """The power control of the accept test itself: the same transition, unadjusted, leaves a visible bias."""
    generator = torch.Generator().manual_seed(1)
    n = 50_000
    streams = SharedStream(7, n)
    state = hmc.init(quartic, exact_quartic(n, generator)[:, None], streams)
    for _ in range(2):
        state, finite = hmc.unadjusted_step(state, quartic, streams, torch.full((n,), 0.9), 1)
        assert finite.all()
    assert quartic_p_value(state.z[:, 0]) < 1e-3


def test_unadjusted_steps_keep_the_reference_exactly():
    """Without a score the rotation is exact: N(0, T I) stays what it is, and another temperature is seen."""
    n, temperature = 50_000, 0.25
    streams = SharedStream(7, n)
    zero = lambda z: z.new_zeros(len(z))  # noqa: E731
    state = hmc.init(zero, 0.5 * streams.normal((1,)), streams, temperature)
    for _ in range(3):
        state, _ = hmc.unadjusted_step(state, zero, streams, torch.full((n,), 0.9), 2, temperature, persistence=0.5)
    assert stats.kstest(state.z[:, 0].numpy(), 'norm', (0, 0.5)).pvalue > 1e-3
    assert stats.kstest(state.z[:, 0].numpy(), 'norm', (0, 0.52)).pvalue < 1e-3


@pytest.mark.parametrize('n_leapfrog', [1, 3])
def test_an_unadjusted_step_that_is_not_finite_is_refused(n_leapfrog):
    cliff = lambda z: z[:, 0].masked_fill(z[:, 0] > 0, torch.inf)  # noqa: E731
    streams = hmc.Streams(0, range(50))
    start = hmc.init(cliff, -1 - streams.normal((1,)).abs(), streams)
    end, finite = hmc.unadjusted_step(start, cliff, streams, torch.full((50,), 1.5 / n_leapfrog), n_leapfrog)
    assert 0 < finite.sum() < 50
    assert torch.equal(end.z[~finite], start.z[~finite])
    assert torch.equal(end.score[~finite], start.score[~finite])
    assert (end.z[finite] != start.z[finite]).all()
    assert end.p.isfinite().all()


@pytest.mark.parametrize(('temperature', 'tilt'), [(1.0, 1.0), (0.25, 1.0), (1.0, 2.0), (0.5, 3.0)])
def test_linear_score_has_its_exact_mean_and_covariance(temperature, tilt):
    """exp(<a, z>) N(0, I) is N(a, I); at tilt λ and temperature T it is N(λ a, T I)."""
    state, infos = run(linear, n=4000, iterations=12, temperature=temperature, tilt=tilt)
    error = math.sqrt(temperature / 4000)
    assert (state.z.mean(0) - tilt * CENTRE).abs().max() < 4.5 * error
    covariance = torch.cov(state.z.T)
    assert (covariance - temperature * torch.eye(DIM)).abs().max() < 5 * temperature * math.sqrt(2 / 4000)
    assert (state.z.mean(0) - 1.2 * tilt * CENTRE).abs().max() > 4.5 * error  # a wrong mean is seen
    assert torch.stack([i.accepted for i in infos]).double().mean() > 0.5


def test_without_a_score_every_proposal_is_accepted():
    """The rotation is exact, so at any step size, dimension and temperature nothing is rejected, in float32 too."""
    streams = hmc.Streams(0, range(4))
    zero = lambda z: z.flatten(1).sum(1) * 0  # noqa: E731
    for temperature in (1.0, 0.02):
        state = hmc.init(zero, math.sqrt(temperature) * streams.normal((3, 64, 64)), streams, temperature)
        for step_size in (0.01, 0.7, 1.5):
            state, info = hmc.step(state, zero, streams, torch.full((4,), step_size), 20, temperature)
            assert info.accepted.all()
            assert info.energy_error.abs().max() < 1e-2


@pytest.mark.parametrize('side', [512, 224])
def test_rounded_rotations_cost_no_acceptance(side):
    """They stretch by up to 3e-8, and 800,000 coordinates add it up: by as much grows the volume."""
    streams = hmc.Streams(0, range(4))
    zero = lambda z: z.flatten(1).sum(1) * 0  # noqa: E731
    sizes = torch.tensor([0.01, 0.0982, 0.1963, 0.3], dtype=torch.float64)
    state = hmc.init(zero, streams.normal((3, side, side)), streams)
    raised = hmc.hamiltonian(hmc.leapfrog(state, zero, sizes, 8)) - hmc.hamiltonian(state)
    assert raised.abs().max() > 0.12 * (side / 512) ** 2  # else the test says nothing
    torch.testing.assert_close(raised, hmc.log_volume(sizes, 8, state.z), atol=5e-3, rtol=0)
    _, info = hmc.step(state, zero, streams, sizes, 8)
    assert info.acceptance.min() > 0.995


def test_step_sizes_of_large_images_do_not_collapse():
    """A flat score, at which no step is too long, though no shorter step makes up for rounding."""
    flat = lambda z: z.flatten(1)[:, :10].sum(1)  # noqa: E731
    streams = hmc.Streams(0, range(1))
    state = hmc.init(flat, streams.normal((3, 1024, 1024)), streams)
    adapt = hmc.DualAveraging.start(torch.full((1,), 0.1))
    for _ in range(12):
        state, info = hmc.step(state, flat, streams, adapt.step_size, 8)
        adapt = adapt.update(info.acceptance, 0.8, 0.2)
    assert adapt.frozen.min() > 0.15


def test_trajectory_is_reversible_and_keeps_volume():
    streams = hmc.Streams(3, range(5))
    state = hmc.init(quartic, streams.normal((DIM,), torch.float64), streams)
    eps = torch.linspace(0.05, 0.4, 5, dtype=torch.float64)
    end = hmc.leapfrog(state, quartic, eps, 10)
    back = hmc.leapfrog(end._replace(p=-end.p), quartic, eps, 10)
    assert (back.z - state.z).abs().max() < 1e-10
    assert (back.p + state.p).abs().max() < 1e-10
    assert (end.z - state.z).abs().max() > 0.1

    def flow(zp):
        z, p = zp[None, :DIM], zp[None, DIM:]
        kick = lambda z: -(z**3)  # noqa: E731, the gradient of `quartic` in closed form
        p = p + 0.15 * kick(z)
        for i in range(4):
            c, s = math.cos(0.3), math.sin(0.3)
            z, p = c * z + s * p, c * p - s * z
            p = p + (0.3 if i < 3 else 0.15) * kick(z)
        return torch.cat([z[0], p[0]])

    zp = torch.cat([state.z[0], state.p[0]])
    got = hmc.leapfrog(hmc.State(*(v[:1] for v in state)), quartic, torch.tensor([0.3], dtype=torch.float64), 4)
    assert torch.allclose(flow(zp), torch.cat([got.z[0], got.p[0]]), atol=1e-12)
    jacobian = torch.autograd.functional.jacobian(flow, zp)
    assert abs(torch.linalg.det(jacobian).item() - 1) < 1e-10


def test_energy_error_falls_fourfold_when_the_step_halves():
    streams = hmc.Streams(5, range(64))
    state = hmc.init(quartic, streams.normal((DIM,), torch.float64), streams)
    errors = []
    for n_leapfrog in (40, 80):
        eps = torch.full((64,), 2.0 / n_leapfrog, dtype=torch.float64)
        end = hmc.leapfrog(state, quartic, eps, n_leapfrog)
        errors.append((hmc.hamiltonian(end) - hmc.hamiltonian(state)).abs().max())
    assert 3.5 < errors[0] / errors[1] < 4.5


def test_geweke_joint_distribution():
    """Alternating z | data and data | z must keep the prior of z (Geweke 2004); a wrong target must not."""

    def p_value(factor, n=100_000):
        generator = torch.Generator().manual_seed(11)
        streams = SharedStream(13, n)
        z = streams.normal((1,), torch.float64)
        for _ in range(4):
            y = z + torch.randn(z.shape, generator=generator, dtype=torch.float64)
            score = lambda z, y=y: -factor * (y - z).square().sum(1) / 2  # noqa: E731
            state = hmc.init(score, z, streams)
            for _ in range(2):
                state, _ = hmc.step(state, score, streams, torch.full((n,), 0.8), 2)
            z = state.z
        return stats.kstest(z[:, 0].numpy(), 'norm').pvalue

    assert p_value(1.0) > 1e-3
    assert p_value(1.25) < 1e-3


def test_rejected_persistent_momenta_are_flipped():
    """Many transitions with persistent momenta and many rejections: without the flip the law is spoiled."""
    generator = torch.Generator().manual_seed(2)
    n = 100_000
    streams = SharedStream(3, n)
    state = hmc.init(quartic, exact_quartic(n, generator)[:, None], streams)
    start = state
    for _ in range(8):
        state, info = hmc.step(state, quartic, streams, torch.full((n,), 1.1), 2, persistence=0.9)
    assert info.accepted.double().mean() < 0.9
    assert quartic_p_value(state.z[:, 0]) > 1e-3
    after, info = hmc.step(start, quartic, streams, torch.full((n,), 1.1), 2, persistence=1 - 1e-9)
    rejected = ~info.accepted
    assert torch.allclose(after.p[rejected], -start.p[rejected], atol=1e-3)


def test_energies_are_summed_in_float64():
    z = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    state = hmc.State(z, z, torch.zeros(1), z)
    exact = hmc.hamiltonian(hmc.State(z.double(), z.double(), torch.zeros(1), z.double()))
    assert hmc.hamiltonian(state).dtype == torch.float64
    assert abs(hmc.hamiltonian(state) - exact) < 1e-6 * exact


def test_a_cheap_kick_serves_inside_the_trajectory_only():
    """The ends and the accept test see the true score, so that the law is kept however rough the kick is."""
    true, rough = Counted(quartic), Counted(lambda z: 0.8 * quartic(z))
    streams = hmc.Streams(1, range(4))
    state = hmc.init(quartic, streams.normal((DIM,), torch.float64), streams)
    eps = torch.full((4,), 0.3, dtype=torch.float64)
    end = hmc.leapfrog(state, true, eps, 5, kick=rough)
    assert (true.calls, rough.calls) == (1, 4)
    assert torch.equal(end.score, quartic(end.z))
    back = hmc.leapfrog(end._replace(p=-end.p), true, eps, 5, kick=rough)
    assert (back.z - state.z).abs().max() < 1e-10
    assert (end.z - hmc.leapfrog(state, quartic, eps, 5).z).abs().max() > 1e-3


@pytest.mark.parametrize('n_leapfrog', [1, 3, 8])
def test_a_trajectory_costs_exactly_its_gradients(n_leapfrog):
    score = Counted(quartic)
    run(score, n=2, iterations=5, n_leapfrog=n_leapfrog)
    assert score.calls == 1 + 5 * n_leapfrog


def test_cached_score_and_gradient_belong_to_the_position():
    state, infos = run(quartic, n=50, iterations=6, step_size=1.2, n_leapfrog=2)
    accepted = torch.stack([i.accepted for i in infos])
    assert accepted.any()
    assert not accepted.all()
    f, grad = hmc.score_and_grad(quartic, state.z)
    assert torch.equal(f, state.score)
    assert torch.equal(grad, state.grad)


def test_batched_chains_equal_single_chains():
    together, _ = run(quartic, n=5, iterations=10)
    for i in range(5):
        streams = hmc.Streams(0, [i])
        state = hmc.init(quartic, streams.normal((DIM,), torch.float64), streams)
        for _ in range(10):
            state, _ = hmc.step(state, quartic, streams, torch.tensor([0.5], dtype=torch.float64), 3)
        assert torch.allclose(state.z[0], together.z[i], atol=1e-12)
    assert len({tuple(z.tolist()) for z in together.z}) == 5


def test_seed_decides_everything():
    a, b, c = (run(quartic, n=3, iterations=5, seed=s)[0].z for s in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.allclose(a, c)


def test_not_finite_and_divergent_proposals_are_rejected_and_counted():
    def cliff(z):  # NaN beyond |z| = 1
        norm = z.flatten(1).norm(dim=1)
        return torch.where(norm < 1, norm, torch.nan)

    streams = hmc.Streams(0, range(200))
    z = 0.1 * streams.normal((2,), torch.float64)
    state, info = hmc.step(hmc.init(cliff, z, streams), cliff, streams, torch.full((200,), 1.0), 3)
    assert info.diverged.any()
    assert not info.diverged.all()
    assert not (info.accepted & info.diverged).any()
    assert torch.equal(state.z[info.diverged], z[info.diverged])
    assert state.z.isfinite().all()
    assert state.score.isfinite().all()

    state, info = hmc.step(
        hmc.init(quartic, 30 + streams.normal((2,), torch.float64), streams),
        quartic,
        streams,
        torch.full((200,), 1.0),
        3,
    )
    assert info.diverged.all()  # finite, but the energy error is astronomical
    assert not info.accepted.any()


@pytest.mark.parametrize('target', [0.65, 0.9])
def test_step_size_adapts_per_chain_to_its_target(target):
    scales = torch.tensor([1.0, 100.0, 10_000.0], dtype=torch.float64)
    score = lambda z: -scales[:, None].mul(z**4).sum(1) / 4  # noqa: E731
    streams = hmc.Streams(2, range(3))
    state = hmc.init(score, 0.1 * streams.normal((50,), torch.float64), streams)
    adapt = hmc.DualAveraging.start(torch.full((3,), 0.1))
    for _ in range(1000):
        state, info = hmc.step(state, score, streams, adapt.step_size, 3)
        adapt = adapt.update(info.acceptance, target)
    frozen = adapt.frozen
    assert frozen[0] > 2 * frozen[1] > 4 * frozen[2]  # each chain has found its own
    acceptance = []
    for _ in range(600):
        state, info = hmc.step(state, score, streams, frozen, 3)
        acceptance.append(info.acceptance)
    assert (torch.stack(acceptance).mean(0) - target).abs().max() < 0.1  # dual averaging errs on the careful side
