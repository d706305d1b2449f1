"""The two regimes: the exact one against known laws, the gallery one for its bookkeeping."""

import math
import warnings

import pytest
import torch
from scipy import stats

from timm_gencnn import chains, diagnostics, hmc

SHAPE = (1, 6, 6)
A = torch.linspace(-1, 1, 36, dtype=torch.float32).view(SHAPE)


def linear(z):
    return (A * z).sum((1, 2, 3))


def begin(score, n, seed=0):
    streams = hmc.Streams(seed, range(n))
    return chains.start(score, SHAPE, streams), streams


def test_exact_chains_have_the_mean_and_spread_of_the_linear_case():
    """exp(<a, z>) N(0, I) = N(a, I), so f ~ N(|a|², |a|²)."""
    state, streams = begin(linear, 200)
    trace = chains.sample_exact(linear, state, streams, steps=800)
    norm2 = A.square().sum().item()
    draws = trace.scores.double()
    error = math.sqrt(norm2 / diagnostics.ess(draws))
    assert abs(draws.mean().item() - norm2) < 4 * error
    assert abs(draws.var().item() / norm2 - 1) < 0.1
    assert stats.kstest(trace.scores[-1].numpy(), 'norm', (norm2, math.sqrt(norm2))).pvalue > 1e-3
    assert stats.kstest(trace.scores[-1].numpy(), 'norm', (0.0, math.sqrt(norm2))).pvalue < 1e-3  # the reference's law
    assert diagnostics.r_hat(draws) < 1.01


@pytest.mark.parametrize('c', [3, 30])
def test_narrow_directions_do_not_resonate(c):
    """N(0, I / (1 + c)): a quarter period of the reference is half a period of it at c = 3."""
    score = lambda z: -c * z.square().sum((1, 2, 3)) / 2  # noqa: E731
    state, streams = begin(score, 40)
    trace = chains.sample_exact(score, state, streams, steps=800)
    assert diagnostics.r_hat(trace.scores) < 1.2
    exact = -c * 36 / (1 + c) / 2
    assert trace.scores.mean().item() == pytest.approx(exact, rel=0.05)


def test_restarts_leave_the_other_chains_alone():
    """A chain draws the same numbers whichever others are dead beside it."""
    score = lambda z: torch.relu(z[:, 0, 0, 0] - 0.3)  # noqa: E731, dead on six of ten starts
    with pytest.warns(UserWarning, match='dead unit'):
        together = chains.start(score, SHAPE, hmc.Streams(0, range(8)), tries=60)
    restarted = 0
    for i in range(8):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            alone = chains.start(score, SHAPE, hmc.Streams(0, [i]), tries=60)
        restarted += bool(caught)
        assert torch.equal(alone.z[0], together.z[i])
        assert torch.equal(alone.p[0], together.p[i])
    assert 0 < restarted < 8


@pytest.mark.parametrize('done', [0.0, 0.3, 0.6, 1.0])
def test_schedule_anneals_tilt_and_temperature_together(done):
    schedule = chains.Schedule(start=0.01, anneal=0.6)
    share = min(1.0, done / 0.6)
    assert schedule.tilt(done) == pytest.approx(0.01 ** (1 - share))
    assert schedule.temperature(done, 1e-4) == pytest.approx(1e-4**share)
    assert 0 <= schedule.pace(done) <= 1
    assert schedule.pace(0.5) == 1 > schedule.pace(0.99) > 0


def test_gallery_passes_its_schedule_to_the_kernel():
    seen = []
    original = hmc.unadjusted_step

    def spy(state, score, streams, step_size, n_leapfrog, temperature, tilt, persistence):
        seen.append((n_leapfrog, temperature, tilt[0].item(), persistence))
        return original(state, score, streams, step_size, n_leapfrog, temperature, tilt, persistence)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hmc, 'unadjusted_step', spy)
        state, streams = begin(linear, 2)
        trace = chains.sample_gallery(linear, state, streams, 50, temperature=0.01, tilt=7.0)
    lengths, temperatures, tilts, persistence = zip(*seen, strict=True)
    assert lengths == (4,) * 12 + (1,)  # and the gradient of the start
    assert temperatures[0] > 0.8
    assert temperatures[-1] == pytest.approx(0.01)
    assert tilts[0] < 1
    assert tilts[-1] == trace.tilt[0].item() == 7.0
    assert set(persistence) == {0.65}


