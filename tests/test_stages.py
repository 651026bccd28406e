"""Every script from end to end at toy size: what a user runs, and what must hold across stages.

pytest tests/test_stages.py
"""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import generate
from assembly import checkpoints
from assembly.bundle import CONFIG_FILE, read_bundle
from configs import schema
from configs.schema import FinetuneConfig, PretrainConfig, TrainConfig
from data.pairs import open_pairs
from models.fast.plan import resolve
from models.translator import TranslatorConfig
from tests import tiny_data
from tests.conftest import ROOT
from tests.conftest import call_main as call
from utils import checkpoint, config, metrics

SCENES = "data.synthetic_scenes={train: 12, val: 4, test: 4}"
TINY = [
    "data.size=32",
    SCENES,
    "data.num_workers=0",
    "training.steps=4",
    "training.batch_size=4",
    "training.log_every=1",
    "training.eval_every=2",
    "training.save_every=2",
    "run.images=2",
    "--device",
    "cpu",
]
KINDS = {"pretrain": PretrainConfig, "train": TrainConfig, "finetune": FinetuneConfig}
STAGE = {
    "pretrain": ["--config", "configs/demo/pretrain.yaml", "model.width=8"],
    "train": [
        "--config",
        "configs/demo/train.yaml",
        "sampling.steps=2",
        "model.discriminator=true",
        "model.lora_config.r=4",
        "flow.adversarial_weight=0.1",
    ],
    "finetune": [
        "--config",
        "configs/demo/finetune.yaml",
        "sampling.steps=2",
        "flow.adversarial_weight=0.1",
    ],
}


def arguments(stage: str, folder: Path, made: Path, *more: str) -> list[str]:
    """The command line of a stage that writes to `folder` and starts from the runs in `made`."""
    links = {
        "pretrain": [],
        "train": ["--decomposition_checkpoint", str(made / "pretrain" / "best_model.pth")],
        "finetune": ["--checkpoint", str(made / "train" / "best_model.pth")],
    }
    return [*STAGE[stage], *TINY, *links[stage], "--output_dir", str(folder), *more]


@pytest.mark.parametrize("folder", ["configs", "configs/demo", "configs/small", "configs/real"])
def test_stage_3_holds_the_maps_to_the_labels_of_stage_1(folder):
    read = [
        config.load(kind, ["--config", str(ROOT / folder / f"{stage}.yaml")], starts=False)
        for stage, kind in KINDS.items()
    ]
    assert read[0].data.labels == read[1].data.labels == read[2].data.labels


