"""One FLUX.1-Fill LoRA training step, as public scripts do it and as we do, in one run on one card.

    python benchmarks/step.py                                        one H200, 12 B, several minutes
    python benchmarks/step.py --preset demo --size 32 --device cpu   toy size, seconds
    python benchmarks/step.py --ways fp8 --batches 4 --text 512      one row
    python benchmarks/step.py --learn 200                            the fast ways' losses

Ways: `peer` is diffusers' transformer with PEFT's LoRA, eager, gradient checkpointing, bf16
autocast, latents given. `bf16` and `fp8` are this project's whole step: both encodings, stage 1,
guidance, LoRA, loss, clipping, AdamW. `24g` and `48g` are the presets of that name. `sample` is the
sampler, seconds an image. bf16 ways use quack-kernels' products where they are
installed (models/fast/fused_gemm.py): the last column says so. Weights are random: they cost what
the real ones cost. A step's model FLOPs are those of forward plus the gradients that are needed
(Translator.step_flops, which also counts the 0.8 % that the last block leaves out); recomputation
earns no credit. MFU is against the bf16 product of 8192 x 8192 that this run measures first (a
short burst: in long runs the card's power limit holds every way below it). Prints markdown, writes
JSON.
"""

import argparse
import gc
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.learning import learning_gap
from losses import flow
from models import codec as codecs
from models import flux as fluxes
from models.backbones import fill
from models.decomposition import DecompositionConfig
from models.fast.attention_kernel import choose_kernel
from models.fast.plan import build
from models.lora import LoraConfig
from models.sampler import SamplingConfig, sample
from models.stage1 import Stage1
from models.translator import PathConfig, Translator, TranslatorConfig

probed = cache(choose_kernel)  # once a shape: starting the probe takes seconds
WARM_STEPS = 3
SAMPLING_STEPS = 28
INJECT_SMALL = {0: ["intensity"], 1: ["intensity", "material", "context"]}
WAYS = {
    "bf16": dict(base_dtype="bf16", compile=True),
    "fp8": dict(base_dtype="fp8", compile=True),
    "24g": dict(memory="24g"),
    "48g": dict(memory="48g"),
}
PRESET_BATCH = {"24g": 1, "48g": 2}  # of the ways that are presets for smaller cards


@dataclass
class Row:
    way: str
    batch: int
    text: int  # tokens
    seconds: float  # a step, or an image where `way` samples
    images_s: float
    tflops: float  # model TFLOP/s
    mfu: float  # of the measured bf16 GEMM
    peak_gib: float
    attention: str  # kernels that ran
    products: str  # of bf16 matrices: torch's, or quack-kernels' with GELU and gates inside


