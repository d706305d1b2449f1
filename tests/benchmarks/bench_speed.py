"""What an image gradient costs in each sampler, over the bare forward + input-gradient loop, in one run.

    python tests/benchmarks/bench_speed.py                                     # CPU: ResNet-18, 128 px, 8 chains
    python tests/benchmarks/bench_speed.py --device cuda --size 224 --chains 32
    python tests/benchmarks/bench_speed.py --compile                           # ours through torch.compile, too

The rivals come from the package index, each in its own extra: bench-pyro, bench-torchebm, bench-lucent. hamiltorch is
not in the index: it runs where its authors' repository was installed by hand. One that cannot be imported is listed
with the reason.

All work on one class of the same network with the same number of chains and of leapfrog steps in a trajectory. Forward
passes are counted when images enter the network, gradients when they come back there, both for the whole batch. The
price is time over gradients, so that a tool pays for its further forward passes; then its ratio to the raw loop of the
same repetition, on the network as it is: median and quartiles. Times on the CPU are CPU seconds of one thread. The
reference (FFT and sigmoid, forward and backward) and the gallery's random views are part of our price.
"""

import argparse
import math
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import NamedTuple

import timm
import torch
from torch import Tensor, nn

from timm_gencnn import chains, hmc
from timm_gencnn.networks import affine_batch_norms, channels_last
from timm_gencnn.nodes import resolve
from timm_gencnn.reference import natural_for
from timm_gencnn.sampling import GALLERY_TEMPERATURE
from timm_gencnn.views import Viewer, views_of

NODE, LEAPFROG, STEP = 207, 8, 1e-3


class Counter(nn.Module):
    """The network, with its passes counted where the images enter."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.pretrained_cfg = network, network.pretrained_cfg
        self.forwards = self.gradients = 0

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images if torch.compiler.is_compiling() else self.count(images))

    def count(self, images: Tensor) -> Tensor:
        self.forwards += 1
        if images.requires_grad:
            images.register_hook(self._came_back)
        return images

    def _came_back(self, grad: Tensor) -> None:
        self.gradients += 1


class Setting(NamedTuple):
    model: Counter
    size: int
    chains: int
    gradients: int
    device: torch.device

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.chains, 3, self.size, self.size

    @property
    def trajectories(self) -> int:
        return self.gradients // LEAPFROG

    def start(self) -> Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(0)).to(self.device)

    def log_density(self, images: Tensor) -> Tensor:
        """log p of each image up to a constant, under white noise: what a user of the rivals writes."""
        return self.model(images)[:, NODE] - images.flatten(1).square().sum(1) / 2


# ---------------------------------------------------------------------------------------------------------------------
# One run of each tool: about `gradients` gradients


def raw(s: Setting) -> None:
    """The bare loop: forward, gradient of the images, and nothing else."""
    images = s.start()
    for _ in range(s.gradients):
        images = images.detach().requires_grad_()
        torch.autograd.grad(s.model(images)[:, NODE].sum(), images)


def raw_channels_last(s: Setting) -> None:
    """The same, with the convolutions' weights in channels-last order."""
    with channels_last(s.model):
        raw(s)


def _ours(s: Setting, sample: Callable[..., object], view: Callable[[Tensor], Tensor], compiled: bool) -> None:
    score, streams = _score(s.model, s.size), hmc.Streams(0, range(s.chains), s.device)
    q = natural_for(s.model.pretrained_cfg, 3, (s.size, s.size), s.device)
    seen = s.model.count if compiled else lambda images: images  # a compiled network does not count
    norms = nullcontext() if s.device.type == 'cpu' else affine_batch_norms(s.model)  # as in a call of `visualize`
    with channels_last(s.model), score.compiled() if compiled else norms:
        state = chains.start(lambda z: score(seen(q(z))), q.shape, streams)
        sample(lambda z: score(seen(view(q(z)))), state, streams)


@cache
def _score(model: Counter, size: int):
    """The node, named once, in the first run: that looks at two images, which no price has in it."""
    counts = model.forwards, model.gradients
    score = resolve(model, NODE, size=(size, size))
    model.forwards, model.gradients = counts
    return score


def exact(s: Setting, compiled: bool = False) -> None:
    sample = lambda *run: chains.sample_exact(*run, s.gradients, LEAPFROG)  # noqa: E731
    _ours(s, sample, lambda images: images, compiled)


def gallery(s: Setting, compiled: bool = False) -> None:
    sample = lambda *run: chains.sample_gallery(*run, s.gradients, GALLERY_TEMPERATURE)  # noqa: E731
    views = [views_of('class', 3, (s.size, s.size))] * s.chains
    _ours(s, sample, Viewer(views, 0, range(s.chains), s.device), compiled)


def pyro(s: Setting) -> None:
    """pyro.infer.mcmc.HMC with a potential: the chains are one joint state, accepted or rejected together."""
    from pyro.infer.mcmc import HMC, MCMC

    kernel = HMC(
        potential_fn=lambda params: -s.log_density(params['x']).sum(), step_size=STEP, num_steps=LEAPFROG,
        adapt_step_size=False, adapt_mass_matrix=False,
    )  # fmt: skip
    mcmc = MCMC(
        kernel, num_samples=s.trajectories, warmup_steps=0, initial_params={'x': s.start()}, disable_progbar=True
    )
    mcmc.run()


