"""The Hugging Face Hub: publish a generative checkpoint with its gallery, and load one back. `gencnn push`.

What is published is one folder: model.safetensors, config.json that timm reads back, README.md, results.json and
images/. It goes up in one commit, made on top of the revision that was looked at, so that a revision is either complete
or not there. What is downloaded is checked before anything is built from it, and nothing is unpickled.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelInfo,
    get_token,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import validate_repo_id
from timm.utils import unwrap_model
from torch import nn

from . import zoo
from .card import is_untouched, render_card
from .config_check import check_hash, read_config
from .model_config import WEIGHTS, own_config, write_model
from .networks import MODEL, add_weight_arguments, default_device, load_model, weight_arguments
from .node_lists import expand
from .registry import PREFIX
from .runs import load_run, means_run
from .samples import Samples
from .sampling import plain

_logger = logging.getLogger(__name__)

_REMEDIES = {
    401: 'you are not logged in, or the token is not valid: run `hf auth login`, or pass token=',
    403: 'the token does not give this right: make one with write access to the repository',
    404: 'there is no such repository, revision or file, or it is private: check the name, or log in',
    409: 'another operation on the repository is in progress: repeat in a moment',
    412: 'somebody else committed to it meanwhile: repeat',
    429: 'too many requests: wait {wait} and repeat',
}


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    gallery: Samples | Sequence[Samples] = (),
    gallery_dataset: str | None = None,
    results: dict[str, Any] | None = None,
    recipe: dict[str, Any] | None = None,
    data_config: dict[str, Any] | None = None,
    license: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    dry_run: str | Path | None = None,
    overwrite_card: bool = False,
    commit_message: str = 'Publish a generative checkpoint',
) -> CommitInfo | Path:
    """Publish a model as a generative checkpoint, in one commit.

    Args:
        model: A generative model or a plain timm model, which is published under its gencnn_ name.
        repo_id: 'USER/REPO'. It is made if it does not exist.
        gallery: Pictures for the card, as `visualize` returns them.
        gallery_dataset: Data set repository, 'USER/NAME', that gets every picture of `gallery` with node, score,
            settings, seed and diagnostics, as parquet. It is pushed before the checkpoint, with the same privacy.
        results: What was measured: metric names to numbers, `dataset` (its Hub id, if it has one) and `split`.
        recipe: How the checkpoint was made: `command`, `seed`, `seconds` and `hardware`, which the card shows, and what
            else belongs in results.json.
        data_config: Preprocessing the weights were trained with (`input_size`, `mean`, `std`, ...), as of
            `timm.data.resolve_data_config`; None for that of the model's pretrained_cfg.
        license: Identifier of the licence of the weights, such as 'apache-2.0'. Left out of the card if not given.
        private: Whether a new repository is private; None for the namespace's own default.
        revision: Branch to commit to; it is made if it does not exist. None for 'main'.
        create_pr: Open a pull request instead of committing.
        token: Hub token; None for the one that `hf auth login` stored, or HF_TOKEN.
        dry_run: Folder that gets exactly what would be pushed; nothing is sent, and a list of files is printed.
        overwrite_card: Replace the README.md that is there even if somebody edited it by hand. Otherwise an edited one
            is kept, with a warning.
        commit_message: First line of the commit.

    Returns:
        The commit, or the folder of a dry run.

    Raises:
        ValueError: If the model cannot be rebuilt from a name, a name is not valid, or `private` is True and the
            repository is public.
        OSError: If the Hub refuses or fails. Nothing was published then, and repeating is safe.
    """
    _check_repo_id(repo_id)
    if gallery_dataset is not None:
        _check_repo_id(gallery_dataset)
        if not gallery:
            raise ValueError(f'there is no gallery to put in the data set {gallery_dataset}: pass gallery=[...]')
    runs = [gallery] if isinstance(gallery, Samples) else list(gallery)
    facts: dict[str, Any] = {
        **{'gallery': runs, 'gallery_dataset': gallery_dataset},
        **{'results': results, 'recipe': recipe, 'data_config': data_config, 'license': license, 'token': token},
    }
    target = None if dry_run is None else Path(dry_run)
    if target is not None and target.exists() and any(target.iterdir()):
        raise ValueError(f'the folder {str(target)!r} is not empty: name one that is, or a new one')
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_folder(model, folder, repo_id, **facts)
        if target is not None:
            shutil.copytree(folder, target, dirs_exist_ok=True)
            print(list_folder(target))
            return target
        if gallery_dataset is not None:
            _push_gallery(runs, gallery_dataset, repo_id, private, token)
        api = HfApi(token=token, library_name='timm_gencnn')
        with _explained(repo_id, 'nothing was published'):
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None and not create_pr and not revision.startswith('refs/'):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            head = api.model_info(repo_id, revision=revision)
            _check_privacy(private, head.private, repo_id)
            return api.create_commit(
                repo_id,
                _changes(api, folder, repo_id, head, overwrite_card),
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
                parent_commit=head.sha,
            )


def _changes(
    api: HfApi, folder: Path, repo_id: str, head: ModelInfo, overwrite_card: bool
) -> list[CommitOperationAdd | CommitOperationDelete]:
    """What the commit of a folder adds and removes; a card that was edited by hand is kept, with its pictures."""
    files, published = _files(folder), {file.rfilename for file in head.siblings or []}
    outdated = {name for name in published - files.keys() if re.fullmatch(r'images/[^/]+\.png', name)}
    if 'README.md' in published and not overwrite_card and _is_edited(api, repo_id, head.sha):
        _logger.warning(
            '%s: README.md was not written by timm_gencnn, or was edited since: it is kept as it is. '
            'Pass overwrite_card=True (--overwrite-card) to replace it.',
            repo_id,
        )
        del files['README.md']
        outdated = set()
    added = [CommitOperationAdd(name, path) for name, path in files.items()]
    return added + [CommitOperationDelete(name) for name in sorted(outdated)]


def from_pretrained(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Load a generative checkpoint from the Hub, checking what was downloaded before anything is built from it.

    Or that of a training run from its folder, best epoch first.

    `timm.create_model('hf-hub:USER/REPO@REV', pretrained=True)` loads the same model. This function takes a token,
    checks config.json whole and each file's hash, and says what is wrong in terms of the repository.

    Args:
        repo_id: 'USER/REPO', or 'USER/REPO@REVISION'; or the folder of a training run, which takes nothing more.
        revision: Branch, tag or commit. None for 'main'.
        token: Hub token; None for the one that `hf auth login` stored, or HF_TOKEN.
        cache_dir: Where downloads are kept; None for the Hub's own cache. With HF_HUB_OFFLINE=1 nothing else is read.
        **kwargs: Passed on to `timm.create_model`, such as `num_classes`.

    Returns:
        The generative model, in evaluation mode.

    Raises:
        ValueError: If the repository does not hold a generative checkpoint, or what it holds does not pass the checks.
        OSError: If the Hub refuses or fails, or the download is damaged (it is then removed from the cache).
    """
    if means_run(repo_id):
        if revision or token or cache_dir:
            raise ValueError(f'{repo_id!r} is a training run on this machine: leave out revision, token and cache_dir')
        return load_model(repo_id, **kwargs)
    repo_id, _, tagged = repo_id.partition('@')
    _check_repo_id(repo_id)
    revision = revision or tagged or None
    with _explained(repo_id, 'nothing was loaded'):
        folder = Path(
            snapshot_download(
                repo_id,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                allow_patterns=['config.json', WEIGHTS],
                library_name='timm_gencnn',
            )
        )
    for name in ('config.json', WEIGHTS):
        if not (folder / name).exists():
            raise ValueError(f'{repo_id} has no {name}: it does not hold a generative checkpoint')
        check_hash(folder / name, repo_id)
    config = read_config(folder / 'config.json', repo_id)
    if not config['architecture'].startswith(PREFIX):
        raise ValueError(
            f'{repo_id} is a plain {config["architecture"]}: use timm_gencnn.as_generative(timm.create_model('
            f"'hf-hub:{repo_id}', pretrained=True))"
        )
    return timm.create_model(f'local-dir:{folder}', pretrained=True, **kwargs).eval()


