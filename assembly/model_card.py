"""The model card of an exported folder: README.md with the front matter that a hub reads."""

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from assembly.bundle import STATE_FILE
from configs.schema import TrainConfig
from models.lora import LORA_FILE
from utils import results as tables

# of all FLUX.1 [dev] models
LICENCE_NAME = "flux-1-dev-non-commercial-license"
LICENCE_LINK = "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md"
ALONE = (
    f"{LORA_FILE} alone is the unguided model: the guidance, stage 1 and the prompt are in"
    f" {STATE_FILE}, which only the ThermaFlux pipeline and generate.py read."
)
METRICS = {"psnr": "PSNR", "ssim": "SSIM", "mae": "MAE"}  # in the front matter


def model_card(
    cfg: TrainConfig,
    has_adapters: bool,
    has_workflow: bool,
    results: dict[str, Any] | None,
    pictures: list[str],
    hub_id: str | None,
) -> str:
    """The text of README.md.

    Args:
        results: what evaluate.py wrote as results.json.
        pictures: names in the folder.
        hub_id: where it will be; None: the reader's own folder.
    """
    parts = [
        "# ThermaFlux\n",
        "RGB photograph in, thermal infrared image out."
        f" {_what_it_is(cfg)} Images of {_size(cfg)} pixels; others are resized, and back.\n",
        *(f"![Photograph, maps, generated and true infrared]({name})\n" for name in pictures),
        _how_to_use(cfg, hub_id),
        _files(has_adapters, has_workflow),
        _training(cfg),
        _evaluation(results),
        _limits(cfg),
        _licence(cfg),
    ]
    front = _front_matter(cfg, has_adapters, results, pictures)
    return f"---\n{front}\n---\n\n" + "\n".join(part for part in parts if part)


def is_flux_dev(cfg: TrainConfig) -> bool:
    """Whether the base is FLUX.1-Fill, -dev or -Kontext, which these layouts are for."""
    return bool(cfg.model.flux_fill_id) and cfg.model.layout in ("diptych", "channels", "reference")


def on_hub(base: str | None) -> bool:
    """Whether a base is named by a hub id, not by a folder of this machine."""
    return base is not None and base.count("/") == 1 and not base.startswith((".", "/", "~"))


def _front_matter(
    cfg: TrainConfig, has_adapters: bool, results: dict[str, Any] | None, pictures: list[str]
) -> str:
    base = cfg.model.flux_fill_id
    facts: dict[str, Any] = {}
    if is_flux_dev(cfg):
        facts |= dict(license="other", license_name=LICENCE_NAME, license_link=LICENCE_LINK)
    if on_hub(base):
        facts |= dict(base_model=base, base_model_relation="adapter")
    if results and (measured := _measured(cfg, results)):
        names = [entry.metric_type for entry in measured]
        facts |= dict(model_name="ThermaFlux", metrics=names, eval_results=measured)
    if pictures:
        facts["widget"] = [{"text": cfg.model.prompt, "output": {"url": n}} for n in pictures]
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="image-to-image",
        tags=["thermaflux", "thermal-infrared", "rgb-to-thermal", *(["lora"] * has_adapters)],
        **facts,
    )
    return data.to_yaml()


def _measured(cfg: TrainConfig, results: dict[str, Any]) -> list[EvalResult]:
    """The measures of the model in the mode that it samples in by itself."""
    methods, data = results["methods"], Path(results["data"]).name
    own = methods.get(cfg.sampling.mode) or methods.get("ours", {})  # as assembly/rows.py names it
    return [
        EvalResult(
            task_type="image-to-image",
            dataset_type=data,
            dataset_name=data,
            dataset_split=results["split"],
            metric_type=name,
            metric_name=title,
            metric_value=round(own[name], 4),
        )
        for name, title in METRICS.items()
        if name in own
    ]


def _what_it_is(cfg: TrainConfig) -> str:
    base = cfg.model.flux_fill_id
    if base:
        guided = "cross-attention to maps of the scene" if cfg.model.inject else "no guidance"
        return f"Adapters (LoRA) for {base if on_hub(base) else 'FLUX'}, and {guided}."
    how = "trained from scratch" if cfg.model.train_base else "random but for what was trained"
    return f"A small FLUX (`{cfg.model.preset}`), {how}: no base weights are needed."


