"""`log_z(model, node)`: the normalising constant of a node's model, by annealed importance sampling."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import ais, hmc
from .blocks import chunk, lighter
from .names import Node
from .networks import frozen, load, without_autocast
from .nodes import resolve
from .reference import Reference
from .sampling import Sampling, check_integer, plain


@torch.inference_mode(False)
def log_z(
    model: str | nn.Module,
    node: Node,
    *,
    n: int = 64,
    levels: int = 100,
    reference: str | Reference = 'natural',
    size: int | tuple[int, int] | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> ais.LogZ:
    """Estimates log Z = log E_q[exp f(x)] of a node: the constant in its model p(x) = exp(f(x)) q(x) / Z.

    Annealed importance sampling (Neal 2001) with the transitions of the exact regime. With it `f(x) - log Z` is the log
    density of an image relative to the reference. This q is the parametric reference of the pictures, not the training
    images: for those see `GenerativeMixin.estimate_log_z`.

    Args:
        model: As for `visualize`.
        node: A single node, as for `visualize`, whose f may be another than the model's output: a class behind a last
            activation is read before it (see `timm_gencnn.nodes`).
        n: Independent chains, at least 2.
        levels: Steps of the tilt from 0 to 1, at least 2; each costs four image gradients per chain.
        reference: As for `visualize`.
        size: Image side or (height, width) in pixels; None as for `visualize`.
        seed: Non-negative integer.
        device: Where to run, with the model moved there; None is where the model is.
        progress: Whether to show a progress bar.

    Returns:
        The estimate with its standard error. Where its `ess` is a small part of n, raise `levels`.

    Raises:
        ValueError: As `visualize`, or fewer than two chains or levels.
    """
    from tqdm.auto import tqdm

    levels, asked = plain(levels), Sampling(n=n, reference=reference, size=size, seed=seed)
    check_integer('levels', levels, 2)
    if isinstance(node, (list, tuple, range)):
        raise ValueError(f'log Z is that of one node, got the list {node!r}: call once for each')
    net, _, where = load(model, device)
    with frozen(net), without_autocast(where):
        score = resolve(net, [node], size=asked.sides())
        q = asked.make_reference(net, score.in_chans, score.size, where)
        batch, total = chunk(q, where), asked.n * ais.gradients(levels)
        while True:
            try:
                with tqdm(total=total, unit='grad', disable=not progress, desc='log Z') as bar:

                    def f(z: Tensor) -> Tensor:
                        bar.update(len(z))
                        return score(q(z))

                    streams = hmc.Streams(asked.seed, range(asked.n), where)
                    return ais.log_z(f, q.shape, streams, levels, batch=batch)
            except RuntimeError as e:
                batch = lighter(e, min(batch, asked.n), score.size, stacklevel=4)
