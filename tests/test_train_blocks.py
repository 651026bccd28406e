"""The fast blocks against the plain ones: outputs, gradients, adapters' file, 8-bit rounding.

pytest tests/test_train_blocks.py
"""

import pytest
import torch
from safetensors.torch import load_file

from models import flux as fluxes
from models.fast import fp8_quantise, frozen_matrix, fused_matrices, train_blocks
from models.fast.plan import resolve
from models.guidance import SemanticGuidance
from models.lora import LoraConfig, add_lora, save_lora
from models.translator import TranslatorConfig
from tests.test_lora import flux_inputs
from tests.tiny_models import INJECT, guide, stir, tiny_flux

MAPS = [torch.rand(2, n, 32, 32, generator=torch.Generator().manual_seed(4)) for n in (1, 32, 8)]
ALL_LAYERS = ["to_q", "to_v", "to_out.0", "proj_mlp", "proj_out", "ff.net.0.proj", "add_k_proj"]


def adapted(targets=None, dropout=0.0):
    """A tiny guided FLUX with adapters, nothing of it zero, its base frozen."""
    flux = tiny_flux().requires_grad_(False)
    guidance = SemanticGuidance(flux.inner_dim, INJECT)
    cfg = LoraConfig(r=2, lora_dropout=dropout)
    if targets:
        cfg.target_modules = targets
    add_lora(flux, cfg)
    for p in flux.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(5))
    stir(guidance, 6)
    fluxes.patch_blocks(flux, guidance)
    return flux, guidance


def speed_up(flux, guidance, dtype="bf16", compiled=False, recompute_every=0):
    fused_matrices.freeze(flux, "cpu", dtype)
    train_blocks.install(flux, guidance, compiled, recompute_every)
    return flux, guidance


CPU = torch.device("cpu")


def step(flux, guidance):
    """Output and the gradient of every trained parameter, by name."""
    out = flux(**flux_inputs(flux), joint_attention_kwargs={"guidance": guide(guidance, MAPS)})[0]
    out.square().mean().backward()
    named = [*flux.named_parameters(), *guidance.named_parameters()]
    return out.detach(), {n: p.grad for n, p in named if p.requires_grad}


def assert_close(a, b, tolerance):
    assert a[1].keys() == b[1].keys()
    largest = max(x.norm() for x in a[1].values())
    assert (a[0] - b[0]).norm() <= tolerance * a[0].norm()
    for name, x in a[1].items():  # a gradient that nearly cancels has fp32's noise of its terms
        assert (x - b[1][name]).norm() <= tolerance * max(x.norm(), 1e-2 * largest), name


@pytest.mark.parametrize("targets", [None, ALL_LAYERS])
@pytest.mark.parametrize("recompute_every", [0, 1, 2])
def test_fast_blocks_equal_the_plain_ones_and_so_do_their_gradients(targets, recompute_every):
    plain = step(*adapted(targets))
    quick = step(*speed_up(*adapted(targets), "fp32", recompute_every=recompute_every))
    assert_close(plain, quick, 1e-3)


@pytest.mark.parametrize("targets", [None, ALL_LAYERS])
@pytest.mark.parametrize("dtype", ["fp32", "fp8"])
@pytest.mark.parametrize("recompute_every", [0, 1])
def test_without_the_visible_panel_the_infrared_one_and_all_gradients_are_the_same(
    targets, dtype, recompute_every
):
    infrared = torch.tensor([2, 3, 6, 7])  # of 2 rows of 2 + 2 tokens
    found = []
    for wanted in ({}, {"infrared_rows": 2}):
        flux, guidance = speed_up(*adapted(targets), dtype, recompute_every=recompute_every)
        kwargs = {"guidance": guide(guidance, MAPS)}
        out = flux(**flux_inputs(flux), joint_attention_kwargs=kwargs, **wanted)[0]
        out[:, infrared].square().mean().backward()
        named = [*flux.named_parameters(), *guidance.named_parameters()]
        found.append((out.detach(), {n: p.grad for n, p in named if p.requires_grad}))
    whole, part = found
    assert not part[0][:, [0, 1, 4, 5]].any()
    assert whole[0].shape == part[0].shape and whole[0][:, [0, 1, 4, 5]].any()
    whole = whole[0][:, infrared], whole[1]
    assert_close(whole, (part[0][:, infrared], part[1]), 1e-4)


@pytest.mark.parametrize("dtype, tolerance", [("fp8", 0.2), ("fp8-small", 0.2)])
def test_fp8_is_close_to_bf16(dtype, tolerance):
    plain, quick = step(*adapted()), speed_up(*adapted(), dtype)
    assert_close(plain, step(*quick), tolerance)


def test_compiled_blocks_are_one_graph_and_equal_the_plain_ones(monkeypatch):
    monkeypatch.setattr(train_blocks, "BACKEND", "aot_eager")  # traces as inductor does, in no time
    for dtype in ("fp32", "fp8"):
        eager = step(*speed_up(*adapted(), dtype))
        compiled = step(*speed_up(*adapted(), dtype, compiled=True))
        assert_close(eager, compiled, 1e-3)


