"""Photographs larger than a tile: one noise field, smooth weights, no seams, bounded memory."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from assembly import tiles
from assembly.tiles import NoiseField, TiledTranslator, starts, weights
from models.backbones import LAYOUTS
from models.sampler import SamplingConfig

CPU = torch.device("cpu")
TILE = 64
ROWS, COLUMNS = np.mgrid[:150, :330]
SMOOTH = 127 + 60 * np.sin(ROWS / 40 + COLUMNS / 90) + 60 * (COLUMNS / 330 - 0.5)
GRAIN = np.random.default_rng(0).normal(0, 3, SMOOTH.shape)  # as every photograph has
PHOTO = np.stack([SMOOTH + GRAIN] * 3, axis=2).astype(np.uint8)


class Codec(nn.Identity):
    channels = 32  # of FLUX.2's


class Model(nn.Module):
    """What TiledTranslator asks of a translator; `translate` is replaced beside it."""

    def __init__(self):
        super().__init__()
        self.backbone = LAYOUTS["pixels"](Codec(), "demo")


def tiled(**sampling) -> TiledTranslator:
    cfg = SamplingConfig(**sampling)
    return TiledTranslator(Model(), cfg, (TILE, TILE), (TILE, TILE), batch_size=4)


def grey_and_noise(model, visible, draws, cfg, noise_of=None):
    """The grey photograph and a little of its noise: nothing is known of what is around."""
    grey = visible.mean(1, keepdim=True)
    return grey if noise_of is None else grey + 0.05 * noise_of(draws).view_as(grey)


def relative(model, visible, draws, cfg, noise_of=None):
    """Levels judged by the mean of what is seen, as a network without context does."""
    grey = visible.mean(1, keepdim=True)
    return grey - grey.mean((1, 2, 3), keepdim=True) + 0.5


@pytest.mark.parametrize("side", [32, 48, 256])
def test_tiles_cover_the_length_and_overlap_by_a_quarter(side):
    for length in range(16, 4000, 112):
        begins = starts(length, side)
        assert begins[0] == 0 and all(b % 16 == 0 for b in begins)
        if length > side:
            assert begins[-1] == length - side
            assert max(np.diff(begins)) <= 0.75 * side and min(np.diff(begins)) > 0
        real = min(side, length)
        parts, total = weights(length, real, begins), np.zeros(length)
        for part, begin in zip(parts, begins):
            total[begin : begin + real] += part
        assert np.allclose(total, 1, atol=1e-5)
        for part, begin in zip(parts, begins):  # nearly nothing where another tile goes on
            assert begin == 0 or part[0] < 0.02
            assert begin + real == length or part[-1] < 0.02
            assert np.abs(np.diff(part)).max() < 8 / side + 0.01


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tiles_get_parts_of_one_noise_field(layout):
    backbone = LAYOUTS[layout](Codec())
    field = NoiseField(backbone, (96, 160), 5, CPU)
    whole = field.part(7, 0, 0, (96, 160))
    assert whole.shape == backbone.state_shape(96, 160)
    assert abs(whole.mean()) < 0.06 and whole.std() == pytest.approx(1, abs=0.06)
    fine, panels = (16, 1) if layout == "pixels" else (1, backbone.panels)
    grid = whole.view(6 * fine, panels, 10 * fine, -1)
    for top, left, size in [(0, 0, (48, 80)), (32, 64, (64, 96)), (16, 112, (48, 48))]:
        part = field.part(7, top, left, size)
        assert part.shape == backbone.state_shape(*size)
        rows, columns = (
            slice(a // 16 * fine, (a + n) // 16 * fine) for a, n in zip((top, left), size)
        )
        assert torch.equal(part, grid[rows, :, columns].reshape(part.shape))
    for other in (field.part(8, 0, 0, (96, 160)), NoiseField(backbone, (96, 160), 6, CPU)):
        other = other if isinstance(other, torch.Tensor) else other.part(7, 0, 0, (96, 160))
        assert abs(torch.corrcoef(torch.stack([other.flatten(), whole.flatten()]))[0, 1]) < 0.1


def jumps(image: np.ndarray, places: list[int]) -> float:
    """Mean step across the columns before `places`, over that across all columns."""
    steps = np.abs(np.diff(image.astype(np.float64), axis=1)).mean(axis=0)
    return steps[[p - 1 for p in places]].mean() / steps.mean()


def hard(length, side, begins):
    """Weights without a blend: of each place the last tile counts alone."""
    last = np.zeros(length, int)
    for i, begin in enumerate(begins):
        last[begin : begin + side] = i
    return np.stack([last[b : b + side] == i for i, b in enumerate(begins)]).astype(np.float32)


def test_no_seam_shows_where_tiles_begin_and_end(monkeypatch):
    monkeypatch.setattr(tiles, "translate", relative)
    found = tiled().translate(PHOTO, 0)
    assert found.shape == PHOTO.shape[:2] and found.dtype == np.float32
    begins = starts(336, TILE)
    borders = [b for b in {*begins, *(b + TILE for b in begins)} if 0 < b < 330]
    assert jumps(found, borders) < 1.1
    monkeypatch.setattr(tiles, "weights", hard)  # the measure sees seams where there are some
    assert jumps(tiled().translate(PHOTO, 0), borders) > 2


def test_what_is_coarse_comes_from_the_whole_photograph(monkeypatch):
    monkeypatch.setattr(tiles, "translate", relative)
    expected = (SMOOTH - SMOOTH.mean()) / 255 + 0.5
    margins = (0, -150 % 16), (0, -330 % 16), (0, 0)
    tiles_alone = tiled()._joined(np.pad(PHOTO, margins, "symmetric"), 0)[:150, :330].numpy()
    assert np.abs(tiles_alone - expected).mean() > 0.08  # each tile has a level of its own
    assert np.abs(tiled().translate(PHOTO, 0) - expected).mean() < 0.03


def test_overlapping_tiles_agree_on_their_noise(monkeypatch):
    monkeypatch.setattr(tiles, "translate", grey_and_noise)
    work, photo = tiled(), PHOTO[:144, :320]
    field = NoiseField(work.translator.backbone, (144, 320), 0, CPU).part(3, 0, 0, (144, 320))
    expected = torch.from_numpy(photo[..., 0] / 255.0) + 0.05 * field.view(144, 320)
    torch.testing.assert_close(work._joined(photo, 3), expected.float(), atol=1e-5, rtol=0)


def test_the_result_depends_neither_on_batches_nor_on_ranks(monkeypatch):
    monkeypatch.setattr(tiles, "translate", grey_and_noise)
    work, photo = tiled(), PHOTO[:144, :320]
    whole, shares = work._joined(photo, 3), []
    assert not torch.allclose(whole, work._joined(photo, 4), atol=0.01)
    for rank in (0, 1, 2):
        monkeypatch.setattr(tiles.dist, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(tiles.dist, "world_size", lambda: 3)
        monkeypatch.setattr(tiles.dist, "sum_over_ranks", lambda x: x)
        shares.append(replace(work, batch_size=3)._joined(photo, 3))
    torch.testing.assert_close(sum(shares), whole, atol=1e-6, rtol=0)


def test_a_mirrored_photograph_gives_the_mirrored_image(monkeypatch):
    monkeypatch.setattr(tiles, "translate", grey_and_noise)
    work = tiled(mirror=True)
    plain, turned = work.translate(PHOTO, 0), work.translate(PHOTO[:, ::-1], 0)[:, ::-1]
    np.testing.assert_allclose(plain, turned, atol=1e-6)


def test_the_model_never_sees_more_than_a_batch_of_tiles(monkeypatch):
    seen = []
    monkeypatch.setattr(tiles, "translate", lambda *a, **k: seen.append(a[1].shape) or relative(*a))
    tiled().translate(PHOTO[:40], 0)  # narrower than a tile
    whole, *parts = seen
    assert whole[0] == 1 and whole[2] * whole[3] < 1.5 * TILE * TILE
    assert {tuple(shape[1:]) for shape in parts} == {(3, 48, TILE)}
    assert max(shape[0] for shape in parts) <= 4
