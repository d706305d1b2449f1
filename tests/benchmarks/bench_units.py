"""How good are the pictures of hidden units? Samples drawn from one network, compared with photographs by another.

    python tests/benchmarks/bench_units.py blocks.10 --units 32
    python tests/benchmarks/bench_units.py blocks.10 --units 32 --tool lucent        # the rival; see bench_pictures.py
    python tests/benchmarks/bench_units.py features.12 --net squeezenet --units 24

Nobody can name what a hidden unit responds to, but photographs can show it: those 20 of 1,000, one of each class, that
excite it most. A picture of the unit should look like these to a network that never saw the unit. So the other network
(../shared/networks) gives the features of each picture and the mean features of the 20 photographs of each of the units
asked for, both less their means over the units, and ranks the units by the cosine between them: the share of pictures
whose own unit is first, and among the first five. The same for one photograph, the 21st, in place of the picture.
"""

import argparse
import importlib
import sys
import time

import datasets
import torch
from bench_pictures import SHARED, normalize
from torch.nn.functional import normalize as unit
from torchvision import transforms as T
from torchvision.utils import save_image

SHOWN = 20  # photographs that stand for a unit


def ours(model, layer, channels, args):
    """One call a unit, so that its pictures do not depend on which others are asked for."""
    import timm_gencnn

    draw = lambda c: timm_gencnn.visualize(model, f'{layer}:{c}', n=1, steps=args.steps, size=args.size, seed=args.seed)  # noqa: E731
    return torch.cat([draw(c).images for c in channels])


def lucent(model, layer, channels, args):
    """Its defaults: FFT parameterisation, decorrelated colours, standard transforms."""
    from lucent.optvis import objectives, param, render

    pictures = []
    for c in channels:
        torch.manual_seed(args.seed)
        out = render.render_vis(
            model, objectives.channel(layer.replace('.', '_'), c), lambda: param.image(args.size, batch=1),
            thresholds=(args.steps,), fixed_image_size=args.size, show_image=False, progress=False,
        )  # fmt: skip
        pictures.append(torch.from_numpy(out[-1]).permute(0, 3, 1, 2))
    return torch.cat(pictures)


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
    sys.path.insert(0, str(SHARED / 'networks'))
    networks = importlib.import_module('networks')
    squeezenet, mobilenet = networks.squeezenet(), networks.mobilenet_v1()
    features = {
        squeezenet: lambda x: squeezenet.features(x).mean((2, 3)),
        mobilenet: lambda x: mobilenet.blocks(mobilenet.stem(x)).mean((2, 3)),
    }
    model, other = (mobilenet, squeezenet) if args.net == 'mobilenet' else (squeezenet, mobilenet)
    seen = {}
    module = model.get_submodule(args.layer)
    module.register_forward_hook(lambda module, args, output: seen.update(means=output.mean((2, 3))))

    def activations(images):
        model(images)
        return seen['means']

    rows = datasets.load_dataset(str(SHARED / 'data/imagenet_1_per_class'), split='validation').sort('label')
    transform = T.Compose([T.Resize(round(args.size / 0.875)), T.CenterCrop(args.size), T.ToTensor()])
    photographs = torch.stack([transform(row['image'].convert('RGB')) for row in rows])
    excited = in_batches(activations, photographs)
    looks = in_batches(features[other], photographs)
    mean, spread = looks.mean(0), looks.std(0) + 1e-6
    looks = (looks - mean) / spread
    channels = [i * excited.shape[1] // args.units for i in range(args.units)]
    best = excited[:, channels].topk(SHOWN + 1, dim=0).indices.T  # [K, SHOWN + 1]

    began = time.process_time()
    pixels = (ours if args.tool == 'ours' else lucent)(model, args.layer, channels, args).float()
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
    if args.out:
        save_image(pixels, args.out, nrow=8)


if __name__ == '__main__':
    main()
