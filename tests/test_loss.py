"""GenerativeLoss against brute force, exactly known expectations, and its own invariances."""

import math
import re

import pytest
import torch
from torch import nn

from timm_gencnn.loss import GenerativeLoss, ess, log_mean_exp

N, C = 12, 5


@pytest.fixture
def logits() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(N, C, generator=generator, dtype=torch.float64)


@pytest.fixture
def target() -> torch.Tensor:
    return torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 1])  # classes 3 and 4 are absent


def brute_force_gradient(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """d loss / d f_c(x_j) of the paper's estimator: sum_i [E_W(grad f_{y_i}) - grad f_{y_i}(x_i)] / n, in loops."""
    n = len(logits)
    gradient = torch.zeros_like(logits)
    for i in range(n):
        y = int(target[i])
        weights = [math.exp(float(logits[j, y])) for j in range(n)]
        total = sum(weights)
        for j in range(n):
            gradient[j, y] += weights[j] / total / n
        gradient[i, y] -= 1 / n
    return gradient


def test_gradient_is_that_of_the_importance_sampling_estimator(logits, target):
    logits.requires_grad_()
    GenerativeLoss()(logits, target).backward()
    torch.testing.assert_close(logits.grad, brute_force_gradient(logits.detach(), target), rtol=0, atol=1e-12)
    assert torch.equal(logits.grad[:, 3:], torch.zeros(N, 2))  # absent classes contribute nothing


def test_value_is_softmax_over_images_minus_log_n(logits, target):
    expected = nn.functional.nll_loss(logits.log_softmax(0), target) - math.log(N)
    torch.testing.assert_close(GenerativeLoss()(logits, target), expected)


@pytest.mark.parametrize('soft', [False, True])
def test_invariant_to_a_shift_of_each_column(logits, target, soft):
    goal = torch.rand(N, C, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) if soft else target
    shift = torch.tensor([0.0, 100.0, -100.0, 3.0, 1.0])
    torch.testing.assert_close(GenerativeLoss()(logits + shift, goal), GenerativeLoss()(logits, goal))
    rows = torch.linspace(0, 3, N)[:, None]  # a shift of a row changes it: the softmax runs over images
    assert not torch.isclose(GenerativeLoss()(logits + rows, goal), GenerativeLoss()(logits, goal))


def test_soft_targets_are_linear_in_the_target(logits, target):
    other = target.roll(1)
    mixed = 0.3 * nn.functional.one_hot(target, C) + 0.7 * nn.functional.one_hot(other, C)
    loss = GenerativeLoss()
    torch.testing.assert_close(loss(logits, mixed.double()), 0.3 * loss(logits, target) + 0.7 * loss(logits, other))


def test_reductions(logits, target):
    each = GenerativeLoss('none')(logits, target)
    assert each.shape == (N,)
    torch.testing.assert_close(each.mean(), GenerativeLoss('mean')(logits, target))
    torch.testing.assert_close(each.sum(), GenerativeLoss('sum')(logits, target))


def test_log_density_ratio_is_capped_at_log_n(target):
    logits = torch.zeros(N, C, dtype=torch.float64)
    logits[3, target[3]] = 1e4  # one image takes the whole class
    each = GenerativeLoss('none')(logits, target)
    assert each.min() >= -math.log(N) - 1e-6
    assert each[3] == pytest.approx(-math.log(N), abs=1e-5)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_softmax_in_float32_inside_autocast(logits, target, dtype):
    low = logits.to(dtype)
    with torch.autocast('cpu', torch.bfloat16):
        loss = GenerativeLoss()(low, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), GenerativeLoss()(low.double(), target), rtol=0, atol=1e-6)


def test_ess_lies_between_one_and_n(logits):
    torch.testing.assert_close(ess(torch.zeros(N, C)), torch.full((C,), float(N)))
    spike = torch.zeros(N, 1)
    spike[4] = 1e3
    torch.testing.assert_close(ess(spike), torch.ones(1))
    torch.testing.assert_close(ess(logits), 1 / logits.softmax(0).square().sum(0))