def torchrun(script: str, argv: list[str]) -> subprocess.CompletedProcess:
    """Run a script with two ranks."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--rdzv_backend=c10d",
        "--rdzv_endpoint=localhost:0",
        f"{script}.py",
    ]
    return subprocess.run(
        [*command, *argv],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """All three stages trained for four steps, in the folders pretrain, train and finetune."""
    folder = tmp_path_factory.mktemp("runs")
    for stage in STAGE:
        call(stage, *arguments(stage, folder / stage, folder))
    return folder


def last_weights(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(checkpoint.latest(folder))["model"]


def losses(folder: Path) -> torch.Tensor:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([[r["loss"], r["grad_norm"]] for r in rows if "loss" in r])


@pytest.mark.parametrize("stage", STAGE)
def test_a_resumed_stage_ends_bit_equal_to_the_uninterrupted_one(stage, made, tmp_path):
    shutil.copytree(made / stage, tmp_path / stage)
    (tmp_path / stage / "checkpoint_00000004.pth").unlink()  # as if killed after step 2
    call(stage, *arguments(stage, tmp_path / stage, made))
    whole, resumed = last_weights(made / stage), last_weights(tmp_path / stage)
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[n], resumed[n]) for n in whole)
    assert torch.equal(losses(made / stage), losses(tmp_path / stage))


@pytest.mark.parametrize("stage", STAGE)
def test_two_ranks_give_the_losses_of_one(stage, made, tmp_path):
    argv = arguments(stage, tmp_path / "two", made, "training.batch_size=2")
    done = torchrun(stage, argv)
    assert done.returncode == 0, done.stderr[-2000:]
    torch.testing.assert_close(losses(tmp_path / "two"), losses(made / stage), rtol=2e-4, atol=1e-5)


def test_two_ranks_train_a_decomposition_that_no_loss_term_holds(made, tmp_path):
    """The consistency term is in the graph at weight 0 too: DDP waits for every gradient."""
    argv = arguments(
        "finetune",
        tmp_path / "two",
        made,
        "training.batch_size=2",
        "training.lambda_decomposition_consistency=0",
    )
    done = torchrun("finetune", argv)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("stage", STAGE)
def test_a_stage_trains_what_it_should_and_writes_a_full_record(stage, made):
    run = made / stage
    names = {
        "best_model.pth",
        "config.yaml",
        "command.txt",
        "commit.txt",
        "code.diff",
        "metrics.jsonl",
        "checkpoint_00000002.pth",
        "checkpoint_00000004.pth",
    }
    assert names <= {p.name for p in run.iterdir()}
    assert any(p.name.startswith("events.out.tfevents") for p in run.iterdir())
    first = checkpoint.load(run / "checkpoint_00000002.pth")["model"]
    last = checkpoint.load(run / "checkpoint_00000004.pth")["model"]
    moved = {n.split(".")[0] for n in first if not torch.equal(first[n], last[n])}
    assert (
        moved
        == {
            "pretrain": {"decomposition", "fusion"},
            "train": {"flux", "guidance", "backbone", "discriminator"},
            "finetune": {"flux", "guidance", "backbone", "discriminator", "stage1"},
        }[stage]
    )


@pytest.mark.parametrize("stage", STAGE)
def test_the_best_model_can_be_chosen_by_what_an_evaluation_gives_and_by_nothing_else(
    stage, made, tmp_path
):
    rows = [json.loads(line) for line in (made / stage / "metrics.jsonl").read_text().splitlines()]
    given = {name for row in rows for name in row if name.startswith("val_")}
    given = {n for n in given if not n.startswith("val_loss_t")}  # an empty bin has no value
    known = (
        schema.OF_MAPS + schema.OF_FUSED
        if stage == "pretrain"
        else ["val_loss", "val_loss_mean"] + schema.OF_SAMPLES
    )
    assert given - {"val_labelled", "val_commonest"} == set(known)
    for chosen in known:
        argv = [*STAGE[stage], f"training.best_metric=-{chosen}"]
        config.load(KINDS[stage], argv, starts=False)
    with pytest.raises(ValueError, match=r"best_metric is val_lose; .* give val_loss, "):
        call(stage, *arguments(stage, tmp_path, made, "training.best_metric=val_lose"))
    with pytest.raises(ValueError, match="best_metric is val_psnr"):
        no_images = {"pretrain": "physics=false"}.get(stage, "run.images=0")
        config.load(KINDS[stage], [*STAGE[stage], "training.best_metric=val_psnr", no_images])


@pytest.mark.parametrize("fast, runs", [([], "fused convolutions"), (["--fast", "off"], "plain")])
def test_a_trained_model_is_used_with_fast_paths_or_without(fast, runs, made, tmp_path, capsys):
    argv = ["--steps", "1", "--device", "cpu", "--limit", "1", "--output_dir", tmp_path, *fast]
    for stage in ("pretrain", "train"):
        call("evaluate", "--checkpoint", made / stage / "best_model.pth", *argv)
        assert re.search(f"stage 1 +{runs}", capsys.readouterr().out)


def test_without_fast_paths_a_rounded_base_is_not_rounded():
    there = TranslatorConfig(base_dtype="fp8", compile=True, memory="24g")
    for fast, expected in (
        (None, ("fp8", True)),
        ("auto", ("fp8", True)),
        ("off", ("bf16", False)),
    ):
        cfg = resolve(replace(there, **checkpoints._how_fast(there, fast)), torch.device("cpu"))
        assert (cfg.base_dtype, cfg.compile) == expected


@pytest.mark.parametrize("value", ["model.physics=off", "model.decomposition.width=16"])
def test_what_stage_1_decides_is_not_taken_from_the_command_line(value, made, tmp_path):
    with pytest.raises(ValueError, match="is decided by model.decomposition_checkpoint"):
        call("train", *arguments("train", tmp_path / "run", made, value))


def test_a_changed_seed_and_a_random_frozen_flux_are_said(made, tmp_path, capsys):
    shutil.copytree(made / "pretrain", tmp_path / "run")
    (tmp_path / "run" / "checkpoint_00000004.pth").unlink()
    call("pretrain", *arguments("pretrain", tmp_path / "run", made, "training.seed=5"))
    assert "training.seed was 0, is now 5" in capsys.readouterr().out
    other = "model.train_base=false", "model.layout=diptych", "--dry_run"
    call("train", *arguments("train", tmp_path / "x", made, *other))
    assert "with model.train_base=false nothing is learnt" in capsys.readouterr().out


def test_a_dry_run_refuses_what_the_run_would(made, tmp_path):
    with pytest.raises(ValueError, match="lr_min"):
        call("pretrain", *arguments("pretrain", tmp_path, made, "--lr", "1e-9", "--dry_run"))


def test_foreign_pairs_have_their_own_labels_and_notes(made, tmp_path, capsys):
    common = ["--checkpoint", made / "pretrain", "--device", "cpu", "--num_workers", "0"]
    rows = tiny_data.rows(10) | {"ir_unit": ["celsius"] * 10}
    tiny_data.write(tmp_path / "set" / "a.parquet", rows)
    call("evaluate", *common, "--test_data", tmp_path / "set", "--output_dir", tmp_path / "out")
    said = (tmp_path / "out" / "results.md").read_text()
    assert "split_fractions" in said and "| MAE K |" in said
    for mean in json.loads((tmp_path / "out" / "results.json").read_text())["methods"].values():
        assert mean["mae_kelvin"] == pytest.approx(255 * mean["mae"], rel=1e-4)  # 0 to 255 celsius
    call(
        "evaluate",
        "--checkpoint",
        made / "train",
        *common[2:],
        "--steps",
        "1",
        "--test_data",
        tmp_path / "set",
        "--output_dir",
        tmp_path / "window",
    )
    said = (tmp_path / "window" / "results.md").read_text()
    assert "their own window, 0 to 255" in said and "was trained with 0 to 1," in said
    tiny_data.folders(tmp_path, names := [f"a_{i}" for i in range(10)])
    (tmp_path / "classes").mkdir()
    for name in names:
        Image.fromarray(np.full((24, 32), 3, np.uint8)).save(tmp_path / f"classes/{name}.png")
    argv = [
        "--visible",
        "visible",
        "--infrared",
        "infrared",
        "--semantic",
        "classes",
        "--table",
        "msrs",
        "--num_workers",
        "1",
        "--out",
        "msrs",
    ]
    argv = [str(tmp_path / x) if x in ("visible", "infrared", "classes") else x for x in argv]
    call("prepare", *argv[:-1], tmp_path / "msrs")
    call("prepare", "--check", tmp_path / "msrs")
    assert "10 pairs are as they were written" in capsys.readouterr().out
    for script in ("evaluate", "visualize"):
        call(script, *common, "--test_data", tmp_path / "msrs", "--output_dir", tmp_path / script)
    assert "materials (msrs labels)" in (tmp_path / "evaluate" / "results.md").read_text()


def test_another_stage_in_the_same_folder_is_refused_in_one_sentence(made, tmp_path):
    shutil.copytree(made / "pretrain", tmp_path / "run")
    with pytest.raises(ValueError, match="another script trains; choose another run.output_dir$"):
        call("train", *arguments("train", tmp_path / "run", made))


def test_stage_2_starts_from_the_weights_of_stage_1(made):
    stage1, stage2 = last_weights(made / "pretrain"), None
    best = checkpoint.load(made / "pretrain" / "best_model.pth")["model"]
    stage2 = last_weights(made / "train")
    assert stage1.keys() == best.keys()
    assert all(torch.equal(stage2[f"stage1.{name}"], x) for name, x in best.items())


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_evaluation_writes_every_row_for_a_checkpoint_of_any_stage(stage, made, tmp_path, capsys):
    call(
        "evaluate",
        "--checkpoint",
        made / stage,
        "--output_dir",
        tmp_path,
        "--device",
        "cpu",
        *(["--steps", "2"] if stage != "pretrain" else []),
    )
    results = json.loads((tmp_path / "results.json").read_text())
    rows = ["training mean", "grey", "inverted grey", "fused (stage 1)"]
    assert list(results["methods"]) == rows + (["sample", "mean"] if stage == "finetune" else [])
    assert results["split"] == "test" and results["pairs"] == 4
    table = list(csv.DictReader((tmp_path / "per_image.csv").open()))
    assert len(table) == 4 * len(results["methods"])
    grey = [float(r["rank"]) for r in table if r["method"] == "grey"]
    inverted = [float(r["rank"]) for r in table if r["method"] == "inverted grey"]
    assert np.allclose(grey, [-x for x in inverted], atol=1e-4)
    data = checkpoints.read(made / stage)[0].data
    seen, held = (open_pairs(data, split) for split in ("train", "test"))
    mean = torch.stack([seen.get(i)["infrared"][0] for i in range(len(seen))]).mean(0)
    mae = [(held.get(i)["infrared"][0] - mean).abs().mean().item() for i in range(len(held))]
    assert results["methods"]["training mean"]["mae"] == pytest.approx(np.mean(mae))
    out = capsys.readouterr().out
    assert "| training mean |" in out and "ln 32 = 3.466" in out


def test_rows_without_names_are_averaged_and_no_name_leaves_the_folder(made, tmp_path):
    """Unnamed rows of two files get equal names; a name may be a path, two one file's name."""
    columns = tiny_data.rows(4, split=lambda i: ["train", "test", "test", "val"][i])
    evil = {**columns, "name": ["../../a", "../../b", "../.._b", "d"]}
    evil["source"] = [f"{tmp_path}/x"] * 4
    tiny_data.write(tmp_path / "evil" / "a.parquet", evil)
    del columns["name"]
    for folder in ("a", "b"):
        tiny_data.write(tmp_path / "unnamed" / folder / "part.parquet", columns)
    common = ["--checkpoint", made / "pretrain", "--device", "cpu", "--num_workers", "0"]
    call("evaluate", *common, "--test_data", tmp_path / "unnamed", "--output_dir", tmp_path / "out")
    text = (tmp_path / "out" / "results.json").read_text()
    assert "NaN" not in text and json.loads(text)["stage1"]["material_ce"] is None  # no labels
    assert json.loads(text)["pairs"] == 4
    found = list(csv.DictReader((tmp_path / "out" / "per_image.csv").open()))
    grey = [float(row["psnr"]) for row in found if row["method"] == "grey"]
    assert json.loads(text)["methods"]["grey"]["psnr"] == pytest.approx(np.mean(grey))
    call("visualize", *common, "--test_data", tmp_path / "evil", "--output_dir", tmp_path / "draw")
    assert len(list((tmp_path / "draw").glob("*_x_.._.._*.png"))) == 2
    assert {p.parent for p in tmp_path.rglob("*.png")} == {tmp_path / "draw"}


