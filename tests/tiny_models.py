"""Tiny models in the real on-disk formats, built from random weights where tests need them."""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxFillPipeline,
    FluxTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from configs.schema import FlowConfig, TrainConfig
from data.pairs import DataConfig
from models.backbones.fill import FillDiptych
from models.decomposition import DecompositionConfig
from models.fast.plan import build
from models.guidance import Guidance
from models.sampler import SamplingConfig
from models.stage1 import Stage1
from models.translator import LoraConfig, Translator, TranslatorConfig
from utils import checkpoint, config

INJECT = {0: ["intensity"], 1: ["intensity", "material", "context"]}
PIXELS = dict(layout="pixels", train_base=True, lora_config=LoraConfig(r=0))  # of the demo's kind


def tiny_flux(layers: int = 2, single_layers: int = 2) -> FluxTransformer2DModel:
    """A FLUX Fill transformer of width 32 with random weights, none of them zero."""
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=384,
        out_channels=64,
        num_layers=layers,
        num_single_layers=single_layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )


def tiny_stage1() -> Stage1:
    """A stage 1 network with the smallest backbone and a narrow decoder."""
    return Stage1(DecompositionConfig(backbone="resnet18", width=8))


def tiny_translator(adapters=None, **changes) -> Translator:
    """A translator around the demo preset with a narrow, untrained stage 1."""
    torch.manual_seed(0)
    cfg = dict(
        preset="demo",
        text_tokens=4,
        inject=INJECT,
        base_dtype="fp32",
        lora_config=LoraConfig(r=2, lora_alpha=4),
    )
    cfg = TranslatorConfig(**{**cfg, **changes})
    return build(cfg, tiny_stage1(), adapters=adapters)[0]


def guide(guidance, maps) -> Guidance:
    """The guidance of (intensity, material, context) for a diptych."""
    places = FillDiptych(nn.Identity()).places(*maps[0].shape[-2:])
    return guidance(*maps, places)


def stir(module: nn.Module, seed: int = 0) -> None:
    """Move every weight off its initial (perhaps zero) value, so that every gradient can flow."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=generator).to(p) * 0.02)


def write_checkpoint(path: Path, model: dict, window=(0.0, 1.0)) -> Path:
    """What train.py would leave of a tiny model whose trained weights are none of them zero."""
    translator = tiny_translator(**model)
    trained = [p for n, p in translator.named_parameters() if p.requires_grad]
    stir(torch.nn.ParameterList(trained))
    cfg = TrainConfig(
        model=translator.cfg,
        data=DataConfig(size=[32, 48], path="datasets/toy"),
        flow=FlowConfig(mean_share=0.5),
        sampling=SamplingConfig(steps=2, guidance_scale=1.0),
    )
    cfg.model.decomposition = translator.stage1.decomposition.cfg
    cfg.window, cfg.unit = window and [*window], "celsius"
    state = checkpoint.trained_state(translator)
    checkpoint.save(path, {"model": state, "config": config.to_dict(cfg)})
    return path


def write_flux_fill(folder: Path) -> Path:
    """A random FluxFillPipeline on disk: transformer, autoencoder, both encoders and tokenizers."""
    torch.manual_seed(0)
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "t": 3, "h": 4, "a": 5}
    letters = {c: i for i, c in enumerate("bcdefghijklmnopqrstuvwxyz", start=100)}
    clip_files = folder / "clip_files"
    clip_files.mkdir(parents=True)
    vocabulary = {**letters, **{c + "</w>": i + 100 for c, i in letters.items()}, **words}
    (clip_files / "vocab.json").write_text(json.dumps(vocabulary))
    (clip_files / "merges.txt").write_text("#version: 0.2\n")
    files = str(clip_files / "vocab.json"), str(clip_files / "merges.txt")
    tokenizer = CLIPTokenizer(*files, model_max_length=77)
    t5_tokens = ["<pad>", "</s>", "<unk>", "a", "thermal", "infrared", "photograph", "scene"]
    fast = Tokenizer(models.WordLevel({w: i for i, w in enumerate(t5_tokens)}, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer_2 = PreTrainedTokenizerFast(
        tokenizer_object=fast,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
    )
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=400,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            projection_dim=32,
            bos_token_id=0,
            eos_token_id=1,
        )
    )
    t5 = T5EncoderModel(
        T5Config(vocab_size=16, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    )
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=16,
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        shift_factor=0.1159,
        scaling_factor=0.3611,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    pipeline = FluxFillPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=clip,
        tokenizer=tokenizer,
        text_encoder_2=t5,
        tokenizer_2=tokenizer_2,
        transformer=tiny_flux(),
    )
    pipeline.save_pretrained(folder / "pipeline", safe_serialization=True)
    return folder / "pipeline"
