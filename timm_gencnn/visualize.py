"""`visualize(model, node)`: synthetic images for any node of a trained network, and the `gencnn visualize` command."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import time
import warnings
from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from . import chains, diagnostics
from .blocks import Run
from .names import Node
from .networks import (
    MODEL,
    add_weight_arguments,
    default_device,
    frozen,
    kwargs_told,
    load,
    load_model,
    move,
    weight_arguments,
    weights_digest,
    without_autocast,
)
from .node_lists import expand
from .nodes import resolve
from .presets import PRESETS
from .reference import Reference
from .samples import Samples, channels_shown, check_writable, read_metadata
from .sampling import Sampling
from .views import Views, is_current, views_of


@torch.inference_mode(False)
def visualize(
    model: str | nn.Module,
    node: Node | Sequence[Node],
    *,
    n: int = 16,
    steps: int | None = None,
    reference: str | Reference = 'natural',
    temperature: float | None = None,
    tilt: float | None = None,
    size: int | tuple[int, int] | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    compile: bool = False,
    frames: int = 0,
    preset: str | None = None,
    progress: bool = True,
) -> Samples:
    """Draws images for a node of a trained network from p(x) ∝ exp(f(x)) q(x), by Hamiltonian Monte Carlo.

    f is the node's score and q the reference (Dai, Lu, Wu 2015, section 3). With `temperature=1, tilt=1` the chains
    sample the model itself: adjusted HMC, exact, with diagnostics that mean something (on an ordinary classifier the
    images are noise with faint structure: that is what the model believes). Otherwise, and by default, the run makes a
    gallery picture: the same dynamics at a low temperature, without an accept step, on the score averaged over random
    views of the image (see `timm_gencnn.views`), and, at T <= 0.1, the mean of the chain's last states.

    Args:
        model: A name for `timm.create_model` (loaded with its pretrained weights), the folder of a training run (with
            its best checkpoint), or any module in eval mode that takes images [N, C, H, W]. Its `pretrained_cfg`
            (`input_size`, `mean`, `std`, `label_names`) says what its images are; without one, which a wrapper of a
            timm model lacks too, they have 224 pixels, or `size`, and are normalised as ImageNet's are. Calls for one
            model in several threads take turns, but not with calls for a wrapper or a part of it; it must not run in
            another thread meanwhile.
        node: A class by index or name, `'layer:channel'`, `'layer:channel@row,col'`, a weighted sum, a callable, or a
            list of these (see `timm_gencnn.nodes`).
        n: Images per node, at least 1; each is a chain of its own.
        steps: Budget of image gradients per chain; None is 512, or that of the preset.
        reference: `'natural'`, `'white'` or an object like those of `timm_gencnn.reference`.
        temperature: T > 0; None is the gallery default.
        tilt: Factor on the score, > 0; None is 1 at `temperature=1`, else automatic: each chain's is the one at which
            the score asks for images as far from the mean as the reference's own, or half as far for classes of colour
            images and anything in large ones (`diagnostics['tilt']` has them).
        size: Image side or (height, width) in pixels; None is that of a reference of one's own, else the model's own
            or, for channels of early convolutions alone, one and a half times their receptive field.
        seed: Non-negative integer; the same seed gives the same pixels on the same machine (on a GPU only as far as its
            convolutions sum in the same order each time).
        device: Where to run, with the model moved there; None is where the model is.
        dtype: `torch.bfloat16` or `torch.float16` runs the network under autocast; in the exact regime only for the
            kicks inside a trajectory, so that the accept test stays in float32 (on a GPU, convolutions are in TF32
            unless `torch.backends.cudnn.allow_tf32` is False).
        compile: Whether to run the network through `torch.compile`, which costs minutes before the first gradient.
        frames: Images of the run to keep for `Samples.animate`, at most one per transition.
        preset: `'paper-lenet'` or `'paper-alexnet'`: the settings of the paper's own pictures (see
            `timm_gencnn.presets`): exact regime, white reference, fixed step size. Thousands of gradients a chain.
        progress: Whether to show a progress bar with score and acceptance.

    Returns:
        Samples: the images with their settings and diagnostics.

    Raises:
        ValueError: Bad input: an unknown model, node or size; n, steps, T, tilt or seed out of range; a model in train
            mode; a score that is not finite; a unit that is dead on the reference; a model that `torch.compile` cannot
            take whole.
    """
    asked = Sampling(n, steps, reference, temperature, tilt, size, seed, dtype, compile, frames, preset)
    settled = asked.settled()
    net, name, where = load(model, device)
    nodes: list[Any] = list(node) if isinstance(node, (list, tuple, range)) else [node]

    began = time.perf_counter()
    with frozen(net), without_autocast(where):
        score = resolve(net, nodes, size=asked.sides())
        q = asked.make_reference(net, score.in_chans, score.size, where)
        budget = asked.budget(all(node.kind == 'class' for node in score.nodes))
        views = None if settled.exact else [views_of(node.kind, score.in_chans, score.size) for node in score.nodes]
        weights = weights_digest(net)
        drawn = Run(score, q, views, settled, budget, where, progress).run()
    per_image: dict[str, Any] = {k: values.tolist() for k, values in drawn.per_image.items()}
    diagnosed = per_image | _convergence(drawn.scores.split(settled.n, dim=1), settled.exact)
    diagnosed |= {'gradients': drawn.gradients, 'seconds': round(time.perf_counter() - began, 3)}
    notes = [note for note in (*(node.note for node in score.nodes), channels_shown(score.in_chans)) if note]
    if stuck := _stuck(diagnosed['divergences'], len(drawn.scores)):
        warnings.warn(stuck, stacklevel=3)
        notes.append(stuck)
    settings = {
        'model': name,
        'weights': weights,
        'nodes': [x if isinstance(x, (int, str)) else label for x, label in zip(nodes, score.names, strict=True)],
        'n': settled.n,
        'steps': budget,
        'reference': getattr(q, 'name', 'unnamed'),
        **q.settings(),
        'temperature': settled.temperature,
        'tilt': settled.tilt,
        'size': list(score.size),
        'seed': settled.seed,
        'dtype': settled.dtype_name,
        'compile': compile,
        'regime': 'exact' if settled.exact else 'gallery',
        'views': [v._asdict() for v in views] if views else None,
        'schedule': chains.Schedule()._asdict() if views else None,
        'preset': preset,
        'notes': notes,
        'versions': _versions(),
    }
    return Samples(drawn.film[-1], score.names, settings, diagnosed, drawn.scores, drawn.film if frames else None)


def _convergence(by_node: Sequence[Tensor], exact: bool) -> dict[str, float]:
    """R-hat and ESS of the node that has the worst, from the scores of each node's chains [draws, n]."""
    if not exact:
        return {'r_hat': math.nan, 'ess': math.nan}
    r_hats, sizes = ([fn(scores) for scores in by_node] for fn in (diagnostics.r_hat, diagnostics.bulk_ess))
    worst = torch.tensor([r_hats, sizes], dtype=torch.float64, device='cpu')
    return {'r_hat': worst[0].max().item(), 'ess': worst[1].min().item()}  # NaN stays NaN


