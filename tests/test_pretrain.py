"""Stage 1 as a script: physics on and off, its validation, its panels and what it says at the end.

pytest tests/test_pretrain.py
"""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import pretrain
from assembly import stage1_step as step
from configs.schema import PretrainConfig
from data.materials import MATERIALS, material_table
from data.pairs import open_pairs
from data.stream import sequential
from losses.pretrain import MultiTaskPretrainLoss
from models.stage1 import Stage1
from utils import checkpoint, config, panels

CPU = torch.device("cpu")
TINY = [
    "model.backbone=resnet18",
    "model.pretrained=none",
    "model.decoder=skips",
    "model.width=8",
    "data.size=32",
    "data.num_workers=0",
    "data.labels.intensity=window",
    "data.synthetic_scenes={train: 8, val: 5, test: 2}",
    "training.batch_size=4",
    "training.mixed_precision=no",
    "training.steps=2",
    "training.log_every=1",
    "training.eval_every=0",
    "run.images=2",
    "run.device=cpu",
]


def configured(*more: str) -> PretrainConfig:
    return config.load(PretrainConfig, [*TINY, *more])


def train(folder, *more: str) -> dict:
    """Run to the end; the last rows of training and of validation as one table."""
    pretrain.pretrain(configured(f"run.output_dir={folder}", *more), CPU)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {name: value for row in rows for name, value in row.items()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrain")
    return folder, train(folder)


def first_step(folder, *more: str) -> tuple[dict, dict]:
    """What one step logs, and the weights it starts from (learning rate 0 keeps them)."""
    row = train(folder, "training.steps=1", "optimizer.params.lr=0", "training.lr_min=0", *more)
    return row, checkpoint.load(folder / "checkpoint_00000001.pth")["model"]


def test_physics_off_changes_no_other_bit(tmp_path):
    """The same start, the same samples, the same terms: only what was removed is missing."""
    with_it, weights = first_step(tmp_path / "on")
    without, fewer = first_step(tmp_path / "off", "physics=off")
    assert {n for n in weights if n not in fewer} == {n for n in weights if "fusion." in n}
    assert all(torch.equal(weights[n], x) for n, x in fewer.items())
    for name in ("intensity", "material", "context", "consistency", "separation", "material_ce"):
        assert with_it[name] == without[name], name
    removed = {n for n in with_it if n not in without}
    assert {
        "physics",
        "reconstruction",
        "val_physics",
        "val_reconstruction",
        "val_psnr",
        "val_ssim",
        "fusion/power",
    } <= removed
    assert all(
        n.startswith(("fusion/", "weight/"))
        or n.removeprefix("val_")
        in {"physics", "reconstruction", "psnr", "ssim", "fused_edge_sharpness"}
        for n in removed
    )


def test_physics_of_weight_zero_trains_the_same_maps_as_physics_off(tmp_path):
    zero = ("loss.physics=0", "loss.reconstruction=0", "training.grad_clip=0")
    train(tmp_path / "zero", *zero)
    train(tmp_path / "off", "training.grad_clip=0", "physics=off")
    a, b = (
        checkpoint.load(tmp_path / run / "checkpoint_00000002.pth")["model"]
        for run in ("zero", "off")
    )
    assert all(torch.equal(a[name], x) for name, x in b.items())


def test_every_term_and_metric_is_logged(made):
    _, row = made
    terms = {
        "intensity",
        "material",
        "context",
        "physics",
        "reconstruction",
        "consistency",
        "separation",
        "material_ce",
        "labelled",
    }
    metrics = {
        "val_loss",
        "val_accuracy",
        "val_miou",
        "val_pearson",
        "val_psnr",
        "val_ssim",
        "val_commonest",
        "val_rank",
        "val_edge_sharpness",
        "val_fused_edge_sharpness",
    }
    scalars = {"fusion/power", "fusion/alpha", "fusion/beta", "weight/sky", "weight/bare_metal"}
    assert terms | {f"val_{t}" for t in terms} | metrics | scalars <= set(row)
    assert all(math.isfinite(row[name]) for name in row)
    assert len([name for name in row if name.startswith("weight/")]) == len(MATERIALS)


def test_validation_does_not_depend_on_the_batches():
    cfg = configured()
    torch.manual_seed(0)
    model, objective = Stage1(cfg.model).eval(), MultiTaskPretrainLoss(cfg.loss)
    pairs = open_pairs(cfg.data, "val")

    def values(size):
        with torch.no_grad():
            return pretrain.validate(cfg, model, objective, sequential(pairs, size), CPU)

    one, two, all_at_once = values(1), values(2), values(5)
    assert one.keys() == two.keys() == all_at_once.keys()
    for name in one:
        assert one[name] == pytest.approx(two[name], rel=1e-4), name
        assert one[name] == pytest.approx(all_at_once[name], rel=1e-4), name


def test_samples_without_labels_do_not_dilute_the_cross_entropy():
    cfg = configured()
    torch.manual_seed(0)
    model, objective = Stage1(cfg.model).eval(), MultiTaskPretrainLoss(cfg.loss)
    batch = next(sequential(open_pairs(cfg.data, "val"), 5))
    half = {name: x[:3] for name, x in batch.items()}
    batch["semantic"][3:] = 255
    with torch.no_grad():
        some, full = (pretrain.validate(cfg, model, objective, [b], CPU) for b in (batch, half))
    assert some["val_labelled"] == pytest.approx(0.6) and full["val_labelled"] == 1
    assert some["val_material_ce"] == pytest.approx(full["val_material_ce"], rel=1e-5)
    assert some["val_accuracy"] == pytest.approx(full["val_accuracy"])


def test_balance_counts_the_labels_of_the_training_pairs(tmp_path, capsys):
    cfg = configured("loss.balance=0.5")
    pairs = open_pairs(cfg.data, "train")
    semantic = torch.stack([pairs.get(i)["semantic"] for i in range(len(pairs))])
    expected = torch.bincount(material_table("synthetic")[semantic].flatten(), minlength=32)
    assert torch.equal(pretrain.material_frequency(cfg, pairs), expected)
    row = train(tmp_path, "loss.balance=0.5")
    assert row["val_material"] != row["val_material_ce"]
    assert "loss.balance has no effect" not in capsys.readouterr().out


def test_balance_without_labels_is_said_and_does_not_stop_the_run(tmp_path, capsys):
    row = train(tmp_path, "loss.balance=0.5", "data.labels.material_source=none")
    assert "loss.balance has no effect" in capsys.readouterr().out
    assert row["material"] == 0


def verdict(source="synthetic", **values) -> str:
    found = {
        "val_labelled": 1.0,
        "val_material_ce": 0.8,
        "val_accuracy": 0.75,
        "val_miou": 0.4,
        "val_commonest": 0.3,
        "val_pearson": 0.9,
        **values,
    }
    return "\n".join(pretrain.verdict(configured(f"data.labels.material_source={source}"), found))


def test_the_last_line_gives_the_cross_entropy_beside_chance():
    assert "cross-entropy 0.800 (chance 3.466), accuracy 0.750" in verdict()
    assert "CHANCE" not in verdict() and "labels" not in verdict()


@pytest.mark.parametrize("values", [{"val_material_ce": 3.4}, {"val_accuracy": 0.3}])
def test_the_last_line_says_when_materials_are_near_chance(values):
    assert "NEAR CHANCE" in verdict(**values)


def test_every_evaluation_says_when_materials_are_near_chance(tmp_path, capsys):
    train(tmp_path, "training.eval_every=1", "optimizer.params.lr=1e-6", "training.lr_min=0")
    said = [line for line in capsys.readouterr().out.splitlines() if "NEAR CHANCE" in line]
    assert len(said) == 3 and said[-1] == said[-2]  # two evaluations, and the end


def test_the_last_line_says_when_labels_are_missing_or_no_materials():
    assert "means nothing" in verdict("none", val_labelled=0.0)
    assert "means nothing" in verdict(val_labelled=0.0)
    assert "grey levels" in verdict("quantized")
    assert "25% of the scenes have no labels" in verdict(val_labelled=0.75)


@pytest.mark.parametrize("source", ["none", "quantized"])
def test_data_without_materials_trains_and_says_so(source, tmp_path, capsys):
    row = train(tmp_path / source, f"data.labels.material_source={source}")
    said = capsys.readouterr().out.splitlines()[-2]
    assert ("means nothing" if source == "none" else "grey levels") in said
    assert row["val_labelled"] == (source == "quantized") and math.isfinite(row["val_loss"])
    assert ("val_material_ce" in row) == (source == "quantized")


def test_scenes_are_drawn_with_a_legend(made):
    folder, _ = made
    picture = np.asarray(Image.open(folder / "scenes.png"))
    assert picture.ndim == 3 and picture.shape[2] == 3
    assert picture.shape[1] > 1000 and picture.std() > 20


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    pretrain.pretrain(configured(f"run.output_dir={tmp_path / 'run'}", "run.dry_run=true"), CPU)
    out = capsys.readouterr().out
    for words in ("visible        (4, 3, 32, 32)", "fusion", "one step: loss", "semantic"):
        assert words in out
    assert not (tmp_path / "run").exists()


def test_thermal_colours_grow_brighter_with_heat_and_saturate():
    ramp = panels.thermal_colors(np.linspace(-1, 2, 31)[None])
    brightness = ramp.astype(int).sum(-1)[0]
    assert (np.diff(brightness[10:21]) > 0).all()
    assert np.array_equal(ramp[0, 0], ramp[0, 10]) and np.array_equal(ramp[0, 20], ramp[0, 30])
    with pytest.raises(ValueError, match="low < high"):
        panels.thermal_colors(np.zeros((2, 2)), 1, 1)


def test_ids_without_a_colour_are_dark_grey_and_not_in_the_legend():
    colors = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)
    ids = np.array([[2, 2, 255], [0, 255, 255]])
    assert panels.id_colors(ids, colors)[0, 2].tolist() == list(panels.UNKNOWN)
    assert panels.id_colors(ids, colors)[0, 0].tolist() == [0, 0, 255]
    legend = panels.legend_of([ids], ["red", "green", "blue"], colors)
    assert [name for name, _ in legend] == ["blue", "red"]


