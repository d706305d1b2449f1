"""Render the card of each checkpoint of the zoo, with pictures of its first 20 classes and of three inner layers.

    python hub_cards/render.py [NAME ...]

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
LAYERS = {
    'lenet': ('conv1', 'conv2', 'fc1'),
    'alexnet_small': ('conv2', 'conv4', 'fc6'),
    'resnet10_w16': ('stages.0', 'stages.1', 'stages.2'),
    'resnet11_w64': ('stages.0#1', 'stages.1#1', 'stages.2#1'),  # of the image, not of its mirror image
    'resnet10_w32_s2': ('stages.0', 'stages.1', 'stages.2'),
}
UNITS, PER_UNIT = 8, 4


def render(name: str, namespace: str, n: int, steps: int) -> Path:
    """Write the card of the checkpoint `name` ('<arch>.<tag>') and its pictures, and return their folder."""
    record = zoo.read(name)
    model = timm.create_model(f'gencnn_{name}', pretrained=True).eval()
    gallery = [timm_gencnn.visualize(model, range(min(model.num_classes, 20)), n=n, steps=steps, seed=0)]
    for layer in LAYERS[record['architecture']]:
        units = [f'{layer}:{i}' for i in range(UNITS)]
        gallery.append(timm_gencnn.visualize(model, units, n=PER_UNIT, steps=steps, seed=0))
    target = HERE / name
    with TemporaryDirectory() as temporary:
        folder = Path(temporary, 'folder')
        write_folder(
            model,
            folder,
            f'{namespace}/gencnn_{name}',
            gallery=gallery,
            results=record['results'],
            recipe=record['recipe'],
            license='apache-2.0',
        )
        shutil.rmtree(target, ignore_errors=True)
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
    for name in args.names or zoo.names():
        print(render(name, args.namespace, args.n, args.steps))


if __name__ == '__main__':
    main()
