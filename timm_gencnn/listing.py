"""What is in the zoo. `gencnn list`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from . import zoo
from .node_lists import table
from .registry import PREFIX


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of the zoo.

    Attributes:
        name: What `timm.create_model(name, pretrained=True)` takes.
        dataset: The data set it was trained on and measured with.
        error: Test error in percent, or None where it was not measured.
        location: The file it is loaded from.
    """

    name: str
    dataset: str
    error: float | None
    location: str


def list_pretrained() -> list[Checkpoint]:
    """List our own checkpoints: name, data set, test error and where they live. All of them load offline."""
    checkpoints = []
    for name in zoo.names():
        results = zoo.read(name).get('results', {})
        location = str(zoo.FOLDER / f'{name}.safetensors')
        dataset = results.get('dataset', '')
        checkpoints.append(Checkpoint(PREFIX + name, dataset, results.get('test_error'), location))
    return checkpoints


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `gencnn list`: there are none."""


def main(args: argparse.Namespace) -> None:
    """Print the checkpoints as a table."""
    rows = [('name', 'data set', 'error', 'location')]
    for c in list_pretrained():
        rows.append((c.name, c.dataset, '' if c.error is None else f'{c.error:.2f} %', c.location))
    print(table(rows))