def _versions() -> dict[str, str]:
    from . import __version__

    return {'timm_gencnn': __version__, 'timm': timm.__version__, 'torch': torch.__version__}


def _stuck(divergences: list[int], draws: int) -> str:
    """What to tell of chains that could take less than half of their moves, or ''."""
    stuck = sum(2 * count > draws for count in divergences)
    if not stuck:
        return ''
    return (
        f'{stuck} of {len(divergences)} images are hardly more than noise of the reference: most moves of their chains '
        'were refused, since the score or its gradient was not finite or far too steep (lower the tilt, use float32)'
    )


# ---------------------------------------------------------------------------------------------------------------------
# The command


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say which weights to take, where to run and how to sample: by default as `visualize` does."""
    add_weight_arguments(parser)
    parser.add_argument('--device', help='cpu or cuda (default: cuda if there is one)')
    parser.add_argument('-n', type=int, help='images per node')
    parser.add_argument('--steps', type=int, help='image gradients per chain (default: 512)')
    parser.add_argument('--reference', choices=['natural', 'white'], help='(default: natural)')
    parser.add_argument('--temperature', type=float, help='1: exact samples of the model')
    parser.add_argument('--tilt', type=float, help='factor on the score')
    parser.add_argument('--size', type=int, help="image side in pixels (default: the model's, less for early layers)")
    parser.add_argument('--seed', type=int, help='(default: 0)')
    parser.add_argument('--preset', choices=list(PRESETS), help="the settings of the paper's own pictures")


def sampling_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that were given of those that say how to sample."""
    return {k: v for k, v in vars(args).items() if k in Sampling.__dataclass_fields__ and v is not None}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `gencnn visualize`."""
    parser.add_argument('model', nargs='?', help=MODEL)
    parser.add_argument(
        'node', nargs='*', help="classes (207, goldfish, 0-9) or 'layer:channel[@row,col]', 'layer*:0-15'"
    )
    parser.add_argument('--out', default='samples.png', help='PNG to write (default: %(default)s)')
    parser.add_argument('--like', metavar='PNG', help='repeat the run whose settings this PNG carries')
    add_sampling_arguments(parser)
    parser.add_argument('--compile', action='store_true', default=None, help='run the network through torch.compile')
    parser.add_argument('--animate', metavar='FILE', help='also write the course of the chains as .gif or .webp')


def repeat_settings(path: str) -> dict[str, Any]:
    """The settings of a PNG, checked to be repeatable from the command line.

    Raises:
        ValueError: Something that determines the pixels cannot be had by name.
    """
    older = {'compile': False, 'preset': None, 'views': None, 'schedule': None}  # what the first pictures do not say
    old = older | read_metadata(path).get('settings', {})
    missing = [k for k in ('model', 'nodes', 'n', 'steps', 'reference', 'temperature', 'size', 'seed') if k not in old]
    if missing:
        raise ValueError(f'{path!r} does not say its {", ".join(missing)}: it cannot be repeated')
    if old.get('regime') == 'gallery' and old['views'] is None:
        raise ValueError(f'{path!r} is from before gallery pictures had random views: draw it anew, without --like')
    if old['views']:
        old['views'] = [Views()._asdict() | views for views in old['views']]  # the first ones were not shrunk
    if not is_current(old):
        raise ValueError(f'{path!r} was drawn by another schedule: draw it anew, without --like')
    if old['reference'] not in ('natural', 'white'):
        raise ValueError(f'{path!r} was drawn with a reference of its own, {old["reference"]!r}: repeat it from Python')
    return old


def _check_kwargs(args: argparse.Namespace, old: dict[str, Any], model: str) -> None:
    """Refuses other --model-kwargs than those that a picture tells of, unless the model is one that has its own."""
    told = old.get('model_kwargs')
    alike = model == old['model'] or all(timm.is_model(name.split('.')[0]) for name in (model, old['model']))
    if told and alike and told != kwargs_told(args).get('model_kwargs'):
        raise ValueError(
            f'{args.like!r} was drawn from another network of the weights of {model!r}: give --model-kwargs '
            f'{shlex.join(told)}'
        )


def _early(settings: dict[str, Any]) -> int:
    """How many nodes of a picture were read before an activation, which the first versions did less often."""
    return sum('read before the activation' in note for note in settings.get('notes', ()))


def main(args: argparse.Namespace) -> None:
    """Runs `gencnn visualize`."""
    if not args.out.lower().endswith('.png'):
        raise ValueError(f'--out {args.out!r}: give a file name that ends in .png')
    if args.animate and not args.animate.lower().endswith(('.gif', '.webp')):
        raise ValueError(f'--animate {args.animate!r}: give a file name that ends in .gif or .webp')
    kwargs = sampling_arguments(args)
    model, nodes, old = args.model, args.node, None
    if args.like:
        if given := [*nodes, *kwargs]:
            raise ValueError(f'--like repeats a run as it was: leave out {", ".join(given)}')
        old = repeat_settings(args.like)
        model, nodes = model or old['model'], old['nodes']
        _check_kwargs(args, old, model)
        fixed = ('reference', 'temperature', 'tilt') if old['preset'] else ()
        kwargs = {k: v for k, v in old.items() if k in Sampling.__dataclass_fields__ and k not in fixed}
        kwargs |= {'size': tuple(old['size']), 'dtype': getattr(torch, old['dtype']) if old.get('dtype') else None}
    elif not model or not nodes:
        raise ValueError('give a model and at least one node, or --like FILE.png')
    net = load_model(model, **weight_arguments(args))
    if not old:
        nodes = [name for node in nodes for name in expand(net, node, size=args.size)]
        if len(nodes) > 1:
            kwargs.setdefault('n', 10)
    if old and old.get('weights') != weights_digest(net):
        raise ValueError(
            f'{args.like!r} was drawn from other weights than {model!r} has: give MODEL or --checkpoint that has theirs'
        )
    for path in filter(None, (args.out, args.animate)):
        check_writable(path)
    move(net, default_device(args.device))
    samples = visualize(net, nodes, frames=32 if args.animate else 0, **kwargs)
    samples.settings |= {'model': model} | kwargs_told(args)
    if old:
        new = json.loads(json.dumps(samples.settings))
        untold = 'model', 'model_kwargs', 'versions', 'notes', 'request'  # the last is a gallery's
        told = [k for k in old | new if k not in untold]
        differing = [k for k in told if old.get(k) != new.get(k)]
        if _early(old) != _early(new):
            differing.append('where its units are read')
        if differing:
            raise ValueError(f'{args.like!r} cannot be repeated from here: {", ".join(differing)} would differ')
    samples.save(args.out)
    if args.animate:
        samples.animate(args.animate)
    print(samples.summary())
    for note in dict.fromkeys(samples.settings['notes']):
        print(f'note: {note}')
    print(f'{samples.verdict}\nwrote {args.out}')
