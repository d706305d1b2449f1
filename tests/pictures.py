"""Folders of easy pictures, to train on and to validate."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 28


def draw_bars(root: Path, counts: dict[str, Sequence[int]], noise: int, bar: int) -> Path:
    """Grey pictures root/<split>/class<c>/<i>.png, `counts[split][c]` of them: a bar at its class's place in noise."""
    rng = np.random.default_rng(0)
    for split, images in counts.items():
        for c, n in enumerate(images):
            folder = root / split / f'class{c}'
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, noise, (SIZE, SIZE), dtype=np.uint8)
                pixels[:, 4 + 8 * c : 8 + 8 * c] += bar
                Image.fromarray(pixels).save(folder / f'{i}.png')
    return root


def write_wide_image(root: Path) -> None:
    """A wide picture root/validation/0/0.png with a bright left end, which a crop cuts off and a squash keeps."""
    pixels = np.zeros((28, 84), dtype=np.uint8)
    pixels[:, :20] = 255
    folder = root / 'validation/0'
    folder.mkdir(parents=True)
    Image.fromarray(pixels).save(folder / '0.png')