def test_lpips_is_a_column_where_it_is_asked_for(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(metrics, "Lpips", lambda device: metrics.mae)
    arguments = ["--checkpoint", made / "pretrain", "--device", "cpu", "--limit", "2"]
    call("evaluate", *arguments, "--output_dir", tmp_path / "with", "--lpips")
    assert "| LPIPS |" in capsys.readouterr().out
    methods = json.loads((tmp_path / "with" / "results.json").read_text())["methods"]
    assert methods["grey"]["lpips"] == pytest.approx(
        np.mean(
            [
                float(row["lpips"])
                for row in csv.DictReader((tmp_path / "with" / "per_image.csv").open())
                if row["method"] == "grey"
            ]
        )
    )
    call("evaluate", *arguments, "--output_dir", tmp_path / "without")
    assert "LPIPS" not in capsys.readouterr().out


def test_panels_are_drawn_for_every_scene(made, tmp_path):
    call(
        "visualize",
        "--checkpoint",
        made / "finetune",
        "--output_dir",
        tmp_path,
        "--limit",
        "2",
        "--steps",
        "2",
        "--device",
        "cpu",
    )
    learnt = {"confusion.png", "emissivity.png"}  # of the stage 1 inside; its curves are elsewhere
    assert learnt < {path.name for path in tmp_path.glob("*.png")}
    pictures = sorted(path for path in tmp_path.glob("*.png") if path.name not in learnt)
    assert len(pictures) == 2
    image = np.asarray(Image.open(pictures[0]))
    assert image.shape[1] > 1000 and image.std() > 20


@pytest.mark.parametrize("more", [[], ["--keep_aspect"], ["--tile", "auto", "--mode", "mean"]])
def test_generated_images_have_the_photographs_sizes_and_names(made, tmp_path, more):
    photos = tmp_path / "photos"
    photos.mkdir()
    sizes = {"wide": (90, 30), "tall": (20, 75), "odd": (33, 47)}
    for name, size in sizes.items():
        Image.new("RGB", size, (80, 120, 60)).save(photos / f"{name}.jpg")
    (photos / "notes.txt").write_text("not an image")
    call(
        "generate",
        "--checkpoint",
        made / "finetune" / "export",
        "--image_path",
        photos,
        "--output_dir",
        tmp_path / "out",
        "--steps",
        "2",
        "--device",
        "cpu",
        *more,
    )
    out = {p.stem: Image.open(p) for p in (tmp_path / "out").glob("*.png")}
    assert {name: image.size for name, image in out.items()} == sizes
    assert all(image.mode == "L" for image in out.values())


def test_photographs_are_generated_in_batches_of_one_length(made, tmp_path, monkeypatch):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(5):
        noise = np.random.default_rng(i).integers(0, 255, (40, 30, 3), np.uint8)
        Image.fromarray(noise).save(photos / f"{i}.png")
    asked, right = [], generate.infrared_of
    monkeypatch.setattr(generate, "infrared_of", lambda *a: asked.append(a[2]) or right(*a))
    for size in (1, 4):
        call(
            "generate",
            "--checkpoint",
            made / "train" / "export",
            "--image_path",
            photos,
            "--output_dir",
            tmp_path / str(size),
            "--steps",
            "2",
            "--device",
            "cpu",
            "--batch_size",
            size,
        )
    assert asked == [[0], [1], [2], [3], [4], [0, 1, 2], [3, 4, 5]]  # 5: fills up
    for i in range(5):
        a, b = (np.asarray(Image.open(tmp_path / n / f"{i}.png")).astype(int) for n in "14")
        assert a.shape == (40, 30) and np.abs(a - b).max() <= 1 and a.std() > 1
    assert len([*(tmp_path / "4").iterdir()]) == 5


@pytest.mark.parametrize("count, world", [(1, 1), (1, 3), (7, 2), (8, 2), (9, 2), (30, 4)])
def test_ranks_share_photographs_in_as_many_batches_of_one_length(count, world, monkeypatch):
    shares = []
    for rank in range(world):
        monkeypatch.setattr(generate.dist, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(generate.dist, "world_size", lambda: world)
        shares.append(generate.share(count, 4))
    assert len({len(mine) for mine in shares}) == 1
    assert len({len(batch) for mine in shares for batch in mine}) == 1
    draws = [draw for mine in shares for batch in mine for draw in batch]
    assert sorted(draws) == list(range(len(draws))) and count <= len(draws)
    assert len(shares[0][0]) <= 4 and len(draws) - count < world * len(shares[0])


def test_a_damaged_photograph_is_named_and_the_others_are_generated(made, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in "abc":
        Image.effect_noise((32, 32), 50).convert("RGB").save(photos / f"{name}.png")
    (photos / "b.png").write_bytes((photos / "b.png").read_bytes()[:-60])
    (photos / "d.png").touch()
    with pytest.raises(ValueError, match=r"(?s)1\. .*b\.png: damaged or truncated.*2\. .*d\.png"):
        call(
            "generate",
            "--checkpoint",
            made / "train" / "export",
            "--image_path",
            photos,
            "--output_dir",
            tmp_path / "out",
            "--steps",
            "1",
            "--device",
            "cpu",
        )
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"a.png", "c.png"}


def test_evaluating_on_other_data_needs_no_training_pairs(made, tmp_path):
    """They are only behind the row of the training mean; without them a note stands there."""
    parts = checkpoint.load(made / "pretrain" / "best_model.pth")
    parts["config"]["data"]["path"] = str(tmp_path / "gone")
    torch.save(parts, tmp_path / "moved.pth")
    columns = tiny_data.rows(3, split=lambda i: ["train", "val", "test"][i])
    data = tiny_data.write(tmp_path / "other.parquet", columns)
    argv = ["--checkpoint", tmp_path / "moved.pth", "--device", "cpu", "--num_workers", 0]
    call("evaluate", *argv, "--test_data", data, "--output_dir", tmp_path / "out")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["methods"]) == ["grey", "inverted grey", "fused (stage 1)"]
    assert "no row of the training mean" in (tmp_path / "out" / "results.md").read_text()
    with pytest.raises(ValueError, match="gone"):
        call("evaluate", *argv, "--output_dir", tmp_path / "own")


def test_generate_neither_overwrites_a_photograph_nor_wraps_counts(made, tmp_path):
    photo = tmp_path / "photo.png"
    Image.new("RGB", (32, 32)).save(photo)
    argv = ["--image_path", photo, "--steps", "1", "--device", "cpu", "--checkpoint"]
    before = photo.read_bytes()
    with pytest.raises(ValueError, match="photo.png would be overwritten"):
        call("generate", *argv, made / "train" / "export", "--output_dir", tmp_path)
    assert photo.read_bytes() == before
    folder = shutil.copytree(made / "train" / "export", tmp_path / "celsius")
    notes = json.loads((folder / CONFIG_FILE).read_text())
    for window, fits in (([-20.0, 60.0], False), ([0.0, 1.0], False), ([20000.0, 30000.0], True)):
        notes["config"]["window"] = window
        (folder / CONFIG_FILE).write_text(json.dumps(notes))
        with nullcontext() if fits else pytest.raises(ValueError, match="--counts writes whole"):
            call("generate", *argv, folder, "--output_dir", tmp_path / "out", "--counts")
    counts = np.asarray(Image.open(tmp_path / "out" / "photo.png"))
    assert counts.dtype == np.uint16 and 20000 <= counts.min() <= counts.max() <= 30000


def test_an_exported_folder_generates_what_its_checkpoint_generates(made, tmp_path):
    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)).save(photo)
    for name in ("export", "best_model.pth"):
        call(
            "generate",
            "--checkpoint",
            made / "train" / name,
            "--image_path",
            photo,
            "--output_dir",
            tmp_path / name,
            "--steps",
            "2",
            "--device",
            "cpu",
        )
    names = ("export", "best_model.pth")
    a, b = (np.asarray(Image.open(tmp_path / name / "photo.png")) for name in names)
    assert np.array_equal(a, b)


