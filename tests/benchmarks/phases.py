"""Does generative pre-training help? One network trained DG, GG, GG+DG and hybrid, over several seeds.

    python tests/benchmarks/phases.py mnist --seeds 5 --data FOLDER     # the paper's Table 1; 4 minutes a run
    python tests/benchmarks/phases.py cifar10 --seeds 3 --data FOLDER
    python tests/benchmarks/phases.py in100 --seeds 3 --data FOLDER
    python tests/benchmarks/phases.py mnist-1% --seeds 3 --data FOLDER  # few labels; also mnist-10%, ...
    python tests/benchmarks/phases.py cifar10-long --seeds 3 --data FOLDER  # 16 epochs on a GPU; also in100-long
    python tests/benchmarks/phases.py mnist --print

A run is one `gencnn train`; the weights of its last epoch are then measured on the test images: error, NLL, calibration
error, error under Gaussian noise, AUROC of the largest logit against two other data sets (2000 images each). All goes
into tests/benchmarks/results: runs that are there are not repeated, one that was cut short goes on where it stopped.
FOLDER holds the data sets as mnist, cifar10, tiny_imagenet_100, each with columns `image` and `label`.
"""

import argparse
import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from timm.models import load_checkpoint

from timm_gencnn import cli
from timm_gencnn.networks import default_device
from timm_gencnn.train_data import open_dataset, plain_loader
from timm_gencnn.validate import auroc, noisy, scores, validate

RESULTS = Path(__file__).parent / 'results'
SPLIT = {'mnist': 'test', 'cifar10': 'test', 'tiny_imagenet_100': 'validation'}
COLUMNS = ('error', 'nll', 'ece', 'noise_error', 'auroc_1', 'auroc_2')


# GG+DG begins its learning rate anew at the switch. So does this; its first phase is DG too, to one part in a million.
RESTARTED = '--phase GG+DG --hybrid 0.999999'


def phases(unlabeled: bool = False, learned: Sequence[str] = ()) -> dict[str, str]:
    """Rows of a table: their names, and the flags of `gencnn train`."""
    rows = {phase: f'--phase {phase}' for phase in ('DG', 'GG', 'GG+DG')} | {'DG, restarted': RESTARTED}
    if not unlabeled:
        return rows | {'hybrid': '--phase GG --hybrid 0.5'}
    pool = {f'{phase}, pool': f'{rows[phase]} --unlabeled-dataset {{dataset}}' for phase in ('GG', 'GG+DG')}
    return rows | pool | {f'{phase}, learned': f'{pool[f"{phase}, pool"]} --unlabeled-weight 1' for phase in learned}


@dataclass(frozen=True)
class Experiment:
    """A data set, the flags of its runs, two other data sets, the noise, the share of labels in %, and the rows."""

    data: str
    flags: str
    others: tuple[str, str]
    noise: float
    share: int = 100
    rows: dict[str, str] = field(default_factory=phases)


FEW = '-b 64 --val-split= --train-split train[{{first}}%:{{last}}%] --epochs {} --gen-epochs {}'
MNIST = Experiment('mnist', '-c lenet_mnist', ('cifar10', 'tiny_imagenet_100'), 0.3)
CIFAR = Experiment('cifar10', '-c resnet_short', ('tiny_imagenet_100', 'mnist'), 0.05)
IN100_FLAGS = '-c resnet_short --model resnet10_w16_s2 --val-split validation'
IN100 = Experiment('tiny_imagenet_100', IN100_FLAGS, ('cifar10', 'mnist'), 0.05)
EXPERIMENTS = {'mnist': MNIST, 'cifar10': CIFAR, 'in100': IN100}
for name in ('cifar10', 'in100'):  # four times as long, and for a GPU
    long = f'{EXPERIMENTS[name].flags} --epochs 16 --gen-epochs 8 --data-on-device --workers 4'
    EXPERIMENTS[f'{name}-long'] = replace(EXPERIMENTS[name], flags=long)
FEW_LABELS = {  # data set, per cent of its labels (each seed has its own images): epochs, those of GG in GG+DG, learned
    ('mnist', 1): (250, 160, ('GG', 'GG+DG')),
    ('mnist', 10): (75, 48, ('GG',)),
    ('cifar10', 1): (200, 100, ('GG',)),
    ('cifar10', 10): (30, 15, ('GG',)),
    ('in100', 1): (200, 100, ('GG',)),
    ('in100', 10): (30, 15, ()),
}
for (name, share), (epochs, gen_epochs, learned) in FEW_LABELS.items():
    base = EXPERIMENTS[name]
    few = f'{base.flags} {FEW.format(epochs, gen_epochs)}'
    EXPERIMENTS[f'{name}-{share}%'] = replace(base, flags=few, share=share, rows=phases(True, learned))
SWITCH = {f'GG+DG, switched after {n}': f'--phase GG+DG --gen-epochs {n}' for n in (40, 80)}  # 160 in mnist-1%
EXPERIMENTS['mnist-1%-switch'] = replace(EXPERIMENTS['mnist-1%'], rows=SWITCH)
POOL = {
    f'GG, {way}, {n} a step': f'--phase GG --unlabeled-dataset {{dataset}} --unlabeled-batch-size {n} {flags}'
    for way, flags in (('pool', ''), ('learned', '--unlabeled-weight 1'))
    for n in (16, 256)  # 64 in mnist-1%
}
EXPERIMENTS['mnist-1%-pool'] = replace(EXPERIMENTS['mnist-1%'], rows=POOL)
ALONE = '--model-kwargs norm_layer=groupnorm1'
NORM = {f'{phase}, each image alone': f'--phase {phase} {ALONE}' for phase in ('DG', 'GG')}
EXPERIMENTS['cifar10-1%-norm'] = replace(EXPERIMENTS['cifar10-1%'], rows=NORM)
SMALL = {phase: f'--phase {phase} -b 16' for phase in ('DG', 'GG', 'GG+DG')}  # four times the updates
EXPERIMENTS['mnist-1%-batch16'] = replace(EXPERIMENTS['mnist-1%'], rows=SMALL)