def linear_model(n: int, batches: int, classes: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean loss and its gradient for scores f_y(x) = <a_y, x> of images x ~ q = N(0, I), class 1 where x_0 > 0."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.tensor([[-0.6, 0.3], [0.4, 0.5]], dtype=torch.float64, requires_grad=True)
    losses, gradients = [], []
    for _ in range(batches):
        x = torch.randn(n, 2, dtype=torch.float64, generator=generator)
        logits, target = x @ a.T, (x[:, 0] > 0).long()
        loss = GenerativeLoss()(logits, target) if classes == 'images' else nn.functional.cross_entropy(logits, target)
        losses.append(loss.detach())
        gradients.append(torch.autograd.grad(loss, a)[0])
    return torch.stack(losses), torch.stack(gradients)


def test_monte_carlo_on_a_model_whose_log_z_is_known():
    """p_y = N(a_y, I) and log Z_y = |a_y|^2 / 2, so that loss and gradient have closed forms."""
    a = torch.tensor([[-0.6, 0.3], [0.4, 0.5]], dtype=torch.float64)
    half_normal = math.sqrt(2 / math.pi)
    images = torch.tensor([[-half_normal, 0], [half_normal, 0]], dtype=torch.float64)  # E[x | class]
    exact_loss = 0.5 * (a.square().sum(1) / 2 - (a * images).sum(1)).sum()
    exact_gradient = 0.5 * (a - images)  # rho_y (E_{p_y}[x] - E[x | class y])

    def deviations(losses, gradients):
        """Distance from the exact values in standard errors."""
        root = math.sqrt(len(losses))
        loss = (losses.mean() - exact_loss).abs() / (losses.std() / root)
        gradient = ((gradients.mean(0) - exact_gradient).abs() / (gradients.std(0) / root)).max()
        return loss.item(), gradient.item()

    good = deviations(*linear_model(n=4096, batches=200, classes='images'))
    assert max(good) < 4.5
    wrong = deviations(*linear_model(n=4096, batches=200, classes='classes'))  # the discriminative loss must fail
    assert min(wrong) > 50


def test_log_mean_exp_estimates_log_z():
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(log_mean_exp(0.8 * x[:, None]).item(), 0.32, rtol=0, atol=0.01)


# The image pool


def test_pool_enters_the_softmax_only(logits, target):
    pool = logits[8:].clone()
    each = GenerativeLoss('none')(logits[:8], target[:8], pool=pool)
    together = GenerativeLoss('none')(logits, target)[:8]
    torch.testing.assert_close(each, together)


def test_gradient_flows_into_the_pool(logits, target):
    """Unlabeled images take their share of E_p[grad f]; the weights of each class's images sum to one over both."""
    batch, pool = logits[:8].clone().requires_grad_(), logits[8:].clone().requires_grad_()
    GenerativeLoss()(batch, target[:8], pool=pool).backward()
    counts = torch.bincount(target[:8], minlength=C).double()
    hot = nn.functional.one_hot(target[:8], C)
    torch.testing.assert_close(pool.grad, counts * logits.softmax(0)[8:] / 8)
    torch.testing.assert_close(batch.grad, (counts * logits.softmax(0)[:8] - hot) / 8)
    torch.testing.assert_close(batch.grad.sum(0) + pool.grad.sum(0), torch.zeros(C, dtype=torch.float64))


def test_detached_pool_shrinks_the_expected_gradient(logits, target):
    """The numerator keeps its gradient; of E_p[grad f] only the batch's share of the weights is left."""
    batch, queue = logits[:8].clone().requires_grad_(), logits[8:]
    GenerativeLoss()(batch, target[:8], pool=queue).backward()
    weights = logits.softmax(0)[:8]
    counts = torch.bincount(target[:8], minlength=C).double()
    hot = nn.functional.one_hot(target[:8], C)
    torch.testing.assert_close(batch.grad, (counts * weights - hot) / 8)


def test_running_log_z_gives_unnormalised_weights(logits, target):
    log_z = torch.linspace(-1, 1, C, dtype=torch.float64)
    x = logits.clone().requires_grad_()
    loss = GenerativeLoss()(x, target, log_z=log_z)
    torch.testing.assert_close(loss, (log_z[target] - logits.gather(1, target[:, None])[:, 0]).mean())
    loss.backward()
    weights = (logits - log_z).exp() / N
    counts = torch.bincount(target, minlength=C).double()
    torch.testing.assert_close(x.grad, (counts * weights - nn.functional.one_hot(target, C)) / N)


def test_running_log_z_is_unbiased_where_it_is_exact():
    """With small batches the self-normalised gradient is biased; with the exact log Z it is not.

    Each column is a batch of 4 images of its own, with a model f(x) = a x of its own.
    """
    x = torch.randn(4, 20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a = torch.full((20_000,), 1.5, dtype=torch.float64, requires_grad=True)

    def error(log_z):
        loss = GenerativeLoss()(a * x, torch.ones_like(x), log_z=log_z)  # every image belongs to every class
        gradient = torch.autograd.grad(loss, a)[0] - 1.5  # exact: E_p[x] - E_q[x] = a
        return gradient.mean() / (gradient.std() / 20_000**0.5)

    assert error(a.detach() ** 2 / 2).abs() < 4.5
    assert error(None) < -50  # an expectation over 4 images falls short


# Errors


@pytest.mark.parametrize(
    ('logits', 'target', 'message'),
    [
        (torch.zeros(1, 3), torch.tensor([0]), 'a batch of 1 image has no image pool'),
        (torch.zeros(2, 3), torch.tensor([0, 3]), 'target 3 is outside [0, 3)'),
        (torch.zeros(2, 3), torch.tensor([0, -1]), 'target -1 is outside [0, 3)'),
        (torch.zeros(2, 3), torch.tensor([0]), 'must be [2], not [1]'),
        (torch.zeros(2, 3), torch.zeros(2, 4), 'must be [2, 3], not [2, 4]'),
        (torch.zeros(2), torch.tensor([0, 1]), 'logits must be [n, C], not [2]'),
        (torch.tensor([[0.0], [math.nan]]), torch.tensor([0, 0]), 'logits contain NaN or infinity'),
        (torch.tensor([[0.0], [math.inf]]), torch.tensor([0, 0]), 'logits contain NaN or infinity'),
    ],
)
def test_bad_input(logits, target, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        GenerativeLoss()(logits, target)


def test_bad_pool_and_reduction():
    with pytest.raises(ValueError, match=re.escape('pool must be [m, 3]')):
        GenerativeLoss()(torch.zeros(2, 3), torch.tensor([0, 1]), pool=torch.zeros(4, 2))
    with pytest.raises(ValueError, match="reduction 'avg' is not one of mean, sum, none"):
        GenerativeLoss('avg')
