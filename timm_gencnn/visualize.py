"""`visualize(model, node)`: synthetic images for any node of a trained network, and the `gencnn visualize` command."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import timm
import torch
from torch import Tensor, nn

from . import chains, diagnostics, hmc
from .layouts import without_checkpointing
from .model_config import own_config
from .names import Node
from .nodes import resolve
from .presets import PRESETS, Preset, find_preset
from .reference import Reference, White, natural_for
from .registry import check_checkpoint, check_name
from .samples import Samples, check_writable, read_metadata, to_rgb
from .scores import ScoreFunction
from .views import PHOTOGRAPHS, PLAIN, Viewer, Views, views_of

STEPS = 512
GALLERY_TEMPERATURE = 0.005  # measured with the schedule of `chains.Schedule`
LARGEST = 1e30  # tilt and temperature: squares of what they scale must stay in float32's range
PIXELS_PER_BATCH = 2**22  # image values in one forward pass: about 28 colour images of 224 x 224


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
        model: A name for `timm.create_model` (loaded with its pretrained weights) or any module in eval mode that takes
            images [N, C, H, W].
        node: A class by index or name, `'layer:channel'`, `'layer:channel@row,col'`, a weighted sum, a callable, or a
            list of these (see `timm_gencnn.nodes`).
        n: Images per node, at least 1; each is a chain of its own.
        steps: Budget of image gradients per chain; None is 512, or that of the preset.
        reference: `'natural'`, `'white'` or an object like those of `timm_gencnn.reference`.
        temperature: T > 0; None is the gallery default.
        tilt: Factor on the score, > 0; None is 1 at `temperature=1`, else automatic: each chain's is the one at which
            the score asks for images as far from the mean as the reference's own, or half as far for classes of colour
            images (`diagnostics['tilt']` has them).
        size: Image side or (height, width) in pixels; None is that of a reference of one's own, else the model's own
            or, for channels of early convolutions alone, one and a half times their receptive field.
        seed: Non-negative integer; the same seed gives the same pixels on the same machine.
        device: Where to run, with the model moved there; None is where the model is.
        dtype: `torch.bfloat16` or `torch.float16` runs the network under autocast; in the exact regime only for the
            kicks inside a trajectory, so that the accept test stays in float32.
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
    numbers = {'n': n, 'steps': steps, 'seed': seed, 'frames': frames}
    paper, temperature, tilt = settle(reference, temperature, tilt, dtype, preset, **numbers)
    regime = 'exact' if temperature == 1 and tilt == 1 else 'gallery'
    net, name, where = load(model, device)
    nodes: list[Any] = list(node) if isinstance(node, (list, tuple, range)) else [node]

    began = time.perf_counter()
    with frozen(net):
        score = resolve(net, nodes, size=sides(size, reference))
        if paper:
            reference = White((score.in_chans, *score.size), paper.normalised_sigma(own_config(net)))
        q = make_reference(reference, net, score.in_chans, score.size, where)
        if steps is None:
            steps = paper.gradients(set(score.kinds) == {'class'}) if paper else STEPS
        views = [views_of(kind, score.in_chans) for kind in score.kinds] if regime == 'gallery' else None
        weights = weights_digest(net)
        run = _Run(
            net, nodes, score, q, views, n, steps, temperature, tilt, seed, where, dtype, compile, frames, paper,
            progress,
        )  # fmt: skip
        images, trace, per_image, gradients, film = run.run()
    diagnosed: dict[str, Any] = dict(per_image)
    if regime == 'exact':
        by_node = trace.split(n, dim=1)
        diagnosed['r_hat'] = torch.tensor([diagnostics.r_hat(t) for t in by_node]).max().item()  # NaN stays NaN
        diagnosed['ess'] = torch.tensor([diagnostics.bulk_ess(t) for t in by_node]).min().item()
    else:
        diagnosed['r_hat'] = diagnosed['ess'] = math.nan
    diagnosed['gradients'] = gradients
    diagnosed['seconds'] = round(time.perf_counter() - began, 3)
    notes = [note for note in score.notes if note]
    if stuck := _stuck(per_image['divergences'], len(trace)):
        warnings.warn(stuck, stacklevel=3)
        notes.append(stuck)
    settings = {
        'model': name,
        'weights': weights,
        'nodes': [x if isinstance(x, (int, str)) else label for x, label in zip(nodes, score.names, strict=True)],
        'n': n,
        'steps': steps,
        **q.settings(),
        'temperature': temperature,
        'tilt': tilt,
        'size': list(score.size),
        'seed': seed,
        'dtype': None if dtype is None else str(dtype).removeprefix('torch.'),
        'compile': compile,
        'regime': regime,
        'views': [v._asdict() for v in views] if views else None,
        'schedule': chains.Schedule()._asdict() if views else None,
        'preset': preset,
        'notes': notes,
        'versions': _versions(),
    }
    return Samples(images, score.names, settings, diagnosed, trace, film)


def settle(
    reference: Any,
    temperature: float | None,
    tilt: float | None,
    dtype: torch.dtype | None,
    preset: str | None,
    **numbers: Any,
) -> tuple[Preset | None, float, float | None]:
    """Preset, temperature and tilt that a call means, after a look at all arguments that need no network.

    T = 1 alone means the model itself, tilt = 1; otherwise a tilt of None is automatic.

    Raises:
        ValueError: An argument out of its range, or at odds with the preset.
    """
    paper = find_preset(preset) if preset is not None else None
    if paper:
        if reference != 'natural' or temperature not in (None, 1) or tilt not in (None, 1):
            raise ValueError(f'preset={preset!r} fixes reference, temperature and tilt: leave them out')
        temperature = 1.0
    if temperature is None:
        temperature = GALLERY_TEMPERATURE
    if tilt is None and temperature == 1:
        tilt = 1.0
    check(temperature=temperature, tilt=tilt, **numbers)
    if dtype not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f'dtype must be None, torch.bfloat16 or torch.float16, got {dtype!r}')
    return paper, temperature, tilt


def load(model: str | nn.Module, device: str | torch.device | None) -> tuple[nn.Module, str, torch.device]:
    """The network that a user means, its name, and the device it is on.

    Raises:
        ValueError: It cannot be had, is no module, or the device cannot be used.
    """
    net = load_model(model) if isinstance(model, str) else model
    if not isinstance(net, nn.Module):
        raise ValueError(f'model must be a name or a torch module, got {type(net).__name__}')
    if device is not None:
        move(net, device)
    where = next((p.device for p in net.parameters()), torch.device('cpu'))
    return net, model if isinstance(model, str) else _describe(net), where


def sides(size: int | tuple[int, int] | None, reference: str | Reference) -> tuple[int, int] | None:
    """Height and width that a call means: those of the reference, where it alone has them; None leaves them open."""
    if size is None and not isinstance(reference, str) and len(reference.shape) == 3:
        return reference.shape[1], reference.shape[2]
    return (size, size) if isinstance(size, int) else size


def chunk(reference: Reference) -> int:
    """Images in one forward pass."""
    return max(1, PIXELS_PER_BATCH // math.prod(reference.shape))


def check(**values: Any) -> None:
    """Ranges of the numbers that a user gives.

    Raises:
        ValueError: A number out of its range.
    """
    for name, low in ('n', 1), ('steps', 1), ('levels', 2), ('seed', 0), ('frames', 0):
        if name not in values or (name == 'steps' and values[name] is None):
            continue
        if not isinstance(values[name], int) or isinstance(values[name], bool) or values[name] < low:
            raise ValueError(f'{name} must be an integer >= {low}, got {values[name]!r}')
    for name in 'temperature', 'tilt':
        value = values.get(name)
        if not (value is None or (isinstance(value, (int, float)) and 1 / LARGEST <= value <= LARGEST)):
            bounds = f'from {1 / LARGEST:.0e} to {LARGEST:.0e}'
            raise ValueError(f'{name} must be a positive number, got {value!r} ({bounds}; 1 is the model itself)')


def load_model(name: str, **kwargs: Any) -> nn.Module:
    """`timm.create_model(name, pretrained=True)` in eval mode, with clear errors.

    Args:
        name: A registered name such as 'gencnn_resnet50' or 'resnet50.a1_in1k', 'hf-hub:USER/REPO' or
            'local-dir:FOLDER'.
        **kwargs: Passed on to `timm.create_model`.

    Raises:
        ValueError: The model is unknown, has no pretrained weights, or they cannot be read.
    """
    check_name(name)
    arch = name.split('.')[0]
    if ':' not in name and not kwargs.get('checkpoint_path') and not timm.models.is_model_pretrained(name):
        tags = timm.list_pretrained(f'{arch}.*')
        hint = f'pretrained are {", ".join(tags)}' if tags else 'pass a trained module, or a checkpoint'
        raise ValueError(f'{name!r} has no pretrained weights, and an untrained network has nothing to show: {hint}')
    if kwargs.get('checkpoint_path'):
        check_checkpoint(kwargs['checkpoint_path'])
    try:
        return timm.create_model(name, pretrained=not kwargs.get('checkpoint_path'), **kwargs).eval()
    except ValueError:
        raise
    except Exception as e:  # downloads and files fail in many ways; all mean that the weights could not be had
        reason = ' '.join(f'{type(e).__name__}: {e}'.split())[:500]
        raise ValueError(f'cannot load {name!r}: {reason}') from e


def move(model: nn.Module, device: str | torch.device) -> None:
    """Moves a model in place.

    Raises:
        ValueError: There is no such device here, or it has no float64, in which energies are summed (mps).
    """
    try:
        torch.zeros((), dtype=torch.float64, device=device).item()  # the meta device holds no numbers
        model.to(device)
    except (RuntimeError, TypeError, AssertionError) as e:
        raise ValueError(f"device {str(device)!r} cannot be used, try 'cpu': {str(e).splitlines()[0]}") from None


def weights_digest(model: nn.Module) -> str:
    """First 16 hexadecimal digits of the SHA-256 of a model's state_dict: names, shapes, types and values.

    What is no tensor, such as a module's extra state, counts by its `repr`.
    """
    sha = hashlib.sha256()
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            sha.update(f'{name} {value!r}'.encode())
            continue
        value = value.detach().cpu().contiguous()
        sha.update(f'{name} {tuple(value.shape)} {value.dtype}'.encode())
        sha.update(value.flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b'')
    return sha.hexdigest()[:16]


def _describe(model: nn.Module) -> str:
    cfg = own_config(model)
    arch, tag = cfg.get('architecture'), cfg.get('tag')
    return f'{arch}.{tag}' if arch and tag else arch or type(model).__name__


def _versions() -> dict[str, str]:
    from . import __version__

    return {'timm_gencnn': __version__, 'timm': timm.__version__, 'torch': torch.__version__}


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient inside, which saves a third of the work, and no activation is computed twice.

    All is as it was on the way out.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in trainable:
            p.requires_grad_(False)
        with without_checkpointing(model):
            yield
    finally:
        for p in trainable:
            p.requires_grad_(True)


@contextmanager
def channels_last(model: nn.Module) -> Iterator[None]:
    """Weights of convolutions lie in channels-last order inside, and so do the images that they put out.

    Faster or as fast on most networks, slower on a batch of very small images; the values are the same, and on the way
    out so are the tensors.
    """
    kept = [(p, p.data) for p in model.parameters() if p.ndim == 4]
    try:
        for p, data in kept:
            p.data = data.contiguous(memory_format=torch.channels_last)
        yield
    finally:
        for p, data in kept:
            p.data = data


def _needs_contiguous(e: BaseException) -> bool:
    """Whether a network failed on a `view` of a map that is in channels-last order."""
    return 'view size is not compatible' in str(e) or 'Cannot view a tensor' in str(e)


def make_reference(
    reference: str | Reference, model: nn.Module, channels: int, size: tuple[int, int], device: torch.device
) -> Reference:
    """The reference by name, with the mean and standard deviation by which the model normalises its images.

    Raises:
        ValueError: An unknown name, a reference of another shape than the model's images, or settings that are no JSON.
    """
    shape = (channels, *size)
    if not isinstance(reference, str):
        if tuple(reference.shape) != shape:
            raise ValueError(f'the reference draws images of shape {tuple(reference.shape)}, the model takes {shape}')
        try:
            json.dumps(reference.settings())
        except (TypeError, ValueError) as e:
            raise ValueError(f'settings() of the reference must be numbers, strings and lists, for JSON: {e}') from None
        return reference
    if reference == 'white':
        return White(shape)
    if reference == 'natural':
        return natural_for(own_config(model), channels, size, device)
    raise ValueError(f"unknown reference {reference!r}: 'natural', 'white' or an object of timm_gencnn.reference")


@dataclass
class _Run:
    """All chains of one call, in blocks of images that fit into memory."""

    model: nn.Module
    nodes: list[Node]
    score: ScoreFunction
    reference: Reference
    views: list[Views] | None  # of each node; None in the exact regime
    n: int
    steps: int
    temperature: float
    tilt: float | None
    seed: int
    device: torch.device
    dtype: torch.dtype | None
    compile: bool
    frames: int
    paper: Preset | None
    progress: bool

    def __post_init__(self) -> None:
        self.batch = chunk(self.reference)
        self.channels_last = True

    def blocks(self) -> list[tuple[list[int], range]]:
        """(nodes, chains of each node) such that their product fits into a batch."""
        count = len(self.nodes)
        groups = [list(range(i, min(i + self.batch, count))) for i in range(0, count, self.batch)]
        blocks = []
        for group in groups:
            per_node = max(1, self.batch // len(group))
            blocks += [(group, range(i, min(i + per_node, self.n))) for i in range(0, self.n, per_node)]
        return blocks

    def run(self) -> tuple[Tensor, Tensor, dict[str, list[Any]], int, Tensor | None]:
        from tqdm.auto import tqdm

        while True:
            try:
                blocks = self.blocks()
                total = self.steps * len(blocks)
                with tqdm(total=total, unit='grad', disable=not self.progress, desc='sampling') as bar:
                    parts = []
                    for group, members in groupby(blocks, key=lambda block: block[0]):
                        with self.scoring(group) as score:
                            parts += [self.block(score, group, some, bar) for _, some in members]
                return self.gather(blocks, parts)
            except (torch.OutOfMemoryError, RuntimeError) as e:
                if self.channels_last and _needs_contiguous(e):
                    self.channels_last = False
                    continue
                if self.compile and isinstance(e, torch._dynamo.exc.TorchDynamoException):
                    reason = str(e).strip().splitlines()[0]
                    raise ValueError(f'torch.compile cannot take this model whole, leave compile out: {reason}') from e
                if not _out_of_memory(e):
                    raise
                if self.batch == 1:
                    sides = ' x '.join(map(str, self.score.size))
                    raise ValueError(f'out of memory with one {sides} image at a time: give a smaller size') from e
                self.batch = max(1, min(self.batch, len(self.nodes) * self.n) // 2)
                if self.device.type == 'cuda':
                    torch.cuda.empty_cache()
            warnings.warn(f'out of memory: starting again with {self.batch} images at a time', stacklevel=4)

    @contextmanager
    def scoring(self, group: list[int]) -> Iterator[ScoreFunction]:
        """The scores of a group of nodes, with the network made fast inside."""
        whole = len(group) == len(self.nodes)
        score = self.score if whole else resolve(self.model, [self.nodes[k] for k in group], size=self.score.size)
        layout = channels_last(self.model) if self.channels_last else nullcontext()
        with layout, score.compiled() if self.compile else nullcontext():
            yield score

    def block(
        self, node_score: ScoreFunction, group: list[int], some: range, bar: Any
    ) -> tuple[chains.Trace, Tensor, Tensor, list[Tensor]]:
        """Runs one block: its trace, final scores [m], pixels [m, 3, H, W] and frames."""
        ids = [k * self.n + i for k in group for i in some]

        def score(z: Tensor) -> Tensor:
            return node_score(self.reference(z))

        streams = hmc.Streams(self.seed, ids, self.device)
        film: list[Tensor] = []
        last = [time.monotonic(), 0]

        def report(gradients: int, state: hmc.State, acceptance: Tensor | None) -> None:
            if len(film) < self.frames - 1 and gradients * self.frames >= (len(film) + 1) * self.steps:
                film.append(to_rgb(self.reference.pixels(state.z)))
            if time.monotonic() - last[0] > 0.5:  # reading the score waits for the device: not at every step
                shown = {'score': state.score} | ({} if acceptance is None else {'acceptance': acceptance})
                bar.set_postfix(**{k: f'{v.mean().item():.2f}' for k, v in shown.items()}, refresh=False)
                bar.update(gradients - last[1])
                last[:] = [time.monotonic(), gradients]

        origin = self.paper is not None and self.paper.origin
        try:
            state = chains.start(score, self.reference.shape, streams, origin=origin)
        except chains.StartError as e:
            names = dict.fromkeys(repr(node_score.names[i // len(some)]) for i in e.chains)
            raise ValueError(f'{", ".join(names)}: {e}') from None
        budget: dict[str, Any] = {'steps': self.steps, 'report': report}
        rough = self.rough(node_score) if self.dtype else None
        if self.views is None:
            kick = None if rough is None else lambda z: rough(self.reference(z))
            if self.paper:
                budget |= {'n_leapfrog': self.paper.n_leapfrog, 'step_size': self.paper.angle}
            trace = chains.sample_exact(score, state, streams, kick=kick, **budget)
        else:
            views = [self.views[k] for k in group for _ in some]
            viewer = Viewer(views, self.seed, ids, self.device)
            far = torch.tensor([(v.strength, v.move) for v in views], dtype=torch.float64, device=self.device)

            def seen(z: Tensor) -> Tensor:
                return (rough or node_score)(viewer(self.reference(z)))

            budget |= {'strength': far[:, 0], 'move': far[:, 1]}
            trace = chains.sample_gallery(seen, state, streams, temperature=self.temperature, tilt=self.tilt, **budget)
        bar.update(self.steps - last[1])
        final, _ = hmc.score_and_grad(score, trace.z)  # the one pass that has been compiled is that with a gradient
        pixels = to_rgb(self.reference.pixels(trace.z))
        film.append(pixels)
        return trace, final, pixels, film

    def rough(self, score: hmc.Score) -> hmc.Score:
        """The same score of images under autocast."""

        def cast(images: Tensor) -> Tensor:
            with torch.autocast(self.device.type, self.dtype):
                return score(images).float()

        return cast

    def gather(self, blocks: list, parts: list) -> tuple[Tensor, Tensor, dict[str, list[Any]], int, Tensor | None]:
        """Puts the blocks' chains into the order of nodes."""
        ids = [k * self.n + i for group, some in blocks for k in group for i in some]
        order = torch.tensor(ids).argsort()
        join = lambda pick, dim=0: torch.cat([pick(*p).cpu() for p in parts], dim).index_select(dim, order)  # noqa: E731
        per_image = {
            'score': join(lambda trace, final, *_: final).tolist(),
            'acceptance': join(lambda trace, *_: trace.acceptance).tolist(),
            'tilt': join(lambda trace, *_: trace.tilt).tolist(),
            'step_size': join(lambda trace, *_: trace.step_size).tolist(),
            'energy_error': join(lambda trace, *_: trace.energy_error).tolist(),
            'divergences': join(lambda trace, *_: trace.divergences).tolist(),
        }
        images = join(lambda trace, final, pixels, film: pixels)
        trace = join(lambda trace, *_: trace.scores, 1)
        film = join(lambda *p: torch.stack(p[3]), 1) if self.frames else None
        return images, trace, per_image, max(p[0].gradients for p in parts), film


