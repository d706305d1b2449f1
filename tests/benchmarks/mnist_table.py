"""The paper's Table 1: test error of LeNet on MNIST, trained DG, GG and GG+DG, over several seeds.

    python tests/benchmarks/mnist_table.py --seeds 5 [--dataset hfds/FOLDER] [--output output/mnist_table]

Each run is `gencnn train -c lenet_mnist --phase PHASE --seed SEED`, about five minutes on one idle core. Finished runs
are not repeated and a run that was cut short goes on where it stopped, so the command can be given again at any time.
`--only-print` prints the table of the runs that are there.
"""

import argparse
import csv
import statistics
from pathlib import Path

import torch

from timm_gencnn import cli

PAPER = {'DG': 1.03, 'GG': 0.85, 'GG+DG': 0.78}
EPOCHS = 25


def test_error(run: Path) -> float | None:
    """Test error after the last epoch in per cent, or None while the run is not finished."""
    path = run / 'summary.csv'
    rows = list(csv.DictReader(path.open())) if path.exists() else []
    return 100 - float(rows[-1]['eval_top1']) if rows and int(rows[-1]['epoch']) == EPOCHS - 1 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', type=int, default=5)
    parser.add_argument('--dataset', default='hfds/ylecun/mnist')
    parser.add_argument('--output', default='output/mnist_table')
    parser.add_argument('--only-print', action='store_true')
    args = parser.parse_args()
    torch.set_num_threads(1)
    for seed in range(args.seeds if not args.only_print else 0):
        for phase in PAPER:
            name = f'{phase}_{seed}'
            if test_error(Path(args.output, name)) is None:
                command = ['train', '-c', 'lenet_mnist', '--phase', phase, '--seed', str(seed)]
                where = ['--dataset', args.dataset, '--output', args.output, '--experiment', name, '--resume', 'auto']
                if cli.main([*command, *where]):
                    raise SystemExit(f'{name} failed')
    print('| | ' + ' | '.join(f'seed {seed}' for seed in range(args.seeds)) + ' | mean ± s.d. | paper |')
    print('|---' * (args.seeds + 3) + '|')
    for phase, paper in PAPER.items():
        errors = [test_error(Path(args.output, f'{phase}_{seed}')) for seed in range(args.seeds)]
        known = [e for e in errors if e is not None]
        spread = f' ± {statistics.stdev(known):.2f}' if len(known) > 1 else ''
        mean = f'{statistics.mean(known):.2f}{spread}' if known else ''
        print(f'| {phase} | ' + ' | '.join('' if e is None else f'{e:.2f}' for e in errors) + f' | {mean} | {paper} |')


if __name__ == '__main__':
    main()
