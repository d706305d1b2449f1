"""Model cards: the README that goes to the Hub with a checkpoint.

A card is a pure function of the checkpoint's config.json, its measured results and its pictures. It ends in a comment
that holds the hash of all that is before it, which tells an untouched card from one that its owner has edited.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import timm
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from . import zoo
from .registry import PREFIX

if TYPE_CHECKING:
    from .samples import Samples

TEMPLATE = Path(__file__).parent / 'card_template.md'
_SEAL = '\n<!-- written by timm_gencnn, sha256 {} -->\n'


def render_card(
    repo_id: str,
    config: dict[str, Any],
    parameters: int,
    *,
    results: dict[str, Any] | None = None,
    recipe: dict[str, Any] | None = None,
    gallery: Sequence[Samples] = (),
    pictures: Sequence[tuple[str, str]] = (),
    gallery_dataset: str | None = None,
    license: str | None = None,
) -> str:
    """Render the README of a checkpoint.

    Args:
        repo_id: 'USER/REPO' on the Hub.
        config: The checkpoint's config.json.
        parameters: Number of parameters.
        results: What was measured: metric names to numbers, `dataset` (its Hub id, if it has one), `split` and `note`.
            Errors are in percent; metrics of the training set, 'train_...', are not shown.
        recipe: How the checkpoint was made. The card shows `command`, with `seed`, `seconds` and `hardware` where they
            are known, or else `settings`.
        gallery: The runs that made the pictures.
        pictures: (caption, path in the repository) of each.
        gallery_dataset: Data set repository that holds the whole gallery.
        license: Identifier of the weights' licence, as the Hub writes it ('apache-2.0', 'mit', ...).

    Returns:
        Markdown with the Hub's metadata block, sealed.
    """
    results, recipe = results or {}, recipe or {}
    name = repo_id.split('/')[-1]
    dataset: str | None = results.get('dataset')
    split = results.get('split', 'test')
    metrics = {
        key.removeprefix('test_'): value
        for key, value in results.items()
        if type(value) in (int, float) and not key.startswith('train_')
    }
    on_hub = dataset is not None and re.fullmatch(r'[\w.-]+/[\w.-]+', dataset)
    plain_architecture = config['architecture'].removeprefix(PREFIX)
    data = ModelCardData(
        license=license,
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['timm', 'timm_gencnn', 'image-classification', 'generative-model', 'energy-based-model'],
        datasets=[dataset] if dataset and on_hub else None,
        model_name=name if metrics else None,
        eval_results=[
            EvalResult(
                task_type='image-classification',
                dataset_type=re.sub(r'[^\w./-]+', '-', dataset or 'unknown').lower(),
                dataset_name=dataset or 'unknown',
                dataset_split=split,
                metric_type=metric,
                metric_name=_metric_name(metric),
                metric_value=value,
            )
            for metric, value in metrics.items()
        ]
        or None,
        widget=[{'text': caption, 'output': {'url': path}} for caption, path in pictures] or None,
    )
    channels, height, width = config['pretrained_cfg']['input_size']
    regimes = {samples.settings['regime'] for samples in gallery}
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        repo_id=repo_id,
        model_name=name,
        architecture=config['architecture'],
        plain_architecture=plain_architecture,
        in_timm=timm.models.model_entrypoint(plain_architecture).__module__.startswith('timm.'),
        shipped=name if name.removeprefix(PREFIX) in zoo.names() else None,
        parameters=f'{parameters:,}',
        num_classes=config['num_classes'],
        input_size=f'{channels} x {height} x {width}',
        has_log_z='log_z' in config.get('model_args', {}),
        dataset=dataset or 'the test set',
        split=split,
        note=results.get('note'),
        metrics={_metric_name(metric): f'{value:.6g}' for metric, value in metrics.items()},
        command=recipe.get('command'),
        trained=_describe_training(recipe),
        settings=recipe.get('settings'),
        runs=[describe_run(samples) for samples in gallery],
        gallery_regime='gallery' in regimes,
        exact_regime='exact' in regimes,
        gallery_dataset=gallery_dataset,
    )
    return seal(str(card))


def _metric_name(metric: str) -> str:
    return f'{metric} (%)' if 'error' in metric else metric


def _describe_training(recipe: dict[str, Any]) -> str:
    """Seed, time and hardware of a training, as far as they are known."""
    seed, seconds, hardware = (recipe.get(key) for key in ('seed', 'seconds', 'hardware'))
    known = [f'with seed {seed}'] if seed is not None else []
    if isinstance(seconds, int | float):
        known.append(f'in {seconds / 60:.0f} minutes' if seconds >= 90 else f'in {seconds:.0f} seconds')
    if hardware:
        known.append(f'on {hardware}')
    return ' '.join(['Trained', *known]) + '.' if known else ''


def describe_run(samples: Samples) -> str:
    """Say in one paragraph how pictures were made, and what their diagnostics are."""
    settings, diagnostics = samples.settings, samples.diagnostics
    numbers = [f'{key} {settings[key]:.3g}' for key in ('sigma', 'alpha') if settings.get(key) is not None]
    reference = f'`{settings["reference"]}`' + (f' ({", ".join(numbers)})' if numbers else '')
    tilt = settings['tilt']
    tilts = f'{tilt:g}' if tilt is not None else f'chosen per chain (median {median(diagnostics["tilt"]):.3g})'
    n = len(samples) // len(samples.nodes)
    scores = (sum(diagnostics['score'][i * n : (i + 1) * n]) / n for i in range(len(samples.nodes)))
    text = (
        f'**{", ".join(samples.nodes)}**: {n} chains per node, reference {reference}, temperature '
        f'{settings["temperature"]:g}, tilt {tilts}, {settings["steps"]} image gradients per chain, seed '
        f'{settings["seed"]}. {samples.verdict[0].upper()}{samples.verdict[1:]}. Mean score by node: '
        f'{", ".join(f"{score:.3g}" for score in scores)}.'
    )
    if settings['regime'] == 'exact':
        acceptance = sum(diagnostics['acceptance']) / len(diagnostics['acceptance'])
        text += f' Acceptance {acceptance:.2f}, ESS {diagnostics["ess"]:.0f}, R-hat {diagnostics["r_hat"]:.3f}.'
    return text


def seal(text: str) -> str:
    """Append the comment that holds the hash of `text`."""
    return text + _SEAL.format(hashlib.sha256(text.encode()).hexdigest())


def is_untouched(card: str) -> bool:
    """Whether `card` is exactly what `seal` made: False for a card that was edited or was written by hand."""
    text = card[: card.rfind('\n<!--')]
    return seal(text) == card
