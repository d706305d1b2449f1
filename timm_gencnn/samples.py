"""`Samples`: the images that a run produced, with everything needed to judge and repeat it."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import datasets
    from PIL import Image

METADATA_KEY = 'timm_gencnn'
PADDING = 2  # pixels between the images of a sheet


def verdict(regime: str, r_hat: float, ess: float) -> str:
    """The diagnostics in plain words; thresholds are those of Vehtari et al. 2021 (R-hat 1.01, ESS 400)."""
    if regime != 'exact':
        return 'gallery regime: not samples of the model at T = 1'
    if math.isnan(r_hat) or math.isnan(ess):
        return 'exact sampling: not converged: the score never changed'
    if r_hat > 1.01:
        shown = next(text for digits in range(2, 18) if float(text := f'{r_hat:.{digits}f}') > 1.01)
        return f'exact sampling: not converged: R-hat {shown}, run longer (raise steps)'
    if ess < 400:
        return f'exact sampling: chains agree, but only {int(ess)} effective draws: raise steps or n'
    return f'exact sampling: converged (R-hat {r_hat:.3f}, ESS {ess:.0f})'


def write_atomically(path: str | Path, data: bytes) -> None:
    """Writes a file under a temporary name and renames it, so that no reader and no kill sees half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    """A name beside `path` that no other thread, process or machine has for it."""
    return path.with_name(f'.{path.name}.{secrets.token_hex(4)}.partial')


