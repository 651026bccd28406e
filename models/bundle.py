"""A trained translator as a folder that needs nothing else, and back.

pytorch_lora_weights.safetensors   adapters, as `FluxFillPipeline.load_lora_weights` reads them
thermaflux.safetensors             guidance, stage 1, prompt; and FLUX where it was trained
thermaflux.json                    the run's configuration and versions
"""

import json
import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.lora import LORA_FILE, lora_layers, save_lora
from models.translator import Translator
from utils.files import whole_folder

STATE_FILE = "thermaflux.safetensors"
CONFIG_FILE = "thermaflux.json"
FILES = LORA_FILE, STATE_FILE, CONFIG_FILE


def is_bundle(path: str | Path) -> bool:
    return (Path(path) / CONFIG_FILE).is_file()


def save_bundle(
    folder: str | Path,
    translator: Translator,
    state: dict[str, Tensor],
    config: dict,
    versions: dict[str, str],
) -> None:
    """Write the folder: beside its place, then renamed, so that no two exports are ever mixed.

    Args:
        state: the trained tensors by their names in `translator` (a checkpoint's `model`).
        config, versions: plain values; `config["model"]` must describe the translator.

    Raises:
        OSError: one sentence with the folder; an export that was there before still is.
    """
    folder = Path(folder).absolute()
    notes = {"config": config, "versions": versions, "text_tokens": len(translator.prompt.tokens)}
    rest = {n: x.detach().cpu().contiguous() for n, x in state.items() if ".lora_" not in n}
    try:
        there = {path.name for path in folder.iterdir()} if folder.exists() else set()
        alone = there <= set(FILES) and not folder.is_symlink()
        with whole_folder(folder if alone else folder / ".export") as part:
            if lora_layers(translator.flux):
                save_lora(translator.flux, part / LORA_FILE, {"made_by": "ThermaFlux"})
            save_file(rest, str(part / STATE_FILE), metadata={"format": "pt"})
            (part / CONFIG_FILE).write_text(json.dumps(notes, indent=1) + "\n", encoding="utf-8")
        if not alone:
            _replace_files(folder)
    except (OSError, SafetensorError) as error:
        raise OSError(f"export {folder} was not written: {error}") from error


def _replace_files(folder: Path) -> None:
    """Move the export in folder/.export to a folder that has other files too, which stay."""
    (folder / CONFIG_FILE).unlink(missing_ok=True)  # no export until the last file is in place
    (folder / LORA_FILE).unlink(missing_ok=True)  # the new one may have no adapters
    for path in sorted((folder / ".export").iterdir(), key=lambda p: p.suffix == ".json"):
        os.replace(path, folder / path.name)
    (folder / ".export").rmdir()


def read_bundle(folder: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """The configuration and the trained tensors by their names in the translator.

    Raises: ValueError: a file is missing or damaged, or not written by us.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))["config"]
        state = load_file(str(folder / STATE_FILE))
        adapters = load_file(str(folder / LORA_FILE)) if (folder / LORA_FILE).exists() else {}
        lora = config["model"]["lora_config"]
        for key, tensor in adapters.items():
            scale = lora["lora_alpha"] / lora["r"] if ".lora_B." in key else 1.0
            state["flux." + key.removeprefix("transformer.")] = tensor / scale
    except Exception as error:  # safetensors raises its own kinds for a damaged file
        raise ValueError(
            f"{folder} is no exported model: {type(error).__name__}: {error}"
        ) from error
    return config, state
