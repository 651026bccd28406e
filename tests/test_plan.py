"""The one door to what is fast: which preset a card gets, what is refused, off is the plain model.

pytest tests/test_plan.py
"""

from types import SimpleNamespace

import pytest
import torch

from models.fast import compilation, train_blocks
from models.fast.frozen_matrix import multiplies_e4m3
from models.fast.plan import Plan, build, choose_attention, resolve, speed_up_stage1
from models.translator import FluxRunner, TranslatorConfig
from tests.tiny_models import tiny_stage1, tiny_translator

CUDA = torch.device("cuda")


@pytest.fixture
def card(monkeypatch):
    """A pretended GPU: card(name, GiB, capability)."""

    def pretend(name, gib, capability):
        found = SimpleNamespace(name=name, total_memory=gib * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    multiplies_e4m3.cache_clear()
    yield pretend
    multiplies_e4m3.cache_clear()


@pytest.mark.parametrize(
    "name, gib, capability, preset, dtype, recomputed",
    [
        ("B200", 178, (10, 0), "140g", "bf16", 0),
        ("H200", 139.8, (9, 0), "140g", "bf16", 0),
        ("H100", 79.2, (9, 0), "80g", "bf16", 0),
        ("A100", 79.2, (8, 0), "80g", "bf16", 0),
        ("L40S", 44.5, (8, 9), "48g", "bf16", 2),
        ("A100", 39.4, (8, 0), "48g", "bf16", 2),
        ("RTX 4090", 23.6, (8, 9), "24g", "fp8-small", 1),
        ("RTX 3090", 23.6, (8, 6), "24g", "bf16", 1),  # e4m3 would be emulated
    ],
)
def test_a_card_gets_the_preset_of_its_memory(
    card, name, gib, capability, preset, dtype, recomputed
):
    card(name, gib, capability)
    plan = Plan()
    cfg = resolve(TranslatorConfig(preset="full-random"), CUDA, plan)
    assert plan.runs("memory preset") == preset
    assert (cfg.base_dtype, cfg.gradient_checkpointing, cfg.compile) == (dtype, recomputed, True)
    assert name in str(plan)


def test_a_card_too_small_for_every_preset_is_named(card):
    card("T4", 15, (7, 5))
    plan = Plan()
    cfg = resolve(TranslatorConfig(preset="full-random"), CUDA, plan)
    assert plan.runs("memory preset") == "none" and "less than the 20 GiB" in str(plan)
    assert not cfg.compile


def test_what_is_given_goes_before_the_preset(card):
    card("H100", 79.2, (9, 0))
    cfg = resolve(TranslatorConfig(preset="full-random", base_dtype="fp8", compile=False), CUDA)
    assert (cfg.base_dtype, cfg.compile) == ("fp8", False)


def test_emulated_e4m3_is_named():
    plan = Plan()
    resolve(TranslatorConfig(preset="demo", base_dtype="fp8"), torch.device("cpu"), plan)
    assert "emulated" in str(plan)


@pytest.mark.parametrize("changes", [{"compile": True}, {"base_dtype": "fp8"}])
def test_off_is_neither_compiled_nor_rounded(changes):
    with pytest.raises(ValueError, match=r"model\.fast=off is the plain model"):
        resolve(TranslatorConfig(preset="demo", fast="off", **changes), torch.device("cpu"))


def test_off_is_the_plain_model_in_everything_and_computes_the_same():
    made = {fast: tiny_translator(fast=fast).eval() for fast in ("auto", "off")}
    off = made["off"]
    assert type(off.runner) is FluxRunner
    replaced = [m for m in off.stage1.modules() if "forward" in vars(m) or "heads" in vars(m)]
    assert not replaced  # no instance has a forward of its own
    visible = torch.rand(2, 3, 32, 32)
    (maps, fused), (fast_maps, fast_fused) = (made[f].decompose(visible) for f in ("off", "auto"))
    for a, b in zip((*maps, fused), (*fast_maps, fast_fused)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_stage_1_alone_passes_the_door_too(monkeypatch, tmp_path):
    stage1 = tiny_stage1()
    assert speed_up_stage1(stage1, "off").runs("stage 1") == "plain"
    assert "heads" not in vars(stage1.decomposition)
    plan = speed_up_stage1(stage1, "auto", compiled=False)
    assert "heads" in vars(stage1.decomposition)
    assert plan.runs("its training step") == "not compiled" and not plan.runs("compiled code")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for variable in compilation.FOLDERS:
        monkeypatch.setenv(variable, "elsewhere")  # and as it was after the test
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    plan = speed_up_stage1(stage1, "auto", compiled=True)
    assert plan.runs("compiled code") == f"kept in {tmp_path / 'thermaflux'}"


def test_frozen_blocks_are_in_the_plan_and_run():
    cfg = TranslatorConfig(
        preset="demo", text_tokens=4, base_dtype="fp8", inject={0: ["intensity"]}
    )
    translator, plan = build(cfg, tiny_stage1())
    assert isinstance(translator.runner, train_blocks.TrainRunner)
    assert plan.runs("FLUX blocks") == "fused, not compiled"
    choose_attention(plan, translator, batch=1, tokens=12)
    assert plan.runs("attention") == "torch"
    header, *rows = str(plan).splitlines()
    assert header.split() == ["part", "what", "runs", "why"] and len(rows) == len(plan.parts)