def test_a_dry_run_prints_and_writes_nothing(made, tmp_path, capsys):
    call("train", *arguments("train", tmp_path / "run", made, "--dry_run"))
    out = capsys.readouterr().out
    for words in ("one batch", "visible        (4, 3, 32, 32)", "trained", "one step: loss"):
        assert words in out
    assert not (tmp_path / "run").exists()


BAD = [
    ("train", ["training.stepss=3"], "did you mean training.steps?"),
    ("train", ["training.steps=many"], "training.steps"),
    ("train", ["--decomposition_checkpoint", "missing.pth"], "missing.pth"),
    ("train", ["data.path=missing_folder"], "missing_folder"),
    ("train", ["data.size=40"], "multiples of 16"),
    ("train", ["model.inject={9: [intensity]}"], "block 9"),
    (
        "train",
        [
            "data.latents=cache",
            "data.augment.crop_scale=[1,1]",
            "data.augment.brightness=0",
            "data.augment.contrast=0",
        ],
        "data.latents=null",
    ),
    (
        "train",
        ["model.preset=null", "model.layout=channels", "model.flux_fill_id=missing_flux"],
        "model.flux_fill_id",
    ),
    ("pretrain", ["data.synthetic_scenes={train: 4, val: 0, test: 1}"], "val"),
    ("pretrain", ["model.pretrained=missing.pth"], "missing.pth"),
    ("finetune", ["--checkpoint", "missing.pth"], "missing.pth"),
    ("evaluate", ["--checkpoint", "missing.pth"], "missing.pth"),
    ("evaluate", ["--limit", "-1"], "limit"),
    ("train", ["sampling.steps=0"], "sampling"),
    ("generate", ["--image_path", "missing.jpg"], "missing.jpg"),
    *([] if torch.cuda.is_available() else [("train", ["--device", "cuda"], "cuda")]),
]