def main(argv: list[str] | None = None) -> list[Row]:
    args = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.learn:
        print(json.dumps(learning_gap(args.learn, args.device)))
        return []
    device = torch.device(args.device)
    gemm = gemm_rate(device, 8192 if device.type == "cuda" else 256)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, bf16 GEMM {gemm:.0f} TFLOP/s", flush=True)
    rows = []
    for way in args.ways:
        run = peer_rows if way == "peer" else our_rows
        try:
            for row in run(args, way, device, gemm):
                print(json.dumps(asdict(row)), flush=True)
                rows.append(row)
        except torch.OutOfMemoryError as error:
            print(f"{way}: {str(error).splitlines()[0]}", flush=True)
        release(device)
    print(table(rows))
    if args.out:
        result = dict(device=name, gemm_tflops=gemm, rows=[asdict(r) for r in rows])
        Path(args.out).write_text(json.dumps(result, indent=1))
    return rows


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="full-random", choices=list(fluxes.PRESETS))
    parser.add_argument("--size", type=int, default=512, help="pixels of a panel's side")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ways", nargs="+", default=["peer", *WAYS], choices=["peer", *WAYS])
    parser.add_argument("--batches", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--text", nargs="+", type=int, default=[512, 64], help="prompt tokens")
    parser.add_argument("--steps", type=int, default=8, help="timed steps, after warming up")
    parser.add_argument(
        "--sample",
        nargs="*",
        default=[],
        choices=list(WAYS),
        help="ways whose sampler is timed too, batch 4",
    )
    parser.add_argument("--layout", default="diptych", choices=["diptych", "channels"])
    parser.add_argument("--start", default="noise", choices=["noise", "fused"])
    parser.add_argument("--sampling_steps", type=int, default=SAMPLING_STEPS)
    parser.add_argument("--learn", type=int, default=0, help="only compare losses, n steps")
    parser.add_argument("--out", help="JSON file to write")
    return parser.parse_args(argv)


def peer_rows(args, way: str, device: torch.device, gemm: float):
    """The public scripts' way: diffusers + PEFT."""
    from peft import LoraConfig as PeftConfig

    flux = fluxes.random_flux(args.preset, torch.bfloat16, device).requires_grad_(False)
    flux.add_adapter(
        PeftConfig(
            r=16,
            lora_alpha=32,
            target_modules=LoraConfig().target_modules,
            init_lora_weights="gaussian",
        )
    )
    flux.enable_gradient_checkpointing()
    optimizer = make_optimizer(flux)
    flops = step_flops(flux, 2 * (args.size // codecs.TOKEN) ** 2 + args.text[0])
    # diffusers' own attention crashes with torch 2.11's cuDNN backward (models/attention.py)
    torch.backends.cuda.enable_cudnn_sdp(False)
    for batch in (1, 4):
        inputs, target = peer_batch(flux, batch, args.size, args.text[0], device)

        def step(inputs=inputs, target=target):
            with torch.autocast(device.type, torch.bfloat16):
                loss = F.mse_loss(flux(**inputs)[0].float(), target.float())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        yield measure(step, way, batch, args.text[0], flops, gemm, args.steps, device)
    torch.backends.cuda.enable_cudnn_sdp(True)


def peer_batch(flux, batch: int, size: int, text: int, device) -> tuple[dict, torch.Tensor]:
    """Latents as from a cache."""

    def normal(*shape):
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    ids = fill.token_positions(size, size, device)
    tokens, cfg = len(ids), flux.config
    inputs = dict(
        hidden_states=normal(batch, tokens, cfg.in_channels),
        encoder_hidden_states=normal(batch, text, cfg.joint_attention_dim),
        pooled_projections=normal(batch, cfg.pooled_projection_dim),
        timestep=torch.rand(batch, device=device),
        guidance=torch.ones(batch, device=device),
        img_ids=ids,
        txt_ids=torch.zeros(text, 3, device=device),
        return_dict=False,
    )
    return inputs, normal(batch, tokens, cfg.out_channels)


def our_rows(args, way: str, device: torch.device, gemm: float):
    """This project's step, every part of it."""
    cfg = TranslatorConfig(
        preset=args.preset, layout=args.layout, text_tokens=max(args.text), **WAYS[way]
    )
    path = PathConfig(start=args.start)
    if device.type == "cpu":
        cfg.compile = False
    if args.preset != "full-random":
        cfg.inject = INJECT_SMALL
    stage1 = Stage1(DecompositionConfig())
    translator = build(cfg, stage1, device=device, path=path)[0].train()
    heads = translator.flux.config.num_attention_heads
    tokens = len(translator.backbone.ids(args.size, args.size)) + max(args.text)
    probed(device, max(args.batches), tokens, heads, translator.flux.inner_dim // heads)
    optimizer = make_optimizer(translator)
    batches, texts = args.batches, args.text
    if way in PRESET_BATCH:
        batches, texts = [PRESET_BATCH[way]], args.text[:1]
    for text in texts:
        with torch.no_grad():
            prompt = fluxes.random_prompt(translator.flux, text)
            translator.prompt.tokens = prompt.tokens_MC.to(device)
        for batch in batches:
            step = our_step(translator, optimizer, batch, args.size, device)
            flops = translator.step_flops(args.size, args.size)
            yield measure(step, way, batch, text, flops, gemm, args.steps, device)
            release(device)
    if way in args.sample:
        adapters = {n: p.detach() for n, p in translator.named_parameters() if ".lora_" in n}
        prompt = fluxes.random_prompt(translator.flux, texts[0])
        del translator, optimizer, step
        release(device)
        sampler = build(cfg, stage1, prompt, device, adapters, path)[0]
        yield sampling_row(sampler, way, texts[0], args, gemm, device)


def our_step(translator: Translator, optimizer, batch: int, size: int, device) -> Callable:
    visible = torch.rand(batch, 3, size, size, device=device)
    infrared = torch.rand(batch, 1, size, size, device=device).expand(-1, 3, -1, -1)
    noise = torch.randn(batch, *translator.backbone.state_shape(size, size), device=device)
    t = translator.round_time(torch.linspace(0.1, 0.9, batch, device=device))
    panel = translator.backbone.painted(size, size, device)
    trained = [p for p in translator.parameters() if p.requires_grad]

    def step():
        out = translator(visible, infrared, noise, t, infrared_only=True)
        flow.flow_loss(
            flow.velocity_error(out.velocity, out.data, out.end), panel
        ).mean().backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def sampling_row(translator, way, text, args, gemm, device, batch: int = 4) -> Row:
    """Seconds an image of the whole sampler, and forward's TFLOP/s."""
    translator.eval()
    size = args.size
    visible = torch.rand(batch, 3, size, size, device=device)
    noise = torch.randn(batch, *translator.backbone.state_shape(size, size), device=device)
    steps = args.sampling_steps if device.type == "cuda" else 2
    sample(translator, visible, noise, SamplingConfig(steps=2))  # compile
    tokens = len(translator.backbone.ids(size, size)) + text
    flops = steps * step_flops(translator.flux, tokens, forward=True)
    row = measure(
        lambda: sample(translator, visible, noise, SamplingConfig(steps=steps)),
        f"{way} sample",
        batch,
        text,
        flops,
        gemm,
        1,
        device,
        warm=0,
    )
    row.seconds /= batch
    translator.train()
    return row


def measure(
    step: Callable,
    way: str,
    batch: int,
    text: int,
    flops: float,
    gemm: float,
    steps: int,
    device: torch.device,
    warm: int = WARM_STEPS,
) -> Row:
    """Median of `steps` steps; nothing waits for the device in between, as in training."""
    for _ in range(warm):
        step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    ticks = [now(device)]
    for _ in range(steps):
        step()
        ticks.append(now(device))
    synchronize(device)
    seconds = statistics.median(elapsed(a, b) for a, b in pairwise(ticks))
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    tflops = batch * flops / seconds / 1e12
    return Row(
        way,
        batch,
        text,
        seconds,
        batch / seconds,
        tflops,
        tflops / gemm,
        peak,
        *kernels_that_ran(step, device),
    )


def kernels_that_ran(step: Callable, device: torch.device) -> tuple[str, str]:
    """Attention's and the products' in one more step, from the profiler and not from a setting."""
    if device.type != "cuda":
        return "cpu", "torch"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        synchronize(device)
    names = {event.key.lower() for event in profile.key_averages()}
    families = {
        "fa3 e4m3": ("flashattnfwdsm90",),
        "cudnn": ("cudnn", "sdpa"),
        "flash": ("flash_fwd",),
        "efficient": ("fmha_cutlass",),
    }
    products = {"quack": ("quack",), "cublaslt": ("nvjet", "_qq", "_gelu")}

    def found(families: dict[str, tuple[str, ...]]) -> str:
        return "+".join(
            k for k, marks in families.items() if any(all(m in n for m in marks) for n in names)
        )

    return found(families) or "math", found(products) or "torch"


def gemm_rate(device: torch.device, n: int) -> float:
    """bf16 TFLOP/s of an n x n x n product on random values."""
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    synchronize(device)
    start = time.perf_counter()
    for _ in range(20):
        a @ b
    synchronize(device)
    return 2 * n**3 * 20 / (time.perf_counter() - start) / 1e12


def step_flops(flux, tokens: int, forward: bool = False) -> float:
    """Translator.step_flops for a bare frozen transformer and all its tokens."""
    D, S = flux.inner_dim, tokens
    blocks = len(flux.transformer_blocks) + len(flux.single_transformer_blocks)
    linear, attention = 24 * D * D * S * blocks, 4 * S * S * D * blocks
    return linear + attention if forward else 2 * linear + 3 * attention


def make_optimizer(model: nn.Module) -> torch.optim.AdamW:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-4, weight_decay=1e-4, fused=trained[0].is_cuda)


def now(device: torch.device):
    """A moment of the device's own time."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed(start, end) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = [
        "| way | batch | text | s | img/s | model TFLOP/s | MFU | peak GiB | attention |"
        " products |",
        "|---" * 10 + "|",
    ]
    lines += [
        f"| {r.way} | {r.batch} | {r.text} | {r.seconds:.4f} | {r.images_s:.2f} | {r.tflops:.0f} |"
        f" {100 * r.mfu:.0f} % | {r.peak_gib:.1f} | {r.attention} | {r.products} |"
        for r in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