def test_gallery_says_the_tilt_that_its_last_transition_had():
    """With nine gradients the schedule does not come to its end."""
    state, streams = begin(linear, 2)
    trace = chains.sample_gallery(linear, state, streams, 9, temperature=0.01, tilt=7.0)
    assert trace.tilt.tolist() == pytest.approx([7 * chains.Schedule().tilt(5 / 9)] * 2)
    assert trace.tilt[0] < 7


def test_divergences_are_summed_over_the_kept_draws():
    cliff = lambda z: torch.where(linear(z) < 3, linear(z), torch.nan)  # noqa: E731
    streams = hmc.Streams(0, range(4))
    z = 0.1 * streams.normal(SHAPE)
    trace = chains.sample_exact(cliff, hmc.init(cliff, z, streams), streams, steps=400)
    assert trace.divergences.sum() > 10
    assert trace.scores.isfinite().all()


@pytest.mark.parametrize('steps', [65, 100, 257])
def test_exact_regime_keeps_to_its_budget(steps):
    calls = 0

    def score(z):
        nonlocal calls
        calls += 1
        return linear(z)

    state, streams = begin(score, 3)
    trace = chains.sample_exact(score, state, streams, steps)
    assert calls == trace.gradients <= steps
    assert trace.gradients > steps - 8


def test_step_size_is_frozen_after_warm_up():
    """The adapted step sizes of the kept half are one and the same, and differ between chains."""
    curved = lambda z: -(z**4).sum((1, 2, 3)) * 20  # noqa: E731
    seen = []
    original = hmc.step

    def spy(state, score, streams, step_size, *args, **kwargs):
        seen.append(step_size.clone())
        return original(state, score, streams, step_size, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hmc, 'step', spy)
        half = lambda self, shape=(), dtype=None: torch.full((len(self), *shape), 0.5, dtype=dtype)  # noqa: E731
        patch.setattr(hmc.Streams, 'uniform', half)  # no jitter
        state, streams = begin(curved, 4)
        chains.sample_exact(curved, state, streams, steps=401)
    warmup, kept = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert all(torch.equal(s, kept[0]) for s in kept)
    assert len({tuple(s.tolist()) for s in warmup}) > 10
    assert len(set(kept[0].tolist())) == 4


@pytest.mark.parametrize('steps', [8, 50])
def test_gallery_spends_exactly_its_budget_and_raises_the_score(steps):
    calls = 0

    def score(z):
        nonlocal calls
        calls += 1
        return linear(z)

    state, streams = begin(score, 3)
    start = state.score
    trace = chains.sample_gallery(score, state, streams, steps, temperature=0.02)
    assert calls == trace.gradients == steps
    assert trace.scores.shape == (math.ceil((steps - 1) / 4), 3)
    assert (linear(trace.z) > start).all()


@pytest.mark.parametrize(('steps', 'averaged'), [(8, 1), (50, 3), (129, 5)])
def test_gallery_averages_the_states_of_its_last_eighth(steps, averaged):
    states = []
    state, streams = begin(linear, 3)
    keep = lambda gradients, state, acceptance: states.append(state.z)  # noqa: E731
    trace = chains.sample_gallery(linear, state, streams, steps, temperature=0.02, report=keep)
    torch.testing.assert_close(trace.z, torch.stack(states[-averaged:]).mean(0))
    state, streams = begin(linear, 3)
    trace = chains.sample_gallery(linear, state, streams, steps, temperature=0.2, report=keep)
    assert torch.equal(trace.z, states[-1])  # hot: the heat is asked for


def test_gallery_does_not_depend_on_the_scale_of_the_score():
    """Class logits and hidden units differ by orders of magnitude; the pictures must not."""
    ends = []
    for factor in (1.0, 1024.0):  # a power of two, so that float arithmetic is the same
        score = lambda z, c=factor: c * linear(z)  # noqa: E731
        state, streams = begin(score, 2)
        ends.append(chains.sample_gallery(score, state, streams, 60, temperature=0.02).z)
    assert torch.allclose(*ends, atol=1e-4)