def write_folder(
    model: nn.Module,
    folder: Path,
    repo_id: str,
    *,
    gallery: Sequence[Samples] = (),
    gallery_dataset: str | None = None,
    results: dict[str, Any] | None = None,
    recipe: dict[str, Any] | None = None,
    data_config: dict[str, Any] | None = None,
    license: str | None = None,
    token: str | None = None,
) -> None:
    """Write what `push_to_hub` pushes: model.safetensors, config.json, README.md, results.json and images/.

    Raises:
        ValueError: If the model cannot be rebuilt from a name, JSON cannot hold the results or the recipe, or a file
            would hold what looks like a Hub token.
    """
    model = unwrap_model(model)
    architecture = _architecture(model)
    folder.mkdir(parents=True, exist_ok=True)
    write_model(model, folder, {'pretrained_cfg': {'architecture': architecture, 'license': license}}, data_config)
    config = read_config(folder / 'config.json', repo_id)
    results = {name: plain(value) for name, value in (results or {}).items()}
    if results or recipe:
        try:
            measured = json.dumps({'results': results, 'recipe': recipe or {}}, indent=2)
        except TypeError as error:
            raise ValueError(f'results and recipe must be numbers, strings and lists, for JSON: {error}') from None
        (folder / 'results.json').write_text(measured + '\n', encoding='utf-8')
    card = render_card(
        repo_id,
        config,
        sum(parameter.numel() for parameter in model.parameters()),
        results=results,
        recipe=recipe,
        gallery=gallery,
        pictures=_write_pictures(gallery, folder, repo_id),
        gallery_dataset=gallery_dataset,
        license=license,
    )
    (folder / 'README.md').write_text(card, encoding='utf-8', newline='')
    _refuse_tokens(folder, token)


