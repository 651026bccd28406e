"""The cache of latents: the losses of a run without it, and nothing stale or damaged is read.

pytest tests/test_latents.py
"""

import json
import os
from dataclasses import replace
from unittest import mock

import pytest
import torch

import train
from assembly import translator_step
from assembly.latents import attach_latents
from configs.schema import PretrainConfig, TrainConfig
from data import latents
from data.pairs import DataConfig, open_pairs
from data.stream import sequential, stream
from data.transforms import AugmentConfig
from models.codec import DctCodec, FluxCodec
from models.fast.plan import Plan
from tests import tiny_data
from tests.tiny_models import tiny_translator, write_flux_fill
from utils import config
from utils.run import RunConfig

CPU = torch.device("cpu")
FLIP_ONLY = AugmentConfig(flip=0.5, crop_scale=[1.0, 1.0], brightness=0.0, contrast=0.0)


@pytest.fixture
def data(tmp_path) -> DataConfig:
    """Ten pairs of 24 x 32 pixels, resized to 32 x 32; eight train, one val."""
    columns = tiny_data.rows(10, split=tiny_data.by_tens)
    tiny_data.write(tmp_path / "set" / "a.parquet", columns)
    return DataConfig(path=str(tmp_path / "set"), size=32, num_workers=0, augment=FLIP_ONLY)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(latents, "SHARD", 2)


@pytest.fixture(scope="module")
def model():
    return tiny_translator()


def settings(data: DataConfig, folder=None, **run) -> TrainConfig:
    """Four steps with an evaluation after two."""
    cfg = TrainConfig(data=replace(data, latents=folder and str(folder)))
    schedule = dict(steps=4, batch_size=4, log_every=1, eval_every=2, save_every=2, warmup_steps=0)
    training = replace(cfg.training, **schedule, gradient_accumulation_steps=1)
    return replace(cfg, training=training, run=RunConfig(device="cpu", images=0, **run))


def run(data: DataConfig, out, folder=None) -> list[tuple]:
    """The losses of a run that writes to `out`."""
    cfg, model = settings(data, folder, output_dir=str(out)), tiny_translator()
    with mock.patch.object(train, "export"):  # the configuration does not describe tiny models
        train.train(replace(cfg, model=model.cfg), model, Plan(), CPU)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [tuple(row.get(k) for k in ("step", "loss", "grad_norm", "val_loss")) for row in rows]


def attach(data: DataConfig, folder, model, split="train"):
    pairs = open_pairs(data, split)
    attach_latents(settings(data, folder), model, (pairs,), CPU)
    return pairs


def files(folder) -> dict:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def keys(data: DataConfig, codec: str = "codec") -> set[str]:
    pairs = open_pairs(data, "train")
    return {latents.key_of(pairs.fingerprint(i), codec) for i in range(len(pairs))}


def test_a_run_with_the_cache_has_the_losses_of_one_without_and_resumes(data, tmp_path, capsys):
    plain = run(data, tmp_path / "plain")
    assert run(data, tmp_path / "made", tmp_path / "cache") == plain
    assert "encoding 9 pairs" in capsys.readouterr().out
    (tmp_path / "made" / "checkpoint_00000004.pth").unlink()  # as if killed after step 2
    assert run(data, tmp_path / "made", tmp_path / "cache") == plain
    assert "encoding" not in capsys.readouterr().out


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_carries_the_latents_of_its_own_images_flipped_or_not(
    data, tmp_path, model, workers
):
    pairs = attach(replace(data, num_workers=workers), tmp_path / "cache", model)
    batches = stream(pairs, 4, seed=0, num_workers=workers)
    seen = [next(batches) for _ in range(4)]
    for batch in [*seen, *sequential(pairs, 4)]:
        assert torch.equal(batch["latents"], model.encode(batch["visible"], batch["infrared"]))
        assert torch.equal(batch["masked"], model.known(batch["visible"]))
    plain = {pairs.names[i]: pairs.get(i)["visible"] for i in range(len(pairs))}
    flipped = [not torch.equal(x, plain[n]) for b in seen for n, x in zip(b["name"], b["visible"])]
    assert 0 < sum(flipped) < len(flipped)


