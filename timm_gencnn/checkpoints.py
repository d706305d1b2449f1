"""Checkpoints and summary of `gencnn train` on disk: find the newest whole one, and write without losing the last."""

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from timm import utils
from timm.utils import CheckpointSaver
from timm.utils.checkpoint_saver import load_checkpoint_metadata

from .registry import check_checkpoint

_logger = logging.getLogger(__name__)


def find_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint of a run that can be read, or None if there is none.

    Recovery checkpoints come before those of the epochs before theirs, since they hold more of the run. A file that
    was cut short is passed over with a warning.
    """
    newest, path_of_newest = (-1, False, 0), None
    for path in sorted(folder.glob('*.pth.tar')):
        if path.name.startswith('tmp') or path.name.startswith('recovery_tmp'):
            continue
        try:
            epoch = load_checkpoint_metadata(str(path))['epoch']
        except Exception as error:  # whatever unpickling a damaged file raises
            _logger.warning(f'{path} cannot be read ({type(error).__name__}), looking for an earlier one')
            continue
        whole = not is_recovery(path)
        batch = 0 if whole else int(path.name.partition('.')[0].rpartition('-')[2])
        age = (epoch, whole, batch)
        if age > newest:
            newest, path_of_newest = age, path
    return path_of_newest


def is_recovery(path: Path) -> bool:
    """Whether a checkpoint was written within an epoch; only its name, recovery-EPOCH-BATCH.pth.tar, tells."""
    return path.name.startswith('recovery')


def save(saver: CheckpointSaver, epoch: int, metric: float | None) -> None:
    """Save a checkpoint; on failure the last one is still there.

    Raises:
        OSError: It could not be written, for example because the disk is full.
    """
    unfinished = Path(saver.checkpoint_dir, f'tmp{saver.extension}')
    with _last_one_kept(saver, f'the checkpoint of epoch {epoch}', unfinished.unlink):
        saver.save_checkpoint(epoch, metric)


def save_recovery(saver: CheckpointSaver, epoch: int, batch: int) -> None:
    """Save a recovery checkpoint; on failure the last checkpoints are still there.

    Raises:
        OSError: It could not be written, for example because the disk is full.
    """
    unfinished = Path(saver.recovery_dir, f'recovery_tmp{saver.extension}')
    with _last_one_kept(saver, f'the recovery checkpoint of epoch {epoch}, batch {batch}', unfinished.unlink):
        saver.save_recovery(epoch, batch)


@contextmanager
def whole_summary(saver: CheckpointSaver, summary: Path, epoch: int) -> Iterator[None]:
    """Within it an epoch is added to a run's summary.csv; on failure that is as it was, without half a row.

    To be followed by `save`: a resumed run drops the row of an epoch that has no checkpoint and writes it again,
    whereas a plateau schedule cannot go on from a checkpoint whose row is missing.

    Raises:
        OSError: It could not be written, for example because the disk is full.
    """
    size = summary.stat().st_size if summary.exists() else 0
    with _last_one_kept(saver, f'epoch {epoch} to {summary}', lambda: os.truncate(summary, size)):
        yield


def trim_summary(summary: Path, epoch: int) -> None:
    """timm's trim_summary in one step, so that neither a kill nor a full disk loses the rows before the epoch."""
    if not summary.exists():
        return
    trimmed = summary.with_name('tmp.csv')
    try:
        shutil.copyfile(summary, trimmed)
        utils.trim_summary(str(trimmed), epoch)
        os.replace(trimmed, summary)
    finally:
        trimmed.unlink(missing_ok=True)


@contextmanager
def _last_one_kept(saver: CheckpointSaver, what: str, undo: Callable[[], object]) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:
        with suppress(OSError):  # there is nothing to undo, or no way to; the first error says more
            undo()
        kept = f'{describe(saver)}; make room, or mend what it says, and go on with --resume auto'
        raise OSError(f'cannot write {what} ({error}): {kept}') from error


def resume_path(resume: str, folder: Path) -> str | None:
    """Return the checkpoint that --resume means, or None to start afresh.

    Raises:
        ValueError: There is no such file, or it is no checkpoint.
    """
    if resume == 'auto':
        found = find_checkpoint(folder)
        return None if found is None else str(found)
    if resume and not Path(resume).is_file():
        raise ValueError(f"no checkpoint {resume!r} to resume from; 'auto' takes the newest of the run")
    if resume:
        check_checkpoint(resume)
    return resume or None


def describe(saver: Any) -> str:
    """Where the last good checkpoint lies, for error messages."""
    last = None if saver is None else find_checkpoint(Path(saver.checkpoint_dir))
    return 'no checkpoint was written yet' if last is None else f'the last good checkpoint is {last}'
