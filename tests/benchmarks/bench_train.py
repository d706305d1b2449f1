"""What generative training costs, side by side in one run.

    python tests/benchmarks/bench_train.py [step] [loop] [loader] [ranks] [--device cuda]

step   a generative step against a discriminative one: ResNet-18, batch 256, 32 px; time and peak memory
loop   an epoch of `gencnn train` against a bare loop of timm's ClassificationTask and create_loader
loader an epoch of images of 32 px, without a network: --data-on-device against --cache-images
ranks  the softmax over the images of all ranks: O(C) reductions against gathering all logits (gloo)

Times on the CPU are CPU seconds of one thread; the ratios are medians and quartiles over rounds, beside those of the
discriminative side against itself (A/A): the noise.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask

from timm_gencnn import train
from timm_gencnn.loss import log_mean_exp
from timm_gencnn.task import GenerativeTask


def seconds(f: Callable[[], object], device: torch.device) -> float:
    if device.type == 'cuda':
        torch.cuda.synchronize()
        start = time.perf_counter()
        f()
        torch.cuda.synchronize()
        return time.perf_counter() - start
    start = time.process_time()
    f()
    return time.process_time() - start


def compare(name: str, ours: Callable, theirs: Callable, repeats: int, device: torch.device, rounds: int = 9) -> None:
    """Print the least time of each side, and the ratio of the sides with its quartiles over the rounds.

    A round makes ours, theirs and a second instance of theirs (A/A: the noise) anew, since where the memory of an
    instance lies makes a per cent or two, lets them take turns, and keeps the least time of each: other work on the
    machine only ever adds.

    Args:
        name: What is compared.
        ours: Makes a function to be timed.
        theirs: Likewise, the other side.
        repeats: Times that a round runs each.
        device: Where they run.
        rounds: How often they are made.
    """
    least = []
    for i in range(rounds):
        order = [(i + j) % 3 for j in range(3)]
        sides = {k: (ours, theirs, theirs)[k]() for k in order}
        for k in order:
            sides[k]()
        times = [[seconds(sides[k], device) for k in order] for _ in range(repeats)]
        least.append([min(row[order.index(k)] for row in times) for k in range(3)])
    a, b, _ = (min(side) for side in zip(*least, strict=True))
    print(f'{name:46s} {a:8.4f} s  {b:8.4f} s', end='')
    for label, k in (('ratio', 0), ('A/A', 2)):
        low, middle, high = statistics.quantiles([times[k] / times[1] for times in least], n=4)
        print(f'  {label} {middle:.3f} [{low:.3f}, {high:.3f}]', end='')
    print(flush=True)


def make_step(phase: str, device: torch.device, batch: int = 256) -> Callable[[], None]:
    torch.manual_seed(0)
    model = timm.create_model('resnet18', num_classes=1000).to(device)
    task: ClassificationTask
    if phase == 'DG':
        task = ClassificationTask(model, device=device, verbose=False)
    else:
        task = GenerativeTask(model, phase=phase, device=device, verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    x, y = torch.randn(batch, 3, 32, 32, device=device), torch.randint(1000, (batch,), device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == 'cuda'):
            loss = task(x, y)['loss']
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak_memory(phase: str, device: torch.device) -> float:
    """MiB: of the allocator on a GPU, resident set of a fresh process on the CPU."""
    if device.type == 'cuda':
        step = make_step(phase, device)
        step()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() / 2**20
    context = mp.get_context('spawn')
    queue = context.SimpleQueue()
    process = context.Process(target=_resident, args=(phase, queue))
    process.start()
    result = queue.get()
    process.join()
    return result


def _resident(phase: str, queue) -> None:
    import resource

    torch.set_num_threads(1)
    step = make_step(phase, torch.device('cpu'))
    step(), step()
    queue.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def bench_step(device: torch.device) -> None:
    ours, theirs = (partial(make_step, phase, device) for phase in ('GG', 'DG'))
    compare('step, generative / discriminative', ours, theirs, 5 if device.type == 'cpu' else 20, device)
    a, b = peak_memory('GG', device), peak_memory('DG', device)
    print(f'{"peak memory, generative / discriminative":46s} {a:8.1f} MiB {b:6.1f} MiB ratio {a / b:.3f}', flush=True)


def bench_loop(device: torch.device) -> None:
    with _noise(28) as folder:
        for phase in ('DG', 'GG'):
            name = f'epoch of 512 images, gencnn train {phase} / timm DG'
            ours, theirs = partial(_our_epoch, folder, phase, device), partial(_bare_epoch, folder, device)
            compare(name, ours, theirs, 8, device)


def bench_loader(device: torch.device) -> None:
    with _noise(32) as folder:
        for crop in ('--train-crop-mode pad', '--scale 0.5 1'):
            flags = f'{crop} --color-jitter 0 --train-interpolation bilinear --reprob 0.5 --remode const --img-size 32'
            flags += ' --in-chans 3 --mean 0.5 --std 0.25'
            ours, theirs = (
                partial(_images_alone, folder, f'{flags} {kept}', device)
                for kept in ('--data-on-device', '--cache-images')
            )
            compare(f'512 images, {crop}, on device / cached', ours, theirs, 8, device)


@contextmanager
def _noise(size: int) -> Iterator[str]:
    """A folder of 512 pictures of noise of ten classes."""
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        for i in range(512):
            path = Path(folder, 'train', str(i % 10), f'{i}.png')
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (size, size), dtype=np.uint8)).save(path)
        yield folder


def _trainer(folder: str, flags: str, device: torch.device) -> train.Trainer:
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    flags += f' --model lenet -b 64 -j 0 --lr 0.001 --device {device} --smoothing 0 --epochs 100'
    flags += f' --data-dir {folder} --val-split= --output {folder}/out'
    args = parser.parse_args(flags.split())
    train.check_arguments(args)
    return train.Trainer(args, train.utils.init_distributed_device(args))


def _our_epoch(folder: str, phase: str, device: torch.device) -> Callable[[], object]:
    trainer = _trainer(folder, f'--phase {phase}', device)
    return lambda: trainer.train_one_epoch(0)


def _images_alone(folder: str, flags: str, device: torch.device) -> Callable[[], None]:
    loader = _trainer(folder, f'--phase DG {flags}', device).loader

    def epoch() -> None:
        for _ in loader:
            pass

    return epoch


def _bare_epoch(folder: str, device: torch.device) -> Callable[[], None]:
    dataset = create_dataset('', root=folder, split='train', input_img_mode='L')
    loader = create_loader(
        dataset, (1, 28, 28), 64, is_training=True, interpolation='random', mean=(0.1307,), std=(0.3081,),
        num_workers=0, device=device,
    )  # fmt: skip
    model = timm.create_model('lenet').to(device)
    task = ClassificationTask(model, device=device, verbose=False)
    optimizer = create_optimizer_v2(model, 'sgd', 0.001, 2e-5, 0.9)  # as the flags of `gencnn train` above

    def epoch() -> None:
        task.train()
        for x, y in loader:
            task(x, y)['loss'].backward()
            optimizer.step()
            optimizer.zero_grad()

    return epoch


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def _rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store{world}', rank=rank, world_size=world)
    n = 256
    for classes in (1000, 21_841):
        logits = torch.randn(n, classes, requires_grad=True)

        def reduce(logits=logits) -> torch.Tensor:
            return log_mean_exp(logits, distributed=True)

        def gather(logits=logits) -> torch.Tensor:
            return log_mean_exp(_AllGather.apply(logits))

        times: dict[str, list[float]] = {'reduce': [], 'gather': []}
        for _ in range(4):
            for name, f in (('reduce', reduce), ('gather', gather)):
                dist.barrier()
                start = time.perf_counter()
                torch.autograd.grad(f().sum(), logits)
                times[name].append(time.perf_counter() - start)
        if rank == 0:
            a, b = (min(t) for t in times.values())
            sent = 4 * 3 * classes / 1e6, 4 * n * classes * world * 2 / 1e6
            name = f'{world} ranks x {n} images, C = {classes}: O(C) / all-gather'
            print(f'{name:54s} {1e3 * a:8.1f} ms {1e3 * b:8.1f} ms ratio {a / b:.3f}', end='')
            print(f'  ({sent[0]:.2f} against {sent[1]:.0f} MB a rank)', flush=True)
    dist.destroy_process_group()


def bench_ranks() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for world in (2, 4):
            mp.start_processes(_rank, args=(world, folder), nprocs=world, start_method='fork')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('parts', nargs='*', default=['step', 'loop', 'loader', 'ranks'])
    parser.add_argument('--device', default='cpu')
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(args.device)
    print(f'torch {torch.__version__}, timm {timm.__version__}, {device}, 1 thread; columns: ours, theirs', flush=True)
    if 'ranks' in args.parts:  # forks, so before anything else runs
        bench_ranks()
    if 'step' in args.parts:
        bench_step(device)
    if 'loop' in args.parts:
        bench_loop(device)
    if 'loader' in args.parts:
        bench_loader(device)
