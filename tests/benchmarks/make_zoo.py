"""Turn a checkpoint of `gencnn train` into one that ships in the wheel.

    python tests/benchmarks/make_zoo.py output/train/RUN/last.pth.tar gg_dg_mnist --dataset ylecun/mnist

Loads the weights and the settings of the run, estimates log Z over the training set in one exact pass (and, after a
purely generative run, folds it into the bias in place of the running estimate), measures the test error before and
after rounding to float16, and writes the float16 weights if that costs less than 0.05 points.
"""

import argparse
import csv
import platform
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.data import create_loader, resolve_data_config

import timm_gencnn
from timm_gencnn import zoo
from timm_gencnn.generative import as_generative
from timm_gencnn.train_data import open_dataset


@torch.inference_mode()
def test_error(model: torch.nn.Module, loader) -> tuple[float, float]:
    """Test error in per cent, and mean negative log-likelihood in nats."""
    logits, target = (torch.cat(t) for t in zip(*((model(x), y) for x, y in loader), strict=True))
    return 100 * (logits.argmax(1) != target).double().mean().item(), F.cross_entropy(logits, target).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint')
    parser.add_argument('tag')
    parser.add_argument('--folder', default=zoo.FOLDER)
    parser.add_argument('--dataset', required=True, help="Hub id of the data set, for the card: 'ylecun/mnist'")
    parser.add_argument('--seconds', type=float, help='how long the training took')
    args = parser.parse_args()
    torch.set_num_threads(1)

    checkpoint = torch.load(args.checkpoint, weights_only=False)
    run = checkpoint['args']
    model = timm.create_model(f'gencnn_{run.model.removeprefix("gencnn_")}', num_classes=run.num_classes).eval()
    model.load_state_dict(checkpoint['state_dict'])
    config = resolve_data_config(vars(run), model=model)

    def loader(split: str):
        dataset = open_dataset(run.dataset, run.data_dir, split, config['input_size'][0])
        return create_loader(
            dataset, config['input_size'], 500, mean=config['mean'], std=config['std'], crop_pct=config['crop_pct'],
            interpolation=config['interpolation'], num_workers=0, device=torch.device('cpu'), persistent_workers=False,
        )  # fmt: skip

    train = loader(run.train_split)
    estimate = model.estimate_log_z(train, progress=False)
    if run.phase == 'GG':  # corrects the running estimate that the checkpoint was folded with
        model.fold_intercepts(priors=sum(torch.bincount(y, minlength=model.num_classes) for _, y in train))
    test = loader(run.val_split)
    error, nll = test_error(model, test)
    half = timm.create_model(f'gencnn_{run.model.removeprefix("gencnn_")}', num_classes=run.num_classes).eval()
    half.load_state_dict({k: v.half() for k, v in model.state_dict().items()})
    half_error, half_nll = test_error(half, test)
    print(f'test error: float32 {error:.2f} % ({nll:.4f} nats), float16 {half_error:.2f} % ({half_nll:.4f} nats)')
    print(f'log Z {estimate.log_z.tolist()}\nESS {estimate.ess.tolist()} of {estimate.n} images')
    if half_error - error < 0.05:
        error, nll = half_error, half_nll
        log_z = model.log_z
        model.half().set_log_z(log_z)  # log Z itself stays in float32

    command = f'gencnn train -c {run.config} --dataset hfds/{args.dataset} --phase {run.phase} --seed {run.seed}'
    last = list(csv.DictReader((Path(args.checkpoint).parent / 'summary.csv').open()))[-1]
    path = zoo.save(
        as_generative(model),
        args.tag,
        args.folder,
        results={
            **{'dataset': args.dataset, 'split': run.val_split},
            **{'test_error': round(error, 2), 'test_nll': round(nll, 4), 'train_loss': float(last['train_loss'])},
        },
        recipe={
            'command': command,
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
        label_names=[str(i) for i in range(model.num_classes)],
    )
    print(f'{path} ({path.stat().st_size / 1e6:.2f} MB)')


SETTINGS = (
    'batch_size', 'epochs', 'gen_epochs', 'opt', 'lr', 'disc_lr', 'momentum', 'weight_decay', 'sched', 'decay_epochs',
    'decay_rate', 'amp', 'amp_dtype', 'no_aug', 'smoothing', 'hybrid', 'pool_reference',
)  # fmt: skip

if __name__ == '__main__':
    main()