def list_folder(folder: Path) -> str:
    """List the files of a folder with their sizes."""
    sizes = {name: path.stat().st_size for name, path in _files(folder).items()}
    lines = [f'  {name:<46} {size:>14,} bytes' for name, size in sizes.items()]
    return '\n'.join([f'{folder}/', *lines, f'{len(sizes)} files, {sum(sizes.values()):,} bytes'])


def _files(folder: Path) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob('*')) if path.is_file()}


def _check_repo_id(repo_id: str) -> None:
    validate_repo_id(repo_id)
    if '/' not in repo_id:
        raise ValueError(f"the repository {repo_id!r} has no namespace: write 'USER/{repo_id}'")


def _check_privacy(wanted: bool | None, private: bool | None, repo_id: str) -> None:
    """Raise if something private is about to go to a repository that was public before."""
    if wanted and not private:
        raise ValueError(f'{repo_id} exists and is public: make it private in its settings, then push again')


def _architecture(model: nn.Module) -> str:
    name = str(own_config(model).get('architecture'))
    architecture = PREFIX + name.removeprefix(PREFIX)
    if not timm.is_model(architecture):
        raise ValueError(
            f'a {type(model).__name__} of architecture {name!r} cannot be rebuilt from its name, so it cannot be '
            'published: make it with timm.create_model'
        )
    return architecture


def _write_pictures(gallery: Sequence[Samples], folder: Path, repo_id: str) -> list[tuple[str, str]]:
    """Write one picture per node, a sheet of its chains, and return each one's caption and path."""
    pictures = []
    for number, samples in enumerate(gallery):
        for i, node in enumerate(samples.nodes):
            slug = re.sub(r'[^a-z0-9]+', '-', node.lower()).strip('-')
            path = f'images/{number}-{i:03d}-{slug[:40]}.png'
            _one_node(samples, i, repo_id).save(folder / path)
            pictures.append((node, path))
    return pictures


def _one_node(samples: Samples, node: int, repo_id: str) -> Samples:
    n = len(samples) // len(samples.nodes)
    chains = slice(node * n, (node + 1) * n)
    return replace(
        _as_published(samples, repo_id),
        images=samples.images[chains],
        nodes=[samples.nodes[node]],
        diagnostics={k: v[chains] if isinstance(v, list) else v for k, v in samples.diagnostics.items()},
        trace=samples.trace[:, chains],
        frames=None,
    )


def _as_published(samples: Samples, repo_id: str) -> Samples:
    """Name the model by its repository, so that anyone can repeat the run, and not by a path on this machine."""
    return replace(samples, settings={**samples.settings, 'model': f'hf-hub:{repo_id}'})


def _push_gallery(
    gallery: Sequence[Samples], dataset_id: str, repo_id: str, private: bool | None, token: str | None
) -> None:
    from datasets import concatenate_datasets

    dataset = concatenate_datasets([_as_published(samples, repo_id).to_dataset() for samples in gallery])
    api = HfApi(token=token, library_name='timm_gencnn')
    with _explained(dataset_id, 'the gallery and the checkpoint were not published'):
        api.create_repo(dataset_id, repo_type='dataset', private=private, exist_ok=True)
        _check_privacy(private, api.dataset_info(dataset_id).private, dataset_id)
        dataset.push_to_hub(dataset_id, private=private, token=token, commit_message='Publish a gallery')


def _is_edited(api: HfApi, repo_id: str, revision: str | None) -> bool:
    with tempfile.TemporaryDirectory() as temporary:
        path = hf_hub_download(repo_id, 'README.md', revision=revision, local_dir=temporary, token=api.token)
        return not is_untouched(Path(path).read_bytes().decode(errors='replace'))


def _refuse_tokens(folder: Path, token: str | None) -> None:
    """Raise if a text that is to be published holds the token in use, or what looks like one."""
    token = token or get_token()
    for name, path in _files(folder).items():
        if path.suffix in ('.json', '.md'):
            text = path.read_text(encoding='utf-8')
            if re.search(r'\bhf_[A-Za-z0-9]{30,}', text) or (token and token in text):
                raise ValueError(f'{name} would publish a Hub token: remove it from the results or model arguments')


