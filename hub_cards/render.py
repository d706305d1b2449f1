"""Render the card of each checkpoint of the zoo, with a gallery of its classes: `python hub_cards/render.py`.

Each checkpoint gets a folder here with what goes to the Hub beside its weights. To see the weights and config.json as
well, or to publish: `gencnn push NAME USER/REPO --nodes ... [--dry-run FOLDER]`.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import timm

import timm_gencnn
from timm_gencnn import zoo
from timm_gencnn.hub import write_folder

HERE = Path(__file__).parent


def render(name: str, namespace: str, n: int, steps: int) -> Path:
    """Write the card of the checkpoint `name` ('<arch>.<tag>') and its pictures, and return their folder."""
    record = zoo.read(name, zoo.FOLDER)
    model = timm.create_model(f'gencnn_{name}', pretrained=True).eval()
    samples = timm_gencnn.visualize(model, range(min(model.num_classes, 20)), n=n, steps=steps, seed=0)
    target = HERE / name
    shutil.rmtree(target, ignore_errors=True)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary, 'folder')
        write_folder(
            model,
            folder,
            f'{namespace}/gencnn_{name}',
            gallery=[samples],
            results=record['results'],
            recipe=record['recipe'],
            license='apache-2.0',
        )
        target.mkdir()
        for path in ('README.md', 'results.json', 'images'):
            if (folder / path).exists():
                shutil.move(folder / path, target / path)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*', help='checkpoints, as <arch>.<tag> (default: the whole zoo)')
    parser.add_argument('--namespace', default='USER', help='user or organisation on the Hub')
    parser.add_argument('-n', type=int, default=16, help='pictures per class')
    parser.add_argument('--steps', type=int, default=512, help='image gradients per picture')
    args = parser.parse_args()
    for name in args.names or zoo.names(zoo.FOLDER):
        print(render(name, args.namespace, args.n, args.steps))


if __name__ == '__main__':
    main()
