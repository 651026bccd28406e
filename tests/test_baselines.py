"""The baselines: networks, training on the shared loop, and their rows in the table.

pytest tests/test_baselines.py
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from assembly import checkpoints
from baselines import pix2pix, unet
from baselines.networks import BaselineModelConfig, Pix2Pix, Unet, build, patch_discriminator
from baselines.training import BaselineConfig
from tests.conftest import ROOT, call_main
from utils import checkpoint, config

SCRIPTS = {"unet": unet, "pix2pix": pix2pix}
TINY = [
    "data.size=32",
    "data.synthetic_scenes={train: 12, val: 4, test: 4}",
    "data.num_workers=0",
    "model.width=4",
    "model.levels=3",
    "training.steps=4",
    "training.batch_size=4",
    "training.mixed_precision=no",
    "training.warmup_steps=0",
    "training.log_every=1",
    "training.save_every=2",
    "--device",
    "cpu",
]


def small(name, **changes):
    torch.manual_seed(0)
    return build(BaselineModelConfig(baseline=name, **{"width": 4, "levels": 3, **changes}))


def run(name, folder, *more):
    call_main(f"baselines.{name}", *TINY, "--output_dir", folder, *more)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("baselines")
    for name in SCRIPTS:
        run(name, folder / name)
    return folder


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("size", [(32, 32), (37, 50)])
def test_any_size_gives_an_image_in_range(name, size):
    image = small(name).eval().generate(torch.rand(2, 3, *size), [0, 1])
    assert image.shape == (2, 1, *size)
    assert image.min() >= 0 and image.max() <= 1 and image.std() > 0


def test_the_published_sizes():
    """Isola et al. 2017: 54.4 M parameters in the generator, and patches of 70 pixels."""
    model = build(BaselineModelConfig(baseline="pix2pix", levels=8))
    assert sum(p.numel() for p in model.generator.parameters()) == pytest.approx(54.4e6, rel=0.01)
    judge = patch_discriminator(4).eval()
    pair = torch.rand(1, 4, 128, 128, requires_grad=True)
    logits = judge(pair)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    rows = pair.grad.abs().sum((0, 1, 3)).nonzero()
    assert int(rows.max() - rows.min()) + 1 == 70


def test_each_loss_of_pix2pix_trains_its_own_network_alone():
    model, images = small("pix2pix"), (torch.rand(2, 3, 32, 32), torch.rand(2, 1, 32, 32))
    for name, trained in (("adversarial", "generator"), ("discriminator", "discriminator")):
        model.zero_grad()
        model(*images)[name].backward()
        for n, p in model.named_parameters():
            moved = p.grad is not None and bool(p.grad.any())
            if not n.startswith(trained):
                assert not moved, f"{name} moves {n}"
        assert any(
            p.grad is not None and p.grad.any() for p in getattr(model, trained).parameters()
        )


def test_dropout_is_the_noise_and_an_image_does_not_depend_on_its_batch():
    model, photos = small("pix2pix").eval(), torch.rand(3, 3, 32, 32)
    before = torch.random.get_rng_state()
    together = model.generate(photos, [5, 6, 7], seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.testing.assert_close(model.generate(photos[1:2], [6], seed=1), together[1:2])
    assert not torch.equal(model.generate(photos, [5, 6, 7], seed=2), together)
    assert not torch.equal(model.generate(photos, [8, 6, 7], seed=1)[0], together[0])


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_resumed_baseline_ends_bit_equal_to_the_uninterrupted_one(name, made, tmp_path):
    run(name, tmp_path, "training.steps=2", "training.schedule=constant")
    run(name, tmp_path, "training.schedule=constant")
    run(name, tmp_path / "whole", "training.schedule=constant")
    ends = [checkpoint.load(f / "checkpoint_00000004.pth") for f in (tmp_path, tmp_path / "whole")]
    for part in ("model", "ema", "optimizer"):
        torch.testing.assert_close(ends[0][part], ends[1][part], rtol=0, atol=0)


def test_two_ranks_train_both_networks_of_pix2pix_as_one_does(tmp_path):
    plain = ["model.dropout=0", "training.schedule=constant", "training.steps=2"]
    run("pix2pix", tmp_path / "one", *plain)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *torchrun, "baselines/pix2pix.py", *TINY, *plain]
    command += ["training.batch_size=2", "--output_dir", str(tmp_path / "two")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, two = (
        [json.loads(x) for x in (tmp_path / n / "metrics.jsonl").read_text().splitlines()]
        for n in ("one", "two")
    )
    for a, b in zip(one, two):
        names = [n for n in ("loss", "l1", "adversarial", "discriminator", "grad_norm") if n in a]
        assert {n: b[n] for n in names} == pytest.approx({n: a[n] for n in names}, rel=1e-3)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_baseline_learns_on_one_batch(name):
    model = small(name, width=8, dropout=0.0)
    visible = torch.rand(4, 3, 32, 32)
    infrared = visible.mean(1, keepdim=True)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    errors = []
    for _ in range(60):
        loss, _ = SCRIPTS[name].step(BaselineConfig(), model, visible, infrared)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append((model.generate(visible, [0] * 4) - infrared).abs().mean().item())
    assert errors[-1] < 0.7 * errors[0]


@pytest.mark.parametrize("name, row", [("unet", "U-Net"), ("pix2pix", "pix2pix")])
def test_a_baseline_is_a_row_of_the_same_table(name, row, made, tmp_path, capsys):
    common = ["--device", "cpu", "--num_workers", "0", "--output_dir", tmp_path]
    call_main("evaluate", "--checkpoint", made / name, *common)
    found = json.loads((tmp_path / "results.json").read_text())
    assert list(found["methods"])[-1] == row and found["stage1"] is None
    assert f"| {row} against |" in capsys.readouterr().out


def test_a_baseline_is_not_taken_for_another_model(made, tmp_path):
    with pytest.raises(ValueError, match="has no maps to draw"):
        call_main("visualize", "--checkpoint", made / "unet", "--output_dir", tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint of baselines/unet\.py; stage 1"):
        checkpoints.load_stage1(made / "unet")
    with pytest.raises(ValueError, match=r"checkpoint of baselines/pix2pix\.py; this needs"):
        checkpoints.load_translator(made / "pix2pix", torch.device("cpu"))
    with pytest.raises(ValueError, match="another model: model.baseline is 'unet' there"):
        run("pix2pix", made / "unet")
    with pytest.raises(ValueError, match="this script trains unet; model.baseline is pix2pix"):
        run("unet", tmp_path / "x", "model.baseline=pix2pix")


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_configurations_are_read(name):
    cfg = config.load(BaselineConfig, ["--config", str(ROOT / f"configs/baselines/{name}.yaml")])
    assert cfg.model.baseline == name and isinstance(build(cfg.model), Unet | Pix2Pix)