@pytest.mark.parametrize("script, wrong, words", BAD)
def test_bad_input_is_one_sentence_and_writes_nothing(script, wrong, words, made, tmp_path, capsys):
    from utils.run import entry

    out = tmp_path / "run"
    argv = arguments(script, out, made) if script in STAGE else ["--output_dir", out]
    with pytest.raises(SystemExit) as stopped:
        entry(lambda: call(script, *argv, *wrong))
    error = capsys.readouterr().err.strip()
    said = error[error.rindex("error: ") :]
    assert stopped.value.code == 2
    assert words in said and "Traceback" not in error
    assert said.count("\n") in (0, 2)  # one sentence, or a default checkpoint is missing too
    assert not out.exists()


def test_stage_2_refuses_a_checkpoint_of_stage_2_as_its_decomposition(made, tmp_path):
    with pytest.raises(ValueError, match="pretrain"):
        call(
            "train",
            *arguments("train", tmp_path / "run", made),
            "--decomposition_checkpoint",
            made / "train" / "best_model.pth",
        )


@pytest.mark.parametrize(
    "asked",
    [
        ["model.text_tokens=9"],
        ["--decomposition_checkpoint", "x.pth"],
        ["model.inject={1: [context]}"],
        ["model.train_base=false"],
        ["model.lora_config.r=16"],
    ],
)
def test_stage_3_refuses_what_its_checkpoint_decides(made, tmp_path, asked):
    with pytest.raises(ValueError, match="which decides it here; leave it out"):
        call("finetune", *arguments("finetune", tmp_path / "run", made, *asked))


