"""Random views: what they show, their law, and that only gallery chains look through them."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from timm_gencnn import blocks, chains, cli, hmc
from timm_gencnn.samples import read_metadata
from timm_gencnn.views import (
    PHOTOGRAPHS,
    PLAIN,
    SMALL_PHOTOGRAPHS,
    SOFT,
    Band,
    Dense,
    Resample,
    Viewer,
    Views,
    interpolation,
    is_current,
    reading,
    views_of,
)
from timm_gencnn.visualize import repeat_settings, visualize

LENET = 'gencnn_lenet.vis_mnist'
SIDE = 32


def resampling(*args, **kwargs) -> Tensor:
    return interpolation(*reading(*args, **kwargs))


def waves(size: int) -> Tensor:
    """Two channels from which a view's place can be read: cosine and sine of the column's angle [1, 2, 1, W]."""
    angle = 2 * torch.pi * torch.arange(size) / size
    return torch.stack([angle.cos(), angle.sin()])[None, :, None]


def seen_columns(views: Views, n: int, seed: int = 0) -> Tensor:
    """Unwrapped positions in the image of each view's columns [n, W], in columns."""
    images = waves(SIDE).expand(n, 2, SIDE, SIDE)
    view = Viewer([views] * n, seed, range(n))(images)[:, :, 0].double()
    angle = torch.atan2(view[:, 1], view[:, 0])
    steps = angle.diff(dim=1).remainder(2 * torch.pi)
    steps = torch.where(steps > torch.pi, steps - 2 * torch.pi, steps)
    return torch.cat([angle[:, :1], angle[:, :1] + steps.cumsum(1)], 1) * SIDE / (2 * torch.pi)


# Resampling


@pytest.mark.parametrize('start', [-3, 0, 2, 40])
def test_a_whole_stretch_is_exactly_a_circular_shift(start: int) -> None:
    signal = torch.randn(7)
    shifted = resampling(7, torch.ones(1), torch.tensor([float(start)]))[0] @ signal
    assert torch.equal(shifted, signal.roll(-start))


def test_a_stretch_is_enlarged_by_linear_interpolation() -> None:
    """Pixel i of the view is centred at start + (i + 1/2) side - 1/2; a ramp shows exactly that."""
    ramp = torch.arange(8.0)
    view = resampling(8, torch.tensor([0.5]), torch.tensor([2.0]))[0] @ ramp
    torch.testing.assert_close(view, 1.75 + 0.5 * torch.arange(8))
    around = resampling(8, torch.tensor([0.5]), torch.tensor([6.0]))[0] @ ramp
    torch.testing.assert_close(around[:3], torch.tensor([5.75, 6.25, 6.75]))
    torch.testing.assert_close(around[3], 0.75 * ramp[7] + 0.25 * ramp[0])  # over the edge


def test_a_shrunk_stretch_stands_at_its_place_before_nothing() -> None:
    """Half as large and a quarter of the way down, pixel i shows the stretch at 2 (i + 1/2 - 1) - 1/2."""
    half, quarter = torch.tensor([0.5]), torch.tensor([0.25])
    shown = resampling(8, torch.ones(1), torch.zeros(1), half, quarter)[0] @ torch.arange(1.0, 9)
    torch.testing.assert_close(shown, torch.tensor([0, 1.5, 3.5, 5.5, 7.5, 0, 0, 0]))
    mirrored = resampling(8, torch.ones(1), torch.zeros(1), half, quarter, torch.tensor([True]))[0]
    torch.testing.assert_close(mirrored @ torch.arange(1.0, 9), torch.tensor([0, 7.5, 5.5, 3.5, 1.5, 0, 0, 0]))


# Banded products


