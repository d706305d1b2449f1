"""What photographs give for the table of the `natural` reference (timm_gencnn/reference.py).

    python tests/benchmarks/natural_table.py FOLDER  # photographs, column `image`, for `datasets.load_dataset`

Prints mean and standard deviation of the pixels; the correlation of the colours of logit(pixel), half a grey level away
from 0 and 1; and the exponent a of its amplitude spectrum 1 / frequency^a, fitted to the root mean square
amplitude of rings that are equally wide on a logarithmic scale, from one cycle an image to 16 and to 64, the finest.
"""

import argparse
import math
from itertools import pairwise

import datasets
import torch
from torch import Tensor
from torchvision.transforms.v2.functional import center_crop, pil_to_tensor, resize

SIDE = 128
RINGS = 12


def exponent(latents: Tensor, highest: int) -> float:
    """Slope of log amplitude over log frequency, from 1 to `highest` cycles an image, of latents [n, C, SIDE, SIDE]."""
    centred = latents - latents.mean((2, 3), keepdim=True)
    power = torch.fft.fft2(centred).abs().square().mean((0, 1))
    cycles = SIDE * torch.fft.fftfreq(SIDE)
    radius = torch.hypot(cycles[:, None], cycles)
    edges = torch.logspace(0, math.log10(highest), RINGS + 1)
    rings = [(radius >= low) & (radius < high) for low, high in pairwise(edges)]
    points = torch.tensor([[radius[r].log().mean(), power[r].mean().log() / 2] for r in rings if r.any()])
    x, y = (points - points.mean(0)).T
    return -((x * y).sum() / x.square().sum()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder')
    parser.add_argument('--split', default='validation')
    args = parser.parse_args()
    photographs = datasets.load_dataset(args.folder, split=args.split)['image']
    small = (center_crop(resize(image.convert('RGB'), [SIDE]), [SIDE, SIDE]) for image in photographs)
    pixels = torch.stack([pil_to_tensor(image) for image in small]) / 255
    latents = pixels.clamp(0.5 / 255, 1 - 0.5 / 255).logit()
    colours = latents.transpose(0, 1).flatten(1)
    torch.set_printoptions(precision=3)
    print(f'{len(pixels)} photographs at {SIDE} x {SIDE}')
    print('mean', pixels.mean((0, 2, 3)), 'standard deviation', pixels.transpose(0, 1).flatten(1).std(1))
    print('correlation', torch.corrcoef(colours))
    print('exponent', ', '.join(f'{exponent(latents, high):.2f} (to {high})' for high in (16, 64)))


if __name__ == '__main__':
    main()
