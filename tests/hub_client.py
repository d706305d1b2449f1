"""What the tests ask a Hub client to do, in a process of its own that imports everything with HF_ENDPOINT set."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import resource
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

TOKEN = 'hf_' + 'AliceSecretToken0123456789' * 2
OTHER_TOKEN = 'hf_' + 'BobSecretToken9876543210' * 2
USERS = {TOKEN: 'alice', OTHER_TOKEN: 'bob'}


def environment(endpoint: str, home: Path) -> dict[str, str]:
    """The variables that point the real client at the loopback server, and at nothing else of this machine."""
    return {
        **{'HF_ENDPOINT': endpoint, 'HF_HUB_DISABLE_XET': '1', 'HF_HOME': str(home), 'HF_HUB_DISABLE_TELEMETRY': '1'},
        **{'HF_DEBUG': '1', 'HF_HUB_DOWNLOAD_TIMEOUT': '1', 'HF_HUB_ETAG_TIMEOUT': '1', 'OMP_NUM_THREADS': '1'},
        **{'HF_HUB_DISABLE_PROGRESS_BARS': '1', 'HF_TOKEN': '', 'NO_PROXY': '127.0.0.1', 'no_proxy': '127.0.0.1'},
    }


def prepare_process() -> None:
    """Fifty times shorter waits between the client's own retries, and at most 12 GB of memory."""
    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
    sleep = time.sleep
    time.sleep = lambda seconds: sleep(seconds / 50)


@dataclass
class Outcome:
    """What a call returned or raised, and all that it logged or printed (debug messages included)."""

    value: Any = None
    error: str = ''
    kind: str = ''
    log: str = ''
    everything: str = field(default='', repr=False)


def observed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Outcome:
    """Call a function and keep what came of it."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    loggers = [logging.getLogger(name) for name in (None, 'huggingface_hub', 'timm_gencnn', 'datasets', 'httpx2')]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
    outcome = Outcome()
    trace = ''
    with redirect_stdout(stream), redirect_stderr(stream):
        try:
            outcome.value = function(*args, **kwargs)
        except Exception as error:
            outcome.error, outcome.kind, trace = str(error), type(error).__name__, traceback.format_exc()
    for logger in loggers:
        logger.removeHandler(handler)
    outcome.log = stream.getvalue()
    outcome.everything = outcome.log + outcome.error + trace
    return outcome


Client = Callable[..., Outcome]


def make_model(seed: int = 0, architecture: str = 'gencnn_test_resnet') -> Any:
    """A small generative network of three classes for one-channel images, with a log Z."""
    import timm
    import torch

    import timm_gencnn  # noqa: F401

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = timm.create_model(architecture, num_classes=3, in_chans=1).eval()
    if hasattr(model, 'set_log_z'):
        model.set_log_z([0.1, -2.7182818, 1 / 3])
    return model


def logits(model: Any) -> bytes:
    """The logits of two fixed images, bit for bit."""
    import torch
    from timm.models import get_model_input_config

    shape = 2, *get_model_input_config(model)['input_size']
    with torch.no_grad():
        return model(torch.linspace(-2, 2, math.prod(shape)).view(shape)).numpy().tobytes()


def push(repo_id: str, seed: int = 0, token: str | None = TOKEN, pictures: int = 0, **kwargs: Any) -> Any:
    from timm_gencnn.hub import push_to_hub

    model = make_model(seed)
    channels_last = kwargs.pop('channels_last', False)
    if channels_last:
        import torch

        model.to(memory_format=torch.channels_last)
    if kwargs.pop('cfg_object', False):
        model.pretrained_cfg = as_object(model.pretrained_cfg)
    gallery = [make_samples(pictures)] if pictures else []
    pushed = push_to_hub(model, repo_id, token=token, gallery=gallery, **kwargs)
    return pushed if isinstance(pushed, Path) else (pushed.oid, pushed.pr_url)


def as_object(cfg: dict[str, Any]) -> Any:
    from timm.models import PretrainedCfg

    return PretrainedCfg(**{k: v for k, v in cfg.items() if k in PretrainedCfg.__dataclass_fields__})


def make_samples(nodes: int, n: int = 2) -> Any:
    import torch

    from timm_gencnn import Samples

    generator = torch.Generator().manual_seed(0)
    count = nodes * n
    return Samples(
        images=torch.rand(count, 3, 16, 16, generator=generator),
        nodes=[f'{i} (class {i})' for i in range(nodes)],
        settings={
            **{'model': '/home/alice/secret/run-7', 'nodes': list(range(nodes)), 'n': n, 'steps': 64, 'seed': 5},
            **{'reference': 'natural', 'alpha': 1.25, 'temperature': 0.02, 'tilt': 50.0, 'size': [16, 16]},
            'regime': 'gallery',
        },
        diagnostics={
            **{'score': [float(i) for i in range(count)], 'acceptance': [0.5] * count, 'step_size': [0.1] * count},
            **{'energy_error': [0.0] * count, 'divergences': [0] * count, 'ess': math.nan, 'r_hat': math.nan},
            **{'gradients': 64, 'seconds': 1.5},
        },
        trace=torch.zeros(4, count),
    )


def pull(name: str, through: str = 'from_pretrained', **kwargs: Any) -> dict[str, Any]:
    """Load a checkpoint by `through` ('from_pretrained' or 'timm') and say what came."""
    import timm

    import timm_gencnn
    from timm_gencnn.hub import from_pretrained

    if through == 'timm':
        model = timm.create_model(f'hf-hub:{name}', pretrained=True, **kwargs).eval()
    else:
        model = from_pretrained(name, **kwargs)
    return {
        'logits': logits(model),
        'log_z': None if model.log_z is None else model.log_z.tolist(),
        'generative': isinstance(model, timm_gencnn.GenerativeMixin),
        'architecture': model.pretrained_cfg['architecture'],
    }


def pull_all(names: list[str], through: str) -> tuple[list[tuple[str, str]], float]:
    """Load one checkpoint after the other; return the kind and text of each error, and how many MB memory grew by."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = []
    for name in names:
        try:
            pull(name, through)
            outcomes.append(('', ''))
        except Exception as error:
            outcomes.append(('ValueError' if isinstance(error, ValueError) else type(error).__name__, str(error)))
    return outcomes, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def timm_reads(configs: list[bytes]) -> list[str]:
    """What timm makes of each config.json of a repository, in a form that can be compared."""
    from timm.models._hub import _parse_model_cfg

    seen = []
    for text in configs:
        try:
            parsed = _parse_model_cfg(json.loads(text), {'hf_hub_id': 'mallory/net', 'source': 'hf-hub'})
            seen.append(json.dumps(parsed, sort_keys=True))
        except Exception as error:
            seen.append(repr(error))
    return seen