def _size(cfg: TrainConfig) -> str:
    height, width = cfg.data.height_width()
    return f"{width} x {height}"


def _snippet(hub_id: str | None, mode: str) -> str:
    """The lines that the card shows, for the folder where they are run or a hub id."""
    return f"""from diffusers import DiffusionPipeline
from diffusers.utils import load_image

pipeline = DiffusionPipeline.from_pretrained("{hub_id or "."}", trust_remote_code=True)
photograph = load_image("photograph.png")
infrared = pipeline(photograph, mode="{mode}").images[0]
infrared.save("infrared.png")
"""


def _how_to_use(cfg: TrainConfig, hub_id: str | None) -> str:
    base, gated = cfg.model.flux_fill_id, ""
    if base:
        where = f"`{base}`" if on_hub(base) else "a folder of the machine that trained it"
        gated = (
            f"\nThe base weights are read from {where}: where they are gated, accept their licence"
            " and log in first, or set `flux_fill_id` in `translator/config.json` to a folder of"
            " yours. `torch_dtype=torch.bfloat16` and `pipeline.enable_model_cpu_offload()` save"
            " memory.\n"
        )
    return (
        "## How to use\n\n```\npip install diffusers transformers torch torchvision accelerate\n"
        f"```\n\n```python\n{_snippet(hub_id, cfg.sampling.mode)}```\n{gated}\n"
        "`trust_remote_code=True` runs the code in this folder (`pipeline.py` and `translator/`);"
        " it is ThermaFlux's own, under the MIT licence. Weights are safetensors.\n"
        "Also: a list of photographs, `num_inference_steps`, `seed` or `generator`,"
        ' `output_type="png16"` (16-bit numbers with their unit), "np" or "pt", and'
        " `keep_aspect=True`.\n"
    )


def _files(has_adapters: bool, has_workflow: bool) -> str:
    rows = [f"- `{STATE_FILE}`: all that was trained; `translator/`: configuration and code"]
    if has_adapters:
        rows.append(f"- {ALONE} A stock pipeline reads it with `load_lora_weights`.")
    if has_workflow:
        rows.append("- `comfyui_workflow.json`: for ComfyUI, of the adapters alone: unguided too.")
    return "## Files\n\n" + "\n".join(rows) + "\n"


def _training(cfg: TrainConfig) -> str:
    trained = {0.0: "samples alone", 1.0: "the mean alone"}
    modes = trained.get(cfg.flow.mean_share, "samples and the mean")
    return (
        "## Training\n\n"
        f"Data: `{Path(cfg.data.path).name}`. Trained for {modes}; layout `{cfg.model.layout}`."
        " The whole configuration is in `translator/config.json`.\n"
    )


def _evaluation(results: dict[str, Any] | None) -> str:
    if not results:
        return "## Evaluation\n\nNone was given when this folder was exported.\n"
    lines = [
        f"{results['pairs']} pairs of `{Path(results['data']).name}`, split {results['split']};"
        " ± is half of the 95 % interval over images.\n",
        *tables.table(results, results["run"]["seconds_an_image"]),
        *(f"\n> {warning}" for warning in results["warnings"]),
    ]
    return "## Evaluation\n\n" + "\n".join(lines) + "\n"


def _limits(cfg: TrainConfig) -> str:
    if cfg.window:
        low, high = cfg.window
        values = (
            f"Values 0 and 1 are {low:g} and {high:g} {cfg.unit}. They are what such a scene would"
            " likely show, not a measurement: a photograph does not hold a temperature."
        )
    else:
        values = (
            "Not radiometric: each training image had its own range, so that values mean warmer and"
            " colder within one image, and no temperature."
        )
    return (
        f"## Limits\n\n{values} Scenes, cameras, seasons and hours unlike the training data's give"
        " wrong contrasts, in part inverted ones. Not for decisions about safety or people.\n"
    )


def _licence(cfg: TrainConfig) -> str:
    if is_flux_dev(cfg):
        weights = (
            "The weights are a derivative of a FLUX.1 [dev] model:"
            f" [FLUX.1 [dev] Non-Commercial License]({LICENCE_LINK})."
        )
    elif cfg.model.flux_fill_id:
        weights = "The weights are a derivative of the base model, whose licence holds."
    else:
        weights = "The weights have no base; name a licence of yours."
    return f"## Licence\n\nThe code is MIT. {weights}\n"