@contextmanager
def _explained(repo_id: str, outcome: str) -> Iterator[None]:
    """Turn whatever the Hub's client raises into an OSError that names the repository and what to do."""
    try:
        yield
    except (hub_errors.HTTPError, OSError, RuntimeError, json.JSONDecodeError) as error:
        raise OSError(f'{repo_id}: {_remedy(error)} ({outcome})') from error


def _remedy(error: BaseException) -> str:
    if isinstance(error, hub_errors.HfHubHTTPError):
        status = error.response.status_code
        wait = error.response.headers.get('Retry-After')
        remedy = _REMEDIES.get(status, 'the Hub has a problem: repeat later' if status >= 500 else 'request refused')
        message = error.server_message or f'HTTP status {status}'
        return f'{remedy.format(wait=f"{wait} seconds" if wait else "a while")} [{status}: {message}]'
    cause = error.__cause__
    if isinstance(error, RuntimeError | hub_errors.LocalEntryNotFoundError) and cause is not None:
        return _remedy(cause)
    if isinstance(error, hub_errors.OfflineModeIsEnabled | hub_errors.LocalEntryNotFoundError):
        return 'it is not in the cache, and the Hub may not be asked: unset HF_HUB_OFFLINE, or download it first'
    if isinstance(error, hub_errors.HTTPError):
        return f'the connection to the Hub failed: check it and repeat [{type(error).__name__}: {error}]'
    if isinstance(error, json.JSONDecodeError):  # a page of the Hub's, or of a proxy's, where an answer was expected
        return f'the Hub has a problem: repeat later [no JSON: {error}]'
    return f'{error}: repeat'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `gencnn push`."""
    add = parser.add_argument
    add('model', help=MODEL)
    add('repo_id', metavar='USER/REPO', help='where to publish; made if it does not exist')
    add_weight_arguments(parser)
    add(
        '--nodes', nargs='+', default=[], metavar='NODE', help='draw these nodes for the card, as gencnn visualize does'
    )
    add('-n', type=int, default=16, help='pictures per node (default: %(default)s)')
    add('--steps', type=int, default=512, help='image gradients per picture (default: %(default)s)')
    add('--seed', type=int, default=0, help='seed of the pictures (default: %(default)s)')
    add('--gallery-dataset', metavar='USER/NAME', help='also publish all pictures as a data set')
    add(
        '--results',
        metavar='FILE',
        help="JSON with 'results' and 'recipe', for the card (default: the run's or the zoo's own)",
    )
    add('--dataset', metavar='ID', help="Hub id of the data set the results are of, such as 'ylecun/mnist'")
    add('--license', help="licence of the weights, such as 'apache-2.0'")
    add('--private', action='store_true', default=None, help='make a new repository private')
    add('--revision', help='branch to commit to (default: main)')
    add('--create-pr', action='store_true', help='open a pull request instead of committing')
    add('--token', help='Hub token; better: `hf auth login`, or the variable HF_TOKEN')
    add('--dry-run', metavar='FOLDER', help='write what would be pushed to this folder, list it, and send nothing')
    add('--overwrite-card', action='store_true', help='replace a README.md that was edited by hand')


def main(args: argparse.Namespace) -> None:
    """Publish as the arguments say. See `add_arguments`.

    Raises:
        ValueError: If there is no such model, its weights cannot be read, or flags contradict each other.
        OSError: If a file cannot be read, or the Hub refuses or fails.
    """
    from .visualize import visualize

    measured: dict[str, Any] = {}
    shipped = args.model.removeprefix(PREFIX)
    weights = weight_arguments(args)
    if means_run(args.model) and not weights:
        model, measured = load_run(args.model)
    else:
        model = load_model(args.model, **weights)
        if shipped in zoo.names() and not weights:
            measured = zoo.read(shipped)
    if args.results:
        measured |= json.loads(Path(args.results).read_text(encoding='utf-8'))
    results = (measured.get('results') or {}) | ({'dataset': args.dataset} if args.dataset else {})
    nodes = [name for node in args.nodes for name in expand(model, node)]
    where = default_device(None)
    gallery = [visualize(model, nodes, n=args.n, steps=args.steps, seed=args.seed, device=where)] if nodes else []
    pushed = push_to_hub(
        model,
        args.repo_id,
        gallery=gallery,
        gallery_dataset=args.gallery_dataset,
        results=results,
        recipe=measured.get('recipe'),
        data_config=measured.get('data_config'),
        license=args.license,
        private=args.private,
        revision=args.revision,
        create_pr=args.create_pr,
        token=args.token,
        dry_run=args.dry_run,
        overwrite_card=args.overwrite_card,
    )
    if isinstance(pushed, CommitInfo):
        print(pushed.pr_url or pushed.commit_url)