def _stuck(divergences: list[int], draws: int) -> str:
    """What to tell of chains that could take less than half of their moves, or ''."""
    stuck = sum(2 * count > draws for count in divergences)
    if not stuck:
        return ''
    return (
        f'{stuck} of {len(divergences)} images are hardly more than noise of the reference: most moves of their chains '
        'were refused, since the score or its gradient was not finite or far too steep (lower the tilt, use float32)'
    )


def _out_of_memory(e: BaseException) -> bool:
    return isinstance(e, torch.OutOfMemoryError) or 'not enough memory' in str(e) or "can't allocate memory" in str(e)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say how to sample; none given means the defaults of `visualize`."""
    parser.add_argument('-n', type=int, help='images per node')
    parser.add_argument('--steps', type=int, help='image gradients per chain (default: 512)')
    parser.add_argument('--reference', choices=['natural', 'white'], help='(default: natural)')
    parser.add_argument('--temperature', type=float, help='1: exact samples of the model')
    parser.add_argument('--tilt', type=float, help='factor on the score')
    parser.add_argument('--size', type=int, help="image side in pixels (default: the model's, less for early layers)")
    parser.add_argument('--seed', type=int, help='(default: 0)')
    parser.add_argument('--preset', choices=list(PRESETS), help="the settings of the paper's own pictures")


def sampling_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The flags of `add_sampling_arguments` that were given."""
    names = ('n', 'steps', 'reference', 'temperature', 'tilt', 'size', 'seed', 'preset')
    return {k: getattr(args, k) for k in names if getattr(args, k) is not None}


