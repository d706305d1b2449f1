"""Running means of what a training step estimates."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class RunningMean:
    """Mean of tensors with exponential forgetting, m <- (1 - rate) m + rate new.

    What is added waits in a list until the mean is asked for: a step on a fast device takes as long as the host needs
    to issue its operations, and this way an addition is none.

    Args:
        logarithms: What is added, and the mean, are logarithms of what is averaged.
    """

    def __init__(self, logarithms: bool = False) -> None:
        self.logarithms = logarithms
        self._mean: Tensor | None = None
        self._waiting: list[tuple[float, Tensor]] = []

    def add(self, new: Tensor, rate: float) -> None:
        """Move the mean towards `new`, which must not be changed afterwards, by a rate in (0, 1]; the first is it."""
        if rate == 1:
            self.set(None)
        self._waiting.append((rate, new))

    def set(self, mean: Tensor | None) -> None:
        """Start anew from a mean, or from none."""
        self._mean, self._waiting = mean, []

    def get(self) -> Tensor | None:
        """The mean; None before the first addition."""
        if len(self._waiting) == 1:  # without numbers from the host, for which a step would wait
            rate, new = self._waiting.pop()
            self._mean = new if self._mean is None else self._between(self._mean, new, rate)
        elif self._waiting:
            left, terms = 1.0, []
            for i, (rate, new) in reversed(list(enumerate(self._waiting))):
                first = i == 0 and self._mean is None
                terms.append((left if first else left * rate, new))
                left *= 1 - rate
            if self._mean is not None:
                terms.append((left, self._mean))
            self.set(self._sum(terms))
        return self._mean

    def _between(self, old: Tensor, new: Tensor, rate: float) -> Tensor:
        if self.logarithms:
            return torch.logaddexp(old + math.log1p(-rate), new + math.log(rate))
        return torch.lerp(old, new, rate)

    def _sum(self, terms: list[tuple[float, Tensor]]) -> Tensor:
        weights, values = zip(*terms, strict=True)
        rows = torch.stack(values)
        by_row = torch.tensor(weights, dtype=rows.dtype, device=rows.device).view(-1, *[1] * (rows.ndim - 1))
        return (rows + by_row.log()).logsumexp(0) if self.logarithms else (by_row * rows).sum(0)