@pytest.mark.parametrize('exponent', [-90, -60, 80])
def test_gallery_takes_scores_whose_squares_no_float32_holds(exponent):
    ends = []
    for factor in (1.0, 2.0**exponent):
        score = lambda z, c=factor: c * linear(z)  # noqa: E731
        state, streams = begin(score, 2)
        trace = chains.sample_gallery(score, state, streams, 60, temperature=0.02)
        assert not trace.divergences.any()
        ends.append(trace.z)
    assert (linear(ends[0]) > 10).all()
    assert torch.allclose(*ends, atol=1e-4)


def test_strength_and_move_may_differ_from_chain_to_chain():
    def run(strength, move):
        state, streams = begin(linear, 2)
        return chains.sample_gallery(linear, state, streams, 60, temperature=0.02, strength=strength, move=move)

    mixed = run(torch.tensor([1.0, 0.5]).double(), torch.tensor([0.03, 0.012]).double())
    for i, other in enumerate((run(1.0, 0.03), run(0.5, 0.012))):
        torch.testing.assert_close(mixed.z[i], other.z[i], atol=1e-5, rtol=0)
        assert not torch.allclose(mixed.z[1 - i], other.z[1 - i], atol=1e-2)
        torch.testing.assert_close(mixed.tilt[i], other.tilt[i])


def test_gallery_chains_do_not_depend_on_their_batch():
    state, streams = begin(linear, 3)
    together = chains.sample_gallery(linear, state, streams, 40, temperature=0.02).z
    streams = hmc.Streams(0, [2])
    state = chains.start(linear, SHAPE, streams)
    alone = chains.sample_gallery(linear, state, streams, 40, temperature=0.02).z
    assert torch.allclose(together[2:], alone, atol=1e-5)
    assert not torch.allclose(together[:1], alone, atol=1e-2)


def test_dead_start_warns_and_moves_on():
    """A unit that is off on most images but on elsewhere in the reference: only the restart finds it."""
    score = lambda z: torch.relu(z[:, 0, 0, 0].abs() - 1.2)  # noqa: E731
    streams = hmc.Streams(0, range(8))
    with pytest.warns(UserWarning, match='dead unit'):
        state = chains.start(score, SHAPE, streams, tries=60)
    assert (state.grad.flatten(1).abs().amax(1) > 0).all()


@pytest.mark.parametrize(
    ('sampler', 'kwargs'), [(chains.sample_gallery, {'temperature': 0.02}), (chains.sample_exact, {})]
)
def test_a_dead_neighbour_changes_nothing(sampler, kwargs):
    """Restarts of other chains neither shorten a chain's run nor move its random numbers."""
    score = lambda z: torch.relu(z[:, 0, 0, 0].abs() - 1.2)  # noqa: E731

    def run(ids):
        streams = hmc.Streams(0, ids)
        return sampler(score, chains.start(score, SHAPE, streams, tries=60), streams, 100, **kwargs)

    with pytest.warns(UserWarning, match='dead unit'):
        together = run(range(8))
    alive = [i for i in range(8) if hmc.Streams(0, [i]).normal(SHAPE)[0, 0, 0, 0].abs() > 1.2]
    assert 0 < len(alive) < 8
    for i in alive:
        alone = run([i])
        torch.testing.assert_close(alone.z[0], together.z[i])
        torch.testing.assert_close(alone.scores[:, 0], together.scores[:, i])


def test_a_unit_dead_everywhere_is_refused():
    score = lambda z: torch.relu(z.sum((1, 2, 3)) - 1e4)  # noqa: E731
    with pytest.warns(UserWarning, match='dead unit'), pytest.raises(ValueError, match='dead on the reference'):
        begin(score, 2)


def test_a_score_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match='not finite'):
        begin(lambda z: linear(z) * torch.nan, 2)


@pytest.mark.parametrize(
    ('sampler', 'steps', 'kwargs'),
    [(chains.sample_exact, 40, {}), (chains.sample_gallery, 7, {'temperature': 0.01})],
)
def test_a_budget_that_is_too_small_is_refused(sampler, steps, kwargs):
    state, streams = begin(linear, 2)
    with pytest.raises(ValueError, match=f'steps={steps} is too small'):
        sampler(linear, state, streams, steps, **kwargs)