def test_the_model_reads_the_latents_it_is_given_and_does_not_encode(data, tmp_path, monkeypatch):
    model = tiny_translator()
    batch = next(sequential(attach(data, tmp_path / "cache", model), 2))
    monkeypatch.setattr(model, "encode", None)
    predict = translator_step.make_predict(settings(data), model, CPU)
    assert torch.equal(predict(model, batch, 2, seed=0)[2].data, batch["latents"])


def test_another_image_window_size_or_codec_has_another_key(data, tmp_path):
    before = keys(data)
    assert len(before) == 8 and keys(data) == before
    columns = tiny_data.rows(10, split=tiny_data.by_tens)
    columns["infrared"][0] = tiny_data.png(255 - tiny_data.infrared(0))
    columns["visible"][1] = tiny_data.png(255 - tiny_data.visible(1))
    tiny_data.write(tmp_path / "other" / "a.parquet", columns)
    assert len(keys(replace(data, path=str(tmp_path / "other"))) & before) == 6
    for change in (dict(size=48), dict(window=[0.0, 200.0]), dict(window="per_image")):
        assert not keys(replace(data, **change)) & before
    assert not keys(data, "another codec") & before


def test_the_identity_of_a_codec_follows_its_weights_and_its_scale(tmp_path):
    from diffusers import AutoencoderKL

    path = write_flux_fill(tmp_path) / "vae"
    one, other = (FluxCodec(AutoencoderKL.from_pretrained(path)) for _ in range(2))
    seen = [one.identity()]
    assert other.identity() == seen[0] and DctCodec().identity() == DctCodec().identity()
    other.vae.encoder.conv_in.weight.data[0, 0, 0, 0] += 1e-3
    seen.append(other.identity())
    other.scale += 0.1
    dct = DctCodec()
    dct.std[0, 0] += 1e-3
    seen += [other.identity(), dct.identity(), DctCodec().identity()]
    assert len(set(seen)) == 5


def test_a_changed_pair_alone_is_encoded_anew(data, tmp_path, model, capsys):
    attach(data, tmp_path / "cache", model)
    columns = tiny_data.rows(10, split=tiny_data.by_tens)
    columns["infrared"][3] = tiny_data.png(255 - tiny_data.infrared(3))
    tiny_data.write(tmp_path / "set" / "a.parquet", columns)
    pairs = attach(data, tmp_path / "cache", model)
    assert "encoding 1 pairs" in capsys.readouterr().out
    batch = next(sequential(pairs, 8))
    assert torch.equal(batch["latents"], model.encode(batch["visible"], batch["infrared"]))


@pytest.mark.parametrize("damage", ["bit", "cut", "empty"])
def test_a_damaged_shard_is_named_and_made_again(data, tmp_path, model, capsys, damage):
    folder = tmp_path / "cache"
    attach(data, folder, model)
    before = files(folder)
    path = sorted(folder.iterdir())[1]
    good = bytearray(path.read_bytes())
    bad = {"bit": good[:-1] + bytes([good[-1] ^ 1]), "cut": good[:-1], "empty": b""}[damage]
    path.write_bytes(bad)
    capsys.readouterr()
    attach(data, folder, model)
    out = capsys.readouterr().out
    assert f"{path.name} is damaged" in out and "encoding 2 pairs" in out
    assert path.read_bytes() == good
    after = files(folder)
    assert [name for name in before if after[name] != before[name]] == [path.name]