def hamiltorch(s: Setting) -> None:
    """hamiltorch.sample on one flat vector of all chains, accepted or rejected together."""
    import hamiltorch as tool

    tool.sample(
        log_prob_func=lambda x: s.log_density(x.view(s.shape)).sum(), params_init=s.start().flatten(),
        num_samples=s.trajectories, num_steps_per_sample=LEAPFROG, step_size=STEP, verbose=False,
    )  # fmt: skip


def torchebm(s: Setting) -> None:
    """torchebm's HamiltonianMonteCarlo: chains of flat vectors, accepted one by one."""
    from torchebm.core import BaseModel
    from torchebm.samplers import HamiltonianMonteCarlo

    class Energy(BaseModel):
        def forward(self, x: Tensor) -> Tensor:
            return -s.log_density(x.view(s.shape))

    sampler = HamiltonianMonteCarlo(Energy(device=s.device), STEP, n_leapfrog_steps=LEAPFROG, device=s.device)
    sampler.sample(s.start().flatten(1), n_steps=s.trajectories)


def lucent(s: Setting) -> None:
    """lucent's render_vis: Adam on an FFT parameterisation with its default transforms (no sampler)."""
    from lucent.optvis import objectives, param, render

    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        render.render_vis(
            s.model, objectives.channel('network_fc', NODE), lambda: param.image(s.size, batch=s.chains),
            thresholds=(s.gradients,), fixed_image_size=s.size, show_image=False, progress=False,
        )  # fmt: skip
    for module in s.model.modules():  # it leaves its hooks behind
        module._forward_hooks.clear()


# ---------------------------------------------------------------------------------------------------------------------
# Timing


class Price(NamedTuple):
    gradient: float  # seconds
    forwards: float  # per gradient


def price(run: Callable[[Setting], None], s: Setting) -> Price:
    s.model.forwards = s.model.gradients = 0
    clock = time.process_time
    if s.device.type == 'cuda':
        clock = time.perf_counter
        torch.cuda.synchronize()
    began = clock()
    run(s)
    if s.device.type == 'cuda':
        torch.cuda.synchronize()
    seconds = clock() - began
    return Price(seconds / s.model.gradients, s.model.forwards / s.model.gradients)


def nominal(name: str, s: Setting) -> float:
    """Leapfrog (or optimiser) steps that the tool was asked for."""
    if name in ('pyro HMC', 'hamiltorch', 'torchebm'):
        return s.trajectories * LEAPFROG
    return s.gradients


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='resnet18')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--size', type=int, default=128)
    parser.add_argument('--chains', type=int, default=8)
    parser.add_argument('--gradients', type=int, default=65, help='per run, at least 65')
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--compile', action='store_true', help='ours through torch.compile, too')
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = torch.device(args.device)
    network = timm.create_model(args.model).eval().requires_grad_(False)
    s = Setting(Counter(network).eval().to(device), args.size, args.chains, args.gradients, device)

    tools: dict[str, Callable[[Setting], None]] = {
        'raw loop': raw, 'raw loop, channels-last weights': raw_channels_last, 'ours, exact': exact,
        'ours, gallery': gallery,
    }  # fmt: skip
    if args.compile:
        tools |= {
            'ours, exact, compiled': lambda s: exact(s, compiled=True),
            'ours, gallery, compiled': lambda s: gallery(s, compiled=True),
        }
    tools |= {'pyro HMC': pyro, 'hamiltorch': hamiltorch, 'torchebm': torchebm, 'lucent': lucent}
    print(
        f'torch {torch.__version__}, timm {timm.__version__}, {args.model}, {args.chains} chains, {args.size} px, '
        f'{args.device}, {args.gradients} gradients x {args.repeats} repetitions'
    )
    warm = s._replace(gradients=65)
    failed: dict[str, str] = {}
    steps: dict[str, float] = {}
    for name, run in tools.items():
        try:
            began = time.perf_counter()
            price(run, warm)
            steps[name] = s.model.gradients / nominal(name, warm)
            if 'compiled' in name:
                print(f'{name}: first run with compilation {time.perf_counter() - began:.0f} s')
        except ImportError as e:
            failed[name] = f'not run: {e}'
    prices: dict[str, list[Price]] = {name: [] for name in tools if name not in failed}
    for i in range(args.repeats):
        for name in list(prices)[:: 1 if i % 2 else -1]:
            prices[name].append(price(tools[name], s))

    print('| tool | ms per gradient | ratio to the raw loop | gradients per step | forwards per gradient |')
    print('|---|---|---|---|---|')
    for name in tools:
        if name in failed:
            print(f'| {name} | {failed[name]} | | | |')
            continue
        seconds = [p.gradient for p in prices[name]]
        ratios = [a / b.gradient for a, b in zip(seconds, prices['raw loop'], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (math.nan, ratios[0], math.nan)
        print(
            f'| {name} | {1e3 * statistics.median(seconds):.1f} | {middle:.3f} [{low:.3f}, {high:.3f}] | '
            f'{steps[name]:.2f} | {prices[name][-1].forwards:.2f} |'
        )


if __name__ == '__main__':
    main()
