"""A ComfyUI workflow for the adapters of a diptych model alone, without the guidance.

The photograph is scaled to the training size and the canvas is widened to its right by the same
width; FLUX.1-Fill with the adapters paints that half, which is cut out and saved. The format is
that of ComfyUI's API (node number -> class and inputs), which its page opens too.
"""

from typing import Any

from models.lora import LORA_FILE

# what these files are called in ComfyUI's own examples for FLUX.1-Fill
UNET, VAE = "flux1-fill-dev.safetensors", "ae.safetensors"
TEXT_ENCODERS = "clip_l.safetensors", "t5xxl_fp16.safetensors"


def workflow(
    size: tuple[int, int], prompt: str, steps: int, guidance_scale: float, seed: int
) -> dict[str, dict[str, Any]]:
    """The nodes. Args: size: height and width of the photograph as the model was trained."""
    height, width = size
    nodes: dict[str, dict[str, Any]] = {}

    def node(kind: str, title: str, **inputs: Any) -> str:
        number = str(len(nodes) + 1)
        nodes[number] = {"class_type": kind, "inputs": inputs, "_meta": {"title": title}}
        return number

    photograph = node("LoadImage", "The photograph", image="photograph.png")
    scaled = node(
        "ImageScale",
        "To the training size",
        image=[photograph, 0],
        upscale_method="bilinear",
        width=width,
        height=height,
        crop="disabled",
    )
    canvas = node(
        "ImagePadForOutpaint",
        "Room for the infrared",
        image=[scaled, 0],
        left=0,
        top=0,
        right=width,
        bottom=0,
        feathering=0,
    )
    base = node("UNETLoader", "FLUX.1-Fill", unet_name=UNET, weight_dtype="default")
    model = node(
        "LoraLoaderModelOnly",
        "The adapters (without guidance)",
        model=[base, 0],
        lora_name=LORA_FILE,
        strength_model=1.0,
    )
    clip = node(
        "DualCLIPLoader",
        "Text encoders",
        clip_name1=TEXT_ENCODERS[0],
        clip_name2=TEXT_ENCODERS[1],
        type="flux",
    )
    vae = node("VAELoader", "Autoencoder", vae_name=VAE)
    text = node("CLIPTextEncode", "The prompt of the training", text=prompt, clip=[clip, 0])
    positive = node("FluxGuidance", "Scale", conditioning=[text, 0], guidance=guidance_scale)
    negative = node("ConditioningZeroOut", "Nothing", conditioning=[text, 0])
    painted = node(
        "InpaintModelConditioning",
        "Paint the right half",
        positive=[positive, 0],
        negative=[negative, 0],
        vae=[vae, 0],
        pixels=[canvas, 0],
        mask=[canvas, 1],
        noise_mask=True,
    )
    sampled = node(
        "KSampler",
        "Euler steps",
        model=[model, 0],
        positive=[painted, 0],
        negative=[painted, 1],
        latent_image=[painted, 2],
        seed=seed,
        steps=steps,
        cfg=1.0,
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
    )
    diptych = node("VAEDecode", "Photograph and infrared", samples=[sampled, 0], vae=[vae, 0])
    infrared = node(
        "ImageCrop",
        "The infrared half",
        image=[diptych, 0],
        width=width,
        height=height,
        x=width,
        y=0,
    )
    node("SaveImage", "Save", images=[infrared, 0], filename_prefix="thermaflux")
    return nodes
