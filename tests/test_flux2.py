"""FLUX.2 klein: its patched blocks against the original, its folder, its codec, its adapters' file.

pytest tests/test_flux2.py
"""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from models.backbones import flux2
from models.fast.plan import Plan, build, choose_attention, resolve
from models.guidance import SemanticGuidance
from models.lora import LORA_FILE, LoraConfig, add_lora, lora_layers, save_lora
from models.sampler import SamplingConfig, noise_for, sample
from models.translator import TranslatorConfig
from tests.conftest import call_main
from tests.tiny_models import stir, tiny_stage1

diffusers = pytest.importorskip("diffusers", minversion="0.37")
H, W, M = 32, 48, 12
N = (H // 16) * (W // 16)
INJECT = {0: ["intensity"], 1: ["context"], 3: ["intensity", "material"]}  # 3: a single block
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj", "attn.to_out"]
VISIBLE = torch.rand(2, 3, H, W, generator=torch.Generator().manual_seed(3))
IDS = flux2.Flux2(torch.nn.Identity()).ids(H, W)


def tiny_flux2() -> torch.nn.Module:
    """A FLUX.2 klein transformer of width 32 with random weights, none of them zero."""
    torch.manual_seed(0)
    return diffusers.Flux2Transformer2DModel(
        in_channels=128,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        guidance_embeds=False,
        axes_dims_rope=(4, 4, 4, 4),
    )


def write_flux2_klein(folder: Path) -> Path:
    """A random Flux2KleinPipeline on disk: transformer, autoencoder, Qwen3 and its tokenizer."""
    torch.manual_seed(0)
    words = ["<pad>", "<unk>", "user", "assistant", "a", "thermal", "infrared", "photograph"]
    vocabulary = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=vocabulary, pad_token="<pad>", unk_token="<unk>", model_max_length=512
    )
    tokenizer.chat_template = "{% for m in messages %}user {{ m.content }} {% endfor %}assistant"
    encoder = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=16,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=27,  # the 9th, 18th and 27th are the prompt
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=16,
        )
    )
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )
    generator = torch.Generator().manual_seed(1)
    vae.bn.running_mean.copy_(torch.randn(128, generator=generator))
    vae.bn.running_var.copy_(torch.rand(128, generator=generator) + 0.5)
    pipeline = diffusers.Flux2KleinPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=tiny_flux2(),
    )
    pipeline.save_pretrained(folder / "klein", safe_serialization=True)
    return folder / "klein"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_flux2_klein(tmp_path_factory.mktemp("flux2"))


def inputs(guide=None, text=M):
    g = torch.Generator().manual_seed(1)
    kwargs = {"guidance": guide, "text_tokens": text} if guide else {}
    return dict(
        hidden_states=torch.randn(2, 2 * N, 128, generator=g),
        encoder_hidden_states=torch.randn(2, text, 48, generator=g),
        timestep=torch.tensor([0.2, 0.7]),
        img_ids=IDS,
        txt_ids=torch.zeros(text, 4),
        joint_attention_kwargs=kwargs,
        return_dict=False,
    )


def patched():
    flux = tiny_flux2()
    guidance = SemanticGuidance(flux.inner_dim, INJECT)
    flux2.patch_blocks(flux, guidance)
    return flux, guidance


