"""log Z of a network's node against the case that is known exactly."""

import pytest
import torch
from torch import nn

import timm_gencnn
from timm_gencnn import blocks, hmc
from timm_gencnn.reference import White


class Linear(nn.Module):
    """Scores f_y(x) = <a_y, x> + b_y, whose log Z under N(0, σ² I) is σ² |a_y|² / 2 + b_y."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.head = nn.Linear(16, 3)
        with torch.no_grad():
            self.head.weight.copy_(0.4 * torch.randn(3, 16, generator=generator))
            self.head.bias.copy_(torch.tensor([0.5, -2.0, 7.0]))

    def forward(self, x):
        return self.head(x.flatten(1))


def exact(net, y, sigma):
    return (sigma**2 * net.head.weight[y].square().sum() / 2 + net.head.bias[y]).item()


def log_z(net, node, sigma=1.0, **kwargs):
    return timm_gencnn.log_z(net, node, reference=White((1, 4, 4), sigma), size=4, progress=False, **kwargs)


@pytest.mark.parametrize('sigma', [0.5, 1.5])
@pytest.mark.parametrize('y', [0, 1, 2])
def test_linear_network(y, sigma):
    net = Linear().eval()
    got = log_z(net, y, sigma, n=128, seed=y)
    assert abs(got.log_z - exact(net, y, sigma)) < 3 * got.standard_error
    assert got.standard_error < 0.1
    wrong = exact(net, (y + 1) % 3, sigma)
    assert abs(got.log_z - wrong) > 10 * got.standard_error  # power: another class's log Z would be seen


def test_chunks_give_the_same_estimate(monkeypatch):
    net = Linear().eval()
    whole = log_z(net, 0, n=10, levels=10)
    monkeypatch.setattr(blocks, 'PIXELS_PER_BATCH', 3 * 16)
    parts = log_z(net, 0, n=10, levels=10)
    assert len(parts.log_weights) == 10
    torch.testing.assert_close(parts.log_weights, whole.log_weights)
    assert parts.log_z == pytest.approx(whole.log_z, rel=1e-6)


def test_out_of_memory_halves_the_batch_and_goes_on(monkeypatch):
    net = Linear().eval()
    whole = log_z(net, 0, n=10, levels=10)
    room, score_and_grad = 3, hmc.score_and_grad

    def hungry(score, z):
        if len(z) > room:
            raise torch.OutOfMemoryError('out of memory')
        return score_and_grad(score, z)

    monkeypatch.setattr(hmc, 'score_and_grad', hungry)
    with pytest.warns(UserWarning, match='out of memory: starting again with 2 images') as caught:
        parts = timm_gencnn.log_z(net, 0, n=10, levels=10, reference=White((1, 4, 4)), progress=False)
    assert [w.filename for w in caught] == [__file__] * 2
    torch.testing.assert_close(parts.log_weights, whole.log_weights)
    room = 0
    with (
        pytest.warns(UserWarning, match='with 1 images'),
        pytest.raises(ValueError, match='out of memory with one 4 x 4 image at a time'),
    ):
        log_z(net, 0, n=10, levels=10)


def test_other_errors_are_not_taken_for_memory(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError('a bug')

    monkeypatch.setattr(hmc, 'score_and_grad', broken)
    with pytest.raises(RuntimeError, match='a bug'):
        log_z(Linear().eval(), 0, n=4, levels=5)


def test_parameters_keep_their_gradients_and_a_seed_repeats():
    net = Linear().eval()
    first, second = (log_z(net, 0, n=4, levels=5, seed=3) for _ in range(2))
    assert first.log_z == second.log_z != log_z(net, 0, n=4, levels=5, seed=4).log_z
    assert all(p.requires_grad for p in net.parameters())


def test_a_reference_of_ones_own_has_the_size():
    net = Linear().eval()
    small = timm_gencnn.log_z(net, 0, n=4, levels=5, reference=White((1, 4, 4)), progress=False)
    assert small.log_z == log_z(net, 0, n=4, levels=5).log_z


@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode])
def test_the_same_where_gradients_are_off(mode):
    net = Linear().eval()
    expected = log_z(net, 0, n=4, levels=5)
    with mode():
        assert log_z(net, 0, n=4, levels=5).log_z == expected.log_z


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        ({'n': 1}, 'at least 2'),
        ({'levels': 1}, 'levels must be an integer >= 2'),
        ({'seed': -1}, 'seed must be'),
        ({'node': [0, 1]}, 'one node'),
        ({'node': 3}, '3'),
        ({'model': 7}, 'name or a torch module'),
        ({'model': Linear()}, 'eval'),
    ],
)
def test_bad_input(kwargs, message):
    arguments = {'model': Linear().eval(), 'node': 0, 'reference': White((1, 4, 4)), 'size': 4} | kwargs
    with pytest.raises(ValueError, match=message):
        timm_gencnn.log_z(progress=False, **arguments)