def check_writable(path: str | Path) -> None:
    """Makes the folder of a file to come, and checks that it can be written there.

    Raises:
        OSError: It cannot.
    """
    path = Path(path)
    partial = _partial(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        partial.touch()
        partial.unlink()
    except OSError as e:
        raise OSError(f'cannot write {str(path)!r}: {e.strerror or e}') from e


@dataclass
class Samples:
    """Images drawn for one or more nodes.

    A part of a run is no `Samples`: its settings would not repeat it. `.images[:4]` are pixels.

    Attributes:
        images: Pixels [N, 3, H, W] in [0, 1], float32, on the CPU; one-channel models are shown in grey, two channels
            by the first, more than three by the first three (a note in the settings says so). The n images of a node
            are contiguous.
        nodes: Canonical name of each node.
        settings: What determines the pixels: model, nodes, n, steps, reference, temperature, tilt, size, seed, regime
            and versions.
        diagnostics: `score`, `acceptance`, `tilt`, `step_size`, `energy_error` and `divergences` per image; `r_hat` and
            `ess` (bulk, of the score) of the worst node, `gradients` per chain and `seconds`. NaN is what the gallery
            regime does not have: acceptance, energy error, R-hat and ESS.
        trace: Score of every kept draw [draws, N]; in the gallery regime of every transition, and of the random view at
            its end.
        frames: Images of the run at regular intervals [F, N, 3, H, W], if they were asked for.
    """

    images: Tensor
    nodes: list[str]
    settings: dict[str, Any]
    diagnostics: dict[str, Any]
    trace: Tensor
    frames: Tensor | None = None

    def __repr__(self) -> str:
        height, width = self.images.shape[-2:]
        named = ', '.join(self.nodes[:3]) + (f' and {len(self.nodes) - 3} more' if len(self.nodes) > 3 else '')
        return f'<Samples: {len(self)} images of {named}, {width} x {height} px; {self.verdict}>'

    def __len__(self) -> int:
        return len(self.images)

    @property
    def verdict(self) -> str:
        """What the diagnostics say, in plain words."""
        return verdict(self.settings['regime'], self.diagnostics['r_hat'], self.diagnostics['ess'])

    def summary(self) -> str:
        """One line: score, acceptance, ESS and R-hat where they are defined, gradients, seconds."""
        d = self.diagnostics
        mean = lambda v: sum(v) / len(v)  # noqa: E731
        chains = ''
        if self.settings['regime'] == 'exact':
            chains = f'acceptance {mean(d["acceptance"]):.2f}, ESS {d["ess"]:.0f}, R-hat {d["r_hat"]:.2f}, '
        return (
            f'{len(self)} images of {len(self.nodes)} node(s): score {mean(d["score"]):.1f}, {chains}'
            f'{sum(d["divergences"])} divergences, {d["gradients"]} gradients a chain, {d["seconds"]:.1f} s'
        )

    def grid(self, columns: int | None = None, padding: int = PADDING) -> Image.Image:
        """All images on one sheet: a row per node, or about a square for a single node.

        Args:
            columns: Images per row.
            padding: Gap in pixels.
        """
        return _sheet(self.images, columns or self._columns(), padding)

    def _columns(self) -> int:
        n = len(self) // len(self.nodes)
        return n if len(self.nodes) > 1 else math.ceil(math.sqrt(n))

    def metadata(self) -> dict[str, Any]:
        """Settings, nodes, diagnostics and verdict, ready for JSON."""
        return {
            'settings': self.settings,
            'nodes': self.nodes,
            'diagnostics': self.diagnostics,
            'verdict': self.verdict,
        }

    def save(self, path: str | Path, columns: int | None = None) -> Path:
        """Saves the sheet of images as a PNG that carries the full settings in its metadata.

        Args:
            path: A file name that ends in .png.
            columns: Images per row.

        Raises:
            ValueError: The name does not end in .png.
        """
        from PIL import PngImagePlugin

        path = Path(path)
        if path.suffix.lower() != '.png':
            raise ValueError(f'cannot save to {str(path)!r}: give a file name that ends in .png')
        info = PngImagePlugin.PngInfo()
        info.add_text('Title', ', '.join(self.nodes)[:200])
        info.add_text('Description', f'{self.verdict}. {self.summary()}')
        info.add_text(METADATA_KEY, json.dumps(_finite(self.metadata())))
        buffer = io.BytesIO()
        self.grid(columns).save(buffer, 'PNG', pnginfo=info)
        write_atomically(path, buffer.getvalue())
        return path

    @classmethod
    def load(cls, path: str | Path) -> Samples:
        """Reads back a PNG that `save` wrote: saved again, it is the same file.

        Its pixels are those of the PNG, rounded to 8 bits. The trace and the frames are not in it: the trace has no
        draws, and there is nothing to animate.

        Raises:
            ValueError: The file does not exist, is no PNG, or was not written by `save`.
        """
        from PIL import Image
        from torchvision.transforms.functional import to_tensor

        metadata = read_metadata(path)
        try:
            settings, nodes, diagnostics = (metadata[key] for key in ('settings', 'nodes', 'diagnostics'))
            count, (height, width) = len(nodes) * settings['n'], settings['size']
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                f'{str(path)!r} does not say what its images are: it was not saved by Samples.save'
            ) from None
        with Image.open(path) as image:
            sheet = to_tensor(image.convert('RGB'))
        pitch = height + PADDING, width + PADDING
        columns = max(1, sheet.shape[2] // pitch[1])
        lines = -(-count // columns)
        whole = (lines * pitch[0] + PADDING, columns * pitch[1] + PADDING) if count > 1 else (height, width)
        if sheet.shape[1:] != whole:  # a single image has no frame
            raise ValueError(
                f'{str(path)!r} was cut or resized: it does not hold {count} images of {width} x {height} px'
            )
        cells = sheet[:, -lines * pitch[0] :, -columns * pitch[1] :]
        images = [cell[:, :height, :width] for line in cells.split(pitch[0], 1) for cell in line.split(pitch[1], 2)]
        return cls(torch.stack(images[:count]), nodes, settings, _with_nan(diagnostics), torch.empty(0, count))

    def animate(self, path: str | Path, milliseconds: int = 80) -> Path:
        """Saves the course of the chains as an animated GIF or WebP.

        Args:
            path: A file name that ends in .gif or .webp.
            milliseconds: Duration of a frame.

        Raises:
            ValueError: The run kept no frames, or the file type is another.
        """
        path = Path(path)
        if self.frames is None:
            raise ValueError('this run kept no frames: call visualize(..., frames=32) to animate it')
        if path.suffix.lower() not in ('.gif', '.webp'):
            raise ValueError(f'cannot animate to {str(path)!r}: give a file name that ends in .gif or .webp')
        sheets = [_sheet(frame, self._columns(), PADDING) for frame in self.frames]
        buffer = io.BytesIO()
        sheets[0].save(
            buffer,
            path.suffix[1:].upper(),
            save_all=True,
            append_images=sheets[1:],
            duration=[milliseconds] * (len(sheets) - 1) + [20 * milliseconds],
            loop=0,
        )
        write_atomically(path, buffer.getvalue())
        return path

    def to_dataset(self) -> datasets.Dataset:
        """A Hugging Face data set with one row per image: image, node, score, settings, seed and diagnostics (JSON)."""
        import datasets
        from torchvision.transforms.functional import to_pil_image

        n = len(self) // len(self.nodes)
        shared = {k: v for k, v in self.diagnostics.items() if not isinstance(v, list)}
        rows = [
            {
                'image': to_pil_image(image),
                'node': self.nodes[i // n],
                'score': self.diagnostics['score'][i],
                'settings': json.dumps(self.settings),
                'seed': self.settings['seed'],
                'diagnostics': json.dumps(
                    _finite(shared | {k: v[i] for k, v in self.diagnostics.items() if isinstance(v, list)})
                ),
            }
            for i, image in enumerate(self.images)
        ]
        features = datasets.Features(
            {
                'image': datasets.Image(),
                'node': datasets.Value('string'),
                'score': datasets.Value('float32'),
                'settings': datasets.Value('string'),
                'seed': datasets.Value('int64'),
                'diagnostics': datasets.Value('string'),
            }
        )
        return datasets.Dataset.from_list(rows, features=features)

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.grid().save(buffer, 'PNG')
        return buffer.getvalue()


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata that `Samples.save` put into a PNG.

    Raises:
        ValueError: The file does not exist, is no PNG or was not written by `Samples.save`.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            text = getattr(image, 'text', {}).get(METADATA_KEY)
    except (OSError, SyntaxError) as e:
        raise ValueError(f'cannot read {str(path)!r} as a picture: {e}') from None
    if text is None:
        raise ValueError(f'{str(path)!r} carries no settings: only PNGs saved by Samples.save can be repeated')
    try:
        metadata = json.loads(text)
    except ValueError as e:
        raise ValueError(f'{str(path)!r} carries settings that are no JSON: {e}') from None
    if not isinstance(metadata, dict) or not isinstance(metadata.get('settings', {}), dict):
        raise ValueError(f'{str(path)!r} carries settings that are no dictionary')
    return metadata


def _sheet(images: Tensor, columns: int, padding: int) -> Image.Image:
    from torchvision.transforms.functional import to_pil_image
    from torchvision.utils import make_grid

    return to_pil_image(make_grid(images, nrow=columns, padding=padding, pad_value=1.0))


def _finite(value: Any) -> Any:
    """NaN has no JSON: replaces it by None, recursively."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _with_nan(value: Any) -> Any:
    """The inverse of `_finite`, but for infinity."""
    if isinstance(value, dict):
        return {k: _with_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_with_nan(v) for v in value]
    return math.nan if value is None else value


def channels_shown(channels: int) -> str:
    """What a picture leaves out of images of so many channels, or ''."""
    if channels in (1, 3):
        return ''
    shown = 'the first three, as red, green and blue' if channels > 3 else 'the first, in grey'
    return f'the network sees {channels} channels; pictures show {shown}'


def to_rgb(pixels: Tensor) -> Tensor:
    """Pixels [..., C, H, W] as [..., 3, H, W] on the CPU: grey is repeated, channels beyond 3 are dropped."""
    pixels = pixels.detach().float().cpu()
    channels = pixels.shape[-3]
    if channels < 3:
        pixels = pixels[..., :1, :, :].expand(*pixels.shape[:-3], 3, *pixels.shape[-2:])
    return pixels[..., :3, :, :].clamp(0, 1).contiguous()