def test_a_mosaic_has_every_channel_in_its_place():
    channels = np.stack([np.full((2, 3), i / 10) for i in range(8)])
    picture = panels.mosaic(channels)
    assert picture.shape == (6, 9, 3)
    assert picture[0, 3, 0] == round(0.1 * 255) and picture[3, 4, 0] == round(0.4 * 255)
    assert (picture[4:, 6:] == 255).all()


def test_a_grid_refuses_rows_of_unequal_length():
    cell = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match="2 cells"):
        panels.grid([[cell, cell], [cell]], ["a", "b"])


def test_a_compiled_run_trains_as_one_that_is_not(made, tmp_path, monkeypatch):
    real, compiled = torch.compile, []

    def traced(function, options=None, **how):  # as inductor does, in no time
        compiled.append(function)
        return real(function, backend="aot_eager", **how)

    monkeypatch.setattr(torch, "compile", traced)
    row = train(tmp_path / "compiled", "compile=true")
    assert len(compiled) == 1
    for name in ("loss", "material_ce", "grad_norm", "val_loss", "val_psnr"):
        assert row[name] == pytest.approx(made[1][name], rel=1e-4), name


def test_a_wrongly_compiled_step_ends_the_run(tmp_path, monkeypatch):
    def wrong(function, **how):  # right at the first steps, as the one that was met
        calls = []

        def tampered(*args):
            calls.append(args)
            loss, parts = function(*args)
            return loss * (1.01 if len(calls) > 2 else 1), parts

        return tampered

    monkeypatch.setattr(torch, "compile", wrong)
    monkeypatch.setattr(step, "COMPARE_EVERY", 3)
    train(tmp_path / "short", "compile=true", "training.steps=3")
    with pytest.raises(RuntimeError, match="a loss of .*, uncompiled .*train with compile=false"):
        train(tmp_path / "long", "compile=true", "training.steps=4")


@pytest.mark.parametrize("wrong", ["model.num_context_channels=3", "model.num_materials=31"])
def test_maps_without_labels_are_refused_at_start(wrong):
    with pytest.raises(ValueError, match=r"must be those of the labels, \(32, 8\)"):
        configured(wrong)


def test_validation_sees_the_validation_split_alone(tmp_path, monkeypatch):
    seen = []

    def spied(pairs, *args):
        for batch in sequential(pairs, *args):
            seen.extend(batch["name"])
            yield batch

    monkeypatch.setattr(pretrain, "sequential", spied)
    train(tmp_path)
    assert sorted(seen) == sorted(open_pairs(configured().data, "val").names)