def laws(n: int) -> dict[str, Tensor]:
    """Sides from a half to one, both ends among them, and starts anywhere."""
    generator = torch.Generator().manual_seed(0)
    side = torch.cat([torch.tensor([0.5, 1.0, 0.995]), 0.5 + 0.5 * torch.rand(n - 3, generator=generator)])
    start, share, place = torch.rand(3, n, generator=generator)
    share = torch.where(torch.arange(n) < n // 2, 1.0, 0.5 + 0.5 * share)
    return {
        'side': side, 'start': 60 * start - 20, 'share': share, 'place': place, 'mirror': torch.arange(n) % 2 == 1
    }  # fmt: skip


@pytest.mark.parametrize('size', [3, 17, 40])
def test_a_band_has_all_that_is_not_zero(size: int) -> None:
    """Also in the transpose, a pixel of the image being read by at most 2 / 0.5 of the view's."""
    matrices = resampling(size, **laws(200))
    for dense, k in (matrices, 2), (matrices.mT, 4):
        assert (dense > 0).sum(2).max() == min(k, size)
        assert torch.equal(Band.of(dense, k).from_left(torch.eye(size).expand(200, 1, -1, -1))[:, 0], dense)


def test_resampling_is_the_two_matrix_products_and_its_gradient_their_transposes() -> None:
    rows, columns = resampling(12, **laws(20)), resampling(18, **laws(20))
    images, grad = torch.randn(20, 3, 12, 18, requires_grad=True), torch.randn(20, 3, 12, 18)
    views = Resample.apply(images, *(Band.of(m, k) for m in (rows, columns) for m, k in ((m, 2), (m.mT, 4))))
    torch.testing.assert_close(views, rows[:, None] @ images @ columns.mT[:, None])
    back = torch.autograd.grad(views, images, grad)[0]
    torch.testing.assert_close(back, rows.mT[:, None] @ grad @ columns[:, None])
    dense = Resample.apply(images, *map(Dense, (rows, rows.mT, columns, columns.mT)))  # as on a GPU
    torch.testing.assert_close(dense, views)
    torch.testing.assert_close(torch.autograd.grad(dense, images, grad)[0], back)
    assert dense.is_contiguous()
    assert views.is_contiguous()  # as the images of the first gradient are, lest torch.compile make two graphs


# The law of the views


def test_the_law_of_the_views() -> None:
    """Sides uniform, half of the views mirrored, all places within the image and the shift."""
    n = 2000
    columns = seen_columns(SMALL_PHOTOGRAPHS, n)
    pace = columns.diff(dim=1).mean(1)
    assert stats.binomtest(int((pace < 0).sum()), n).pvalue > 1e-3
    side = pace.abs()
    assert stats.kstest(side.numpy(), stats.uniform(0.5, 0.5).cdf).pvalue > 1e-3
    assert stats.kstest(side.numpy(), stats.uniform(0.4, 0.6).cdf).pvalue < 1e-6  # another range would be seen
    first = torch.where(pace < 0, columns[:, -1], columns[:, 0]) + 0.5 - side / 2  # rounded to whole columns
    reach = 0.08 * SIDE
    first = (first + SIDE / 4).remainder(SIDE) - SIDE / 4
    assert -reach - 0.6 < first.min() < -reach + 1
    assert SIDE / 2 + reach - 1 < first.max() < SIDE / 2 + reach + 0.6
    place = (first + reach) / (SIDE * (1 - side) + 2 * reach)
    assert stats.kstest(place.numpy(), 'uniform').statistic < 0.06  # rounding adds up to half a column


def test_the_law_of_shrunk_views() -> None:
    """Shares of the side uniform, all places within the frame, and what is around is the image's mean, exactly."""
    n, size = 2000, 64
    images = 3 + waves(size).expand(n, 2, size, size)
    views = Viewer([PHOTOGRAPHS] * n, 0, range(n))(images)
    mean = images.mean((2, 3))[:, :, None, None]
    shown = ((views - mean) != 0).any(1)
    window = shown.any(2)[:, :, None] & shown.any(1)[:, None, :]
    assert (shown.sum((1, 2)) > 0.9 * window.sum((1, 2))).all()  # one rectangle, but for the zeros of the waves
    for along in shown.any(2), shown.any(1):
        count = along.sum(1)
        assert ((along.int().diff(dim=1) == 1).sum(1) + along[:, 0] == 1).all()
        share = (count / size).numpy()
        assert stats.kstest(share, stats.uniform(0.5, 0.5).cdf).statistic < 0.04  # counts are whole
        assert stats.kstest(share, stats.uniform(0.4, 0.6).cdf).statistic > 0.1  # another range would be seen
        movable = count < 0.9 * size
        place = along.int().argmax(1)[movable] / (size - count[movable])
        assert stats.kstest(place.numpy(), 'uniform').statistic < 0.06


def test_plain_views_only_move() -> None:
    images = torch.randn(1, 3, 16, 24).expand(200, 3, 16, 24)
    views = Viewer([PLAIN] * 200, 0, range(200))(images)
    reach = range(-1, 2)  # 8 % of the shorter side
    moved = [[images[0].roll((dy, dx), (1, 2)) for dx in reach] for dy in reach]
    counts = torch.tensor([[sum(torch.equal(v, m) for v in views) for m in row] for row in moved])
    assert counts.sum() == 200
    assert (counts > 0).all()


def test_views_stay_within_the_values_of_the_image() -> None:
    images = torch.rand(16, 3, 20, 20)
    views = Viewer([SMALL_PHOTOGRAPHS, PHOTOGRAPHS] * 8, 0, range(16))(images)
    assert views.shape == images.shape
    assert images.min() - 1e-6 <= views.min() <= views.max() <= images.max() + 1e-6


def test_gradients_go_back_to_the_pixels_seen() -> None:
    """A view is linear in the image: its gradient sums to the number of pixels seen, and needs no second draw."""
    images = torch.randn(4, 3, 12, 12, requires_grad=True)
    for law in SMALL_PHOTOGRAPHS, PHOTOGRAPHS:
        views = Viewer([law] * 4, 0, range(4))(images)
        seen = (views != images.mean((2, 3), keepdim=True)).sum((2, 3)).float()
        assert (seen == 144).all() == (law is SMALL_PHOTOGRAPHS)
        (grad,) = torch.autograd.grad(views.sum(), images)
        torch.testing.assert_close(grad.sum((2, 3)), seen)


def test_a_chain_sees_the_same_views_in_every_batch_and_others_at_every_call() -> None:
    images = torch.randn(4, 3, 16, 16)
    laws = [PLAIN, SMALL_PHOTOGRAPHS, PHOTOGRAPHS, PLAIN]
    together, alone = Viewer(laws, 5, range(4)), Viewer(laws[2:3], 5, [2])
    calls = [(together(images), alone(images[2:3])) for _ in range(3)]
    for all_, one in calls:
        assert torch.allclose(all_[2:3], one, atol=1e-6)
    assert not torch.allclose(calls[0][1], calls[1][1], atol=0.1)
    assert not torch.allclose(Viewer(laws, 6, range(4))(images), calls[0][0], atol=0.1)


def test_a_plain_chain_sees_the_same_beside_one_whose_views_are_shrunk() -> None:
    images = torch.randn(2, 3, 16, 16)
    alone, beside = Viewer([PLAIN] * 2, 0, range(2))(images), Viewer([PLAIN, PHOTOGRAPHS], 0, range(2))(images)
    assert torch.equal(alone[0], beside[0])


def test_views_and_momenta_draw_different_numbers() -> None:
    for seed in range(3):
        viewer = Viewer([PLAIN], seed, [0])
        draws = [s.uniform((4,)).tolist() for s in (viewer.streams, viewer.far_streams, hmc.Streams(seed, [0]))]
        assert draws[0] != draws[1] != draws[2] != draws[0]


# In the product


@pytest.mark.parametrize(
    ('kind', 'channels', 'size', 'views'),
    [
        ('class', 3, (160, 192), PHOTOGRAPHS),
        ('class', 3, (159, 192), SMALL_PHOTOGRAPHS),
        ('class', 1, (160, 160), PLAIN),
        ('layer', 3, (160, 192), SOFT),
        ('layer', 3, (159, 192), PLAIN),
        ('layer', 1, (160, 160), PLAIN),
        ('sum', 3, (160, 160), SOFT),
        ('callable', 3, (160, 160), SOFT),
    ],
)
def test_only_classes_of_colour_images_are_cropped_mirrored_and_shrunk(
    kind: str, channels: int, size: tuple[int, int], views: Views
) -> None:
    assert views_of(kind, channels, size) == views


@pytest.mark.parametrize(
    ('channels', 'size', 'views', 'current'),
    [
        (3, (160, 160), PLAIN, False),  # as units of that size were drawn at first
        (3, (160, 160), SOFT, True),
        (3, (96, 96), PLAIN, True),
        (3, (96, 96), SOFT, False),
        (1, (160, 160), PLAIN, True),
        (1, (160, 160), PHOTOGRAPHS, False),
        (None, (160, 160), PLAIN, True),
        (None, (160, 160), SMALL_PHOTOGRAPHS, False),
    ],
)
def test_only_views_of_this_size_and_these_channels_are_current(
    channels: int | None, size: tuple[int, int], views: Views, current: bool
) -> None:
    settings = {'regime': 'gallery', 'size': list(size), 'views': [views._asdict()]}
    settings |= {'schedule': chains.Schedule()._asdict()} | ({'mean': [0.5] * channels} if channels else {})
    assert is_current(settings) == current


class Stripes(nn.Module):
    """Class 0 likes a stripe on the left of an image bright, class 1 its mirror image."""

    num_classes = 2

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x[..., 6:10].mean((1, 2, 3)), x[..., 22:26].mean((1, 2, 3))], 1)