def guide(guidance):
    g = torch.Generator().manual_seed(2)
    maps = [torch.rand(2, n, H, W, generator=g) for n in (1, 32, 8)]
    return guidance(*maps, IDS[:, 1:3])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_patched_model_starts_bit_equal_to_the_original(checkpointing):
    original, (flux, guidance) = tiny_flux2().train(), patched()
    flux.train()
    if checkpointing:
        flux.enable_gradient_checkpointing()
    expected = original(**inputs())[0]
    assert torch.equal(flux(**inputs(guide(guidance)))[0], expected)
    stir(guidance)
    assert not torch.allclose(flux(**inputs(guide(guidance)))[0], expected, atol=1e-4)
    assert torch.equal(flux(**inputs())[0], expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_reaches_adapters_and_guidance_and_no_frozen_parameter(checkpointing):
    flux, guidance = patched()
    names = add_lora(flux.requires_grad_(False), LoraConfig(r=2, target_modules=TARGETS))
    assert len(names) == 2 * 4 + 2 * 2
    stir(guidance)
    for layer in lora_layers(flux).values():
        stir(layer.lora_B)
    if checkpointing:
        flux.enable_gradient_checkpointing()
    flux.train()(**inputs(guide(guidance)))[0].square().mean().backward()
    for name, p in [*flux.named_parameters(), *guidance.named_parameters()]:
        if p.requires_grad:
            assert p.grad is not None and p.grad.any(), name
        else:
            assert p.grad is None, name


def test_guidance_of_a_single_block_leaves_the_text_as_it_is():
    flux = tiny_flux2()
    guidance = SemanticGuidance(flux.inner_dim, {3: ["intensity"]})
    block, x = flux.single_transformer_blocks[1], torch.randn(2, M + 2 * N, flux.inner_dim)
    modulation = torch.randn(2, 3 * flux.inner_dim)
    before = block(x, None, modulation)
    flux2.patch_blocks(flux, guidance)
    stir(guidance)
    travels = {"guidance": guide(guidance), "text_tokens": M}
    after = block(x, None, modulation, joint_attention_kwargs=travels)
    assert torch.equal(after[:, :M], before[:, :M])
    assert (after[:, M:] != before[:, M:]).any(-1).all()


def test_a_block_that_does_not_exist_and_a_changed_upstream_are_refused():
    with pytest.raises(ValueError, match=r"names block 7; the model has 4 \(2 double"):
        flux2.patch_blocks(tiny_flux2(), SemanticGuidance(32, {7: ["intensity"]}))
    flux = tiny_flux2()
    flux.single_transformer_blocks[0].forward = lambda hidden_states, temb: None
    with pytest.raises(RuntimeError, match="expected .*temb_mod"):
        flux2.patch_blocks(flux, SemanticGuidance(32, INJECT))


def test_latents_ids_and_prompt_are_those_of_the_stock_pipeline(folder):
    pipeline = diffusers.Flux2KleinPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    backbone = flux2.Flux2(flux2.Flux2Codec(pipeline.vae))
    state = backbone.known(VISIBLE)
    with torch.no_grad():
        one = VISIBLE[:1] * 2 - 1
        theirs, ids = pipeline.prepare_image_latents([one], 1, None, "cpu", torch.float32)
    torch.testing.assert_close(state[:1], theirs, atol=1e-5, rtol=1e-5)
    target = pipeline._prepare_latent_ids(torch.empty(1, 128, H // 16, W // 16))
    assert torch.equal(backbone.ids(H, W), torch.cat([target[0], ids[0]]).float())
    rows = torch.arange(2).repeat_interleave(3).repeat(2)
    assert torch.equal(backbone.places(H, W), torch.stack([rows, torch.arange(12) % 3], 1).float())
    prompt = flux2.encode_prompt(str(folder), "a thermal photograph", M)
    bf16 = diffusers.Flux2KleinPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    with torch.no_grad():
        expected, words = bf16.encode_prompt("a thermal photograph", max_sequence_length=M)
    assert torch.equal(prompt.tokens_MC, expected[0].float())
    assert prompt.tokens_MC.shape == (M, 48) and prompt.pooled_C.shape == (0,)
    condition = (None, None, None, None, (H, W))
    asked = backbone.arguments(
        torch.zeros(1, 2 * N, 128),
        torch.ones(1),
        torch.ones(1),
        (prompt.tokens_MC[None], torch.empty(1, 0)),
        flux2.Condition(*condition),
    )
    assert torch.equal(asked["txt_ids"], words[0].float())


def test_the_codec_gives_back_what_the_autoencoder_would(folder):
    vae = diffusers.AutoencoderKLFlux2.from_pretrained(folder, subfolder="vae")
    codec = flux2.Flux2Codec(vae)
    with torch.no_grad():
        latents = codec.encode(VISIBLE * 2 - 1)
        image = vae.decode(vae.encode(VISIBLE * 2 - 1).latent_dist.mode()).sample
    assert latents.shape == (2, 32, H // 8, W // 8)
    torch.testing.assert_close(codec.decode(latents), image, atol=1e-4, rtol=1e-4)
    before = codec.identity()
    vae.bn.running_mean += 1
    assert codec.identity() != before


def test_a_folder_trains_one_step_and_samples(folder):
    cfg = TranslatorConfig(
        flux_fill_id=str(folder),
        layout="flux2",
        text_tokens=M,
        inject=INJECT,
        gradient_checkpointing=2,
        lora_config=LoraConfig(r=2, target_modules=TARGETS),
    )
    model, plan = build(cfg, tiny_stage1())
    choose_attention(plan, model, batch=2, tokens=M + 2 * N)
    assert "does not support the blocks of model.layout=flux2" in str(plan)
    assert model.base_dtype == torch.bfloat16
    noise = noise_for([0, 1], model.backbone.state_shape(H, W), 0, "cpu")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(2):
        out = model(VISIBLE, VISIBLE, noise, model.round_time(torch.tensor([0.3, 0.8])))
        loss = (out.velocity.float() - (out.end - out.data)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[1] < losses[0]
    assert sample(model.eval(), VISIBLE, noise, SamplingConfig(steps=1)).shape == (2, 1, H, W)
    assert model.step_flops(H, W) > 0


def test_a_stock_pipeline_loads_the_adapters_and_gives_equal_outputs(folder, tmp_path):
    ours = tiny_flux2()
    cfg = LoraConfig(r=2, lora_alpha=6, target_modules=TARGETS)
    add_lora(ours, cfg)
    for layer in lora_layers(ours).values():
        stir(layer.lora_A, 1)
        stir(layer.lora_B, 2)
    save_lora(ours.state_dict(), cfg, tmp_path / LORA_FILE, {})
    pipeline = diffusers.Flux2KleinPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(tmp_path)
    plain, mine = tiny_flux2()(**inputs())[0], ours(**inputs())[0]
    assert not torch.allclose(mine, plain, atol=1e-4)
    torch.testing.assert_close(pipeline.transformer(**inputs())[0], mine, atol=1e-5, rtol=1e-4)


def test_a_folder_without_a_text_encoder_needs_its_prompt_as_a_file(folder, tmp_path):
    without = tmp_path / "klein"
    shutil.copytree(folder, without, ignore=shutil.ignore_patterns("text_encoder", "tokenizer"))
    with pytest.raises(ValueError, match=r"no text_encoder, and prompt_embeds.safetensors") as said:
        flux2.encode_prompt(str(without), "a thermal photograph", M)
    assert "\n" not in str(said.value)
    embeds = torch.randn(M, 48)
    save_file({"prompt_embeds": embeds}, without / flux2.PROMPT_FILE)
    assert torch.equal(flux2.encode_prompt(str(without), "", M).tokens_MC, embeds)
    with pytest.raises(ValueError, match=r"is \(12, 48\), needs \(16, 48\): the first is model.t"):
        flux2.encode_prompt(str(without), "", 16)


@pytest.mark.parametrize(
    "content, sentence",
    [
        ({"prompt_embeds": torch.zeros(M, 64)}, r"is \(12, 64\), needs \(12, 48\): the first is"),
        ({"prompt_embeds": torch.zeros(1, M, 48)}, r"is \(1, 12, 48\), needs \(12, 48\)"),
        ({"prompt_embeds": torch.full((M, 48), torch.nan)}, "has values that are not finite"),
        ({"embeds": torch.zeros(M, 48)}, "cannot be read there either .KeyError: 'prompt_embeds'"),
        (b"", "cannot be read there either .SafetensorError: "),
        (b"\xff" * 400, "cannot be read there either .SafetensorError: "),
    ],
    ids=["width", "batch", "nan", "name", "empty", "damaged"],
)
def test_a_prompt_file_that_does_not_fit_is_one_sentence(folder, tmp_path, content, sentence):
    (tmp_path / "transformer").symlink_to(folder / "transformer")
    path = tmp_path / flux2.PROMPT_FILE
    path.write_bytes(content) if isinstance(content, bytes) else save_file(content, path)
    with pytest.raises(ValueError, match=sentence) as said:
        flux2.encode_prompt(str(tmp_path), "", M)
    assert "\n" not in str(said.value)


def test_a_prompt_file_beside_no_transformer_is_one_sentence(tmp_path):
    save_file({"prompt_embeds": torch.zeros(M, 48)}, tmp_path / flux2.PROMPT_FILE)
    with pytest.raises(ValueError, match="cannot load FLUX.2 klein from") as said:
        flux2.encode_prompt(str(tmp_path), "", M)
    assert "\n" not in str(said.value)


def test_what_cannot_be_loaded_is_one_sentence(folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="set model.flux_fill_id to black-forest-labs") as said:
        flux2.load_flux2(str(tmp_path / "missing"), torch.float32)
    assert "\n" not in str(said.value)
    with pytest.raises(ValueError, match="has 5 tokens in Qwen3's template, model.text_tokens is"):
        flux2.encode_prompt(str(folder), "a thermal photograph", 4)
    monkeypatch.setitem(sys.modules, "diffusers", SimpleNamespace(__version__="0.35.1"))
    with pytest.raises(
        ValueError, match="layout=flux2 needs diffusers 0.37 or newer, this is 0.35"
    ):
        flux2.random_flux2("demo", torch.float32)


@pytest.mark.parametrize("changes", [{"compile": True}, {"base_dtype": "fp8"}])
def test_what_has_no_fast_form_is_refused(changes):
    cfg = TranslatorConfig(preset="full-random", layout="flux2", **changes)
    with pytest.raises(ValueError, match="needs model.compile=false and base_dtype bf16 or fp32"):
        resolve(cfg, torch.device("cpu"))
    preset = TranslatorConfig(preset="full-random", layout="flux2", memory="24g")
    resolved = resolve(preset, torch.device("cpu"), Plan())
    assert (resolved.base_dtype, resolved.compile) == ("bf16", False)
    assert resolved.gradient_checkpointing == 1


def test_stage_2_trains_exports_and_generates_with_a_folder(folder, tmp_path, capsys):
    scenes = "data.synthetic_scenes={train: 4, val: 2, test: 2}"
    tiny = ["data.size=32", scenes, "data.num_workers=0", "training.steps=2", "--device", "cpu"]
    tiny += ["training.batch_size=2", "run.images=1"]
    stage1 = ["--config", "configs/demo/pretrain.yaml", "model.width=8", "training.ema_decay=0"]
    call_main("pretrain", *stage1, *tiny, "--output_dir", tmp_path / "pretrain")
    changes = [
        f"model.flux_fill_id={folder}",
        f"model.text_tokens={M}",
        "model.inject={0: [intensity], 3: [material]}",
        "training.gradient_accumulation_steps=1",
        "sampling.steps=1",
        "--decomposition_checkpoint",
        tmp_path / "pretrain" / "best_model.pth",
    ]
    config = ["--config", "configs/klein/train.yaml"]
    call_main("train", *config, *changes, *tiny, "--output_dir", tmp_path / "train")
    rows = [json.loads(x) for x in (tmp_path / "train" / "metrics.jsonl").read_text().splitlines()]
    assert any("val_loss" in row for row in rows)
    export = tmp_path / "train" / "export"
    stock = diffusers.Flux2KleinPipeline.from_pretrained(folder)
    stock.load_lora_weights(export)
    adapted = [n for n, _ in stock.transformer.named_parameters() if "lora_B" in n]
    assert len(adapted) == 2 * 4 + 2 * 2
    Image.fromarray(np.full((40, 50, 3), 90, np.uint8)).save(tmp_path / "photo.png")
    photo = ["--image_path", tmp_path / "photo.png", "--output_dir", tmp_path / "out"]
    call_main("generate", "--checkpoint", export, *photo, "--device", "cpu")
    assert list((tmp_path / "out").glob("photo*.png"))
    assert "does not support the blocks of model.layout=flux2" in capsys.readouterr().out
