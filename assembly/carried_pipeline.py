"""ThermaFlux as a diffusers pipeline: an RGB photograph in, a thermal infrared image out.

    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    infrared = pipeline(photograph).images[0]

An exported folder holds this file as pipeline.py, as it is here; it imports nothing of ours. The
model is its component `translator` (assembly/inference.py).
"""

import itertools
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image, ImageOps

OUTPUT_TYPES = ("pil", "png16", "np", "pt")
MODES = ("RGB", "RGBA", "P", "L", "LA")  # of photographs, 8 bits a channel
TENSORS = ("latents",)  # what a callback may be given


@dataclass
class ThermaFluxOutput(BaseOutput):
    """Each list has one entry per photograph.

    images: infrared of the photographs' own sizes, as `output_type` says.
    meanings: of png16: unit, scale and offset; number * scale + offset is in the unit.
    """

    images: list[Any]
    meanings: list[dict[str, Any]] | None = None


class ThermaFluxPipeline(DiffusionPipeline):
    """Infrared images of photographs.

    What is None in a call is as the model was trained.

    Args of a call:
        image: a photograph or a list of them, of any sizes: PIL images, (H, W, 3) uint8 arrays, or
            (3, H, W) tensors in [0, 1]; arrays and tensors may be stacked.
        mode: "mean": one forward pass, the least error; "sample": sharp, other for each seed.
        num_inference_steps, guidance_scale, shift, samples, mirror: see models/sampler.py.
        seed: photograph i is a function of (seed, i), as in generate.py.
        generator: the noise is drawn from it instead, or from one for each photograph.
        keep_aspect: work at each photograph's own aspect, one at a time.
        batch_size: photographs that are translated at once, at most.
        output_type: pil: 8-bit grey; png16: PIL images of 16-bit numbers; np: (H, W) float32 arrays
            in [0, 1]; pt: (1, H, W) tensors.
        callback_on_step_end: called as (pipeline, step, time, {"latents": state}) after every step;
            step counts through the call, time runs from 1 to 0. The latents that it returns are
            gone on with.

    Raises: ValueError: something asked for is out of range, or was not trained for.
    """

    _callback_tensor_inputs = [*TENSORS]  # noqa: RUF012 (diffusers' own name and type)

    def __init__(self, translator: torch.nn.Module):
        super().__init__()
        self.register_modules(translator=translator)

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        mode: str | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        shift: float | None = None,
        samples: int | None = None,
        mirror: bool | None = None,
        seed: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        keep_aspect: bool = False,
        batch_size: int = 8,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = TENSORS,
    ) -> ThermaFluxOutput | tuple:
        """See the class."""
        _check(output_type, batch_size, callback_on_step_end_tensor_inputs, seed, generator)
        photographs = _photographs(image)
        draws = _draws(generator, len(photographs))
        sampling = self.translator.sampling(
            mode=mode,
            steps=num_inference_steps,
            guidance_scale=guidance_scale,
            shift=shift,
            samples=samples,
            mirror=mirror,
            seed=seed,
        )
        finish = self._finish(output_type)
        numbers: dict[tuple[int, int], list[int]] = {}  # of the photographs of a size
        for i, photograph in enumerate(photographs):
            numbers.setdefault(self.translator.size_for(photograph, keep_aspect), []).append(i)
        batches = [
            (size, [own[i] for i in batch])
            for size, own in numbers.items()
            for batch in _batches(len(own), batch_size)
        ]
        passes = sampling.steps * sampling.samples if sampling.mode == "sample" else 1
        found: dict[int, np.ndarray] = {}
        with self.progress_bar(total=len(batches) * passes * (1 + sampling.mirror)) as bar:
            on_step = self._on_step(bar, callback_on_step_end, callback_on_step_end_tensor_inputs)
            for size, batch in batches:
                own, mine = ([of[i] for i in batch] for of in (photographs, draws))
                found |= zip(batch, self.translator(own, mine, sampling, size, on_step))
        self.maybe_free_model_hooks()
        images, meanings = finish([found[i] for i in range(len(photographs))])
        return ThermaFluxOutput(images, meanings) if return_dict else (images, meanings)

    def _on_step(self, bar: Any, callback: Callable[..., dict] | None, tensors: Sequence[str]):
        """What the sampler calls after each step with (step, time, state)."""
        steps = itertools.count()

        def on_step(_: int, time: float, state: torch.Tensor) -> torch.Tensor:
            bar.update()
            if callback is None:
                return state
            given = {name: state for name in tensors}
            return (callback(self, next(steps), time, given) or {}).get("latents", state)

        return on_step

    def _finish(self, output_type: str) -> Callable:
        """(H, W) arrays -> images as `output_type` says, and their meanings."""
        translator = self.translator
        if output_type == "png16":
            translator.numbers(np.zeros((1, 1), np.float32))  # refused now, not after the work

            def numbers(made: list[np.ndarray]) -> tuple[list, list]:
                pairs = [translator.numbers(x) for x in made]
                return [Image.fromarray(x) for x, _ in pairs], [facts for _, facts in pairs]

            return numbers
        form = {
            "np": lambda x: x,
            "pt": lambda x: torch.from_numpy(x)[None],
            "pil": lambda x: Image.fromarray(translator.grey_levels(x)),
        }[output_type]
        return lambda made: ([form(x) for x in made], None)

    def enable_model_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """Keep stage 1, autoencoder and FLUX on the CPU and move each to the GPU while it works.

        Raises:
            RuntimeError: there is no accelerator, and no device is named.
            ImportError: accelerate is not installed.
        """
        try:
            from accelerate import cpu_offload_with_hook
        except ImportError as error:
            text = "enable_model_cpu_offload needs accelerate: pip install accelerate"
            raise ImportError(text) from error
        device = device or torch.accelerator.current_accelerator(check_available=True)
        if device is None:
            raise RuntimeError("enable_model_cpu_offload needs an accelerator, and there is none")
        device = torch.device(device)
        if gpu_id is not None:
            device = torch.device(device.type, gpu_id)
        for hook in getattr(self, "_all_hooks", []):
            hook.remove()
        self.to("cpu", silence_dtype_warnings=True)
        large, small = self.translator.parts()
        self._offload_device, self._all_hooks, before = device, [], None
        for module in large:
            _, before = cpu_offload_with_hook(module, device, prev_module_hook=before)
            self._all_hooks.append(before)
        for module in small:
            module.to(device)

    def enable_sequential_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """Raises: NotImplementedError: enable_model_cpu_offload is what there is."""
        raise NotImplementedError(
            "this model cannot be offloaded layer by layer; use enable_model_cpu_offload()"
        )

    def save_pretrained(
        self, save_directory: str, push_to_hub: bool = False, **unused: Any
    ) -> None:
        """Copy the exported folder that this pipeline was loaded from; it never changes weights.

        Raises: ValueError: it was loaded from a checkpoint, or is to be pushed too.
        """
        if push_to_hub:
            raise ValueError("save it, and push the folder: hf upload USER/NAME FOLDER")
        source = self.translator.source
        if source is None:
            raise ValueError("this pipeline was loaded from a checkpoint; export.py exports those")
        shutil.copytree(source, save_directory, dirs_exist_ok=True)


