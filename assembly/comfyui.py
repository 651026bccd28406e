"""A ComfyUI workflow for the adapters of a diptych model alone, without the guidance.

comfyui_workflow.json is a workflow for 512 x 512, in the format of ComfyUI's API (node number ->
class and inputs), which its page opens too: the photograph is scaled to the training size and the
canvas widened to its right by as much; FLUX.1-Fill with the adapters paints that half, which is cut
out and saved. Model files are called as in ComfyUI's own examples.
"""

import json
from pathlib import Path
from typing import Any

from models.lora import LORA_FILE
from models.sampler import SamplingConfig

TEMPLATE = Path(__file__).with_name("comfyui_workflow.json")


def workflow(size: tuple[int, int], prompt: str, sampling: SamplingConfig) -> dict[str, Any]:
    """The nodes, for photographs of `size` (height and width), as the model was trained."""
    height, width = size
    nodes = json.loads(TEMPLATE.read_text(encoding="utf-8"))
    changes: dict[str, dict[str, Any]] = {
        "ImageScale": {"width": width, "height": height},
        "ImagePadForOutpaint": {"right": width},
        "LoraLoaderModelOnly": {"lora_name": LORA_FILE},
        "CLIPTextEncode": {"text": prompt},
        "FluxGuidance": {"guidance": sampling.guidance_scale},
        "KSampler": {"seed": sampling.seed, "steps": sampling.steps},
        "ImageCrop": {"width": width, "height": height, "x": width},
    }
    for node in nodes.values():  # one of each class
        node["inputs"] |= changes.get(node["class_type"], {})
    return nodes