def default_device(name: str | None) -> str:
    """The named device, else cuda if there is one, else cpu."""
    return name or ('cuda' if torch.cuda.is_available() else 'cpu')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `gencnn visualize`."""
    parser.add_argument('model', nargs='?', help='a timm model name, hf-hub:USER/REPO or local-dir:FOLDER')
    parser.add_argument('node', nargs='*', help="classes (207, goldfish) or 'layer:channel[@row,col]'")
    parser.add_argument('--out', default='samples.png', help='PNG to write (default: %(default)s)')
    parser.add_argument('--like', metavar='PNG', help='repeat the run whose settings this PNG carries')
    parser.add_argument('--checkpoint', metavar='FILE', help='weights for the model')
    add_sampling_arguments(parser)
    parser.add_argument('--device', help='cpu or cuda (default: cuda if there is one)')
    parser.add_argument('--compile', action='store_true', help='run the network through torch.compile')
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
    known = PHOTOGRAPHS._asdict(), PLAIN._asdict()
    moved = old['schedule'] != chains.Schedule()._asdict() or any(views not in known for views in old['views'] or ())
    if old.get('regime') == 'gallery' and moved:
        raise ValueError(f'{path!r} was drawn by another schedule: draw it anew, without --like')
    if old['reference'] not in ('natural', 'white'):
        raise ValueError(f'{path!r} was drawn with a reference of its own, {old["reference"]!r}: repeat it from Python')
    return old


def main(args: argparse.Namespace) -> None:
    """Runs `gencnn visualize`."""
    if not args.out.lower().endswith('.png'):
        raise ValueError(f'--out {args.out!r}: give a file name that ends in .png')
    if args.animate and not args.animate.lower().endswith(('.gif', '.webp')):
        raise ValueError(f'--animate {args.animate!r}: give a file name that ends in .gif or .webp')
    kwargs = sampling_arguments(args)
    model, nodes, old = args.model, args.node, None
    if args.like:
        given = [*(['MODEL'] if model else []), *kwargs, *(['compile'] if args.compile else [])]
        if given:
            raise ValueError(f'--like repeats a run as it was: leave out {", ".join(given)}')
        old = repeat_settings(args.like)
        model, nodes = old['model'], old['nodes']
        kwargs = {k: old.get(k) for k in ('n', 'steps', 'reference', 'temperature', 'tilt', 'seed')}
        kwargs |= {k: old[k] for k in ('preset', 'compile')}
        if kwargs['preset'] is not None:
            kwargs = {k: v for k, v in kwargs.items() if k not in ('reference', 'temperature', 'tilt')}
        kwargs |= {'size': tuple(old['size']), 'dtype': getattr(torch, old['dtype']) if old.get('dtype') else None}
    elif not model or not nodes:
        raise ValueError('give a model and at least one node, or --like FILE.png')
    elif len(nodes) > 1:
        kwargs.setdefault('n', 10)
    net = load_model(model, **({'checkpoint_path': args.checkpoint} if args.checkpoint else {}))
    if old and old.get('weights') != weights_digest(net):
        raise ValueError(f'{args.like!r} was drawn from other weights than {model!r} has: name theirs by --checkpoint')
    for path in filter(None, (args.out, args.animate)):
        check_writable(path)
    kwargs.setdefault('compile', args.compile)
    move(net, default_device(args.device))
    samples = visualize(net, nodes, frames=32 if args.animate else 0, **kwargs)
    samples.settings['model'] = model
    if old:
        new = json.loads(json.dumps(samples.settings))
        differing = [k for k in new if k not in ('versions', 'notes') and old.get(k) != new[k]]
        if differing:
            raise ValueError(f'{args.like!r} cannot be repeated from here: {", ".join(differing)} would differ')
    samples.save(args.out)
    if args.animate:
        samples.animate(args.animate)
    print(samples.summary())
    print(f'{samples.verdict}\nwrote {args.out}')