def quick(model: nn.Module, node, **kwargs):
    return visualize(model, node, **{'n': 8, 'steps': 80, 'size': SIDE, 'progress': False} | kwargs)


def test_a_class_is_drawn_on_both_sides_and_a_callable_at_its_own() -> None:
    stripe = lambda x: x[..., 6:10].mean((1, 2, 3))  # noqa: E731, the same score, but not a class
    differences = []
    for node in 0, stripe:
        images = quick(Stripes().eval(), node).images
        differences.append((images[..., 6:10].mean() - images[..., 22:26].mean()).item())
    assert abs(differences[0]) < 0.1
    assert differences[1] > 0.2


def test_each_node_is_drawn_in_the_manner_of_its_kind() -> None:
    model = Stripes().eval()
    stripe = lambda x: x[..., 6:10].mean((1, 2, 3))  # noqa: E731
    mixed = quick(model, [0, stripe], n=2)
    assert mixed.settings['views'] == [SMALL_PHOTOGRAPHS._asdict(), PLAIN._asdict()]
    alone = quick(model, 0, n=2)
    torch.testing.assert_close(mixed.images[:2], alone.images, atol=1e-2, rtol=0)
    # the step is sqrt(move · pace / (tilt · RMS)), and the tilt strength / RMS
    squared = torch.tensor(mixed.diagnostics['step_size']).square()
    ratio = (PHOTOGRAPHS.move / PHOTOGRAPHS.strength) / (PLAIN.move / PLAIN.strength)
    torch.testing.assert_close(squared[:2] / squared[2:], torch.full((2,), ratio).to(squared), rtol=1e-4, atol=0)


