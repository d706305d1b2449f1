"""Are the sampled digits recognisable and varied? Judges that share no weights with the checkpoint say.

    gencnn train -c resnet_mnist --dataset hfds/../shared/data/mnist --seed 7 --experiment judge_resnet
    gencnn train -c lenet_mnist --dataset hfds/../shared/data/mnist --phase DG --seed 1 --experiment judge_lenet
    python tests/benchmarks/bench_digits.py --data ../shared/data/mnist \
        test_resnet=output/train/judge_resnet/last.pth.tar lenet=output/train/judge_lenet/last.pth.tar

Draws 10 low-temperature samples of each class at 500 image gradients a chain. Prints, for each judge, the share that
it names as the asked class, and the variety: the mean distance of the judge's features between samples of a class,
relative to that between real test digits of the class.
"""

import argparse

import datasets
import timm
import torch
from torchvision.transforms.functional import pil_to_tensor

import timm_gencnn


def spread(features):
    return torch.pdist(features).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('judges', nargs='+', metavar='ARCH=CHECKPOINT')
    parser.add_argument('--model', default='gencnn_lenet.gg_dg_mnist')
    parser.add_argument('--data', required=True)
    parser.add_argument('--n', type=int, default=10)
    parser.add_argument('--steps', type=int, default=500)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--out')
    args = parser.parse_args()
    torch.set_num_threads(1)

    samples = timm_gencnn.visualize(args.model, list(range(10)), n=args.n, steps=args.steps, seed=args.seed)
    if args.out:
        samples.save(args.out)
    print(samples.summary())
    rows = datasets.load_dataset(args.data, split='test').select(range(2000))
    real = torch.stack([pil_to_tensor(image) for image in rows['image']]) / 255
    labels, asked = torch.tensor(rows['label']), torch.arange(10).repeat_interleave(args.n)
    normalize = lambda x: (x - 0.1307) / 0.3081  # noqa: E731
    with torch.no_grad():
        own = timm.create_model(args.model, pretrained=True).eval()
        scores = own(normalize(real)).gather(1, labels[:, None])[:, 0]
        usual = torch.stack([scores[labels == c].median() for c in range(10)])[asked]
        drawn = torch.tensor(samples.diagnostics['score'])
        print(f'score: median {drawn.median():.2f}, of real digits {usual.median():.2f}')
        for arch, path in (judge.split('=') for judge in args.judges):
            judge = timm.create_model(arch, in_chans=1, num_classes=10, checkpoint_path=path).eval()
            x = normalize(samples.images[:, :1])
            right = (judge(x).argmax(1) == asked).float().mean().item()
            f, f_real = (judge.forward_head(judge.forward_features(v), pre_logits=True) for v in (x, normalize(real)))
            variety = sum(spread(f[asked == c]) / spread(f_real[labels == c]) for c in range(10)) / 10
            print(f'{arch}: {100 * right:.0f} % named right, variety {variety:.2f} of real digits')


if __name__ == '__main__':
    main()