def expected(seed: int = 0) -> dict[str, Any]:
    """What `pull` should say of what `push` pushed."""
    model = make_model(seed)
    return {
        'logits': logits(model),
        'log_z': model.log_z.tolist(),
        'generative': True,
        'architecture': 'gencnn_test_resnet',
    }


def run_code(code: str) -> None:
    exec(compile(code, 'snippet', 'exec'), {})


def push_dataset(model_repo: str, dataset_repo: str, **kwargs: Any) -> Any:
    return push(model_repo, pictures=2, gallery_dataset=dataset_repo, **kwargs)


def load_gallery(repo_id: str, **kwargs: Any) -> list[dict[str, Any]]:
    import datasets

    rows = datasets.load_dataset(repo_id, split='train', **kwargs)
    return [{**row, 'image': row['image'].convert('RGB').tobytes()} for row in rows]


def gallery_rows() -> list[dict[str, Any]]:
    rows = make_samples(2).to_dataset()
    return [{**row, 'image': row['image'].convert('RGB').tobytes()} for row in rows]


def train_and_push(repo_id: str) -> bytes:
    """Train a LeNet a little on scikit-learn's digits, with the generative loss; return its logits."""
    import timm
    import torch
    from sklearn.datasets import load_digits

    import timm_gencnn
    from timm_gencnn.hub import push_to_hub

    torch.manual_seed(0)
    images, labels = (torch.as_tensor(x) for x in load_digits(return_X_y=True))
    images = torch.nn.functional.interpolate(images.float().view(-1, 1, 8, 8) / 8 - 1, 28)
    model = timm.create_model('gencnn_lenet')
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for batch in torch.randperm(len(images)).split(64):
        optimizer.zero_grad()
        timm_gencnn.GenerativeLoss()(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    model.eval().estimate_log_z([images[:500]], progress=False)
    push_to_hub(model, repo_id, token=TOKEN, gallery=[timm_gencnn.visualize(model, [3, 7], n=2, steps=8)])
    return logits(model)


def push_unnamed() -> None:
    from torch import nn

    from timm_gencnn.hub import push_to_hub

    push_to_hub(nn.Linear(2, 2), 'alice/net', token=TOKEN)


def save_weights(path: Path, num_classes: int) -> None:
    import timm
    import torch

    torch.save(timm.create_model('test_resnet', num_classes=num_classes).state_dict(), path)


def train_run(folder: Path) -> None:
    """Write what a training run leaves, and its best weights as expected.safetensors beside it."""
    import torch
    import yaml
    from safetensors.torch import save_file

    folder.mkdir()
    model = make_model(3)
    save_file(model.state_dict(), folder.parent / 'expected.safetensors', metadata={'format': 'pt'})
    torch.save({'state_dict': model.state_dict(), 'epoch': 1}, folder / 'model_best.pth.tar')
    args = {
        **{'model': 'test_resnet', 'num_classes': 3, 'in_chans': 1, 'mean': [0.25], 'std': None, 'epochs': 3},
        **{'dataset': f'hfds/{folder}/data', 'val_split': 'test', 'output': str(folder), 'resume': ''},
    }
    (folder / 'args.yaml').write_text(yaml.safe_dump(args))
    rows = ['epoch,train_loss,eval_loss,eval_top1,eval_top5,lr', '0,1,1,90,100,0.1', '1,1,1,98.5,100,0.1']
    (folder / 'summary.csv').write_text('\n'.join([*rows, '2,1,1,98.0,100,0.1', '']))


def command(*arguments: str) -> int:
    """Run `gencnn` with the given arguments."""
    from timm_gencnn.cli import main

    return main(arguments)


def listed() -> tuple[list[dict[str, Any]], list[str]]:
    from timm_gencnn import list_pretrained, zoo

    return [asdict(checkpoint) for checkpoint in list_pretrained()], zoo.names()


def validate_card(text: str) -> None:
    from huggingface_hub import ModelCard

    ModelCard(text).validate()


def is_untouched(text: str) -> bool:
    from timm_gencnn import card

    return card.is_untouched(text)


def process_id() -> int:
    return os.getpid()