def test_the_score_told_is_that_of_the_plain_image() -> None:
    """And the trace's are those of views."""
    model = Stripes().eval()
    samples = quick(model, [0, 1])
    pixels = samples.images
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    scores = model((pixels - mean) / std)
    told = torch.tensor(samples.diagnostics['score'])
    torch.testing.assert_close(told[:8], scores[:8, 0], atol=1e-3, rtol=0)
    torch.testing.assert_close(told[8:], scores[8:, 1], atol=1e-3, rtol=0)
    assert (samples.trace[-1] - told).abs().min() > 1e-3


def test_a_view_costs_no_pass_through_the_network() -> None:
    model, calls = Stripes().eval(), []
    model.register_forward_hook(lambda *_: calls.append(0))
    counts = []
    for steps in 20, 50:
        calls.clear()
        quick(model, 0, steps=steps)
        counts.append(len(calls))
    assert counts[1] - counts[0] == 30


def test_the_exact_regime_and_the_presets_have_no_views(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError('a view was asked for')

    monkeypatch.setattr(blocks, 'Viewer', refuse)
    model = Stripes().eval()
    for kwargs in {'temperature': 1}, {'preset': 'paper-lenet', 'steps': 901}:
        assert quick(model, 0, n=1, **kwargs).settings['views'] is None
    with pytest.raises(AssertionError, match='a view was asked for'):
        quick(model, 0)


def test_chunks_of_chains_see_the_views_of_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Stripes().eval()
    whole = quick(model, [0, 1], n=3, steps=30)
    for batch in 1, 2, 4:
        monkeypatch.setattr(blocks, 'PIXELS_PER_BATCH', batch * 3 * SIDE * SIDE)
        torch.testing.assert_close(quick(model, [0, 1], n=3, steps=30).images, whole.images, atol=1e-2, rtol=0)


def test_pictures_say_how_they_were_drawn_and_older_ones_are_refused(
    tmp_path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = visualize(LENET, [3, 'conv2:1'], n=1, steps=8, progress=False)
    assert new.settings['views'] == [PLAIN._asdict()] * 2
    path = str(new.save(tmp_path / 'unshrunk.png'))
    for views in new.settings['views']:
        del views['shrink']  # views were not shrunk, and did not say so
    bare = str(new.save(tmp_path / 'bare.png'))
    for name in path, bare:
        assert cli.main(['visualize', '--like', name, '--out', str(tmp_path / 'again.png')]) == 0
        assert read_metadata(tmp_path / 'again.png')['settings']['views'] == [PLAIN._asdict()] * 2
    exact = visualize(LENET, 3, n=1, steps=70, temperature=1, progress=False)
    other = chains.Schedule()._asdict() | {'average': 0.5}
    new.settings['schedule'], schedule = other, new.settings['schedule']
    path = str(new.save(tmp_path / 'other.png'))
    assert cli.main(['visualize', '--like', path, '--out', str(tmp_path / 'again.png')]) == 2
    assert 'drawn by another schedule: draw it anew' in capsys.readouterr().err
    assert schedule == chains.Schedule()._asdict()
    new.settings['schedule'], new.settings['views'] = schedule, [PLAIN._asdict(), PLAIN._asdict() | {'move': 0.04}]
    path = str(new.save(tmp_path / 'moved.png'))
    assert cli.main(['visualize', '--like', path, '--out', str(tmp_path / 'again.png')]) == 2
    assert 'drawn by another schedule: draw it anew' in capsys.readouterr().err
    for samples, code in (new, 2), (exact, 0):  # those at T = 1 are as they were
        del samples.settings['views'], samples.settings['schedule']
        path = samples.save(tmp_path / 'old.png')
        assert cli.main(['visualize', '--like', str(path), '--out', str(tmp_path / 'again.png')]) == code
    assert 'before gallery pictures had random views: draw it anew' in capsys.readouterr().err
    assert read_metadata(tmp_path / 'again.png')['settings']['regime'] == 'exact'


@pytest.mark.parametrize(('side', 'views'), [(160, PHOTOGRAPHS), (159, SMALL_PHOTOGRAPHS)])
def test_a_class_drawn_by_the_views_of_another_size_is_refused_before_it_is_drawn(tmp_path, side, views) -> None:
    """Such as one of 160 pixels from before views were shrunk."""
    picture = visualize(LENET, 3, n=1, steps=8, progress=False)
    for law in PHOTOGRAPHS, SMALL_PHOTOGRAPHS:
        unit = views_of('layer', 3, (side, 200))  # beside it, drawn as units of that size are
        picture.settings |= {'size': [side, 200], 'mean': [0.5] * 3, 'views': [law._asdict(), unit._asdict()]}
        path = str(picture.save(tmp_path / 'a.png'))
        with nullcontext() if law is views else pytest.raises(ValueError, match='drawn by another schedule'):
            assert repeat_settings(path)['views'][0] == views._asdict()
