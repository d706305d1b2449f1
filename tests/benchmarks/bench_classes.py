r"""Are the pictures of a checkpoint's classes recognisable and varied? Judges that share no weights with it say.

    gencnn train -c resnet_mnist --dataset hfds/FOLDER/mnist --seed 7 --experiment judge_resnet
    gencnn train -c lenet_mnist --no-amp --dataset hfds/FOLDER/mnist --phase DG --seed 1 --experiment judge_dg
    python tests/benchmarks/bench_classes.py --data FOLDER --model gencnn_lenet.vis_mnist gencnn_lenet.dg_mnist \
        --judges output/train/judge_resnet/last.pth.tar output/train/judge_dg/last.pth.tar  # and one trained GG

    gencnn train -c resnet_short --model test_resnet --num-classes 10 --input-size 3 64 64 --crop-pct 1 \
        --mean 0.4914 0.4822 0.4465 --std 0.2470 0.2435 0.2616 --phase DG --epochs 5 --seed 7 \
        --dataset hfds/FOLDER/cifar10 --experiment judge_cifar
    python tests/benchmarks/bench_classes.py --data FOLDER --n 5 \
        --model gencnn_resnet10_w16.gg_dg_cifar10 gencnn_resnet11_w64.gg_dg_cifar10 \
        --judges output/train/judge_cifar/last.pth.tar

    gencnn train -c resnet_in100 --model test_resnet --num-classes 100 --input-size 3 64 64 --crop-pct 1 \
        --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225 --no-amp --phase DG --epochs 12 --seed 7 \
        --dataset hfds/FOLDER/tiny_imagenet_100 --experiment judge_in100
    python tests/benchmarks/bench_classes.py --data FOLDER --n 2 \
        --model gencnn_resnet10_w32_s2.gg_dg_in100 gencnn_alexnet_small.gg_dg_in100 \
        --judges output/train/judge_in100/last.pth.tar

For each checkpoint, of the zoo by its name or of a run by its file (output/train/RUN/last.pth.tar): pictures of each
class at 500 image gradients a chain. Prints the median score beside that of test images of the same classes (a score
has no zero of its own), the share of saturated pixels, and for each judge the share of pictures that it names as the
asked class, and the variety: the mean distance of the judge's features between pictures of a class, relative to that
between test images of the class. `--centred` draws each class's logit less the mean of all logits.
"""

import argparse
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from torch import Tensor
from torchvision.transforms.functional import resize

import timm_gencnn
from timm_gencnn import zoo
from timm_gencnn.train_data import open_dataset, plain_loader


def real_images(folder: str, split: str, config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The first 2000 test images [2000, C, H, W] in [0, 1] at the checkpoint's size, and their classes."""
    channels = config['input_size'][0]
    dataset = open_dataset(f'hfds/{folder}', None, f'{split}[:2000]', channels)
    return next(iter(plain_loader(dataset, config | {'mean': (0.0,) * channels, 'std': (1.0,) * channels}, 2000)))


def load_run(path: str) -> tuple[torch.nn.Module, dict[str, Any], argparse.Namespace]:
    """A classifier that `gencnn train` made, its preprocessing and its flags."""
    checkpoint = torch.load(path, weights_only=False)
    args = checkpoint['args']
    inputs = {'in_chans': args.input_size[0]} if args.input_size else {}
    model = timm.create_model(args.model, num_classes=args.num_classes, **inputs, **args.model_kwargs).eval()
    model.load_state_dict(checkpoint['state_dict'])
    return model, resolve_data_config(vars(args), model=model), args


def load(name: str) -> tuple[torch.nn.Module, dict[str, Any], str, str]:
    """A checkpoint of the zoo or of a run, its preprocessing, and the data set and split that measure it."""
    if Path(name).suffix == '.tar':
        model, config, args = load_run(name)
        return model, config, args.dataset, args.val_split
    results = zoo.read(name.removeprefix('gencnn_'))['results']
    model = timm.create_model(name, pretrained=True).eval()
    return model, resolve_data_config({}, model=model), results['dataset'], results['split']


def prepare(images: Tensor, config: dict[str, Any]) -> Tensor:
    """Images [n, C, H, W] in [0, 1] as a network takes them."""
    channels, *size = config['input_size']
    images = resize(images[:, :channels], size, antialias=True)
    return (images - torch.tensor(config['mean']).view(-1, 1, 1)) / torch.tensor(config['std']).view(-1, 1, 1)


def centred(classes: range, num_classes: int) -> list[dict[int, float]]:
    """Nodes f_y - mean_k f_k."""
    return [{k: (k == y) - 1 / num_classes for k in range(num_classes)} for y in classes]


def spread(features: Tensor) -> float:
    return torch.pdist(features.flatten(1)).mean().item()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', nargs='+', default=['gencnn_lenet.vis_mnist'])
    parser.add_argument('--judges', nargs='+', required=True, metavar='CHECKPOINT')
    parser.add_argument('--data', required=True, help='folder with the data sets')
    parser.add_argument('--classes', type=int, help='only the first N classes')
    parser.add_argument('--n', type=int, default=10)
    parser.add_argument('--steps', type=int, default=500)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--centred', action='store_true', help='f_y - mean_k f_k in place of f_y')
    parser.add_argument('--out', help='folder for the pictures')
    args = parser.parse_args()
    torch.set_num_threads(1)
    print('| | score | saturated | judge (its test error) | named as asked | variety |')
    print('|---' * 6 + '|')
    for name in args.model:
        shown = Path(name).parent.name or name
        model, config, dataset, split = load(name)
        real, labels = real_images(str(Path(args.data, dataset.split('/')[-1])), split, config)
        classes = range(args.classes or model.num_classes)
        asked = torch.tensor(classes).repeat_interleave(args.n)
        nodes = centred(classes, model.num_classes) if args.centred else classes
        samples = timm_gencnn.visualize(model, nodes, n=args.n, steps=args.steps, seed=args.seed, progress=False)
        if args.out:
            Path(args.out).mkdir(parents=True, exist_ok=True)
            samples.save(str(Path(args.out, f'{shown}.png')))
        logits = model(prepare(real, config))
        own = (logits - logits.mean(1, keepdim=True) * args.centred).gather(1, labels[:, None])[:, 0]
        usual = torch.stack([own[labels == c].median() for c in classes])[asked]
        drawn = torch.tensor(samples.diagnostics['score'])
        saturated = ((samples.images < 0.02) | (samples.images > 0.98)).float().mean()
        saturated_real = ((real < 0.02) | (real > 0.98)).float().mean()
        for path in args.judges:
            judge, judge_config, _ = load_run(path)
            x, x_real = prepare(samples.images, judge_config), prepare(real, judge_config)
            right, error = judge(x).argmax(1) == asked, judge(x_real).argmax(1) != labels
            f, f_real = (judge.forward_head(judge.forward_features(v), pre_logits=True) for v in (x, x_real))
            variety = sum(spread(f[asked == c]) / spread(f_real[labels == c]) for c in classes) / len(classes)
            cells = [
                f'{drawn.median():.1f} (real {usual.median():.1f})',
                f'{saturated:.1%} (real {saturated_real:.1%})',
                f'{Path(path).parent.name} ({error.float().mean():.1%})',
                f'{right.float().mean():.0%}',
                f'{variety:.2f}',
            ]
            print(f'| `{shown}` | ' + ' | '.join(cells) + ' |', flush=True)


if __name__ == '__main__':
    main()