@pytest.mark.parametrize(
    "asked, message",
    [
        ("training.lambda_generation=-1", "must not be negative"),
        ("training.lambda_generation=0", "one must be above 0"),
        ("flow.std=0", "std > 0"),
        ("flow.visible_weight=-5", "visible_weight >= 0"),
        ("flow.mean=1e9", "0 or 1"),
        ("flow.mean=nan", "expected a finite number"),
        ("data.num_workers=-1", "num_workers"),
        ("run.output_dir=", "output_dir is empty"),
        ("training.grad_clip=.nan", "finite number"),
    ],
)
def test_values_that_train_towards_nothing_are_refused_at_start(made, tmp_path, asked, message):
    with pytest.raises(ValueError, match=message):
        call("train", *arguments("train", tmp_path / "run", made), asked)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("r, words", [(0, "it lacks"), ("x", "lora_config.r")])
def test_an_edited_export_is_one_sentence(made, tmp_path, r, words):
    folder = shutil.copytree(made / "train" / "export", tmp_path / "export")
    notes = json.loads((folder / CONFIG_FILE).read_text())
    notes["config"]["model"]["lora_config"]["r"] = r
    (folder / CONFIG_FILE).write_text(json.dumps(notes))
    with pytest.raises(ValueError, match=f"export.*{words}|{words}.*export"):
        checkpoints.load_translator(folder, torch.device("cpu"))
    (folder / CONFIG_FILE).write_text("{")
    with pytest.raises(ValueError, match="export is not an exported model"):
        read_bundle(folder)