def train(flags: str, dataset: str, output: Path, name: str) -> None:
    """One run of `gencnn train`, from where it stands."""
    where = ['--dataset', dataset, '--output', str(output), '--experiment', name]
    if cli.main(['train', *flags.split(), *where, '--resume', 'auto']):
        raise SystemExit(f'{name} failed')


def measure(run: Path, experiment: Experiment, where: Any) -> dict[str, float]:
    """Figures of the last epoch's weights: shares in per cent, NLL in nats."""
    path = run / 'last.pth.tar'
    args = torch.load(path, weights_only=False)['args']
    model = timm.create_model(f'gencnn_{args.model}', num_classes=args.num_classes, **args.model_kwargs).eval()
    model.to(default_device(None))
    load_checkpoint(model, str(path))
    config = resolve_data_config(vars(args), model=model)

    def loader(name: str, images: str = '') -> Any:
        return plain_loader(open_dataset(where(name), None, SPLIT[name] + images, config['input_size'][0]), config)

    test = list(loader(experiment.data))
    clean, noise = (validate(model, noisy(test, s, config['std'])) for s in (0.0, experiment.noise))
    result = {
        'error': 100 - clean['top1'],
        'nll': clean['nll'],
        'ece': clean['ece'],
        'noise_error': 100 - noise['top1'],
    }
    inside = scores(model, test[:4])['logit']
    for i, other in enumerate(experiment.others, 1):
        result[f'auroc_{i}'] = 100 * auroc(inside, scores(model, loader(other, '[:2000]'))['logit'])
    return {k: round(v, 4) for k, v in result.items()}


def runs(row: str, results: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """The runs of a row by their seeds."""
    return {k.rsplit('_', 1)[1]: v for k, v in results.items() if k.rsplit('_', 1)[0] == row}


def table(experiment: Experiment, results: dict[str, dict[str, float]]) -> str:
    """Markdown: mean and standard deviation over the seeds."""
    first, second = experiment.others
    lines = [
        f'| | seeds | error % | NLL | ECE % | error %, noise {experiment.noise:g} | AUROC, {first} | AUROC, {second} |'
    ]
    lines.append('|---' * 8 + '|')
    for row in experiment.rows:
        found = runs(row, results).values()
        if found:
            cells = [mean_and_spread([run[column] for run in found]) for column in COLUMNS]
            lines.append(f'| {row} | {len(found)} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def differences(experiment: Experiment, results: dict[str, dict[str, float]]) -> str:
    """Markdown: each row less DG at the same seeds, which share data and first weights; mean and standard error."""
    lines = ['| less DG, same seed | seeds | error % | NLL | error %, noise |', '|---' * 5 + '|']
    base = runs('DG', results)
    for row in experiment.rows:
        pairs = [(run, base[seed]) for seed, run in runs(row, results).items() if seed in base]
        if len(pairs) > 1 and row != 'DG':
            values = [[run[column] - dg[column] for run, dg in pairs] for column in ('error', 'nll', 'noise_error')]
            cells = [f'{statistics.mean(v):+.2f} ± {statistics.stdev(v) / math.sqrt(len(v)):.2f}' for v in values]
            lines.append(f'| {row} | {len(pairs)} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def mean_and_spread(values: list[float]) -> str:
    return ' ± '.join(f'{f(values):.2f}' for f in (statistics.mean, statistics.stdev)[: len(values)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('experiment', choices=EXPERIMENTS)
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--rows', nargs='+', help='only these rows of the table')
    parser.add_argument('--data', metavar='FOLDER', help='where the data sets are')
    parser.add_argument('--output', default='output/phases')
    parser.add_argument('--print', action='store_true', help='only print what is there')
    args = parser.parse_args()
    if not args.print and args.data is None:
        parser.error('give --data FOLDER, or --print')
    torch.set_num_threads(1)
    experiment = EXPERIMENTS[args.experiment]

    def where(name: str) -> str:
        return f'hfds/{Path(args.data, name)}'

    file = RESULTS / f'{args.experiment}.json'
    results: dict[str, dict[str, float]] = json.loads(file.read_text()) if file.exists() else {}
    wanted = [(row, seed) for seed in range(args.seeds) for row in args.rows or experiment.rows]
    for row, seed in wanted if not args.print else ():
        name, output = f'{row}_{seed}', Path(args.output, args.experiment)
        if name in results:
            continue
        share = experiment.share
        values = {'dataset': where(experiment.data), 'first': share * seed, 'last': share * (seed + 1)}
        flags = f'{experiment.flags} {experiment.rows[row]} --seed {seed}'
        train(flags.format(**values), where(experiment.data), output, name)
        results[name] = measure(output / name, experiment, where)
        RESULTS.mkdir(exist_ok=True)
        new = file.with_suffix('.new')
        new.write_text(json.dumps(results, indent=1, sort_keys=True) + '\n')
        os.replace(new, file)
    print(table(experiment, results), differences(experiment, results), sep='\n\n')


if __name__ == '__main__':
    main()