def _photographs(image: Any) -> list[np.ndarray]:
    """Each photograph as (H, W, 3) uint8. Raises: ValueError: names one that is no photograph."""
    several = isinstance(image, (list, tuple)) or getattr(image, "ndim", 0) == 4
    images = list(image) if several else [image]
    if not images:
        raise ValueError("image is an empty list")
    return [_photograph(x, i) for i, x in enumerate(images)]


def _photograph(image: Any, number: int) -> np.ndarray:
    if isinstance(image, Image.Image):
        if image.mode not in MODES:
            raise ValueError(f"image {number} is in {image.mode}, not in {', '.join(MODES)}")
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    if isinstance(image, torch.Tensor) and image.ndim == 3 and image.is_floating_point():
        image = (image.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
        image = image.cpu().numpy()
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape[2:] == (3,):
        return image
    what = getattr(image, "shape", None) or type(image).__name__
    kind = getattr(image, "dtype", "")
    raise ValueError(
        f"image {number} is {what} {kind}; give PIL images, (H, W, 3) uint8 arrays or (3, H, W)"
        " tensors in [0, 1], several in a list or stacked"
    )


def _draws(generator: Any, count: int) -> list:
    """The source of each photograph's noise: its number, or its generator."""
    if generator is None:
        return list(range(count))
    if isinstance(generator, torch.Generator):
        return [generator] * count
    if len(generator) != count:
        raise ValueError(f"there are {len(generator)} generators for {count} photographs")
    return list(generator)


def _batches(count: int, batch_size: int) -> list[range]:
    """Numbers of the photographs of each batch, as equal in length as can be."""
    length = math.ceil(count / math.ceil(count / batch_size))
    return [range(i, min(i + length, count)) for i in range(0, count, length)]


def _check(
    output_type: str, batch_size: int, tensors: Sequence[str], seed: Any, generator: Any
) -> None:
    """Raises: ValueError: all that is wrong, at once."""
    wrong = []
    if output_type not in OUTPUT_TYPES:
        wrong.append(f"output_type is {output_type!r}; there are {', '.join(OUTPUT_TYPES)}")
    if batch_size < 1:
        wrong.append(f"batch_size must be 1 or more, got {batch_size}")
    if unknown := sorted(set(tensors) - set(TENSORS)):
        wrong.append(f"callbacks can be given {', '.join(TENSORS)}, not {', '.join(unknown)}")
    if seed is not None and generator is not None:
        wrong.append("give seed or generator, not both")
    if wrong:
        raise ValueError("; ".join(wrong))