def test_a_random_frozen_flux_keeps_its_seed(made, tmp_path):
    parts = checkpoint.load(made / "train" / "best_model.pth")
    frozen = {"train_base": False, "layout": "diptych", "discriminator": False}
    parts["config"]["model"] |= frozen
    gone = ("flux.", "backbone.", "discriminator.")
    parts["model"] = {
        n: x for n, x in parts["model"].items() if not n.startswith(gone) or ".lora_" in n
    }
    checkpoint.save(tmp_path / "frozen.pth", {k: v for k, v in parts.items() if k != "versions"})
    argv = arguments("finetune", tmp_path / "run", made, "--checkpoint", tmp_path / "frozen.pth")
    argv += ["flow.adversarial_weight=0"]
    with pytest.raises(ValueError, match=r"frozen FLUX.*set training.seed=0 \(it is 7\)"):
        call("finetune", *argv, "training.seed=7")
    call("finetune", *argv, "training.steps=1")


def test_a_checkpoint_of_another_architecture_is_refused(made, tmp_path):
    parts = checkpoint.load(made / "train" / "best_model.pth")
    parts["config"]["model"]["preset"] = "small"
    checkpoint.save(tmp_path / "other.pth", {k: v for k, v in parts.items() if k != "versions"})
    with pytest.raises(ValueError, match="other.pth"):
        call(
            "finetune",
            *arguments("finetune", tmp_path / "run", made),
            "--checkpoint",
            tmp_path / "other.pth",
        )


