"""How good are the pictures of hidden units? Samples drawn from one network, compared with photographs by another.

    python tests/benchmarks/bench_units.py blocks.10 --units 32
    python tests/benchmarks/bench_units.py blocks.10 --units 32 --tool lucent        # the rival; see bench_pictures.py
    python tests/benchmarks/bench_units.py features.12 --net squeezenet --units 24

Nobody can name what a hidden unit responds to, but photographs can show it: those 20 of 1,000, one of each class, that
excite it most. A picture of the unit should look like these to a network that never saw the unit. So the other network
(../shared/networks) gives the features of each picture and the mean features of the 20 photographs of each of the units
asked for, both less their means over the units, and ranks the units by the cosine between them: the share of pictures
whose own unit is first, and among the first five. The same for one photograph, the 21st, in place of the picture.
Also the share of all units of the layer whose activation is zero all over six images of the reference: dead behind it.
"""

import argparse
import time

import torch
from bench_pictures import MEAN, STD, lucent, networks, normalize, ours, photographs
from torch.nn.functional import normalize as unit
from torchvision.utils import save_image

from timm_gencnn.reference import Natural

SHOWN = 20  # photographs that stand for a unit


@torch.no_grad()
def in_batches(function, images):
    return torch.cat([function(normalize(batch)) for batch in images.split(50)])


def ranks(features, shown):
    """How many other units' photographs each unit's features [K, F] are nearer to than to its own [K, F]."""
    a, b = (unit(x - x.mean(0), dim=1) for x in (features, shown))
    cosines = a @ b.T
    return (cosines > cosines.diagonal()[:, None]).sum(1), cosines.diagonal().mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('layer')
    parser.add_argument('--net', choices=['mobilenet', 'squeezenet'], default='mobilenet')
    parser.add_argument('--tool', choices=['ours', 'lucent'], default='ours')
    parser.add_argument('--units', type=int, default=32, help='every C/N-th channel of the layer')
    parser.add_argument('--steps', type=int, default=512)
    parser.add_argument('--size', type=int, default=160)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--out', help='PNG of all pictures')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.n = 1
    features = networks()
    squeezenet, mobilenet = features
    model, other = (mobilenet, squeezenet) if args.net == 'mobilenet' else (squeezenet, mobilenet)
    seen = {}
    module = model.get_submodule(args.layer)
    module.register_forward_hook(lambda module, args, output: seen.update(means=output.mean((2, 3))))

    def activations(images):
        model(images)
        return seen['means']

    real = photographs(args.size)
    excited = in_batches(activations, real)
    looks = in_batches(features[other], real)
    mean, spread = looks.mean(0), looks.std(0) + 1e-6
    looks = (looks - mean) / spread
    channels = [i * excited.shape[1] // args.units for i in range(args.units)]
    best = excited[:, channels].topk(SHOWN + 1, dim=0).indices.T  # [K, SHOWN + 1]

    began = time.process_time()
    if args.tool == 'ours':
        pixels = ours(model, [f'{args.layer}:{c}' for c in channels], args)
    else:
        pixels = lucent(model, args.layer.replace('.', '_'), channels, args)
    seconds = (time.process_time() - began) / len(pixels)
    pictures = (in_batches(features[other], pixels) - mean) / spread
    strength = in_batches(activations, pixels)[range(args.units), channels] / excited[:, channels].amax(0)
    shown = looks[best[:, :SHOWN]].mean(1)
    for name, each in (args.tool, pictures), ('the 21st photograph', looks[best[:, SHOWN]]):
        rank, cosine = ranks(each, shown)
        told = f'first {(rank == 0).float().mean():.2f}, among five {(rank < 5).float().mean():.2f}'
        print(f'{name}: {told} of {args.units}, mean rank {1 + rank.float().mean():.1f}, cosine {cosine:.2f}')
    saturated = ((pixels < 2 / 255) | (pixels > 253 / 255)).float().mean()
    print(
        f'{args.net} {args.layer}, {args.steps} gradients, {args.size} px: activation {strength.median():.1f} x '
        f'the most of 1000 photographs, saturated {100 * saturated:.1f} %, {seconds:.0f} CPU s a picture'
    )
    z = torch.randn(6, 3, args.size, args.size, generator=torch.Generator().manual_seed(args.seed))
    noise = Natural(z.shape[1:], MEAN, STD).pixels(z)
    dead = (in_batches(activations, noise) == 0).all(0).float().mean()
    print(f'{100 * dead:.0f} % of {len(excited[0])} units are dead on six images of the reference')
    if args.out:
        save_image(pixels, args.out, nrow=8)


if __name__ == '__main__':
    main()