def test_a_killed_build_leaves_whole_shards_and_goes_on(data, tmp_path, model, monkeypatch, capsys):
    folder, fsync, calls = tmp_path / "cache", os.fsync, []

    def killed(file):
        calls.append(file)
        if len(calls) == 3:  # while the third shard is written
            raise KeyboardInterrupt
        fsync(file)

    monkeypatch.setattr(latents.os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        attach(data, folder, model)
    before = {name: at for name, at in files(folder).items() if not name.endswith(".tmp")}
    assert len(before) == 2 and not latents.remove_damaged(folder, 0, 1)
    half = folder / "latents-0.someone-1.tmp"
    half.write_bytes(b"half a shard")
    os.utime(half, (0, 0))
    attach(data, folder, model)
    assert "encoding 4 pairs" in capsys.readouterr().out
    assert before.items() <= files(folder).items() and not half.exists()
    assert len(list(folder.glob(latents.PATTERN))) == 4


def test_ranks_divide_the_shards_and_wait_for_each_other(data, tmp_path, model, monkeypatch):
    """Rank 0 of 2 alone builds half of the shards, and says that the rest is not there."""
    pairs = open_pairs(data, "train")
    prints = [pairs.fingerprint(i) for i in range(8)]
    for name, value in dict(
        rank=lambda: 0,
        world_size=lambda: 2,
        barrier=lambda: None,
        gather=lambda own: [own, prints[1::2] if own else []],
    ).items():
        monkeypatch.setattr(f"utils.dist.{name}", value)
    with pytest.raises(ValueError, match="4 of 8 pairs are not in .* all machines see"):
        attach(data, tmp_path / "cache", model)
    assert len(files(tmp_path / "cache")) == 2
    key = [latents.key_of(p, f"{model.cfg.layout} {model.codec.identity()}") for p in prints]
    assert set(latents.find(tmp_path / "cache")) == {key[0], key[1], key[4], key[5]}


@pytest.mark.parametrize("change", ["crop_scale=[0.7,1]", "brightness=0.1", "contrast=0.1"])
def test_an_augmentation_that_is_more_than_a_flip_is_refused(change):
    argv = [
        "data.latents=cache",
        "data.augment.crop_scale=[1,1]",
        "data.augment.brightness=0",
        "data.augment.contrast=0",
    ]
    assert config.load(TrainConfig, argv, starts=False).data.latents == "cache"
    with pytest.raises(ValueError, match=r"crop_scale=\[1,1\] .*brightness=0 .*contrast=0"):
        config.load(TrainConfig, [*argv, f"data.augment.{change}"], starts=False)


def test_stage_1_refuses_a_cache_of_latents(data):
    with pytest.raises(ValueError, match="stage 1 encodes nothing"):
        PretrainConfig(data=replace(data, latents="cache"))


def test_a_folder_that_cannot_be_made_written_or_filled_is_one_sentence(
    data, tmp_path, model, monkeypatch
):
    with pytest.raises(ValueError, match="no folder can be created"):
        attach(data, tmp_path / "set" / "a.parquet", model)
    monkeypatch.setattr(latents.os, "access", lambda *_: False)
    with pytest.raises(ValueError, match="8 pairs are missing in .* read-only"):
        attach(data, tmp_path / "cache", model)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="need .* GiB more"):
        latents.check_room(tmp_path, 10**12, (8, 64))


def test_a_dry_run_writes_no_latents(data, tmp_path, model):
    cfg, pairs = settings(data, tmp_path / "cache", dry_run=True), open_pairs(data, "train")
    attach_latents(cfg, model, (pairs,), CPU)
    assert not (tmp_path / "cache").exists() and "latents" not in pairs.get(0)


def test_every_shard_is_verified_by_one_rank_while_others_remove_theirs(tmp_path):
    for i in range(12):
        (tmp_path / f"latents-{i}.safetensors").write_bytes(b"damaged")
    removed = [name for rank in range(3) for name in latents.remove_damaged(tmp_path, rank, 3)]
    assert len(removed) == len(set(removed)) == 12 and not list(tmp_path.iterdir())