def test_evaluation_counts_every_pair_though_names_are_equal(made, tmp_path):
    columns = tiny_data.rows(4, split=lambda i: ["train", "val", "test", "test"][i])
    columns["name"] = ["a", "b", "c", "c"]
    data = tiny_data.write(tmp_path / "data.parquet", columns)
    call(
        "evaluate",
        "--checkpoint",
        made / "pretrain",
        "--test_data",
        data,
        "--num_workers",
        0,
        "--output_dir",
        tmp_path / "out",
    )
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    with open(tmp_path / "out" / "per_image.csv") as file:
        rows = list(csv.DictReader(file))
    grey = [float(row["psnr"]) for row in rows if row["method"] == "grey"]
    assert found["pairs"] == len(grey) == 2
    assert found["methods"]["grey"]["psnr"] == pytest.approx(sum(grey) / 2)


def test_evaluation_finds_a_folder_that_cannot_be_written_before_the_work(made, tmp_path, capfd):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file; name a folder"):
        call(
            "evaluate",
            "--checkpoint",
            made / "pretrain",
            "--num_workers",
            0,
            "--output_dir",
            tmp_path / "file",
        )
    assert "evaluate test" not in capfd.readouterr().err


def test_generating_never_writes_over_a_photograph(made, tmp_path):
    photo = tmp_path / "a.png"
    Image.fromarray(tiny_data.visible(0)).save(photo)
    before = photo.read_bytes()
    with pytest.raises(ValueError, match="a.png would be overwritten"):
        call(
            "generate",
            "--checkpoint",
            made / "train",
            "--image_path",
            tmp_path,
            "--output_dir",
            tmp_path,
        )
    assert photo.read_bytes() == before


def test_counts_are_refused_where_the_window_does_not_fit_16_bits(made, tmp_path):
    parts = checkpoint.load(made / "train" / "best_model.pth")
    parts["config"]["window"] = [-20.0, 120.0]
    checkpoint.save(tmp_path / "celsius.pth", {k: v for k, v in parts.items() if k != "versions"})
    Image.fromarray(tiny_data.visible(0)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="-20 to 120"):
        call(
            "generate",
            "--checkpoint",
            tmp_path / "celsius.pth",
            "--counts",
            "--image_path",
            tmp_path / "a.png",
            "--output_dir",
            tmp_path / "out",
        )


def test_generate_writes_every_format_and_keeps_folders(made, tmp_path, capsys):
    photos = tmp_path / "photos"
    for name in ("a.png", "day/b.png"):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(tiny_data.visible(0)).save(photos / name)
    (photos / "notes.txt").write_text("x")
    (photos / "raw.DNG").write_bytes(b"II*\0")
    parts = checkpoint.load(made / "train" / "best_model.pth")
    parts["config"] |= {"window": [-20.0, 60.0], "unit": "celsius"}
    model = tmp_path / "celsius.pth"
    checkpoint.save(model, {k: v for k, v in parts.items() if k != "versions"})
    argv = ["--checkpoint", model, "--image_path", photos, "--steps", "1", "--device", "cpu"]
    argv += ["--recursive", "--output_dir"]
    for kind in ("png16", "npy"):
        with pytest.raises(ValueError, match=r"raw.DNG: camera raw \(DNG\) is not read"):
            call("generate", *argv, tmp_path / kind, "--format", kind)
    assert "left out: 1 file (notes.txt)" in capsys.readouterr().out
    kelvin = np.load(tmp_path / "npy" / "day" / "b.npy")
    assert kelvin.shape == (24, 32) and 253.15 <= kelvin.min() <= kelvin.max() <= 333.15
    facts = json.loads((tmp_path / "png16" / "day" / "b.json").read_text())
    numbers = np.asarray(Image.open(tmp_path / "png16" / "day" / "b.png"))
    assert numbers.dtype == np.uint16 and facts["unit"] == "celsius"
    celsius = numbers * facts["scale"] + facts["offset"]
    assert np.abs(celsius + 273.15 - kelvin).max() <= facts["scale"] + 1e-4
    assert not (tmp_path / "npy" / "raw.npy").exists() and (tmp_path / "npy" / "a.npy").exists()
    with pytest.raises(ValueError, match="give one of them"):
        call("generate", *argv, tmp_path / "x", "--format", "npy", "--counts")
