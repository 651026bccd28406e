"""Plots of what stage 1 has learnt: the right numbers arrive, and what is missing is said.

pytest tests/test_plots.py
"""

import json

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

import pretrain
import visualize
from configs.schema import PretrainConfig
from data.materials import (
    IGNORE,
    MATERIALS,
    emissivity_prior,
    material_colors,
    material_table,
)
from data.pairs import open_pairs
from data.stream import evenly_spaced
from models.stage1 import Stage1
from utils import checkpoint, config, metrics, panels, plots

NAMES = ["sky", "bare metal", "skin", "snow"]
COLORS = np.array([[0, 0, 255], [255, 0, 255], [255, 128, 0], [250, 250, 250]], np.uint8)
COUNTS = np.array([[6, 2, 0, 0], [1, 3, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
CPU = torch.device("cpu")
TINY = [
    "model.backbone=resnet18",
    "model.pretrained=none",
    "model.width=8",
    "data.size=32",
    "data.synthetic_scenes={train: 1, val: 1, test: 3}",
]


def drawn_without_overlap(figure) -> bool:
    """No two visible texts of the figure cover each other."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    texts = list(figure.texts)
    for axes in figure.axes:
        low, high = sorted(axes.get_ylim())  # ticks outside have labels too, which are not drawn
        texts += [t for y, t in zip(axes.get_yticks(), axes.get_yticklabels()) if low <= y <= high]
        texts += [*axes.texts, axes.title, axes.xaxis.label, axes.yaxis.label]
        texts += axes.get_legend().get_texts() if axes.get_legend() else []
    texts = [t for t in texts if t.get_text() and t.get_visible()]
    boxes = [t.get_window_extent(renderer) for t in texts]
    whole = figure.bbox
    cut = [
        t.get_text()
        for t, b in zip(texts, boxes)
        if b.x0 < 0 or b.y0 < 0 or b.x1 > whole.x1 or b.y1 > whole.y1
    ]
    assert not cut
    return not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_every_material_has_its_weight_its_prior_and_its_colour():
    learned, prior = np.array([0.9, 0.3, 0.6, 0.5]), np.array([1.0, 0.25, 0.98, 0.97])
    share = np.array([0.2, 0.7, 0.1, 0.0])
    figure = plots.emissivity_figure(learned, prior, share, NAMES, COLORS, 0.5)
    axes = figure.axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["bare metal", "sky", "skin", "snow"]
    marks = [c.get_offsets()[0].tolist() for c in axes.collections]
    order = [1, 0, 2, 3]  # by share, what does not occur last
    assert marks[0::2] == [[prior[i], row] for row, i in enumerate(order)]
    assert marks[1::2] == [[learned[i], row] for row, i in enumerate(order)]
    faces = [tuple(c.get_facecolor()[0][:3]) for c in axes.collections[1::2]]
    assert faces == [(1, 0, 1), (0, 0, 1), (1, 128 / 255, 0), to_rgb("white")]
    assert "0.50 over the 3 materials" in " ".join(t.get_text() for t in figure.texts)
    assert "proxy" in axes.get_xlabel()


def test_the_confusion_matrix_shows_shares_of_the_rows_and_only_what_occurs():
    figure = plots.confusion_figure(COUNTS, NAMES, "accuracy 0.750")
    axes = figure.axes[0]
    np.testing.assert_allclose(axes.images[0].get_array(), [[0.75, 0.25], [0.25, 0.75]])
    assert [t.get_text() for t in axes.get_xticklabels()] == ["sky", "bare metal"]
    assert all(t.get_rotation() == 45 for t in axes.get_xticklabels())  # long names in one row
    assert [t.get_text() for t in axes.get_yticklabels()] == ["sky  66.7%", "bare metal  33.3%"]
    assert [(t.get_position(), t.get_text()) for t in axes.texts] == [
        ((0, 0), "75"),
        ((1, 0), "25"),
        ((0, 1), "25"),
        ((1, 1), "75"),
    ]
    with pytest.raises(ValueError, match="no labelled pixel"):
        plots.confusion_figure(COUNTS * 0, NAMES, "")


def rows(count: int = 3) -> list[dict]:
    logged = []
    for step in range(count):
        weights = {
            f"weight/{n.replace(' ', '_')}": 0.1 * i + 0.01 * step for i, n in enumerate(NAMES)
        }
        scalars = {"fusion/power": 2.5 - step, "fusion/alpha": 0.6, "fusion/beta": 0.5 + step}
        logged += [{"step": step, "loss": 1.0}, {"step": step, **scalars, **weights}]
    return logged


def test_curves_have_every_evaluation_of_the_scalars_and_the_shown_materials():
    power, scalars, weights = plots.curves_figure(rows(), NAMES, COLORS, [1, 3]).axes
    assert power.lines[0].get_xydata().tolist() == [[0, 2.5], [1, 1.5], [2, 0.5]]
    found = {line.get_label(): line.get_ydata().tolist() for line in scalars.lines}
    assert found == {"alpha": [0.6] * 3, "beta": [0.5, 1.5, 2.5]}
    assert [line.get_label() for line in weights.lines] == ["bare metal", "snow"]
    for line, start in zip(weights.lines, (0.1, 0.3)):
        np.testing.assert_allclose(line.get_ydata(), [start, start + 0.01, start + 0.02])
    with pytest.raises(ValueError, match="no row has fusion/power"):
        plots.curves_figure([{"step": 1, "loss": 1.0}], NAMES, COLORS, [0])


def test_no_text_covers_another_with_all_materials_or_few():
    names, colors = [m.name for m in MATERIALS], material_colors()
    prior, M = emissivity_prior().numpy(), len(MATERIALS)
    generator = np.random.default_rng(0)
    for seen in (2, 18, M):
        share = np.where(np.arange(M) < seen, 1 / seen, 0)
        counts = generator.integers(1, 90, (M, M)) * (share > 0)[:, None] * (share > 0)
        log = [{f"weight/{n.replace(' ', '_')}": 0.5 for n in names} | row for row in rows()]
        for figure in (
            plots.emissivity_figure(prior, prior, share, names, colors, 1.0),
            plots.confusion_figure(counts, names, "materials: accuracy 0.123, mIoU 0.123"),
            plots.curves_figure(log, names, colors, range(seen)),
        ):
            panels.pixels_of(figure)
            assert drawn_without_overlap(figure)


def made(folder, *more: str):
    """A stage 1 run's folder with untrained weights and a log."""
    cfg = config.load(PretrainConfig, [*TINY, *more])
    torch.manual_seed(0)
    model = Stage1(cfg.model, cfg.physics)
    parts = {"config": config.to_dict(cfg), "model": checkpoint.trained_state(model)}
    checkpoint.save(folder / "best_model.pth", parts)
    log = [{"step": step, **pretrain.learnt(model)} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    return model


def see(folder, monkeypatch, *more: str):
    out = folder / "panels"
    monkeypatch.setattr(
        "sys.argv",
        [
            "visualize.py",
            "--checkpoint",
            str(folder),
            "--output_dir",
            str(out),
            "--device",
            "cpu",
            "--num_workers",
            "0",
            "--limit",
            "1",
            *more,
        ],
    )
    visualize.main()
    return {path.name for path in out.glob("*.png")}


def test_visualize_draws_all_three_of_a_stage_1_run(tmp_path, monkeypatch, capsys):
    model, handed = made(tmp_path), {}
    draw = plots.emissivity_figure

    def spy(learned, prior, share, names, colors, rank):
        handed.update(learned=learned, prior=prior, share=share, rank=rank)
        return draw(learned, prior, share, names, colors, rank)

    monkeypatch.setattr(plots, "emissivity_figure", spy)
    found = see(tmp_path, monkeypatch)
    assert {"emissivity.png", "confusion.png", "curves.png"} < found and len(found) == 4
    assert min(Image.open(tmp_path / "panels" / "emissivity.png").size) > 600
    np.testing.assert_array_equal(handed["learned"], model.fusion.material_weights().numpy())
    np.testing.assert_array_equal(handed["prior"], emissivity_prior().numpy())
    test_pairs = open_pairs(config.load(PretrainConfig, TINY).data, "test")
    ids = material_table("synthetic")[test_pairs.get(evenly_spaced(3, 1)[0])["semantic"]]
    labelled = torch.bincount(ids[ids != IGNORE].flatten(), minlength=len(MATERIALS))
    np.testing.assert_allclose(handed["share"], labelled / labelled.sum())  # not the predictions'
    seen = handed["share"] > 0
    pair = (torch.from_numpy(handed[x][seen]).view(1, 1, 1, -1) for x in ("learned", "prior"))
    assert handed["rank"] == metrics.rank_correlation(*pair).item()
    assert "no " not in capsys.readouterr().out


@pytest.mark.parametrize(
    "values, missing",
    [
        (["data.labels.material_source=none"], {"no confusion.png", "no emissivity.png"}),
        (["data.labels.material_source=quantized"], {"no confusion.png", "no emissivity.png"}),
        (["physics=off"], {"no emissivity.png", "no curves.png"}),
    ],
)
def test_what_cannot_be_drawn_is_said_in_a_line(tmp_path, monkeypatch, capsys, values, missing):
    made(tmp_path, *values)
    found = see(tmp_path, monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    said = {line.partition(":")[0] for line in lines if line.startswith("no ")}
    assert said == missing
    assert not {name.removeprefix("no ") for name in missing} & found
