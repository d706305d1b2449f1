"""The running mean against the recursion that defines it."""

import pytest
import torch
from torch import Tensor

from timm_gencnn.running import RunningMean


def additions(n: int) -> list[tuple[Tensor, float]]:
    generator = torch.Generator().manual_seed(0)
    return [(10 * torch.randn(5, generator=generator), max(0.1, 3 / (i + 3))) for i in range(n)]


@pytest.mark.parametrize('logarithms', [False, True])
@pytest.mark.parametrize('every', [1, 2, 3, 7, 100])
def test_the_mean_is_that_of_the_recursion_whenever_it_is_read(logarithms: bool, every: int) -> None:
    running, expected = RunningMean(logarithms), None
    assert running.get() is None
    for i, (new, rate) in enumerate(additions(40)):
        value = new.double().exp() if logarithms else new.double()
        expected = value if expected is None else (1 - rate) * expected + rate * value
        running.add(new, rate)
        if i % every == 0:
            torch.testing.assert_close(running.get(), (expected.log() if logarithms else expected).float())
    torch.testing.assert_close(running.get(), (expected.log() if logarithms else expected).float())
    assert running.get() is running.get()  # nothing waits


@pytest.mark.parametrize('logarithms', [False, True])
def test_the_first_is_the_mean_whatever_its_rate(logarithms: bool) -> None:
    for n in (1, 2):
        running = RunningMean(logarithms)
        for _ in range(n):
            running.add(torch.tensor([1.0, -2.0]), 0.1)
        torch.testing.assert_close(running.get(), torch.tensor([1.0, -2.0]))


def test_it_starts_anew_from_a_given_mean_and_from_a_rate_of_one() -> None:
    running = RunningMean()
    running.add(torch.tensor([7.0]), 0.5)
    running.set(torch.tensor([1.0]))
    for value in (3.0, 4.0):
        running.add(torch.tensor([value]), 0.5)
    assert running.get().tolist() == [3.0]
    running.add(torch.tensor([9.0]), 1)
    running.add(torch.tensor([5.0]), 0.25)
    assert running.get().tolist() == [8.0]
