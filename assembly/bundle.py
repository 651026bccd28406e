"""A trained translator as a self-contained folder, and back.

diffusion_pytorch_model.safetensors   all that was trained, the prompt, stage 1; a random FLUX whole
translator/config.json                the run's configuration and versions
pytorch_lora_weights.safetensors      the adapters of a FLUX.1 alone, as other programs load them

What else an exported folder holds (model card, pipeline code, ...) is made by assembly/export.py.
The names are those that diffusers downloads from a hub.
"""

import json
import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from assembly.inference import STATE_FILE
from models.lora import LORA_FILE, LoraConfig, save_lora
from utils.files import whole_folder

COMPONENT = "translator"  # the folder of the pipeline's one component
CONFIG_FILE = f"{COMPONENT}/config.json"
CARD_FILE = "README.md"
OURS = "thermaflux"  # a word of every model card that we write
FILES = (
    STATE_FILE,
    COMPONENT,
    LORA_FILE,
    CARD_FILE,
    "model_index.json",
    "pipeline.py",
    "comfyui_workflow.json",
    "pictures",
)


def is_bundle(path: str | Path) -> bool:
    return (Path(path) / CONFIG_FILE).is_file()


def save_bundle(
    folder: str | Path,
    state: dict[str, Tensor],
    config: dict,
    versions: dict[str, str],
    more: dict[str, bytes] | None = None,
) -> list[str]:
    """Write the folder under a temporary name and rename it, so that two exports never mix.

    Returns the names of its files.

    Args:
        state: the trained tensors by their names in the translator (a checkpoint's `model`).
        config, versions: plain values; `config["model"]` must describe the translator.
        more: other files by their names in the folder, the first part of each one of FILES.

    Raises:
        OSError: one sentence with the folder; an export that was there before still is.
        ValueError: the folder has a README.md that is not ours.
    """
    folder, more = Path(folder).absolute(), more or {}
    assert {name.split("/")[0] for name in more} <= set(FILES)
    files = {**more, CONFIG_FILE: _text({"config": config, "versions": versions})}
    _refuse_to_replace(folder / CARD_FILE)
    try:
        there = {path.name for path in folder.iterdir()} if folder.exists() else set()
        alone = there <= set(FILES) and not folder.is_symlink()
        with whole_folder(folder if alone else folder / ".export") as part:
            for name, data in files.items():
                (part / name).parent.mkdir(exist_ok=True)
                (part / name).write_bytes(data)
            tensors = {n: x.detach().cpu().contiguous() for n, x in state.items()}
            save_file(tensors, str(part / STATE_FILE), metadata={"format": "pt"})
            if has_adapters(state, config):
                lora = LoraConfig(**config["model"]["lora_config"])
                adapters = {n.removeprefix("flux."): x for n, x in tensors.items()}
                save_lora(adapters, lora, part / LORA_FILE, {"made_by": "ThermaFlux"})
            names = [str(p.relative_to(part)) for p in sorted(part.rglob("*")) if p.is_file()]
        if not alone:
            _replace_files(folder)
        return names
    except (OSError, SafetensorError) as error:
        raise OSError(f"export {folder} was not written: {error}") from error


def has_adapters(state: dict[str, Tensor], config: dict) -> bool:
    """Whether there are adapters for a public FLUX: those of a random one are of no use."""
    base = config["model"].get("flux_fill_id")
    return base is not None and any(".lora_" in name for name in state)


def _text(values: dict) -> bytes:
    return (json.dumps(values, indent=1) + "\n").encode()


def _refuse_to_replace(card: Path) -> None:
    if card.is_file() and OURS not in card.read_text(encoding="utf-8", errors="replace").lower():
        raise ValueError(f"{card} is not one of our model cards; export to another folder")


def _replace_files(folder: Path) -> None:
    """Move the export in folder/.export to a folder that has other files too, which stay."""
    (folder / CONFIG_FILE).unlink(missing_ok=True)  # no export until the last file is in place
    (folder / LORA_FILE).unlink(missing_ok=True)  # the new one may have no adapters
    for old in (folder / COMPONENT).glob(f"{OURS}_*.py"):
        old.unlink()  # the code of another version has other names
    made = [path for path in (folder / ".export").rglob("*") if path.is_file()]
    config = folder / ".export" / CONFIG_FILE
    for path in sorted(made, key=lambda p: p == config):
        target = folder / path.relative_to(folder / ".export")
        target.parent.mkdir(exist_ok=True)
        os.replace(path, target)
    for left in sorted((folder / ".export").rglob("*"), reverse=True):
        left.rmdir()
    (folder / ".export").rmdir()


def read_bundle(folder: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """The configuration and the trained tensors by their names in the translator.

    Raises: ValueError: a file is missing or damaged, or not written by us.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))["config"]
        return config, load_file(str(folder / STATE_FILE))
    except Exception as error:  # safetensors raises its own kinds for a damaged file
        raise ValueError(
            f"{folder} is not an exported model: {type(error).__name__}: {error}"
        ) from error
