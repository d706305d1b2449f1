"""Are the scores of the zoo's checkpoints log density ratios?

    python tests/benchmarks/bench_likelihood.py --data FOLDER [--nodes 3] [gencnn_lenet.gg_mnist ...]

For each checkpoint, on the test images it never saw, with log Z as estimated on the training images:

- the mean log-ratio f_y(x) - log Z_y of the true class: log C for a perfect ratio of C equally likely, well separated
  classes;
- the calibration log E_q[exp(f_y - log Z_y)], 0 for a density ratio: its median and extremes over the classes;
- the effective sample size of the importance weights for pools of 64, 256 and 1024 images and for all of them, as a
  share of the pool: 1 / C for a perfect ratio, since one image in C belongs to the class;
- log Z under the pictures' own parametric reference by annealed importance sampling, with its standard error.

`--data` is a folder that holds the data sets as mnist, cifar10, tiny_imagenet_100.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config

import timm_gencnn
from timm_gencnn import zoo
from timm_gencnn.loss import ess, log_mean_exp
from timm_gencnn.train_data import open_dataset, plain_loader


def images(model: torch.nn.Module, folder: str, split: str) -> Any:
    """Loader of a split's images, as the checkpoint takes them."""
    config = resolve_data_config({}, model=model)
    return plain_loader(open_dataset(f'hfds/{folder}', None, split, config['input_size'][0]), config)


@torch.inference_mode()
def all_logits(model: torch.nn.Module, loader: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [n, C] and targets [n]."""
    logits, target = (torch.cat(t) for t in zip(*((model(x), y) for x, y in loader), strict=True))
    return logits, target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*', help='checkpoints; default: the whole zoo')
    parser.add_argument('--data', required=True, help='folder with the data sets')
    parser.add_argument('--nodes', type=int, default=3, help='classes whose log Z is estimated by annealing')
    args = parser.parse_args()
    torch.set_num_threads(1)
    columns = ('', 'log-ratio (log C)', 'calibration', 'ESS of 64, 256, 1024, all', 'AIS log Z, classes 0, 1, ...')
    print('| ' + ' | '.join(columns) + ' |')
    print('|---' * 5 + '|')
    for name in args.names or [f'gencnn_{name}' for name in zoo.names()]:
        results = zoo.read(name.removeprefix('gencnn_'))['results']
        model = timm.create_model(name, pretrained=True).eval()
        folder = str(Path(args.data, results['dataset'].split('/')[-1]))
        if model.log_z is None:  # none ships where it cannot be trusted
            model.estimate_log_z(images(model, folder, 'train'), progress=False)
        logits, target = all_logits(model, images(model, folder, results['split']))
        log_ratio = logits - model.log_z
        true = log_ratio.gather(1, target[:, None]).mean()
        calibration = log_mean_exp(log_ratio).sort().values
        sizes = [n for n in (64, 256, 1024) if n < len(logits)] + [len(logits)]
        shares = [
            torch.stack([ess(part).mean() / n for part in logits.split(n) if len(part) == n]).mean() for n in sizes
        ]
        annealed = [timm_gencnn.log_z(model, y, n=32, progress=False) for y in range(args.nodes)]
        cells = [
            f'{true:.2f} ({math.log(model.num_classes):.2f})',
            f'{calibration.median():+.2f} [{calibration[0]:+.2f}, {calibration[-1]:+.2f}]',
            ', '.join(f'{share:.3f}' for share in shares),
            ', '.join(f'{z.log_z:.2f} ± {z.standard_error:.2f}' for z in annealed),
        ]
        print(f'| `{name}` | ' + ' | '.join(cells) + ' |', flush=True)


if __name__ == '__main__':
    main()