@pytest.mark.parametrize("dtype", ["fp32", "fp8"])
def test_the_adapters_file_is_the_same_before_and_after_the_merge(dtype, tmp_path):
    flux, guidance = adapted()
    save_lora(flux.state_dict(), LoraConfig(), tmp_path / "before", {})
    trained = [n for n, p in flux.named_parameters() if p.requires_grad]
    speed_up(flux, guidance, dtype)
    save_lora(flux.state_dict(), LoraConfig(), tmp_path / "after", {})
    before, after = (load_file(tmp_path / name) for name in ("before", "after"))
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [n for n, p in flux.named_parameters() if p.requires_grad] == trained


def test_a_transposed_copy_changes_nothing():
    weight, bias = torch.randn(32, 16), torch.zeros(32)
    with_copy, without = (frozen_matrix.Frozen(weight, bias, True, copy) for copy in (True, False))
    x = torch.randn(5, 16, requires_grad=True)
    grads = [
        torch.autograd.grad(frozen_matrix.linear(x, f.matrix()).square().sum(), x)[0]
        for f in (with_copy, without)
    ]
    assert torch.equal(*grads)


def test_wide_rows_are_rounded_as_narrow_ones(monkeypatch):
    frozen, x = (
        frozen_matrix.Frozen(torch.randn(32, 16), None, True),
        torch.randn(5, 16, requires_grad=True),
    )
    grads = []
    for longest in (32, 31):
        monkeypatch.setattr(frozen_matrix, "COMPILED_ROW", longest)
        grads += torch.autograd.grad(frozen_matrix.linear(x, frozen.matrix()).square().sum(), x)
    assert torch.equal(*grads)


def test_gelu_and_rounding_are_those_of_torch():
    x = torch.randn(4, 48, requires_grad=True)
    g, by = torch.randn(4, 48), torch.rand(48)
    expected = torch.nn.functional.gelu(x, approximate="tanh")
    torch.testing.assert_close(fp8_quantise.gelu(x), expected)
    slope = torch.autograd.grad(expected, x, g)[0]
    forward, backward = x.detach(), (g, x.detach(), by)
    for (x8, scale), wanted in (
        (fp8_quantise.wide_quantise(forward, by), forward * by),
        (fp8_quantise.gelu_quantise(forward), expected),
        (fp8_quantise.gelu_backward_quantise(*backward), slope * by),
    ):
        # 3 bits behind the leading one; under 2^-6 of its unit, e4m3 has equal steps of 2^-9
        step = 2**-9 * scale.max().item()
        torch.testing.assert_close(x8.float() * scale, wanted, rtol=2**-4, atol=step)


def test_random_weights_appear_block_by_block_where_they_stay():
    with torch.device("meta"):
        flux = tiny_flux()
    add_lora(flux, LoraConfig(r=2))
    guidance = SemanticGuidance(flux.inner_dim, {})
    fused_matrices.freeze(flux, "cpu", "fp8-small")
    train_blocks.install(flux, guidance, compiled=False)
    assert not any(p.is_meta for p in flux.parameters())
    assert flux(**flux_inputs(flux))[0].isfinite().all()
    rounded = {n for n, p in flux.named_parameters() if p.dtype == torch.uint8}
    assert len(rounded) == 2 * 10 + 2 * 5  # every matrix of a double and of a single block


def test_an_adapter_on_a_modulation_is_refused():
    flux = tiny_flux()
    add_lora(flux, LoraConfig(target_modules=["norm.linear"]))
    with pytest.raises(ValueError, match=r"norm\.linear"):
        fused_matrices.freeze(flux, "cpu", "bf16")


@pytest.mark.parametrize(
    "memory, changes, expected",
    [
        ("24g", {}, ("fp8-small", 1, True)),
        ("80g", {"base_dtype": "fp8"}, ("fp8", 0, True)),
        (None, {}, ("bf16", 0, False)),
    ],
)
def test_memory_fills_in_what_the_config_leaves_open(memory, changes, expected):
    cfg = resolve(TranslatorConfig(preset="full-random", memory=memory, **changes), CPU)
    assert (cfg.base_dtype, cfg.gradient_checkpointing, cfg.compile) == expected


def test_a_trained_base_is_not_rounded():
    with pytest.raises(ValueError, match="train_base"):
        resolve(TranslatorConfig(preset="demo", train_base=True, base_dtype="fp8"), CPU)


@pytest.mark.parametrize("every, recomputed", [(0, 0), (1, 4), (2, 2)])
def test_every_nth_block_is_recomputed(every, recomputed, monkeypatch):
    calls = []
    real = train_blocks.checkpoint
    monkeypatch.setattr(
        train_blocks, "checkpoint", lambda *a, **k: calls.append(a[0]) or real(*a, **k)
    )
    step(*speed_up(*adapted(), "fp32", recompute_every=every))
    assert len(calls) == recomputed
