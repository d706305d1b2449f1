"""How good are the pictures? Samples drawn from one network, judged by another that never saw it.

    python tests/benchmarks/bench_pictures.py --classes 40 --n 2 --steps 512 --size 160
    python tests/benchmarks/bench_pictures.py --tool lucent       # the rival; pip install torch-lucent
    python tests/benchmarks/bench_pictures.py --swap              # from MobileNet, judged by SqueezeNet
    python tests/benchmarks/bench_pictures.py --contrast 1 0.6 0.4  # the same pictures, faded too

Draws class pictures from SqueezeNet and asks MobileNet (../shared/networks): top-1, top-5, median rank of the asked
class among 1000; the score as a multiple of that of the one real image of the class, and the share of the list's real
images, one of each class, that score less; the share of saturated pixels; the variety, the feature distance between
pictures of a class relative to that between real images of all classes; and CPU seconds a picture.
"""

import argparse
import importlib
import sys
import time
from pathlib import Path

import datasets
import torch
from torchvision import transforms as T
from torchvision.utils import save_image

SHARED = Path(__file__).parents[3] / 'shared'
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
CLASSES = [
    1, 9, 22, 39, 71, 76, 84, 99, 107, 130, 145, 207, 250, 281, 291, 292, 301, 323, 340, 387,
    402, 417, 444, 483, 530, 562, 609, 671, 701, 755, 779, 817, 852, 937, 948, 963, 970, 979, 985, 988,
]  # fmt: skip


def normalize(pixels):
    return T.functional.normalize(pixels, MEAN, STD)


def photographs(size):
    """The real images of ImageNet, one of each class [1000, 3, size, size]."""
    rows = datasets.load_dataset(str(SHARED / 'data/imagenet_1_per_class'), split='validation').sort('label')
    transform = T.Compose([T.Resize(round(size / 0.875)), T.CenterCrop(size), T.ToTensor()])
    return torch.stack([transform(row['image'].convert('RGB')) for row in rows])


def networks():
    """SqueezeNet and MobileNet, and the features that each gives of normalised images [n, F]."""
    sys.path.insert(0, str(SHARED / 'networks'))
    module = importlib.import_module('networks')
    squeezenet, mobilenet = module.squeezenet(), module.mobilenet_v1()
    return {
        squeezenet: lambda x: squeezenet.features(x).mean((2, 3)),
        mobilenet: lambda x: mobilenet.blocks(mobilenet.stem(x)).mean((2, 3)),
    }


def ours(model, nodes, args):
    """One call a node, so that its pictures do not depend on which others are asked for."""
    import timm_gencnn

    draw = lambda node: timm_gencnn.visualize(model, node, n=args.n, steps=args.steps, size=args.size, seed=args.seed)  # noqa: E731
    return torch.cat([draw(node).images for node in nodes])


def faded(pixels, contrast):
    """Pictures at a share of their contrast about their mean colour."""
    mean = pixels.mean((2, 3), keepdim=True)
    return mean + contrast * (pixels - mean)


def lucent(model, layer, channels, args):
    """Its defaults: FFT parameterisation, decorrelated colours, standard transforms."""
    from lucent.optvis import objectives, param, render

    pictures = []
    for c in channels:
        torch.manual_seed(args.seed)
        image = lambda: param.image(args.size, batch=args.n)  # noqa: E731
        out = render.render_vis(
            model, objectives.channel(layer, c), image, thresholds=(args.steps,), fixed_image_size=args.size,
            show_image=False, progress=False,
        )  # fmt: skip
        pictures.append(torch.from_numpy(out[-1]).permute(0, 3, 1, 2))
    return torch.cat(pictures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--tool', choices=['ours', 'lucent'], default='ours')
    parser.add_argument(
        '--classes', type=int, default=40, choices=[1, 2, 4, 5, 8, 10, 20, 40], help='every 40/N-th of the list'
    )
    parser.add_argument('--n', type=int, default=2)
    parser.add_argument('--steps', type=int, default=512)
    parser.add_argument('--size', type=int, default=160)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--swap', action='store_true', help='draw from MobileNet, and ask SqueezeNet')
    parser.add_argument(
        '--contrast', type=float, nargs='+', default=[1.0], help='a line for each (default: %(default)s)'
    )
    parser.add_argument('--out', help='PNG of all pictures')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    features = networks()
    model, judge = features
    scores = {  # of a picture for each class: SqueezeNet's before its ReLU
        model: lambda x: model.classifier[1](model.features(normalize(x))).mean((2, 3)),
        judge: lambda x: judge(normalize(x)),
    }
    drawn, asked = (judge, model) if args.swap else (model, judge)
    chosen = list(range(0, 40, 40 // args.classes))[: args.classes]
    classes = [CLASSES[i] for i in chosen]

    began = time.process_time()
    layer = 'head' if args.swap else 'classifier_1'  # SqueezeNet's before its ReLU
    pixels = ours(drawn, classes, args) if args.tool == 'ours' else lucent(drawn, layer, classes, args)
    seconds = (time.process_time() - began) / len(pixels)
    real = photographs(args.size)[CLASSES]
    labels = torch.tensor(classes).repeat_interleave(args.n)
    feature = lambda x: features[asked](normalize(x))  # noqa: E731
    with torch.no_grad():
        usual = scores[drawn](real)[:, labels]  # of every real image, for the class of each picture
        usual_distance = torch.pdist(feature(real)).mean()
    for contrast in args.contrast:
        shown = faded(pixels, contrast)
        with torch.no_grad():
            own = scores[drawn](shown).gather(1, labels[:, None])[:, 0]
            ratio = own / usual[torch.tensor(chosen).repeat_interleave(args.n), range(len(labels))]
            above = (usual < own).float().mean()
            logits = asked(normalize(shown))
            rank = (logits > logits.gather(1, labels[:, None])).sum(1)
            within = torch.stack([torch.pdist(f).mean() for f in feature(shown).split(args.n)])  # NaN for one a class
            variety = within.mean() / usual_distance
        saturated = ((shown < 2 / 255) | (shown > 253 / 255)).float().mean()
        deviation, real_deviation = (x.std((2, 3)).mean() for x in (shown, real))
        print(
            f'{args.tool}: {len(classes)} classes x {args.n}, {args.steps} gradients, {args.size} px, '
            f'contrast {contrast:g}: '
            f'top-1 {(rank == 0).float().mean():.2f}, top-5 {(rank < 5).float().mean():.2f}, '
            f'median rank {rank.median() + 1}, score {ratio.median():.1f} x real, '
            f'above {100 * above:.0f} % of real images, saturated {100 * saturated:.1f} %, '
            f'variety {variety:.2f}, s.d. of a channel {deviation:.2f} (real {real_deviation:.2f}), '
            f'{seconds:.0f} CPU s a picture',
            flush=True,
        )
    if args.out:
        save_image(pixels, args.out, nrow=8 * args.n)


if __name__ == '__main__':
    main()
