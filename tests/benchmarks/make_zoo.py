"""Turn a checkpoint of `gencnn train` into one that ships in the wheel.

    python tests/benchmarks/make_zoo.py output/train/RUN/last.pth.tar gg_dg_mnist --dataset ylecun/mnist [--default]

Loads the weights and the settings of the run, estimates log Z over the training set in one exact pass (and, after a
purely generative run, folds it into the bias in place of the running estimate), measures the test error before and
after rounding the weights to float16, and writes these if that costs less than 0.05 points. Biases and the statistics
of batch norm stay in float32: running variances can exceed what float16 can hold. log Z is kept where it can be
trusted, with an effective sample size of at least 100 images for each class.
"""

import argparse
import csv
import platform
from functools import partial
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_data_config

import timm_gencnn
from timm_gencnn import zoo
from timm_gencnn.config_file import ConfigParser
from timm_gencnn.generative import as_generative
from timm_gencnn.train_args import add_arguments
from timm_gencnn.train_data import open_dataset, plain_loader


@torch.inference_mode()
def test_error(model: torch.nn.Module, loader) -> tuple[float, float]:
    """Test error in per cent, and mean negative log-likelihood in nats."""
    logits, target = (torch.cat(t) for t in zip(*((model(x), y) for x, y in loader), strict=True))
    return 100 * (logits.argmax(1) != target).double().mean().item(), F.cross_entropy(logits, target).item()


def command(run: argparse.Namespace, dataset: str) -> str:
    """The command line of a run: its recipe, and what differed from it."""
    parser = ConfigParser()
    add_arguments(parser)
    recipe = vars(parser.parse_args(['-c', run.config]))
    flags = {k: v for k, v in vars(run).items() if k in SETTINGS and v != recipe[k]}
    if timm.models.get_pretrained_cfg(run.model).num_classes == run.num_classes:
        flags.pop('num_classes', None)
    flags |= {'phase': run.phase, 'seed': run.seed}
    where = dataset if '/' in dataset else f'FOLDER/{dataset}'  # not on the Hub
    words = [f'gencnn train -c {run.config} --dataset hfds/{where}']
    words += ['--input-key img'] if dataset == 'uoft-cs/cifar10' else []  # the name of the column on the Hub
    words += ['--' + k.replace('_', '-') + ('' if v is True else f' {v}') for k, v in flags.items()]
    if run.model_kwargs:
        words.append('--model-kwargs ' + ' '.join(f'{k}={v}' for k, v in run.model_kwargs.items()))
    return ' '.join(words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint')
    parser.add_argument('tag')
    parser.add_argument('--folder', default=zoo.FOLDER)
    parser.add_argument('--dataset', required=True, help="Hub id of the data set: 'ylecun/mnist'; else its name")
    parser.add_argument('--seconds', type=float, help='how long the training took')
    parser.add_argument('--hardware', default='one CPU core', help='what it was trained on')
    parser.add_argument('--note', help='what a reader of the test error must know')
    parser.add_argument('--default', action='store_true', help='what `pretrained=True` without a tag means')
    args = parser.parse_args()
    torch.set_num_threads(1)

    checkpoint = torch.load(args.checkpoint, weights_only=False)
    run = checkpoint['args']
    build = partial(
        timm.create_model,
        f'gencnn_{run.model.removeprefix("gencnn_")}',
        num_classes=run.num_classes,
        **run.model_kwargs,
    )
    model = build().eval()
    model.load_state_dict(checkpoint['state_dict'])
    config = resolve_data_config(vars(run), model=model)

    def loader(split: str):
        dataset = open_dataset(run.dataset, run.data_dir, split, config['input_size'][0], input_key=run.input_key)
        return plain_loader(dataset, config)

    train = loader(run.train_split)
    estimate = model.estimate_log_z(train, progress=False)
    if run.phase == 'GG' and not run.hybrid:  # corrects the running estimate that the checkpoint was folded with
        model.fold_intercepts(priors=sum(torch.bincount(y, minlength=model.num_classes) for _, y in train))
    test = loader(run.val_split)
    error, nll = test_error(model, test)
    if min(estimate.ess) < 100:
        model.set_log_z(None)
    half = build().eval()
    half.load_state_dict({k: v.half() if v.dim() > 1 else v for k, v in model.state_dict().items()})
    half_error, half_nll = test_error(half, test)
    print(f'test error: float32 {error:.2f} % ({nll:.4f} nats), float16 {half_error:.2f} % ({half_nll:.4f} nats)')
    print(f'log Z {estimate.log_z.tolist()}\nESS {estimate.ess.tolist()} of {estimate.n} images')
    if half_error - error < 0.05:
        error, nll = half_error, half_nll
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data = parameter.data.half()

    last = list(csv.DictReader((Path(args.checkpoint).parent / 'summary.csv').open()))[-1]
    path = zoo.save(
        as_generative(model),
        args.tag,
        args.folder,
        default=args.default,
        results={
            **{'dataset': args.dataset, 'split': run.val_split},
            **({'note': args.note} if args.note else {}),
            **{'test_error': round(error, 2), 'test_nll': round(nll, 4), 'train_loss': float(last['train_loss'])},
        },
        recipe={
            'command': command(run, args.dataset),
            'hardware': args.hardware,
            'seed': run.seed,
            'phase': run.phase,
            'settings': {k: v for k, v in vars(run).items() if k in SETTINGS},
            'seconds': args.seconds,
            'log_z_ess': [round(e, 1) for e in estimate.ess.tolist()],
            'versions': {
                'timm_gencnn': timm_gencnn.__version__,
                'timm': timm.__version__,
                'torch': torch.__version__,
                'python': platform.python_version(),
            },
        },
        data_config=config,
        label_names=test.dataset.reader.dataset.features['label'].names,
    )
    print(f'{path} ({path.stat().st_size / 1e6:.2f} MB)')


SETTINGS = (
    'model', 'num_classes', 'img_size', 'batch_size', 'epochs', 'gen_epochs', 'opt', 'lr', 'disc_lr', 'momentum',
    'weight_decay', 'sched', 'decay_epochs', 'decay_rate', 'amp', 'amp_dtype', 'no_aug', 'train_crop_mode', 'scale',
    'reprob', 'smoothing', 'hybrid', 'pool_reference',
)  # fmt: skip

if __name__ == '__main__':
    main()
